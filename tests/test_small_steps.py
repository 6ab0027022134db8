"""Small steps of the defenses whose change nothing else notices: limits, budgets, the terms of a sum."""

import copy
import dataclasses

import pytest
import torch
from conftest import FixedBatches
from test_inversion import label_zero
from test_last_layer import FixedFeatures
from test_mcl import ONE_STEP, RECIPE, run_training
from test_target_search import SMALL
from test_training import Scalar, run

from defenses import DefenseContext, ibau, mcl
from defenses.inversion import ANY_OTHER, InvertedTrigger, apply_patterns, choose_label, shifted_patterns
from defenses.inversion import invert as invert_module
from defenses.inversion.patterns import PixelForm, mirror
from defenses.inversion.scores import LabelScore
from defenses.inversion.target_search import search_waves
from defenses.last_layer import make_blind
from utils.seed import generator
from utils.training import OPTIMIZERS, SCHEDULES

CPU = torch.device("cpu")


def test_a_student_is_inverted_with_the_budget_of_its_victim(make_context, monkeypatch):
    given = []
    monkeypatch.setattr(DefenseContext, "remaining_trigger", lambda *args: given.append(args[3:]))
    budget = {"inversion_rounds": 4, "inversion_steps": 5, "inversion_batches": 6, "precision": "bf16"}
    mcl.defend(make_context(augmented=False), **{**RECIPE, **ONE_STEP, **budget, "rounds": 2})
    assert given == [(5, 6, "bf16")]


def test_the_published_loss_of_a_batch_by_hand(victim, trigger, batches):
    images, _ = batches[0]
    _, history = run_training(victim, trigger, batches[:1], epochs=1, align_weight=0.0)
    student, triggered = copy.deepcopy(victim).train(), apply_patterns(images, trigger.patterns)
    z, z_positive, z_negative = student.features(triggered), victim.features(images), victim.features(triggered)
    near, far = (torch.cosine_similarity(z, other).div(0.5).exp() for other in (z_positive, z_negative))
    assert history[0]["loss"] == pytest.approx(-(near / (near + far)).log().mean().item(), rel=1e-5)


def test_force_defends_against_the_pixel_pattern_with_the_lowest_index():
    scores = [
        LabelScore(label, form, 90.0, 0.95, index, 1.0, 0.03)
        for label, form, index in (
            (0, "pixels", -0.5),
            (1, "pixels", -1.5),
            (2, "pixels", 0.5),
            (ANY_OTHER, "pixels", -1.9),
            (3, "warp", -1.8),
        )
    ]
    assert choose_label(scores, True)[0] == 1


def test_a_large_pattern_is_the_last_resort(victim, batches, monkeypatch):
    large = InvertedTrigger(torch.ones(3, 8, 8), 1.0)
    monkeypatch.setattr(invert_module, "invert_trigger", lambda *_: large)
    monkeypatch.setattr(invert_module, "invert_warp", lambda *_: None)
    monkeypatch.setattr(invert_module, "find_waves", lambda *_: None)
    assert invert_module.find_trigger(victim, batches, 1, CPU, 3, 4, 5, 6, "fp32") is large
    assert large.parts == []


@pytest.mark.parametrize(("lost", "blind"), [(2, True), (3, False)])
def test_a_blind_layer_may_cost_half_of_the_target_class(lost, blind):
    weight = [[0.0, 1.0, 0.0], [2.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    own = [[1.0, 0.5, 0.0]] * lost + [[0.0, 0.5, 1.0]] * (4 - lost)
    features = torch.tensor(own + [[0.0, 1.0, 0.0]] * 196)
    labels = torch.tensor([1] * 4 + [0] * 196)
    assert make_blind(FixedFeatures(weight), torch.eye(3)[:1], [(features[:, :, None, None], labels)], 1) is blind


def test_weight_decay_is_added_to_the_gradient():
    model = Scalar()
    model.weight.data.fill_(2.0)
    run(model, [(torch.tensor(1.0), None)], weight_decay=0.25)
    assert model.weight.item() == pytest.approx(2 - 0.1 * (1 + 0.25 * 2))


def test_the_momentum_stays_what_it_is():
    optimizer = OPTIMIZERS["sgd"]([torch.zeros(1, requires_grad=True)], 0.1, 0.9, 0.0)
    for schedule in SCHEDULES:
        SCHEDULES[schedule](optimizer, 0.1, 10)
        assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("sizes", "count"),
    [([5, 4, 4, 4], 4), ([5, 5, 4, 4, 4], 5), ([5, None, None], 3), ([None], 1), ([5, 4, 3, 2, 1, 1], 6)],
)
def test_two_rounds_without_a_smaller_pattern_end_the_inversion(sizes, count, victim, batches, monkeypatch):
    made, around, noise = [], [], invert_module.noise_around

    def optimise(*_):
        size, pattern = [*sizes, *[9] * 9][len(made)], torch.zeros(3, 64)
        pattern[:, : size or 0] = 1
        made.append(size and InvertedTrigger(pattern.view(3, 8, 8).roll(len(made), 1), 1.0))
        return made[-1]

    def record(pattern, rng):
        around.append(pattern)
        return noise(pattern, rng)

    monkeypatch.setattr(invert_module, "optimise_pattern", optimise)
    monkeypatch.setattr(invert_module, "noise_around", record)
    best = invert_module.invert_trigger(victim, batches, 1, CPU, generator(0, ""), 6, 1, 1)
    assert len(made) == count
    assert (best and best.pixels) == min(filter(None, sizes), default=None)
    assert all(torch.equal(near, (found or made[0]).pattern) for near, found in zip(around, made, strict=False))


def test_the_mirror_image_of_a_warp_reads_from_the_other_side():
    warp = 0.2 * torch.randn(2, 6, 6, generator=generator(0, "warp"))

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    found = shifted_patterns(Always(), InvertedTrigger(warp, 1.0), label_zero(torch.zeros(2, 3, 6, 6)), 1)
    assert len(found) == 50
    assert any(torch.equal(pattern, mirror(warp)) for pattern in found)


def test_of_many_labels_waves_of_the_best_are_scored():
    class Wave(torch.nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 14)
            logits[:, 0], logits[:, 12] = 0.05, torch.fft.fft(x.mean((1, 2))).abs()[:, 2] / 8
            return logits

    images = torch.full((60, 3, 16, 16), 0.5)
    scores = search_waves(Wave(), FixedBatches([(images, torch.zeros(60, dtype=torch.int64))]), 14)
    assert len(scores) == 10
    assert {score.label: score.hit_rate for score in scores}[12] == 1


@pytest.mark.parametrize(("form", "limit"), [("pixels", 0.015), ("warp", 0.02)])
def test_the_limit_of_each_form(form, limit):
    for of_range, flagged in ((limit, True), (limit + 0.001, False)):
        assert dataclasses.replace(SMALL, form=form, of_range=of_range).flagged is flagged


def test_changes_below_one_grey_level_are_dropped_and_no_others():
    parameters = torch.zeros(1, 2, 1, 1, 2)
    parameters[0, 0, 0, 0] = torch.tensor([0.99 / 255, 1.01 / 255])
    assert (PixelForm((1, 1, 2)).quantised(parameters) != 0).flatten().tolist() == [False, True]


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
