"""What several tests share: the repository on the path, real CIFAR-10 where it is, and small stand-ins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import select_model


@pytest.fixture
def images():
    """Eight random 8x8 uint8 images, (8, 8, 8, 3)."""
    return torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def victim():
    """A small network of three classes, as every defense is given it; never trained."""
    torch.manual_seed(0)
    return select_model("WRN-10-1", 3).eval().requires_grad_(False)


@pytest.fixture
def batches():
    """Three batches of eight random images for it, with labels."""
    rng = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 3, 8, 8, generator=rng), torch.randint(3, (8,), generator=rng)) for _ in range(3)]


FACTS = {"arch": "WRN-10-1", "num_class": 4, "normalization": ([0.5] * 3, [0.2] * 3)}  # of a checkpoint of ours


def weights(model):
    """All weights and statistics of a model, as one vector."""
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


@pytest.fixture(scope="session")
def cifar_root():
    """The folder with CIFAR-10's files, or a skip that says how to have it."""
    root = Path(os.environ.get("MCL_DATA_ROOT", ROOT / "data"))
    if not (root / "cifar-10-batches-py" / "data_batch_1").exists():
        pytest.skip("no CIFAR-10 here: set MCL_DATA_ROOT to the folder that holds cifar-10-batches-py")
    return str(root)


@pytest.fixture(scope="session")
def script():
    """Run a script of the repository, or -m and a module of it, in another process; returns the finished process, its
    output as text."""

    def run(*words, cwd=ROOT):
        words = words if words[0] == "-m" else (ROOT / words[0], *words[1:])
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture(scope="session")
def interrupted():
    """Run a script until a line of its output holds `when`, press Ctrl-C; returns its exit code and its stderr."""

    def run(*words, when, cwd=ROOT):
        command = [sys.executable, "-u", str(ROOT / words[0]), *map(str, words[1:])]
        # A shell that runs the tests in the background has told them to ignore Ctrl-C, which a child would inherit.
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, usual)
        assert any(when in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        return process.returncode, told

    return run
