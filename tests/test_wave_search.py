"""Single low waves of brightness: tried on every image, compared between labels."""

import dataclasses
import math

import pytest
import torch
from conftest import FixedBatches

from defenses.inversion import choose_label, target_search
from defenses.inversion.objective import pattern_logits
from defenses.inversion.patterns import WAVE_HEIGHT
from defenses.inversion.scores import LabelScore
from defenses.inversion.target_search import search_waves


class WaveModel(torch.nn.Module):
    """Predicts 2 on images with a wave of two cycles across, 1 on half of those with four down, 3 on those with seven.

    Without a wave: 0 for dark images, 4 for bright ones.
    """

    def forward(self, x):
        spectra = [torch.fft.fft(x.mean((1, axis))).abs() / 8 for axis in (2, 3)]
        across, down, fine = spectra[0][:, 2], spectra[1][:, 4], spectra[0][:, 7]
        is_bright, is_odd = x.mean((1, 2, 3)) > 0.5, (x[:, 0, 0, 0] * 1000).round() % 2
        return torch.stack([0.05 * ~is_bright, down * is_odd, across, fine, 0.05 * is_bright], 1)


@pytest.fixture(autouse=True)
def one_other_label(monkeypatch):
    """The images here are of one label."""
    monkeypatch.setattr(target_search, "MIN_LABELS", 1)


def test_a_label_is_flagged_by_a_low_wave_that_turns_the_images_into_it():
    rng = torch.Generator().manual_seed(0)
    labels = 4 * (torch.arange(60) % 3 == 0)
    images = 0.48 + 0.01 * labels[:, None, None, None] + 0.01 * torch.rand(60, 3, 16, 16, generator=rng)
    scores = search_waves(WaveModel(), FixedBatches([(images, labels)]), 5)
    assert [score.label for score in scores] == [0, 1, 2, 3, 4]
    assert [score.hit_rate for score in scores] == [0, scores[1].hit_rate, 1, 0, 0]  # seven cycles are not low
    assert 0.3 < scores[1].hit_rate < 0.8
    assert [score.label for score in scores if score.flagged] == [2]
    assert choose_label(scores, False)[0] == 2
    assert scores[2].metadata()["form"] == "wave"


def test_patterns_are_added_and_clamped(victim, batches):
    images, patterns = batches[0][0][:3], torch.stack([torch.full((3, 8, 8), value) for value in (0.7, -0.4)])
    expected = torch.stack([victim((images + pattern).clamp(0, 1)) for pattern in patterns])
    assert torch.allclose(pattern_logits(victim, images, patterns), expected, atol=1e-5)


def test_a_wave_of_six_cycles_is_low():
    position = torch.arange(16) / 16
    low = 0.02 * (2 * math.pi * 6 * position).cos().expand(1, 16, 16)

    class Six(torch.nn.Module):
        def forward(self, x):
            size = torch.fft.fft(x.mean((1, 2))).abs()[:, 6] / 8
            return torch.stack([size, torch.full_like(size, 0.01)], 1)

    images, labels = 0.5 + 0 * low.repeat(60, 3, 1, 1), torch.ones(60, dtype=torch.int64)
    scores = search_waves(Six(), FixedBatches([(images, labels)]), 2)
    assert [(score.label, score.hit_rate) for score in scores] == [(0, 1)]  # of label 1 there are no other images
    assert scores[0].of_range == pytest.approx(WAVE_HEIGHT * 2 / math.pi, rel=0.05)  # the mean height of a sine


def test_a_wave_proves_nothing_if_another_label_has_one_that_works_as_well():
    found = LabelScore(2, "wave", 8.0, 0.95, math.nan, math.nan, 0.08, runner_up=0.6)
    assert found.flagged
    assert found.metadata()["runner_up"] == 60.0
    assert not dataclasses.replace(found, runner_up=0.7).flagged
    images = torch.full((60, 3, 16, 16), 0.48)
    scores = search_waves(WaveModel(), FixedBatches([(images, torch.zeros(60, dtype=torch.int64))]), 5)
    assert [score.label for score in scores] == [1, 2, 3, 4]
    assert [score.runner_up for score in scores] == [1.0, scores[0].hit_rate, 1.0, 1.0]


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
