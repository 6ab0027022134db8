"""Checkpoints: a network's weights, and beside them all that is needed to use and to measure it."""

import io
import os

import torch

from utils.errors import UserError
from utils.files import write_file
from utils.untrusted import Refused, printable, read_untrusted

SHIPPED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weight")
# Under which keys, if any, public code keeps the state_dict, one within another at times.
HOLDERS = ("state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def save_checkpoint(path: str, model, **facts) -> None:
    """Write the network's weights with `facts` beside them: tensors and plain values, so that a safe load can read it.

    Raises:
        RunError: the file cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    content = io.BytesIO()  # torch.save straight to a disk that fills up would tell it in words of its own
    torch.save({"state_dict": weights, **facts}, content)
    write_file(path, lambda file: file.write(content.getbuffer()))


def find_weights(root: str, dataset: str, name: str) -> str:
    """Where the weights of a name are: in `root`, where train_badnet.py writes them, else beside the code, shipped.

    Returns:
        <root>/<dataset>/<name>.pth.tar, or weight/<dataset>/<name>.pth.tar of this repository.
    """
    own, shipped = (os.path.join(folder, dataset, f"{name}.pth.tar") for folder in (root, SHIPPED))
    return own if os.path.isfile(own) else shipped


def read_checkpoint(path: str) -> dict:
    """Read a file of ours or a published one, torch's or safetensors'; nothing in it is executed.

    Returns:
        a dict with "state_dict" and, in files of ours, "arch" (str), "num_class" (int), "normalization" (mean and std,
        3 numbers each), all checked, and "dataset", "attack" (for attacks.restore) and "metrics", which are not. A
        file that has not the first three is a stranger's, whose words for the others may mean anything: left out.

    Raises:
        UserError: no such file, not a checkpoint, nothing in it that looks like a state_dict, weights that are no
            finite numbers, or a fact of the wrong kind.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the checkpoint in it")
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint at {path}; train one with train_badnet.py or name one with --model")
    try:
        content = read_untrusted(path)
    except Refused as refusal:
        raise UserError(f"{path} is not a checkpoint that can be read safely: {refusal}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    facts, weights = {}, dict(dict.items(content))  # a stranger's OrderedDict can have its methods replaced: a copy
    for _ in HOLDERS:  # not for ever: a dict can hold itself
        holder = next((key for key in HOLDERS if isinstance(weights.get(key), dict)), None)
        if holder:
            facts |= {key: value for key, value in weights.items() if isinstance(key, str) and key != holder}
            weights = dict(dict.items(weights[holder]))
    weights = _without_prefix(weights)
    if not weights or not all(isinstance(n, str) and isinstance(w, torch.Tensor) for n, w in weights.items()):
        raise UserError(f"{path} holds no state_dict: no weights under {', '.join(HOLDERS)} or at its top")
    if sum(tensor.nbytes for tensor in weights.values()) > os.path.getsize(path):
        raise UserError(f"{path} has the same bytes stand for many weights, which no network here does")
    if not all(tensor.float().isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} has weights that are not finite numbers")
    if not FACTS.keys() <= facts.keys():
        return {"state_dict": weights}
    for name, (allowed, told) in FACTS.items():
        if not allowed(facts[name]):
            raise UserError(f"{path}: its {name} is not {told}")
    return {**facts, "state_dict": weights}


def check_fit(model, weights: dict, path: str, arch: str, holds: str = "is --arch or --num_class another one?") -> None:
    """See that a state_dict fits the network (on any device, "meta" too), but for batch norm's counters of batches.

    Args:
        holds: how the message ends: what the file seems to hold instead, and the options for it.

    Raises:
        UserError: it does not fit; the message says what is missing, too many, or of another shape or type.
    """
    own = model.network.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    both = [name for name in own if name in weights]
    problems = {
        "missing": [name for name in needed if name not in weights],
        "too many": [name for name in weights if name not in own],
        "of another shape": [n for n in both if own[n].shape != weights[n].shape],
        "of another type": [n for n in both if own[n].is_floating_point() != weights[n].is_floating_point()],
    }
    first = {what: ", ".join(map(printable, names[:3])) for what, names in problems.items() if names}
    told = [f"{what}: {names}{' ...' * (len(problems[what]) > 3)}" for what, names in first.items()]
    if told:
        raise UserError(f"{path} does not fit {arch} ({'; '.join(told)}); {holds}")


def load_weights(model, weights: dict, path: str, arch: str) -> None:
    """Put a state_dict that fits (see check_fit) into the network.

    Raises:
        UserError: it does not fit.
    """
    check_fit(model, weights, path, arch)
    model.network.load_state_dict(weights, strict=False)


def _without_prefix(weights):
    """The state_dict under its plain names, where all of them have a wrapper's prefix."""
    for prefix in PREFIXES:
        if weights and all(isinstance(name, str) and name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _is_normalization(value):
    """(mean, std), each of 3 numbers that pixels can have, the latter above 0."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    mean, std = value
    if not all(isinstance(numbers, list | tuple) and len(numbers) == 3 for numbers in value):
        return False
    numbers = [*mean, *std]
    return all(type(x) in (int, float) and abs(x) < 1e6 for x in numbers) and min(std) > 1e-6


FACTS = {
    "arch": (lambda value: isinstance(value, str) and len(value) < 40 and value.isprintable(), "a short name"),
    "num_class": (lambda value: type(value) is int and value >= 2, "a number of classes, 2 or more"),
    "normalization": (_is_normalization, "a mean and a standard deviation above 0 for each of three channels"),
}
