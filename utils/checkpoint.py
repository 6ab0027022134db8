"""Checkpoints: a network's weights and the metadata needed to use and measure it."""

import io
import os
import re

import torch
import torchvision

from utils.errors import UserError
from utils.files import write_file
from utils.safe_load import UnsafeFile, printable, safe_load

SHIPPED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "weight")
STATE_DICT_KEYS = ("state_dict", "model", "net")  # where public code stores the state_dict; may be nested
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
# Blocks of the four stages of a ResNet, and whether they have a third convolution -> its name in torchvision.
TORCHVISION_RESNETS = {
    (2, 2, 2, 2, False): "resnet18", (3, 4, 6, 3, False): "resnet34", (3, 4, 6, 3, True): "resnet50",
    (3, 4, 23, 3, True): "resnet101", (3, 8, 36, 3, True): "resnet152",
}  # fmt: skip
# Data set in attack_result.pt of BackdoorBench -> the normalisation of its get_dataset_normalization.
BACKDOORBENCH = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    **dict.fromkeys(("gtsrb", "celeba"), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
}


def save_checkpoint(path: str, model, **metadata) -> None:
    """Write the network's weights and `metadata`: tensors and plain values, which a safe load can read.

    Raises:
        RunError: the file cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    content = io.BytesIO()  # on a full disk, torch.save to a file raises an error that does not say so
    torch.save({"state_dict": weights, **metadata}, content)
    write_file(path, lambda file: file.write(content.getbuffer()))


def file_stem(path: str) -> str:
    """The file's name without the endings of checkpoints."""
    return re.sub(r"(\.(tar|pth|pt|safetensors))+$", "", os.path.basename(path))


def find_weights(root: str, dataset: str, name: str) -> str:
    """The path of a model that train_badnet.py wrote to `root`, else of the one shipped with this repository.

    Returns:
        <root>/<dataset>/<name>.pth.tar if it exists, else weight/<dataset>/<name>.pth.tar of the repository.
    """
    trained, shipped = (os.path.join(folder, dataset, f"{name}.pth.tar") for folder in (root, SHIPPED))
    return trained if os.path.isfile(trained) else shipped


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint of this repository or of other code, written by torch.save or safetensors; executes nothing.

    Returns:
        a dict with "state_dict" and, in checkpoints of this repository, "arch" (str), "num_class" (int),
        "normalization" (mean and std, 3 numbers each), "image_size" (int) and "dataset" (str), all checked, and
        "attack" (for Attack.from_state) and "metrics", unchecked. A file without the first three comes from other code,
        where the same keys may mean something else: only its "state_dict" is returned, and "recognised", the
        architecture that its names give away. Of BackdoorBench's files "recognised" is what they name, and "num_class"
        and "normalization" are known, too.

    Raises:
        UserError: no such file, not a checkpoint, no state_dict in it, weights that are not finite, or invalid
            metadata.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the checkpoint in it")
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; train one with train_badnet.py or name one with --model")
    try:
        content = safe_load(path)
    except UnsafeFile as error:
        raise UserError(f"{path} is not a checkpoint that can be read safely: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    metadata, weights = {}, dict(dict.items(content))  # a pickled OrderedDict can have its methods replaced
    for _ in STATE_DICT_KEYS:  # bounded, because a dict can contain itself
        nested = next((key for key in STATE_DICT_KEYS if isinstance(weights.get(key), dict)), None)
        if nested:
            metadata |= {key: value for key, value in weights.items() if isinstance(key, str) and key != nested}
            weights = dict(dict.items(weights[nested]))
    weights = _without_prefix(weights)
    if not weights or not all(isinstance(n, str) and isinstance(w, torch.Tensor) for n, w in weights.items()):
        raise UserError(f"{path} holds no state_dict, neither under {', '.join(STATE_DICT_KEYS)} nor at its top level")
    if sum(tensor.nbytes for tensor in weights.values()) > os.path.getsize(path):
        raise UserError(f"{path}: several weights share the same bytes, which no architecture here does")
    if not all(tensor.float().isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} has weights that are not finite")
    if not {"arch", "num_class", "normalization"} <= metadata.keys():
        arch, _ = recognise(weights)
        metadata = ({"recognised": arch} if arch else {}) | _stated_by_backdoorbench(metadata)
    for name, (is_valid, expected) in METADATA.items():
        if name in metadata and not is_valid(metadata[name]):
            raise UserError(f"{path}: its {name} is not {expected}")
    return {**metadata, "state_dict": weights}


def check_data(checkpoint: dict, path: str, size: tuple[int, int], dataset: str | None = None) -> None:
    """Refuse images that a checkpoint says it was not trained on.

    Args:
        size: (H, W) of the images.
        dataset: their name; None: not compared. The names of two folders say nothing.

    Raises:
        UserError: another image size, or another data set.
    """
    expected, trained_on = checkpoint.get("image_size", size[0]), checkpoint.get("dataset", dataset)
    if expected != size[0]:
        raise UserError(f"{path} was trained on images of {expected} pixels a side, these have {size[0]}")
    if dataset not in (None, "folder", trained_on) and trained_on != "folder":
        trained_on = printable(trained_on)
        raise UserError(f"{path} was trained on {trained_on}, not on {dataset}: pass --dataset {trained_on}")


def recognise(weights: dict) -> tuple[str | None, int | None]:
    """Guess the architecture and the number of classes of a state_dict from its names and shapes.

    Returns:
        a name for select_model, or None if it is not known here; the number of classes, or None if there is no last
        layer.
    """
    head = weights.get("fc.weight", weights.get("linear.weight"))
    num_class = len(head) if head is not None and head.dim() == 2 else None
    wide = weights.get("block1.layer.0.conv1.weight")
    if wide is not None and wide.dim() == 4 and "fc.weight" in weights and len(wide) % 16 == 0:
        count = sum(re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", name) is not None for name in weights)
        return f"WRN-{6 * count + 4}-{len(wide) // 16}", num_class
    blocks = [sum(re.fullmatch(rf"layer{i}\.\d+\.conv2\.weight", name) is not None for name in weights) for i in "1234"]
    resnet = TORCHVISION_RESNETS.get((*blocks, "layer1.0.conv3.weight" in weights))
    if resnet == "resnet18" and "linear.weight" in weights:
        return "ResNet18" if "bn1.weight" in weights else "PreActResNet18", num_class
    stems = [getattr(weights.get(name), "shape", None) for name in ("conv1.weight", "layer1.0.conv2.weight")]
    if resnet and "fc.weight" in weights and stems == [(64, 3, 7, 7), (64, 64, 3, 3)]:  # others: ResNeXt, wide
        return f"torchvision:{resnet}", num_class
    return None, num_class


def check_fit(model, weights: dict, path: str, arch: str, hint: str = "check --arch and --num_class") -> None:
    """Check that a state_dict fits the network on any device ("meta" too), ignoring batch norm's batch counters.

    Args:
        arch: the name of the network in the message.
        hint: the end of the message: what the file appears to hold instead, and the options for it.

    Raises:
        UserError: it does not fit; the message lists names that are missing, unexpected, or of another shape or type.
    """
    expected = model.network.state_dict()
    common = [name for name in expected if name in weights]
    problems = {
        "missing": [n for n in expected if n not in weights and not n.endswith("num_batches_tracked")],
        "unexpected": [n for n in weights if n not in expected],
        "of another shape": [n for n in common if expected[n].shape != weights[n].shape],
        "of another type": [n for n in common if expected[n].is_floating_point() != weights[n].is_floating_point()],
    }
    listed = [f"{problem}: {_first_three(names)}" for problem, names in problems.items() if names]
    if listed:
        raise UserError(f"{path} does not fit {arch} ({'; '.join(listed)}); {hint}")


def load_weights(model, weights: dict, path: str, arch: str) -> None:
    """Load a state_dict into the network.

    Raises:
        UserError: it does not fit (see check_fit).
    """
    check_fit(model, weights, path, arch)
    model.network.load_state_dict(weights, strict=False)


def runs_a_file(arch: str) -> bool:
    """Whether an architecture is FILE.py:NAME, the code of a user's file."""
    return arch.rpartition(":")[0].endswith(".py")


def _stated_by_backdoorbench(metadata):
    """What attack_result.pt of BackdoorBench states of its model, if the metadata is of one and the model is known."""
    name, dataset = metadata.get("model_name"), metadata.get("clean_data")
    is_torchvision = name in torchvision.models.list_models()
    if dataset not in [*BACKDOORBENCH] or not (is_torchvision or name == "preactresnet18"):
        return {}
    arch = f"torchvision:{name}" if is_torchvision else "PreActResNet18"
    stated = {"recognised": arch, "num_class": metadata.get("num_classes"), "normalization": BACKDOORBENCH[dataset]}
    size = metadata.get("img_size")  # (H, W, 3)
    stated["image_size"] = size[0] if isinstance(size, list | tuple) and size else None
    return stated | {"dataset": dataset.upper() if dataset in ("cifar10", "cifar100", "gtsrb") else "folder"}


def _first_three(names):
    return ", ".join(map(printable, names[:3])) + (" ..." if len(names) > 3 else "")


def _without_prefix(weights):
    """Remove a wrapper's prefix that all names share, and the counter of torch's AveragedModel."""
    weights = {name: tensor for name, tensor in weights.items() if name != "n_averaged"}
    for prefix in PREFIXES * 2:  # a wrapper in a wrapper, in either order
        if weights and all(isinstance(name, str) and name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _is_normalization(value):
    """(mean, std) of 3 plausible numbers each, std above 0."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    mean, std = value
    if not all(isinstance(numbers, list | tuple) and len(numbers) == 3 for numbers in value):
        return False
    numbers = [*mean, *std]
    return all(type(x) in (int, float) and abs(x) < 1e6 for x in numbers) and min(std) > 1e-6


# Key -> (whether a value is valid, what a valid one is).
METADATA = {
    "arch": (lambda value: isinstance(value, str) and len(value) < 1_000 and value.isprintable(), "a short name"),
    "num_class": (lambda value: type(value) is int and value >= 2, "a number of classes, 2 or more"),
    "normalization": (_is_normalization, "a mean and a standard deviation above 0 for each of three channels"),
    "image_size": (lambda value: type(value) is int and value >= 1, "a number of pixels"),
    "dataset": (lambda value: isinstance(value, str), "a name"),
}
