"""Every path on a GPU: training, search, inversion, each defense, torchrun with one process; skipped without one."""

import json

import pytest
import torch
from conftest import ROOT, state_vector

from attacks import Attack
from data_loader import get_eval_set
from defenses import DEFENSE_FUNCTIONS, purify
from models.loading import load_model
from utils.metrics import evaluate
from utils.shapes import draw_shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TRAINING = "--dataset shapes --device cuda --arch WRN-10-1 --epochs 1 --lr 0.1"


@pytest.fixture(scope="module")
def checkpoint():
    return torch.load(ROOT / "weight" / "shapes" / "WRN-16-1-badnet.pth.tar", weights_only=True)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint["state_dict"], "shapes", "WRN-16-1", 10, *checkpoint["normalization"]).eval()


@pytest.fixture(scope="module")
def clean_images():
    images, labels = draw_shapes("train")
    return images[:500], labels[:500]


def metrics_on(device, model, checkpoint):
    images, labels = draw_shapes("test")
    attack, device = Attack(**checkpoint["attack"]), torch.device(device)
    return evaluate(model.to(device), get_eval_set(images, labels, attack, device), attack)


def test_metrics_are_those_of_the_cpu(model, checkpoint):
    on_cpu, on_gpu = (metrics_on(device, model, checkpoint) for device in ("cpu", "cuda"))
    for name in ("acc", "acc_published", "asr", "ra", "floor"):
        assert on_gpu[name] == pytest.approx(on_cpu[name], abs=0.1)


@pytest.mark.parametrize("defense", DEFENSE_FUNCTIONS)
def test_each_defense_runs_and_moves_the_weights(model, clean_images, defense):
    result = purify(model.cpu(), *clean_images, defense=defense, device="cuda", epochs=1)
    assert result.model is not None
    assert all(parameter.is_cuda for parameter in result.model.parameters())
    assert not torch.equal(state_vector(result.model).cpu(), state_vector(model.network))
    assert state_vector(result.model).isfinite().all()


def test_mcl_finds_and_removes_the_backdoor(model, checkpoint, clean_images):
    result = purify(model.cpu(), *clean_images, device="cuda")
    metrics = metrics_on("cuda", result.model, checkpoint)
    assert (result.target, result.purified) == (checkpoint["attack"]["target_label"], True)
    assert metrics["asr"] < 3
    assert metrics["acc"] > 95


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_scripts_train_and_defend(script, tmp_path, precision):
    done = script("train_badnet.py", *TRAINING.split(), "--precision", precision, "--name", "victim", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = "--dataset shapes --device cuda --clean 100 --target 5 --epochs 1 --retune 5 --name run --precision"
    victim = tmp_path / "weight" / "shapes" / "victim.pth.tar"
    done = script("main.py", *words.split(), precision, "--model", victim, cwd=tmp_path)
    assert done.returncode in (0, 1), done.stderr  # a victim of one epoch may have no trigger to find
    assert "Traceback" not in done.stderr


def test_torchrun_trains_on_the_gpu(script, tmp_path):
    runner = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, ROOT / "train_badnet.py")
    done = script(*runner, *TRAINING.split(), "--name", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results" / "one" / "metrics.json").read_text())["device"].startswith("cuda")
