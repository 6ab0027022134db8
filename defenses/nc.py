"""Unlearning the inverted trigger (Neural Cleanse, Wang et al., S&P 2019, section VI-C).

The inverted pattern is that of defenses.inversion, as for MCL, so that a comparison of the two is one of what they do
with it; the schedule is fine-tuning's, so that a comparison with that is one of the stamp.
"""

import copy

import torch
import torch.nn.functional as F

from defenses.inversion import stamp
from utils.training import train

STAMPED = 0.2  # share of the images that get the trigger


def stamp_share(images: torch.Tensor, trigger) -> torch.Tensor:
    """Put the trigger on the first fifth of (B, 3, H, W) images, and leave the others as they are.

    Batches come in random order, so that these are a random fifth of the split, another one each epoch.
    """
    count = round(STAMPED * len(images))
    return torch.cat([stamp(images[:count], trigger.pattern[None]), images[count:]])


def unlearn(victim, batches, device, *, trigger, **training):
    """Train a copy of the victim on images of which a fifth have the trigger, all with their true labels.

    Args:
        victim: f_B, frozen.
        batches: (images (B, 3, H, W) in [0, 1], labels (B,)) of the clean split.
        trigger: the inverted one (defenses.inversion.Trigger).
        training: what utils.training.train takes.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        return F.cross_entropy(student(stamp_share(images, trigger)), labels)

    history = train(student, batches, loss_of, device, title="nc", **training)
    return student.eval(), history
