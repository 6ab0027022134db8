"""A model whose attack nobody knows: what is not known is not measured, drawn or saved."""

import json

import pytest
import torch
from conftest import ROOT

from attacks import UnknownAttack
from data_loader import get_eval_set
from utils.metrics import evaluate

DEFENSE = ("--dataset", "shapes", "--device", "cpu", "--ratio", 0.128, "--print_freq", 0)
QUICK = ("--target", 5, "--inversion_rounds", 1, "--rounds", 1, "--finetune_epochs", 1, "--epochs", 1)


@pytest.fixture(scope="module")
def unknown(script, tmp_path_factory):
    """The folder of a run on a bare state_dict, and its output."""
    folder = tmp_path_factory.mktemp("unknown")
    shipped = torch.load(ROOT / "weight" / "shapes" / "WRN-16-1-badnet.pth.tar", weights_only=True)
    torch.save(shipped["state_dict"], folder / "bare.pth")
    words = ("--model", folder / "bare.pth", "--checkpoint_root", folder, "--log_root", folder, "--name", "x")
    done = script("main.py", *DEFENSE, *QUICK, *words)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_nothing_is_measured_of_an_unknown_attack():
    images = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
    attack = UnknownAttack(3)
    eval_set = get_eval_set(images, torch.arange(6) % 3, attack, "cpu")
    metrics = evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), eval_set, attack)
    assert metrics["acc"] == pytest.approx(100 / 3)
    assert all(metrics[name] != metrics[name] for name in ("asr", "ra", "floor", "acc_published"))  # nan


def test_what_is_not_known_is_null(unknown):
    folder, output = unknown
    metrics = json.loads((folder / "x" / "metrics.json").read_text())
    for model in ("before", "after"):
        assert metrics[model]["acc"] > 99
        assert [metrics[model][name] for name in ("asr", "ra", "floor", "acc_published")] == [None] * 4
    assert metrics["target_label"] is None
    assert [metrics["config"][name] for name in ("trigger_type", "target_type", "target_label")] == [None] * 3
    assert metrics["inverted_hit_rate"]["before"] > 90
    assert metrics["inverted_hit_rate"]["after"] < 10
    assert metrics["purified"] is True
    assert "gridTrigger" not in output + (folder / "x" / "report.html").read_text()
    assert "the inverted trigger works on " in output.splitlines()[-1]


def test_only_the_inverted_trigger_is_drawn(unknown):
    folder, _ = unknown
    assert (folder / "x" / "trigger.png").exists()
    assert not (folder / "x" / "features.png").exists()


def test_the_purified_model_is_of_an_unknown_attack_too(script, unknown):
    folder, _ = unknown
    assert torch.load(folder / "x.tar", weights_only=True)["attack"] is None
    words = ("--dataset", "shapes", "--model", folder / "x.tar", "--defense", "none", "--log_root", folder)
    done = script("main.py", *words, "--name", "again")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "again" / "metrics.json").read_text())["before"]["asr"] is None
    stated = script("main.py", *words, "--name", "stated", "--trigger_type", "gridTrigger")
    assert stated.returncode == 0, stated.stderr
    assert json.loads((folder / "stated" / "metrics.json").read_text())["before"]["asr"] < 5


def test_retuning_needs_the_trigger(script, unknown):
    folder, _ = unknown
    words = ("--model", folder / "bare.pth", "--log_root", folder, "--name", "refused", "--retune", 5)
    done = script("main.py", "--dataset", "shapes", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "state the trigger with --trigger_type" in done.stderr
    assert not (folder / "refused").exists()
