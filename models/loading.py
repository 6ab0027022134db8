"""Load the weights of a checkpoint into its architecture."""

import os

import torch

from models.selector import Classifier, select_model
from utils.checkpoint import check_data, check_fit, load_weights, read_checkpoint, recognise, runs_a_file
from utils.errors import UserError


def load_model(weights: dict, path: str, arch: str, num_class: int, mean, std, size=(32, 32)) -> Classifier:
    """Build `arch` with the weights of a checkpoint; size is (H, W) of its images.

    Raises:
        UserError: the weights do not fit; the message names the architecture and number of classes that the file
            appears to hold.
    """
    # Shapes are compared before memory is allocated for sizes that a checkpoint claims. The code of others takes none
    # from it, and may read values, which "meta" does not have.
    with torch.device("cpu" if ":" in arch else "meta"):
        check_fit(select_model(arch, num_class), weights, path, f"{arch} with {num_class} classes", _fit_hint(weights))
    model = select_model(arch, num_class, mean, std)
    load_weights(model, weights, path, arch)
    if model.head_name is None:
        model.find_head(arch, num_class, size)
    return model


def load_classifier(checkpoint: dict, path: str, arch: str, num_class: int, normalization, device, size=(32, 32)):
    """Build the model of a checkpoint; what read_checkpoint found in the file takes precedence over the arguments.

    But code of a file that the checkpoint names is not run: only `arch` can name it.

    Args:
        arch, normalization: used if the checkpoint does not state them; normalization is (mean, std).
        num_class: number of classes.
        size: (H, W) of the images.

    Returns:
        the frozen Classifier in eval mode on the device, and its metadata: arch, num_class and normalization.

    Raises:
        UserError: unknown architecture, or weights that do not fit it.
    """
    arch = arch if runs_a_file(checkpoint.get("arch", "")) else checkpoint.get("arch", arch)
    normalization = checkpoint.get("normalization", normalization)
    model = load_model(checkpoint["state_dict"], path, arch, num_class, *normalization, size)
    metadata = {"arch": arch, "num_class": num_class, "normalization": normalization}
    return model.to(device).eval().requires_grad_(False), metadata


def load_clean_model(path: str, num_class: int, normalization, device, arch: str, size, hint: str) -> Classifier:
    """Load a clean model (--surrogate, --retune_reference), frozen, in eval mode, on the device.

    Args:
        arch, normalization: used if the checkpoint does not state them.
        size: (H, W) of the images.
        hint: what to do if there is no such file, for the error message.

    Raises:
        UserError: no such file, another number of classes or image size, or weights that do not fit.
    """
    if not os.path.isfile(path):
        raise UserError(f"no clean model at {path}; {hint}")
    checkpoint = read_checkpoint(path)
    found = checkpoint.get("num_class", num_class)
    if found != num_class:
        raise UserError(f"the clean model {path} has {found} classes, but {num_class} are needed; {hint}")
    check_data(checkpoint, path, size)
    arch = checkpoint.get("recognised", arch)
    return load_classifier(checkpoint, path, arch, num_class, normalization, device, size)[0]


def _fit_hint(weights):
    """What a state_dict that does not fit appears to hold, and the options for it."""
    arch, num_class = recognise(weights)
    if arch is None:
        return "it holds no known architecture; pass its own: --arch torchvision:NAME, timm:NAME or FILE.py:NAME"
    return f"it appears to hold {arch} with {num_class} classes: --arch {arch} --num_class {num_class}"
