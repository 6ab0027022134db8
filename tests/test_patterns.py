"""The forms of a trigger: their formulas by hand, and their application against a slow version."""

import math

import pytest
import torch
from conftest import CPU
from test_inversion import label_zero

from defenses.inversion import InvertedTrigger, PatternApplier, apply_patterns, shifted_patterns
from defenses.inversion.patterns import PixelForm, WarpForm, frequencies, mirror, waves
from utils.seed import generator

RNG = torch.Generator().manual_seed(0)


def test_pixel_pattern_is_clamped_p_minus_clamped_q():
    p, q = torch.tensor([[[-1.0, 0.25, 2.0]]]), torch.tensor([[[0.5, 0.5, -3.0]]])
    form = PixelForm((1, 1, 3))
    assert form.pattern(torch.stack([p, q])[None]).tolist() == [[[[-0.5, -0.25, 1.0]]]]


def test_pixel_penalty_by_hand():
    p = torch.tensor([[[0.0, 5.0]], [[10.0, -5.0]]])  # two channels, two pixels; the larger values are 10 and 5
    q = torch.zeros(2, 1, 2)
    expected = (math.tanh(1.0) / 2 + 0.5) + (math.tanh(0.5) / 2 + 0.5) + 0.5 + 0.5
    parameters = torch.stack([torch.stack([p, q]), torch.stack([q, q])])
    assert PixelForm((2, 1, 2)).penalty(parameters).tolist() == pytest.approx([expected, 2.0], rel=1e-5)


def test_quantised_pattern_drops_changes_below_one_grey_level():
    parameters = torch.tensor([0.5, 0.003, -1.0]).view(1, 1, 1, 1, 3).repeat(1, 2, 1, 1, 1)
    parameters[:, 1] = 0
    form = PixelForm((1, 1, 3))
    assert form.quantised(parameters).flatten().tolist() == [0.5, 0.0, 0.0]
    assert form.extent(form.quantised(parameters)[0]) == 1
    assert form.norm(torch.full((2, 3, 4, 4), -0.5)).tolist() == [24.0, 24.0]


def test_warp_penalty_and_norm_by_hand():
    form = WarpForm((3, 16, 16))
    parameters = torch.full((1, 2, 8, 8), 0.4)  # -1 to 1 are 15 pixels: these are 3
    assert form.penalty(parameters).tolist() == pytest.approx([0.16])
    assert form.norm(form.pattern(parameters)).tolist() == pytest.approx([3.0])
    assert form.extent(form.pattern(parameters)[0]) == pytest.approx(3.0)


def test_warp_reads_each_pixel_at_its_offset():
    images, offsets = torch.rand(3, 3, 5, 4, generator=RNG), torch.zeros(2, 2, 5, 4)
    offsets[0, 0] = 2 / 3  # the first pattern: one column to the right
    offsets[1, 1] = -2 / 4 * 2  # the second: two rows up
    warped = apply_patterns(images, offsets)
    for i, (down, right) in enumerate([(0, 1), (-2, 0), (0, 1)]):
        for row in range(5):
            for column in range(4):
                source = images[i, :, min(max(row + down, 0), 4), min(column + right, 3)]
                assert torch.allclose(warped[i, :, row, column], source, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 3])
def test_mirrored_pattern_on_mirrored_image_gives_mirrored_result(channels):
    image, patterns = torch.rand(1, 3, 6, 6, generator=RNG), 0.2 * torch.randn(1, channels, 6, 6, generator=RNG)
    expected = apply_patterns(image, patterns).flip(3)
    assert torch.allclose(apply_patterns(image.flip(3), mirror(patterns)), expected, atol=1e-5)


def test_images_take_the_patterns_in_turn():
    patterns = torch.zeros(2, 3, 2, 4)
    patterns[0, :, 1, 3], patterns[1, :, 1, 0] = 1.0, -1.0
    images = torch.rand(3, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = images.clone()
    expected[[0, 2], :, 1, 3], expected[1, :, 1, 0] = 1.0, 0.0
    assert torch.equal(apply_patterns(images, patterns), expected)


def test_every_pattern_has_its_turn_if_they_outnumber_the_images():
    patterns = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 1, 1) / 10
    images, applier = torch.zeros(2, 3, 1, 1), PatternApplier(patterns)
    assigned = [applier(images)[:, 0, 0, 0].tolist() for _ in range(3)]
    assert torch.tensor(assigned).mul(10).round().int().tolist() == [[0, 1], [2, 3], [4, 0]]


def test_waves_are_distinct_and_complete():
    small = torch.cat([waves((8, 8), frequency, CPU) for frequency in frequencies((8, 8))]).flatten(1)
    # 64 pixels hold 63 waves besides the constant: 30 frequencies in two phases, which make four with their opposites,
    # and the 3 finest in one phase, which make two; at their other phases these vanish.
    assert len(frequencies((8, 8))) == 30 + 3
    assert len(small.round(decimals=4).add(0.0).unique(dim=0)) == 30 * 4 + 3 * 2 + 1
    wave = 1 / 8 * torch.sin(2 * math.pi * 6 * torch.arange(32) / 32).expand(3, 32, 32)
    patterns = [waves((32, 32), frequency, CPU) for frequency in frequencies((32, 32))]
    assert patterns[0].shape == (4, 3, 32, 32)
    assert sum(((phases - wave).abs().amax((1, 2, 3)) < 1e-5).sum() for phases in patterns) == 1


def test_the_mirror_image_of_a_warp_reads_from_the_other_side():
    warp = 0.2 * torch.randn(2, 6, 6, generator=generator(0, "warp"))

    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    found = shifted_patterns(Always(), InvertedTrigger(warp, 1.0), label_zero(torch.zeros(2, 3, 6, 6)), 1)
    assert len(found) == 50
    assert any(torch.equal(pattern, mirror(warp)) for pattern in found)


def test_changes_below_one_grey_level_are_dropped_and_no_others():
    parameters = torch.zeros(1, 2, 1, 1, 2)
    parameters[0, 0, 0, 0] = torch.tensor([0.99 / 255, 1.01 / 255])
    assert (PixelForm((1, 1, 2)).quantised(parameters) != 0).flatten().tolist() == [False, True]
