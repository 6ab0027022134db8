"""What every defense is given, and what it returns."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from defenses.inversion import InvertedTrigger, find_trigger, invert_trigger, invert_warp, shifted_patterns
from utils.batches import INVERSION_BATCH
from utils.progress import Stopwatch
from utils.seed import generator
from utils.training import train

REMAINING_ROUNDS = 2  # rounds of the inversion of a student
MAX_REMAINING = 0.05  # fraction of the pixels: a larger pattern that works on the student is no remnant of the backdoor


class DefenseContext(NamedTuple):
    """A victim to purify, and the defender's means.

    victim: f_B, frozen, in eval mode, on (B, 3, H, W) images in [0, 1].
    train_batches: batches of the clean split to train on, (images (B, 3, H, W) in [0, 1], labels (B,)), with a length
        and an image_shape, (3, H, W).
    plain_batches: the same images without augmentation.
    augmented: whether `train_batches` are cropped, and flipped if `mirrored`.
    image_count: number of different clean images.
    device: of the victim, the batches and all training.
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

    def invert(self, rounds, steps, batches, precision) -> InvertedTrigger:
        """The victim's trigger, with `batches` of INVERSION_BATCH images per step; errors as in find_trigger."""
        with self.clock("inversion"):
            settings = self.victim, self.plain_batches, self.target, self.device, self.seed, rounds
            return find_trigger(*settings, steps, self._batches_per_step(batches), precision)

    def _batches_per_step(self, batches):
        """How many plain batches have the images of `batches` of INVERSION_BATCH: fewer clean images fill no batch."""
        return batches * math.ceil(INVERSION_BATCH / self.image_count)

    def remaining_trigger(self, student, trigger, steps, batches, precision) -> InvertedTrigger | None:
        """A pattern that the student still responds to with the target label, or None.

        Of few pixels, or a warp if the victim's trigger is one: a student can only be trained on patterns of one kind.

        Arguments as in invert.
        """
        is_warp, rng = len(trigger.pattern) == 2, generator(self.seed, "remaining")
        budget = steps, self._batches_per_step(batches), precision
        with self.clock("inversion"):
            frozen = copy.deepcopy(student).requires_grad_(False)
            settings = frozen, self.plain_batches, self.target, self.device, rng
            found = invert_warp(*settings, *budget) if is_warp else invert_trigger(*settings, REMAINING_ROUNDS, *budget)
        if found is None or (not is_warp and found.area > MAX_REMAINING):
            return None
        print(f"the student still responds to a pattern: {found.describe()}, hit rate {found.hit_rate:.1%}")
        return found

    def training_patterns(self, trigger: InvertedTrigger, model: nn.Module | None = None) -> torch.Tensor:
        """The patterns to purify with, (V, C, H, W), parts included, shifted as the augmentation shifts images.

        Only shifts that the model responds to count. Waves are not shifted: their other phases are among them.

        Args:
            model: that the trigger was inverted from; None: the victim.
        """
        if trigger.other_waves is not None or not self.augmented:
            return torch.cat([trigger.patterns, *(part[None] for part in trigger.parts)])
        triggers = [trigger, *(replace(trigger, pattern=part) for part in trigger.parts)]
        settings = self.plain_batches, self.target
        with self.clock("inversion"):
            return torch.cat([shifted_patterns(model or self.victim, each, *settings) for each in triggers])

    def new_student(self) -> nn.Module:
        """A copy of the victim to train."""
        return copy.deepcopy(self.victim).requires_grad_(True)

    def fit(self, student: nn.Module, loss_of: Callable, **training) -> "DefenseResult":
        """Train the student on `train_batches`, monitored; `loss_of` and `training` as in utils.training.train."""
        with self.clock("purify"):
            history = train(student, self.train_batches, loss_of, self.device, monitor=self.monitor, **training)
        return DefenseResult(student.eval(), history)


class DefenseResult(NamedTuple):
    """The student in eval mode, a history row for each epoch, and the inverted trigger if the defense has one."""

    student: nn.Module
    history: list[dict]
    trigger: InvertedTrigger | None = None
