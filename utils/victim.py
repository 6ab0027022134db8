"""The victim: which file it is, what that states, and what the options say where it states nothing."""

import os

from attacks import Attack
from data_loader import get_attack, get_normalization
from models import load_model
from utils.checkpoint import read_checkpoint
from utils.errors import UserError

ROOT = os.path.dirname(os.path.dirname(__file__))
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


def victim_paths(opt) -> list[str]:
    """--model, else the data set's shipped victim, wherever the script is run from."""
    return opt.model or [os.path.join(ROOT, "weight", opt.dataset, "WRN-16-1-badnet.pth.tar")]


def victim_name(path: str) -> str:
    """What a run calls the model in a file: the file's name without its endings."""
    return os.path.basename(path).split(".")[0]


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
