"""Neural Attention Distillation (NAD, Li et al., ICLR 2021): the student learns a fine-tuned teacher's attention."""

import torch
import torch.nn.functional as F

from defenses.base import DefenseContext, DefenseResult
from utils.training import finetune

WEIGHTS = (500.0, 1000.0, 1000.0)  # b_l, of the outputs at the last three resolutions


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

    The student learns the labels and the teacher's attention: CE + attention_loss.

    Args:
        sgd: arguments of utils.training.train that both steps share.

    Raises:
        UserError: the network has fewer than three resolutions.
    """
    victim, batches, device = context.victim, context.train_batches, context.device
    victim.maps_and_logits(torch.zeros(1, *batches.image_shape, device=device))
    with context.clock("finetune"):
        settings = {"title": "teacher", "epochs": finetune_epochs, "lr": finetune_lr, **sgd}
        teacher, _ = finetune(victim, batches, device, **settings)
    teacher.requires_grad_(False)
    student = context.new_student()

    def loss_of(images, labels):
        with torch.no_grad():
            teacher_maps, _ = teacher.maps_and_logits(images)
        student_maps, logits = student.maps_and_logits(images)
        return F.cross_entropy(logits, labels) + attention_loss(student_maps, teacher_maps)

    return context.fit(student, loss_of, title="nad", epochs=epochs, lr=lr, **sgd)
