"""Fine-tuning: the baseline of every other defense (the recipe is that of NAD's authors, Li et al., ICLR 2021)."""

import copy

import torch.nn.functional as F

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


def make_teacher(victim, batches, device, **training):
    """The fine-tuned victim, frozen: NAD's teacher."""
    return finetune(victim, batches, device, title="teacher", **training)[0].requires_grad_(False)
