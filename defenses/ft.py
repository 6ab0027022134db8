"""Fine-tuning: the baseline of every other defense (recipe of NAD's authors, Li et al., ICLR 2021)."""

import copy

import torch.nn.functional as F

from defenses.base import DefenseContext, DefenseResult
from utils.training import train


def finetune(victim, batches, device, *, title="ft", **training):
    """Train a copy of the victim on the labels of the clean split.

    Args:
        victim: f_B, frozen.
        batches: (images (B, 3, H, W) in [0, 1], labels (B,)) of the clean split.
        training: arguments of utils.training.train.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels)

    history = train(student, batches, loss_of, device, title=title, **training)
    return student.eval(), history


def defend(context: DefenseContext, **training) -> DefenseResult:
    """`finetune` the victim of a context."""
    with context.clock("purify"):
        settings = {"monitor": context.monitor, **training}
        return DefenseResult(*finetune(context.victim, context.train_batches, context.device, **settings))
