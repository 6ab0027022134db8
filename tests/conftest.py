"""Shared by several tests: small models and batches, an inverted trigger, CIFAR-10 if available, the scripts."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config
import main
from defenses import DefenseContext, mcl
from defenses.inversion import InvertedTrigger
from defenses.inversion.patterns import PixelForm
from models import select_model
from utils import shapes
from utils.progress import Stopwatch

MODEL = str(ROOT / "weight" / "shapes" / "WRN-16-1-badnet.pth.tar")  # a victim that is shipped
CPU = torch.device("cpu")
METADATA = {"arch": "WRN-10-1", "num_class": 4, "normalization": ([0.5] * 3, [0.2] * 3)}  # of a checkpoint


def state_vector(model):
    """All weights and statistics of a model, as one vector."""
    return torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])


def sgd_step_by_hand(student, loss, lr):
    """The weights after one step of plain SGD on `loss`, by name; `student` stays as it is."""
    names, weights = zip(*student.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return {
        name: weight.detach() if gradient is None else weight.detach() - lr * gradient
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }


def assert_weights(model, expected, atol=1e-6):
    """Check a model's weights against a dict of tensors by name."""
    torch.testing.assert_close(dict(model.requires_grad_(False).named_parameters()), expected, rtol=1e-4, atol=atol)


class FixedBatches(list):
    """The same batches in every epoch."""

    @property
    def labels(self):
        return torch.cat([labels for _, labels in self])

    @property
    def image_shape(self):
        return tuple(self[0][0].shape[1:])


class RecordingForm(PixelForm):
    """Records the parameters in each update of an inversion, and the weights of their penalties."""

    def __init__(self, shape):
        super().__init__(shape)
        self.parameters, self.weights = [], []

    def penalty(self, parameters):
        self.parameters.append(parameters.detach().clone())
        penalty = super().penalty(parameters)
        penalty.register_hook(lambda gradient: self.weights.append(gradient.tolist()))  # of the loss, by the penalty
        return penalty


@pytest.fixture
def images():
    """Eight random 8x8 uint8 images, (8, 8, 8, 3)."""
    return torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def victim():
    """A small untrained network of three classes, frozen, in eval mode."""
    torch.manual_seed(0)
    return select_model("WRN-10-1", 3).eval().requires_grad_(False)


@pytest.fixture
def batches():
    """Three batches of eight random images for `victim`, with labels."""
    rng = torch.Generator().manual_seed(0)
    drawn = [(torch.rand(8, 3, 8, 8, generator=rng), torch.randint(3, (8,), generator=rng)) for _ in range(3)]
    return FixedBatches(drawn)


@pytest.fixture
def trigger():
    """A white 2x2 patch in the corner of an 8x8 image."""
    pattern = torch.zeros(3, 8, 8)
    pattern[:, 6:, 6:] = 1
    return InvertedTrigger(pattern, 1.0)


@pytest.fixture
def make_context(victim, batches, trigger, monkeypatch):
    """Make a DefenseContext of the fixtures above, with `changes`; its inversion returns `trigger`.

    MCL trains its student once: the features of an untrained victim move too far at any rate.
    """
    monkeypatch.setattr(mcl, "CLEAN_SIMILARITY", -1.0)
    monkeypatch.setattr("defenses.base.find_trigger", lambda *_: trigger)  # an untrained victim has no trigger to find

    def make(**changes):
        context = DefenseContext(victim, batches, batches, True, 2_500, CPU, 0, Stopwatch(), 1)
        return context._replace(**changes)

    return make


@pytest.fixture
def run_with(monkeypatch, tmp_path):
    """Run main.run on a hundred shapes, with more options and a defense that returns the victim and a history."""

    def run(*words, history=()):
        for split in shapes.COUNTS:
            monkeypatch.setitem(shapes.COUNTS, split, 100)
        words = ["--dataset", "shapes", "--clean", "20", "--target", "5", *words]
        words += ["--checkpoint_root", str(tmp_path / "weight"), "--log_root", str(tmp_path / "results")]
        opt, explicit = config.parse("main.py", words)
        monkeypatch.setattr(main, "defend", lambda opt, victim, *_: (copy.deepcopy(victim), list(history), {}))
        main.run(config.single_run_options(opt, model=MODEL), explicit, "x")

    return run


@pytest.fixture(scope="session")
def cifar_root():
    """The folder of CIFAR-10's files; without it the test is skipped."""
    root = Path(os.environ.get("MCL_DATA_ROOT", ROOT / "data"))
    if not (root / "cifar-10-batches-py" / "data_batch_1").exists():
        pytest.skip("no CIFAR-10 found: set MCL_DATA_ROOT to the folder that holds cifar-10-batches-py")
    return str(root)


@pytest.fixture(scope="session")
def script():
    """Run a script of the repository, or -m and a module, in a process of its own; returns the finished process."""

    def run(*words, cwd=ROOT):
        words = words if words[0] == "-m" else (ROOT / words[0], *words[1:])
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1_200, check=False)

    return run


@pytest.fixture(scope="session")
def interrupted():
    """Run a script until a line of its output contains `when`, then press Ctrl-C; returns its exit code and stderr."""

    def run(*words, when, cwd=ROOT):
        command = [sys.executable, "-u", str(ROOT / words[0]), *map(str, words[1:])]
        # A shell that runs the tests in the background makes them ignore Ctrl-C, and a child inherits that.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        signal.signal(signal.SIGINT, handler)
        assert any(when in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr

    return run
