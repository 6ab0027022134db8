"""--tensorboard: curves in the files that TensorBoard reads, or an error that says which package is missing."""

import sys
from types import SimpleNamespace

import pytest

from utils.errors import UserError
from utils.reporting.tensorboard import open_tensorboard


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_tensorboard("nowhere")


def test_every_metric_is_written_at_once(monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *point):
            calls.append(point)

        def flush(self):
            calls.append("flush")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    log = open_tensorboard("folder")
    assert calls == []  # a run that never reaches its first epoch leaves no file
    log({"acc": 90.0, "asr": 5.0}, 3)
    log({"acc": 91.0}, 4)
    assert calls == [("folder", 3), ("acc", 90.0, 3), ("asr", 5.0, 3), "flush", ("acc", 91.0, 4), "flush"]


def test_a_second_run_replaces_the_first(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for run, epochs in enumerate((4, 2)):
        log = open_tensorboard(str(tmp_path))
        for epoch in range(epochs):
            log({"acc": 10.0 * run + epoch}, epoch)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("acc")
    assert [(event.step, event.value) for event in events] == [(0, 10.0), (1, 11.0)]
