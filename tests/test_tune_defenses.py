"""docs/tune_defenses.py: the same number of settings for each defense, and the best of them."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, ROOT

import config
from defenses import DefenseResult
from defenses.inversion import ANY_OTHER
from docs import tune_defenses
from docs.tune_defenses import ROUNDS, SETTING, best_of, held_out_images, read_rows, settings_of
from utils.errors import RunError, UserError
from utils.files import write_csv

MEASURED_RATES = {"asr": 1.0, "floor": 1.0, "ra": 60.0}
VICTIM = str(ROOT / "weight" / "shapes" / "WRN-16-1-badnet.pth.tar")


@pytest.mark.parametrize("defense", config.DEFENSES)
def test_each_defense_has_twelve_settings_and_its_recipe_is_among_them(defense):
    settings, recipe = settings_of(defense), config.DEFENSES[defense]
    assert len({tuple(setting.items()) for setting in settings}) * (1 if "schedule" in recipe else len(ROUNDS)) == 12
    assert {"defense": defense} | {part: recipe[part] for part in SETTING[1:] if part in recipe} in settings


def test_the_best_has_the_highest_acc_of_those_without_a_backdoor():
    rows = [{"acc": acc, "asr": asr, "floor": 2.0} for acc, asr in ((90, 3.1), (80, 3.0), (85, 2.5), (70, 0.5))]
    assert best_of(rows)["acc"] == 85
    assert best_of(rows[:1] + [{"acc": 95, "asr": 9.0, "floor": 2.0}])["acc"] == 90
    assert best_of([*rows, {"acc": 95, "asr": math.nan, "floor": math.nan}])["acc"] == 85


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--model", VICTIM, VICTIM], "name one victim"),
        (["--model", VICTIM, "--seeds", "1", "2"], "at most one --seed"),
        (["--model", VICTIM, "--defense", "none"], "defenses to tune"),
        (["--model", VICTIM, "--defense", "ft", "nc", "--target", "10"], "--target 10 is not one of the labels 0..9"),
    ],
)
def test_what_cannot_be_tuned_is_said_before_the_first_setting(words, error, tmp_path, monkeypatch):
    monkeypatch.setattr(tune_defenses, "run_defense", None)
    monkeypatch.setattr(sys, "argv", ["tune_defenses", str(tmp_path / "t.csv"), "--dataset", "shapes", *words])
    with pytest.raises(UserError, match=error):
        tune_defenses.main()


def test_rows_are_read_as_they_were_written(tmp_path):
    path = str(tmp_path / "table.csv")
    assert read_rows(path) == []
    row = {"defense": "ibau", "lr": "0.003", "schedule": "", "epochs": "2"}
    row |= {"acc": 81.25, "asr": 1.5, "floor": 1.0, "ra": 80.0}
    write_csv(path, [row])
    assert read_rows(path) == [row]


def test_held_out_images_are_mirrored_and_not_of_the_clean_split(monkeypatch):
    images = torch.arange(4)[:, None, None, None].expand(4, 2, 2, 3) * 10 + torch.tensor([0, 1])[:, None]
    data = SimpleNamespace(images=images, labels=torch.arange(4))
    monkeypatch.setattr(tune_defenses, "get_eval_set", lambda images, labels, *_: (images, labels))
    mirrored, labels = held_out_images(data, SimpleNamespace(index=torch.tensor([1, 2])), None, CPU)
    assert labels.tolist() == [0, 3]
    assert mirrored[:, 0, :, 0].tolist() == [[1, 0], [31, 30]]


def test_settings_are_run_once_and_those_that_fail_leave_no_row(tmp_path, monkeypatch, capsys):
    table, used = str(tmp_path / "table.csv"), []

    def run_defense(name, context, options, precision):
        assert (precision, context.target) == ("bf16", ANY_OTHER if name == "nc" else None)
        used.append((name, options["lr"], options["schedule"], options["epochs"]))
        if options["lr"] > 0.02:
            raise RunError("not finite")
        rows = [{"epoch": epoch, "acc": 80.0 + epoch} | MEASURED_RATES for epoch in range(1, 6)]
        return DefenseResult("student", rows if name == "ibau" else [], None)

    monkeypatch.setattr(tune_defenses, "run_defense", run_defense)
    monkeypatch.setattr(tune_defenses, "evaluate", lambda *_, **__: {"acc": 70.0} | MEASURED_RATES)
    words = ["--dataset", "shapes", "--clean", "20", "--model", VICTIM, "--device", "cpu", "--defense", "nc", "ibau"]
    monkeypatch.setattr(sys, "argv", ["tune_defenses", table, *words])
    with pytest.raises(UserError, match="the --target of mcl, nc and pam"):
        tune_defenses.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--target", "any", "--precision", "bf16"])
    for _ in range(2):
        tune_defenses.main()
    assert len(used) == 12 + 3 + 4  # the four of nc that failed are tried again
    rows = read_rows(table)
    assert [row["acc"] for row in rows if row["defense"] == "nc"] == [70.0] * 8
    assert [row["acc"] for row in rows if row["defense"] == "ibau"] == [82.0, 83.0, 84.0, 85.0] * 3
    nc, ibau = capsys.readouterr().out.splitlines()[-2:]
    assert nc.split()[:5] == ["nc", "0.00333", "cosine", "10", "70.00"]
    assert ibau.split()[:4] == ["ibau", "0.000333", "5", "85.00"]


def test_a_clean_split_of_all_images_leaves_none_to_measure_on():
    data = SimpleNamespace(labels=torch.zeros(3))
    with pytest.raises(UserError, match="none is left to measure on"):
        held_out_images(data, SimpleNamespace(index=torch.tensor([2, 0, 1])), None, CPU)
