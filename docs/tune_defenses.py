"""Try the same number of settings of each defense on held-out images of one victim, and print the best of each.

    python -m docs.tune_defenses TABLE.csv --model FILE --target LABEL --defense NAME ... [options of main.py]

A setting is a rate (a third of the recipe's, the recipe's, or three times it), a schedule (the recipe's or another) and
a number of epochs (half of the recipe's or the recipe's): twelve in all. I-BAU, which has no schedule, has four numbers
of rounds instead. The best is the one of highest ACC among those that remove the backdoor; where none does, the one of
lowest ASR. The images to measure on are mirrored training images outside the clean split. So the victim must have been
trained without flips, as the paper's was; train_badnet.py flips CIFAR-10's images. Rows already in TABLE.csv are not
measured again, so that each victim, seed and clean split needs its own table.
"""

import sys
from functools import partial
from itertools import chain, product
from typing import ClassVar

import config
from attacks import UnknownAttack
from data_loader import get_clean_split, get_eval_set, load_images, sample_positions
from defenses import DefenseContext
from defenses.inversion import ANY_OTHER
from defenses.purify import run_defense
from main import load_victim
from utils.cli import listed
from utils.device import pick_device, pick_precision
from utils.errors import RunError, UserError, run_script
from utils.files import read_csv, write_csv
from utils.metrics import evaluate
from utils.progress import Stopwatch
from utils.reporting.tables import is_backdoored, text_table

HELD_OUT = 3_000  # images to measure on
RATE_SHARES, ROUNDS = (1 / 3, 1, 3), (2, 3, 4, 5)  # shares of the recipe's rate; rounds of I-BAU
SETTING, MEASURED = ["defense", "lr", "schedule", "epochs"], ["acc", "asr", "floor", "ra"]


class SharedInversion(DefenseContext):
    """A context that inverts its victim once for all defenses that have the same budget."""

    found: ClassVar[dict] = {}

    def invert(self, *budget):
        if budget not in self.found:
            self.found[budget] = super().invert(*budget)
        return self.found[budget]


def settings_of(defense: str) -> list[dict]:
    """The settings to run of a defense: its name, lr, epochs and, if it has one, schedule."""
    recipe = config.DEFENSES[defense]
    rates = [float(f"{share * recipe['lr']:.3g}") for share in RATE_SHARES]
    if "schedule" not in recipe:  # the history of its longest run has the shorter ones
        return [{"defense": defense, "lr": lr, "epochs": max(ROUNDS)} for lr in rates]
    schedules = [recipe["schedule"], "cosine" if recipe["schedule"] == "onecycle" else "onecycle"]
    epochs = [-(-recipe["epochs"] // 2), recipe["epochs"]]
    values = product([defense], rates, schedules, epochs)
    return [dict(zip(SETTING, setting, strict=True)) for setting in values]


def best_of(rows: list[dict]) -> dict:
    """The row of highest ACC among those without a backdoor, or else the row of lowest ASR."""
    gone = [row for row in rows if is_backdoored(row) is False]
    return max(gone, key=lambda row: row["acc"]) if gone else min(rows, key=lambda row: row["asr"])


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("name the table: python -m docs.tune_defenses TABLE.csv --model FILE --target LABEL")
    table, (opt, explicit) = sys.argv[1], config.parse("main.py", sys.argv[2:])
    device, names, rows = pick_device(opt.device), listed(opt.defense), read_rows(table)
    data, test = load_images(opt, "train"), load_images(opt, "test")
    if len(opt.model or []) != 1 or opt.seeds or "none" in names:
        raise UserError("name one victim, --model FILE, at most one --seed, and defenses to tune")
    of_run = partial(config.single_run_options, opt, model=opt.model[0])
    trial = of_run(defense=max(names, key=lambda name: "target" in config.DEFENSES[name]))  # to check its target, too
    victim, attack, _, _ = load_victim(trial, explicit, test, device)
    if trial.target == "auto" or isinstance(attack, UnknownAttack):
        raise UserError("state the attack to measure, --trigger_type, and the --target of mcl, nc and pam")
    for setting in chain.from_iterable(map(settings_of, names)):
        key = {part: str(value) for part, value in setting.items()}
        if not any(key.items() <= row.items() for row in rows):
            rows += try_setting(of_run(**setting), victim, attack, data, device)
            write_csv(table, rows)
    measured = [[row for row in rows if row["defense"] == name] for name in names]
    best = [best_of(rows) for rows in measured if rows]
    print(text_table([*SETTING, *MEASURED], [[*row.values()] for row in best]))


def try_setting(trial, victim, attack, data, device) -> list[dict]:
    """Run a defense: a row of its result, or of the result of each of ROUNDS; none if it fails."""
    split = get_clean_split(trial, data, attack, device)
    batches = split.train, split.plain, trial.augment == "crop_flip", len(split.index)
    measure = partial(evaluate, eval_set=held_out_images(data, split, attack, device), attack=attack)
    monitor = None if trial.schedule else lambda model, _: measure(model)
    target, precision = ANY_OTHER if trial.target == "any" else trial.target, pick_precision(trial.precision, device)
    context = SharedInversion(victim, *batches, device, trial.seed, Stopwatch(), target, monitor)
    try:
        student, history, _ = run_defense(trial.defense, context, vars(trial), precision)
    except RunError as error:
        print(f"failed: {error}")
        return []
    measured = {trial.epochs: measure(student)}
    if not trial.schedule:
        measured = {row["epoch"]: row for row in history if row["epoch"] in ROUNDS}
    setting = [trial.defense, str(trial.lr), trial.schedule or ""]
    return [
        dict(zip(SETTING, [*setting, str(epochs)], strict=True)) | {part: round(metrics[part], 2) for part in MEASURED}
        for epochs, metrics in measured.items()
    ]


def held_out_images(data, split, attack, device):
    """Mirror images of training images outside the clean split."""
    unused = sorted(set(range(len(data.labels))) - set(split.index.tolist()))
    if not unused:
        raise UserError("the clean split has all training images, and none is left to measure on; lower --ratio")
    index = [unused[i] for i in sample_positions(len(unused), HELD_OUT).tolist()]
    return get_eval_set(data.images[index].flip(2), data.labels[index], attack, device)


def read_rows(table: str) -> list[dict]:
    """The rows of an earlier call, with percentages as numbers."""
    return [{**row, **{part: float(row[part]) for part in MEASURED}} for row in read_csv(table)]


if __name__ == "__main__":
    run_script(main)
