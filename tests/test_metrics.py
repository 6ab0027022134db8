"""Metrics, tables and the verdict against values worked out by hand."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from attacks import Attack
from utils.metrics import compute_metrics, make_monitor, predict
from utils.progress import Stopwatch
from utils.reporting.tables import METRICS, is_backdoored, metrics_table, published_rows, text_table, verdict

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
BEFORE = {"acc": 1.0, "acc_published": 2.0, "asr": 3.0, "ra": 4.0, "floor": 5.0, "per_class": [6.0, 7.0]}
AFTER = {"acc": 11.0, "acc_published": 12.5, "asr": 13.0, "ra": 14.0, "floor": 15.0, "per_class": [16.0, 17.0]}


def make_attack(target_type):
    return Attack("gridTrigger", target_type, 2, 3, 0.1)


def test_metrics_of_all2one():
    clean = torch.tensor([0, 2, 1, 1, 2, 2, 2, 0])  # wrong: a 0 predicted as 2, a 2 predicted as 0
    triggered = torch.tensor([2, 2, 2, 1])  # of the labels 0, 0, 1, 1
    metrics = compute_metrics(clean, triggered, LABELS, make_attack("all2one"))
    assert metrics == {
        "acc": 75.0,  # 6 of 8
        "acc_published": 75.0,  # 3 of the 4 that are not label 2
        "asr": 75.0,  # 3 of 4
        "ra": 25.0,  # 1 of 4
        "floor": 25.0,  # 1 of 4 is predicted as 2 without a trigger
        "per_class": [50.0, 100.0, 75.0],
    }
    assert set(METRICS) | {"per_class"} == set(metrics)


def test_all2all_counts_every_image_with_the_next_label_as_its_target():
    triggered = torch.tensor([1, 1, 2, 1, 0, 0, 2, 1])  # attack labels: 1 1 2 2 0 0 0 0
    metrics = compute_metrics(LABELS, triggered, LABELS, make_attack("all2all"))
    assert metrics["asr"] == 62.5
    assert metrics["ra"] == 25.0
    assert metrics["acc_published"] == metrics["acc"] == 100.0
    assert metrics["floor"] == 0.0


def test_published_accuracy_leaves_out_the_target_class():
    clean = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    metrics = compute_metrics(clean, LABELS[:4], LABELS, make_attack("all2one"))
    assert (metrics["acc"], metrics["acc_published"]) == (50.0, 100.0)


class Brightest(torch.nn.Module):
    """Predicts the brightest channel; fails outside eval mode."""

    def forward(self, x):
        assert not self.training
        return x.mean((2, 3))


def test_predictions_keep_the_order_of_the_images():
    images = torch.zeros(5, 3, 2, 2)
    for i, channel in enumerate((2, 0, 1, 1, 0)):
        images[i, channel] = 1
    batches = [(images[:3], None), (images[3:], None)]
    assert predict(Brightest().train(), batches).tolist() == [2, 0, 1, 1, 0]


def test_a_monitor_measures_only_every_so_many_epochs():
    assert make_monitor(None, None, 0)(None, 1) == {}
    assert make_monitor(None, None, 3)(None, 4) == {}


def test_a_monitor_logs_what_it_returns():
    images, labels = torch.zeros(3, 3, 2, 2), torch.tensor([0, 1, 2])
    eval_set = SimpleNamespace(clean=[(images, labels)], triggered=[(images[:2], labels[:2])], labels=labels)
    logged = []
    monitor = make_monitor(eval_set, make_attack("all2one"), 2, lambda *call: logged.append(call))
    rows = [monitor(Brightest(), epoch) for epoch in (1, 2)]
    assert rows[0] == {}
    assert set(rows[1]) == {"acc", "acc_published", "asr", "ra"}
    assert logged == [(rows[1], 2)]


def test_tables_hold_the_metrics_under_their_labels():
    header, _, row = text_table(*published_rows("shapes", BEFORE, AFTER)).splitlines()
    columns = ["Dataset", "Baseline ACC*", "Baseline ASR", "MCLDef ACC*", "MCLDef ASR", "ACC", "RA"]
    assert [column.strip() for column in header.split("  ") if column.strip()] == columns
    assert "nad ASR" in text_table(*published_rows("shapes", BEFORE, AFTER, "nad"))
    assert row.split() == ["shapes", "2.00", "3.00", "12.50", "13.00", "11.00", "14.00"]
    assert text_table(*published_rows("shapes", BEFORE)).splitlines()[2].split() == [
        "shapes",
        "2.00",
        "3.00",
        "1.00",
        "4.00",
    ]
    lines = metrics_table(["cat", "dog"], BEFORE, AFTER).splitlines()
    assert lines[3].split()[-3:] == ["2.00", "12.50", "+10.50"]
    assert all(meaning in line for (_, meaning), line in zip(METRICS.values(), lines[2:], strict=False))
    assert "1 dog" in metrics_table(["cat", "dog"], BEFORE)
    assert metrics_table(["cat"], BEFORE, AFTER).splitlines()[-1].split() == ["0", "cat", "6.00", "16.00", "+10.00"]


def test_missing_values_are_a_dash():
    assert text_table(["x", "y"], [["a", None], ["b", math.nan]]).splitlines()[2:] == ["a  -", "b  -"]
    unknown = {**BEFORE, "asr": None, "per_class": [math.nan, 7.0]}
    lines = metrics_table(["cat", "dog"], unknown, AFTER).splitlines()
    assert lines[4].split()[-3:] == ["-", "13.00", "-"]
    assert lines[7].split() == ["0", "cat", "-", "16.00", "-"]


@pytest.mark.parametrize(
    ("asr", "floor", "expected"),
    [(2.5, 1.5, False), (2.51, 1.5, True), (0.0, 3.0, False), (None, 1.0, None), (5.0, math.nan, None)],
)
def test_an_asr_above_the_floor_is_a_backdoor(asr, floor, expected):
    assert is_backdoored({"asr": asr, "floor": floor}) is expected


def outcome(acc, asr, floor=1.5):
    return {"acc": acc, "asr": asr, "floor": floor}


VICTIM, CLEAN, UNKNOWN = outcome(86.92, 100.0, 2.0), outcome(88.0, 1.0), outcome(86.92, None, None)
RUN = {"before": VICTIM, "after": outcome(86.49, 1.3), "defense": "mcl", "target_label": 5}
FLOOR, VICTIM_FLOOR = "floor 1.50 %", "floor 2.00 %"
NO_EFFECT = "This trigger works neither before nor after"
LEFT = "No backdoor was found, and the model is left unchanged"
TURNS, IMAGES = "the inverted trigger works on 99.00 ->", "0 % of the images"
LOSS = "That is a loss of 3.01 points of ACC."
NOT_MEASURED = "ASR was not measured, because the trigger is unknown"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, f"The backdoor is gone: ASR 100.00 -> 1.30 %, {FLOOR}, ACC 86.92 -> 86.49 %."),
        (
            {"after": outcome(86.0, 30.0)},
            f"The backdoor is still there: ASR 100.00 -> 30.00 %, {FLOOR}, ACC 86.92 -> 86.00 %.",
        ),
        (
            {"after": outcome(83.91, 1.3)},
            f"The backdoor is gone: ASR 100.00 -> 1.30 %, {FLOOR}, ACC 86.92 -> 83.91 %. {LOSS}",
        ),
        (
            {"before": UNKNOWN, "after": outcome(83.91, None)},
            f"The model was purified; {NOT_MEASURED}; ACC 86.92 -> 83.91 %. {LOSS}",
        ),
        ({"before": CLEAN}, f"{NO_EFFECT}: ASR 1.00 -> 1.30 %, {FLOOR}, ACC 88.00 -> 86.49 %."),
        (
            {"before": CLEAN, "inverted_hit_rate": {"before": 99.0, "after": 1.0}, "purified": True},
            f"{NO_EFFECT}: ASR 1.00 -> 1.30 %, {FLOOR}, ACC 88.00 -> 86.49 %; {TURNS} 1.0{IMAGES}.",
        ),
        ({"before": CLEAN, "after": None}, f"{LEFT}: ASR 1.00 %, {FLOOR}, ACC 88.00 %."),
        ({"after": None}, f"{LEFT}, although the trigger works: ASR 100.00 %, {VICTIM_FLOOR}, ACC 86.92 %."),
        ({"after": None, "defense": "none"}, f"The model is backdoored: ASR 100.00 %, {VICTIM_FLOOR}, ACC 86.92 %."),
        (
            {"before": CLEAN, "after": None, "defense": "none"},
            f"This trigger does not work: ASR 1.00 %, {FLOOR}, ACC 88.00 %.",
        ),
        (
            {"before": UNKNOWN, "after": outcome(86.49, math.nan, math.nan)},
            f"The model was purified; {NOT_MEASURED}; ACC 86.92 -> 86.49 %.",
        ),
        (
            {"inverted_hit_rate": {"before": 99.0, "after": 60.0}, "purified": False},
            f"The backdoor is still there: ASR 100.00 -> 1.30 %, {FLOOR}, ACC 86.92 -> 86.49 %; {TURNS} 60.0{IMAGES}.",
        ),
        (
            {"inverted_hit_rate": {"before": 99.0, "after": 1.0}, "purified": True, "before": UNKNOWN}
            | {"after": outcome(86.49, None)},
            f"The model was purified; {TURNS} 1.0{IMAGES}; {NOT_MEASURED}; ACC 86.92 -> 86.49 %.",
        ),
        ({"before": UNKNOWN, "after": None}, f"{LEFT}; {NOT_MEASURED}; ACC 86.92 %."),
    ],
)
def test_the_verdict_of_a_defense(changes, sentence):
    assert verdict({**RUN, **changes}) == sentence


@pytest.mark.parametrize(
    ("victim", "sentence"),
    [
        (VICTIM, f"The victim is backdoored: ASR 100.00 %, {VICTIM_FLOOR}, ACC 86.92 %."),
        (CLEAN, f"This trigger does not work: ASR 1.00 %, {FLOOR}, ACC 88.00 %."),
        (UNKNOWN, f"The victim was measured; {NOT_MEASURED}; ACC 86.92 %."),
    ],
)
def test_the_verdict_of_a_training(victim, sentence):
    assert verdict({"victim": victim, "target_label": 5}) == sentence


def test_stopwatch_adds_up_a_stage():
    clock = Stopwatch()
    for _ in range(2):
        with clock("data"), clock("inside"):
            time.sleep(0.05)
    assert set(clock.read()) == {"data", "inside", "total"}
    seconds = clock.read()
    assert 0 <= seconds["data"] < 0.05
    assert 0.1 <= seconds["inside"] <= seconds["total"]
