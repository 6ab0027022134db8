"""Checkpoints: what is written comes back, what users have is read, what does not fit is told in one line."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import FACTS, ROOT

from models import select_model
from utils.checkpoint import find_weights, load_weights, read_checkpoint, save_checkpoint
from utils.errors import RunError, UserError
from utils.files import check_folder, write_csv, write_file, write_json


@pytest.fixture
def model():
    torch.manual_seed(0)
    return select_model("WRN-10-1", 4)


def test_a_saved_model_comes_back_with_its_facts(model, tmp_path):
    path = str(tmp_path / "new" / "a.tar")
    save_checkpoint(path, model, **FACTS, attack={"target_label": 2})
    checkpoint = read_checkpoint(path)
    other = select_model("WRN-10-1", 4)
    load_weights(other, checkpoint["state_dict"], path, "WRN-10-1")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), other.eval()(images))
    assert (checkpoint["arch"], checkpoint["attack"]) == ("WRN-10-1", {"target_label": 2})
    assert "optimizer" not in checkpoint


@pytest.mark.parametrize("holder", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_forms_that_users_have(model, tmp_path, holder, prefix):
    weights = {prefix + name: tensor for name, tensor in model.network.state_dict().items()}
    path = str(tmp_path / "a.pth")
    torch.save({holder: weights, "epoch": 3} if holder else weights, path)
    load_weights(select_model("WRN-10-1", 4), read_checkpoint(path)["state_dict"], path, "WRN-10-1")


def test_what_a_stranger_calls_its_architecture_and_attack_is_left_out(model, tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"state_dict": model.network.state_dict(), "arch": "resnet18", "attack": "badnet"}, path)
    assert read_checkpoint(path).keys() == {"state_dict"}


def test_own_weights_go_before_those_that_are_shipped(tmp_path):
    shipped = find_weights(str(tmp_path), "CIFAR10", "WRN-16-1-badnet")
    assert Path(shipped) == ROOT / "weight" / "CIFAR10" / "WRN-16-1-badnet.pth.tar"
    own = tmp_path / "CIFAR10" / "WRN-16-1-badnet.pth.tar"
    own.parent.mkdir()
    own.touch()
    assert find_weights(str(tmp_path), "CIFAR10", "WRN-16-1-badnet") == str(own)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", pickle.dumps(Hostile()), pickle.dumps({"state_dict": Hostile()})],
    ids=["empty", "text", "hostile", "hostile inside"],
)
def test_strange_files_are_refused_and_not_executed(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a checkpoint that can be read safely") as caught:
        read_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_other_things_are_told_apart(model, tmp_path):
    path = str(tmp_path / "a.pth")
    for content, told in (([1], "holds a list"), ({"epoch": 3}, "no state_dict"), ({"net": {"w": 3}}, "no state_dict")):
        torch.save(content, path)
        with pytest.raises(UserError, match=told):
            read_checkpoint(path)
    torch.save({"w": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(UserError, match="not finite"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(str(tmp_path))


def test_weights_that_do_not_fit_say_what_differs(model):
    weights = dict(model.network.state_dict())
    weights["fc.weight"] = weights["fc.weight"][:2]
    del weights["bn1.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"missing: bn1.bias; too many: extra; of another shape: fc.weight"):
        load_weights(model, weights, "a.pth", "WRN-10-1")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(str(path), {"a": 1})

    def half(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_file(str(path), half)
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        check_folder(str(tmp_path / "file" / "folder"))


def test_csv_has_one_header_over_all_columns(tmp_path):
    write_csv(str(tmp_path / "a.csv"), [{"epoch": 1}, {"epoch": 2, "acc": 3.5}])
    assert (tmp_path / "a.csv").read_text() == "epoch,acc\n1,\n2,3.5\n"


def test_figures_of_nothing_are_null_in_json(tmp_path):
    write_json(str(tmp_path / "a.json"), {"per_class": [50.0, float("nan")], "all": {"index": float("-inf")}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"per_class": [50.0, None], "all": {"index": None}}
