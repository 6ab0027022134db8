"""I-BAU: its hypergradient, its perturbation, and one batch by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches, assert_weights

from defenses import ibau


def test_hypergradient_is_exact_on_a_quadratic():
    rng = torch.Generator().manual_seed(0)
    root, coupling = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((4, 4), (4, 3)))
    curvature = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    weights = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(4, generator=rng, dtype=torch.float64)

    def inner_loss(d):
        return d @ curvature @ d / 2 - d @ coupling @ weights

    def outer_loss(d):
        return (d - goal).square().sum() / 2 + weights.square().sum() / 2

    minimum = torch.linalg.solve(curvature, coupling @ weights.detach())
    exact = weights.detach() + coupling.T @ torch.linalg.solve(curvature, minimum - goal)
    step = 1 / torch.linalg.eigvalsh(curvature).max().item()
    (gradient,) = ibau.hypergradient(inner_loss, outer_loss, minimum, [weights], step, 400)
    assert torch.allclose(gradient, exact, atol=1e-8)
    # One term of the series leaves out the inverse: step * coupling replaces its product with the inverse.
    (gradient,) = ibau.hypergradient(inner_loss, outer_loss, minimum, [weights], step, 1)
    assert torch.allclose(gradient, weights.detach() + step * coupling.T @ (minimum - goal), atol=1e-12)


def test_perturbation_raises_the_loss_within_its_radius(victim, batches):
    perturbation = ibau.worst_perturbation(victim, batches, CPU, "fp32")
    assert 0 < perturbation.norm().item() <= ibau.RADIUS * (1 + 1e-5)

    def loss(d):
        return sum(F.cross_entropy(victim(x + d), victim(x).argmax(1)).item() for x, _ in batches)

    assert loss(perturbation) > loss(torch.zeros_like(perturbation))


def test_perturbation_is_projected_onto_its_radius(batches):
    direction = torch.randn(3 * 8 * 8, generator=torch.Generator().manual_seed(0))

    def model(images):
        logit = 0.1 * images.flatten(1) @ direction + 100
        return torch.stack([logit, torch.zeros_like(logit) + 100], 1)

    perturbation = ibau.worst_perturbation(model, batches, CPU, "fp32")
    assert perturbation.norm().item() == pytest.approx(ibau.RADIUS, rel=1e-5)


def test_one_batch_by_hand(make_context, victim, batches):
    images, labels = batches[0]
    victim.head.weight.mul_(10)  # sensitive to the perturbation
    student = copy.deepcopy(victim).requires_grad_(True).eval()

    def inner_loss(d, labels=labels):
        return 1e-3 * (d**2).sum() - F.cross_entropy(student(images + d), labels)

    start = torch.zeros(3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(inner_loss(start, student(images).argmax(1)), start)
    perturbation = -10 * gradient
    assert perturbation.norm() < 10

    def outer_loss(d):
        return F.cross_entropy(student(torch.cat([images[:1] + d, images[1:]])), labels)  # 1 %, at least one image

    names, weights = zip(*student.named_parameters(), strict=True)
    gradients = ibau.hypergradient(inner_loss, outer_loss, perturbation, weights, 0.1, 5)
    result = ibau.defend(make_context(train_batches=FixedBatches(batches[:1])), epochs=1, lr=0.01, precision="fp32")
    loss = outer_loss(perturbation).item()
    assert abs(loss - outer_loss(0).item()) > 1e-3
    assert result.history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    # Adam's first step
    expected = {n: w.detach() - 0.01 * g / (g.abs() + 1e-8) for n, w, g in zip(names, weights, gradients, strict=True)}
    assert_weights(result.student, expected, atol=2e-4)  # rounding shows where g is almost 0


def test_a_share_of_each_batch_is_perturbed_and_the_inner_loss_is_of_the_first(make_context, victim, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    drawn = [(torch.rand(n, 3, 8, 8, generator=rng), torch.randint(3, (n,), generator=rng)) for n in (250, 40)]
    batches = FixedBatches(drawn)
    inner, perturbed, forward = [], [], type(victim).forward

    def gradients(inner_loss, outer_loss, perturbation, weights, *_):
        inner.append(inner_loss.args[1])
        outer_loss(torch.full((3, 8, 8), 2.0))
        return [torch.zeros_like(weight) for weight in weights]

    def counting(self, images):
        perturbed.append(int((images.amax((1, 2, 3)) > 1.5).sum()))
        return forward(self, images)

    monkeypatch.setattr(ibau, "hypergradient", gradients)
    monkeypatch.setattr(ibau, "worst_perturbation", lambda *_: torch.zeros(3, 8, 8))
    monkeypatch.setattr(type(victim), "forward", counting)
    ibau.defend(make_context(train_batches=batches), epochs=1, lr=0.01, precision="fp32")
    assert [images is batches[0][0] for images in inner] == [True, True]
    assert perturbed == [2, 1]  # a hundredth, at least one
