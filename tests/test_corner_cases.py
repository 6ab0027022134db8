"""Rare inputs: erring models, constant predictors, dropout, odd counts, runs that have no result."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FixedBatches, state_vector
from test_comparison import make_metrics, make_row
from test_last_layer import FixedFeatures
from test_unusual_networks import CPU, IMAGES, LABELS, QUICK, Flat
from test_weak_models import WEAK
from torch import nn

import config
import main
from attacks import Attack, build_attack
from attacks.retune import retune
from data_loader import get_retuning_batches
from defenses import is_purified, purify
from defenses.inversion import InvertedTrigger, choose_label
from defenses.last_layer import trigger_directions
from defenses.nc import trigger_fraction
from utils.batches import Batches
from utils.datasets import ImageSet
from utils.errors import RunError
from utils.progress import Stopwatch
from utils.reporting.comparison import comparison_tables, comparison_text


class Erring(nn.Module):
    """Reads the label from a pixel, and predicts 1 where another pixel has at least `threshold`."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, x):
        triggered = x[:, 0, -1, -1] >= self.threshold
        return F.one_hot(torch.where(triggered, 1, x[:, 0, 0, 0].round().long()), 2).float()


@pytest.mark.parametrize(("threshold", "expected"), [(2.0, True), (1.0, False)])
def test_errors_that_need_no_trigger_do_not_count_as_the_backdoor(threshold, expected):
    images, pattern = torch.zeros(20, 3, 4, 4), torch.zeros(3, 4, 4)
    images[:6, 0, 0, 0], pattern[0, -1, -1] = 1.0, 1.0  # 6 of 20 images of label 0 are taken for label 1 anyway
    batches, trigger = FixedBatches([(images, torch.zeros(20, dtype=torch.int64))]), InvertedTrigger(pattern, 1.0)
    assert trigger.excess_on(Erring(threshold), Erring(1.0), batches, 1) == pytest.approx(0.0 if expected else 0.7)
    assert is_purified(Erring(threshold), Erring(1.0), {1: trigger}, batches) is expected
    assert is_purified(Erring(threshold), Erring(1.0), {}, batches) is None
    always = Erring(-1.0)  # predicts 1 for every image, with the trigger or without
    assert is_purified(always, Erring(1.0), {1: trigger}, batches) is False


def test_a_model_that_always_predicts_one_class_is_weak_and_not_backdoored():
    constant = replace(WEAK, weak_floor=1.0, size=1e-6, of_range=0.0, of_median=0.0, index=-20.0, hit_rate=1.0)
    assert constant.flagged is False
    label, reason = choose_label([constant], False)
    assert label is None
    assert "so weak that this says little" in reason


class Dropout(Flat):
    def forward(self, x):
        return self.fc(F.dropout(torch.cat([self.conv(x).relu().flatten(1), x.flatten(1)], 1), 0.5, self.training))


def test_the_seed_draws_the_dropout_and_nothing_else_is_seeded():
    torch.manual_seed(0)
    model, results = Dropout(), []
    for seed in (1, 1, 2):
        torch.manual_seed(10 + len(results))
        expected = torch.rand(1, generator=torch.Generator().manual_seed(10 + len(results)))
        results.append(state_vector(purify(model, IMAGES, LABELS, defense="ft", seed=seed, **QUICK).model))
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_retuning_has_the_same_dropout_for_every_model():
    torch.manual_seed(0)
    model = Dropout()
    data = ImageSet((255 * IMAGES.permute(0, 2, 3, 1)).byte(), LABELS, ["a", "b", "c"])
    batches = Batches(data, 8, CPU, shuffle=True, rng=torch.Generator().manual_seed(3))
    first, second = (state_vector(retune(model, batches, CPU)) for _ in range(2))
    assert torch.equal(first, second)


def test_retuning_ends_with_no_batch_of_one_image_and_counts_a_number_once():
    images = torch.zeros(4000, 8, 8, 3, dtype=torch.uint8)
    train_set, attack = (
        ImageSet(images, torch.arange(4000) % 3, ["a", "b", "c"]),
        Attack("gridTrigger", "all2one", 1, 3, 0.1),
    )
    opt, _ = config.parse("main.py", ["--retune", "61", "61", "62"])
    draws = get_retuning_batches(opt, train_set, attack, CPU)
    assert {count: len(batches) for count, batches in draws.items()} == {61: 3, 62: 3}
    assert [len(next(iter(reversed([*draws[count][0]])))[1]) for count in (61, 62)] == [64, 2]


def test_small_batches_have_the_trigger_too():
    assert trigger_fraction(torch.zeros(2, 3, 2, 2), lambda images: images + 1).mean() == 0.5


def test_directions_in_which_nothing_moves_are_none():
    model, pattern = FixedFeatures([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]), torch.zeros(1, 3, 1, 1)
    pattern[0, 0] = 0.5
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) / 2
    found = trigger_directions(model, pattern, [(images, torch.zeros(8, dtype=torch.int64))], 1)
    assert found.abs().tolist() == [[pytest.approx(1.0), pytest.approx(0.0), pytest.approx(0.0)]]


def test_every_run_of_a_comparison_measures_the_same_trigger():
    words = ["--model", "a.tar", "--trigger_type", "randomPixelTrigger", "--seeds", "1", "2"]
    opt, _ = config.parse("main.py", words)
    runs = [options for _, options in main.planned_runs(opt, "x").values()]
    assert [options.seed for options in runs] == [1, 2]
    first, second = (build_attack(options, 10, (8, 8)).tensors for options in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_comparison_lacks_is_said():
    def row(victim, name, seed, purified=True):
        return make_row(victim, name, make_metrics(86.0, 1.0)) | {"seed": seed, "purified": purified}

    rows = [row("one", "mcl", 1), row("one", "nc", 1, purified=False), row("one", "nc", 2), row("one", "ft", 1)]
    rows += [row("one", "ft", 2)]
    planned = [("one", name) for name in ("mcl", "nc", "ft", "nad") for _ in range(2)]
    ((_, _, cells),) = comparison_tables(rows, planned, "<{}>".format)
    names = ["none", "mcl (no result in 1 of 2)", "nc (inverted trigger still works in 1 of 2)", "ft"]
    names += ["nad (no result in 2 of 2)"]
    assert [line[0] for line in cells] == names
    assert [line[1].startswith("<") for line in cells] == [False, False, False, True, False]
    text = comparison_text([*rows, row("two", "ft", 1)], [*planned, ("two", "ft"), ("two", "ft")])
    assert "one, mcl: (no result in 1 of 2)" in text
    assert "two, ft: (no result in 1 of 2)" in text


def test_numbers_of_numpy_and_of_text_are_taken_and_momenta_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.Flatten(), nn.Linear(144, 3))
    result = purify(model, IMAGES, LABELS, defense="ft", epochs="1", device="cpu")
    assert [module.momentum for module in result.model.modules() if isinstance(module, nn.BatchNorm2d)] == [0.01]
    with pytest.raises(RunError, match="no pattern turns"):
        steps = {"inversion_steps": 1, "inversion_batches": 1, "inversion_rounds": 1}
        purify(model, IMAGES, LABELS, target=np.int64(1), **steps, **QUICK)


def test_a_stage_that_fails_has_its_time_too():
    clock = Stopwatch()
    with pytest.raises(ZeroDivisionError), clock("inversion"):
        _ = 1 / 0
    assert clock.seconds.keys() == {"inversion"}
