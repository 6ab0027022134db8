"""Networks that do what those of this repository do not, and runs on them that end in a line or go on."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, FixedBatches, state_vector
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import parametrizations

import config
import main
from attacks.stated import options_as_used
from defenses import DefenseContext, DefenseResult, purify, remove_backdoors
from defenses.inversion import shifted_patterns
from defenses.last_layer import calibrate
from models import load_clean_model, load_model, select_model
from models.selector import Classifier
from train_badnet import victim_name
from utils.checkpoint import read_checkpoint
from utils.errors import RunError, UserError

RAW = (0.0,) * 3, (1.0,) * 3
purify_module = sys.modules["defenses.purify"]  # defenses.purify is the function
IMAGES, LABELS = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
QUICK = {"epochs": 1, "device": "cpu"}


class Flat(nn.Module):
    """Views the image, and after a convolution its output, as vectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256 + 192, 3)

    def forward(self, x):
        return self.fc(torch.cat([self.conv(x).relu().view(-1, 256), x.view(x.size(0), -1)], 1))


class Attention(nn.Module):
    """Attention over the rows of the image, a weight that is not used, two outputs in training."""

    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(24, 3), nn.Linear(2, 2)

    def forward(self, x):
        rows = x.permute(0, 2, 1, 3).flatten(2)[:, None]
        logits = self.fc(scaled_dot_product_attention(rows, rows, rows).mean((1, 2)))
        return (logits, logits) if self.training else logits


class Softmax(Flat):
    def forward(self, x):
        return super().forward(x).softmax(1)


@pytest.mark.parametrize("network", [Flat, Attention])
@pytest.mark.parametrize("defense", ["ft", "ibau", "ftsam", "nc"])
def test_every_defense_runs_on_a_network_of_ones_own(network, defense):
    torch.manual_seed(0)
    options = {"target": 1, "inversion_rounds": 1, "inversion_steps": 3} if defense == "nc" else {}
    try:
        assert purify(network(), IMAGES, LABELS, defense=defense, **QUICK, **options).target in (None, 1)
    except RunError as error:
        assert "no pattern turns" in str(error)  # of an untrained network


def test_probabilities_are_not_taken_for_logits():
    with pytest.raises(UserError, match="Softmax does not end with a linear layer of 3 logits"):
        Classifier(Softmax()).find_head("Softmax", 3, (8, 8))


def test_a_file_of_ones_own_may_read_values_import_its_neighbours_and_declare_dataclasses(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 192\n")
    (tmp_path / "mine.py").write_text("""
from __future__ import annotations
from dataclasses import dataclass
import torch
from neighbour_of_mine import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Mine(torch.nn.Sequential):
    def __init__(self, num_class):
        rate = torch.linspace(0, 0.1, 3)[1].item()
        layers = torch.nn.Flatten(), torch.nn.Dropout(rate), torch.nn.Linear(Settings().width, num_class)
        super().__init__(*layers)
""")
    arch, path = f"{tmp_path / 'mine.py'}:Mine", str(tmp_path / "a.pth")
    weights = select_model(arch, 3).network.state_dict()
    assert load_model(weights, path, arch, 3, *RAW, (8, 8)).head_name == "2"
    torch.save(weights, path)
    assert load_clean_model(path, 3, RAW, CPU, arch, (8, 8), "").head_name == "2"  # it only takes images of 8 pixels
    opt, _ = config.parse("train_badnet.py", ["--arch", arch])
    assert victim_name(opt) == "mine.py:Mine-badnet"
    (tmp_path / "other.py").write_text("import a_module_of_nobody\n")
    with pytest.raises(UserError, match="needs a module a_module_of_nobody, which was not found"):
        select_model(f"{tmp_path / 'other.py'}:Net", 3)


def test_wrappers_in_wrappers_and_averages_are_unpacked(tmp_path):
    weights = Flat().state_dict()
    torch.save({f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}, tmp_path / "a.pth")
    average = torch.optim.swa_utils.AveragedModel(Flat())
    torch.save(average.state_dict(), tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        assert read_checkpoint(str(tmp_path / name))["state_dict"].keys() == weights.keys()


def test_no_network_is_given_an_empty_batch(trigger):
    def model(images):
        assert len(images)
        return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    model.head = nn.Linear(1, 2)
    batches = FixedBatches([(IMAGES[:4], torch.ones(4, dtype=torch.int64)), (IMAGES[4:6], torch.tensor([0, 1]))])
    assert trigger.rate_on(model, batches, 1) == 1.0
    calibrate(model, trigger.patterns, batches, 1)
    assert torch.equal(shifted_patterns(model, trigger, batches[:1], 1), trigger.patterns)  # no image to try them on


@pytest.mark.parametrize("option", ["--target_label", "--target_type"])
def test_an_attack_is_not_assumed_from_its_label(option):
    opt, explicit = config.parse("main.py", ["--model", "m.pth", option, "1" if option[-1] == "l" else "all2all"])
    with pytest.raises(UserError, match=f"{option} applies only with --trigger_type, since .* states no attack"):
        options_as_used(opt, explicit, {"state_dict": {}})


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS.float(), {}, "labels must be integers"),
        (LABELS - 1, {}, "labels must be integers from 0 on"),
        (LABELS, {"target": 3}, "a label from 0 to 2, not 3"),
        (LABELS, {"target": "2"}, "a label from 0 to 2, not '2'"),
        (LABELS, {"target": None}, "mcl needs a target"),
        (LABELS, {"schedule": "cosin"}, "invalid choice: .cosin.; did you mean cosine"),
        (LABELS.cfloat(), {}, "labels must be integers"),
        (LABELS, {"defense": ["ft"]}, "no defense named"),
        (LABELS, {"defense": "ft", "target": 2}, "ft defends against every label, and takes no target"),
    ],
)
def test_purify_refuses_what_does_not_fit(labels, options, message):
    with pytest.raises(UserError, match=message):
        purify(Flat(), IMAGES, labels, **options)


@pytest.mark.parametrize("images", [IMAGES.cfloat(), IMAGES[:, :, :0], IMAGES.numpy().astype("uint16")])
def test_purify_refuses_images_that_are_none(images):
    with pytest.raises(UserError, match="images must be .* floats in"):
        purify(Flat(), images, LABELS, defense="ft")


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_frozen_weights_of_other_names_are_trained_too(norm):
    model = Flat()
    norm(model.conv), norm(model.fc)
    before = {name: weight.clone() for name, weight in model.requires_grad_(False).named_parameters()}
    after = dict(purify(model, IMAGES, LABELS, defense="ft", **QUICK).model.named_parameters())
    assert {name for name, weight in after.items() if torch.equal(weight, before[name])} == set()


def test_a_compiled_network_is_taken_apart():
    network, images = Flat(), IMAGES[:2]
    classifier = Classifier(torch.compile(network, backend="eager"))
    assert classifier.find_head("Flat", 3, (8, 8)) == 3
    assert classifier.network is network
    assert torch.allclose(classifier.head(classifier.features(images)), network(images), atol=1e-6)
    network.fc.bias.requires_grad_(False)
    result = purify(torch.compile(network, backend="eager"), IMAGES, LABELS.to(torch.uint16), defense="ft", **QUICK)
    assert not result.model.fc.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_that_computes_in_another_precision_is_purified(dtype, trigger, monkeypatch):
    class Inside(Flat):
        def forward(self, x):
            return super().forward(x.to(dtype))

    monkeypatch.setattr("defenses.base.find_trigger", lambda *_: trigger)
    assert purify(Inside().to(dtype), IMAGES, LABELS, target=1, rounds=1, **QUICK).model.fc.weight.dtype == dtype


@pytest.mark.parametrize("option", ["epochs", "contrast", "rounds", "lr"])
def test_false_is_no_value_of_an_option_that_has_one(option):
    with pytest.raises(UserError, match=f"--{option}"):
        purify(Flat(), IMAGES, LABELS, target=1, **{**QUICK, option: False})


@pytest.mark.parametrize(
    "change",
    [{"images": list(IMAGES)}, {"images": IMAGES[0]}, {"labels": 5}, {"labels": ["a"] * 24}]
    + [{"seed": None}, {"seed": 2**64}],
)
def test_what_is_no_tensor_and_no_seed_is_told_in_a_line(change):
    with pytest.raises(UserError, match="images|seed"):
        purify(**{"model": Flat(), "images": IMAGES, "labels": LABELS, "defense": "ft", **QUICK, **change})


def test_images_of_the_target_class_alone_show_no_trigger():
    with pytest.raises(UserError, match="all images are of label 1"):
        purify(Flat(), IMAGES, torch.ones(24, dtype=torch.int64), target=1, **QUICK)


def test_purify_trains_in_inference_mode_too():
    torch.manual_seed(0)
    model, images = Flat(), IMAGES.clone()
    with torch.inference_mode():
        result = purify(model, images, LABELS, defense="ft", **QUICK)
    assert not torch.equal(result.model.fc.weight, model.fc.weight)


def test_purify_refuses_images_with_nan():
    with pytest.raises(UserError, match="floats in"):
        purify(Flat(), IMAGES.where(IMAGES < 0.5, torch.nan), LABELS)


def test_a_further_backdoor_that_cannot_be_inverted_leaves_the_first_student(monkeypatch, victim, capsys):
    def run_defense(name, context, options, precision):
        if context.target == 2:
            raise RunError("no pattern")
        return DefenseResult(victim, [{"epoch": 1}], "trigger")

    monkeypatch.setattr(purify_module, "run_defense", run_defense)
    monkeypatch.setattr(purify_module, "find_target", lambda *_: (2, [], "label 2 is suspected"))
    context = DefenseContext(victim, [], [], True, 24, CPU, 0, main.Stopwatch(), 1)
    assert remove_backdoors("mcl", context, {"verify": True}, [], 3) == (victim, [{"epoch": 1}], {1: "trigger"})
    assert "the further backdoor was not removed: no pattern" in capsys.readouterr().out
    with pytest.raises(RunError, match="no pattern"):
        remove_backdoors("mcl", context._replace(target=2), {"verify": True}, [], 3)


def test_nad_refuses_a_network_of_few_resolutions_before_any_training(monkeypatch):
    monkeypatch.setattr("defenses.nad.finetune", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match="three resolutions, and this network has 1"):
        purify(Flat(), IMAGES, LABELS, defense="nad", **QUICK)


def test_a_network_of_one_logit_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 1))
    with pytest.raises(UserError, match="one logit"):
        purify(network, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), device="cpu")


class Dropout(Flat):
    def forward(self, x):
        return self.fc(F.dropout(torch.cat([self.conv(x).relu().flatten(1), x.flatten(1)], 1), 0.5, self.training))


def test_the_seed_draws_the_dropout_and_nothing_else_is_seeded():
    torch.manual_seed(0)
    model, results = Dropout(), []
    for seed in (1, 1, 2):
        torch.manual_seed(10 + len(results))
        expected = torch.rand(1, generator=torch.Generator().manual_seed(10 + len(results)))
        results.append(state_vector(purify(model, IMAGES, LABELS, defense="ft", seed=seed, **QUICK).model))
        assert torch.equal(torch.rand(1), expected)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
