"""Metrics and tables against values worked out by hand."""

import time
from types import SimpleNamespace

import torch

from attacks import Attack
from utils.metrics import accuracy_figures, predict, watcher
from utils.report import Stopwatch, figures_table, published_table

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])


def attack_of(target_type):
    return Attack("gridTrigger", target_type, 2, 3, 0.1)


def test_all2one_by_hand():
    clean = torch.tensor([0, 2, 1, 1, 2, 2, 2, 0])  # wrong: one 0 called 2, one 2 called 0
    triggered = torch.tensor([2, 2, 2, 1])  # of the labels 0, 0, 1, 1
    figures = accuracy_figures(clean, triggered, LABELS, attack_of("all2one"))
    assert figures == {
        "acc": 75.0,  # 6 of 8
        "acc_published": 75.0,  # 3 of the 4 that are not label 2
        "asr": 75.0,  # 3 of 4
        "ra": 25.0,  # 1 of 4
        "floor": 25.0,  # 1 of 4 is called 2 without a trigger
        "per_class": [50.0, 100.0, 75.0],
    }


def test_all2all_counts_every_image_and_wants_the_next_label():
    triggered = torch.tensor([1, 1, 2, 1, 0, 0, 2, 1])  # wanted: 1 1 2 2 0 0 0 0
    figures = accuracy_figures(LABELS, triggered, LABELS, attack_of("all2all"))
    assert figures["asr"] == 62.5
    assert figures["ra"] == 25.0
    assert figures["acc_published"] == figures["acc"] == 100.0
    assert figures["floor"] == 0.0


def test_published_accuracy_leaves_the_target_out():
    clean = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    figures = accuracy_figures(clean, LABELS[:4], LABELS, attack_of("all2one"))
    assert (figures["acc"], figures["acc_published"]) == (50.0, 100.0)


class Brightest(torch.nn.Module):
    """Answers with the brightest channel, and insists on being measured in eval mode."""

    def forward(self, x):
        assert not self.training
        return x.mean((2, 3))


def test_predictions_come_in_order():
    images = torch.zeros(5, 3, 2, 2)
    for i, channel in enumerate((2, 0, 1, 1, 0)):
        images[i, channel] = 1
    batches = [(images[:3], None), (images[3:], None)]
    assert predict(Brightest().train(), batches).tolist() == [2, 0, 1, 1, 0]


def test_watching_happens_every_so_many_epochs():
    assert watcher(None, None, 0)(None, 1) == {}
    assert watcher(None, None, 3)(None, 4) == {}


def test_what_is_watched_is_logged_too():
    images, labels = torch.zeros(3, 3, 2, 2), torch.tensor([0, 1, 2])
    test = SimpleNamespace(clean=[(images, labels)], triggered=[(images[:2], labels[:2])], labels=labels)
    logged = []
    watch = watcher(test, attack_of("all2one"), 2, lambda *what: logged.append(what))
    rows = [watch(Brightest(), epoch) for epoch in (1, 2)]
    assert rows[0] == {}
    assert set(rows[1]) == {"acc", "acc_published", "asr", "ra"}
    assert logged == [(rows[1], 2)]


def test_tables_hold_the_figures_under_their_names():
    before = {"acc": 1.0, "acc_published": 2.0, "asr": 3.0, "ra": 4.0, "floor": 5.0, "per_class": [6.0, 7.0]}
    after = {"acc": 11.0, "acc_published": 12.5, "asr": 13.0, "ra": 14.0, "floor": 15.0, "per_class": [16.0, 17.0]}
    header, _, row = published_table("shapes", before, after).splitlines()
    assert header.split("  ")[0] == "Dataset"
    assert "MCLDef ASR" in header
    assert "nad ASR" in published_table("shapes", before, after, "nad")
    assert row.split() == ["shapes", "2.00", "3.00", "12.50", "13.00", "11.00", "14.00"]
    assert [line.split()[-3:] for line in figures_table(["cat", "dog"], before, after).splitlines()][3] == [
        "2.00",
        "12.50",
        "+10.50",
    ]
    assert "1 dog" in figures_table(["cat", "dog"], before)
    assert figures_table(["cat"], before, after).splitlines()[-1].split() == ["0", "cat", "6.00", "16.00", "+10.00"]


def test_stopwatch_adds_up_a_part():
    clock = Stopwatch()
    for _ in range(2):
        with clock("data"), clock("inside"):
            time.sleep(0.05)
    assert set(clock.read()) == {"data", "inside", "total"}
    read = clock.read()
    assert 0 <= read["data"] < 0.05
    assert 0.1 <= read["inside"] <= read["total"]
