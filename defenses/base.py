"""What every defense is given, and what it returns."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from defenses.inversion import InvertedTrigger, find_trigger, shifted_patterns
from utils.progress import Stopwatch


class DefenseContext(NamedTuple):
    """A victim to purify, and the defender's means.

    victim: f_B, frozen, in eval mode, on (B, 3, H, W) images in [0, 1].
    train_batches: batches of the clean split to train on, (images (B, 3, H, W) in [0, 1], labels (B,)), with a length
        and an image_shape, (3, H, W).
    plain_batches: the same images without augmentation.
    augmented: whether `train_batches` are cropped, and flipped if `mirrored`.
    image_count: number of different clean images.
    seed: of every draw.
    clock: measures the stages finetune, inversion and purify.
    target: the label to defend against, for the defenses that need one.
    monitor: measures the student after each epoch, as in utils.training.train.
    mirrored: whether mirror images have the labels of their originals, which traffic signs do not.
    """

    victim: nn.Module
    train_batches: Iterable
    plain_batches: Iterable
    augmented: bool
    image_count: int
    device: torch.device
    seed: int
    clock: Stopwatch
    target: int | None = None
    monitor: Callable | None = None
    mirrored: bool = True

    def invert(self, rounds: int, steps: int, batches_per_step: int, precision: str) -> InvertedTrigger:
        """The inverted trigger of the victim; arguments and errors as in defenses.inversion.find_trigger."""
        budget = rounds, steps, batches_per_step, precision
        with self.clock("inversion"):
            return find_trigger(self.victim, self.plain_batches, self.target, self.device, self.seed, *budget)

    def training_patterns(self, trigger: InvertedTrigger) -> torch.Tensor:
        """The patterns to purify with, (V, C, H, W): shifted as the augmentation shifts images, if the victim responds.

        Waves are not shifted: their other phases are among them.
        """
        if trigger.others is not None or not self.augmented:
            return trigger.patterns
        return shifted_patterns(self.victim, trigger, self.plain_batches, self.target)


class DefenseResult(NamedTuple):
    """The student in eval mode, a history row for each epoch, and the inverted trigger if the defense has one."""

    student: nn.Module
    history: list[dict]
    trigger: InvertedTrigger | None = None
