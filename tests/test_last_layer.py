"""What MCL does to the last layer: blindness to the trigger, and calibrated biases."""

import copy

import pytest
import torch
from conftest import state_vector
from test_mcl import ONE_STEP, RECIPE

from defenses import last_layer, mcl
from defenses.inversion import ANY_OTHER, apply_patterns
from defenses.last_layer import calibrate, make_blind, trigger_directions


class FixedFeatures(torch.nn.Module):
    """Features are the first three channels of the upper left pixel; the last layer has given weights."""

    def __init__(self, weight):
        super().__init__()
        self.head = torch.nn.Linear(3, len(weight))
        self.head.weight, self.head.bias = (torch.nn.Parameter(torch.tensor(v)) for v in (weight, [0.0] * len(weight)))

    def features(self, images):
        return images[:, :, 0, 0]


def test_directions_are_the_main_ones_of_the_shift_of_other_labels(victim, batches, trigger, monkeypatch):
    monkeypatch.setattr(last_layer, "DIRECTIONS", 64)
    patterns = torch.stack([trigger.pattern, trigger.pattern.flip(2)])
    directions = trigger_directions(victim, patterns, batches, 1)
    labels = torch.cat([labels for _, labels in batches])
    images, triggered = (
        torch.cat(parts) for parts in ([x for x, _ in batches], [apply_patterns(x, patterns) for x, _ in batches])
    )
    shift = (victim.features(triggered) - victim.features(images))[labels != 1]
    moments, vectors = torch.linalg.eigh(shift.T @ shift)
    assert len(directions) == len(shift)
    assert torch.allclose((directions[0] @ vectors[:, -1]).abs(), torch.tensor(1.0), atol=1e-4)
    assert torch.allclose((shift @ directions.T).square().sum(0)[:4], moments.flip(0)[:4], rtol=1e-3)
    assert torch.allclose(directions @ directions.T, torch.eye(len(directions)), atol=1e-4)


def test_directions_need_few_images(victim, batches, trigger, monkeypatch):
    monkeypatch.setattr(last_layer, "DIRECTION_IMAGES", int((batches[0][1] != 1).sum()))
    first = trigger_directions(victim, trigger.patterns, batches[:1], 1)
    assert torch.equal(trigger_directions(victim, trigger.patterns, batches, 1), first)
    assert len(first) == last_layer.DIRECTIONS
    only_target = [(images, torch.ones_like(labels)) for images, labels in batches]
    assert len(trigger_directions(victim, trigger.patterns, only_target, 1)) == 0


@pytest.mark.parametrize(("cost", "blind"), [(0.49, False), (0.5, True)])
def test_the_layer_is_made_blind_where_the_clean_images_can_spare_it(cost, blind, monkeypatch):
    monkeypatch.setattr(last_layer, "MAX_COST", cost)
    weight = [[5.0, 1.0, 1.0], [-5.0, -1.0, -1.0]]  # without the first two features, the third one decides
    features = torch.tensor([[0.0, 2.0, -1.0], [0.0, 1.0, 1.0], [0.0, -1.0, -1.0], [0.0, -2.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])  # two of four are wrong then
    model, images = FixedFeatures(weight), features[:, :, None, None]
    halves = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    assert make_blind(model, torch.eye(3)[:2], halves, ANY_OTHER) is blind
    expected = torch.tensor(weight)
    expected[:, :2] *= not blind
    assert torch.equal(model.head.weight, expected)


@pytest.mark.parametrize(("others", "target", "blind"), [(98, 1, False), (98, ANY_OTHER, True), (98, 2, False)])
def test_a_blind_layer_still_knows_the_target_class(others, target, blind):
    # The first feature is the target's alone: without it, its two images of 100 are lost. No image is of label 2.
    weight = [[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    features = torch.tensor([[1.0, 0.5, 0.0]] * 2 + [[0.0, 1.0, 0.0]] * others)
    labels = torch.tensor([1] * 2 + [0] * others)
    model = FixedFeatures(weight)
    assert make_blind(model, torch.eye(3)[:1], [(features[:, :, None, None], labels)], target) is blind


def test_a_blind_layer_does_not_see_the_trigger(victim, batches, trigger, monkeypatch):
    monkeypatch.setattr(last_layer, "MAX_COST", 1.0)
    monkeypatch.setattr(last_layer, "DIRECTIONS", 64)
    model, images = copy.deepcopy(victim), torch.cat([images for images, _ in batches])
    assert not torch.allclose(model(apply_patterns(images, trigger.patterns)), model(images), atol=1e-4)
    make_blind(model, trigger_directions(victim, trigger.patterns, batches, ANY_OTHER), batches, ANY_OTHER)
    assert torch.allclose(model(apply_patterns(images, trigger.patterns)), model(images), atol=1e-4)
    model.head.weight.copy_(victim.head.weight)
    assert torch.equal(state_vector(model), state_vector(victim))  # nothing else has changed


def test_the_student_is_made_blind_to_the_victims_directions(make_context, victim, batches, trigger, monkeypatch):
    monkeypatch.setattr(last_layer, "MAX_COST", 1.0)
    directions = trigger_directions(victim, trigger.patterns, batches, ANY_OTHER)
    context = make_context(augmented=False, target=ANY_OTHER)  # the untrained victim knows no image of a target class
    blind = mcl.defend(context, **{**RECIPE, **ONE_STEP}).student
    assert len(directions) == last_layer.DIRECTIONS
    assert torch.allclose(blind.head.weight @ directions.T, torch.zeros(3, len(directions)), atol=1e-5)
    monkeypatch.setattr(last_layer, "MAX_COST", 0.0)
    monkeypatch.setattr(last_layer, "DIRECTIONS", 0)
    sighted = mcl.defend(context, **{**RECIPE, **ONE_STEP}).student
    assert not torch.allclose(sighted.head.weight @ directions.T, torch.zeros(3, len(directions)), atol=1e-3)


@pytest.mark.parametrize("variance", [1.0, 0.1])
def test_calibration_fits_the_biases_to_the_labels_and_nothing_else(victim, batches, trigger, variance):
    model, (images, labels) = copy.deepcopy(victim), map(torch.cat, zip(*batches, strict=True))
    calibrate(model, trigger.patterns, batches, 1, variance)
    change = model.head.bias - victim.head.bias
    assert change.abs().max() > 0.1
    others = labels != 1
    images = torch.cat([images, apply_patterns(images[others], trigger.patterns)])
    labels = torch.cat([labels, labels[others]])
    excess = model(images).softmax(1).sum(0) - torch.stack([(labels == label).sum() for label in range(3)])
    assert torch.allclose(excess, -change / variance, atol=3e-3)  # the gradient is 0: the excess is the prior's pull
    model.head.bias -= change
    assert torch.allclose(state_vector(model), state_vector(victim))


def test_calibration_bears_a_class_without_images_and_a_layer_without_biases(victim, batches, trigger):
    model = copy.deepcopy(victim)
    calibrate(model, trigger.patterns, [(images, torch.zeros_like(labels)) for images, labels in batches], 1)
    assert model.head.bias[0] > 1
    assert model.head.bias.abs().max() < 10
    model.head.bias = None
    calibrate(model, trigger.patterns, batches, 1)
    assert model.head.bias is None


def test_directions_in_which_nothing_moves_are_none():
    model, pattern = FixedFeatures([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]), torch.zeros(1, 3, 1, 1)
    pattern[0, 0] = 0.5
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) / 2
    found = trigger_directions(model, pattern, [(images, torch.zeros(8, dtype=torch.int64))], 1)
    assert found.abs().tolist() == [[pytest.approx(1.0), pytest.approx(0.0), pytest.approx(0.0)]]


@pytest.mark.parametrize(("lost", "blind"), [(2, True), (3, False)])
def test_a_blind_layer_may_cost_half_of_the_target_class(lost, blind):
    weight = [[0.0, 1.0, 0.0], [2.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    own = [[1.0, 0.5, 0.0]] * lost + [[0.0, 0.5, 1.0]] * (4 - lost)
    features = torch.tensor(own + [[0.0, 1.0, 0.0]] * 196)
    labels = torch.tensor([1] * 4 + [0] * 196)
    assert make_blind(FixedFeatures(weight), torch.eye(3)[:1], [(features[:, :, None, None], labels)], 1) is blind
