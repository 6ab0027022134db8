"""Purify a backdoored classifier with a small clean set: with Model-Contrastive Learning, or what it is compared with.

    python main.py                                  the CIFAR-10 victim in weight/CIFAR10
    python main.py --dataset shapes                 the same on drawn pictures: no download
    python main.py --model FILE --defense none      only measure a model
    python main.py --defense all --model FILE ...   every defense on each of these victims, and a table

Looks for the label that a backdoor leads to; where there is none, says so and leaves the model alone. Prints ACC and
ASR before and after; writes weight/<name>.tar and results/<name>/ (metrics.json, history.csv, pictures, and report.html
with all of it; comparison.csv, .md and .png of a comparison).
"""

import os

import config
from attacks.victim import load_victim
from data_loader import get_clean_split, get_eval_set, load_images, spread
from defenses import DEFENSES, Case
from defenses.detection import choose_label, search_target
from defenses.inversion import ANY, label_name
from utils.board import open_board
from utils.checkpoint import find_weights, read_checkpoint, save_checkpoint
from utils.comparison import comparison_row, comparison_text, write_comparison
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.errors import RunError, UserError, run_script
from utils.files import check_folder, digest_file, remove_file, write_csv, write_json
from utils.metrics import evaluate, watcher
from utils.page import write_page
from utils.plots import SAMPLE, draw_run
from utils.report import Stopwatch, figures_table, published_table, run_facts, search_table
from utils.resume import finished_run, resume_command
from utils.seed import generator

# Options of a defense that are used up before it begins: to find the target, and to make the batches.
SPENT = {"target", "force", "batch_size", "augment"}


def main():
    opt, given = config.parse("main.py")
    opt.precision = pick_precision(opt.precision, pick_device(opt.device))
    if not config.compares(opt):
        (path,) = victim_paths(opt)
        name = opt.name or f"{opt.dataset}-{file_stem(path)}-{opt.defense}"
        return run(config.one_run(opt, model=path), given, name)
    try:
        compare(opt, given)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the runs that ended are kept; go on with: {resume_command()}") from None


def compare(opt, given):
    """Every defense on every victim, a run each; what a stopped comparison has finished is not run again."""
    name = opt.name or f"{opt.dataset}-comparison"
    defenses = list(DEFENSES) if opt.defense == "all" else [opt.defense]
    paths, rows, failed = victim_paths(opt), [], []
    names = [file_stem(path) for path in paths]
    for path in paths:
        read_checkpoint(path)  # what cannot be read is told now, not after hours
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    for victim, path in zip(names, paths, strict=True):
        for defense in defenses:
            one, its_name = config.one_run(opt, model=path, defense=defense), os.path.join(name, f"{victim}-{defense}")
            metrics = opt.resume and finished_run(os.path.join(opt.log_root, its_name), vars(one), path)
            print(f"\n{victim}, {defense}" + " (finished before)" * bool(metrics))
            try:
                rows.append(comparison_row(victim, defense, metrics or run(one, given, its_name)))
            except (RunError, UserError) as error:
                if not (rows or failed) and isinstance(error, UserError):
                    raise
                failed.append(f"{victim}, {defense}: {error}")
                print(f"failed: {error}")
            write_comparison(os.path.join(opt.log_root, name), rows)
    if rows:
        print("", comparison_text(rows), sep="\n")
    if failed:
        raise RunError(f"{len(failed)} of {len(rows) + len(failed)} runs failed; the first: {failed[0]}")


def run(opt, given, name) -> dict:
    """One victim, one defense: measure, defend, measure again, write what there is to keep. Returns metrics.json."""
    device, clock, path = pick_device(opt.device), Stopwatch(), opt.model
    results, purified = os.path.join(opt.log_root, name), os.path.join(opt.checkpoint_root, f"{name}.tar")
    check_folder(results, "history.csv", "metrics.json", "report.html")
    check_folder(os.path.dirname(purified), os.path.basename(purified))
    if os.path.realpath(purified) == os.path.realpath(path):
        raise UserError(f"the purified weights would replace the victim, {path}; give another --name")
    log = open_board(results) if opt.tensorboard else None

    with clock("data"):
        train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
        victim, attack, facts = load_victim(opt, given, path, test_set, device)
        test = get_eval_set(test_set.images, test_set.labels, attack, device)
        split = get_clean_split(opt, train_set, attack, device) if opt.defense != "none" else None
        of_all = f"{len(train_set.labels):,} training images"
        del train_set  # 150 MB that nobody needs any more
        keep_freed_memory()
        if isinstance(opt.target, int) and opt.target >= attack.num_class:
            raise UserError(f"--target {opt.target} is not one of the labels 0..{attack.num_class - 1}")
        if opt.target == "auto" and attack.num_class < 3:
            raise UserError("a search sets one label against the others, which takes three or more; give --target")
    print(f"victim {path}: {facts['arch']}, {attack.describe()}")
    with clock("evaluate"):
        figures = {"before": evaluate(victim, test, attack)}
    models, curves, history, trigger = {"before": victim}, [], [], None

    target, searched = find_target(opt, victim, split, attack.num_class, device, clock)
    if opt.defense != "none" and not (searched and target is None):
        told = "" if target is None else f"; against {label_name(target)}"
        print(f"clean split: {len(split.index):,} of {of_all}{told}")
        look = watcher(split.watched, attack, opt.print_freq, log)

        def watch(model, epoch):
            with clock("evaluate"):  # not the defense's own time
                return look(model, epoch)

        curves = [{"epoch": 0, **watch(victim, 0)}]
        mirrored = opt.augment == "crop_flip"
        case = Case(victim, split.training, split.plain, mirrored, device, opt.seed, clock, target, watch)
        settings = {name: getattr(opt, name) for name in config.DEFENSES[opt.defense] if name not in SPENT}
        models["after"], history, trigger = DEFENSES[opt.defense](case, precision=opt.precision, **settings)
        with clock("evaluate"):
            figures["after"] = evaluate(models["after"], test, attack)

    remove_file(os.path.join(results, "metrics.json"))  # an older run's; this one's is written last
    if "after" in models:
        save_checkpoint(purified, models["after"], **facts, metrics=figures["after"])
        write_csv(os.path.join(results, "history.csv"), history)
        print(f"purified: {purified}")
    else:
        remove_file(os.path.join(results, "history.csv"))
        if os.path.exists(purified):
            print(f"nothing was purified: {purified} is an older run's")
    print()
    print(published_table(opt.dataset, **figures, defense=opt.defense), "", sep="\n")
    print(figures_table(test_set.classes, **figures))
    with clock("report"):
        few = spread(len(test_set.labels), SAMPLE)
        sample = get_eval_set(test_set.images[few], test_set.labels[few], attack, device)
        pictures = draw_run(results, test_set.classes, sample, attack, models, figures, curves + history, trigger)
    worked_against = "any" if target == ANY else target
    metrics = {
        "model": path,
        "model_sha256": digest_file(path),
        "defense": opt.defense,
        "before": figures["before"],
        "after": figures.get("after"),
        "detected_label": worked_against if searched and any(found.flagged for found in searched) else None,
        "worked_against": worked_against,
        "search": searched and [found.facts() for found in searched],
        "trigger": trigger and trigger.facts(),
        **run_facts(vars(opt), attack, device, clock.read()),
    }
    write_page(os.path.join(results, "report.html"), name, metrics, test_set.classes, pictures)
    write_json(os.path.join(results, "metrics.json"), metrics)  # last: a run that has it has all
    print(f"\nreport: {os.path.join(results, 'report.html')}")
    return metrics


def find_target(opt, victim, split, num_class, device, clock):
    """The label to work against, or ANY, and the rows of the search for it; None for what there is not."""
    if opt.target != "auto":
        return ANY if opt.target == "any" else opt.target, None
    with clock("detect"):
        rng = generator(opt.seed, "search")
        searched = search_target(victim, split.search, num_class, device, rng, precision=opt.precision)
    print(search_table([found.facts() for found in searched]))
    target, told = choose_label(searched, opt.force)
    print(told)
    return target, searched


def victim_paths(opt) -> list[str]:
    """--model, else the data set's victim: one's own, or the one that is shipped."""
    return opt.model or [find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-badnet")]


def file_stem(path: str) -> str:
    """What a run calls the model in a file: the file's name without the endings of weights."""
    name = os.path.basename(path)
    for ending in (".tar", ".pth", ".pt", ".safetensors"):
        name = name.removesuffix(ending)
    return name


if __name__ == "__main__":
    run_script(main, "nothing of this run is kept: weights and figures are written at its end")
