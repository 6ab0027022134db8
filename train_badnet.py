"""Train a backdoored classifier: the victim that main.py purifies.

    python train_badnet.py                      CIFAR-10, WRN-16-1, grid trigger, target 5, 10 % poisoned, 20 epochs
    python train_badnet.py --dataset shapes     the same on drawn pictures, no download
    python train_badnet.py --trigger_type X     another attack, with the defaults that config.ATTACKS has for it
    python train_badnet.py --inject_portion 0   a clean model, which trojanTrigger and clTrigger start from
    python train_badnet.py --resume             go on with that run after it was stopped
    torchrun --nproc_per_node=N train_badnet.py     on N GPUs (or processes), each with its part of every batch

Writes weight/<dataset>/<name>.pth.tar (weights, attack, figures) and results/<name>/ (metrics.json, history.csv,
pictures, and report.html with all of it); until those are there, results/<name>/resume.pt after each epoch.
"""

import os
import time

import torch.nn.functional as F

import config
from attacks.victim import load_surrogate
from data_loader import get_attack, get_backdoor_loader, get_eval_set, get_normalization, load_images, spread
from models import select_model
from utils.board import open_board
from utils.checkpoint import load_weights, save_checkpoint
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.errors import RunError, run_script
from utils.files import check_folder, write_csv, write_json
from utils.metrics import evaluate, watcher
from utils.page import write_page
from utils.plots import SAMPLE, draw_run
from utils.processes import join_processes
from utils.report import figures_table, run_facts
from utils.resume import Resumable, resume_command
from utils.seed import seed_weights
from utils.training import train


def main():
    opt, _ = config.parse("train_badnet.py")
    processes, device = join_processes(pick_device(opt.device))
    opt.precision = pick_precision(opt.precision, device)
    first = processes.rank == 0  # it alone looks, writes and reports
    name = victim_name(opt)
    weights = os.path.join(opt.checkpoint_root, opt.dataset, f"{opt.name or name}.pth.tar")
    results = os.path.join(opt.log_root, opt.name or f"{opt.dataset}-{name}")
    if first:
        check_folder(os.path.dirname(weights), os.path.basename(weights))
        check_folder(results, "history.csv", "metrics.json", "report.html")
    if processes.count > 1:
        opt.nproc_per_node = processes.count  # numbers depend on it: each has its own part of a batch to normalise
    run = Resumable(results, vars(opt), opt.resume)
    if os.path.exists(weights) and run.finished():
        return print(f"nothing to resume: this run has ended, its weights are in {weights}, its figures in {results}")
    if first and os.path.exists(weights):
        print(f"{weights} is replaced when this training ends; --name keeps it")
    log = open_board(results) if opt.tensorboard and first else None
    seconds, began = {}, time.perf_counter()

    # Poison: a share of the training images gets the trigger and the label that the attack wants.
    with processes.first_goes_ahead():
        train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
    num_class = opt.num_class or len(train_set.classes)
    surrogate = load_surrogate(opt, num_class, device) if needs_surrogate(opt) else None
    attack = get_attack(opt, num_class, train_set.size, surrogate)
    batches, watched, poisoned = get_backdoor_loader(opt, train_set, attack, device, surrogate, processes)
    test = get_eval_set(test_set.images, test_set.labels, attack, device)
    whose = f"{len(train_set.labels):,}" if opt.target_type != "cleanLabel" else "the target class's"
    del train_set  # 150 MB that nobody needs any more
    keep_freed_memory()
    seconds["data"] = time.perf_counter() - began
    print(f"poisoned {opt.inject_portion:.1%} of {whose} images: {attack.describe()}")

    # Train: plain cross-entropy on what the poisoned set says.
    seed_weights(opt.seed)
    normalization = get_normalization(opt)
    model = select_model(opt.arch, num_class, *normalization).to(device)
    facts = {"arch": opt.arch, "num_class": num_class, "dataset": opt.dataset, "normalization": normalization}
    facts["attack"] = attack.state()
    network = processes.wrap(model)
    state = run.read(poisoned)
    if state:
        load_weights(model, state["state_dict"], run.path, opt.arch)
    try:
        history = train(
            model,
            batches,
            lambda images, labels: F.cross_entropy(network(images), labels),
            device,
            epochs=opt.epochs,
            lr=opt.lr,
            momentum=opt.momentum,
            weight_decay=opt.weight_decay,
            schedule=opt.schedule,
            precision=opt.precision,
            title="victim",
            watch=watcher(watched, attack, opt.print_freq, log) if first else None,
            generators=[batches.rng],
            resume=state and state["training"],
            save=(lambda training: run.save(model, training, poisoned, **facts)) if first else None,
        )
    except RunError as error:
        raise RunError(f"{error}; {run.kept}" if first else str(error)) from None
    if not first:
        return
    seconds["train"] = sum(row["seconds"] for row in history)

    # Report: on every test image, clean and triggered.
    began = time.perf_counter()
    figures = evaluate(model, test, attack)
    seconds["evaluate"] = time.perf_counter() - began
    print(figures_table(test_set.classes, figures))

    save_checkpoint(weights, model, **facts, metrics=figures)
    write_csv(os.path.join(results, "history.csv"), history)

    began = time.perf_counter()
    few = spread(len(test_set.labels), SAMPLE)
    sample = get_eval_set(test_set.images[few], test_set.labels[few], attack, device)
    pictures = draw_run(results, test_set.classes, sample, attack, {"before": model}, {"before": figures}, history)
    seconds["report"] = time.perf_counter() - began
    seconds["total"] = sum(seconds.values())  # of a training that was resumed, with what came before
    metrics = {"model": weights, "victim": figures, **run_facts(vars(opt), attack, device, seconds)}
    write_json(os.path.join(results, "metrics.json"), metrics)
    title = os.path.basename(results)
    write_page(os.path.join(results, "report.html"), title, {**metrics, "before": figures}, test_set.classes, pictures)
    run.end()
    print(f"victim: {weights}   report: {os.path.join(results, 'report.html')}")


def victim_name(opt):
    """<arch>-<attack>; where the label mode is not the trigger's usual one, it is named too, for the grid alone."""
    attack, usual_mode, _ = config.ATTACKS[opt.trigger_type]
    if opt.inject_portion == 0:
        attack = "clean"
    elif opt.target_type != usual_mode:
        attack = opt.target_type if opt.trigger_type == "gridTrigger" else f"{attack}-{opt.target_type}"
    return f"{opt.arch}-{attack}"


def needs_surrogate(opt):
    """A trojan patch is made on a clean model; the noise of clTrigger, in poisoned images alone, against one."""
    return opt.trigger_type == "trojanTrigger" or (opt.trigger_type == "clTrigger" and opt.inject_portion > 0)


if __name__ == "__main__":
    run_script(main, f"go on with: {resume_command()}")
