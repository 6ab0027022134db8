"""select_model builds an architecture by its name, with the normalisation in front."""

import re

import torch
from torch import nn

from models.preact_resnet import PreActResNet18
from models.resnet import ResNet18
from models.wresnet import WideResNet
from utils.errors import UserError, did_you_mean

MAX_CLASSES = 100_000
RESNETS = {"ResNet18": ResNet18, "PreActResNet18": PreActResNet18}


class Normalize(nn.Module):
    """Per-channel (x - mean) / std. The constants are not in the state_dict; checkpoints store them as metadata."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A network with its normalisation in front, so that all other code works on images in [0, 1].

    `network` is the bare architecture, which state_dicts of published checkpoints load into.
    """

    def __init__(self, network, mean, std):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network

    @property
    def head(self) -> nn.Linear:
        """The last linear layer, (B, D) features -> (B, num_class) logits."""
        return self.network.fc if isinstance(self.network, WideResNet) else self.network.linear

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) pooled features, the input of the last linear layer."""
        return self.network.features(self.normalize(x))

    def maps_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One forward pass: (B, 3, H, W) images in [0, 1] -> maps and logits.

        Returns:
            the (B, C, h, w) feature maps of the last three groups of blocks, and the (B, num_class) logits.
        """
        maps = self.network.maps(self.normalize(x))
        return maps, self.head(self.network.pool(maps[-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, num_class) logits."""
        return self.network(self.normalize(x))


def select_model(arch: str, num_class: int, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> Classifier:
    """Build `arch` with newly initialised weights: WRN-<depth>-<width>, ResNet18 or PreActResNet18.

    Args:
        mean, std: constants of the normalisation per channel; the defaults change nothing.

    Raises:
        UserError: unknown architecture, or an implausibly large one.
    """
    if num_class > MAX_CLASSES:
        raise UserError(f"{num_class:,} classes are too many; at most {MAX_CLASSES:,} are supported")
    wide = re.fullmatch(r"WRN-(\d{1,4})-(\d{1,3})", arch)
    if wide:
        network = WideResNet(int(wide[1]), int(wide[2]), num_class)
    elif arch in RESNETS:
        network = RESNETS[arch](num_class)
    else:
        hint = did_you_mean(arch, ["WRN-16-1", *RESNETS])
        raise UserError(f"unknown architecture {arch!r}; use WRN-<depth>-<width>, {' or '.join(RESNETS)}{hint}")
    return Classifier(network, mean, std).to(memory_format=torch.channels_last)
