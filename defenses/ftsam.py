"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning with sharpness-aware minimisation, which shrinks the large weights that
the neurons of a backdoor have, since the search for the sharpest point goes further along larger weights."""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from defenses.case import Purified
from utils.training import train

SMOOTHING = 0.1  # of the labels


def sharpest_offsets(weights: list[torch.Tensor], gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The offset e that raises the loss most among those of adaptive radius rho, to first order.

    e = rho T^2 g / ||T g||, T = |w|: its norm ||T^-1 e|| is rho (equation 5; Kwon et al., ICML 2021).
    """
    norm = torch.stack([(w.abs() * g).norm() for w, g in zip(weights, gradients, strict=True)]).norm()
    return [rho / (norm + 1e-12) * w.square() * g for w, g in zip(weights, gradients, strict=True)]


@contextmanager
def still_statistics(model):
    """Batch norm's running statistics stay as they are: those of the sharpest point are not the model's."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    yield
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def defend(case, *, rho, **training) -> Purified:
    """Train a copy of the victim on the clean split: each step takes the gradient at the sharpest point nearby.

    Args:
        case: a defenses.case.Case.
        rho: radius of the search for that point, relative to the weights; above 0.
        training: what utils.training.train takes.
    """
    student = copy.deepcopy(case.victim).requires_grad_(True)
    weights = list(student.parameters())

    def update(optimizer, loss_of):
        loss = loss_of()
        here = [weight.detach().clone() for weight in weights]
        offsets = sharpest_offsets(here, torch.autograd.grad(loss, weights), rho)
        with torch.no_grad():
            for weight, offset in zip(weights, offsets, strict=True):
                weight.add_(offset)
        optimizer.zero_grad()
        with still_statistics(student):
            loss_of().backward()
        with torch.no_grad():
            for weight, value in zip(weights, here, strict=True):
                weight.copy_(value)
        optimizer.step()
        return loss.detach()

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels, label_smoothing=SMOOTHING)

    with case.clock("purify"):
        given = {"title": "ftsam", "watch": case.watch, "update": update}
        history = train(student, case.training, loss_of, case.device, **given, **training)
    return Purified(student.eval(), history)
