"""Search a population of victims and clean networks, and purify those whose label was found.

    python -m docs.population FOLDER            run the networks that are not in docs/population.csv yet
    python -m docs.population FOLDER --table    write docs/population.csv from what is there, and print its summary

Two processes may work on one folder. A search that has changed needs a new table. Half of the networks are to choose
settings on, the other half to report on. Label, poison rate, data set, network and seed of each are drawn at random.
Eight more clean ones, "weak-...", are trained briefly or on few images, to test the rule for weak models on.
The rows "first-..." of the table are of an earlier population, with other draws and shorter trainings on the shapes.
"""

import argparse
import json
import os
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import config
from attacks import Attack, UnknownAttack, build_attack
from data_loader import get_backdoor_loader, get_clean_split, get_eval_set, load_images
from defenses import find_target
from defenses.inversion import ANY_OTHER
from main import defend
from train_badnet import load_surrogate, new_network
from utils.checkpoint import save_checkpoint
from utils.device import pick_precision
from utils.errors import UserError, run_script
from utils.files import read_csv, write_csv, write_json
from utils.grid import deal_out
from utils.metrics import evaluate
from utils.progress import Stopwatch
from utils.seed import generator
from utils.training import train

# name -> its --trigger_type, and options. Patches of WRN-16-1-clean are for CIFAR-10 alone.
# fmt: off
ATTACKS = {
    "grid": "gridTrigger", "square": "squareTrigger", "corners": "fourCornerTrigger", "center": "centerTrigger",
    "pixels": "randomPixelTrigger", "blend": "blendTrigger", "blend01": "blendTrigger --opacity 0.1",
    "trojan": "trojanTrigger", "sig": "signalTrigger", "cl": "clTrigger", "wanet": "wanetTrigger",
    "wanet05": "wanetTrigger --warp 0.5", "all2all": "gridTrigger --target_type all2all", "two": "gridTrigger",
}
# fmt: on
ON_CIFAR = ("trojan", "cl")
CLEAN = {"clean": {}, "short": {"epochs": 1}, "few": {"images": 1_000}, "noisy": {"noise": 0.2}}
REPEATS, CLEAN_REPEATS = 2, 4  # networks of each kind in each half
POISON_RATES = [0.005, 0.02, 0.05, 0.1, 0.1, 0.1]  # the usual one is drawn three times as often
IMAGES, EPOCHS = {"CIFAR10": 25_000, "shapes": 10_000}, {"CIFAR10": 6, "shapes": 15}
PEAK_RATES = {"WRN-10-1": 0.4, f"{__file__}:SmallVGG": 0.05}
CLEAN_IMAGES, TEST_IMAGES = 2_500, 2_000  # of the defender; to measure ACC and ASR on
WORKING, HARDLY_LEARNED = 90.0, 50.0  # ASR from which a backdoor counts, and is searched for at all
TABLE = os.path.join(os.path.dirname(__file__), "population.csv")


class SmallVGG(nn.Sequential):
    """Six convolutions with batch normalisation, two poolings, dropout."""

    def __init__(self, num_classes=10):
        channels, layers = [3, 16, 16, 32, 32, 64, 64], []
        for i in range(6):
            layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(channels[i + 1]), nn.ReLU()] + [nn.MaxPool2d(2)] * (i in (1, 3))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, num_classes))


class Member(NamedTuple):
    """A network of the population: how it is trained."""

    name: str
    kind: str
    options: list[str]
    images: int
    noise: float


def population() -> list[Member]:
    """All members in random order, those to report on first, the weak ones last."""
    names = [
        f"{half}-{kind}-{i}"
        for half in ("tune", "report")
        for kinds, repeats in ((ATTACKS, REPEATS), (CLEAN, CLEAN_REPEATS))
        for kind in kinds
        for i in range(repeats)
    ]
    random.Random(0).shuffle(names)
    names.sort(key=lambda name: name.startswith("tune"))
    names += [f"weak-{kind}-{i}" for kind in ("few", "short") for i in range(CLEAN_REPEATS)]
    return [draw_member(name) for name in names]


def draw_member(name: str) -> Member:
    rng, kind = random.Random(f"second population, {name}"), name.split("-")[1]
    dataset = "CIFAR10" if kind in ON_CIFAR else rng.choice(["CIFAR10", "shapes", "shapes"])
    network, label = rng.choice([*PEAK_RATES]), rng.randrange(10)
    rate, seed = rng.choice(POISON_RATES), rng.randrange(10**6)
    flaw = CLEAN.get(kind, {})
    options = ["--dataset", dataset, "--arch", network, "--lr", PEAK_RATES[network], "--seed", seed]
    options += ["--precision", "auto", "--epochs", flaw.get("epochs", EPOCHS[dataset])]
    options += ["--trigger_type", *ATTACKS[kind].split()] if kind in ATTACKS else []
    options += [] if kind == "all2all" else ["--target_label", label]
    if kind in CLEAN:
        options += ["--inject_portion", 0]
    elif kind not in ("sig", "cl", "all2all"):
        options += ["--inject_portion", rate]
    return Member(name, kind, list(map(str, options)), flaw.get("images", IMAGES[dataset]), flaw.get("noise", 0.0))


def train_member(member, folder, opt, device):
    """Train a network and save it: the model, and an attack and its test images for each of its backdoors.

    A clean network has an attack, too, which it was not trained with.
    """
    data, test = load_images(opt, "train"), load_images(opt, "test")
    order = torch.randperm(len(data.labels), generator=generator(opt.seed, "images"))[: member.images]
    data.images, data.labels = data.images[order], data.labels[order]
    noisy = torch.rand(len(order), generator=generator(opt.seed, "noise")) < member.noise
    data.labels[noisy] = torch.randint(10, (int(noisy.sum()),), generator=generator(opt.seed, "labels"))

    surrogate = load_surrogate(opt, 10, data.size, device)
    attack = build_attack(opt, 10, data.size, surrogate)
    attacks = [attack]
    if member.kind == "two":
        block, label = {"trig_w": 4, "trig_h": 4}, (opt.target_label + 3) % 10
        attacks.append(Attack("squareTrigger", "all2one", label, 10, opt.inject_portion, block))
        data.images, data.labels, _ = attacks[1].poison(data.images, data.labels, generator(opt.seed, "second"))
    batches, _, _ = get_backdoor_loader(opt, data, attack, device, surrogate)
    model = train_and_save(opt, batches, 10, device, os.path.join(folder, f"{member.name}.pth.tar"))
    return model, [(a, get_eval_set(test.images, test.labels, a, device, TEST_IMAGES)) for a in attacks]


def train_and_save(opt, batches, num_class, device, path):
    """Train the network that the options name, and save it without its attack."""
    model, metadata = new_network(opt, num_class, batches.image_shape[1:], device)
    settings = {name: getattr(opt, name) for name in config.TRAINING if name != "batch_size"}
    settings |= {"precision": pick_precision(opt.precision, device), "title": os.path.basename(path)}
    train(model, batches, lambda images, labels: F.cross_entropy(model(images), labels), device, **settings)
    save_checkpoint(path, model, **metadata)
    return model


def examine(member, folder, device) -> dict:
    """Train, search and purify one network: its row. A backdoor that was hardly learned is not searched for."""
    opt, _ = config.parse("train_badnet.py", member.options)
    model, tests = train_member(member, folder, opt, device)
    victim = model.eval().requires_grad_(False)
    measured = {ANY_OTHER if a.target is None else a.target: evaluate(victim, test, a) for a, test in tests}
    is_clean, acc = opt.inject_portion == 0, next(iter(measured.values()))["acc"]
    backdoors = {} if is_clean else {label: metrics["asr"] for label, metrics in measured.items()}
    row = {"name": member.name, "dataset": opt.dataset, "network": opt.arch.split(":")[-1], "rate": opt.inject_portion}
    row |= {"acc": acc, "backdoors": backdoors, "found": None, "scores": [], "after": {}}
    if not is_clean and max(backdoors.values()) < HARDLY_LEARNED:
        return row

    defender, _ = config.parse("main.py", ["--dataset", opt.dataset, "--clean", str(CLEAN_IMAGES), "--seed", "1"])
    defender.precision = pick_precision(opt.precision, device)
    split = get_clean_split(defender, load_images(opt, "train"), UnknownAttack(10), device)
    found, scores, _ = find_target(victim, split.search, 10, device, 1, vars(defender), defender.precision)
    row |= {"found": found, "scores": [score.metadata() for score in scores]}
    if found in backdoors:
        student, _, _ = defend(defender, victim, split, found, 10, device, Stopwatch(), None)
        attack, test = dict(zip(backdoors, tests, strict=True))[found]
        row["after"] = evaluate(student, test, attack)
    return row


def summary_row(row) -> dict:
    """The row of a network for the table; size: of the smallest pattern or warp that works, percent of the range."""
    scores, after = row.pop("scores"), row.pop("after")
    working = [score["of_range"] for score in scores if score["form"] != "wave" and score["hit_rate"] >= 90]
    size = min(working, default=100.0) if scores else None
    planted = " ".join(f"{label}:{asr:.2f}" for label, asr in row["backdoors"].items())
    found = "" if row["found"] is None else row["found"]
    numbers = {"acc": row["acc"], "size": size} | {f"{name}_after": after.get(name) for name in ("acc", "asr", "floor")}
    numbers = {name: "" if value is None else f"{value:.2f}" for name, value in numbers.items()}
    return {**row, "backdoors": planted, "found": found, **numbers}


def print_summary(rows):
    """What the search said of victims and of clean networks, and what the defense left, for each half that has rows."""
    for half in sorted({row["name"].split("-")[0] for row in rows}):
        own = [row for row in rows if row["name"].startswith(half)]
        rates = {row["name"]: dict(pair.split(":") for pair in row["backdoors"].split()) for row in own}
        clean = [row for row in own if not rates[row["name"]]]
        planted = [row for row in own if max(map(float, rates[row["name"]].values()), default=0) >= WORKING]
        right = sum(float(rates[row["name"]].get(str(row["found"]), 0)) >= WORKING for row in planted)
        purified = [row for row in own if row["asr_after"]]
        removed = sum(float(row["asr_after"]) <= max(3, float(row["floor_after"]) + 1) for row in purified)
        pairs = [(float(a["size"] or 100), float(b["size"] or 100)) for a in planted for b in clean]
        area = sum((a < b) + (a == b) / 2 for a, b in pairs) / max(len(pairs), 1)
        print(f"{half}: label found in {right} of {len(planted)} victims with an ASR of {WORKING} % or more")
        alarms, weaker = sum(row["found"] != "" for row in clean), len(own) - len(clean) - len(planted)
        print(f"({weaker} have less), {alarms} of {len(clean)} clean networks flagged; ROC area of sizes {area:.3f};")
        print(f"of {len(purified)} purified victims, {removed} with an ASR of at most 3 % or 1 above the floor")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--table", action="store_true", help="only write the table")
    opt = parser.parse_args()
    device, members = torch.device("cpu"), {member.name: member for member in population()}
    rows = {row["name"]: row for row in read_csv(TABLE)}
    paths = {name: os.path.join(opt.folder, f"{name}.json") for name in members if name not in rows}
    for name in [] if opt.table else deal_out(opt.folder, paths, process_count=2):
        if not os.path.exists(paths[name]):
            row = examine(members[name], opt.folder, device)
            write_json(paths[name], row)
            print(summary_row(row), flush=True)
    for name, path in paths.items():
        if os.path.exists(path):
            with open(path) as file:
                rows[name] = summary_row(json.load(file))
    if not rows:
        raise UserError(f"no network of {opt.folder} has been searched yet")
    write_csv(TABLE, [rows[name] for name in dict.fromkeys([*members, *rows]) if name in rows])
    print_summary([*rows.values()])


if __name__ == "__main__":
    run_script(main)
