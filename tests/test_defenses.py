"""The other defenses: their formulas against direct computations, and what each does to a victim."""

import math

import pytest
import torch
from conftest import weights
from torch.nn import functional as F

from defenses import DEFENSES, Case, fst, ft, ftsam, ibau, mcl, nad, nc
from defenses.inversion import Trigger
from models import select_model
from utils.report import Stopwatch

CPU = torch.device("cpu")
SGD = {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "schedule": "drop", "precision": "fp32"}


def test_attention_map_by_hand():
    feature = torch.tensor([[[[1.0, 0.0]], [[-1.0, 2.0]]]])  # two channels of one row: squares add up to 2 and 4
    assert nad.attention_map(feature).tolist() == [[pytest.approx([2 / 20**0.5, 4 / 20**0.5])]]
    assert nad.attention_map(torch.zeros(1, 2, 3, 3)).abs().sum() == 0


def test_attention_loss_by_hand():
    one, other = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])  # maps (1, 0) and (0, 1)
    loss = nad.attention_loss([one, one, other], [one, other, one])
    assert loss.item() == pytest.approx(1000 * 1 + 1000 * 1, rel=1e-4)
    assert nad.attention_loss([other, one, one], [one, one, one]).item() == pytest.approx(500, rel=1e-4)


def test_the_implicit_hypergradient_is_the_exact_one_on_a_quadratic():
    rng = torch.Generator().manual_seed(0)
    root, coupling = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((4, 4), (4, 3)))
    curvature = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
    weights = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(4, generator=rng, dtype=torch.float64)

    def inner_loss(d):
        return d @ curvature @ d / 2 - d @ coupling @ weights

    def outer_loss(d):
        return (d - wanted).square().sum() / 2 + weights.square().sum() / 2

    lowest = torch.linalg.solve(curvature, coupling @ weights.detach())
    exact = weights.detach() + coupling.T @ torch.linalg.solve(curvature, lowest - wanted)
    step = 1 / torch.linalg.eigvalsh(curvature).max().item()
    (found,) = ibau.hypergradient(inner_loss, outer_loss, lowest, [weights], step, 400)
    assert torch.allclose(found, exact, atol=1e-8)
    # One term of the series leaves out the inverse: v = g, so that step * coupling takes the place of its product.
    (first,) = ibau.hypergradient(inner_loss, outer_loss, lowest, [weights], step, 1)
    assert torch.allclose(first, weights.detach() + step * coupling.T @ (lowest - wanted), atol=1e-12)


def test_the_offset_to_the_sharpest_point_has_its_radius_and_the_steepest_direction():
    rng = torch.Generator().manual_seed(0)
    weights, gradients = ([torch.randn(shape, generator=rng) for shape in ((3, 2), (5,))] for _ in range(2))
    offsets = ftsam.sharpest_offsets(weights, gradients, 2.0)

    def relative(parts):
        return torch.cat([(part / weight).flatten() for part, weight in zip(parts, weights, strict=True)])

    assert relative(offsets).norm().item() == pytest.approx(2.0)
    rise = sum((o * g).sum() for o, g in zip(offsets, gradients, strict=True))
    for _ in range(20):
        other = [w * torch.randn(w.shape, generator=rng) for w in weights]
        other = [o * 2 / relative(other).norm() for o in other]
        assert sum((o * g).sum() for o, g in zip(other, gradients, strict=True)) < rise


def test_a_fifth_of_a_batch_is_stamped():
    pattern = torch.zeros(3, 4, 4)
    pattern[:, 3, 3] = 1
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stamped = nc.stamp_share(images, Trigger(pattern, 1.0))
    assert (stamped[:2, :, 3, 3] == 1).all()
    assert torch.equal(stamped[2:], images[2:])


def defended(name, victim, batches, **changes):
    pattern = torch.zeros(3, 8, 8)
    pattern[:, 6:, 6:] = 1
    seed, watch = changes.pop("seed", 0), changes.pop("watch", None)
    case = Case(victim, batches, batches, True, CPU, seed, Stopwatch(), 1, watch)
    teacher = {"finetune_epochs": 1, "finetune_lr": 0.01}
    budget = {"inversion_rounds": 1, "inversion_steps": 1, "inversion_batches": 1}
    contrast = {"positive": "finetuned", "contrast": "others", "temperature": 0.5, "align_weight": 1.0, "ema": 0.5}
    own = {
        "mcl": SGD | teacher | budget | contrast,
        "nad": SGD | teacher,
        "nc": SGD | budget,
        "ibau": {"epochs": 2, "lr": 0.01, "precision": "fp32"},
        "ftsam": SGD | {"rho": 2.0},
        "fst": SGD | {"alpha": 0.2},
    }.get(name, SGD)
    with pytest.MonkeyPatch.context() as patch:  # a victim that was never trained has no trigger to find
        for module in (mcl, nc):
            patch.setattr(module, "find_trigger", lambda *_: Trigger(pattern, 1.0))
        purified = DEFENSES[name](case, **{**own, **changes})
    assert {"purify"} <= set(case.clock.seconds) <= {"finetune", "purify"}
    return purified.student, purified.history


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_changes_a_student_the_same_way_each_time_and_leaves_the_victim_alone(name, victim, batches):
    before = weights(victim)
    (student, history), (again, _) = (defended(name, victim, batches) for _ in range(2))
    assert torch.equal(weights(victim), before)
    assert all(parameter.grad is None for parameter in victim.parameters())
    assert not torch.equal(weights(student), before)
    assert torch.equal(weights(student), weights(again))
    assert not (student.training or victim.training)
    assert [row["epoch"] for row in history] == [1, 2]
    assert all({"lr", "loss", "seconds"} <= set(row) for row in history)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mcl", {"positive": "backdoored"}),
        ("mcl", {"contrast": "all"}),
        ("nad", {"epochs": 1}),
        ("nad", {"finetune_epochs": 2}),
        ("ibau", {"lr": 0.001}),
        ("ibau", {"epochs": 1}),
        ("ftsam", {"rho": 0.5}),
        ("fst", {"alpha": 0.0}),
        ("fst", {"seed": 1}),
    ],
)
def test_every_setting_changes_the_student(name, change, victim, batches):
    usual, other = (defended(name, victim, batches, **settings)[0] for settings in ({}, change))
    assert not torch.equal(weights(usual), weights(other))


def test_what_is_watched_is_in_the_history_of_i_bau_too(victim, batches):
    _, history = defended("ibau", victim, batches, watch=lambda model, epoch: {"acc": float(epoch)})
    assert [row["acc"] for row in history] == [1.0, 2.0]


def test_the_teacher_of_nad_moves_the_student(victim, batches):
    teacher, _ = ft.finetune(victim, batches, CPU, **SGD)
    alone, taught = (nad.distill(victim, batches, CPU, teacher=shown, **SGD)[0] for shown in (victim, teacher))
    assert not torch.equal(weights(alone), weights(taught))


def test_the_new_last_layer_of_fst_keeps_the_norm_and_leaves_the_direction(victim, batches):
    student, _ = defended("fst", victim, batches, epochs=5)
    own, original = student.head.weight, victim.head.weight
    assert own.norm().item() == pytest.approx(original.norm().item(), rel=1e-5)
    assert F.cosine_similarity(own.flatten(), original.flatten(), dim=0) < 0.2
    torch.manual_seed(1)
    head = torch.nn.Linear(400, 50)
    fst.draw_head(head, torch.Generator().manual_seed(0))
    assert head.weight.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert abs(head.weight.mean().item()) < 0.001


def test_the_perturbation_of_i_bau_costs_the_model_its_answers_within_its_radius(victim, batches):
    found = ibau.worst_perturbation(victim, batches, CPU, "fp32")
    assert 0 < found.norm().item() <= ibau.RADIUS * (1 + 1e-5)

    def loss(d):
        return sum(F.cross_entropy(victim(x + d), victim(x).argmax(1)).item() for x, _ in batches)

    assert loss(found) > loss(torch.zeros_like(found))


def test_sharpness_leaves_batch_norm_at_the_statistics_of_the_model_itself(victim, batches):
    batches = batches[:1]
    student, _ = defended("ftsam", victim, batches, epochs=1)
    plain, _ = ft.finetune(victim, batches, CPU, **{**SGD, "epochs": 1})
    statistics = [name for name in student.state_dict() if "running" in name]
    assert len(statistics) > 5
    assert all(torch.equal(student.state_dict()[name], plain.state_dict()[name]) for name in statistics)


@pytest.mark.parametrize("arch", ["WRN-10-1", "ResNet18", "PreActResNet18"])
def test_maps_are_of_the_pass_that_makes_the_logits(arch):
    model = select_model(arch, 3).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps, logits = model.maps_and_logits(images)
    assert torch.equal(logits, model(images))
    assert [found.shape[2] for found in maps] == ([16, 8, 4] if arch == "WRN-10-1" else [8, 4, 2])
    assert math.isfinite(nad.attention_loss(maps, [2 * found for found in maps]).item())
