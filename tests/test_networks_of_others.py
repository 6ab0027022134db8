"""Networks of strangers: what they do beside y = f(x) neither breaks a defense nor is changed by it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_unusual_networks import IMAGES, LABELS, QUICK, RAW, Flat, purify_module
from torch import nn
from torch.nn.utils import parametrizations

from defenses import purify
from defenses.last_layer import make_blind
from models import load_model, select_model
from models.selector import Classifier
from utils.checkpoint import recognise
from utils.errors import RunError, UserError
from utils.training import end_epoch


class Scaled(Flat):
    def forward(self, x):
        return super().forward(x).mul_(30)


class Cosine(Flat):
    class Head(nn.Linear):
        def forward(self, z):
            return F.linear(F.normalize(z), F.normalize(self.weight))

    def __init__(self):
        super().__init__()
        self.fc = self.Head(448, 3)


class FrozenBackbone(Flat):
    def forward(self, x):
        with torch.no_grad():
            features = torch.cat([self.conv(x).relu().flatten(1), x.flatten(1)], 1)
        return self.fc(features)


class Rounded(Flat):
    def forward(self, x):
        return super().forward((255 * x).round() / 255)


class Diverged(Flat):
    def __init__(self):
        super().__init__()
        nn.init.constant_(self.conv.bias, torch.nan)


class NoWeights(nn.Flatten):
    pass


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Scaled, "does not end with a linear layer of 3 logits"),
        (Cosine, "does not end with a linear layer of 3 logits"),
        (FrozenBackbone, "gives images no gradient"),
        (Rounded, "gives images no gradient"),
        (Diverged, "returns numbers that are not finite"),
        (NoWeights, "has no parameters"),
    ],
)
def test_a_network_that_a_defense_would_break_or_call_clean_is_refused(network, message):
    with pytest.raises(UserError, match=f"{network.__name__} {message}"):
        purify(network(), IMAGES, LABELS, **QUICK)


class Standardised(Flat):
    """Divides an image by its own spread."""

    def forward(self, x):
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True))


class FiveDimensions(Flat):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.zeros(1, 1, 1, 1, 2))


class Mask(Flat):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))


class Keeping(Flat):
    """Keeps the logits of its last pass, and a bias of its first one in eval mode."""

    def __init__(self):
        super().__init__()
        self.bias, self.cache = nn.Parameter(torch.zeros(3)), {}

    def train(self, mode=True):
        self.cache = {} if mode else self.cache
        return super().train(mode)

    def forward(self, x):
        bias = self.bias * 2 if self.training else self.cache.setdefault("bias", self.bias * 2)
        self.kept = self.fc(torch.cat([self.conv(x).relu().flatten(1) + bias.sum(), x.flatten(1)], 1))
        return self.kept


@pytest.mark.parametrize("network", [Standardised, FiveDimensions, Mask, Keeping])
def test_a_network_that_is_merely_unusual_is_trained(network):
    torch.manual_seed(0)
    images = IMAGES.numpy()
    with torch.no_grad():  # of the caller
        result = purify(network(), images, LABELS.tolist(), defense="ft", **QUICK)
    assert isinstance(result.model, network)


def test_a_network_that_keeps_its_last_pass_is_copied_and_trained_without_its_graph():
    model = Classifier(Keeping())
    model.find_head("Keeping", 3, (8, 8))
    student = copy.deepcopy(model.eval())
    assert model.network.cache["bias"].grad_fn is None
    for _ in range(2):
        student(IMAGES).sum().backward()
    again = copy.deepcopy(student)
    assert torch.equal(again(IMAGES), student(IMAGES))


class Constants(Flat):
    """A mean as a frozen parameter, a frozen layer, an index table as a parameter."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.full((1, 3, 1, 1), 0.5), requires_grad=False)
        self.order = nn.Parameter(torch.tensor([2, 1, 0]), requires_grad=False)
        self.conv.requires_grad_(False)

    def forward(self, x):
        return super().forward(x[:, self.order] - self.mean)


@pytest.mark.parametrize("defense", ["ft", "ibau", "ftsam", "fst", "pam"])
def test_constants_stay_and_frozen_layers_are_trained(defense, trigger, monkeypatch):
    monkeypatch.setattr("defenses.base.find_trigger", lambda *_: trigger)
    monkeypatch.setattr(purify_module, "is_purified", lambda *_: True)
    torch.manual_seed(0)
    model = Constants()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = 1 if defense == "pam" else "auto"
    result = purify(model, IMAGES, LABELS, defense=defense, target=target, **QUICK).model
    changed = {name for name, value in result.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_weight_that_is_computed_from_others_is_neither_made_blind_nor_redrawn():
    network = Flat()
    parametrizations.weight_norm(network.fc)
    model = Classifier(network).eval()
    model.find_head("Flat", 3, (8, 8))
    before = network.fc.weight.clone()
    with torch.no_grad():
        assert make_blind(model, torch.eye(448)[:1], [(IMAGES, LABELS)], 1) is False
    assert torch.equal(network.fc.weight, before)
    with pytest.raises(UserError, match="fst redraws the last layer's weight"):
        purify(network, IMAGES, LABELS, defense="fst", **QUICK)


def test_mcl_refuses_a_network_without_features_to_train():
    with pytest.raises(UserError, match="no weights in front of its last layer"):
        purify(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), IMAGES, LABELS, target=1, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": "fintuned"}, "argument --positive: invalid choice: 'fintuned'; did you mean finetuned"),
        ({"schedule": "cosin"}, "argument --schedule: invalid choice: 'cosin'; did you mean cosine"),
        ({"contrast": "none", "align_weight": 0}, "--contrast applies only with --align_weight above 0"),
        ({"batch_size": 0}, "0 is not 1 or more"),
        ({"device": "gpu"}, "device must be 'auto', 'cpu' or 'cuda', not 'gpu'"),
    ],
)
def test_misspelled_values_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        purify(Flat(), IMAGES, LABELS, **{"device": "cpu", **options})


def test_another_output_in_training_is_one_line():
    class Output(Flat):
        def forward(self, x):
            return {"logits": super().forward(x)} if self.training else super().forward(x)

    with pytest.raises(UserError, match="in training the network returns a dict, not logits"):
        purify(Output(), IMAGES, LABELS, defense="ft", **QUICK)


def test_a_model_that_cannot_be_copied_is_one_line():
    model = Keeping()
    model(IMAGES)
    with pytest.raises(UserError, match="the model cannot be copied: .*; run it once under torch.no_grad"):
        purify(model, IMAGES, LABELS, **QUICK)


def test_statistics_that_are_not_finite_end_a_training_and_masks_do_not(victim):
    row = {"epoch": 1, "lr": 0.1, "loss": 1.0, "seconds": 0.0}
    assert end_epoch(dict(row), Mask(), None, 1, None, None, None) == row
    next(module for module in victim.modules() if isinstance(module, nn.BatchNorm2d)).running_var.fill_(np.inf)
    with pytest.raises(RunError, match="no longer finite"):
        end_epoch(dict(row), victim, None, 1, None, None, None)


def test_relatives_of_a_resnet_are_not_taken_for_it():
    for name, expected in (("resnet50", "torchvision:resnet50"), ("wide_resnet50_2", None), ("resnext50_32x4d", None)):
        with torch.device("meta"):
            weights = select_model(f"torchvision:{name}", 4).network.state_dict()
        assert recognise(weights)[0] == expected


def test_a_regnet_whose_constructor_reads_values_is_loaded():
    weights = select_model("torchvision:regnet_x_400mf", 4).network.state_dict()
    assert load_model(weights, "x.pth", "torchvision:regnet_x_400mf", 4, *RAW).head_name == "fc"


def test_squeeze_and_excitation_is_no_resolution_of_nad():
    torch.manual_seed(0)
    model = select_model("torchvision:mobilenet_v3_small", 3).eval()
    maps, _ = model.maps_and_logits(torch.rand(1, 3, 64, 64))
    assert [tuple(each.shape[2:]) for each in maps] == [(8, 8), (4, 4), (2, 2)]


def test_numbers_of_numpy_and_of_text_are_taken_and_momenta_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.Flatten(), nn.Linear(144, 3))
    result = purify(model, IMAGES, LABELS, defense="ft", epochs="1", device="cpu")
    assert [module.momentum for module in result.model.modules() if isinstance(module, nn.BatchNorm2d)] == [0.01]
    with pytest.raises(RunError, match="no pattern turns"):
        steps = {"inversion_steps": 1, "inversion_batches": 1, "inversion_rounds": 1}
        purify(model, IMAGES, LABELS, target=np.int64(1), **steps, **QUICK)
