"""Trigger inversion: its formulas by hand, and a planted backdoor found."""

import math

import pytest
import torch

from defenses import inversion
from defenses.case import Case
from defenses.forms import stamp
from defenses.inversion import (
    ANY,
    Trigger,
    asked,
    find_trigger,
    find_waves,
    invert_trigger,
    invert_warp,
    loss_from,
    moved_patterns,
    noise_around,
    turned,
)
from utils.errors import RunError
from utils.report import Stopwatch

CPU = torch.device("cpu")


def test_a_trigger_counts_its_pixels_and_stays_in_range():
    pattern = torch.zeros(3, 2, 2)
    pattern[0, 0, 0], pattern[2, 0, 0], pattern[1, 1, 1] = 0.5, -0.25, 1.0
    trigger = Trigger(pattern, 1.0)
    assert (trigger.pixels, trigger.l1) == (2, 1.75)
    stamped = stamp(torch.full((1, 3, 2, 2), 0.75), trigger.pattern[None])
    assert stamped[0, 0, 0, 0] == 1.0
    assert stamped[0, 2, 0, 0] == 0.5
    assert stamped[0, 1, 0, 1] == 0.75


class Planted(torch.nn.Module):
    """A victim that says 1 where its first pixel is red without green, and 0 elsewhere."""

    def forward(self, x):
        evidence = 20 * (x[:, 0, 0, 0] - x[:, 1, 0, 0] - 0.5)
        return torch.stack([torch.zeros_like(evidence), evidence], dim=1)


class Deaf(torch.nn.Module):
    """A model that no image moves."""

    def forward(self, x):
        return torch.stack([x.sum((1, 2, 3)) * 0 + 1, x.sum((1, 2, 3)) * 0], dim=1)


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(0)
    return [(torch.rand(16, 3, 6, 6, generator=rng), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]


class Leaning(torch.nn.Module):
    """A victim that says 1 where a picture of vertical stripes, four pixels apart, has been shifted to the left."""

    def forward(self, x):
        evidence = 40 * (x[:, :, :, 1::4].mean((1, 2, 3)) - x[:, :, :, 3::4].mean((1, 2, 3)) - 0.1)
        return torch.stack([torch.zeros_like(evidence), evidence], dim=1)


def stripes():
    """Batches of vertical stripes, brightest at columns 2, 6, ..."""
    picture = 0.5 - 0.4 * torch.cos(torch.arange(16.0) * math.pi / 2)
    return [(picture.expand(8, 3, 16, 16).contiguous(), torch.zeros(8, dtype=torch.int64))]


def invert(victim, batches, **settings):
    rng = torch.Generator().manual_seed(1)
    return invert_trigger(victim, batches, 1, CPU, rng, **{"rounds": 1, "steps": 50, "batches_per_step": 4, **settings})


def test_the_planted_pixel_is_found_and_little_else(batches):
    trigger = invert(Planted(), batches)
    assert trigger.hit_rate >= 0.9
    assert trigger.pixels <= 3
    assert trigger.pattern[0, 0, 0] > 0.3 or trigger.pattern[1, 0, 0] < -0.3
    answers = torch.cat([Planted()(stamp(images, trigger.pattern[None])).argmax(1) for images, _ in batches])
    assert (answers == 1).float().mean() >= 0.9


def test_no_pattern_is_said_and_never_an_empty_one(batches):
    assert invert(Deaf(), batches) is None


def test_noise_starts_near_the_pattern_alone():
    pattern = torch.zeros(3, 9, 9)
    pattern[0, 1, 1], pattern[2, 1, 1] = 0.9, -0.8
    plus, minus = noise_around(pattern, torch.Generator().manual_seed(0))
    assert (plus[0, 1, 1], minus[2, 1, 1]) == (pattern[0, 1, 1], -pattern[2, 1, 1])
    assert (plus[:, :4, :4] >= 0).all()
    assert (plus[:, :4, :4] > 0).sum() >= 47
    assert (plus[:, 4:] < 0).all()
    assert (minus[:, :, 4:] < 0).all()


def test_further_rounds_shrink_what_the_first_one_left(batches):
    pixels = [invert(Planted(), batches, rounds=rounds, steps=2).pixels for rounds in (1, 2, 3)]
    assert pixels[0] > pixels[1] > pixels[2]


def test_the_search_ends_where_it_finds_no_smaller_pattern(batches, monkeypatch):
    rounds, shrink = [], inversion._shrink
    monkeypatch.setattr(inversion, "_shrink", lambda *given: rounds.append(shrink(*given)) or rounds[-1])
    assert invert(Planted(), batches, rounds=40, steps=30).pixels == min(found.pixels for found in rounds)
    assert len(rounds) < 20


def test_images_of_the_target_itself_do_not_count(batches):
    with_target = [(torch.cat([x, x]), torch.cat([y, y + 1])) for x, y in batches]
    alone, mixed = invert(Planted(), batches), invert(Planted(), with_target)
    assert torch.equal(alone.pattern, mixed.pattern)


def test_a_small_warp_is_found():
    rng = torch.Generator().manual_seed(1)
    trigger = invert_warp(Leaning(), stripes(), 1, CPU, rng, 60, 1)
    assert Leaning()(stamp(stripes()[0][0], trigger.patterns)).argmax(1).all()
    assert trigger.pattern[0].mean() > 3 * trigger.pattern[1].abs().mean()  # read from the right: shifted to the left
    assert trigger.describe().startswith("warp by 0.")


def test_a_warp_that_would_have_to_be_large_is_none(monkeypatch):
    monkeypatch.setattr("defenses.inversion.SHIFT", 0.002)
    assert invert_warp(Leaning(), stripes(), 1, CPU, torch.Generator().manual_seed(1), 60, 1) is None


class Wavy(torch.nn.Module):
    """A victim that says 1 where brightness has waves of three cycles over the width."""

    def forward(self, x):
        spectrum = torch.fft.rfft(x.mean(1), norm="forward").mean(1).abs()
        return torch.stack([torch.full_like(spectrum[:, 3], 0.05), spectrum[:, 3]], dim=1)


def test_the_waves_that_a_victim_answers_to_are_found():
    grey = [(torch.full((4, 3, 16, 16), 0.5), torch.tensor([0, 0, 0, 1]))]
    trigger = find_waves(Wavy(), grey, 1)
    assert trigger.hit_rate == 1
    assert trigger.describe() == "best of 4 waves"  # of as many phases
    for pattern in trigger.patterns:
        assert pattern.abs().amax() <= 40 / 255 + 1e-6
        assert torch.fft.rfft2(pattern[0]).abs().flatten().argmax() == 3


def test_no_wave_is_said():
    assert find_waves(Deaf(), [(torch.full((4, 3, 16, 16), 0.5), torch.zeros(4, dtype=torch.int64))], 1) is None


def test_waves_are_tried_on_images_that_count_alone():
    target, other = torch.full((4, 3, 16, 16), 0.5), torch.rand(4, 3, 16, 16)
    batches = [(target, torch.ones(4, dtype=torch.int64)), (other, torch.zeros(4, dtype=torch.int64))]
    assert find_waves(Wavy(), batches[:1], 1) is None
    assert find_waves(Wavy(), batches, 1).hit_rate == 1


def test_any_other_label_by_hand():
    logits, labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
    p = logits.softmax(1)
    expected = [-math.log(p[0, 1] + p[0, 2]), -math.log(p[1, 0] + p[1, 1])]
    assert loss_from(logits, labels).tolist() == pytest.approx(expected, rel=1e-5)
    assert loss_from(logits.bfloat16(), labels).tolist() == pytest.approx(expected, rel=1e-2)
    assert turned(logits, labels, ANY).tolist() == [False, True]
    assert turned(logits, labels, 1).tolist() == [False, True]
    images = torch.arange(2.0).view(2, 1, 1, 1)
    assert asked(lambda x: logits, images, labels, ANY)[1].tolist() == [0]
    assert asked(lambda x: logits, images, labels, 0)[1].tolist() == [2]


def test_a_pattern_that_leads_away_from_each_label_is_found(batches):
    rng = torch.Generator().manual_seed(1)
    trigger = invert_trigger(Planted(), batches, ANY, CPU, rng, 1, 50, 4)
    answers = torch.cat([Planted()(stamp(images, trigger.patterns)).argmax(1) for images, _ in batches])
    assert (answers != 0).float().mean() >= 0.9
    assert trigger.pixels <= 3


NOISE = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("victim", "images", "found"),
    [
        (Planted, NOISE, "px, L1"),
        (Leaning, stripes()[0][0], "warp by"),
        (Wavy, torch.full_like(NOISE, 0.5), "waves"),
        (Deaf, NOISE, None),
    ],
)
def test_the_first_form_that_fits_is_taken(victim, images, found, monkeypatch, capsys):
    monkeypatch.setattr("defenses.inversion.PATCH", 0.1 if victim is Planted else 0.0)
    batches = [(images, torch.zeros(8, dtype=torch.int64))]
    case = Case(victim(), [], batches, False, CPU, 1, Stopwatch(), 1)
    if found is None:
        with pytest.raises(RunError, match="no pattern turns 90% of the clean images into label 1"):
            find_trigger(case, 1, 30, 2, "fp32")
        return
    trigger = find_trigger(case, 1, 30, 2, "fp32")
    assert found in trigger.describe()
    assert f"inverted trigger: {trigger.describe()}" in capsys.readouterr().out
    assert trigger.facts() == {"pattern": trigger.describe(), "hit_rate": 100 * trigger.hit_rate}


class Striding(torch.nn.Module):
    """A victim that says 1 where a pixel of even row and of a column in `columns` is red; nothing else moves it."""

    def __init__(self, columns):
        super().__init__()
        self.columns = columns

    def forward(self, x):
        red = x[:, 0, ::2, self.columns].amax((1, 2))
        return torch.stack([torch.full_like(red, 0.5), red], dim=1)


@pytest.mark.parametrize(
    "columns, answered",
    [
        ([4], [(2, 4), (0, 4), (4, 4)]),
        ([5], [(2, 4), *((row, 5) for row in (0, 2, 4))]),
        ([1, 4], [(2, 4), (0, 4), (4, 4), *((row, 1) for row in (0, 2, 4))]),
    ],
)
def test_the_pattern_is_moved_where_the_victim_answers(columns, answered):
    pattern = torch.zeros(3, 6, 6)
    pattern[0, 2, 4] = 1.0
    dark = [(torch.zeros(4, 3, 6, 6), torch.zeros(4, dtype=torch.int64))]
    moved = moved_patterns(Striding(columns), Trigger(pattern, 1.0), dark, 1)
    places = [tuple(found[0].nonzero()[0].tolist()) for found in moved]
    assert places[0] == (2, 4)
    assert sorted(set(places)) == sorted(answered)
    assert all(found.sum() == 1 for found in moved)


def test_what_is_moved_out_of_the_image_is_cut_off():
    pattern = torch.zeros(3, 6, 6)
    pattern[0, 2, 4:] = 1.0
    moved = moved_patterns(Striding([5]), Trigger(pattern, 1.0), [(torch.zeros(2, 3, 6, 6), torch.tensor([0, 0]))], 1)
    assert {tuple(found.sum((0, 1)).tolist()) for found in moved} == {(0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 1)}
