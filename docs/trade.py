"""The trade between ASR and the target class, on held-out training images: what --align_weight does.

    python -m docs.trade --model FILE       writes docs/trade.csv and docs/trade.png

Takes main.py's options. For each weight the victim is purified as main.py does it, and measured on 6,000 training
images outside the clean split, mirrored: a victim trained without flips knows its training images by heart, but not
their mirror images, on which it errs about as often as on test images. The test set is measured beside it, for the
published point's sake.
"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import config
from attacks.victim import load_victim
from data_loader import get_clean_split, get_eval_set, load_images
from defenses import Case
from defenses.inversion import find_trigger
from defenses.mcl import finetune, patterns_of, purify
from main import victim_paths
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.errors import UserError, run_script
from utils.files import write_csv, write_file
from utils.metrics import evaluate
from utils.report import Stopwatch

HELD_OUT = 6_000
ALIGN_WEIGHTS = (3, 7, 12, 20)
PUBLISHED = (
    "--positive backdoored --contrast all --align_weight 0 --augment none --ema 0 --schedule steps "
    "--epochs 20 --temperature 0.5"
)
SGD = ("schedule", "momentum", "weight_decay", "precision", "ema")
FOLDER = os.path.dirname(__file__)


def main():
    opt, given = config.parse("main.py")
    published, _ = config.parse("main.py", [*sys.argv[1:], *PUBLISHED.split()])
    if config.compares(opt) or opt.defense != "mcl" or opt.positive != "finetuned":
        raise UserError("this measures mcl with --positive finetuned on one model; leave out --defense and --positive")
    device = pick_device(opt.device)
    opt.precision = published.precision = pick_precision(opt.precision, device)
    train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
    keep_freed_memory()
    (path,) = victim_paths(opt)
    victim, attack, _ = load_victim(opt, given, path, test_set, device)
    if attack.target is None:
        raise UserError(f"{path} has no single target, whose class this measures")
    if opt.target not in ("auto", attack.target):
        raise UserError("this measures mcl against the attack's own target; leave out --target")
    target = attack.target
    others = torch.ones(len(train_set.labels), dtype=torch.bool)
    others[get_clean_split(opt, train_set, attack, device).index] = False
    held_out = others.nonzero()[:HELD_OUT, 0]
    sets = {
        "held-out": get_eval_set(train_set.images[held_out].flip(2), train_set.labels[held_out], attack, device),
        "test": get_eval_set(test_set.images, test_set.labels, attack, device),
    }
    rows = []

    def measure(model, recipe):
        for images, eval_set in sets.items():
            figures = evaluate(model, eval_set, attack)
            target_class = figures.pop("per_class")[target]
            rows.append({"recipe": recipe, "seed": opt.seed, "images": images, **figures, "target_class": target_class})
            print(*(f"{value:.2f}" if isinstance(value, float) else value for value in rows[-1].values()), sep="  ")

    def case_of(opt):
        split = get_clean_split(opt, train_set, attack, device)
        return Case(
            victim, split.training, split.plain, opt.augment == "crop_flip", device, opt.seed, Stopwatch(), target
        )

    def purified(opt, case, positive):
        settings = chosen(opt, "temperature", "align_weight", "epochs", "lr", *SGD)
        left_out = target if opt.contrast == "others" else None
        patterns = patterns_of(case, trigger)
        return purify(
            victim, positive, patterns, case.training, device, mirror=case.mirrored, target=left_out, **settings
        )[0]

    measure(victim, "victim")
    case, size = case_of(opt), {"epochs": opt.finetune_epochs, "lr": opt.finetune_lr}
    positive = finetune(victim, case.training, device, mirror=case.mirrored, **size, **chosen(opt, *SGD))
    trigger = find_trigger(case, opt.inversion_rounds, opt.inversion_steps, opt.inversion_batches, opt.precision)
    drawn = [batches.rng.get_state() for batches in (case.training, case.plain)]
    for weight in ALIGN_WEIGHTS:
        opt.align_weight = weight
        for batches, state in zip((case.training, case.plain), drawn, strict=True):
            batches.rng.set_state(state)  # every weight has the batches that main.py has
        measure(purified(opt, case, positive), f"{weight:g}")
    measure(purified(published, case_of(published), victim), "published recipe")
    write_csv(os.path.join(FOLDER, "trade.csv"), rows)
    draw(rows, os.path.join(FOLDER, "trade.png"))


def chosen(opt, *names):
    """These options, by name."""
    return {name: getattr(opt, name) for name in names}


def draw(rows, path):
    """ASR against the target class's accuracy and against ACC without it, one line for each set of images."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.1), sharey=True, layout="constrained")
    columns = {"target_class": "accuracy on the target class, %", "acc_published": "ACC without the target class, %"}
    for panel, (column, told) in zip(panels, columns.items(), strict=True):
        for images, colour in (("held-out", "tab:blue"), ("test", "tab:orange")):
            swept = [row for row in rows if row["images"] == images and row["recipe"][0].isdigit()]
            panel.plot([row[column] for row in swept], [row["asr"] for row in swept], "o-", color=colour, label=images)
            for i, row in enumerate(swept):
                place = (row[column], row["asr"])
                panel.annotate(
                    row["recipe"], place, (5, 4 if i % 2 else -11), textcoords="offset points", fontsize=8, color=colour
                )
        for row in rows:
            if row["recipe"] == "published recipe" and row["images"] == "test":
                panel.plot(row[column], row["asr"], "s", color="tab:red", label="published recipe, run here, test")
        panel.set_xlabel(told)
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    panels[1].plot(82.29, 1.92, "*", color="black", markersize=11, label="as published, test")
    panels[0].set_ylabel("ASR, %")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("What --align_weight (the numbers) trades", fontsize=11)
    write_file(path, lambda file: figure.savefig(file, dpi=110))


if __name__ == "__main__":
    run_script(main)
