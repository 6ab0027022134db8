"""Checkpoints and files: saving, reading those of other code, one-line errors for those that do not fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import METADATA, ROOT

import config
from attacks import Attack, build_attack
from models import select_model
from models.loading import load_clean_model
from utils.checkpoint import (
    _stated_by_backdoorbench,
    check_data,
    find_weights,
    load_weights,
    read_checkpoint,
    save_checkpoint,
)
from utils.errors import RunError, UserError
from utils.files import check_writable, write_csv, write_file, write_json


@pytest.fixture
def model():
    torch.manual_seed(0)
    return select_model("WRN-10-1", 4)


class Endless:
    """Stands for nested lists, whose text has no end."""

    def __repr__(self):
        raise MemoryError


def test_values_of_a_file_are_not_turned_into_text():
    assert _stated_by_backdoorbench({"model_name": Endless(), "clean_data": Endless()}) == {}
    opt, _ = config.parse("train_badnet.py", ["--trigger_type", "blendTrigger", "--target_type", "all2all"])
    state = build_attack(opt, 10, (32, 32)).state()
    for name, message in (("target_label", "must be an integer"), ("num_class", "number of classes is not 10")):
        with pytest.raises(UserError, match=message):
            Attack.from_state(state | {name: Endless()}, 10)
    with pytest.raises(UserError, match="opacity of blendTrigger must be a number"):
        Attack.from_state(state | {"trigger_options": {"opacity": Endless()}}, 10)


def test_a_saved_model_is_read_back_with_its_metadata(model, tmp_path):
    path = str(tmp_path / "new" / "a.tar")
    save_checkpoint(path, model, **METADATA, attack={"target_label": 2})
    checkpoint = read_checkpoint(path)
    loaded = select_model("WRN-10-1", 4)
    load_weights(loaded, checkpoint["state_dict"], path, "WRN-10-1")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), loaded.eval()(images))
    assert (checkpoint["arch"], checkpoint["attack"]) == ("WRN-10-1", {"target_label": 2})
    assert "optimizer" not in checkpoint


@pytest.mark.parametrize("key", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts_of_other_code_are_found(model, tmp_path, key, prefix):
    weights = {prefix + name: tensor for name, tensor in model.network.state_dict().items()}
    path = str(tmp_path / "a.pth")
    torch.save({key: weights, "epoch": 3} if key else weights, path)
    load_weights(select_model("WRN-10-1", 4), read_checkpoint(path)["state_dict"], path, "WRN-10-1")


def test_metadata_of_other_code_is_ignored(model, tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"state_dict": model.network.state_dict(), "arch": "resnet18", "attack": "badnet"}, path)
    assert read_checkpoint(path).keys() == {"state_dict", "recognised"}


def test_images_that_a_checkpoint_was_not_trained_on_are_refused(model, tmp_path):
    checkpoint = {"image_size": 32, "dataset": "CIFAR10"}
    for data in (((32, 32),), ((32, 32), "CIFAR10"), ((32, 32), "folder")):
        check_data(checkpoint, "a.pth", *data)
    check_data({}, "a.pth", (64, 64), "CIFAR10")
    check_data({"dataset": "folder"}, "a.pth", (64, 64), "CIFAR10")
    with pytest.raises(UserError, match="a.pth was trained on images of 32 pixels a side, these have 64"):
        check_data(checkpoint, "a.pth", (64, 64))
    with pytest.raises(UserError, match="a.pth was trained on CIFAR10, not on shapes: pass --dataset CIFAR10"):
        check_data(checkpoint, "a.pth", (32, 32), "shapes")
    path = str(tmp_path / "a.pth")
    save_checkpoint(path, model, **METADATA, image_size=64)
    with pytest.raises(UserError, match="images of 64 pixels a side, these have 32"):
        load_clean_model(path, 4, METADATA["normalization"], "cpu", "WRN-10-1", (32, 32), "")
    for name, value, expected in (("image_size", torch.ones(2), "a number of pixels"), ("dataset", 3, "a name")):
        save_checkpoint(path, model, **{**METADATA, name: value})
        with pytest.raises(UserError, match=f"a.pth: its {name} is not {expected}"):
            read_checkpoint(path)


def test_trained_weights_take_precedence_over_shipped_ones(tmp_path):
    shipped = find_weights(str(tmp_path), "CIFAR10", "WRN-16-1-badnet")
    assert Path(shipped) == ROOT / "weight" / "CIFAR10" / "WRN-16-1-badnet.pth.tar"
    trained = tmp_path / "CIFAR10" / "WRN-16-1-badnet.pth.tar"
    trained.parent.mkdir()
    trained.touch()
    assert find_weights(str(tmp_path), "CIFAR10", "WRN-16-1-badnet") == str(trained)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", pickle.dumps(Hostile()), pickle.dumps({"state_dict": Hostile()})],
    ids=["empty", "text", "hostile", "hostile inside"],
)
def test_unsafe_files_are_refused_and_not_executed(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint that can be read safely") as caught:
        read_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoints_are_refused_with_the_reason(model, tmp_path):
    path = str(tmp_path / "a.pth")
    contents = ([1], "holds a list"), ({"epoch": 3}, "no state_dict"), ({"net": {"w": 3}}, "no state_dict")
    for content, message in contents:
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
    torch.save({"w": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(UserError, match="not finite"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(str(tmp_path / "b.pth"))


def test_weights_that_do_not_fit_list_the_differences(model):
    weights = dict(model.network.state_dict())
    weights["fc.weight"] = weights["fc.weight"][:2]
    del weights["bn1.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"missing: bn1.bias; unexpected: extra; of another shape: fc.weight"):
        load_weights(model, weights, "a.pth", "WRN-10-1")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})

    def write_part_and_fail(file):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_file(str(path), write_part_and_fail)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/folder", "file/folder/folder", "link/folder", "x" * 300):
        with pytest.raises(UserError, match="cannot write to"):
            check_writable(str(tmp_path / name))
    with pytest.raises(UserError, match="it is a folder"):
        check_writable(str(tmp_path.parent), tmp_path.name)


def test_checking_a_folder_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", "results", "results/a/b", str(tmp_path / "weight" / "a")):
        check_writable(folder, "metrics.json")
    assert not list(tmp_path.iterdir())


def test_csv_has_one_header_with_the_columns_of_all_rows(tmp_path):
    write_csv(str(tmp_path / "a.csv"), [{"epoch": 1}, {"epoch": 2, "acc": 3.5}])
    assert (tmp_path / "a.csv").read_text() == "epoch,acc\n1,\n2,3.5\n"


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    write_json(str(tmp_path / "a.json"), {"per_class": [50.0, float("nan")], "all": {"index": float("-inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"per_class": [50.0, None], "all": {"index": None}}
