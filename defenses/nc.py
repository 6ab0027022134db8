"""Unlearning the inverted trigger (Neural Cleanse, Wang et al., S&P 2019, section VI-C).

The inverted trigger is MCL's, with its shifts and mirror images, so that a comparison of the two compares what they do
with it.
"""

import copy

import torch
import torch.nn.functional as F

from defenses.base import DefenseResult
from defenses.inversion import PatternApplier
from utils.training import train

TRIGGERED = 0.2  # fraction of the images that carry the trigger


def trigger_fraction(images: torch.Tensor, add_trigger) -> torch.Tensor:
    """Apply the trigger to the first fifth of (B, 3, H, W) images.

    Batches come in random order: over an epoch, this is a random fifth of the clean split.
    """
    count = round(TRIGGERED * len(images))
    return torch.cat([add_trigger(images[:count]), images[count:]])


def unlearn(context, *, title, make_update=None, inversion_rounds, inversion_steps, inversion_batches, **training):
    """Train a copy of the victim on the clean split, a fifth of it with the inverted trigger, all with true labels.

    Args:
        context: a defenses.base.DefenseContext.
        make_update: student -> the `update` of utils.training.train; None: the usual step.
        training: further arguments of utils.training.train.

    Returns:
        the DefenseResult.

    Raises:
        RunError: no pattern turns the clean images into the target label.
    """
    trigger = context.invert(inversion_rounds, inversion_steps, inversion_batches, training["precision"])
    student = copy.deepcopy(context.victim).requires_grad_(True)
    add_trigger = PatternApplier(context.training_patterns(trigger))

    def loss_of(images, labels):
        return F.cross_entropy(student(trigger_fraction(images, add_trigger)), labels)

    with context.clock("purify"):
        settings = {"title": title, "monitor": context.monitor, **training}
        settings |= {"update": make_update(student)} if make_update else {}
        history = train(student, context.train_batches, loss_of, context.device, **settings)
    return DefenseResult(student.eval(), history, trigger)


def defend(context, **options) -> DefenseResult:
    """`unlearn` for a defenses.base.DefenseContext, with its options and errors."""
    return unlearn(context, title="nc", **options)
