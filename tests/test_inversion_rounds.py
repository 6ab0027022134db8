"""The rounds of an inversion, and the forms that are tried in turn."""

import pytest
import torch
from conftest import CPU
from test_inversion import NOISE, STRIPES, ConstantModel, RedPixelVictim, ShiftedStripesVictim, WaveVictim, label_zero

from defenses import DefenseContext
from defenses.inversion import InvertedTrigger
from defenses.inversion import invert as invert_module
from defenses.inversion.invert import noise_around
from utils.errors import RunError
from utils.progress import Stopwatch
from utils.seed import generator


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


def test_a_large_pattern_is_the_last_resort(victim, batches, monkeypatch):
    large = InvertedTrigger(torch.ones(3, 8, 8), 1.0)
    monkeypatch.setattr(invert_module, "invert_trigger", lambda *_: large)
    monkeypatch.setattr(invert_module, "invert_warp", lambda *_: None)
    monkeypatch.setattr(invert_module, "find_waves", lambda *_: None)
    assert invert_module.find_trigger(victim, batches, 1, CPU, 3, 4, 5, 6, "fp32") is large
    assert large.parts == []


def test_noise_starts_near_the_pattern_only():
    pattern = torch.zeros(3, 9, 9)
    pattern[0, 1, 1], pattern[2, 1, 1] = 0.9, -0.8
    p, q = noise_around(pattern, torch.Generator().manual_seed(0))
    assert (p[0, 1, 1], q[2, 1, 1]) == (pattern[0, 1, 1], -pattern[2, 1, 1])
    assert (p[:, :4, :4] >= 0).all()
    assert (p[:, :4, :4] > 0).sum() >= 47
    assert (p[:, 4:] < 0).all()
    assert (q[:, :, 4:] < 0).all()


@pytest.mark.parametrize(
    ("victim", "images", "description"),
    [
        (RedPixelVictim, NOISE, "px, L1"),
        (ShiftedStripesVictim, STRIPES, "warp by"),
        (WaveVictim, torch.full_like(NOISE, 0.5), "waves"),
        (ConstantModel, NOISE, None),
    ],
)
def test_the_first_form_that_fits_is_inverted(victim, images, description, monkeypatch, capsys):
    monkeypatch.setattr(invert_module, "MAX_PATCH", 0.1 if victim is RedPixelVictim else 0.0)
    context = DefenseContext(victim(), [], label_zero(images), False, 4, CPU, 1, Stopwatch(), 1)
    if description is None:
        with pytest.raises(RunError, match="no pattern turns 90% of the clean images into label 1"):
            context.invert(1, 30, 2, "fp32")
        return
    trigger = context.invert(1, 30, 2, "fp32")
    assert set(context.clock.seconds) == {"inversion"}
    assert description in trigger.describe()
    assert f"inverted trigger: {trigger.describe()}" in capsys.readouterr().out
    row = {"pattern": trigger.describe(), "hit_rate": 100 * trigger.hit_rate, "with_parts": None}
    assert trigger.metadata() == row
