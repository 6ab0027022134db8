"""purify: the door for Python users."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, state_vector
from torch import nn

import config
from attacks import Attack
from defenses import DefenseResult, find_target, purify, remove_backdoors
from defenses.inversion import ANY_OTHER, InvertedTrigger, LabelScore
from models.loading import load_model
from utils.errors import UserError
from utils.seed import generator
from utils.shapes import draw_shapes

purify_module = sys.modules["defenses.purify"]  # defenses.purify is the function


class Wrapped(nn.Module):
    """A user's own class: a network with its normalisation inside."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, x):
        return self.inner(x)


@pytest.fixture(scope="module")
def backdoored():
    checkpoint = torch.load(ROOT / "weight" / "shapes" / "WRN-16-1-badnet.pth.tar", weights_only=True)
    model = load_model(checkpoint["state_dict"], "shapes", "WRN-16-1", 10, *checkpoint["normalization"])
    return Wrapped(model).eval(), Attack(**checkpoint["attack"])


@pytest.fixture(scope="module")
def clean_images():
    images, labels = draw_shapes("train")
    return images[:500], labels[:500]


def test_a_model_of_ones_own_class_is_purified_and_left_as_it_is(backdoored, clean_images):
    model, attack = backdoored
    before = state_vector(model).clone()
    images, labels = clean_images
    floats = images.permute(0, 3, 1, 2) / 255
    short = {"inversion_rounds": 1, "rounds": 1, "epochs": 2, "finetune_epochs": 1}
    result = purify(model, floats, labels, target=attack.target, device="cpu", **short)
    assert torch.equal(state_vector(model), before)
    assert type(result.model) is Wrapped
    assert result.target == attack.target
    assert result.purified is True
    assert result.search is None
    assert len(result.history) == 2
    assert result.accuracy["before"] > 99
    assert result.accuracy["after"] > 97
    test_images, test_labels = (part[:300] for part in draw_shapes("test"))
    triggered = attack.stamp(test_images).permute(0, 3, 1, 2) / 255
    others = test_labels != attack.target
    with torch.no_grad():
        asr = (result.model(triggered[others]).argmax(1) == attack.target).double().mean()
        right = (result.model(test_images.permute(0, 3, 1, 2) / 255).argmax(1) == test_labels).double().mean()
    assert asr < 0.05
    assert right > 0.95


def test_uint8_images_are_the_same_images(backdoored, clean_images):
    model, _ = backdoored
    images, labels = clean_images[0][:64], clean_images[1][:64]
    results = [
        purify(model, x, labels, defense="ft", epochs=1, device="cpu").model
        for x in (images, images.permute(0, 3, 1, 2) / 255)
    ]
    assert torch.equal(*map(state_vector, results))


def test_a_model_without_a_backdoor_is_not_touched(clean_images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    result = purify(model, *clean_images, inversion_rounds=1, device="cpu")
    assert result.model is None
    assert result.target is None
    assert len(result.search) >= 11


IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES * 2 - 1}, "floats in .0, 1., not normalised"),
        ({"images": IMAGES * 1.5}, "floats in .0, 1., not normalised"),
        ({"images": IMAGES[:, :1]}, "must be .N, 3, H, W. floats in .0, 1."),
        ({"images": IMAGES.double().int()}, "must be .N, 3, H, W. floats in .0, 1."),
        ({"images": IMAGES[:3]}, r"not \(3, 3, 8, 8\) and \(4,\)"),
        ({"labels": LABELS + 2}, "label 4 is not one of the model's labels 0..2"),
        ({"defense": "ntc"}, "no defense named 'ntc'; did you mean nc"),
        ({"epoch": 3}, "mcl has no option 'epoch'; did you mean epochs"),
        ({"model": nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())}, "does not end with a linear layer of 3 logits"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(change, message):
    arguments = {"model": copy.deepcopy(MODEL), "images": IMAGES, "labels": LABELS, "device": "cpu", **change}
    with pytest.raises(UserError, match=message):
        purify(**arguments)


def test_floats_three_pixels_wide_are_not_taken_for_uint8():
    images = torch.arange(4 * 3 * 2 * 3).view(4, 3, 2, 3) / 255
    checked = purify_module._checked(images, LABELS)
    assert torch.equal(checked.images, (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    assert checked.labels.tolist() == LABELS.tolist()


def test_a_further_backdoor_of_the_purified_model_is_removed_too(make_context, victim, trigger, monkeypatch, capsys):
    found, runs, searched = iter([(2, [], "found 2"), (None, [], "none")]), [], []

    def run(name, context, options, precision):
        assert (name, precision) == ("mcl", "bf16")
        runs.append(context)
        return DefenseResult(copy.deepcopy(context.victim).requires_grad_(True), [{"epoch": 1}, {"epoch": 2}], trigger)

    monkeypatch.setattr(purify_module, "run_defense", run)
    monkeypatch.setattr(purify_module, "find_target", lambda *args: searched.append(args[1:]) or next(found))
    options = {"verify": True, "force": True}
    student, history, triggers = remove_backdoors("mcl", make_context(seed=5), options, "images", 3, "bf16")
    assert searched == [("images", 3, CPU, 5, {"verify": True, "force": False}, "bf16")] * 2
    assert [context.target for context in runs] == [1, 2]
    assert runs[0].victim is victim
    assert runs[1].victim is not student
    assert not any(parameter.requires_grad for parameter in runs[1].victim.parameters())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert triggers == {1: trigger, 2: trigger}
    assert "the purified model: found 2" in capsys.readouterr().out
    runs.clear()
    assert remove_backdoors("mcl", make_context(), {"verify": False}, None, 3, "bf16")[2] == {1: trigger}
    found = iter([(1, [], "found 1 again")])
    assert remove_backdoors("mcl", make_context(), {"verify": True}, None, 3, "bf16")[2] == {1: trigger}
    assert len(runs) == 2


class CountingTrigger(InvertedTrigger):
    """An inverted trigger that still turns the fraction `rate` of the images."""

    def __init__(self, rate):
        self.rate, self.measured = rate, []

    def excess_on(self, model, victim, batches, label):
        assert victim is not model
        self.measured.append((model, torch.cat([labels for _, labels in batches]).tolist(), label))
        return self.rate


class AlwaysPredicts(nn.Module):
    """Stands for a student."""

    def __init__(self, label):
        super().__init__()
        self.label, self.network = label, nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def forward(self, images):
        return F.one_hot(torch.full((len(images),), self.label), 3).float()


@pytest.mark.parametrize("rate", [None, 0.099, 0.101])
@pytest.mark.parametrize(
    ("options", "target", "augmented", "size"),
    [
        ({}, 2, True, 64),
        ({"target": 1, "augment": "none", "batch_size": 4}, 1, False, 4),
        ({"target": "any", "mirrored": False}, ANY_OTHER, True, 64),
    ],
)
def test_what_the_defense_is_given_and_what_comes_back(options, target, augmented, size, rate, monkeypatch):
    given, searched, trigger, student = [], [], CountingTrigger(rate), AlwaysPredicts(2)

    def search(*args):
        searched.append(args)
        return 2, ["scores"], "reason"

    def remove(*args):
        given.append(args)
        return student, ["history"], {target: trigger} if rate is not None else {}

    monkeypatch.setattr(purify_module, "find_target", search)
    monkeypatch.setattr(purify_module, "remove_backdoors", remove)
    result = purify(MODEL, IMAGES, LABELS, seed=7, device="cpu", epochs=3, **options)

    ((name, context, recipe, search_batches, num_class),) = given
    own = {option: value for option, value in options.items() if option != "mirrored"}
    assert (name, num_class, recipe) == ("mcl", 3, config.DEFENSES["mcl"] | {"epochs": 3} | own)
    assert (context.target, context.image_count, context.seed, context.device) == (target, 4, 7, CPU)
    assert (context.augmented, context.mirrored) == (augmented, options.get("mirrored", True))
    assert context.victim.network is not MODEL
    assert not context.victim.training
    assert not any(parameter.requires_grad for parameter in context.victim.parameters())
    assert torch.allclose(context.victim(IMAGES), MODEL(IMAGES), atol=1e-6)
    assert (context.train_batches.batch_size, context.plain_batches.batch_size) == (size, 4)
    assert context.train_batches.mirror == options.get("mirrored", True)
    images, labels = next(iter(context.plain_batches))
    assert torch.allclose(images[labels.argsort(stable=True)][2:], IMAGES[1:3], atol=1 / 255)
    if "target" in options:
        assert (searched, result.search) == ([], None)
    else:
        assert searched == [(context.victim, search_batches, 3, context.device, 7, recipe)]
        assert result.search == ["scores"]
    is_purified = None if rate is None else rate < 0.1
    assert (result.target, result.purified, result.history) == (target, is_purified, ["history"])
    assert result.model is (None if is_purified is False else student.network)
    assert result.trigger is (None if rate is None else trigger)
    assert trigger.measured == ([] if rate is None else [(student, LABELS.tolist(), target)])
    before = 100 * (MODEL(IMAGES).argmax(1) == LABELS).double().mean().item()
    assert result.accuracy == {"before": before, "after": 100 * (LABELS == 2).double().mean().item()}


def test_nothing_is_trained_if_the_search_finds_nothing(monkeypatch):
    monkeypatch.setattr(purify_module, "find_target", lambda *_: (None, ["scores"], "reason"))
    assert purify(MODEL, IMAGES, LABELS, device="cpu") == (None, None, ["scores"], None, None, None, [])


@pytest.mark.parametrize("flagged", [True, False])
def test_suspects_are_inverted_only_if_no_label_is_flagged(victim, flagged, monkeypatch):
    score, calls = LabelScore(1, "pixels", 9.0, 1.0, -3.0 if flagged else -1.0, 0.1, 0.01), []
    monkeypatch.setattr(purify_module, "search_target", lambda *args, **named: calls.append((args, named)) or [score])
    monkeypatch.setattr(purify_module, "invert_suspects", lambda *args: calls.append(args) or [score])
    options = {"inversion_rounds": 5, "inversion_steps": 6, "inversion_batches": 7, "force": True}
    label, scores, reason = find_target(victim, "batches", 3, CPU, 4, options, "bf16")
    ((searched, named), *inverted) = calls
    assert (searched[:4], named) == ((victim, "batches", 3, CPU), {"precision": "bf16"})
    assert (label, scores, "suspected" in reason) == (1, [score], flagged)
    assert [args[:4] + args[5:] for args in inverted] == [(victim, "batches", [score], CPU, 5, 6, 7, "bf16")] * (
        not flagged
    )
    seeds = [rng.initial_seed() for rng in (searched[4], *(args[4] for args in inverted))]
    assert seeds == [generator(4, name).initial_seed() for name in ("search", "suspects")[: len(seeds)]]


def test_a_defense_gets_its_own_options_and_batch_norm_enough_momentum(make_context, victim, monkeypatch):
    given, layers = [], [layer for layer in victim.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer, momentum in zip(layers, [0.01, 0.5, None], strict=False):
        layer.momentum = momentum
    monkeypatch.setitem(purify_module.DEFENSE_FUNCTIONS, "mcl", lambda *args, **named: given.append((args, named)))
    context, options = make_context(), {**config.DEFENSES["mcl"], "dataset": "CIFAR10"}
    purify_module.run_defense("mcl", context, options, "bf16")
    consumed = {"target", "force", "verify", "batch_size", "augment"}
    expected = {name: value for name, value in config.DEFENSES["mcl"].items() if name not in consumed}
    assert given == [((context,), expected | {"precision": "bf16"})]
    assert [layer.momentum for layer in layers[:4]] == [0.1, 0.5, None, 0.1]


OWN_PROGRAM = """
import runpy

import models, utils.files, config

purify = runpy.run_path({path!r})["purify"]
import models.net

images = torch.rand(20, 3, 8, 8)
result = purify(models.net.Net(), images, torch.arange(20) % 4, defense="ft", epochs=1, device="cpu")
assert type(result.model) is models.net.Net
assert (models.NAME, utils.files.NAME, config.NAME) == ("own",) * 3
import defenses
print("purified", defenses.NAME)
"""


def test_it_works_beside_modules_of_the_same_names(tmp_path, script):
    network = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    network += "        self.fc = nn.Linear(192, 4)\n    def forward(self, x):\n        return self.fc(x.flatten(1))\n"
    for folder in ("models", "utils", "defenses"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("NAME = 'own'\n")
    (tmp_path / "models" / "net.py").write_text(f"from torch import nn\n\n{network}")
    (tmp_path / "utils" / "files.py").write_text("NAME = 'own'\n")
    (tmp_path / "config.py").write_text("NAME = 'own'\n")
    path = str(ROOT / "defenses" / "isolated.py")
    (tmp_path / "program.py").write_text(f"import torch{OWN_PROGRAM.format(path=path)}")
    done = script("-m", "program", cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["purified own"], done.stderr
