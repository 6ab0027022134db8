"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning with sharpness-aware minimisation.

It shrinks the large weights of backdoor neurons, because the adaptive perturbation is larger along larger weights.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from defenses.base import DefenseContext, DefenseResult
from utils.training import trained_parameters

LABEL_SMOOTHING = 0.1


def sharpest_offsets(weights: list[torch.Tensor], gradients: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """The offset e of adaptive radius rho that raises the loss most, to first order.

    e = rho T^2 g / ||T g||, T = |w|: its norm ||T^-1 e|| is rho (equation 5; Kwon et al., ICML 2021).
    """
    norm = get_total_norm([w.abs() * g for w, g in zip(weights, gradients, strict=True)])
    return [rho / (norm + 1e-12) * w.square() * g for w, g in zip(weights, gradients, strict=True)]


@contextmanager
def frozen_bn_stats(model):
    """Keep batch norm's running statistics: those of the perturbed weights are not the model's."""
    momenta = {layer: layer.momentum for layer in model.modules() if isinstance(layer, _BatchNorm)}
    for layer in momenta:
        layer.momentum = 0.0
    yield
    for layer, momentum in momenta.items():
        layer.momentum = momentum


def step_at_offsets(model, offsets: list[torch.Tensor], optimizer, loss_of) -> torch.Tensor:
    """Take an optimizer step with the gradient of loss_of() at the weights plus the offsets; returns that loss.

    Args:
        offsets: one for each trained parameter of the model.
    """
    weights = trained_parameters(model)
    original = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, offset in zip(weights, offsets, strict=True):
            weight.add_(offset)
    optimizer.zero_grad()
    with frozen_bn_stats(model):
        loss = loss_of()
        loss.backward()
    with torch.no_grad():
        for weight, value in zip(weights, original, strict=True):
            weight.copy_(value)
    optimizer.step()
    return loss.detach()


def defend(context: DefenseContext, *, rho, **training) -> DefenseResult:
    """Train a copy of the victim on the clean split; each step takes the gradient at the sharpest point nearby.

    Args:
        rho: radius of the search for that point, relative to the weights; above 0.
        training: arguments of utils.training.train.
    """
    student = context.new_student()
    weights = trained_parameters(student)

    def update(optimizer, loss_of):
        loss = loss_of()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            offsets = sharpest_offsets(weights, gradients, rho)
        step_at_offsets(student, offsets, optimizer, loss_of)
        return loss.detach()

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels, label_smoothing=LABEL_SMOOTHING)

    return context.fit(student, loss_of, title="ftsam", update=update, **training)
