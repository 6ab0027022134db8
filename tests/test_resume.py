"""Resuming: a training killed at any moment, any number of times, ends with the results of an uninterrupted one."""

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
from conftest import CPU, METADATA, ROOT
from PIL import Image

import config
import train_badnet
from data_loader import Batches, TensorImages
from models import select_model
from utils import shapes
from utils.checkpoint import save_checkpoint
from utils.errors import UserError, run_script
from utils.files import sha256_of, write_file, write_json
from utils.resume import Resumable, finished_run, resume_command
from utils.safe_load import safe_load
from utils.seed import generator
from utils.training import SCHEDULES, train

EPOCHS = 12
OPTIONS = f"--dataset shapes --arch WRN-10-1 --device cpu --epochs {EPOCHS} --batch_size 32 --lr 0.1 --name run".split()


def train_in(folder, *options):
    """Run train_badnet.py on 320 images; the body of a process of the kill test."""
    os.chdir(folder)
    torch.set_num_threads(1)
    shapes.COUNTS.update(train=320, test=100)
    sys.argv = ["train_badnet.py", *OPTIONS, *options]
    with open("out.txt", "a", buffering=1) as out:
        sys.stdout = sys.stderr = out
        run_script(train_badnet.main, "")


@pytest.fixture(scope="module")
def started():
    """Start that process from a fork server that has imported torch, so that its time is training time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_badnet", "test_resume"])

    def start(folder, *options):
        process = context.Process(target=train_in, args=(folder, *options))
        process.start()
        return process

    return start


def exit_code_of(process):
    process.join()
    return process.exitcode


def check_every_file(folder):
    """Every file in weight/ and results/ is complete, except temporary ones."""
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
    """State_dict, metrics and history of the finished run."""
    checkpoint = torch.load(folder / "weight" / "shapes" / "run.pth.tar", weights_only=True)
    rows = list(csv.DictReader((folder / "results" / "run" / "history.csv").open()))
    return checkpoint["state_dict"], checkpoint["metrics"], [{**row, "seconds": None} for row in rows]


def test_twenty_kills_do_not_change_the_results(started, tmp_path):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    for folder in (uninterrupted, killed):
        folder.mkdir()
    for _ in range(2):  # the time of the first run includes the start of the server
        start = time.monotonic()
        assert exit_code_of(started(uninterrupted)) == 0, (uninterrupted / "out.txt").read_text()
        seconds = time.monotonic() - start
    rng, kills = random.Random(0), 0
    while kills < 20:
        process = started(killed, "--resume")
        process.join(rng.uniform(0, seconds / 5))
        if process.is_alive():
            kills += 1
            process.kill()
            process.join()
            check_every_file(killed)
        else:  # the run finished before the last kill: start over
            assert process.exitcode == 0, (killed / "out.txt").read_text()
            check_same(killed, uninterrupted)
            shutil.rmtree(killed / "results")
            shutil.rmtree(killed / "weight")
    assert exit_code_of(started(killed, "--resume")) == 0, (killed / "out.txt").read_text()
    assert (killed / "out.txt").read_text().count("resuming from") >= 5
    check_every_file(killed)
    check_same(killed, uninterrupted)


def check_same(folder, expected_folder):
    (weights, *metrics), (expected_weights, *expected_metrics) = results_of(folder), results_of(expected_folder)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert metrics == expected_metrics
    assert not list(folder.rglob("*.part")) + list(folder.rglob("resume.pt"))


def die_while_writing(path):
    def write_and_die(file):
        file.write(b"part")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    write_file(path, write_and_die)


def test_a_kill_during_a_write_keeps_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})
    process = multiprocessing.get_context("forkserver").Process(target=die_while_writing, args=(str(path),))
    process.start()
    assert exit_code_of(process) == -signal.SIGKILL
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 2
    write_json(str(path), {"a": 2})
    assert list(tmp_path.iterdir()) == [path]


def small_training(schedule, ema, epochs=4, resume=None, save=lambda network, state: None):
    """Train on 24 images, drawing from every generator: order, crops, flips, dropout. Returns weights and losses."""
    torch.manual_seed(0)
    images = torch.randint(256, (24, 6, 6, 3), dtype=torch.uint8)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(108, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)
    )
    data = TensorImages(images, torch.arange(24) % 4)
    batches = Batches(data, 8, "cpu", shuffle=True, padding=1, rng=generator(0, "batches"))
    if resume:
        network.load_state_dict(resume["network"])
    history = train(
        network, batches, lambda x, y: F.cross_entropy(network(x), y), CPU, epochs=epochs, lr=0.1,
        momentum=0.9, weight_decay=1e-3, schedule=schedule, precision="fp32", title="test", ema=ema,
        generators=[batches.rng], resume=resume, save=lambda state: save(network, state),
    )  # fmt: skip
    return network.state_dict(), [row["loss"] for row in history]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_training_resumed_from_a_file_equals_an_uninterrupted_one(tmp_path, schedule, ema, stop):
    path = tmp_path / "state.pt"

    def save_and_stop(network, state):
        torch.save({"network": network.state_dict(), **state}, path)
        if len(state["history"]) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_training(schedule, ema, save=save_and_stop)
    weights, losses = small_training(schedule, ema, resume=safe_load(path))
    expected_weights, expected_losses = small_training(schedule, ema)
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    assert losses == expected_losses


def test_the_state_of_another_training_is_refused():
    states = []
    small_training("cosine", 0, save=lambda network, state: states.append({"network": network.state_dict(), **state}))
    for change in ({"history": 3}, {"generators": []}, {"optimizer": {}}):
        with pytest.raises(UserError, match="belongs to another training"):
            small_training("cosine", 0, resume=states[0] | change)
    with pytest.raises(UserError, match="has 4 epochs, more than --epochs 2"):
        small_training("cosine", 0, epochs=2, resume=states[-1])


def test_a_run_resumes_from_its_own_state_only(tmp_path, capsys):
    options, data, model = {"lr": 0.1, "seed": 1, "name": "a"}, torch.arange(3), select_model("WRN-10-1", 4)
    folder = str(tmp_path)
    tensors = {"picture": torch.arange(4)}
    assert Resumable(folder, options, True).read(data, tensors) is None
    assert "starting from epoch 1" in capsys.readouterr().out
    metadata = {**METADATA, "attack": {"tensors": tensors}}
    Resumable(folder, options, False).save(model, {"history": []}, data, **metadata)
    assert Resumable(folder, {**options, "name": "b"}, True).read(data, tensors)["training"] == {"history": []}
    assert Resumable(folder, options, False).read(data, tensors) is None
    assert "--resume continues that run" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"a run with --lr 0.1 \(not 0.2\), --seed 1 \(not 2\)"):
        Resumable(folder, {"lr": 0.2, "seed": 2}, True).read(data, tensors)
    with pytest.raises(UserError, match="other data"):
        Resumable(folder, options, True).read(torch.arange(4), tensors)
    for other in ({}, {"picture": torch.arange(1, 5)}, {"picture": torch.arange(3)}, {"warp": torch.arange(4)}):
        with pytest.raises(UserError, match="another trigger"):
            Resumable(folder, options, True).read(data, other)
    save_checkpoint(str(tmp_path / "resume.pt"), model)
    with pytest.raises(UserError, match="not the state of a training"):
        Resumable(folder, options, True).read(data, tensors)
    Resumable(folder, options, True).end()
    write_json(str(tmp_path / "metrics.json"), {"config": options})
    assert Resumable(folder, options, True).finished()
    assert not Resumable(folder, options, False).finished()
    with pytest.raises(UserError, match=r"--lr 0.1 \(not 0.2\)"):
        Resumable(folder, {**options, "lr": 0.2}, True).finished()


def test_the_recovery_hint_names_the_weights_once_they_are_saved(tmp_path):
    run = Resumable(str(tmp_path), {}, False)
    assert run.recovery_hint == "no weights have been saved yet"
    run.save(select_model("WRN-10-1", 4), {"history": []}, torch.arange(3), **METADATA)
    assert run.path in run.recovery_hint
    run.end()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_recognised_by_the_options_that_it_used(tmp_path):
    model = tmp_path / "model.tar"
    model.write_bytes(b"weights")
    options = {"lr": 0.1, "model": str(model), "num_class": None, "normalize": ((0.5,) * 3, (0.2,) * 3), "name": "a"}
    config = options | {"num_class": 10, "model": "another path to the same file", "name": "b"}
    metrics = {"model_sha256": sha256_of(str(model)), "before": {}, "config": config}
    write_json(str(tmp_path / "metrics.json"), metrics)
    assert finished_run(str(tmp_path), options, str(model))["before"] == {}
    assert finished_run(str(tmp_path), {**options, "num_class": 10}, str(model))
    for change in ({"num_class": 12}, {"lr": 0.2}, {"normalize": ((0.5,) * 3, (0.3,) * 3)}, {"trig_w": 3}):
        assert finished_run(str(tmp_path), options | change, str(model)) is None
    assert Resumable(str(tmp_path), config, resume=True).finished()  # a file has lists for the tuples of --normalize
    with pytest.raises(UserError, match=r"belongs to a run with --lr 0.1 \(not 0.2\); use those"):
        Resumable(str(tmp_path), config | {"lr": 0.2, "trigger_seed": 3}, resume=True).finished()


def test_the_command_to_resume_starts_as_many_processes_on_a_machine_as_before(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--resume", "--name", "a b"])
    assert resume_command() == "python main.py --name 'a b' --resume"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command() == "torchrun --nproc_per_node=4 main.py --name 'a b' --resume"


def test_a_loss_that_is_not_finite_in_epoch_1_leaves_no_weights_and_says_so(started, tmp_path):
    assert exit_code_of(started(tmp_path, "--lr", "1e30")) == 1
    assert (
        "no longer finite in epoch 1; lower the learning rate; no weights have been saved yet"
        in (tmp_path / "out.txt").read_text()
    )
    assert not [path for path in (tmp_path / "results").rglob("*") if path.is_file()]


def test_ctrl_c_prints_the_command_to_resume(tmp_path, interrupted):
    command = f"python {ROOT / 'train_badnet.py'} {' '.join(OPTIONS)} --resume"
    assert interrupted("train_badnet.py", *OPTIONS, when="poisoned", cwd=tmp_path) == (
        130,
        f"error: stopped; continue with: {command}\n",
    )


def test_a_second_training_announces_what_it_replaces(tmp_path, capsys):
    folders = ("--checkpoint_root", tmp_path / "weight", "--log_root", tmp_path / "results")
    opt, _ = config.parse("train_badnet.py", ["--dataset", "shapes", *map(str, folders)])
    results, weights = train_badnet.check_output(opt, is_main_process=True)
    assert not capsys.readouterr().out
    os.makedirs(results)
    write_json(os.path.join(results, "metrics.json"), {})  # of main.py, with the same name
    train_badnet.check_output(opt, is_main_process=True)
    assert f"{results} holds an earlier run, which this one replaces" in capsys.readouterr().out
    os.makedirs(os.path.dirname(weights))
    with open(weights, "w"):
        pass
    train_badnet.check_output(opt, is_main_process=True)
    assert f"{weights} is replaced when this training ends" in capsys.readouterr().out
