"""Unlearning the inverted trigger (Neural Cleanse, Wang et al., S&P 2019, section VI-C).

The inverted pattern is that of defenses.inversion, as for MCL, so that a comparison of the two is one of what they do
with it; the schedule is fine-tuning's, so that a comparison with that is one of the stamp.
"""

import copy
import itertools

import torch
import torch.nn.functional as F

from defenses.case import Purified
from defenses.forms import stamp
from defenses.inversion import find_trigger
from utils.training import train

STAMPED = 0.2  # share of the images that get the trigger


def stamp_share(images: torch.Tensor, trigger, turn=0) -> torch.Tensor:
    """Put the trigger on the first fifth of (B, 3, H, W) images, and leave the others as they are.

    Batches come in random order, so that these are a random fifth of the split, another one each epoch.
    """
    count = round(STAMPED * len(images))
    return torch.cat([stamp(images[:count], trigger.patterns, turn), images[count:]])


def defend(case, *, inversion_rounds, inversion_steps, inversion_batches, **training) -> Purified:
    """Train a copy of the victim on images of which a fifth have the inverted trigger, all with their true labels.

    Args:
        case: a defenses.case.Case.
        training: what utils.training.train takes.

    Raises:
        RunError: no pattern makes the victim say the target.
    """
    trigger = find_trigger(case, inversion_rounds, inversion_steps, inversion_batches, training["precision"])
    student = copy.deepcopy(case.victim).requires_grad_(True)

    turns = itertools.count()

    def loss_of(images, labels):
        return F.cross_entropy(student(stamp_share(images, trigger, next(turns))), labels)

    with case.clock("purify"):
        history = train(student, case.training, loss_of, case.device, title="nc", watch=case.watch, **training)
    return Purified(student.eval(), history, trigger)
