"""Resuming: a training that was killed, at any moment and any number of times, ends as one that was left alone."""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import FACTS, ROOT
from PIL import Image

import train_badnet
from data_loader import Batches, TensorImages
from models import select_model
from utils import shapes
from utils.checkpoint import save_checkpoint
from utils.errors import UserError, run_script
from utils.files import write_file, write_json
from utils.resume import Resumable
from utils.seed import generator
from utils.training import SCHEDULES, train
from utils.untrusted import read_untrusted

EPOCHS = 12
WORDS = f"--dataset shapes --arch WRN-10-1 --device cpu --epochs {EPOCHS} --batch_size 32 --lr 0.1 --name run".split()


def train_in(folder, *words):
    """What a process of the kill test does: the script, on few pictures."""
    os.chdir(folder)
    torch.set_num_threads(1)
    shapes.COUNTS.update(train=320, test=100)
    sys.argv = ["train_badnet.py", *WORDS, *words]
    with open("out.txt", "a", buffering=1) as out:
        sys.stdout = sys.stderr = out
        run_script(train_badnet.main, "")


@pytest.fixture(scope="module")
def started():
    """Start that process from a server that has imported torch once, so that its time is training time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_badnet", "test_resume"])

    def start(folder, *words):
        process = context.Process(target=train_in, args=(folder, *words))
        process.start()
        return process

    return start


def ended(process):
    process.join()
    return process.exitcode


def check_every_file(folder):
    """Whatever lies in weight/ and results/ is whole, but for what is marked as half."""
    for path in [p for p in folder.rglob("*") if p.is_file() and p.parent != folder and p.suffix != ".part"]:
        if path.suffix in (".tar", ".pt"):
            assert torch.load(path, weights_only=True)["state_dict"]
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["victim"]
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        else:
            assert len(list(csv.DictReader(path.open()))) == EPOCHS


def results_of(folder):
    checkpoint = torch.load(folder / "weight" / "shapes" / "run.pth.tar", weights_only=True)
    rows = list(csv.DictReader((folder / "results" / "run" / "history.csv").open()))
    return checkpoint["state_dict"], checkpoint["metrics"], [{**row, "seconds": None} for row in rows]


def test_twenty_kills_leave_the_weights_of_a_run_left_alone(started, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    for _ in range(2):  # the first one waits for the server as well
        began = time.monotonic()
        assert ended(started(alone)) == 0, (alone / "out.txt").read_text()
        whole = time.monotonic() - began
    moments, kills = random.Random(0), 0
    while kills < 20:
        process = started(killed, "--resume")
        process.join(moments.uniform(0, whole / 5))
        if process.is_alive():
            kills += 1
            process.kill()
            process.join()
            check_every_file(killed)
        else:  # too late for the rest of the kills: they are for the next run
            assert process.exitcode == 0, (killed / "out.txt").read_text()
            check_same(killed, alone)
            shutil.rmtree(killed / "results")
            shutil.rmtree(killed / "weight")
    assert ended(started(killed, "--resume")) == 0, (killed / "out.txt").read_text()
    assert (killed / "out.txt").read_text().count("going on from") >= 5
    check_every_file(killed)
    check_same(killed, alone)


def check_same(folder, other):
    (weights, *figures), (expected, *others) = results_of(folder), results_of(other)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert figures == others
    assert not list(folder.rglob("*.part")) + list(folder.rglob("resume.pt"))


def write_half(path):
    def half_then_die(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    write_file(path, half_then_die)


def test_a_kill_within_a_write_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})
    process = multiprocessing.get_context("forkserver").Process(target=write_half, args=(str(path),))
    process.start()
    assert ended(process) == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2
    write_json(str(path), {"a": 2})
    assert list(tmp_path.iterdir()) == [path]


def small_training(schedule, ema, epochs=4, **resuming):
    """A training that draws from every generator there is: order, crops, dropout."""
    torch.manual_seed(0)
    images = torch.randint(256, (24, 6, 6, 3), dtype=torch.uint8)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(108, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)
    )
    data = TensorImages(images, torch.arange(24) % 4)
    batches = Batches(data, 8, "cpu", shuffle=True, padding=1, rng=generator(0, "batches"))
    if "resume" in resuming:
        network.load_state_dict(resuming["resume"]["network"])
    save = resuming.get("save", lambda network, state: None)
    history = train(
        network, batches, lambda x, y: F.cross_entropy(network(x), y), torch.device("cpu"), epochs=epochs, lr=0.1,
        momentum=0.9, weight_decay=1e-3, schedule=schedule, precision="fp32", title="test", ema=ema,
        generators=[batches.rng], resume=resuming.get("resume"), save=lambda state: save(network, state),
    )  # fmt: skip
    return network.state_dict(), [row["loss"] for row in history]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_training_resumed_from_a_file_ends_as_one_that_never_stopped(tmp_path, schedule, ema, stop):
    path = tmp_path / "state.pt"

    def save_and_stop(network, state):
        torch.save({"network": network.state_dict(), **state}, path)
        if len(state["history"]) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_training(schedule, ema, save=save_and_stop)
    weights, losses = small_training(schedule, ema, resume=read_untrusted(path))
    expected, whole = small_training(schedule, ema)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert losses == whole


def test_the_state_of_another_training_is_refused():
    states = []
    small_training("cosine", 0, save=lambda network, state: states.append({"network": network.state_dict(), **state}))
    for change in ({"history": 3}, {"generators": []}, {"optimizer": {}}):
        with pytest.raises(UserError, match="not of such a training"):
            small_training("cosine", 0, resume=states[0] | change)
    with pytest.raises(UserError, match="more than the 2 asked for"):
        small_training("cosine", 0, epochs=2, resume=states[-1])


def test_which_state_a_run_goes_on_from(tmp_path, capsys):
    options, poisoned, model = {"lr": 0.1, "seed": 1, "name": "a"}, torch.arange(3), select_model("WRN-10-1", 4)
    folder = str(tmp_path)
    assert Resumable(folder, options, True).read(poisoned) is None
    assert "starting at the beginning" in capsys.readouterr().out
    Resumable(folder, options, False).save(model, {"history": []}, poisoned, **FACTS)
    assert Resumable(folder, {**options, "name": "b"}, True).read(poisoned)["training"] == {"history": []}
    assert Resumable(folder, options, False).read(poisoned) is None
    assert "--resume goes on" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a run with --lr 0.1 \(not 0.2\), --seed 1 \(not 2\)"):
        Resumable(folder, {"lr": 0.2, "seed": 2}, True).read(poisoned)
    with pytest.raises(UserError, match="other data"):
        Resumable(folder, options, True).read(torch.arange(4))
    save_checkpoint(str(tmp_path / "resume.pt"), model)
    with pytest.raises(UserError, match="not the state of a training"):
        Resumable(folder, options, True).read(poisoned)
    Resumable(folder, options, True).end()
    write_json(str(tmp_path / "metrics.json"), {"config": options})
    assert Resumable(folder, options, True).finished()
    assert not Resumable(folder, options, False).finished()
    with pytest.raises(UserError, match=r"--lr 0.1 \(not 0.2\)"):
        Resumable(folder, {**options, "lr": 0.2}, True).finished()


def test_a_loss_that_is_no_number_from_the_start_keeps_nothing_and_says_so(started, tmp_path):
    assert ended(started(tmp_path, "--lr", "1e30")) == 1
    assert "no longer finite in epoch 1; lower --lr; no weights are kept yet" in (tmp_path / "out.txt").read_text()
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_ctrl_c_says_how_to_go_on(tmp_path, interrupted):
    command = f"python {ROOT / 'train_badnet.py'} {' '.join(WORDS)} --resume"
    assert interrupted("train_badnet.py", *WORDS, when="poisoned", cwd=tmp_path) == (
        130,
        f"error: stopped; go on with: {command}\n",
    )
