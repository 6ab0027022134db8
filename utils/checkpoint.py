"""Checkpoints: a network's weights, and beside them all that is needed to use and to measure it."""

import os
import warnings

import torch

from utils.errors import UserError
from utils.files import write_file

# Under which key, if any, public code keeps the state_dict.
HOLDERS = ("state_dict", "model", "net")


def save_checkpoint(path: str, model, **facts) -> None:
    """Write the network's weights with `facts` beside them: tensors and plain values, so that a safe load can read it.

    Raises:
        RunError: the file cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.network.state_dict().items()}
    write_file(path, lambda file: torch.save({"state_dict": weights, **facts}, file))


def read_checkpoint(path: str) -> dict:
    """Read a file of ours or a published one; nothing in it is executed.

    Returns:
        a dict with "state_dict" and, in files of ours, "arch", "num_class", "dataset", "normalization" (mean, std),
        "attack" (for attacks.Attack) and "metrics".

    Raises:
        UserError: no such file, not a checkpoint, or nothing in it that looks like a state_dict.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint at {path}; train one with train_badnet.py or name one with --model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch remarks on odd pickles, the refusal below says in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever a strange file makes the unpickler raise
        raise UserError(f"{path} is not a checkpoint that can be read safely ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    holder = next((key for key in HOLDERS if isinstance(content.get(key), dict)), None)
    facts = content if holder else {"state_dict": content}
    weights = content[holder] if holder else content
    weights = {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}
    if not weights or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{path} holds no state_dict: no weights under {', '.join(HOLDERS)} or at its top")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path} has weights that are not finite numbers")
    return {**facts, "state_dict": weights}


def load_weights(model, weights: dict, path: str, arch: str) -> None:
    """Put a state_dict into the network, which must fit exactly.

    Raises:
        UserError: it does not; the message says what is missing, too many or of another shape.
    """
    own = model.network.state_dict()
    problems = {
        "missing": [name for name in own if name not in weights],
        "too many": [name for name in weights if name not in own],
        "of another shape": [n for n in own if n in weights and own[n].shape != weights[n].shape],
    }
    told = [f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for what, names in problems.items() if names]
    if told:
        raise UserError(f"{path} does not fit {arch} ({'; '.join(told)}); is --arch or --num_class another one?")
    model.network.load_state_dict(weights)


def _first_line(error):
    return str(error).split("\n")[0] or type(error).__name__
