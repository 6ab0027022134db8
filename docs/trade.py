"""The trade-off between ASR and the accuracy on the target class that --align_weight sets, on held-out images.

    python -m docs.trade --model FILE       writes docs/trade.csv and docs/trade.png

Takes main.py's options. For each weight the victim is purified as in main.py and measured on 6,000 mirrored training
images outside the clean split: a victim trained without flips has memorised its training images, but not their mirror
images, on which it errs about as often as on test images. The test set is measured too, to compare with the paper.
"""

import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import config
from data_loader import get_clean_split, get_eval_set, load_images
from defenses import DefenseContext
from defenses.mcl import clean_finetune, purify, training_patterns
from main import load_victim
from utils.checkpoint import find_weights
from utils.cli import is_comparison
from utils.datasets import MIRRORED
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.errors import UserError, run_script
from utils.files import write_csv, write_file
from utils.metrics import evaluate
from utils.progress import Stopwatch

HELD_OUT = 6_000
ALIGN_WEIGHTS = (3, 7, 12, 20)
PUBLISHED = (
    "--positive backdoored --contrast all --align_weight 0 --augment none --ema 0 --schedule steps "
    "--epochs 20 --temperature 0.5"
)
SGD = ("schedule", "momentum", "weight_decay", "precision", "ema")
FOLDER = os.path.dirname(__file__)


def main():
    opt, explicit = config.parse("main.py", description=__doc__)
    published, _ = config.parse("main.py", [*sys.argv[1:], *PUBLISHED.split()])
    if is_comparison(opt) or opt.defense != "mcl" or opt.positive != "finetuned":
        raise UserError("docs.trade measures mcl with --positive finetuned on one model; omit --defense and --positive")
    if opt.dataset not in MIRRORED or opt.contrast == "none":
        raise UserError("docs.trade measures mcl's contrast on mirrored images; omit --contrast and --dataset GTSRB")
    device = pick_device(opt.device)
    opt.precision = published.precision = pick_precision(opt.precision, device)
    train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
    keep_freed_memory()
    opt.model = opt.model[0] if opt.model else find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-badnet")
    victim, attack, opt, _ = load_victim(opt, explicit, test_set, device)
    if attack.target is None:
        raise UserError(f"{opt.model} has no single target label, whose class docs.trade measures")
    if opt.target not in ("auto", attack.target):
        raise UserError("docs.trade defends against the attack's own target label; omit --target")
    target = attack.target
    held_out = torch.ones(len(train_set.labels), dtype=torch.bool)
    held_out[get_clean_split(opt, train_set, attack, device).index] = False
    index = held_out.nonzero()[:HELD_OUT, 0]
    eval_sets = {
        "held-out": get_eval_set(train_set.images[index].flip(2), train_set.labels[index], attack, device),
        "test": get_eval_set(test_set.images, test_set.labels, attack, device),
    }
    rows = []

    def measure(model, recipe):
        for images, eval_set in eval_sets.items():
            metrics = evaluate(model, eval_set, attack)
            target_class = metrics.pop("per_class")[target]
            rows.append({"recipe": recipe, "seed": opt.seed, "images": images, **metrics, "target_class": target_class})
            print(*(f"{value:.2f}" if isinstance(value, float) else value for value in rows[-1].values()), sep="  ")

    def context_of(opt):
        split, augmented = get_clean_split(opt, train_set, attack, device), opt.augment == "crop_flip"
        return DefenseContext(victim, split.train, split.plain, augmented, device, opt.seed, Stopwatch(), target)

    def purified(opt, context, positive):
        settings = chosen(opt, "temperature", "align_weight", "epochs", "lr", *SGD)
        settings |= {"mirror": context.augmented, "target": target if opt.contrast == "others" else None}
        patterns = training_patterns(context, trigger)
        return purify(victim, positive, patterns, context.train_batches, device, **settings)[0]

    measure(victim, "victim")
    context, schedule = context_of(opt), {"epochs": opt.finetune_epochs, "lr": opt.finetune_lr}
    settings = {**schedule, **chosen(opt, *SGD)}
    positive = clean_finetune(victim, context.train_batches, device, mirror=context.augmented, **settings)
    trigger = context.invert(opt.inversion_rounds, opt.inversion_steps, opt.inversion_batches, opt.precision)
    states = [batches.rng.get_state() for batches in (context.train_batches, context.plain_batches)]
    for weight in ALIGN_WEIGHTS:
        opt.align_weight = weight
        for batches, state in zip((context.train_batches, context.plain_batches), states, strict=True):
            batches.rng.set_state(state)  # the same batches for every weight, those of main.py
        measure(purified(opt, context, positive), f"{weight:g}")
    measure(purified(published, context_of(published), victim), "published recipe")
    write_csv(os.path.join(FOLDER, "trade.csv"), rows)
    draw(rows, os.path.join(FOLDER, "trade.png"))


def chosen(opt, *names):
    """These options, by name."""
    return {name: getattr(opt, name) for name in names}


def draw(rows, path):
    """Plot ASR against the accuracy on the target class and against ACC*, a line for each set of images."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.1), sharey=True, layout="constrained")
    columns = {"target_class": "accuracy on the target class, %", "acc_published": "ACC* (without the target class), %"}
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        for images, colour in (("held-out", "tab:blue"), ("test", "tab:orange")):
            swept = [row for row in rows if row["images"] == images and row["recipe"][0].isdigit()]
            panel.plot([row[column] for row in swept], [row["asr"] for row in swept], "o-", color=colour, label=images)
            for i, row in enumerate(swept):
                offset = (5, 4 if i % 2 else -11)
                style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
                panel.annotate(row["recipe"], (row[column], row["asr"]), offset, **style)
        for row in rows:
            if row["recipe"] == "published recipe" and row["images"] == "test":
                panel.plot(row[column], row["asr"], "s", color="tab:red", label="published recipe, run here, test")
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.margins(0.12)
    panels[1].plot(82.29, 1.92, "*", color="black", markersize=11, label="as published, test")
    panels[0].set_ylabel("ASR, %")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("What --align_weight (the numbers) trades", fontsize=11)
    write_file(path, lambda file: figure.savefig(file, dpi=110))


if __name__ == "__main__":
    run_script(main)
