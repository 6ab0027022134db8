"""Fine-tuning, NAD, NC, FT-SAM and FST by hand, and what every defense does to a victim."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches, assert_weights, sgd_step_by_hand, state_vector

import config
from defenses import DEFENSE_FUNCTIONS, fst, ft, ftsam, nad, nc, pam
from defenses.inversion import PatternApplier
from defenses.purify import run_defense
from models import select_model
from utils.seed import generator

SGD = {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "schedule": "drop", "precision": "fp32"}
FINETUNING = {"finetune_epochs": 1, "finetune_lr": 0.01}
INVERSION = {"inversion_rounds": 1, "inversion_steps": 1, "inversion_batches": 1}
CONTRAST = {"positive": "finetuned", "contrast": "others", "temperature": 0.5, "align_weight": 1.0, "ema": 0.5}
CONTRAST |= {"calibration": "bias", "rounds": 1}
RECIPES = {
    "mcl": SGD | FINETUNING | INVERSION | CONTRAST,
    "ft": SGD,
    "nad": SGD | FINETUNING,
    "ibau": {"epochs": 2, "lr": 0.01, "precision": "fp32"},
    "nc": SGD | INVERSION,
    "ftsam": SGD | {"rho": 2.0},
    "fst": SGD | {"alpha": 0.2},
    "pam": SGD | INVERSION | {"rho": 0.5},
}
ONE_STEP = {"epochs": 1, "lr": 0.05, "momentum": 0.0, "schedule": "cosine"}


def cross_entropy(logits, labels):
    """-log p(label), averaged; by hand."""
    return -(logits.exp()[range(len(labels)), labels] / logits.exp().sum(1)).log().mean()


def student_of(victim):
    """A copy of the victim to take one step by hand with, in training mode."""
    return copy.deepcopy(victim).requires_grad_(True).train()


def run_one_step(name, make_context, batch, **changes):
    """The result of a defense after one step of plain SGD on one batch."""
    context = make_context(train_batches=FixedBatches([batch]))
    return DEFENSE_FUNCTIONS[name](context, **{**RECIPES[name], **ONE_STEP, **changes})


def check_step(result, student, loss):
    """Compare the result of run_one_step with one step of `student` on `loss`."""
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_weights(result.student, sgd_step_by_hand(student, loss, ONE_STEP["lr"]))


def test_finetuning_by_hand(make_context, victim, batches):
    images, labels = batches[0]
    student = student_of(victim)
    check_step(run_one_step("ft", make_context, batches[0]), student, cross_entropy(student(images), labels))


def test_nad_by_hand(make_context, victim, batches):
    images, labels = batches[0]
    finetuning = {"epochs": 1, "lr": FINETUNING["finetune_lr"], "momentum": 0.0, "schedule": "cosine"}
    teacher, _ = ft.finetune(victim, batches[:1], CPU, title="", **{**SGD, **finetuning})
    student = student_of(victim)
    teacher_maps, (student_maps, logits) = teacher.maps_and_logits(images)[0], student.maps_and_logits(images)
    loss = cross_entropy(logits, labels)
    for weight, *pair in zip((500, 1000, 1000), student_maps, teacher_maps, strict=True):
        attention = [(maps**2).sum(1) for maps in pair]
        student_map, teacher_map = (a / ((a**2).sum((1, 2), keepdim=True).sqrt() + 1e-6) for a in attention)
        loss = loss + weight * ((student_map - teacher_map.detach()) ** 2).mean()
    check_step(run_one_step("nad", make_context, batches[0]), student, loss)


def test_nc_by_hand(make_context, victim, trigger, batches):
    images, labels = batches[0]
    triggered = images.clone()
    triggered[:2, :, 6:, 6:] = 1  # a fifth of eight
    student = student_of(victim)
    check_step(run_one_step("nc", make_context, batches[0]), student, cross_entropy(student(triggered), labels))


def test_ftsam_by_hand(make_context, victim, batches):
    images, labels = batches[0]
    student = student_of(victim)

    def smoothed_loss(model):
        log_p = model(images).log_softmax(1)
        return 0.9 * -log_p[range(8), labels].mean() - 0.1 * log_p.mean()

    loss = smoothed_loss(student)
    weights = list(student.parameters())
    gradients = torch.autograd.grad(loss, weights)
    scaled = [(weight.abs() * gradient).flatten() for weight, gradient in zip(weights, gradients, strict=True)]
    sharpest = copy.deepcopy(student)
    with torch.no_grad():
        for weight, gradient in zip(sharpest.parameters(), gradients, strict=True):
            weight += 0.5 * weight**2 * gradient / torch.cat(scaled).norm()
    sharpest_gradients = torch.autograd.grad(smoothed_loss(sharpest), list(sharpest.parameters()))
    expected = {
        name: weight.detach() - ONE_STEP["lr"] * gradient
        for (name, weight), gradient in zip(student.named_parameters(), sharpest_gradients, strict=True)
    }
    result = run_one_step("ftsam", make_context, batches[0], rho=0.5)
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_weights(result.student, expected)


def test_both_passes_of_pam_see_the_same_triggered_images(make_context, trigger, monkeypatch):
    seen, others = [], torch.rand(5, 3, 8, 8)
    monkeypatch.setattr("defenses.base.shifted_patterns", lambda *_: torch.cat([trigger.patterns, others]))
    monkeypatch.setattr(nc, "trigger_some", lambda images, add_trigger: seen.append(add_trigger.patterns) or images)
    DEFENSE_FUNCTIONS["pam"](make_context(), **{**RECIPES["pam"], "epochs": 2})
    assert len(seen) == 6  # three batches twice


def test_pam_by_hand(make_context, victim, batches, trigger):
    images, labels = batches[0]
    triggered = torch.cat([trigger.apply(images[0])[None], trigger.apply(images[1])[None], images[2:]])
    first = student_of(victim)  # at the victim itself the first step is a plain one
    moved = sgd_step_by_hand(first, cross_entropy(first(triggered), labels), ONE_STEP["lr"])
    way = {name: weight - moved[name] for name, weight in victim.named_parameters()}
    distance = torch.cat([part.flatten() for part in way.values()]).norm()
    between = student_of(victim)
    with torch.no_grad():
        for name, weight in between.named_parameters():
            weight.copy_(moved[name] + 0.25 * way[name])
    loss = cross_entropy(between(triggered), labels)
    gradients = torch.autograd.grad(loss, list(between.parameters()))
    settings = {**RECIPES["pam"], **ONE_STEP, "schedule": "constant", "rho": 0.25 * distance.item()}
    context = make_context(train_batches=[batches[0]] * 2, augmented=False)
    result = DEFENSE_FUNCTIONS["pam"](context, **settings)
    expected = {
        name: weight - ONE_STEP["lr"] * gradient
        for (name, weight), gradient in zip(moved.items(), gradients, strict=True)
    }
    assert_weights(result.student, expected)
    first.load_state_dict({**first.state_dict(), **moved})  # its statistics are of one pass at the victim's weights
    first(triggered)
    for name, statistic in first.state_dict().items():
        if "running" in name:
            assert torch.allclose(result.student.state_dict()[name], statistic, atol=1e-6)


def test_the_way_to_a_nearer_victim_is_walked_to_its_end():
    weights, victim_weights = [torch.zeros(2), torch.zeros(1)], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    for rho, length in ((1.0, 1.0), (10.0, 5.0)):
        offsets = torch.cat(pam.path_offsets(weights, victim_weights, rho))
        assert torch.allclose(offsets, length * torch.tensor([0.6, 0.0, 0.8]))
    assert torch.cat(pam.path_offsets(weights, weights, 0.5)).tolist() == [0.0] * 3


def test_fst_by_hand(make_context, victim, batches):
    images, labels = batches[0]
    student, rng, bound = student_of(victim), generator(0, "fst"), 64**-0.5
    with torch.no_grad():
        student.head.weight.copy_(bound * (2 * torch.rand(3, 64, generator=rng) - 1))
        student.head.bias.copy_(bound * (2 * torch.rand(3, generator=rng) - 1))
        student.head.weight.mul_(victim.head.weight.norm() / student.head.weight.norm())
    product = (student.head.weight * victim.head.weight).sum()
    loss = cross_entropy(student(images), labels) + 5 * product
    expected = sgd_step_by_hand(student, loss, ONE_STEP["lr"])
    for name, weight in expected.items():
        if weight.shape == (3, 64):
            expected[name] = weight * victim.head.weight.norm() / weight.norm()
    result = run_one_step("fst", make_context, batches[0], alpha=5.0)
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_weights(result.student, expected)


def test_attention_map_by_hand():
    feature = torch.tensor([[[[1.0, 0.0]], [[-1.0, 2.0]]]])  # two channels of one row: squares add up to 2 and 4
    assert nad.attention_map(feature).tolist() == [[pytest.approx([2 / 20**0.5, 4 / 20**0.5])]]
    assert nad.attention_map(torch.zeros(1, 2, 3, 3)).abs().sum() == 0


def test_attention_loss_by_hand():
    one, other = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])  # maps (1, 0) and (0, 1)
    loss = nad.attention_loss([one, one, other], [one, other, one])
    assert loss.item() == pytest.approx(1000 * 1 + 1000 * 1, rel=1e-4)
    assert nad.attention_loss([other, one, one], [one, one, one]).item() == pytest.approx(500, rel=1e-4)


def test_sharpest_offset_has_its_radius_and_the_steepest_direction():
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


def test_ftsam_leaves_batch_norm_with_the_statistics_of_the_unperturbed_weights(make_context, victim, batches):
    student = run_one_step("ftsam", make_context, batches[0]).student
    finetuned = run_one_step("ft", make_context, batches[0]).student
    statistics = [name for name in student.state_dict() if "running" in name]
    assert len(statistics) > 5
    assert all(torch.equal(student.state_dict()[name], finetuned.state_dict()[name]) for name in statistics)


def test_nc_triggers_a_fifth_of_a_batch():
    pattern = torch.zeros(1, 3, 4, 4)
    pattern[..., 3, 3] = 1
    images = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    triggered = nc.trigger_some(images, PatternApplier(pattern))
    assert (triggered[:2, :, 3, 3] == 1).all()
    assert torch.equal(triggered[2:], images[2:])


def test_fst_keeps_the_norm_of_the_last_layer_and_leaves_its_direction(make_context, victim):
    student = run("fst", make_context, epochs=5).student
    weight, victim_weight = student.head.weight, victim.head.weight
    assert weight.norm().item() == pytest.approx(victim_weight.norm().item(), rel=1e-5)
    assert F.cosine_similarity(weight.flatten(), victim_weight.flatten(), dim=0) < 0.2
    torch.manual_seed(1)
    head = torch.nn.Linear(400, 50)
    fst.reinit_head(head, torch.Generator().manual_seed(0))
    assert head.weight.abs().max().item() == pytest.approx(1 / 20, rel=0.01)
    assert abs(head.weight.mean().item()) < 0.001


@pytest.mark.parametrize("arch", ["WRN-10-1", "ResNet18", "PreActResNet18"])
def test_feature_maps_are_of_the_pass_that_gives_the_logits(arch):
    model = select_model(arch, 3).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    maps, logits = model.maps_and_logits(images)
    assert torch.equal(logits, model(images))
    assert [feature.shape[2] for feature in maps] == ([16, 8, 4] if arch == "WRN-10-1" else [8, 4, 2])
    assert math.isfinite(nad.attention_loss(maps, [2 * feature for feature in maps]).item())


def run(name, make_context, seed=0, monitor=None, **changes):
    context = make_context(seed=seed, monitor=monitor)
    result = DEFENSE_FUNCTIONS[name](context, **{**RECIPES[name], **changes})
    assert {"purify"} <= set(context.clock.seconds) <= {"finetune", "inversion", "purify"}
    return result


@pytest.mark.parametrize("name", DEFENSE_FUNCTIONS)
def test_every_defense_is_reproducible_and_leaves_the_victim_alone(name, make_context, victim):
    before = state_vector(victim)
    (student, history, _), (repeated, _, _) = (run(name, make_context) for _ in range(2))
    assert torch.equal(state_vector(victim), before)
    assert all(parameter.grad is None for parameter in victim.parameters())
    assert not torch.equal(state_vector(student), before)
    assert torch.equal(state_vector(student), state_vector(repeated))
    assert not (student.training or victim.training)
    assert [row["epoch"] for row in history] == [1, 2]
    assert all({"lr", "loss", "seconds"} <= set(row) for row in history)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nad", {"epochs": 1}),
        ("nad", {"finetune_epochs": 2}),
        ("ibau", {"lr": 0.001}),
        ("ibau", {"epochs": 1}),
        ("ftsam", {"rho": 0.5}),
        ("pam", {"rho": 0.01}),
        ("fst", {"alpha": 0.0}),
        ("fst", {"seed": 1}),
    ],
)
def test_every_setting_changes_the_student(name, change, make_context):
    default, changed = (run(name, make_context, **settings).student for settings in ({}, change))
    assert not torch.equal(state_vector(default), state_vector(changed))


@pytest.mark.parametrize("name", DEFENSE_FUNCTIONS)
def test_monitored_metrics_are_in_the_history(name, make_context):
    result = run(name, make_context, monitor=lambda model, epoch: {"acc": float(epoch)})
    assert [row["acc"] for row in result.history] == [1.0, 2.0]


def test_the_statistics_of_a_slow_batch_normalisation_follow_within_ten_steps(make_context, victim, batches):
    layers = [module for module in victim.modules() if isinstance(module, torch.nn.BatchNorm2d)][:3]
    for layer, momentum in zip(layers, (0.01, 0.3, None), strict=True):
        layer.momentum = momentum
    before = [layer.running_mean.clone() for layer in layers]
    student = run_defense("ft", make_context(), {**config.DEFENSES["ft"], "epochs": 1}).student
    assert [layer.momentum for layer in layers] == [0.1, 0.3, None]
    assert [layer.running_mean.equal(mean) for layer, mean in zip(layers, before, strict=True)] == [True] * 3
    trained = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert trained[0].momentum == 0.1
