"""Networks of others: of torchvision, of timm, of a user's file; what is missing is told before any work is done."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from torch import nn

from attacks.stated import options_as_used
from config import parse
from models import select_model
from models.loading import load_classifier, load_model
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.safe_load import Skipped, safe_load

RAW = (0.0,) * 3, (1.0,) * 3
USER_FILE = """
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.early = nn.Linear(3, 4)
        sizes = (3, 4), (4, 5), (5, 6)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sizes)
        self.last = nn.Linear(6, num_class)
        self.unused = nn.Linear(7, num_class)

    def forward(self, x):
        self.early(x.mean((2, 3)))
        for conv in self.convs:
            x = conv(x).relu()
        return self.last(x.mean((2, 3)))

class Tuples(Small):
    def forward(self, x):
        return super().forward(x), x

class Raises(Small):
    def forward(self, x):
        raise ValueError("two\\nlines")

class NoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 8)

    def forward(self, x):
        return self.conv(x).amax((2, 3))

class NeedsMore(Small):
    def __init__(self, num_class, depth):
        super().__init__(num_class)

def not_a_network():
    return 3
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "mine.py").write_text(USER_FILE)
    return str(tmp_path / "mine.py")


def test_the_head_is_the_last_linear_layer_that_runs_and_the_feature_its_input(user_file):
    model = select_model(f"{user_file}:Small", 4, (0.5,) * 3, (0.25,) * 3)
    model.find_head("Small", 4, (16, 16))
    assert model.head is model.network.last
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = (images - 0.5) / 0.25
    for conv in model.network.convs:
        x = F.relu(conv(x))
    assert torch.allclose(model.features(images), x.mean((2, 3)))
    assert torch.allclose(model(images), model.network.last(x.mean((2, 3))))
    assert not model.network.last._forward_hooks


def test_the_maps_are_those_of_the_last_three_resolutions(user_file):
    model = select_model(f"{user_file}:Small", 4)
    model.network.convs.append(nn.Conv2d(6, 6, 3, padding=1))
    maps, logits = model.maps_and_logits(torch.rand(2, 3, 16, 16))
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 8, 8), (5, 4, 4), (6, 2, 2)]
    assert logits.shape == (2, 4)
    del model.network.convs[1:]
    model.network.last = nn.Linear(4, 4)
    with pytest.raises(UserError, match="three resolutions, and this network has 1"):
        model.maps_and_logits(torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tuples", r"returns a tuple for 2 images, not logits of shape \(2, 4\)"),
        ("Raises", "fails on images of 16x16 pixels: two lines"),
        ("NoLinear", r"returns \(2, 10\) for 2 images, not logits of shape \(2, 4\)"),
        ("NeedsMore", "cannot be built: .*depth"),
        ("not_a_network", "makes a int, not a torch.nn.Module"),
        ("Missing", "cannot be built: .*Missing"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_a_line(user_file, name, message):
    with pytest.raises(UserError, match=message) as refused:
        select_model(f"{user_file}:{name}", 4).find_head(name, 4, (16, 16))
    assert "\n" not in str(refused.value)


def test_a_network_without_a_linear_layer_is_refused(user_file):
    with pytest.raises(UserError, match="does not end with a linear layer of 10 logits"):
        select_model(f"{user_file}:NoLinear", 10).find_head("NoLinear", 10, (16, 16))


def test_a_resnet_of_torchvision_loads_with_its_weights(tmp_path):
    torch.manual_seed(0)
    made = select_model("torchvision:resnet18", 4).eval()
    made.find_head("resnet18", 4, (32, 32))  # sets the memory format
    torch.save({f"module.{name}": tensor for name, tensor in made.network.state_dict().items()}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(str(tmp_path / "a.pth"))
    model, metadata = load_classifier(checkpoint, "a.pth", "torchvision:resnet18", 4, RAW, CPU, (32, 32))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), made(images))
    assert model.head is model.network.fc
    assert metadata["arch"] == "torchvision:resnet18"


def test_an_architecture_that_names_give_away_is_taken_unless_another_is_asked_for(tmp_path):
    for arch, number in [("torchvision:resnet18", "1"), ("ResNet18", "2"), ("WRN-16-2", "3"), ("PreActResNet18", "4")]:
        path = str(tmp_path / number)
        torch.save({f"module.{n}": w for n, w in select_model(arch, 4).network.state_dict().items()}, path)
        checkpoint = read_checkpoint(path)
        for words, expected in ([], arch), (["--arch", "WRN-10-1"], "WRN-10-1"):
            assert options_as_used(*parse("main.py", words), checkpoint).arch == expected
    unlike = select_model("torchvision:resnet18", 4).network
    unlike.conv1 = torch.nn.Conv2d(3, 64, 3)  # torchvision's names on a network that is not torchvision's
    torch.save(unlike.state_dict(), path)
    assert options_as_used(*parse("main.py", []), read_checkpoint(path)).arch == "WRN-16-1"


def backdoorbench_file(path, arch, **changes):
    """attack_result.pt as BackdoorBench writes it, with numpy arrays and numbers, and numpy numbers as keys."""
    weights = select_model(arch, 10).network.state_dict()
    poisoned = {number: {"path": f"{number}.png", "other_info": [0, 3]} for number in np.arange(3)}
    data = {"bd_data_container": {"save_folder_path": "x", "data_dict": poisoned, "save_file_format": ".png"}}
    data |= {"original_index_array": np.arange(50), "poison_indicator": np.zeros(50), "getitem_all": True}
    content = {"model_name": "preactresnet18", "num_classes": 10, "model": weights, "data_path": "../data"}
    content |= {"img_size": [32, 32, 3], "clean_data": "cifar10", "bd_train": data, "bd_test": data}
    torch.save(content | changes, path)
    return weights


def test_a_file_of_backdoorbench_is_read_with_what_it_states(tmp_path):
    path = str(tmp_path / "attack_result.pt")
    weights = backdoorbench_file(path, "PreActResNet18")
    checkpoint = read_checkpoint(path)
    assert all(torch.equal(checkpoint["state_dict"][name], tensor) for name, tensor in weights.items())
    assert (checkpoint["recognised"], checkpoint["num_class"]) == ("PreActResNet18", 10)
    assert checkpoint["normalization"] == ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))  # not those of kuangliu
    assert (checkpoint["dataset"], checkpoint["image_size"]) == ("CIFAR10", 32)
    used = options_as_used(*parse("main.py", []), checkpoint)
    assert (used.arch, used.normalize, used.trigger_type) == ("PreActResNet18", checkpoint["normalization"], None)
    assert isinstance(safe_load(path)["bd_train"]["poison_indicator"], Skipped)
    _, metadata = load_classifier(checkpoint, path, used.arch, 10, RAW, CPU)
    assert metadata["normalization"] == checkpoint["normalization"]
    used = options_as_used(*parse("main.py", ["--arch", "own.py:Resized"]), checkpoint)  # as its ViTs need it
    assert (used.arch, used.num_class) == ("own.py:Resized", 10)
    backdoorbench_file(path, "torchvision:resnet18", model_name="resnet18", clean_data="gtsrb")
    checkpoint = read_checkpoint(path)
    assert (checkpoint["recognised"], checkpoint["normalization"]) == ("torchvision:resnet18", RAW)
    backdoorbench_file(path, "PreActResNet18", clean_data="tiny", img_size=(64, 64, 3))
    checkpoint = read_checkpoint(path)
    assert (checkpoint["dataset"], checkpoint["image_size"]) == ("folder", 64)
    backdoorbench_file(path, "WRN-10-1", model_name="theirs")
    assert read_checkpoint(path).keys() == {"state_dict", "recognised"}


def test_timm_is_asked_for_if_it_is_missing():
    if importlib.util.find_spec("timm"):
        select_model("timm:resnet10t", 4).find_head("timm", 4, (32, 32))
    else:
        with pytest.raises(UserError, match="needs the package timm: pip install timm"):
            select_model("timm:resnet10t", 4)


def test_weights_of_an_unknown_network_say_what_to_pass(user_file):
    weights = select_model(f"{user_file}:Small", 4).network.state_dict()
    with pytest.raises(UserError, match="no known architecture; pass its own: --arch torchvision:NAME, "):
        load_model(weights, "a.pth", "WRN-16-1", 4, *RAW)
    assert load_model(weights, "a.pth", f"{user_file}:Small", 4, *RAW, (16, 16)).head_name == "last"


def test_code_that_a_checkpoint_names_is_not_run_unasked(user_file, tmp_path):
    path, arch = str(tmp_path / "a.tar"), f"{user_file}:Small"
    metadata = {"arch": arch, "num_class": 4, "normalization": ([0.0] * 3, [1.0] * 3)}
    save_checkpoint(path, select_model(arch, 4), **metadata)
    checkpoint = read_checkpoint(path)
    opt, explicit = parse("main.py", ["--dataset", "shapes"])
    opt.model = path
    with pytest.raises(UserError, match="needs code that is only run if you name it: --arch "):
        options_as_used(opt, explicit, checkpoint)
    opt, explicit = parse("main.py", ["--dataset", "shapes", "--arch", arch])
    opt.model = path
    assert options_as_used(opt, explicit, checkpoint).arch == arch
    with pytest.raises(UserError, match="does not fit"):
        load_classifier(checkpoint, path, "WRN-16-1", 4, RAW, CPU)


@pytest.mark.parametrize("text", ["0.5,0.5,0.5/0.2,0.2,0", "0,nan,0/1,1,1", "1,2/3,4", "x", "0.5,0.5,0.5"])
def test_a_normalization_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="argument --normalize"):
        parse("main.py", ["--normalize", text])


def test_a_normalization_in_numbers():
    opt, _ = parse("main.py", ["--normalize", "0.5,0.4,0.3/0.25,0.2,0.1"])
    assert opt.normalize == ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1))
