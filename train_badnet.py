"""Train a backdoored image classifier: the victim that main.py purifies.

    python train_badnet.py                      CIFAR-10, WRN-16-1, grid trigger, target 5, 10 % poisoned, 20 epochs
    python train_badnet.py --dataset shapes     the same on drawn images: no download
    python train_badnet.py --trigger_type X     another attack, with its defaults from config.ATTACKS
    python train_badnet.py --inject_portion 0   a clean model, as trojanTrigger and clTrigger need one
    python train_badnet.py --resume             continue this command's interrupted run
    torchrun --nproc_per_node=N train_badnet.py     on N GPUs or processes, each with its part of every batch

Writes weight/<dataset>/<name>.pth.tar (weights, attack, metrics) and results/<name>/ (metrics.json, history.csv,
pictures, and report.html with all of them). Until then, results/<name>/resume.pt holds the last finished epoch.
"""

import os
import shlex
from functools import partial

import torch
import torch.nn.functional as F

import config
from attacks import TRIGGERS, build_attack
from data_loader import get_backdoor_loader, get_eval_set, get_normalization, load_images
from models import select_model
from models.loading import load_clean_model
from utils.checkpoint import find_weights, load_weights, save_checkpoint
from utils.device import keep_freed_memory, pick_device, pick_precision
from utils.distributed import join_processes
from utils.errors import RunError, run_script
from utils.files import announce_replacement, check_writable
from utils.metrics import evaluate, make_monitor
from utils.progress import Stopwatch
from utils.reporting.plots import SAMPLE_SIZE
from utils.reporting.save import save_results
from utils.reporting.tables import metrics_table, verdict
from utils.reporting.tensorboard import open_tensorboard
from utils.resume import Resumable, resume_command
from utils.training import train


def main():
    opt, _ = config.parse("train_badnet.py", description=__doc__)
    processes, device = join_processes(pick_device(opt.device))
    opt.precision = pick_precision(opt.precision, device)
    if processes.count > 1:
        opt.nproc_per_node = processes.count  # affects the results: each process normalises its own part of a batch
    clock = Stopwatch()
    results, weights = check_output(opt, processes.is_main)
    run = Resumable(results, vars(opt), opt.resume)
    if os.path.exists(weights) and run.finished():
        return print(f"nothing to resume: this run has finished; weights: {weights}, results: {results}")

    # Poison: a fraction of the training images gets the trigger and the attacker's label.
    with clock("data"):
        with processes.main_process_first():
            train_set, test_set = load_images(opt, "train"), load_images(opt, "test")
        num_class = opt.num_class or len(train_set.classes)
        surrogate = load_surrogate(opt, num_class, train_set.size, device)
        attack = processes.from_main(partial(build_attack, opt, num_class, train_set.size, surrogate))
        batches, monitor_set, poisoned = get_backdoor_loader(opt, train_set, attack, device, surrogate, processes)
        test = get_eval_set(test_set.images, test_set.labels, attack, device)
        poison_pool = "the target class" if opt.target_type == "cleanLabel" else f"{len(train_set.labels):,} images"
        del train_set  # 150 MB that are no longer needed
        keep_freed_memory()
    print(f"poisoned {opt.inject_portion:.1%} of {poison_pool}: {attack.describe()}")

    # Train: plain cross-entropy on the poisoned set.
    model, history, metadata = train_victim(opt, attack, batches, monitor_set, poisoned, processes, device, run)
    if not processes.is_main:
        return
    clock.seconds["train"] = sum(row["seconds"] for row in history)  # of a resumed training, all of its epochs

    # Report: on every test image, clean and triggered.
    with clock("evaluate"):
        metrics = evaluate(model, test, attack)
    save_checkpoint(weights, model, **metadata, metrics=metrics)
    print(metrics_table(test_set.classes, metrics))
    sample = get_eval_set(test_set.images, test_set.labels, attack, device, SAMPLE_SIZE)
    output = {"classes": test_set.classes, "sample": sample, "attack": attack, "models": {"before": model}}
    output |= {"history": history, "options": vars(opt), "device": device, "clock": clock}
    metrics = save_results(results, os.path.basename(results), {"model": weights, "victim": metrics}, **output)
    run.end()
    print(f"victim: {weights}   report: {os.path.join(results, 'report.html')}\n{verdict(metrics)}")


def train_victim(opt, attack, batches, monitor_set, poisoned, processes, device, run):
    """Train the victim, from the start or from the state of an interrupted run.

    Returns:
        the model, the history of its training, and the metadata to save with its weights.
    """
    model, metadata = new_network(opt, attack.num_class, batches.image_shape[1:], device)
    metadata |= {"dataset": opt.dataset, "image_size": batches.image_shape[1], "attack": attack.state()}
    network = processes.wrap(model)
    data = torch.cat([poisoned, batches.labels.cpu()])
    state = run.read(data, attack.tensors)
    if state:
        load_weights(model, state["state_dict"], run.path, opt.arch)
    settings = {name: getattr(opt, name) for name in [*config.TRAINING, "precision"] if name != "batch_size"}
    settings |= {"generators": [batches.rng], "resume": state and state["training"]}
    if processes.is_main:
        log = open_tensorboard(os.path.dirname(run.path)) if opt.tensorboard else None
        settings["monitor"] = make_monitor(monitor_set, attack, opt.print_freq, log)
        settings["save"] = partial(run.save, model, data=data, **metadata)

    def loss_of(images, labels):
        return F.cross_entropy(network(images), labels)

    try:
        history = train(model, batches, loss_of, device, title="victim", **settings)
    except RunError as error:
        raise RunError(f"{error}; {run.recovery_hint}" if processes.is_main else str(error)) from None
    return model, history, metadata


def new_network(opt, num_class, size, device):
    """The network that the options name, its weights drawn with --seed, and the metadata to rebuild it.

    Args:
        size: (H, W) of the images.
    """
    torch.manual_seed(opt.seed)  # torch initialises weights from its global generator
    metadata = {"arch": opt.arch, "num_class": num_class, "normalization": get_normalization(opt)}
    model = select_model(opt.arch, num_class, *metadata["normalization"]).to(device)
    if model.head_name is None:
        model.find_head(opt.arch, num_class, size)
    return model, metadata


def load_surrogate(opt, num_class, size, device):
    """The clean model for images of size (H, W) that the trigger or the perturbation is optimised on, or None."""
    spec = TRIGGERS[opt.trigger_type]
    if "surrogate" not in spec.build_options and not (spec.perturb and opt.inject_portion > 0):
        return None
    path = opt.surrogate or find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-clean")
    given = {"dataset": opt.dataset, "num_class": opt.num_class}
    given |= {"data_root": opt.data_root, "image_size": size[0]} if opt.dataset in ("GTSRB", "folder") else {}
    words = [str(word) for name, value in given.items() if value for word in (f"--{name}", value)]
    hint = f"train one: python train_badnet.py {shlex.join(words)} --inject_portion 0 --name WRN-16-1-clean"
    return load_clean_model(path, num_class, get_normalization(opt), device, opt.arch, size, hint)


def check_output(opt, is_main_process):
    """The results folder and the path of the weights, after a check that both can be written."""
    name = victim_name(opt)
    weights = os.path.join(opt.checkpoint_root, opt.dataset, f"{opt.name or name}.pth.tar")
    results = os.path.join(opt.log_root, opt.name or f"{opt.dataset}-{name}")
    if is_main_process:
        check_writable(os.path.dirname(weights), os.path.basename(weights))
        check_writable(results, "history.csv", "metrics.json", "report.html")
        if os.path.exists(weights) and not opt.resume:
            print(f"{weights} is replaced when this training ends; keep it with another --name")
        elif not opt.resume:
            announce_replacement(results, "metrics.json")
    return results, weights


def victim_name(opt):
    """<arch>-<attack>; an unusual label mode is added, or replaces the attack for the grid trigger."""
    attack, arch = config.ATTACKS[opt.trigger_type], os.path.basename(opt.arch)
    if opt.inject_portion == 0:
        return f"{arch}-clean"
    if opt.target_type == attack["target_type"]:
        return f"{arch}-{attack['name']}"
    is_grid = opt.trigger_type == "gridTrigger"
    return f"{arch}-{opt.target_type}" if is_grid else f"{arch}-{attack['name']}-{opt.target_type}"


if __name__ == "__main__":
    run_script(main, f"continue with: {resume_command()}")
