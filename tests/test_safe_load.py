"""Hundreds of damaged and hostile checkpoints, loaded as main.py does: each is loaded correctly or refused in one line,
nothing is executed, nothing hangs, and no memory is taken for a false size."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from conftest import CPU
from hostile_files import CANARY, legacy_bytes, safetensors_bytes, valid_checkpoint, write_files, zip_bytes

import config
from main import load_victim
from models import select_model
from utils import safe_load
from utils.datasets import ImageSet
from utils.errors import UserError

SECONDS, MEGABYTES = 5, 600  # per file; a few times what a valid one takes


def load_weights_like_main(path, explicit=frozenset()):
    """What main.py does with --model, --arch WRN-10-1 and images of ten classes; returns the state_dict."""
    options, _ = config.parse("main.py", ["--dataset", "shapes", "--arch", "WRN-10-1", "--model", str(path)])
    options = config.single_run_options(options, model=str(path))
    images, labels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    test_set = ImageSet(images, labels, list("0123456789"))
    model, *_ = load_victim(options, explicit, test_set, CPU)
    return model.network.state_dict()


def load_all(folder, report):
    os.chdir(folder)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even in code that holds the interpreter's lock
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    expected, outcomes = valid_checkpoint()["state_dict"], {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(folder.iterdir()):
        signal.alarm(SECONDS)
        try:
            weights = load_weights_like_main(path)
            is_same = all(torch.equal(weights[name], expected[name]) for name in expected)
            outcomes[path.name] = "same" if is_same else "other"
        except UserError as error:
            outcomes[path.name] = f"refused: {error}"
        except BaseException as error:  # noqa: BLE001 - the test looks for these
            outcomes[path.name] = f"raised {error!r}"
        report.write_text(json.dumps(outcomes))
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
        if growth > MEGABYTES:
            outcomes[path.name] += f" raised memory by {growth:.0f} MB"
            peak += growth * 1024
    signal.alarm(0)
    report.write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """File name -> "same" (the valid weights), "other" (other weights), "refused: <message>" or "raised ..."."""
    folder, report = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("report") / "outcomes.json"
    count = write_files(folder)
    start = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(target=load_all, args=(folder, report))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    outcomes = json.loads(report.read_text())
    print(f"{count} files in {time.monotonic() - start:.0f} s")
    assert (process.exitcode, len(outcomes)) == (0, count), f"stopped after {list(outcomes)[-1:]}"
    assert not (folder / CANARY).exists()
    yield outcomes
    shutil.rmtree(folder)


def test_every_file_is_loaded_or_refused_in_one_line(outcomes):
    assert len(outcomes) > 500
    assert not {name: outcome for name, outcome in outcomes.items() if "raised" in outcome or "\n" in outcome}
    assert {outcome.split(":")[0] for outcome in outcomes.values()} == {"same", "other", "refused"}


def test_nothing_hostile_is_loaded_and_checksums_hold(outcomes):
    for kind in ("hostile", "sizes", "header", "bytes"):
        files = {name: outcome for name, outcome in outcomes.items() if name.startswith(f"{kind} ")}
        assert files and not [name for name, outcome in files.items() if not outcome.startswith("refused")]
    damaged_zips = {outcome.split(":")[0] for name, outcome in outcomes.items() if name.startswith("zip ")}
    assert damaged_zips <= {"same", "refused"}
    assert outcomes["archives 0"] == "same"


def test_valid_files_of_every_format_are_loaded(tmp_path):
    checkpoint = valid_checkpoint()
    weights = checkpoint["state_dict"]
    nested = {"epoch": 3, "model": {"net": {f"module.{name}": tensor for name, tensor in weights.items()}}}
    parameters = {n: torch.nn.Parameter(w) if w.is_floating_point() else w for n, w in weights.items()}
    contents = (
        zip_bytes(checkpoint), legacy_bytes(checkpoint), safetensors_bytes(weights), zip_bytes(nested),
        legacy_bytes(parameters),
    )  # fmt: skip
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
        loaded = load_weights_like_main(tmp_path / str(i))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_safetensors_of_every_supported_type_are_loaded_unchanged(tmp_path):
    dtypes = safe_load.STORAGE_DTYPES.values()
    weights = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes} | {"empty": torch.zeros(0, 3)}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(weights))
    loaded = safe_load.safe_load(tmp_path / "a.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(loaded[n].dtype == w.dtype and torch.equal(loaded[n], w) for n, w in weights.items())


def test_a_file_above_the_size_limit_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(zip_bytes(valid_checkpoint()))
    monkeypatch.setattr(safe_load, "MAX_FILE_BYTES", 1000)
    with pytest.raises(safe_load.UnsafeFile, match="a checkpoint has at most"):
        safe_load.safe_load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("arch", "num_class", "message"),
    [
        ("WRN-16-2", 10, "it appears to hold WRN-16-2 with 10 classes: --arch WRN-16-2 --num_class 10"),
        ("WRN-10-1", 43, "of another shape: fc.weight, fc.bias); it appears to hold WRN-10-1 with 43 classes"),
        ("ResNet18", 100, "it appears to hold ResNet18 with 100 classes"),
        ("PreActResNet18", 10, "it appears to hold PreActResNet18 with 10 classes"),
    ],
)
def test_weights_that_do_not_fit_name_the_architecture_they_belong_to(tmp_path, arch, num_class, message):
    torch.save(select_model(arch, num_class).network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        load_weights_like_main(tmp_path / "a.pth", {"arch"})
    assert message in str(caught.value)


def test_weights_of_an_unknown_architecture_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "a.pth")
    message = r"missing: conv1.weight, .* \.\.\.; unexpected: features.0.weight.* no known architecture"
    with pytest.raises(UserError, match=message):
        load_weights_like_main(tmp_path / "a.pth")
