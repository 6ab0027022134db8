"""I-BAU (Zeng et al., ICLR 2022): unlearning as a minimax, with the implicit hypergradient.

Inside, one perturbation d of all images is found that costs the model its answers most; outside, the model learns the
true labels of images with d on them, and accounts for how d would answer to its change.
"""

import copy
import time

import torch
import torch.nn.functional as F

from defenses.case import Purified
from utils.device import autocast
from utils.report import progress_bar
from utils.training import end_epoch

INNER_LR, INNER_PENALTY, RADIUS = 10.0, 1e-3, 10.0  # of d: SGD's rate, weight of ||d||^2, largest L2 norm
CONTRACTION, ITERATIONS = 0.1, 5  # step of the map whose fixed point is d, terms of the series for its inverse
PERTURBED = 0.01  # share of a batch that gets d in the outer step, one image at least, as in the authors' code


def hypergradient(inner_loss, outer_loss, inner, weights, step, iterations) -> list[torch.Tensor]:
    """d outer / d weights, where `inner` follows the weights as the minimum of the inner loss (equation 4).

    With the map M(d) = d - step * gradient of inner_loss, whose fixed point is that minimum, the derivative of d is
    (1 - dM/dd)^-1 dM/dw; the inverse is the first terms of its series (Grazzi et al., ICML 2020).

    Args:
        inner_loss, outer_loss: d -> a scalar, both differentiable in d and in the weights, the former twice.
        inner: d, at the minimum of inner_loss.
        weights: the tensors to differentiate by.
        step: of the map, small enough that it contracts.
        iterations: terms of the series, 1 or more.
    """
    inner = inner.detach().requires_grad_()
    outer = outer_loss(inner)
    direct, *gradients = torch.autograd.grad(outer, [inner, *weights], allow_unused=True)
    mapped = inner - step * torch.autograd.grad(inner_loss(inner), inner, create_graph=True)[0]
    series = direct
    for _ in range(iterations - 1):
        (passed,) = torch.autograd.grad(mapped, inner, series, retain_graph=True)
        series = passed + direct
    indirect = torch.autograd.grad(mapped, weights, series, allow_unused=True)
    return [
        sum((part for part in pair if part is not None), torch.zeros_like(weight))
        for weight, *pair in zip(weights, gradients, indirect, strict=True)
    ]


def worst_perturbation(model, batches, device, precision) -> torch.Tensor:
    """d, (3, H, W) of norm RADIUS at most, that parts the model's answers from those without it; one pass."""
    shape = next(iter(batches))[0].shape[1:]
    perturbation = torch.zeros(shape, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([perturbation], INNER_LR)
    for images, _ in batches:
        with autocast(device, precision):
            with torch.no_grad():
                answers = model(images).argmax(1)
            loss = _inner(model, images, answers, perturbation)
        (perturbation.grad,) = torch.autograd.grad(loss, perturbation)
        optimizer.step()
    perturbation = perturbation.detach()
    return perturbation * (RADIUS / perturbation.norm().clamp(min=RADIUS))


def defend(case, *, epochs, lr, precision) -> Purified:
    """Unlearn on a copy of the victim, with Adam; batch norm keeps the victim's statistics.

    Args:
        case: a defenses.case.Case.
        epochs: rounds, each a pass for d and a pass for the model.
        lr: of Adam.

    Raises:
        RunError: the loss or the weights are no longer finite.
    """
    student, batches, device = copy.deepcopy(case.victim).requires_grad_(True).eval(), case.training, case.device
    weights, history = list(student.parameters()), []
    optimizer = torch.optim.Adam(weights, lr)
    with case.clock("purify"), progress_bar("ibau", epochs * len(batches), "batch") as bar:
        for epoch in range(1, epochs + 1):
            start, total = time.perf_counter(), torch.zeros((), device=device)
            perturbation = worst_perturbation(student, batches, device, precision)
            first = next(iter(batches))
            for images, labels in batches:
                losses = []

                def outer_loss(d, images=images, labels=labels, losses=losses):
                    count = max(1, int(PERTURBED * len(images)))
                    with autocast(device, precision):
                        logits = student(torch.cat([images[:count] + d, images[count:]]))
                        losses.append(F.cross_entropy(logits, labels))
                    return losses[-1]

                def inner_loss(d, images=first[0], labels=first[1]):
                    with autocast(device, precision):
                        return _inner(student, images, labels, d)

                found = hypergradient(inner_loss, outer_loss, perturbation, weights, CONTRACTION, ITERATIONS)
                for weight, gradient in zip(weights, found, strict=True):
                    weight.grad = gradient
                optimizer.step()
                total += losses[-1].detach()
                bar.update()
            row = {"epoch": epoch, "lr": lr, "loss": total.item() / len(batches)}
            row["seconds"] = time.perf_counter() - start
            history.append(end_epoch(row, student, student, epochs, "ibau", case.watch, bar))
    return Purified(student, history)


def _inner(model, images, labels, perturbation):
    """-CE of what the model says of perturbed images, and the penalty on the perturbation's norm."""
    return INNER_PENALTY * perturbation.square().sum() - F.cross_entropy(model(images + perturbation), labels)
