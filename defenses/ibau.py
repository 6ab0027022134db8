"""I-BAU (Zeng et al., ICLR 2022): unlearning as a minimax problem, solved with the implicit hypergradient.

The inner problem finds one perturbation d of all images that changes the model's predictions most. The outer one learns
the true labels of perturbed images, and accounts for how d would respond to the model's change.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from defenses.base import DefenseContext, DefenseResult
from utils.device import autocast
from utils.progress import progress_bar
from utils.training import end_epoch, trained_parameters

INNER_LR, INNER_PENALTY, RADIUS = 10.0, 1e-3, 10.0  # of d: SGD's learning rate, weight of ||d||^2, largest L2 norm
CONTRACTION, ITERATIONS = 0.1, 5  # step of the fixed-point map, terms of the series for its inverse
PERTURBED = 0.01  # fraction of a batch perturbed in the outer step, at least one image, as in the authors' code


def hypergradient(inner_loss, outer_loss, inner, weights, step, iterations) -> list[torch.Tensor]:
    """d outer / d weights, where `inner` is the minimum of the inner loss and moves with the weights (equation 4).

    With the map M(d) = d - step * gradient of inner_loss, whose fixed point is that minimum, the derivative of d is
    (1 - dM/dd)^-1 dM/dw; the inverse is replaced by the first terms of its series (Grazzi et al., ICML 2020).

    Args:
        inner_loss, outer_loss: d -> a scalar, both differentiable in d and in the weights, the former twice.
        inner: d, at the minimum of inner_loss.
        weights: the tensors to differentiate by.
        step: of the map, small enough for a contraction.
        iterations: terms of the series, 1 or more.
    """
    inner = inner.detach().requires_grad_()
    outer = outer_loss(inner)
    inner_gradient, *direct = torch.autograd.grad(outer, [inner, *weights], allow_unused=True)
    mapped = inner - step * torch.autograd.grad(inner_loss(inner), inner, create_graph=True)[0]
    series = inner_gradient
    for _ in range(iterations - 1):
        (term,) = torch.autograd.grad(mapped, inner, series, retain_graph=True)
        series = term + inner_gradient
    indirect = torch.autograd.grad(mapped, weights, series, allow_unused=True)
    return [
        sum((part for part in parts if part is not None), torch.zeros_like(weight))
        for weight, *parts in zip(weights, direct, indirect, strict=True)
    ]


def worst_perturbation(model, batches, device, precision) -> torch.Tensor:
    """d, (3, H, W) of norm up to RADIUS, that moves the model away from its own predictions; one pass."""
    perturbation = torch.zeros(batches.image_shape, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([perturbation], INNER_LR)
    for images, _ in batches:
        with torch.no_grad(), autocast(device, precision):
            predicted = model(images).argmax(1)
        loss = _inner_loss(model, images, predicted, precision, perturbation)
        (perturbation.grad,) = torch.autograd.grad(loss, perturbation)
        optimizer.step()
    perturbation = perturbation.detach()
    return perturbation * (RADIUS / perturbation.norm().clamp(min=RADIUS))


def defend(context: DefenseContext, *, epochs, lr, precision) -> DefenseResult:
    """Unlearn on a copy of the victim, with Adam; batch norm keeps the victim's statistics.

    Args:
        epochs: rounds, each one pass for d and one for the model.
        lr: of Adam.

    Raises:
        RunError: the loss or the weights are not finite.
    """
    student = context.new_student().eval()
    batches, device = context.train_batches, context.device
    weights, history = trained_parameters(student), []
    optimizer, bar = torch.optim.Adam(weights, lr), progress_bar("ibau", epochs * len(batches), "batch")
    # Of the ways to compute attention, only this one has second derivatives.
    with context.clock("purify"), bar, sdpa_kernel(SDPBackend.MATH):
        for epoch in range(1, epochs + 1):
            start, losses = time.perf_counter(), []
            perturbation = worst_perturbation(student, batches, device, precision)
            inner_loss = partial(_inner_loss, student, *next(iter(batches)), precision)
            for images, labels in batches:
                outer_loss = partial(_outer_loss, student, images, labels, precision, losses)
                gradients = hypergradient(inner_loss, outer_loss, perturbation, weights, CONTRACTION, ITERATIONS)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
                bar.update()
            row = {"epoch": epoch, "lr": lr, "loss": sum(losses).item() / len(batches)}
            row["seconds"] = time.perf_counter() - start
            history.append(end_epoch(row, student, student, epochs, "ibau", context.monitor, bar))
    return DefenseResult(student, history)


def _inner_loss(model, images, labels, precision, perturbation):
    """-CE of the perturbed images, and the penalty on the perturbation's norm."""
    with autocast(images.device, precision):
        return INNER_PENALTY * perturbation.square().sum() - F.cross_entropy(model(images + perturbation), labels)


def _outer_loss(model, images, labels, precision, losses, perturbation):
    """CE of the images, the first PERTURBED of them perturbed; it is also noted in `losses`."""
    count = max(1, int(PERTURBED * len(images)))
    with autocast(images.device, precision):
        loss = F.cross_entropy(model(torch.cat([images[:count] + perturbation, images[count:]])), labels)
    losses.append(loss.detach())
    return loss
