"""Purify a backdoored classifier with Model-Contrastive Learning and a small clean set.

    python main.py                                  the CIFAR-10 victim in weight/CIFAR10
    python main.py --dataset shapes                 the same on drawn pictures: no download, under two minutes
    python main.py --model FILE --defense none      only measure a model

Prints ACC and ASR before and after; writes weight/<name>.tar and results/<name>/ (metrics.json, history.csv, pictures,
and report.html with all of it).
"""

import os

import config
from attacks import Attack
from data_loader import get_attack, get_clean_split, get_eval_set, get_normalization, load_images
from defenses.inversion import HIT_RATE, invert_trigger, moved_patterns
from defenses.mcl import finetune, purify
from models import load_model
from utils.board import open_board
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.device import pick_device
from utils.errors import RunError, UserError, run_script
from utils.files import check_folder, write_csv, write_json
from utils.metrics import evaluate, watcher
from utils.page import write_page
from utils.plots import draw_run, spread
from utils.report import Stopwatch, figures_table, published_table, run_facts
from utils.seed import generator


def main():
    opt, given = config.parse("main.py")
    device, clock = pick_device(opt.device), Stopwatch()
    path = victim_path(opt)
    name = opt.name or f"{opt.dataset}-{os.path.basename(path).split('.')[0]}-{opt.defense}"
    results, purified = os.path.join(opt.log_root, name), os.path.join(opt.checkpoint_root, f"{name}.tar")
    check_folder(results, "history.csv", "metrics.json", "report.html")
    check_folder(opt.checkpoint_root, os.path.basename(purified))
    if os.path.realpath(purified) == os.path.realpath(path):
        raise UserError(f"the purified weights would replace the victim, {path}; give another --name")
    log = open_board(results) if opt.tensorboard else None

    with clock("data"):
        train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
        victim, attack, facts = load_victim(opt, given, path, test_set, device)
        test = get_eval_set(test_set.images, test_set.labels, attack, device)
        if opt.defense == "mcl":
            target = choose_target(opt, attack)
            split = get_clean_split(opt, train_set, attack, device)
    print(f"victim {path}: {facts['arch']}, {attack.describe()}")
    with clock("evaluate"):
        figures = {"before": evaluate(victim, test, attack, device)}
    models, curves, trigger = {"before": victim}, [], None

    if opt.defense == "mcl":
        print(f"clean split: {len(split.index):,} of {len(train_set.labels):,} training images; target {target}")
        watch = watcher(split.watched, attack, device, opt.precision, opt.print_freq, log)
        with clock("evaluate"):
            curves = [{"epoch": 0, **watch(victim, 0)}]
        models["after"], trigger, history = run_mcl(opt, victim, split, target, watch, device, clock)
        with clock("evaluate"):
            figures["after"] = evaluate(models["after"], test, attack, device)
        save_checkpoint(purified, models["after"], **facts, metrics=figures["after"])
        write_csv(os.path.join(results, "history.csv"), history)
        print(f"purified: {purified}")
        curves += history

    print()
    print(published_table(opt.dataset, **figures), figures_table(test_set.classes, **figures), sep="\n\n")
    with clock("report"):
        few = spread(len(test_set.labels))
        sample = get_eval_set(test_set.images[few], test_set.labels[few], attack, device)
        pictures = draw_run(results, test_set.classes, sample, attack, models, figures, curves, trigger)
    metrics = {
        "model": path,
        "defense": opt.defense,
        "before": figures["before"],
        "after": figures.get("after"),
        "detected_label": None,
        "trigger": trigger and {"pixels": trigger.pixels, "l1": trigger.l1, "hit_rate": 100 * trigger.hit_rate},
        **run_facts(vars(opt), attack, device, clock.read()),
    }
    write_json(os.path.join(results, "metrics.json"), metrics)
    write_page(os.path.join(results, "report.html"), name, metrics, test_set.classes, pictures)
    print(f"\nreport: {os.path.join(results, 'report.html')}")


def victim_path(opt):
    """--model, else the data set's shipped victim, wherever the script is run from."""
    return opt.model or os.path.join(os.path.dirname(__file__), "weight", opt.dataset, "WRN-16-1-badnet.pth.tar")


# What a checkpoint may state, and the options that say it where it does not.
STATED = {
    "arch": ("arch",),
    "num_class": ("num_class",),
    "normalization": ("normalize",),
    "attack": (
        *("trigger_type", "target_type", "target_label"),
        *("trig_w", "trig_h", "opacity", "trigger_image", "delta", "warp"),
    ),
}


def load_victim(opt, given, path, test_set, device):
    """f_B, frozen, with its attack and the facts to save beside purified weights, from the file or else the options."""
    checkpoint = read_checkpoint(path)
    for key, options in STATED.items():
        for name in given.intersection(options):
            if key in checkpoint:
                stated = Attack.restore(checkpoint[key]).describe() if key == "attack" else checkpoint[key]
                raise UserError(f"{path} states its {key}, {stated}; leave out --{name}")
    arch, classes = checkpoint.get("arch", opt.arch), len(test_set.classes)
    num_class = checkpoint.get("num_class", opt.num_class or classes)
    if num_class < classes:
        raise UserError(f"{opt.dataset} has {classes} classes, the model {num_class}")
    normalization = checkpoint.get("normalization") or get_normalization(opt)
    stated = checkpoint.get("attack")
    attack = Attack.restore(stated, num_class, test_set.images[:1]) if stated is not None else None
    attack = attack or get_attack(opt, num_class, test_set.size)
    victim = load_model(checkpoint["state_dict"], path, arch, num_class, *normalization)
    facts = {"arch": arch, "num_class": num_class, "dataset": opt.dataset, "normalization": normalization}
    return victim.to(device).eval().requires_grad_(False), attack, {**facts, "attack": attack.state()}


def run_mcl(opt, victim, split, target, watch, device, clock):
    """The steps of the paper: f_F, the inverted trigger, the student. Returns the student, the trigger, the history."""
    with clock("finetune"):
        positive = make_positive(opt, victim, split, device)
    with clock("inversion"):
        trigger = make_trigger(opt, victim, split, target, device)
    print(f"inverted trigger: {trigger.pixels} pixels, L1 {trigger.l1:.1f}, hit rate {trigger.hit_rate:.1%}")
    with clock("purify"):
        student, history = make_student(opt, victim, positive, trigger, split, target, watch, device)
    return student, trigger, history


def make_positive(opt, victim, split, device):
    """Whose clean features are z+: f_F, or the victim itself, as in the paper's own code."""
    if opt.positive == "backdoored":
        return victim
    size = {"epochs": opt.finetune_epochs, "lr": opt.finetune_lr}
    return finetune(victim, split.training, device, mirror=mirrors(opt), **size, **sgd(opt))


def make_trigger(opt, victim, split, target, device):
    """The smallest pattern that makes the victim say `target`; where there is none, the run ends."""
    rng, budget = generator(opt.seed, "inversion"), (opt.inversion_rounds, opt.inversion_steps, opt.inversion_batches)
    trigger = invert_trigger(victim, split.plain, target, device, rng, *budget, opt.precision)
    if trigger is None:
        raise RunError(
            f"no pixel pattern turns {HIT_RATE:.0%} of the clean images into label {target}: it has no backdoor that a "
            f"pattern expresses, or --inversion_steps {opt.inversion_steps} is too few; nothing was purified"
        )
    return trigger


def make_student(opt, victim, positive, trigger, split, target, watch, device):
    """f_S and the history of its training; where its images are cropped and flipped, so is the trigger."""
    patterns = moved_patterns(victim, trigger, split.plain, target) if mirrors(opt) else trigger.pattern[None]
    return purify(
        victim,
        positive,
        patterns,
        split.training,
        device,
        temperature=opt.temperature,
        align_weight=opt.align_weight,
        mirror=mirrors(opt),
        target=target if opt.contrast == "others" else None,
        epochs=opt.epochs,
        lr=opt.lr,
        watch=watch,
        **sgd(opt),
    )


def mirrors(opt):
    """Whether the teachers answer for the mirror image too: where the clean split is flipped, they are asked both."""
    return opt.augment == "crop_flip"


def sgd(opt):
    """What fine-tuning and purification have in common."""
    return {name: getattr(opt, name) for name in ("schedule", "momentum", "weight_decay", "precision", "ema")}


def choose_target(opt, attack):
    """The label to work against: --target, else the attack's own."""
    if opt.target is None and attack.target is None:
        raise UserError("an all2all attack has no single target; say with --target which label to work against")
    target = attack.target if opt.target is None else opt.target
    if not 0 <= target < attack.num_class:
        raise UserError(f"--target {target} is not one of the labels 0..{attack.num_class - 1}")
    return target


if __name__ == "__main__":
    run_script(main, "nothing of this run is kept: weights and figures are written at its end")
