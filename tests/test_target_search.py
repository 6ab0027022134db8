"""The target search: its anomaly index by hand, and planted backdoors found and none invented."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches, RecordingForm
from test_flagged_labels import SMALL

from defenses import find_target
from defenses.inversion import ANY_OTHER, InvertedTrigger, choose_label, invert_suspects, search_target, target_search
from defenses.inversion import scores as scores_module
from defenses.inversion.objective import hits_and_losses
from defenses.inversion.patterns import PixelForm, WarpForm
from defenses.inversion.scores import LabelScore, anomaly_indices
from defenses.inversion.target_search import _score, promising, search_form


def test_anomaly_index_by_hand():
    # of the logarithms: median 10, absolute deviations 0 0 1 2 8, their median 1
    assert anomaly_indices(torch.tensor([10.0, 2.0, 10.0, 11.0, 12.0, 6.0]).exp(), 5).tolist() == pytest.approx(
        [0.0, -8 / 1.4826, 0.0, 1 / 1.4826, 2 / 1.4826, -4 / 1.4826], abs=1e-4
    )


def test_sizes_that_are_alike_have_no_outlier():
    assert anomaly_indices(torch.full((4,), 3.0), 4).tolist() == [0.0] * 4
    assert anomaly_indices(torch.tensor([100.0, 101.0, 99.0, 100.0, 80.0]), 5).min() > -2


def test_scores_are_means_over_the_steps_in_which_the_pattern_works():
    form, targets = PixelForm((3, 2, 5)), torch.tensor([0, 1, 2, ANY_OTHER])
    sizes = torch.tensor([[9.0, 2.0, 4.0, 1.0], [3.0, 4.0, 6.0, 1.0]])
    rates = torch.tensor([[0.9, 0.2, 0.1, 1.0], [1.0, 1.0, 0.3, 1.0]])
    scores = _score(targets, form, 3, sizes, rates)
    assert [score.label for score in scores] == [0, 1, 2, ANY_OTHER]
    # Label 1 works in the second step only; label 2 never does, so that its size says nothing.
    assert [score.size for score in scores] == pytest.approx([6.0, 4.0, 30.0, 1.0])
    assert [score.hit_rate for score in scores] == pytest.approx([0.95, 1.0, 0.2, 1.0])
    assert [score.of_median for score in scores] == pytest.approx([1.0, 4 / 6, 5.0, 1 / 6])
    assert [score.of_range for score in scores] == pytest.approx([6 / 30, 4 / 30, 1.0, 1 / 30])


class RedColumnModel(torch.nn.Module):
    """Predicts the reddest column; for the labels in `backdoors` one red pixel at the top of theirs suffices."""

    def __init__(self, backdoors=()):
        super().__init__()
        self.backdoors = list(backdoors)

    def forward(self, x):
        red = x[:, 0] - x[:, 1]
        logits = red.mean(1)
        for k in self.backdoors:
            logits = logits.index_add(1, torch.tensor([k]), 1.5 * red[:, 0, k : k + 1].clamp(min=0))
        return 10 * logits


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(0)
    images = [0.25 + 0.5 * torch.rand(96, 3, 8, 8, generator=rng) for _ in range(3)]
    return [(x, RedColumnModel()(x).argmax(1)) for x in images]


@pytest.fixture(autouse=True)
def all_patterns_in_one_forward(monkeypatch):
    """Faster for models as small as these."""
    monkeypatch.setattr(target_search, "PATTERNS_PER_FORWARD", {"cpu": 9})


def search(victim, batches, seed=1, **settings):
    return search_target(victim, FixedBatches(batches), 8, CPU, torch.Generator().manual_seed(seed), **settings)


def flagged_labels(scores):
    return [score.label for score in scores if score.flagged and score.label != ANY_OTHER]


@pytest.mark.parametrize("backdoors", [[], [5], [0, 2]])
def test_labels_with_a_backdoor_are_flagged_and_no_others(batches, backdoors):
    for seed in (1, 2):
        scores = search(RedColumnModel(backdoors), batches, seed)
        assert flagged_labels(scores) == backdoors
        pixels, warps = ([score for score in scores if score.form == form] for form in ("pixels", "warp"))
        assert [score.label for score in pixels] == [*range(8), ANY_OTHER]
        assert [score.label for score in warps] == ([] if backdoors else [*range(8), ANY_OTHER])
        assert [score.label for score in scores if score.form == "wave"] == ([] if backdoors else [*range(8)])
        assert all(score.hit_rate >= 0.9 for score in pixels if score.label != ANY_OTHER)


class ShiftedRampsModel(torch.nn.Module):
    """Predicts 1 to 4 if images that brighten across in red and down in green were shifted; 1 by far the soonest."""

    def forward(self, x):
        red, green = (x[:, channel].mean((1, 2)) - 0.5 for channel in (0, 1))
        return 100 * torch.stack([0 * red, red - 0.01, -red - 0.1, green - 0.1, -green - 0.1], 1)


def test_a_label_is_flagged_by_a_small_warp(monkeypatch):
    monkeypatch.setattr(target_search, "MIN_LABELS", 1)
    ramp = torch.linspace(0, 1, 16)
    image = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16), torch.full((16, 16), 0.5)])
    batches = FixedBatches([(image.expand(32, 3, 16, 16).contiguous(), torch.zeros(32, dtype=torch.int64))])
    rng = torch.Generator().manual_seed(1)
    scores = search_form(ShiftedRampsModel(), batches, 5, CPU, rng, WarpForm((3, 16, 16)), 50, "fp32")
    assert flagged_labels(scores) == [1]
    assert scores[1].size < 0.3 < scores[3].size  # in pixels


def test_of_many_labels_only_promising_ones_are_searched_in_full(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    images = 0.25 + 0.5 * torch.rand(64, 3, 8, 24, generator=rng)
    batches = FixedBatches([(images, RedColumnModel()(images).argmax(1))])
    updated = []

    def count_updates(victim, images, labels, scored, patterns, targets):
        updated.append(len(images) * len(patterns))
        return hits_and_losses(victim, images, labels, scored, patterns, targets)

    monkeypatch.setattr(target_search, "hits_and_losses", count_updates)
    scores = search_form(RedColumnModel([17]), batches, 24, CPU, rng, PixelForm((3, 8, 24)), 50, "fp32")
    assert flagged_labels(scores) == [17]
    labels = [score.label for score in scores]
    assert (len(labels), labels) == (11, [*sorted(labels[:-1]), ANY_OTHER])
    assert sum(updated) == 20 * 32 * 25 + 30 * 64 * 11


def test_a_sample_of_the_other_labels_goes_on_with_the_promising_ones():
    sizes = torch.tensor([*range(100, 0, -5), 1.0])  # label 19 has the smallest
    works = torch.ones(21, dtype=torch.bool)
    works[19] = False
    kept, sample = promising(sizes, works)
    assert sample == 6
    assert kept[:6].tolist() == [14, 11, 8, 5, 2, 19]  # the label without a pattern that works comes last
    assert kept[6:].tolist() == [18, 17, 16, 15, 20]


def test_the_number_of_patterns_per_forward_does_not_matter(batches, monkeypatch):
    sizes = []
    for count in (1, 3):
        monkeypatch.setattr(target_search, "PATTERNS_PER_FORWARD", {"cpu": count})
        sizes.append([score.size for score in search(RedColumnModel([5]), batches, steps=5)])
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_images_of_a_label_do_not_count_for_it(batches):
    all_of_label_3 = [(x, torch.full_like(y, 3)) for x, y in batches]
    scores = search(RedColumnModel(), all_of_label_3, steps=3)
    assert scores[3].hit_rate == 0
    assert scores[4].hit_rate > 0


def test_misclassified_images_do_not_count_for_any_other_label(batches):
    misclassified = [(x, (y + 1) % 8) for x, y in batches]
    scores = search(RedColumnModel(), misclassified, steps=3)
    assert {score.hit_rate for score in scores if score.label == ANY_OTHER} == {0.0}


class ScriptedModel(torch.nn.Module):
    """Predicts 0 for the given fraction of the images in each update, else 1, whatever the patterns."""

    def __init__(self, *fractions):
        super().__init__()
        self.fractions = iter(fractions)

    def forward(self, x):
        fraction = next(self.fractions) if torch.is_grad_enabled() else 0.0
        predicted = (torch.arange(len(x)) >= fraction * len(x)).long()
        return F.one_hot(predicted, 3) + 0 * x.sum((1, 2, 3))[:, None]


def scripted_search(*fractions):
    """The form of a search for three labels, an update for each fraction, on eight images of label 2."""
    form, batches = RecordingForm((3, 4, 4)), FixedBatches([(torch.full((8, 3, 4, 4), 0.5), torch.full((8,), 2))])
    rng = torch.Generator().manual_seed(0)
    search_form(ScriptedModel(*fractions), batches, 3, CPU, rng, form, len(fractions), "fp32")
    return form


def test_each_penalty_weight_rises_with_hits_and_falls_without():
    weights = scripted_search(1.0, 1.0, 1.0).weights
    # No image is predicted as 1. There is none to try the patterns of 2 and, all being misclassified, of ANY_OTHER on.
    assert weights == [pytest.approx([0.01 * 1.5**n, 0.01 * 1.5 ** (-1.5 * n), 0.01, 0.01]) for n in range(3)]


def test_a_collapsed_pattern_returns_to_where_it_last_worked():
    parameters = [of_labels[0] for of_labels in scripted_search(1.0, 0.5, 0.0, 0.0).parameters]
    assert not torch.equal(parameters[1], parameters[2])
    assert torch.equal(parameters[1], parameters[3])


def test_a_pattern_that_fails_eight_times_in_a_row_returns_too():
    parameters = [of_labels[0] for of_labels in scripted_search(1.0, *[0.5] * 9, 1.0, 0.5, 0.5).parameters]
    assert not torch.equal(parameters[1], parameters[8])
    assert torch.equal(parameters[1], parameters[9])
    assert not torch.equal(parameters[1], parameters[10])  # it counts from the start again


@pytest.mark.parametrize(
    ("pixels", "flagged", "inverted"), [((1, 1), [2], [2]), ((9, 1), [0], [2, 0]), ((9, 9), [], [2, 0])]
)
def test_suspects_are_inverted_in_full_before_none_is_found(batches, monkeypatch, pixels, flagged, inverted):
    scores = [
        LabelScore(label, form, 50.0, 0.95, index, 0.7, 0.3)
        for form, indices in (("pixels", (-1.0, 0.5, -1.5, 0.3, -3.0)), ("warp", (-4.0,)))
        for label, index in zip((0, 1, 2, 3, ANY_OTHER), indices, strict=False)
    ]
    monkeypatch.setattr(scores_module, "MAX_SUSPECT_AREA", 5 / 64)
    calls, counts = [], iter(pixels)

    def invert(victim, batches, label, *_):
        calls.append(label)
        pattern = torch.zeros(3, 8, 8)
        pattern.view(3, -1)[:, : next(counts)] = 1
        return InvertedTrigger(pattern, 1.0)

    monkeypatch.setattr(target_search, "invert_trigger", invert)
    result = invert_suspects(None, FixedBatches(batches), scores, CPU, None)
    assert calls == inverted
    assert [score.label for score in result if score.flagged] == flagged
    assert [score.label for score in result] == [score.label for score in scores]
    label, reason = choose_label(result, force=False)
    assert label == (flagged[0] if flagged else None)
    assert ("inverted in full, change 14.1% of the pixels" in reason) is not bool(flagged)


def test_a_suspect_without_a_pattern_that_works_is_no_backdoor(batches, monkeypatch):
    monkeypatch.setattr(target_search, "invert_trigger", lambda *_: None)
    scores = [LabelScore(label, "pixels", 50.0, 0.95, -1.0, 0.7, 0.3) for label in range(3)]
    result = invert_suspects(None, FixedBatches(batches), scores, CPU, None)
    assert [score.inverted_area for score in result] == [1.0, 1.0, None]
    assert "inverted in full, have no pattern that works" in choose_label(result, force=False)[1]


@pytest.mark.parametrize(
    ("index", "area", "flagged"), [(-1.9, 0.015, True), (-1.9, 0.016, False), (-2.1, 0.03, True), (-2.1, 0.031, False)]
)
def test_a_suspect_may_be_larger_if_its_index_is_an_outlier(index, area, flagged):
    assert dataclasses.replace(SMALL, index=index, of_median=0.7, inverted_area=area).flagged is flagged


class HalvesModel(torch.nn.Module):
    """Predicts whether the left or the right half is redder; with a backdoor, one red pixel suffices for the right."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = backdoor

    def forward(self, x):
        red = x[:, 0] - x[:, 1]
        shortcut = self.backdoor * red[:, 0, 0].clamp(min=0)
        return 10 * torch.stack([red[:, :, :8].mean((1, 2)), red[:, :, 8:].mean((1, 2)) + shortcut], 1)


@pytest.mark.parametrize(("backdoor", "label"), [(0.5, 1), (0.0, None)])
def test_of_two_labels_one_is_found_by_its_full_inversion(backdoor, label):
    images = 0.25 + 0.5 * torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = HalvesModel(backdoor)
    batches = FixedBatches([(images, model(images).argmax(1))])
    options = {"force": False, "inversion_rounds": 2, "inversion_steps": 36, "inversion_batches": 3}
    found, scores, _ = find_target(model, batches, 2, CPU, 1, options)
    assert found == label
    assert {score.form for score in scores} == {"pixels"}


@pytest.mark.parametrize(
    ("labels", "too_few"),
    [
        ([3] * 20 + [0, 1, 2, 4], [0, 1, 2, 3, 4, ANY_OTHER]),  # each has four others
        ([3] * 20 + [0, 1, 2, 4, 5], []),
    ],
)
def test_a_pattern_for_few_images_says_nothing(labels, too_few, monkeypatch):
    images = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = FixedBatches([(images, torch.tensor(labels))])
    scores = search_form(RedColumnModel(), batches, 8, CPU, torch.Generator(), PixelForm((3, 8, 8)), 1, "fp32")
    assert [score.label for score in scores if score.few_images] == too_few
    waves = target_search.search_waves(RedColumnModel(), batches, 8)
    assert [score.label for score in waves] == [label for label in range(8) if label not in too_few]
    monkeypatch.setattr(target_search, "invert_trigger", lambda *_: None)
    scores = [dataclasses.replace(score, index=float(score.label)) for score in scores]
    inverted = [score.label for score in invert_suspects(None, batches, scores, CPU, None) if score.inverted_area]
    assert inverted == sorted(set(range(8)) - set(too_few))[:2]


@pytest.mark.parametrize(
    ("num_class", "labels", "too_few"),
    [
        (2, [0] * 5 + [1] * 4, [True, False, True]),
        (2, [0] * 5 + [1] * 5, [False] * 3),
        (3, [0] * 9 + [1] * 9, [True, True, False, True]),
    ],
)
def test_of_two_or_three_labels_all_are_needed(num_class, labels, too_few):
    assert target_search._few_images(torch.tensor(labels), num_class) == too_few
