"""A comparison over seeds, dealt out to processes: every run once, also if a process dies; the same table."""

import csv
import os
import subprocess
import sys
import time
from threading import Thread

import pytest
from conftest import METADATA, ROOT

from models import select_model
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.grid import deal_out, lock

OPTIONS = "--dataset shapes --device cpu --clean 20 --print_freq 0 --defense ft --epochs 1 --schedule constant"
OPTIONS = [*OPTIONS.split(), "--seeds", "1", "2"]


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim.tar"
    save_checkpoint(str(path), select_model("WRN-10-1", 10), **METADATA | {"num_class": 10})
    return path


@pytest.fixture
def start(tmp_path, victim):
    """Start main.py as torchrun starts process `rank` of two, in a folder of its own for each comparison."""
    processes = []

    def run(name, rank, count=2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, ROOT / "main.py", *OPTIONS, "--model", victim, "--name", name]
        with open(tmp_path / f"{name}-{rank}.txt", "w") as output:
            processes.append(subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=output, stderr=output))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()


def table(tmp_path, name):
    with open(tmp_path / "results" / name / "comparison.csv") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def test_a_killed_process_leaves_its_run_to_the_others_and_the_table_is_that_of_one_process(tmp_path, start):
    assert start("one", 0, count=1).wait() == 0, (tmp_path / "one-0.txt").read_text()
    results = tmp_path / "results" / "two"
    main, other = start("two", 0), start("two", 1)
    while len(list(results.glob(".*.lock"))) < 2:  # both are at work
        assert main.poll() is other.poll() is None, (tmp_path / "two-0.txt").read_text()
        time.sleep(0.02)
    other.kill()
    assert main.wait() == 0, (tmp_path / "two-0.txt").read_text()
    assert table(tmp_path, "two") == table(tmp_path, "one")
    assert [row["seed"] for row in table(tmp_path, "two")] == ["1", "2"]
    assert len({row["acc"] for row in table(tmp_path, "two")}) == 2  # another seed, another result
    assert (tmp_path / "two-1.txt").read_text() == ""  # only the main process prints
    assert " ± " in (results / "comparison.md").read_text()


def test_one_run_is_not_done_by_several_processes(tmp_path, start, monkeypatch):
    monkeypatch.setattr("test_grid.OPTIONS", OPTIONS[:-1])  # one seed
    assert start("one", 1).wait() == 2
    assert (tmp_path / "one-1.txt").read_text().startswith("error: several processes share the runs of a comparison")
    assert not (tmp_path / "results").exists()


def test_a_name_is_had_by_one_process_at_a_time_and_by_the_next_if_that_dies(tmp_path):
    first, second = (deal_out(str(tmp_path), ["a", "b/c"], 2, pause=0) for _ in range(2))
    assert next(first) == "a"
    assert next(second) == "b/c"
    first.close()
    assert next(second) == "a"
    with lock(str(tmp_path / ".a.lock")) as is_mine:
        assert not is_mine
    with lock(str(tmp_path / "a")):
        other = Thread(target=lambda: lock(str(tmp_path / "a"), wait=True).__enter__())
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()
    assert list(second) == []
    assert list(deal_out(str(tmp_path / "unused"), ["a", "b"], 1)) == ["a", "b"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot lock .*: File exists"), lock(str(tmp_path / "file" / ".a.lock")):
        pass
    assert not (tmp_path / "unused").exists()
