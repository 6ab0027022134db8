"""The forms of a trigger: their formulas by hand, and a stamp beside a slow version of it."""

import math

import pytest
import torch

from defenses.forms import Pixels, Warp, frequencies, mirror, stamp, waves

RNG = torch.Generator().manual_seed(0)


def test_pattern_is_the_clamped_plus_less_the_clamped_minus():
    plus, minus = torch.tensor([[[-1.0, 0.25, 2.0]]]), torch.tensor([[[0.5, 0.5, -3.0]]])
    form = Pixels((1, 1, 3))
    assert form.pattern(torch.stack([plus, minus])[None]).tolist() == [[[[-0.5, -0.25, 1.0]]]]


def test_size_of_pixels_by_hand():
    plus = torch.tensor([[[0.0, 5.0]], [[10.0, -5.0]]])  # two channels, two pixels; the larger are 10 and 5
    minus = torch.zeros(2, 1, 2)
    expected = (math.tanh(1.0) / 2 + 0.5) + (math.tanh(0.5) / 2 + 0.5) + 0.5 + 0.5
    parameters = torch.stack([torch.stack([plus, minus]), torch.stack([minus, minus])])
    assert Pixels((2, 1, 2)).size(parameters).tolist() == pytest.approx([expected, 2.0], rel=1e-5)


def test_what_an_8_bit_image_cannot_show_is_not_shown():
    parameters = torch.tensor([0.5, 0.003, -1.0]).view(1, 1, 1, 1, 3).repeat(1, 2, 1, 1, 1)
    parameters[:, 1] = 0
    form = Pixels((1, 1, 3))
    assert form.shown(parameters).flatten().tolist() == [0.5, 0.0, 0.0]
    assert form.extent(form.shown(parameters)[0]) == 1
    assert form.measure(torch.full((2, 3, 4, 4), -0.5)).tolist() == [24.0, 24.0]


def test_size_of_a_warp_by_hand():
    form = Warp((3, 16, 16))
    parameters = torch.full((1, 2, 8, 8), 0.4)  # -1 to 1 are 15 pixels: these are 3
    assert form.size(parameters).tolist() == pytest.approx([0.16])
    assert form.measure(form.pattern(parameters)).tolist() == pytest.approx([3.0])
    assert form.extent(form.pattern(parameters)[0]) == pytest.approx(3.0)


def test_a_warp_reads_each_pixel_from_where_its_field_points():
    images, field = torch.rand(3, 3, 5, 4, generator=RNG), torch.zeros(2, 2, 5, 4)
    field[0, 0] = 2 / 3  # the first pattern: one column to the right
    field[1, 1] = -2 / 4 * 2  # the second: two rows up
    stamped = stamp(images, field)
    for i, (down, right) in enumerate([(0, 1), (-2, 0), (0, 1)]):
        for row in range(5):
            for column in range(4):
                source = images[i, :, min(max(row + down, 0), 4), min(column + right, 3)]
                assert torch.allclose(stamped[i, :, row, column], source, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 3])
def test_a_mirrored_pattern_does_the_same_to_the_mirrored_image(channels):
    image, patterns = torch.rand(1, 3, 6, 6, generator=RNG), 0.2 * torch.randn(1, channels, 6, 6, generator=RNG)
    expected = stamp(image, patterns).flip(3)
    assert torch.allclose(stamp(image.flip(3), mirror(patterns)), expected, atol=1e-5)


def test_waves_are_all_those_there_are_once():
    small = torch.cat([waves((8, 8), frequency, torch.device("cpu")) for frequency in frequencies((8, 8))]).flatten(1)
    # 64 pixels hold 63 waves beside brightness itself: 30 in two phases, of which the opposites are two more here, and
    # the 3 finest in one, with its opposite; their other phases are none at all.
    assert len(frequencies((8, 8))) == 30 + 3
    assert len(small.round(decimals=4).add(0.0).unique(dim=0)) == 30 * 4 + 3 * 2 + 1
    sought = 40 / 255 * torch.sin(2 * math.pi * 6 * torch.arange(32) / 32).expand(3, 32, 32)
    every = [waves((32, 32), frequency, torch.device("cpu")) for frequency in frequencies((32, 32))]
    assert every[0].shape == (4, 3, 32, 32)
    assert sum(((part - sought).abs().amax((1, 2, 3)) < 1e-5).sum() for part in every) == 1
