"""Models from files: victims with their attack, and the clean ones that attacks start from."""

import os

from attacks.attack import Attack
from data_loader import get_attack, get_normalization
from models import load_model
from utils.checkpoint import find_weights, read_checkpoint
from utils.errors import UserError

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
    """A model, frozen, with what is to be saved beside weights made from it; from its file, or else from the options.

    Args:
        given: names of the options that the user gave.
        test_set: the data_loader.ImageSet that it will be measured on.

    Returns:
        the Classifier on the device, in eval mode; its Attack; its facts, for utils.checkpoint.save_checkpoint.

    Raises:
        UserError: no such checkpoint, one that states what the user gave as well, or one that is not for this data.
    """
    checkpoint = read_checkpoint(path)
    for key, options in STATED.items():
        for name in given.intersection(options):
            if key in checkpoint:
                stated = Attack.restore(checkpoint[key]).describe() if key == "attack" else checkpoint[key]
                raise UserError(f"{path} states its {key}, {stated}; leave out --{name}")
    classes = len(test_set.classes)
    num_class = checkpoint.get("num_class", opt.num_class or classes)
    if num_class < classes:
        raise UserError(f"{opt.dataset} has {classes} classes, the model {num_class}")
    stated = checkpoint.get("attack")
    attack = Attack.restore(stated, num_class, test_set.images[:1]) if stated is not None else None
    attack = attack or get_attack(opt, num_class, test_set.size)
    victim, facts = _load(checkpoint, path, opt, num_class, device)
    return victim, attack, {**facts, "attack": attack.state()}


def load_surrogate(opt, num_class, device):
    """The clean model of --surrogate, frozen, on the device; by default one's own, or the one that is shipped.

    Raises:
        UserError: there is none, or it is not for this data.
    """
    path = opt.surrogate or find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-clean")
    if not os.path.isfile(path):
        train_it = f"python train_badnet.py --dataset {opt.dataset} --inject_portion 0 --name WRN-16-1-clean"
        raise UserError(f"{opt.trigger_type} needs a clean model, and none is at {path}; train one: {train_it}")
    checkpoint = read_checkpoint(path)
    classes = checkpoint.get("num_class", num_class)
    if classes != num_class:
        raise UserError(f"{opt.dataset} has {num_class} classes, the clean model {path} {classes}")
    return _load(checkpoint, path, opt, num_class, device)[0]


def _load(checkpoint, path, opt, num_class, device):
    arch = checkpoint.get("arch", opt.arch)
    normalization = checkpoint.get("normalization") or get_normalization(opt)
    model = load_model(checkpoint["state_dict"], path, arch, num_class, *normalization)
    facts = {"arch": arch, "num_class": num_class, "dataset": opt.dataset, "normalization": normalization}
    return model.to(device).eval().requires_grad_(False), facts
