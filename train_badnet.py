"""Train a backdoored classifier: the victim that main.py purifies.

    python train_badnet.py                      CIFAR-10, WRN-16-1, grid trigger, target 5, 10 % poisoned, 20 epochs
    python train_badnet.py --dataset shapes     the same on drawn pictures, no download
    python train_badnet.py --resume             go on with that run after it was stopped

Writes weight/<dataset>/<name>.pth.tar (weights, attack, figures) and results/<name>/ (metrics.json, history.csv);
until those are there, results/<name>/resume.pt after each epoch.
"""

import os
import time

import torch.nn.functional as F

import config
from data_loader import get_attack, get_backdoor_loader, get_eval_set, get_normalization, load_images
from models import select_model
from utils.checkpoint import load_weights, save_checkpoint
from utils.device import pick_device
from utils.errors import RunError, run_script
from utils.files import check_folder, write_csv, write_json
from utils.metrics import evaluate, watcher
from utils.report import figures_table, versions
from utils.resume import Resumable, resume_command
from utils.seed import seed_weights
from utils.training import train


def main():
    opt, _ = config.parse("train_badnet.py")
    device = pick_device(opt.device)
    weights = os.path.join(opt.checkpoint_root, opt.dataset, f"{opt.name or f'{opt.arch}-badnet'}.pth.tar")
    results = os.path.join(opt.log_root, opt.name or f"{opt.dataset}-{opt.arch}-badnet")
    check_folder(os.path.dirname(weights), os.path.basename(weights))
    check_folder(results, "history.csv", "metrics.json")
    run = Resumable(results, vars(opt), opt.resume)
    if run.finished():
        return print(f"nothing to resume: this run has ended, its weights are in {weights}, its figures in {results}")
    seconds, start = {}, time.perf_counter()

    # Poison: a share of the training images gets the trigger and the attacker's label.
    train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
    num_class = opt.num_class or len(train_set.classes)
    attack = get_attack(opt, num_class)
    batches, watched, poisoned = get_backdoor_loader(opt, train_set, attack, device)
    test = get_eval_set(test_set.images, test_set.labels, attack, device)
    seconds["data"] = time.perf_counter() - start
    print(f"poisoned {opt.inject_portion:.1%} of {len(train_set.labels):,} images: {attack.describe()}")

    # Train: plain cross-entropy on what the poisoned set says.
    seed_weights(opt.seed)
    normalization = get_normalization(opt)
    model = select_model(opt.arch, num_class, *normalization).to(device)
    facts = {"arch": opt.arch, "num_class": num_class, "dataset": opt.dataset, "normalization": normalization}
    facts["attack"] = attack.state()
    state = run.read(poisoned)
    if state:
        load_weights(model, state["state_dict"], run.path, opt.arch)
    try:
        history = train(
            model,
            batches,
            lambda images, labels: F.cross_entropy(model(images), labels),
            device,
            epochs=opt.epochs,
            lr=opt.lr,
            momentum=opt.momentum,
            weight_decay=opt.weight_decay,
            schedule=opt.schedule,
            precision=opt.precision,
            title="victim",
            watch=watcher(watched, attack, device, opt.precision, opt.print_freq),
            generators=[batches.rng],
            resume=state and state["training"],
            save=lambda training: run.save(model, training, poisoned, **facts),
        )
    except RunError as error:
        raise RunError(f"{error}; {run.kept}") from None
    seconds["train"] = sum(row["seconds"] for row in history)

    # Report: on every test image, clean and triggered.
    began = time.perf_counter()
    figures = evaluate(model, test, attack, device)
    seconds["evaluate"] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - start
    print(figures_table(test_set.classes, figures))

    save_checkpoint(weights, model, **facts, metrics=figures)
    write_csv(os.path.join(results, "history.csv"), history)
    write_json(
        os.path.join(results, "metrics.json"),
        {
            "dataset": opt.dataset,
            "model": weights,
            "seed": opt.seed,
            "device": str(device),
            "victim": figures,
            "target_label": attack.target_label if attack.target_type == "all2one" else None,
            "seconds": seconds,
            "config": vars(opt),
            "versions": versions(),
        },
    )
    run.end()
    print(f"victim: {weights}   figures: {os.path.join(results, 'metrics.json')}")


if __name__ == "__main__":
    run_script(main, f"go on with: {resume_command()}")
