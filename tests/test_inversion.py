"""Trigger inversion: planted backdoors are found, whatever their form, and none is invented."""

import math

import pytest
import torch
from conftest import CPU, FixedBatches, RecordingForm

from defenses.inversion import ANY_OTHER, InvertedTrigger, apply_patterns, shifted_patterns
from defenses.inversion import invert as invert_module
from defenses.inversion.invert import find_waves, invert_trigger, invert_warp, optimise_pattern
from defenses.inversion.patterns import PixelForm
from defenses.inversion.target_search import search_form


class RedPixelVictim(torch.nn.Module):
    """Predicts 1 if the first pixel is red without green, else 0."""

    def forward(self, x):
        logit = 20 * (x[:, 0, 0, 0] - x[:, 1, 0, 0] - 0.5)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


class ConstantModel(torch.nn.Module):
    """Predicts 0 for every image."""

    def forward(self, x):
        zero = x.sum((1, 2, 3)) * 0
        return torch.stack([zero + 1, zero], dim=1)


class ShiftedStripesVictim(torch.nn.Module):
    """Predicts 1 if vertical stripes, four pixels apart, were shifted to the left."""

    def forward(self, x):
        logit = 40 * (x[:, :, :, 1::4].mean((1, 2, 3)) - x[:, :, :, 3::4].mean((1, 2, 3)) - 0.1)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


class WaveVictim(torch.nn.Module):
    """Predicts 1 if brightness has waves of three cycles over the width."""

    def forward(self, x):
        spectrum = torch.fft.rfft(x.mean(1), norm="forward").mean(1).abs()
        return torch.stack([torch.full_like(spectrum[:, 3], 0.05), spectrum[:, 3]], dim=1)


class RedColumnsVictim(torch.nn.Module):
    """Predicts 1 if a pixel in an even row and one of `columns` is red; ignores everything else."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, x):
        red = x[:, 0, ::2, self.columns].amax((1, 2))
        return torch.stack([torch.full_like(red, 0.5), red], dim=1)


NOISE = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
STRIPES = (0.5 - 0.4 * torch.cos(torch.arange(16.0) * math.pi / 2)).expand(8, 3, 16, 16).contiguous()
GREY = torch.full((4, 3, 16, 16), 0.5)


def label_zero(images):
    """One batch of the images, all of label 0."""
    return FixedBatches([(images, torch.zeros(len(images), dtype=torch.int64))])


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 3, 6, 6, generator=rng), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]


def invert(victim, batches, target=1, **settings):
    rng = torch.Generator().manual_seed(1)
    settings = {"rounds": 1, "steps": 50, "batches_per_step": 4, **settings}
    return invert_trigger(victim, FixedBatches(batches), target, CPU, rng, **settings)


def test_a_trigger_counts_its_pixels_and_stays_in_range():
    pattern = torch.zeros(3, 2, 2)
    pattern[0, 0, 0], pattern[2, 0, 0], pattern[1, 1, 1] = 0.5, -0.25, 1.0
    trigger = InvertedTrigger(pattern, 1.0)
    assert (trigger.pixels, trigger.l1) == (2, 1.75)
    triggered = trigger.apply(torch.full((3, 2, 2), 0.75))
    assert triggered[0, 0, 0] == 1.0
    assert triggered[2, 0, 0] == 0.5
    assert triggered[1, 0, 1] == 0.75
    assert torch.equal(apply_patterns(torch.full((1, 3, 2, 2), 0.75), trigger.pattern[None])[0], triggered)


def test_the_planted_pixel_is_found_and_little_else(batches):
    trigger = invert(RedPixelVictim(), batches)
    assert trigger.hit_rate >= 0.9
    assert trigger.pixels <= 3
    assert trigger.pattern[0, 0, 0] > 0.3 or trigger.pattern[1, 0, 0] < -0.3
    predicted = torch.cat([RedPixelVictim()(apply_patterns(x, trigger.pattern[None])).argmax(1) for x, _ in batches])
    assert (predicted == 1).float().mean() >= 0.9


def test_an_untargeted_pattern_is_found(batches):
    trigger = invert(RedPixelVictim(), batches, ANY_OTHER)
    predicted = torch.cat([RedPixelVictim()(apply_patterns(x, trigger.patterns)).argmax(1) for x, _ in batches])
    assert (predicted != 0).float().mean() >= 0.9
    assert trigger.pixels <= 3


def test_without_a_pattern_that_works_there_is_no_trigger(batches):
    assert invert(ConstantModel(), batches) is None


def test_images_of_the_target_class_are_left_out(batches):
    with_target = [(torch.cat([x, x]), torch.cat([y, y + 1])) for x, y in batches]
    alone, mixed = invert(RedPixelVictim(), batches), invert(RedPixelVictim(), with_target)
    assert torch.equal(alone.pattern, mixed.pattern)


@pytest.mark.parametrize(("victim", "factor"), [(RedPixelVictim, 1.5), (ConstantModel, 1.5**-1.5)])
def test_the_penalty_weight_rises_with_hits_and_falls_without(batches, victim, factor):
    form, start = RecordingForm((3, 6, 6)), torch.ones(1, 2, 3, 6, 6)
    start[:, 0, 1], start[:, 1, 0] = -1, -1  # all red and no green, which RedPixelVictim responds to
    optimise_pattern(victim(), iter(batches * 5), 1, form, start, 0.01, 20, 1, "fp32")
    weights = [weight for (weight,) in form.weights]
    assert weights[:5] == pytest.approx([0.01 * factor**n for n in (0, 0, 1, 1, 2)])  # patience: a tenth of 20


def test_a_batch_is_several_updates_and_a_step_is_judged_on_all_of_its_images():
    images = torch.zeros(40, 3, 6, 6)
    images[:16, 1] = 1.0  # the first part stays green, whatever red is added
    form, start = RecordingForm((3, 6, 6)), torch.full((1, 2, 3, 6, 6), -1.0)
    start[:, 0, 0, 0, 0] = 1.0
    found = optimise_pattern(RedPixelVictim(), iter(label_zero(images) * 4), 1, form, start, 0.0, 2, 2, "fp32")
    assert len(form.parameters) == 2 * 2 * 3  # of each batch, 16, 16 and 8
    assert found is None  # 24 of 40 are turned


def test_a_small_warp_is_found():
    rng = torch.Generator().manual_seed(1)
    trigger = invert_warp(ShiftedStripesVictim(), label_zero(STRIPES), 1, CPU, rng, 60, 1)
    assert ShiftedStripesVictim()(apply_patterns(STRIPES, trigger.patterns)).argmax(1).all()
    assert trigger.pattern[0].mean() > 3 * trigger.pattern[1].abs().mean()  # read from the right: shifted to the left
    assert trigger.describe().startswith("warp by 0.")


def test_a_large_warp_is_no_trigger(monkeypatch):
    monkeypatch.setattr(invert_module, "MAX_WARP", 0.002)
    rng = torch.Generator().manual_seed(1)
    assert invert_warp(ShiftedStripesVictim(), label_zero(STRIPES), 1, CPU, rng, 60, 1) is None


def test_the_waves_that_a_victim_responds_to_are_found():
    trigger = find_waves(WaveVictim(), [(GREY, torch.tensor([0, 0, 0, 1]))], 1)
    assert trigger.hit_rate == 1
    assert trigger.describe() == "best of 4 waves"  # of as many phases
    for pattern in trigger.patterns:
        assert pattern.abs().amax() <= 1 / 8 + 1e-6
        assert torch.fft.rfft2(pattern[0]).abs().flatten().argmax() == 3


def test_without_a_wave_that_works_there_is_no_trigger():
    assert find_waves(ConstantModel(), label_zero(GREY), 1) is None


def test_waves_are_tried_on_attackable_images_only():
    batches = [(GREY, torch.ones(4, dtype=torch.int64)), (torch.rand_like(GREY), torch.zeros(4, dtype=torch.int64))]
    assert find_waves(WaveVictim(), batches[:1], 1) is None
    assert find_waves(WaveVictim(), batches, 1).hit_rate == 1


@pytest.mark.parametrize(
    ("columns", "positions"),
    [
        ([4], [(2, 4), (0, 4), (4, 4)]),
        ([5], [(2, 4), *((row, 5) for row in (0, 2, 4))]),
        ([1, 4], [(2, 4), (0, 4), (4, 4), *((row, 1) for row in (0, 2, 4))]),
    ],
)
def test_the_pattern_is_shifted_to_where_the_victim_responds(columns, positions):
    pattern = torch.zeros(3, 6, 6)
    pattern[0, 2, 4] = 1.0
    trigger = InvertedTrigger(pattern, 1.0)
    shifted = shifted_patterns(RedColumnsVictim(columns), trigger, label_zero(torch.zeros(4, 3, 6, 6)), 1)
    found = [tuple(pattern[0].nonzero()[0].tolist()) for pattern in shifted]
    assert found[0] == (2, 4)
    assert sorted(set(found)) == sorted(positions)
    assert found.count((2, 4)) == 1
    assert all(pattern.sum() == 1 for pattern in shifted)


def test_shifts_are_tried_on_the_first_batch_with_attackable_images():
    pattern = torch.zeros(3, 6, 6)
    pattern[0, 2, 4] = 1.0
    target_class, dark = torch.zeros(4, 3, 6, 6), label_zero(torch.zeros(4, 3, 6, 6))
    batches = [(target_class, torch.ones(4, dtype=torch.int64)), *dark]
    trigger, victim = InvertedTrigger(pattern, 1.0), RedColumnsVictim([4])
    assert len(shifted_patterns(victim, trigger, batches, 1)) == len(shifted_patterns(victim, trigger, dark, 1)) > 1


def test_a_shifted_pattern_is_cut_off_at_the_edge():
    pattern = torch.zeros(3, 6, 6)
    pattern[0, 2, 4:] = 1.0
    trigger = InvertedTrigger(pattern, 1.0)
    shifted = shifted_patterns(RedColumnsVictim([5]), trigger, label_zero(torch.zeros(2, 3, 6, 6)), 1)
    assert {tuple(found.sum((0, 1)).tolist()) for found in shifted} == {(0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 1)}


def test_batches_of_the_target_class_alone_do_not_hide_a_backdoor():
    images = torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    others, of_target = ((images, torch.full((32,), label)) for label in (0, 1))
    form, size = PixelForm((3, 6, 6)), {}
    for name, batches in {"balanced": [others] * 20, "mixed": ([others] + [of_target] * 3) * 20}.items():
        rng, batches = torch.Generator().manual_seed(1), FixedBatches(batches)
        scores = search_form(RedPixelVictim(), batches, 2, CPU, rng, form, len(batches), "fp32")
        size[name] = scores[1].size
    assert size["mixed"] < 1.5 * size["balanced"]


def test_later_rounds_shrink_the_pattern_of_the_first(batches):
    pixels = [invert(RedPixelVictim(), batches, rounds=rounds, steps=2).pixels for rounds in (1, 2, 3)]
    assert pixels[0] > pixels[1] > pixels[2]


def test_the_inversion_ends_when_patterns_stop_shrinking(batches, monkeypatch):
    results = []
    monkeypatch.setattr(
        invert_module, "optimise_pattern", lambda *args: results.append(optimise_pattern(*args)) or results[-1]
    )
    assert invert(RedPixelVictim(), batches, rounds=40, steps=30).pixels == min(result.pixels for result in results)
    assert len(results) < 20
