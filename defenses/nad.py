"""Neural Attention Distillation (NAD, Li et al., ICLR 2021): the student learns a fine-tuned teacher's attention."""

import copy

import torch
import torch.nn.functional as F

from defenses.base import DefenseContext, DefenseResult
from utils.training import finetune, train

WEIGHTS = (500.0, 1000.0, 1000.0)  # b_l, of the outputs of the last three groups of blocks


def attention_map(feature: torch.Tensor) -> torch.Tensor:
    """A = sum over channels of |F|^2, divided by its L2 norm + 1e-6 (section 3.2): (B, C, h, w) -> (B, h, w)."""
    attention = feature.square().sum(1)
    return attention / (attention.flatten(1).norm(dim=1)[:, None, None] + 1e-6)


def attention_loss(student_maps: list[torch.Tensor], teacher_maps: list[torch.Tensor]) -> torch.Tensor:
    """Sum over l of b_l times the mean squared difference of the attention maps of two lists of (B, C, h, w)."""
    pairs = zip(WEIGHTS, student_maps, teacher_maps, strict=True)
    return sum(
        weight * F.mse_loss(attention_map(student), attention_map(teacher)) for weight, student, teacher in pairs
    )


def defend(context: DefenseContext, *, finetune_epochs, finetune_lr, epochs, lr, **sgd) -> DefenseResult:
    """The paper's two steps: fine-tune the victim into a teacher, then distill its attention into the student.

    Args:
        sgd: arguments of utils.training.train that both steps share.

    Raises:
        UserError: the network has fewer than three resolutions.
    """
    context.victim.maps_and_logits(torch.zeros(1, *context.train_batches.image_shape, device=context.device))
    data = context.victim, context.train_batches, context.device
    with context.clock("finetune"):
        teacher, _ = finetune(*data, title="teacher", epochs=finetune_epochs, lr=finetune_lr, **sgd)
    with context.clock("purify"):
        teacher.requires_grad_(False)
        settings = {"monitor": context.monitor, "epochs": epochs, "lr": lr, **sgd}
        return DefenseResult(*distill(*data, teacher=teacher, **settings))


def distill(victim, batches, device, *, teacher, **training):
    """Train a copy of the victim on the labels and the teacher's attention: CE + attention_loss.

    Args:
        victim: f_B, frozen.
        batches: (images (B, 3, H, W) in [0, 1], labels (B,)) of the clean split.
        teacher: the fine-tuned victim, frozen, in eval mode.
        training: arguments of utils.training.train.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        with torch.no_grad():
            teacher_maps, _ = teacher.maps_and_logits(images)
        student_maps, logits = student.maps_and_logits(images)
        return F.cross_entropy(logits, labels) + attention_loss(student_maps, teacher_maps)

    history = train(student, batches, loss_of, device, title="nad", **training)
    return student.eval(), history
