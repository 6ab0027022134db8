"""This repository against the public way, stage by stage, A and B in turn.

    python -m tests.bench --model FILE      the table, and main.py on FILE end to end
    python -m tests.bench --quick           fewer images, once, and no end-to-end run

The public way is that of research releases: a DataLoader that opens, crops and flips one PIL image after another, NCHW,
float32, batches of 64, gradients for every parameter, the loss read in every step. Each side has its own process, so
that neither benefits from the other's settings, and one waits while the other works. Rates are medians.
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import config
from attacks import Attack
from data_loader import EVAL_BATCH, Batches, DatasetBD, TensorImages, load_images
from defenses import DefenseContext
from defenses.inversion.invert import invert_trigger
from defenses.mcl import contrastive_loss, train_student
from models.loading import load_model
from utils.checkpoint import read_checkpoint
from utils.datasets import NORMALIZATION
from utils.device import keep_freed_memory, pick_device
from utils.metrics import predict
from utils.progress import Stopwatch
from utils.reporting.save import versions
from utils.reporting.tables import text_table
from utils.seed import generator
from utils.training import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GRID = Attack("gridTrigger", "all2one", 5, 10, 0.1)
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "onecycle"}
# Images of the published schedule in each stage: 100 passes over the clean split, 20 epochs, and a test on clean and
# triggered images after most of them.
PUBLISHED = {"inversion": 249_600, "purification": 50_000, "evaluation": 330_000}


class PilImages(Dataset):
    """One PIL image after another, as in the Dataset of a release."""

    def __init__(self, images, labels, augmented):
        self.images, self.labels = [Image.fromarray(image) for image in images.numpy()], labels.tolist()
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augmented else []
        normalize = transforms.Normalize(*NORMALIZATION["CIFAR10"])
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), normalize])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def public_poisoning(victim, images, labels, opt):
    """Image by image, pixel by pixel."""
    chosen = set(np.random.permutation(len(labels))[: len(labels) // 10].tolist())
    poisoned = []
    for i, image in enumerate(images.numpy()):
        if i in chosen:
            image = image.copy()
            for row in range(3):
                for column in range(3):
                    image[29 + row, 29 + column] = 255 * ((row + column) % 2)
        poisoned.append((image, 5 if i in chosen else int(labels[i])))


def public_training(victim, images, labels, opt):
    network = victim.network.requires_grad_(True).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    for x, y in DataLoader(PilImages(images, labels, True), opt.batch_size, shuffle=True):
        loss = F.cross_entropy(network(x.to(opt.device)), y.to(opt.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def public_inversion(victim, images, labels, opt):
    network = victim.network.requires_grad_(True)
    pattern = torch.zeros(3, 32, 32, device=opt.device, requires_grad=True)
    optimizer = torch.optim.Adam([pattern], lr=0.1)
    for x, y in DataLoader(PilImages(images, labels, False), 64, shuffle=True):
        targets = torch.full_like(y, 5).to(opt.device)
        loss = F.cross_entropy(network(x.to(opt.device) + pattern), targets) + 1e-3 * pattern.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def public_purification(victim, images, labels, opt):
    network, frozen = victim.network, copy.deepcopy(victim.network).eval()
    optimizer = torch.optim.SGD(network.requires_grad_(True).train().parameters(), 0.01, momentum=0.9)
    pattern = torch.zeros(3, 32, 32, device=opt.device)
    for x, _ in DataLoader(PilImages(images, labels, False), 64, shuffle=True):
        x = x.to(opt.device)
        z, clean, bad = network.features(x + pattern), frozen.features(x), frozen.features(x + pattern)
        loss = contrastive_loss(z, clean.detach(), bad.detach(), 0.5).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def public_evaluation(victim, images, labels, opt):
    network = victim.network.eval()
    with torch.no_grad():
        for x, y in DataLoader(PilImages(images, labels, False), 64):
            (network(x.to(opt.device)).argmax(1) == y.to(opt.device)).sum().item()


def our_poisoning(victim, images, labels, opt):
    DatasetBD(images, labels, GRID, "train", generator(1, "poison"))


def our_training(victim, images, labels, opt):
    batches = Batches(TensorImages(images, labels), opt.batch_size, opt.device, shuffle=True, padding=4)
    victim.requires_grad_(True)
    loss_of = lambda x, y: F.cross_entropy(victim(x), y)
    train(victim, batches, loss_of, opt.device, epochs=1, precision=opt.precision, title="bench", **SGD)


def our_inversion(victim, images, labels, opt):
    batches = Batches(TensorImages(images, torch.zeros_like(labels)), 64, opt.device, shuffle=True)
    invert_trigger(victim, batches, 5, opt.device, generator(1, "bench"), 1, 1, len(batches), opt.precision)


def our_purification(victim, images, labels, opt):
    batches = Batches(TensorImages(images, labels), 64, opt.device, shuffle=True, padding=2)
    settings = {"temperature": 0.15, "align_weight": 12.0, "mirror": True, "target": 5, "ema": 0.97, **SGD}
    pattern = torch.zeros(1, 3, 32, 32, device=opt.device)
    context = DefenseContext(victim, batches, batches, True, len(labels), opt.device, 1, Stopwatch(), 5)
    train_student(context, victim, pattern, epochs=1, precision=opt.precision, **settings)


def our_evaluation(victim, images, labels, opt):
    predict(victim, Batches(TensorImages(images, labels), EVAL_BATCH, opt.device))


SIDES = {
    "public": (public_poisoning, public_training, public_inversion, public_purification, public_evaluation),
    "ours": (our_poisoning, our_training, our_inversion, our_purification, our_evaluation),
}
STAGES = ("poisoning", "training", "inversion", "purification", "evaluation")


def load_victim(opt):
    """The model of --model, in eval mode."""
    checkpoint = read_checkpoint(opt.model)
    model = load_model(checkpoint["state_dict"], opt.model, "WRN-16-1", 10, *NORMALIZATION["CIFAR10"])
    return model.to(opt.device).eval()


def work(side, opt, pipe):
    """The process of one side: runs a stage on so many images when asked; reports its rate and peak memory (MiB)."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    data = load_images(opt, "train")
    if side == "ours":
        pick_device(opt.device.type)
        keep_freed_memory()
    for stage, count in iter(pipe.recv, None):
        images, labels = data.images[:count], data.labels[:count]
        if STAGES[stage] == "poisoning":
            images, labels = data.images, data.labels
        victim = load_victim(opt).requires_grad_(False)
        if side == "public":
            victim = victim.to(memory_format=torch.contiguous_format)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the peak
        began = time.perf_counter()
        SIDES[side][stage](victim, images, labels, opt)
        if opt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        with open("/proc/self/status") as file:
            peak = next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
        pipe.send((len(labels) / seconds, peak))


def compare(opt):
    """Run every stage on both sides in turn, and on ours with twice the images. Returns table rows and public rates."""
    context, pipes = multiprocessing.get_context("spawn"), {}
    for side in SIDES:
        pipes[side], end = context.Pipe()
        context.Process(target=work, args=(side, opt, end), daemon=True).start()
    rows, public = [], {}
    for stage, name in enumerate(STAGES):
        measured, times = {side: [] for side in SIDES}, []
        for _ in range(opt.repeats):
            for side, pipe in pipes.items():
                pipe.send((stage, opt.images))
                measured[side].append(pipe.recv())
            if name != "poisoning":  # always of the whole training set
                pipes["ours"].send((stage, 2 * opt.images))
                times.append(2 * measured["ours"][-1][0] / pipes["ours"].recv()[0])
        rates = {side: statistics.median(rate for rate, _ in seen) for side, seen in measured.items()}
        peaks = {side: max(peak for _, peak in seen) for side, seen in measured.items()}
        ratio = statistics.median(ours / other for (other, _), (ours, _) in zip(*measured.values(), strict=True))
        public[name] = rates["public"]
        rows.append(
            [name, *(f"{rates[side]:,.0f}" for side in SIDES), ratio, *(f"{peaks[side]:,.0f}" for side in SIDES)]
            + [statistics.median(times) if times else ""]
        )
    for pipe in pipes.values():
        pipe.send(None)
    return rows, public


def end_to_end(opt):
    """Seconds of main.py on --model with its target given, and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", os.path.abspath(opt.model), "--target", "5", "--print_freq", "0"]
        words += ["--checkpoint_root", folder, "--log_root", folder]
        words += ["--data_root", os.path.abspath(opt.data_root), "--precision", opt.precision]
        words += ["--device", opt.device.type]
        began = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "main.py"), *words], stdout=subprocess.DEVNULL, cwd=folder
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"main.py ended with exit code {process.returncode}")
        return time.perf_counter() - began, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=os.path.join(ROOT, "weight", "CIFAR10", "WRN-16-1-badnet.pth.tar"))
    parser.add_argument("--data_root", default=config.RUN["data_root"])
    parser.add_argument("--batch_size", type=int, default=128, help="of training, on both sides")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="of this repository's side")
    parser.add_argument("--quick", action="store_true", help="fewer images, once, and no end-to-end run")
    opt = parser.parse_args()
    opt.dataset, opt.num_class, opt.image_size, opt.device = "CIFAR10", None, 32, torch.device(opt.device)
    opt.images, opt.repeats = (512, 1) if opt.quick else (5_000, 3)
    print(", ".join(f"{name} {version}" for name, version in versions().items()), f"threads {torch.get_num_threads()}")
    rows, public = compare(opt)
    print(text_table(["images/s", "public", "ours", "ratio", "public MiB", "ours MiB", "time for twice"], rows))
    if not opt.quick:
        published = sum(images / public[name] for name, images in PUBLISHED.items())
        seconds, peak = end_to_end(opt)
        print(f"\nmain.py end to end: {seconds:.0f} s, {peak:,.0f} MiB at its peak; the public way at its rates above,")
        print(f"doing its published counts: {published:.0f} s; ratio {published / seconds:.1f}")


if __name__ == "__main__":
    main()
