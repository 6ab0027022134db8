"""What a DefenseContext hands to the inversion, what that passes on, and how its result is measured."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches, state_vector
from test_defenses import ONE_STEP, RECIPES
from torch import nn

from defenses import DefenseContext, is_purified, mcl, nc
from defenses.base import REMAINING_ROUNDS
from defenses.inversion import ANY_OTHER, InvertedTrigger, apply_patterns
from utils.seed import generator


def test_nc_inverts_with_its_own_budget_and_returns_the_trigger(make_context, batches, trigger, monkeypatch):
    given = []
    monkeypatch.setattr("defenses.base.find_trigger", lambda *args: given.append(args) or trigger)
    budget = {"inversion_rounds": 2, "inversion_steps": 3, "inversion_batches": 4, "precision": "bf16"}
    context = make_context()
    assert nc.defend(context, **{**RECIPES["nc"], **ONE_STEP, **budget}).trigger is trigger
    assert given == [(context.victim, batches, 1, CPU, 0, 2, 3, 4, "bf16")]


@pytest.mark.parametrize("augmented", [False, True])
def test_a_student_sees_each_part_of_the_trigger_where_the_augmentation_may_move_it(
    make_context, trigger, augmented, monkeypatch
):
    monkeypatch.setattr("defenses.base.shifted_patterns", lambda _, part, *__: torch.stack([part.pattern] * 2))
    parts = [trigger.pattern.flip(1), trigger.pattern.flip(2)]
    patterns = make_context(augmented=augmented).training_patterns(replace(trigger, parts=parts))
    expected = [part for part in [trigger.pattern, *parts] for _ in range(1 + augmented)]
    assert torch.equal(patterns, torch.stack(expected))


@pytest.mark.parametrize("is_warp", [False, True])
def test_a_student_is_inverted_like_its_victim(make_context, victim, batches, trigger, is_warp, monkeypatch):
    given, warp = [], InvertedTrigger(torch.full((2, 8, 8), 0.1), 1.0)
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *args: given.append(("pixels", *args)))
    monkeypatch.setattr("defenses.base.invert_warp", lambda *args: given.append(("warp", *args)) or warp)
    known = warp if is_warp else trigger
    assert make_context(seed=3, target=2).remaining_trigger(victim, known, 5, 6, "bf16") is (warp if is_warp else None)
    ((form, student, inverted_on, label, device, rng, *budget),) = given
    assert torch.equal(state_vector(student), state_vector(victim))
    assert (inverted_on, label, device) == (batches, 2, CPU)
    assert [form, *budget] == (["warp", 5, 6, "bf16"] if is_warp else ["pixels", REMAINING_ROUNDS, 5, 6, "bf16"])
    assert rng.initial_seed() == generator(3, "remaining").initial_seed()


def test_the_rate_of_a_trigger_is_that_of_the_images_of_other_labels(victim, batches, trigger):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    predicted, triggered = (victim(x).argmax(1) for x in (images, apply_patterns(images, trigger.patterns)))
    for target in range(3):
        hits = (triggered == target)[labels != target]
        assert trigger.rate_on(victim, batches, target) == hits.double().mean().item()
    is_right = predicted == labels
    expected = (triggered != labels)[is_right].double().mean().item()
    assert trigger.rate_on(victim, batches, ANY_OTHER) == expected
    assert trigger.rate_on(victim, [], 1) == 0


def test_the_change_of_an_image_is_the_pattern_or_what_the_warp_moves():
    image = torch.arange(64.0).view(1, 8, 8).expand(3, 8, 8) / 64
    pattern, warp = torch.full((3, 8, 8), -0.1), torch.zeros(2, 8, 8)
    warp[1] = 1.0
    assert torch.equal(InvertedTrigger(pattern, 1.0).change(image), pattern)
    moved = InvertedTrigger(warp, 1.0)
    assert torch.allclose(moved.change(image), apply_patterns(image[None], warp[None])[0] - image)
    assert moved.change(image).abs().max() > 0.01


class Erring(nn.Module):
    """Reads the label from a pixel, and predicts 1 where another pixel has at least `threshold`."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        triggered = x[:, 0, -1, -1] >= self.threshold
        return F.one_hot(torch.where(triggered, 1, x[:, 0, 0, 0].round().long()), 2).float()


@pytest.mark.parametrize(("threshold", "expected"), [(2.0, True), (1.0, False)])
def test_errors_that_need_no_trigger_do_not_count_as_the_backdoor(threshold, expected):
    images, pattern = torch.zeros(20, 3, 4, 4), torch.zeros(3, 4, 4)
    images[:6, 0, 0, 0], pattern[0, -1, -1] = 1.0, 1.0  # 6 of 20 images of label 0 are taken for label 1 anyway
    batches, trigger = FixedBatches([(images, torch.zeros(20, dtype=torch.int64))]), InvertedTrigger(pattern, 1.0)
    assert trigger.excess_on(Erring(threshold), Erring(1.0), batches, 1) == pytest.approx(0.0 if expected else 0.7)
    assert is_purified(Erring(threshold), Erring(1.0), {1: trigger}, batches) is expected
    assert is_purified(Erring(threshold), Erring(1.0), {}, batches) is None
    always = Erring(-1.0)  # predicts 1 for every image, with the trigger or without
    assert is_purified(always, Erring(1.0), {1: trigger}, batches) is False


def test_a_student_is_inverted_with_the_budget_of_its_victim(make_context, monkeypatch):
    given = []
    monkeypatch.setattr(DefenseContext, "remaining_trigger", lambda *args: given.append(args[3:]))
    budget = {"inversion_rounds": 4, "inversion_steps": 5, "inversion_batches": 6, "precision": "bf16"}
    mcl.defend(make_context(augmented=False), **{**RECIPES["mcl"], **ONE_STEP, **budget, "rounds": 2})
    assert given == [(5, 6, "bf16")]


@pytest.mark.parametrize(("image_count", "per_step"), [(2_500, 3), (64, 3), (63, 6), (10, 21)])
def test_a_step_has_as_many_images_of_a_small_clean_set(make_context, trigger, image_count, per_step, monkeypatch):
    given = []
    monkeypatch.setattr("defenses.base.find_trigger", lambda *args: given.append(args[7]) or trigger)
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *args: given.append(args[7]))
    context = make_context(image_count=image_count)
    context.invert(1, 2, 3, "fp32")
    context.remaining_trigger(context.victim, trigger, 2, 3, "fp32")
    assert given == [per_step] * 2


def test_the_shifts_of_a_trigger_count_as_inversion(make_context, trigger):
    context = make_context()
    context.training_patterns(trigger)
    assert context.clock.seconds.keys() == {"inversion"}
