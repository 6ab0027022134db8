"""Unlearning the inverted trigger (Neural Cleanse, Wang et al., S&P 2019, section VI-C).

The inverted trigger is MCL's, with its shifts and mirror images, so that a comparison of the two compares what they do
with it.
"""

import torch
import torch.nn.functional as F

from defenses.base import DefenseResult
from defenses.inversion import PatternApplier
from utils.training import sgd_step

TRIGGERED = 0.2  # fraction of the images that carry the trigger


def trigger_some(images: torch.Tensor, add_trigger) -> torch.Tensor:
    """Apply the trigger to the first TRIGGERED of (B, 3, H, W) images.

    Batches come in random order: over an epoch, these are random images of the clean split.
    """
    count = max(1, round(TRIGGERED * len(images)))
    return torch.cat([add_trigger(images[:count]), images[count:]])


def unlearn(
    context, *, make_update=lambda student: sgd_step, inversion_rounds, inversion_steps, inversion_batches, **training
) -> DefenseResult:
    """Train a copy of the victim on the clean split, a fifth of it with the inverted trigger, all with true labels.

    Args:
        context: a defenses.base.DefenseContext.
        make_update: student -> the `update` of utils.training.train.
        training: further arguments of utils.training.train.

    Raises:
        RunError: no pattern turns the clean images into the target label.
    """
    trigger = context.invert(inversion_rounds, inversion_steps, inversion_batches, training["precision"])
    student, add_trigger = context.new_student(), PatternApplier(context.training_patterns(trigger))

    given = triggered = None

    def loss_of(images, labels):
        nonlocal given, triggered
        if images is not given:  # PAM passes each batch twice
            given, triggered = images, trigger_some(images, add_trigger)
        return F.cross_entropy(student(triggered), labels)

    return context.fit(student, loss_of, update=make_update(student), **training)._replace(trigger=trigger)


def defend(context, **options) -> DefenseResult:
    """`unlearn` for a defenses.base.DefenseContext, with its options and errors."""
    return unlearn(context, title="nc", **options)
