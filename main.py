"""Remove a backdoor from an image classifier with MCL or a baseline defense, given a small clean set.

    python main.py                                  purify the shipped CIFAR-10 victim
    python main.py --dataset shapes                 the same on drawn images: no download
    python main.py --model FILE                     purify a model of your own
    python main.py --model FILE --defense none      only measure it
    python main.py --defense all --model FILE ...   compare the defenses, or those named, on one victim or several
    torchrun --nproc_per_node=N main.py ...         the same, the runs of the comparison dealt out to N processes

Searches for the target label; if no label is flagged, the model is left unchanged. Prints ACC and ASR before and after.
Writes weight/<name>.tar and results/<name>/: metrics.json, history.csv, pictures, and report.html with all of them.
"""

import os
import traceback
from functools import partial
from itertools import product

import config
from attacks import Attack, UnknownAttack, build_attack
from attacks.retune import retuned_metrics
from attacks.stated import ATTACK_OPTIONS, options_as_used
from data_loader import get_clean_split, get_eval_set, get_normalization, get_retuning_batches, load_images
from defenses import DefenseContext, find_target, is_purified, remove_backdoors
from defenses.inversion import ANY_OTHER, label_name
from models.loading import load_classifier, load_clean_model
from utils.checkpoint import check_data, file_stem, find_weights, read_checkpoint, save_checkpoint
from utils.cli import is_comparison, listed
from utils.datasets import MIRRORED
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.distributed import torchrun_processes
from utils.errors import RunError, UserError, run_script
from utils.files import announce_replacement, check_writable, refuse_to_replace, remove_file, sha256_of
from utils.grid import deal_out, lock
from utils.metrics import evaluate, make_monitor
from utils.progress import Stopwatch
from utils.reporting.comparison import comparison_row, comparison_text, write_comparison
from utils.reporting.plots import SAMPLE_SIZE
from utils.reporting.save import save_results
from utils.reporting.tables import metrics_table, published_rows, retuned_rows, search_rows, text_table, verdict
from utils.reporting.tensorboard import open_tensorboard
from utils.resume import finished_run, resume_command

INVERTED_IMAGES = 1_000  # of the test set, to measure the inverted trigger on


def main():
    opt, explicit = config.parse("main.py", description=__doc__)
    opt.precision = pick_precision(opt.precision, pick_device(opt.device))
    opt.model = opt.model or [find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-badnet")]
    processes = torchrun_processes()
    if is_comparison(opt):
        try:
            return compare(opt, explicit, processes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"finished runs are kept; continue with: {resume_command()}") from None
    if processes.count > 1:
        raise UserError("several processes share the runs of a comparison, and this is one run; start it with python")
    (path,), (seed,) = opt.model, opt.seeds or [opt.seed]
    name = opt.name or f"{opt.dataset}-{file_stem(path)}-{opt.defense}"
    if run(config.single_run_options(opt, model=path, seed=seed), explicit, name)["purified"] is False:
        raise RunError("the inverted trigger still works after the defense; no weights were saved")


def run(opt, explicit, name) -> dict:
    """One victim, one defense: measure, defend, measure again, save. Returns the content of metrics.json."""
    device, clock = pick_device(opt.device), Stopwatch()
    results, purified_path = check_output(opt, name)
    log = open_tensorboard(results) if opt.tensorboard else None
    with clock("data"):
        train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
        victim, attack, opt, metadata = load_victim(opt, explicit, test_set, device)
        eval_set = partial(get_eval_set, test_set.images, test_set.labels, attack, device)
        test, test_part, sample = eval_set(), eval_set(INVERTED_IMAGES), eval_set(SAMPLE_SIZE)
        split = get_clean_split(opt, train_set, attack, device) if opt.defense != "none" else None
        retuning = get_retuning_batches(opt, train_set, attack, device) if opt.retune else None
        reference = load_reference(opt, attack.num_class, test_set.size, device) if opt.retune else None
        train_count = len(train_set.labels)
        del train_set  # 150 MB that are no longer needed
        keep_freed_memory()
    print(f"victim {opt.model}: {opt.arch}, {attack.describe()}", end="", flush=True)
    with clock("evaluate"):
        metrics = {"before": evaluate(victim, test, attack), "after": None}
    print(f", ACC {metrics['before']['acc']:.2f} %")  # before a long search: with a wrong --normalize it is low
    models, history, triggers = {"before": victim}, [], {}

    target, scores = label_to_defend(opt, victim, split, attack.num_class, device, clock)
    if opt.defense != "none" and (scores is None or target is not None):  # else the search found nothing
        goal = "" if target is None else f"; defending against {label_name(target)}"
        print(f"clean split: {len(split.index):,} of {train_count:,} training images{goal}")
        monitor = clock("evaluate")(make_monitor(split.monitor_set, attack, opt.print_freq))
        history = [{"epoch": 0, **monitor(victim, 0)}]
        models["after"], rows, triggers = defend(opt, victim, split, target, attack.num_class, device, clock, monitor)
        history += rows
        for row in history if log else ():  # of the students that were dropped, none
            log({name: value for name, value in row.items() if name != "epoch"}, row["epoch"])
        with clock("evaluate"):
            metrics["after"] = evaluate(models["after"], test, attack)
    with clock("evaluate"):
        inverted = measure_inverted(models, triggers, test_part.clean)
    purified = models.get("after") if inverted["purified"] is not False else None

    print("", text_table(*published_rows(opt.dataset, **metrics, defense=opt.defense)), "", sep="\n")
    print(metrics_table(test_set.classes, **metrics))
    metrics = run_metrics(opt, metrics | inverted, target, scores, triggers.get(target))
    if retuning:
        with clock("retune"):
            metrics |= measure_retuned(models.get("after", victim), reference, retuning, test, attack, device)
    save_purified(purified_path, results, purified, {**metadata, "metrics": metrics["after"]})
    drawn = {"sample": sample, "attack": attack, "models": models, "history": history, "trigger": triggers.get(target)}
    settings = {"options": vars(opt), "device": device, "clock": clock}
    metrics = save_results(results, name, metrics, classes=test_set.classes, **drawn, **settings)
    print(f"\nreport: {os.path.join(results, 'report.html')}\n{verdict(metrics)}")
    return metrics


def compare(opt, explicit, processes):
    """Run every defense on every victim with every seed, and tabulate the results.

    Finished runs are not repeated with --resume, or if several processes share the runs: each then reads the results of
    the others, and the main process writes the tables.
    """
    name = opt.name or f"{opt.dataset}-comparison"
    checkpoints = {path: read_checkpoint(path) for path in opt.model}  # an unreadable file ends the run now, not later
    runs, rows, failures = planned_runs(opt, name), {}, []
    planned = [(victim, run_options.defense) for victim, run_options in runs.values()]
    outputs = [os.path.join(opt.checkpoint_root, f"{run_name}.tar") for run_name in runs]
    refuse_to_replace([*opt.model, opt.retune_reference], outputs)
    if not opt.resume and processes.count == 1:
        announce_replacement(os.path.join(opt.log_root, name), "comparison.csv")
    if processes.count > 1:
        with lock(os.path.join(opt.log_root, name, ".data.lock"), wait=True):  # the first one may have to download it
            load_images(opt, "train")
    for run_name in deal_out(os.path.join(opt.log_root, name), runs, processes.count):
        victim, run_options = runs[run_name]
        title = ", ".join([victim, run_options.defense, *([f"seed {run_options.seed}"] if opt.seeds else [])])
        try:
            used = vars(options_as_used(run_options, explicit, checkpoints[run_options.model]))
            earlier = os.path.join(opt.log_root, run_name), used, run_options.model
            metrics = finished_run(*earlier) if opt.resume or processes.count > 1 else None
            print(f"\n{title}{' (finished before)' if metrics else ''}")
            metrics = metrics or run(run_options, explicit, run_name)
            rows[run_name] = comparison_row(victim, run_options.defense, metrics)
        except (RunError, UserError) as error:
            failures.append((f"{title}: {error}", type(error)))
            print(f"failed: {error}")
        except Exception as error:  # noqa: BLE001 - a network of others can raise anything; the other runs go on
            failures.append((f"{title}: {type(error).__name__}: {error}", RunError))
            traceback.print_exc()
        done = [rows[finished] for finished in runs if finished in rows]
        if processes.is_main:
            write_comparison(os.path.join(opt.log_root, name), done, planned)
    if rows:
        print("", comparison_text(done, planned), sep="\n")
    if failures and processes.is_main:  # tries every run that failed; torchrun would stop it if another process failed
        kind = RunError if rows else failures[0][1]
        raise kind(f"{len(failures)} of {len(runs)} runs failed; the first: {failures[0][0]}")


def planned_runs(opt, name) -> dict:
    """The runs of a comparison: name of the results folder -> name of the victim, options of the run."""
    defenses = listed(opt.defense)
    victims, seeds, runs = [file_stem(path) for path in opt.model], opt.seeds or [opt.seed], {}
    if len(set(victims)) < len(victims):
        victims = [f"{number}-{victim}" for number, victim in enumerate(victims, 1)]
    for (victim, path), defense, seed in product(zip(victims, opt.model, strict=True), defenses, dict.fromkeys(seeds)):
        folder = "-".join([victim, defense, *([str(seed)] if len(seeds) > 1 else [])])
        run_options = config.single_run_options(opt, model=path, defense=defense, seed=seed)
        runs[os.path.join(name, folder)] = victim, run_options
    return runs


def load_victim(opt, explicit, test_set, device):
    """Load opt.model, frozen, and its attack, from the file or else from the options; unknown if neither states it.

    Args:
        explicit: names of the options that the user gave.
        test_set: the utils.datasets.ImageSet to measure on.

    Returns:
        the Classifier on the device, in eval mode; its Attack; the options as used; the metadata to save with weights
        made from it.

    Raises:
        UserError: no readable checkpoint, an explicit option that it states, a model for other data, or no such target.
    """
    checkpoint = read_checkpoint(opt.model)
    used, classes = options_as_used(opt, explicit, checkpoint), len(test_set.classes)
    num_class = used.num_class = used.num_class or classes
    if num_class < classes:
        raise UserError(f"{opt.dataset} has {classes} classes, but {opt.model} was trained on {num_class}")
    if isinstance(opt.target, int) and opt.target >= num_class:
        raise UserError(f"--target {opt.target} is not one of the labels 0..{num_class - 1}")
    check_data(checkpoint, opt.model, test_set.size, opt.dataset)
    if checkpoint.get("attack") is not None:
        attack = Attack.from_state(checkpoint["attack"], num_class, test_set.images[:1])
    elif explicit & ATTACK_OPTIONS:
        attack = build_attack(opt, num_class, test_set.size)
    else:
        attack = UnknownAttack(num_class)
    data = num_class, get_normalization(opt), device, test_set.size
    model, metadata = load_classifier(checkpoint, opt.model, used.arch, *data)
    metadata |= {"dataset": opt.dataset, "image_size": test_set.size[0], "attack": attack.state()}
    return model, attack, used, metadata


def label_to_defend(opt, victim, split, num_class, device, clock):
    """The label to defend against (None if there is none), and the scores of the search (None without a search)."""
    if opt.target != "auto":
        return ANY_OTHER if opt.target == "any" else opt.target, None
    with clock("detect"):
        settings = num_class, device, opt.seed, vars(opt), opt.precision
        target, scores, reason = find_target(victim, split.search, *settings)
    print(text_table(*search_rows([score.metadata() for score in scores])), reason, sep="\n")
    return target, scores


def defend(opt, victim, split, target, num_class, device, clock, monitor):
    """Run the defense on the clean split: the student, its history, and label -> inverted trigger."""
    data = split.train, split.plain, opt.augment == "crop_flip", len(split.index)
    context = DefenseContext(victim, *data, device, opt.seed, clock, target, monitor, opt.dataset in MIRRORED)
    return remove_backdoors(opt.defense, context, vars(opt), split.search, num_class, opt.precision)


def measure_inverted(models, triggers, batches) -> dict:
    """The percentages of clean images that inverted triggers turn, before and after, and whether none works any more.

    Of several, the rates are those of the trigger that turns most images after it; without any, both are None.
    """
    rates = [
        {name: 100 * trigger.rate_on(model, batches, label) for name, model in models.items()}
        for label, trigger in triggers.items()
    ]
    worst = max(rates, key=lambda rate: rate["after"], default=None)
    purified = is_purified(models.get("after"), models["before"], triggers, batches)
    return {"inverted_hit_rate": worst, "purified": purified}


def save_purified(path, results, model, metadata):
    """Write the purified weights; without a purified model, say so if those of an earlier run are there."""
    if model is None:
        if os.path.exists(path):
            print(f"nothing was purified; {path} is from an earlier run")
        return
    remove_file(os.path.join(results, "metrics.json"))  # of an earlier run, whose weights are replaced now
    save_checkpoint(path, model, **metadata)
    print(f"purified model: {path}")


def load_reference(opt, num_class, size, device):
    """The clean model to compare with after re-tuning, on images of size (H, W); None without one that fits."""
    path = opt.retune_reference or find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-clean")
    settings = num_class, get_normalization(opt), device, opt.arch, size, "pass another --retune_reference"
    try:
        return None if path == "none" else load_clean_model(path, *settings)
    except UserError:
        if opt.retune_reference:
            raise
        return None  # the default does not fit, or there is none


def measure_retuned(model, reference, batches, test, attack, device) -> dict:
    """The re-tuning attack on the model and, unless it is None, on the clean reference: rows for metrics.json."""
    measure = partial(evaluate, eval_set=test, attack=attack)
    try:
        retuned = retuned_metrics(model, batches, measure, device)
        of_reference = reference and retuned_metrics(reference, batches, measure, device)
    except RunError:
        print("\nthe re-tuning attack failed: its loss or weights are no longer finite; nothing is reported of it")
        return {}
    print("\nafter the re-tuning attack, percent", text_table(*retuned_rows(retuned, of_reference)), sep="\n")
    return {"retuned": retuned, "retuned_reference": of_reference}


def run_metrics(opt, metrics, target, scores, trigger) -> dict:
    """What metrics.json says of this run, without the parts that every run has."""
    worked_against = "any" if target == ANY_OTHER else target
    flagged = scores is not None and any(score.flagged for score in scores)
    row = {"model": opt.model, "model_sha256": sha256_of(opt.model), "defense": opt.defense, **metrics}
    row |= {"detected_label": worked_against if flagged else None, "worked_against": worked_against}
    row |= {"search": scores and [score.metadata() for score in scores], "trigger": trigger and trigger.metadata()}
    return row


def check_output(opt, name):
    """The results folder and the path of the purified weights, after a check that both can be written."""
    results, purified_path = os.path.join(opt.log_root, name), os.path.join(opt.checkpoint_root, f"{name}.tar")
    check_writable(results, "history.csv", "metrics.json", "report.html")
    check_writable(os.path.dirname(purified_path), os.path.basename(purified_path))
    refuse_to_replace([opt.model, opt.retune_reference], [purified_path])
    if os.path.exists(purified_path):
        print(f"{purified_path} is replaced if this run purifies the model; keep it with another --name")
    announce_replacement(results, "metrics.json")
    return results, purified_path


if __name__ == "__main__":
    run_script(main, "a run writes its weights and results at its end, metrics.json last")
