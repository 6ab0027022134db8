"""Feature Shift Tuning (FST, Min et al., NeurIPS 2023): a new last layer, kept away from the victim's, makes the
features that it reads move as well."""

import copy

import torch
import torch.nn.functional as F

from defenses.case import Purified
from utils.seed import generator
from utils.training import descend, train


def draw_head(head, rng: torch.Generator) -> None:
    """Draw weights and bias of a linear layer anew, from U(-1/sqrt(D), 1/sqrt(D)), as torch does for a fresh one."""
    bound = head.in_features**-0.5
    with torch.no_grad():
        for part in (head.weight, head.bias):
            part.copy_((2 * torch.rand(part.shape, generator=rng) - 1) * bound)


def defend(case, *, alpha, **training) -> Purified:
    """Train a copy of the victim with a fresh last layer w: CE + alpha <w, w_victim>, with ||w|| = ||w_victim||
    (equation 2).

    Args:
        case: a defenses.case.Case.
        alpha: weight of the product of the two last layers' weights; published: 0.1 to 0.2, which where ||w_victim||^2
            is large (a WRN-16-1 of the MCL paper: 334) outweighs the labels.
        training: what utils.training.train takes.
    """
    student = copy.deepcopy(case.victim).requires_grad_(True)
    draw_head(student.head, generator(case.seed, "fst"))
    weight, original = student.head.weight, case.victim.head.weight

    def scale_back():
        with torch.no_grad():
            weight.mul_(original.norm() / weight.norm())

    def update(optimizer, loss_of):
        loss = descend(optimizer, loss_of)
        scale_back()
        return loss

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels) + alpha * (weight * original).sum()

    scale_back()
    with case.clock("purify"):
        given = {"title": "fst", "watch": case.watch, "update": update}
        history = train(student, case.training, loss_of, case.device, **given, **training)
    return Purified(student.eval(), history)
