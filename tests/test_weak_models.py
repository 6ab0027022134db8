"""The target search on models that have hardly learned anything."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches
from test_flagged_labels import SMALL

from defenses import find_target
from defenses.inversion import choose_label, search_target, target_search
from utils.seed import generator

WEAK = replace(SMALL, weak_floor=0.287)
BUDGET = {"inversion_rounds": 1, "inversion_steps": 1, "inversion_batches": 1}


class LeaningModel(torch.nn.Module):
    """Predicts the label that is drawn in the image's first pixel, or 0 where the second pixel is bright."""

    def __init__(self, num_class):
        super().__init__()
        self.num_class = num_class

    def forward(self, x):
        drawn = F.one_hot((x[:, 0, 0, 0] * self.num_class).long().clamp(max=self.num_class - 1), self.num_class)
        leaning = F.one_hot(torch.zeros(len(x), dtype=torch.int64), self.num_class)
        return torch.where(x[:, :1, 0, 1] > 0.5, leaning, drawn).float() + 0 * x.sum((1, 2, 3))[:, None]


def leaning_batches(num_class, leaning):
    """One batch of 50 images a label; of each label, the fraction `leaning` is predicted as 0."""
    labels = torch.arange(num_class).repeat_interleave(50)
    images = torch.zeros(len(labels), 3, 4, 4)
    images[:, 0, 0, 0] = (labels + 0.5) / num_class
    images[:, 0, 0, 1] = (torch.arange(len(labels)) % 50 < 50 * leaning).float()
    return FixedBatches([(images, labels)])


@pytest.mark.parametrize(
    ("num_class", "leaning", "weak"),
    [(10, 0.12, False), (10, 0.14, True), (3, 0.32, False), (3, 0.34, True), (20, 0.12, False), (20, 0.16, True)],
)
def test_a_model_that_leans_to_one_label_is_weak(num_class, leaning, weak, monkeypatch):
    monkeypatch.setattr(target_search, "PATTERNS_PER_FORWARD", {"cpu": 21})  # faster for a model as small as this
    batches = leaning_batches(num_class, leaning)
    scores = search_target(LeaningModel(num_class), batches, num_class, CPU, generator(0, "search"), steps=1)
    (floor,) = {score.weak_floor for score in scores if score.form == "pixels"}
    assert floor == (pytest.approx(leaning) if weak else None)
    assert ({score.form for score in scores} == {"pixels"}) == weak


def test_of_a_weak_model_half_the_size_counts():
    assert replace(WEAK, of_range=0.0075).flagged
    assert not replace(WEAK, of_range=0.0076).flagged
    assert WEAK.metadata()["weak_floor"] == pytest.approx(28.7)


def test_a_search_of_a_weak_model_says_so():
    label, reason = choose_label([WEAK], False)
    assert label is None
    assert reason == (
        "no backdoor was found: no label has a far smaller pattern than the others; but the model predicts one label "
        "for 29% of the images of the others, and is so weak that this says little (does --normalize fit the model?); "
        "the model is left unchanged"
    )


def test_no_suspect_of_a_weak_model_is_inverted(monkeypatch):
    module, inverted = sys.modules["defenses.purify"], []
    monkeypatch.setattr(module, "invert_suspects", lambda victim, batches, scores, *_: inverted.append(1) or scores)
    for score in (WEAK, replace(WEAK, weak_floor=None, index=0.0)):
        monkeypatch.setattr(module, "search_target", lambda *_, score=score, **__: [score])
        assert find_target(None, None, 10, CPU, 1, {**BUDGET, "force": False})[0] is None
    assert inverted == [1]


def test_a_model_that_always_predicts_one_class_is_weak_and_not_backdoored():
    constant = replace(WEAK, weak_floor=1.0, size=1e-6, of_range=0.0, of_median=0.0, index=-20.0, hit_rate=1.0)
    assert constant.flagged is False
    label, reason = choose_label([constant], False)
    assert label is None
    assert "so weak that this says little" in reason


def test_one_class_that_is_taken_for_another_makes_no_model_weak():
    labels = torch.tensor([3] * 60 + [0, 1, 2, 4, 5, 6, 7, 8, 9] * 5)
    dogs, others = labels.clone(), labels.clone()
    dogs[:20] = 5  # a fifth of all images of other labels than 5
    others[:7] = others[60:67] = 5
    assert target_search._weak_floor(labels, dogs, 10) is None
    assert target_search._weak_floor(labels, others, 10) == pytest.approx(13 / 100)
    assert target_search._weak_floor(labels.clamp(max=1), (labels.clamp(max=1) + 1) % 2, 2) == 1
