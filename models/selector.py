"""One door to every architecture: select_model."""

import re

import torch
from torch import nn

from models.preact_resnet import PreActResNet18
from models.resnet import ResNet18
from models.wresnet import WideResNet
from utils.checkpoint import check_fit, load_weights
from utils.errors import UserError, nearest

MOST_CLASSES = 100_000
RESNETS = {"ResNet18": ResNet18, "PreActResNet18": PreActResNet18}


class Normalize(nn.Module):
    """Per-channel (x - mean) / std. The constants are no part of a state_dict: a checkpoint states them beside it."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A network behind its normalisation, so that everyone else works on images in [0, 1].

    `features(x)` is the pooled feature before the last linear layer, (B, D); `forward(x)` the logits, (B, num_class).
    `network` is the bare architecture: a published state_dict loads into it.
    """

    def __init__(self, network, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network

    @property
    def head(self) -> nn.Linear:
        """The last layer, from features to logits; the architectures' public names for it differ."""
        return self.network.fc if isinstance(self.network, WideResNet) else self.network.linear

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) features."""
        return self.network.features(self.normalize(x))

    def maps_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(B, 3, H, W) images in [0, 1] -> the (B, C, h, w) outputs of the last three groups of blocks, and the logits,
        of one pass."""
        maps = self.network.maps(self.normalize(x))
        return maps, self.head(self.network.pool(maps[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, num_class) logits."""
        return self.network(self.normalize(x))


def select_model(arch: str, num_class: int, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> Classifier:
    """Build `arch` with fresh weights: WRN-<depth>-<width>, ResNet18 or PreActResNet18.

    Args:
        mean, std: the per-channel constants of the normalisation; the defaults leave [0, 1] images as they are.

    Raises:
        UserError: no such architecture, or one too large to be meant.
    """
    if num_class > MOST_CLASSES:
        raise UserError(f"{num_class:,} classes are more than any data set here has")
    wide = re.fullmatch(r"WRN-(\d{1,4})-(\d{1,3})", arch)
    if wide:
        network = WideResNet(int(wide[1]), int(wide[2]), num_class)
    elif arch in RESNETS:
        network = RESNETS[arch](num_class)
    else:
        known = ", ".join(["WRN-16-1 (or any depth and width)", *RESNETS])
        raise UserError(f"no architecture named {arch!r}; there are {known}{nearest(arch, ['WRN-16-1', *RESNETS])}")
    return Classifier(network, mean, std).to(memory_format=torch.channels_last)


def load_model(weights: dict, path: str, arch: str, num_class: int, mean, std) -> Classifier:
    """`arch` with the weights of a file.

    Raises:
        UserError: they do not fit; the message says what the file seems to hold.
    """
    with torch.device("meta"):  # shapes alone, before anything is as large as a file says
        check_fit(select_model(arch, num_class), weights, path, f"{arch} with {num_class} classes", _contents(weights))
    model = select_model(arch, num_class, mean, std)
    load_weights(model, weights, path, arch)
    return model


def _contents(weights):
    """What a state_dict that does not fit seems to hold, and the options that fit it."""
    arch, num_class = recognise(weights)
    if arch is None:
        return f"it holds no architecture known here ({len(weights)} weights, {num_class or 'unknown'} classes)"
    return f"it seems to hold {arch} with {num_class} classes: --arch {arch} --num_class {num_class}"


def recognise(weights: dict) -> tuple[str | None, int | None]:
    """Which architecture a state_dict seems to hold, by its names and shapes alone, and for how many classes.

    Returns:
        a name for select_model, or None where none of its architectures has such weights; the number of classes, or
        None where there is no last layer.
    """
    head = weights.get("fc.weight", weights.get("linear.weight"))
    num_class = len(head) if head is not None and head.dim() == 2 else None
    stem = weights.get("block1.layer.0.conv1.weight")
    if stem is not None and stem.dim() == 4 and "fc.weight" in weights and len(stem) % 16 == 0:
        count = sum(re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", name) is not None for name in weights)
        return f"WRN-{6 * count + 4}-{len(stem) // 16}", num_class
    blocks = [sum(re.fullmatch(rf"layer{i}\.\d+\.conv2\.weight", name) is not None for name in weights) for i in "1234"]
    if blocks != [2, 2, 2, 2] or "layer1.0.conv3.weight" in weights or "linear.weight" not in weights:
        return None, num_class
    return "ResNet18" if "bn1.weight" in weights else "PreActResNet18", num_class
