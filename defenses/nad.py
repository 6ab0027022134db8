"""Neural Attention Distillation (NAD, Li et al., ICLR 2021): a fine-tuned teacher shows the student where to look."""

import copy

import torch
import torch.nn.functional as F

from defenses.case import Purified
from defenses.ft import finetune
from utils.training import train

WEIGHTS = (500.0, 1000.0, 1000.0)  # b_l, of the outputs of the last three groups of blocks


def attention_map(feature: torch.Tensor) -> torch.Tensor:
    """A = sum over channels of |F|^2, divided by its L2 norm + 1e-6 (section 3.2): (B, C, h, w) -> (B, h, w)."""
    attention = feature.square().sum(1)
    return attention / (attention.flatten(1).norm(dim=1)[:, None, None] + 1e-6)


def attention_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Sum over l of b_l times the mean squared difference of the attention maps of two lists of (B, C, h, w)."""
    pairs = zip(WEIGHTS, student, teacher, strict=True)
    return sum(weight * F.mse_loss(attention_map(own), attention_map(shown)) for weight, own, shown in pairs)


def defend(case, *, finetune_epochs, finetune_lr, epochs, lr, **sgd) -> Purified:
    """The paper's two steps: the teacher is the victim, fine-tuned, and the student learns its attention."""
    given = case.victim, case.training, case.device
    with case.clock("finetune"):
        teacher, _ = finetune(*given, title="teacher", epochs=finetune_epochs, lr=finetune_lr, **sgd)
    with case.clock("purify"):
        teacher.requires_grad_(False)
        return Purified(*distill(*given, teacher=teacher, watch=case.watch, epochs=epochs, lr=lr, **sgd))


def distill(victim, batches, device, *, teacher, **training):
    """Train a copy of the victim with its labels and the teacher's attention: CE + attention_loss.

    Args:
        victim: f_B, frozen.
        batches: (images (B, 3, H, W) in [0, 1], labels (B,)) of the clean split.
        teacher: the victim after fine-tuning, frozen, in eval mode.
        training: what utils.training.train takes.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        with torch.no_grad():
            shown, _ = teacher.maps_and_logits(images)
        own, logits = student.maps_and_logits(images)
        return F.cross_entropy(logits, labels) + attention_loss(own, shown)

    history = train(student, batches, loss_of, device, title="nad", **training)
    return student.eval(), history
