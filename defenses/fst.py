"""Feature Shift Tuning (FST, Min et al., NeurIPS 2023).

The last layer is re-initialised and kept away from the victim's, which forces the features to move as well.
"""

import torch
import torch.nn.functional as F

from defenses.base import DefenseContext, DefenseResult
from utils.errors import UserError
from utils.seed import generator
from utils.training import sgd_step


def reinit_head(head, rng: torch.Generator) -> None:
    """Draw weight and biases of a linear layer from U(-1/sqrt(D), 1/sqrt(D)), torch's own initialisation."""
    bound = head.in_features**-0.5
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=rng) - 1) * bound)


def defend(context: DefenseContext, *, alpha, **training) -> DefenseResult:
    """Train a copy of the victim with a new last layer w: CE + alpha <w, w_victim>, ||w|| = ||w_victim|| (equation 2).

    Args:
        alpha: weight of the inner product of the two last layers; published: 0.1 to 0.2, which outweighs the labels if
            ||w_victim||^2 is large (334 for the WRN-16-1 of the MCL paper).
        training: arguments of utils.training.train.

    Raises:
        UserError: the last layer's weight is computed from other parameters.
    """
    student = context.new_student()
    if not isinstance(student.head.weight, torch.nn.Parameter):
        raise UserError("fst redraws the last layer's weight, which this network computes from other parameters")
    reinit_head(student.head, generator(context.seed, "fst"))
    weight, victim_weight = student.head.weight, context.victim.head.weight

    def project_norm():
        with torch.no_grad():
            weight.mul_(victim_weight.norm() / weight.norm())

    def update(optimizer, loss_of):
        loss = sgd_step(optimizer, loss_of)
        project_norm()
        return loss

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels) + alpha * (weight * victim_weight).sum()

    project_norm()
    return context.fit(student, loss_of, title="fst", update=update, **training)
