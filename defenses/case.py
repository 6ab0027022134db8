"""What every defense is given, and what it gives back."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from utils.report import Stopwatch


class Case(NamedTuple):
    """A victim to purify, and the defender's means.

    victim: f_B, frozen and in eval mode, on (B, 3, H, W) images in [0, 1].
    training: batches of the clean split to train on, (images (B, 3, H, W) in [0, 1], labels (B,)), with a length.
    plain: the same without crops and flips.
    mirrored: whether `training` has them.
    seed: of every draw.
    clock: told what takes how long: finetune, inversion, purify.
    target: the label to work against, for the defenses that need one.
    watch: what looks at the student after each epoch, as in utils.training.train.
    """

    victim: nn.Module
    training: Iterable
    plain: Iterable
    mirrored: bool
    device: torch.device
    seed: int
    clock: Stopwatch
    target: int | None = None
    watch: Callable | None = None


class Purified(NamedTuple):
    """The student, in eval mode, a row an epoch of its training, and the inverted trigger if the defense has one."""

    student: nn.Module
    history: list[dict]
    trigger: object = None
