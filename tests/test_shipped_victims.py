"""The victims that are shipped, and the paper's own, measure what they are said to."""

import json
import os

import pytest
import torch


def measure(script, folder, *words):
    """The content of metrics.json of a run without a defense."""
    outputs = ("--checkpoint_root", "weight", "--log_root", folder / "results")
    done = script("main.py", *words, *outputs, "--defense", "none", "--device", "cpu", "--name", "x")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results" / "x" / "metrics.json").read_text())


@pytest.mark.parametrize("shipped", ["CIFAR10", "shapes"])
def test_a_shipped_victim_measures_what_its_checkpoint_states(script, tmp_path, shipped, request):
    root = ("--data_root", request.getfixturevalue("cifar_root")) if shipped == "CIFAR10" else ()
    metrics = measure(script, tmp_path, "--dataset", shipped, *root)
    stated = torch.load(metrics["model"], weights_only=True)["metrics"]
    # Other processors round otherwise: an image or two may change sides.
    assert metrics["before"]["acc"] == pytest.approx(stated["acc"], abs=0.05)
    assert metrics["before"]["asr"] == pytest.approx(stated["asr"], abs=0.05)
    assert metrics["before"]["asr"] > 99


def test_the_published_victim_measures_as_published(script, tmp_path, cifar_root):
    published = os.environ.get("MCL_PUBLISHED_VICTIM", "")
    if not os.path.exists(published):
        pytest.skip("no published victim here: set MCL_PUBLISHED_VICTIM to the MCL paper's WRN-16-1-badnet.pth.tar")
    words = ("--data_root", cifar_root, "--model", published, "--trigger_type", "gridTrigger")
    metrics = measure(script, tmp_path, *words)["before"]
    # Of 9,000, 9,000 and 10,000 images.
    assert [round(metrics[name], 2) for name in ("acc_published", "asr", "acc")] == [83.01, 99.64, 82.40]
