"""--tensorboard: the curves in the files that TensorBoard reads, or a line that says what is missing."""

import sys
from types import SimpleNamespace

import pytest

from utils.board import open_board
from utils.errors import UserError


def test_without_the_package_it_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_board("nowhere")


def test_every_figure_is_a_curve_that_is_there_at_once(monkeypatch):
    done = []

    class Writer:
        def __init__(self, folder, purge_step):
            done.append((folder, purge_step))

        def add_scalar(self, *point):
            done.append(point)

        def flush(self):
            done.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = open_board("folder")
    assert done == []  # a run that never comes to its first epoch leaves no file
    log({"acc": 90.0, "asr": 5.0}, 3)
    log({"acc": 91.0}, 4)
    assert done == [("folder", 3), ("acc", 90.0, 3), ("asr", 5.0, 3), "flush", ("acc", 91.0, 4), "flush"]


def test_a_second_run_takes_the_place_of_the_first(tmp_path):
    pytest.importorskip("tensorboard", reason="no TensorBoard here: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, epochs in enumerate((4, 2)):
        log = open_board(str(tmp_path))
        for epoch in range(epochs):
            log({"acc": 10.0 * run + epoch}, epoch)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("acc")
    assert [(event.step, event.value) for event in events] == [(0, 10.0), (1, 11.0)]
