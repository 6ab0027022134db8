"""Fine-tuning: the baseline of every other defense (the recipe is that of NAD's authors, Li et al., ICLR 2021)."""

import copy

import torch.nn.functional as F

from defenses.case import Purified
from utils.training import train


def finetune(victim, batches, device, *, title="ft", **training):
    """Train a copy of the victim on the clean split with its labels, and nothing else.

    Args:
        victim: f_B, frozen.
        batches: (images (B, 3, H, W) in [0, 1], labels (B,)) of the clean split.
        training: what utils.training.train takes.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)
    history = train(
        student,
        batches,
        lambda images, labels: F.cross_entropy(student(images), labels),
        device,
        title=title,
        **training,
    )
    return student.eval(), history


def defend(case, **training) -> Purified:
    """`finetune` for a defenses.case.Case."""
    with case.clock("purify"):
        return Purified(*finetune(case.victim, case.training, case.device, watch=case.watch, **training))
