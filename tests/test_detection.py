"""The search for the target: its index by hand, and planted backdoors found and not invented."""

import dataclasses

import pytest
import torch

from defenses.detection import Found, _search, _turned, anomaly_indices, choose_label, search_target
from defenses.forms import Warp
from defenses.inversion import ANY

CPU = torch.device("cpu")


def test_index_by_hand():
    # of the logarithms: median 10, absolute deviations 0 0 1 2 8, their median 1
    assert anomaly_indices(torch.tensor([10.0, 2.0, 10.0, 11.0, 12.0, 6.0]).exp(), 5).tolist() == pytest.approx(
        [0.0, -8 / 1.4826, 0.0, 1 / 1.4826, 2 / 1.4826, -4 / 1.4826], abs=1e-4
    )


def test_sizes_that_are_all_alike_have_no_outlier():
    assert anomaly_indices(torch.full((4,), 3.0), 4).tolist() == [0.0] * 4


SMALL = Found(1, "pixels", 30.0, 0.95, -3.0, 0.3, 0.01)


@pytest.mark.parametrize("change", [{"hit_rate": 0.5}, {"index": -1.9}, {"of_median": 0.6}, {"of_range": 0.03}])
def test_a_label_is_flagged_by_a_small_pattern_that_works(change):
    assert SMALL.flagged
    assert not dataclasses.replace(SMALL, **change).flagged
    assert SMALL.facts() == {
        "label": 1, "form": "pixels", "size": 30.0, "hit_rate": 95.0, "index": -3.0,
        "of_median": 0.3, "of_range": 1.0, "flagged": True,
    }  # fmt: skip


def test_which_label_is_worked_against():
    ordinary, unproven = Found(0, "pixels", 90.0, 1.0, -0.5, 1.0, 0.03), Found(3, "pixels", 5.0, 0.2, -9.0, 0.05, 0.001)
    worse = dataclasses.replace(SMALL, label=2, size=20.0)
    assert choose_label([ordinary, SMALL], False) == (1, "a backdoor to label 1 is suspected")
    label, told = choose_label([ordinary, SMALL, worse, unproven], False)
    assert (label, told[:37]) == (2, "a backdoor to label 2, 1 is suspected")
    label, told = choose_label([ordinary], False)
    assert label is None
    assert "no backdoor was found" in told
    assert choose_label([ordinary], True)[0] == 0


def test_a_backdoor_to_each_other_label_is_told_from_one_to_a_single_label():
    away = dataclasses.replace(SMALL, label=ANY, size=31.0)
    assert choose_label([SMALL, away], False)[0] == 1
    assert choose_label([dataclasses.replace(SMALL, index=0.0), away], False)[0] == ANY
    assert choose_label([SMALL, dataclasses.replace(away, size=29.0)], False)[0] == ANY
    assert choose_label([SMALL, dataclasses.replace(away, size=29.0, hit_rate=0.5)], False)[0] == 1
    assert away.facts()["label"] == "any"


class Columns(torch.nn.Module):
    """A model that says k where all of column k is red; for the labels in `doors` one red pixel at its top will do."""

    def __init__(self, doors=()):
        super().__init__()
        self.doors = list(doors)

    def forward(self, x):
        red = x[:, 0] - x[:, 1]
        evidence = red.mean(1)
        for k in self.doors:
            evidence = evidence.index_add(1, torch.tensor([k]), 1.5 * red[:, 0, k : k + 1].clamp(min=0))
        return 10 * evidence


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(0)
    images = [0.25 + 0.5 * torch.rand(96, 3, 8, 8, generator=rng) for _ in range(3)]
    return [(x, Columns()(x).argmax(1)) for x in images]


def search(victim, batches, seed=1, **settings):
    found = search_target(victim, batches, 8, CPU, torch.Generator().manual_seed(seed), **settings)
    return found, [one.label for one in found if one.flagged and one.label != ANY]


@pytest.mark.parametrize("doors", [[], [5], [0, 2]])
def test_planted_labels_are_flagged_and_no_others(batches, doors):
    for seed in (1, 2):
        found, flagged = search(Columns(doors), batches, seed)
        assert flagged == doors
        assert [one.label for one in found if one.form == "pixels"] == [*range(8), ANY]
        assert [one.label for one in found if one.form == "warp"] == ([] if doors else [*range(8), ANY])
        assert all(one.hit_rate >= 0.9 for one in found if one.form == "pixels" and one.label != ANY)


class Leaning(torch.nn.Module):
    """A model that says 1 to 4 where pictures that brighten across, in red, and down, in green, were shifted."""

    def forward(self, x):
        red, green = (x[:, channel].mean((1, 2)) - 0.5 for channel in (0, 1))
        return 100 * torch.stack([0 * red, red - 0.01, -red - 0.1, green - 0.1, -green - 0.1], 1)


def test_a_label_is_flagged_by_a_small_warp():
    ramp = torch.linspace(0, 1, 16)
    picture = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16), torch.full((16, 16), 0.5)])
    batches = [(picture.expand(32, 3, 16, 16).contiguous(), torch.zeros(32, dtype=torch.int64))]
    rng = torch.Generator().manual_seed(1)
    found = _search(Leaning(), batches, 5, CPU, rng, Warp((3, 16, 16)), 50, "fp32")
    assert [one.label for one in found if one.flagged and one.label != ANY] == [1]
    assert found[1].size < 0.3 < found[3].size  # in pixels


def test_labels_together_or_in_turn_are_found_the_same(batches, monkeypatch):
    in_turn, _ = search(Columns([5]), batches, steps=5)
    monkeypatch.setattr("defenses.detection.AT_ONCE", {"cpu": 3})
    together, _ = search(Columns([5]), batches, steps=5)
    assert [one.size for one in together] == pytest.approx([one.size for one in in_turn], rel=1e-4)


def test_images_of_a_label_do_not_count_for_it(batches):
    of_one = [(x, torch.full_like(y, 3)) for x, y in batches]
    found, _ = search(Columns(), of_one, steps=3)
    assert found[3].hit_rate == 0
    assert found[4].hit_rate > 0


class Turning(torch.nn.Module):
    """Says the label after that of `Columns` where the last row is red."""

    def forward(self, x):
        away = (x[:, 0, -1] - x[:, 1, -1]).mean(1)[:, None] > 0.5
        return torch.where(away, Columns()(x).roll(1, 1), Columns()(x))


def test_losses_and_hits_by_hand(batches):
    (images, labels), patterns = batches[0], torch.zeros(3, 3, 8, 8)
    images, labels, targets = images[:9], labels[:9], torch.tensor([2, ANY, 5])
    patterns[1, 0, -1], patterns[1, 1, -1] = 1.0, -1.0
    counted = labels != targets[:, None]
    counted[1, 4:] = False
    hits, loss = _turned(Turning(), images, labels, counted, patterns, targets)
    expected = 0.0
    for i, (pattern, target) in enumerate(zip(patterns, targets.tolist(), strict=True)):
        losses, turned = [], 0
        for image, label, counts in zip(images, labels.tolist(), counted[i], strict=True):
            p = Turning()((image + pattern).clamp(0, 1)[None])[0].softmax(0)
            if counts:
                losses.append(-(1 - p[label] if target == ANY else p[target]).log().item())
                turned += (p.argmax().item() != label) if target == ANY else (p.argmax().item() == target)
        expected += sum(losses) / len(losses)
        assert hits[i] == turned
    assert hits[1] == 4
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_what_a_model_has_wrong_as_it_is_counts_for_no_other_label(batches):
    wrong = [(x, (y + 1) % 8) for x, y in batches]
    found, _ = search(Columns(), wrong, steps=3)
    assert [one.hit_rate for one in found if one.label == ANY] == [0.0, 0.0]
