"""Both scripts as users run them: a victim trained on shapes, purified, saved, measured again."""

import csv
import json
import os
import shlex
import shutil

import pytest
import torch
from conftest import ROOT
from filelock import FileLock

from defenses import DEFENSE_FUNCTIONS
from utils.reporting.tables import verdict

# A trigger of 25 pixels and a fifth of the images poisoned: small enough a training for a test, and still a backdoor.
VICTIM = (
    *("--dataset", "shapes", "--arch", "WRN-10-1", "--device", "cpu", "--print_freq", 0),
    *("--epochs", 6, "--lr", 0.1, "--batch_size", 64, "--inject_portion", 0.2),
    *("--trigger_type", "squareTrigger", "--trig_w", 5, "--trig_h", 5),
)
# What the checkpoint of this victim states of the options, in place of main.py's defaults.
STATED_OPTIONS = {
    "arch": "WRN-10-1",
    "num_class": 10,
    "normalize": [[0.5] * 3, [0.25] * 3],
    "target_type": "all2one",
    "trigger_type": "squareTrigger",
    "trig_w": 5,
    "trig_h": 5,
    "target_label": 5,
}
DEFENSE = ("--dataset", "shapes", "--device", "cpu", "--ratio", 0.128)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder that all processes which run the tests share, as the victims in it take minutes to make."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "run"
    shared.mkdir(exist_ok=True)
    return shared


def run_once(script, folder, *words, name):
    """Run a script unless another process has, with its files in `folder`; returns what it printed."""
    output = folder / f"{name}.txt"
    with FileLock(folder / f"{name}.lock"):
        if not output.exists():
            done = script(*words, *output_options(folder), "--name", name)
            assert done.returncode == 0, done.stderr
            output.write_text(done.stdout)
    return output.read_text()


def output_options(folder):
    """The options that keep a run's files in `folder`."""
    return "--checkpoint_root", folder / "weight", "--log_root", folder / "results"


def metrics_of(folder, name):
    return json.loads((folder / "results" / name / "metrics.json").read_text())


def without_seconds(folder, name):
    """The rows of a comparison, without the one column that differs between two runs."""
    with open(folder / "results" / name / "comparison.csv") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def victim(script, folder):
    run_once(script, folder, "train_badnet.py", *VICTIM, name="victim")
    return folder / "weight" / "shapes" / "victim.pth.tar"


@pytest.fixture(scope="session")
def purified(script, folder, victim):
    return run_once(script, folder, "main.py", *DEFENSE, "--model", victim, name="first")


def test_the_victim_is_backdoored_and_says_so(folder, victim):
    metrics = metrics_of(folder, "victim")["victim"]
    assert metrics["asr"] > 95
    assert metrics["acc"] > 85
    checkpoint = torch.load(victim, weights_only=True)
    assert checkpoint["metrics"] == metrics
    assert checkpoint["attack"]["target_label"] == 5
    assert "optimizer" not in checkpoint


def test_purification_removes_the_backdoor_and_keeps_the_accuracy(folder, purified):
    metrics = metrics_of(folder, "first")
    before, after = metrics["before"], metrics["after"]
    assert before == metrics_of(folder, "victim")["victim"]  # the reloaded victim is the one that was saved
    assert after["asr"] < 5
    assert after["acc"] > before["acc"] - 3
    assert after["ra"] > after["acc_published"] - 3
    assert len(after["per_class"]) == 10
    assert metrics["target_label"] == 5
    assert (metrics["detected_label"], metrics["worked_against"]) == (5, 5)
    assert {score["label"] for score in metrics["search"] if score["flagged"]} in ({5}, {5, "any"})
    assert "a backdoor to label 5 is suspected" in purified
    assert metrics["trigger"]["hit_rate"] >= 90
    assert purified.splitlines()[-1] == verdict(metrics)
    assert metrics["config"].items() >= STATED_OPTIONS.items()
    parts = {"data", "finetune", "detect", "inversion", "purify", "evaluate", "report", "total"}
    assert set(metrics["seconds"]) == parts
    assert metrics["seconds"]["detect"] < 3 * metrics["seconds"]["inversion"]
    for name in ("acc_published", "asr", "acc", "ra"):
        assert f"{after[name]:.2f}" in purified
    assert "5 wedge" in purified
    with open(folder / "results" / "first" / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["config"]["epochs"]
    assert {"epoch", "lr", "loss", "acc", "asr", "ra"} <= set(rows[0])
    pictures = {"trigger.png", "features.png", "curves.png", "per_class.png"}
    assert pictures | {"report.html"} <= set(os.listdir(folder / "results" / "first"))
    assert (folder / "results" / "first" / "report.html").read_text().count("<img ") == len(pictures)


def test_a_run_without_measurements_has_no_curves_and_says_so(folder, victim):
    results = folder / "results" / "victim"
    assert not (results / "curves.png").exists()
    assert "There are no curves" in (results / "report.html").read_text()


def test_a_purification_that_fails_says_so_and_saves_no_weights(script, folder, victim):
    words = "--target 5 --lr 1e-7 --inversion_rounds 1 --rounds 1 --epochs 1 --finetune_lr 1e-7 --name failed"
    done = script("main.py", *DEFENSE, *output_options(folder), "--model", victim, *words.split())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the inverted trigger still works after the defense")
    metrics = metrics_of(folder, "failed")
    assert metrics["purified"] is False
    assert done.stdout.splitlines()[-1].startswith("The backdoor is still there: ASR ")
    assert not (folder / "weight" / "failed.tar").exists()


def test_the_purified_weights_measure_what_was_reported(script, folder, purified):
    done = script(
        "main.py", "--dataset", "shapes", "--defense", "none", *output_options(folder),
        "--model", folder / "weight" / "first.tar", "--name", "again", "--retune", 5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = metrics_of(folder, "again")
    assert again["before"] == metrics_of(folder, "first")["after"]
    assert again["after"] is None
    assert set(again["retuned"]) == {"5"}
    assert again["retuned"]["5"]["acc"] > 85
    assert again["retuned_reference"] is None  # no clean model of shapes is shipped
    assert again["seconds"]["retune"] > 0
    assert "after the re-tuning attack" in done.stdout
    assert (folder / "results" / "again" / "retuned.png").exists()
    assert "After the re-tuning attack" in (folder / "results" / "again" / "report.html").read_text()


def test_the_same_seed_gives_the_same_numbers(script, folder, purified, victim):
    short = (*DEFENSE, *output_options(folder), "--model", victim, "--epochs", 1, "--finetune_epochs", 1)
    short += ("--inversion_rounds", 1, "--rounds", 1)
    for name in ("a", "b"):
        done = script("main.py", *short, "--seed", 3, "--name", name, "--target", 5)
        assert done.returncode == 0, done.stderr
    runs = [metrics_of(folder, name) for name in "ab"]
    weights = [torch.load(folder / "weight" / f"{name}.tar", weights_only=True)["state_dict"] for name in "ab"]
    assert runs[0]["after"] == runs[1]["after"]
    assert runs[0]["trigger"] == runs[1]["trigger"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_clean_model_is_left_unchanged(script, folder, clean):
    words = (*DEFENSE, *output_options(folder), "--model", clean[-1], "--batch_size", 32)
    done = script("main.py", *words, "--inversion_rounds", 1, "--inversion_steps", 10, "--name", "left")
    assert done.returncode == 0, done.stderr
    assert "no backdoor was found" in done.stdout
    metrics = metrics_of(folder, "left")
    assert metrics["detected_label"] is metrics["worked_against"] is metrics["after"] is None
    is_weak = metrics["search"][0]["weak_floor"] is not None  # after so short a training
    assert len(metrics["search"]) == (11 if is_weak else 2 * 11 + 10)  # pixels, of each label and any; warps; waves
    assert not (folder / "weight" / "left.tar").exists()
    assert "no backdoor found" in (folder / "results" / "left" / "report.html").read_text()


def test_a_comparison_runs_every_defense(script, folder, victim):
    words = (*DEFENSE, *output_options(folder), "--model", victim, "--defense", "all", "--name", "table", "--target", 5)
    words += ("--epochs", 1, "--finetune_epochs", 1, "--rounds", 1, "--print_freq", 0)
    words += ("--inversion_rounds", 1, "--inversion_steps", 20)
    done = script("main.py", *words)
    assert done.returncode == 0, done.stderr
    assert [row["defense"] for row in without_seconds(folder, "table")] == list(DEFENSE_FUNCTIONS)
    assert (folder / "results" / "table" / "comparison.md").is_file()


def test_a_comparison_interrupted_and_resumed_ends_as_one_left_alone(script, folder, victim, clean, interrupted):
    words = [*DEFENSE, *output_options(folder), "--model", victim, clean[-1]]
    words += ["--defense", "ft", "--epochs", 2, "--name"]
    assert script("main.py", *words, "alone").returncode == 0
    exit_code, error = interrupted("main.py", *words, "stopped", when="clean, ft")
    command = shlex.join(["python", str(ROOT / "main.py"), *map(str, words), "stopped", "--resume"])
    assert (exit_code, error) == (130, f"error: stopped; finished runs are kept; continue with: {command}\n")
    again = script("main.py", *words, "stopped", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(finished before)") == 1
    assert without_seconds(folder, "stopped") == without_seconds(folder, "alone")
    for name in ("alone/victim-ft", "stopped/victim-ft"):
        assert metrics_of(folder, name)["config"].items() >= STATED_OPTIONS.items()
    clean_options = STATED_OPTIONS | {"trigger_type": "gridTrigger", "trig_w": None, "trig_h": None}
    assert metrics_of(folder, "stopped/WRN-10-1-clean-ft")["config"].items() >= clean_options.items()


def test_the_published_recipe_is_reachable(script, folder, victim):
    words = "--positive backdoored --contrast all --align_weight 0 --augment none --ema 0 --schedule steps --epochs 1"
    words += " --inversion_steps 20 --target 5 --name published"
    done = script("main.py", *DEFENSE, *output_options(folder), "--model", victim, *words.split())
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder, "published")["trigger"]["hit_rate"] >= 90


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("--model", "nowhere.tar"), 2, "no checkpoint at nowhere.tar"),
        (("--target_label", 3), 2, "states its attack"),
        (("--target", 10), 2, "--target 10 is not one of the labels 0..9"),
        (("--num_class", 3), 2, "--num_class 3 is too small"),
        (
            ("--target", 5, "--inversion_steps", 1, "--inversion_batches", 1),
            1,
            "no pattern turns 90% of the clean images",
        ),
    ],
)
def test_a_run_that_fails_is_one_line_and_leaves_nothing(script, tmp_path, victim, words, code, error):
    model = () if "--model" in words else ("--model", victim)
    done = script("main.py", *DEFENSE, *output_options(tmp_path), "--name", "bad", *model, *words)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert error in done.stderr
    assert not list(tmp_path.iterdir())  # neither weight/ nor results/


def test_a_rerun_announces_what_it_replaces(script, folder, victim):
    words = ("--dataset", "shapes", "--device", "cpu", "--defense", "none", *output_options(folder), "--model", victim)
    outputs = [script("main.py", *words, "--name", "twice").stdout for _ in range(2)]
    assert ["holds an earlier run, which this one replaces" in output for output in outputs] == [False, True]
    assert outputs[0].splitlines()[-1].startswith("The model is backdoored: ASR ")


@pytest.fixture(scope="session")
def clean(script, folder):
    words = ("--dataset", "shapes", "--arch", "WRN-10-1", "--device", "cpu", "--print_freq", 0, "--epochs", 1)
    run_once(script, folder, "train_badnet.py", *words, "--inject_portion", 0, name="WRN-10-1-clean")
    return (*words, "--surrogate", folder / "weight" / "shapes" / "WRN-10-1-clean.pth.tar")


def test_a_victim_with_a_patch_from_a_clean_model_measures_the_same_again(script, folder, clean):
    done = script("train_badnet.py", *clean, "--trigger_type", "trojanTrigger", *output_options(folder))
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(folder, "shapes-WRN-10-1-trojan")
    assert done.stdout.splitlines()[-1] == verdict(metrics)
    path = folder / "weight" / "shapes" / "WRN-10-1-trojan.pth.tar"
    words = ("--dataset", "shapes", "--device", "cpu", "--defense", "none", "--model", path, "--name", "x")
    done = script("main.py", *words, *output_options(folder))
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder, "x")["before"] == metrics["victim"]


def test_a_missing_clean_model_says_how_to_train_one(script, tmp_path):
    words = ("--dataset", "shapes", "--trigger_type", "trojanTrigger", "--surrogate", "nowhere.tar")
    done = script("train_badnet.py", *words, *output_options(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "train one: python train_badnet.py --dataset shapes --inject_portion 0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_attack_sheet_has_a_row_for_each_trigger(script, tmp_path, clean):
    os.makedirs(tmp_path / "shapes")
    shutil.copy(clean[-1], tmp_path / "shapes" / "WRN-16-1-clean.pth.tar")
    done = script("-m", "docs.draw_attacks", tmp_path / "a.png", "--dataset", "shapes", "--checkpoint_root", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "10 attacks" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
