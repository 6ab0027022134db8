"""A new trigger and a new defense by the steps that the README gives: a file, a registry entry, a line of values."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

TRIGGER = '''"""A white row at the top."""


def row_trigger(images, brightness):
    """Overwrite the first row with a grey level."""
    triggered = images.clone()
    triggered[:, 0] = int(brightness)
    return triggered
'''
DEFENSE = '''"""Scale every weight of the last layer."""

import copy

from defenses.base import DefenseResult


def defend(context, *, scale, precision):
    """A copy of the victim with a scaled last layer."""
    student = copy.deepcopy(context.victim)
    student.head.weight.mul_(scale)
    return DefenseResult(student.eval(), [])
'''
EDITS = [
    ("attacks/attack.py", "TRIGGERS = {\n", '    "rowTrigger": TriggerSpec(row_trigger, {"brightness": float}),\n'),
    ("attacks/attack.py", "from attacks.trojan", None),
    (
        "config.py",
        "ATTACKS = {\n",
        '    "rowTrigger": {"name": "row", "target_type": "all2one", "options": {"brightness": 250.0}},\n',
    ),
    ("defenses/purify.py", "DEFENSE_FUNCTIONS = {\n", '    "scaling": scaling.defend,\n'),
    ("config.py", "DEFENSES = {\n", '    "scaling": {"scale": 0.5, "batch_size": 64, "augment": "none"},\n'),
]


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository with the two additions."""
    copy = tmp_path_factory.mktemp("extended")
    for name in ("attacks", "defenses", "models", "utils"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "train_badnet.py", "config.py", "data_loader.py"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "attacks" / "row.py").write_text(TRIGGER)
    (copy / "defenses" / "scaling.py").write_text(DEFENSE)
    for name, place, entry in EDITS:
        text = (copy / name).read_text()
        assert text.count(place) == 1
        entry = place + entry if entry else f"from attacks.row import row_trigger\n{place}"
        (copy / name).write_text(text.replace(place, entry))
    init = copy / "defenses" / "purify.py"
    init.write_text(init.read_text().replace("from defenses import ", "from defenses import scaling, ", 1))
    return copy


def test_a_new_trigger_and_a_new_defense_run(extended):
    def run(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=extended, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shapes = ("--dataset", "shapes", "--device", "cpu")
    run(
        "train_badnet.py",
        *shapes,
        "--arch",
        "WRN-10-1",
        "--epochs",
        1,
        "--trigger_type",
        "rowTrigger",
        "--brightness",
        240,
    )
    victim = extended / "weight" / "shapes" / "WRN-10-1-row.pth.tar"
    run("main.py", *shapes, "--model", victim, "--defense", "scaling", "--scale", 0.25, "--name", "scaled")
    metrics = json.loads((extended / "results" / "scaled" / "metrics.json").read_text())
    assert (metrics["config"]["trigger_type"], metrics["config"]["brightness"]) == ("rowTrigger", 240)
    assert (metrics["defense"], metrics["config"]["scale"]) == ("scaling", 0.25)
    files = victim, extended / "weight" / "scaled.tar"
    before, after = (torch.load(path, weights_only=True)["state_dict"]["fc.weight"] for path in files)
    assert torch.equal(after, 0.25 * before)
    for name, words in {"main.py": ("--brightness", "--scale"), "train_badnet.py": ("--brightness",)}.items():
        assert all(word in run(name, "--help") for word in words)
    refused = subprocess.run(
        [sys.executable, "main.py", "--defense", "ft", "--scale", "1"],
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (
        2, "error: --scale applies only with --defense scaling (see python main.py --help)\n",
    )  # fmt: skip
