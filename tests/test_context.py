"""What a DefenseContext hands to the inversion, what that passes on, and how its result is measured."""

from dataclasses import replace

import pytest
import torch
from conftest import state_vector
from test_defenses import ONE_STEP, RECIPES

from defenses import nc
from defenses.base import REMAINING_ROUNDS
from defenses.inversion import ANY_OTHER, InvertedTrigger, apply_patterns
from defenses.inversion import invert as invert_module
from defenses.inversion.invert import noise_around
from utils.seed import generator

CPU = torch.device("cpu")


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


def test_a_warp_is_tried_after_a_large_patch_from_the_same_generator(victim, batches, trigger, monkeypatch):
    patches, warps = [], []
    monkeypatch.setattr(invert_module, "invert_trigger", lambda *args: patches.append(args) or trigger)
    monkeypatch.setattr(invert_module, "invert_warp", lambda *args: warps.append(args) or trigger)
    assert invert_module.find_trigger(victim, batches, 1, CPU, 3, 4, 5, 6, "bf16") is trigger  # 4 of 64 pixels
    rng = patches[0][4]
    assert rng.initial_seed() == generator(3, "inversion").initial_seed()
    assert patches == [(victim, batches, 1, CPU, rng, 4, 5, 6, "bf16")]
    assert warps == [(victim, batches, 1, CPU, rng, 5, 6, "bf16")]
    monkeypatch.setattr(invert_module, "MAX_PATCH", 4 / 64)
    monkeypatch.setattr(invert_module, "find_parts", lambda *_: [])
    invert_module.find_trigger(victim, batches, 1, CPU, 3, 4, 5, 6, "bf16")
    assert len(warps) == 1


def test_a_round_starts_from_the_pattern_with_noise_of_its_own_for_each_sign():
    pattern = torch.zeros(3, 16, 16)
    pattern[:, 8, 8] = -0.9
    start = noise_around(pattern, generator(1, "noise"))
    noise = 0.5 * torch.rand(2, 3, 16, 16, generator=generator(1, "noise"))
    near = torch.zeros(16, 16, dtype=torch.bool)
    near[6:11, 6:11] = True
    assert (start[:, :, ~near] < 0).all()
    expected = noise.clone()
    expected[1, :, 8, 8] = 0.9
    assert torch.equal(start[:, :, near], expected[:, :, near])


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
