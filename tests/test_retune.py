"""The re-tuning attack: its data, its training, its figures."""

import copy

import pytest
import torch
from conftest import CPU, assert_weights, sgd_step_by_hand, state_vector
from test_unusual_networks import IMAGES, LABELS, Dropout

import config
from attacks import Attack, UnknownAttack
from attacks.retune import CLEAN_IMAGES, DRAWS, SGD, retune, retuned_metrics
from data_loader import Batches, DatasetCL, TensorImages, get_retuning_batches
from utils.datasets import ImageSet
from utils.errors import UserError
from utils.seed import generator

NAMES = ("acc", "asr", "ra")


@pytest.fixture
def train_set():
    """4,000 images of which each has a colour of its own in its first pixel."""
    images = torch.zeros(4000, 8, 8, 3, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(4000) % 256, torch.arange(4000) // 256
    return ImageSet(images, torch.arange(4000) % 3, ["a", "b", "c"])


def contents(batches):
    """position in the training set -> label, and which positions carry the trigger."""
    labels, poisoned = {}, set()
    for images, targets in batches:
        pixels = images.mul(255).round().int()
        for image, label in zip(pixels, targets.tolist(), strict=True):
            position = image[0, 0, 0].item() + 256 * image[1, 0, 0].item()
            labels[position] = label
            if (image[:, -1, -1] == 255).all():
                poisoned.add(position)
    return labels, poisoned


def test_the_images_are_outside_the_clean_split_and_k_of_them_poisoned(train_set):
    opt, attack = config.parse("main.py", ["--retune", "5", "20"])[0], Attack("gridTrigger", "all2one", 1, 3, 0.1)
    split = DatasetCL(train_set.images, train_set.labels, opt.ratio, generator(opt.seed, "split")).index.tolist()
    batches = get_retuning_batches(opt, train_set, attack, CPU)
    draws = {count: [contents(draw) for draw in batches[count]] for count in (5, 20)}
    assert list(batches) == [5, 20]
    for count, found in draws.items():
        assert len(found) == DRAWS
        for labels, poisoned in found:
            assert (len(labels), len(poisoned)) == (CLEAN_IMAGES + count, count)
            assert not set(labels).intersection(split)
            assert all(label == (1 if position in poisoned else position % 3) for position, label in labels.items())
            assert all(position % 3 != 1 for position in poisoned)
    assert draws[5][0][1] < draws[20][0][1]
    assert draws[5][0] != draws[5][1]
    unused = torch.tensor([i for i in range(4000) if i not in split])
    order = unused[torch.randperm(len(unused), generator=generator(opt.seed, "retune 0"))]
    assert set(order[:CLEAN_IMAGES].tolist()) == set(draws[5][0][0]) - draws[5][0][1]
    opt.retune = [3000]
    with pytest.raises(UserError, match="--retune 3000 needs more images .* the attack takes 2,500 clean ones first"):
        get_retuning_batches(opt, train_set, attack, CPU)
    with pytest.raises(UserError, match="state the trigger with --trigger_type"):
        get_retuning_batches(opt, train_set, UnknownAttack(3), CPU)


@pytest.fixture
def batches(train_set):
    data = TensorImages(train_set.images[:32], train_set.labels[:32])
    return Batches(data, 8, CPU, shuffle=True, rng=generator(1, "retune"))


def test_a_model_is_retuned_alike_each_time_and_left_unchanged(victim, batches):
    before = state_vector(victim)
    first, second = retune(victim, batches, CPU), retune(victim, batches, CPU)
    assert torch.equal(state_vector(victim), before)
    assert torch.equal(state_vector(first), state_vector(second))
    assert not torch.equal(state_vector(first), before)
    assert not first.training


def test_one_step_is_one_of_cross_entropy(monkeypatch, victim, train_set):
    monkeypatch.setitem(SGD, "epochs", 1)
    monkeypatch.setitem(SGD, "momentum", 0.0)
    data = TensorImages(train_set.images[:8], train_set.labels[:8])
    batches = Batches(data, 8, CPU, rng=generator(1, "retune"))
    ((images, labels),) = batches
    student = copy.deepcopy(victim).requires_grad_(True).train()
    loss = -student(images).log_softmax(1)[range(8), labels].mean()
    assert_weights(retune(victim, batches, CPU), sgd_step_by_hand(student, loss, 0.01))


def test_each_draw_is_shuffled_from_a_generator_of_its_own(train_set):
    opt, attack = (
        config.parse("main.py", ["--retune", "5", "--seed", "3"])[0],
        Attack("gridTrigger", "all2one", 1, 3, 0.1),
    )
    draws = get_retuning_batches(opt, train_set, attack, CPU)[5]
    seeds = [generator(3, f"retune batches {draw}").initial_seed() for draw in range(DRAWS)]
    assert [batches.rng.initial_seed() for batches in draws] == seeds
    assert all(batches.shuffle and batches.batch_size == 64 for batches in draws)


def test_it_is_the_retuned_models_that_are_measured(victim, batches):
    expected, measured = state_vector(retune(victim, batches, CPU)), []
    retuned_metrics(victim, {5: [batches] * 2}, lambda model: measured.append(model) or dict.fromkeys(NAMES, 1.0), CPU)
    assert len(measured) == 2
    assert all(torch.equal(state_vector(model), expected) for model in measured)


def test_means_and_deviations_over_the_draws(victim, batches):
    asr = iter([1.0, 2.0, 6.0])
    result = retuned_metrics(victim, {50: [batches] * 3}, lambda _: {"acc": 80.0, "asr": next(asr), "ra": 70.0}, CPU)
    assert result == {
        "50": {"acc": 80.0, "asr": 3.0, "ra": 70.0, "sd": {"acc": 0.0, "asr": pytest.approx(7**0.5), "ra": 0.0}}
    }


def test_retuning_has_the_same_dropout_for_every_model():
    torch.manual_seed(0)
    model = Dropout()
    data = ImageSet((255 * IMAGES.permute(0, 2, 3, 1)).byte(), LABELS, ["a", "b", "c"])
    batches = Batches(data, 8, CPU, shuffle=True, rng=torch.Generator().manual_seed(3))
    first, second = (state_vector(retune(model, batches, CPU)) for _ in range(2))
    assert torch.equal(first, second)


def test_retuning_ends_with_no_batch_of_one_image_and_counts_a_number_once():
    images = torch.zeros(4000, 8, 8, 3, dtype=torch.uint8)
    train_set, attack = (
        ImageSet(images, torch.arange(4000) % 3, ["a", "b", "c"]),
        Attack("gridTrigger", "all2one", 1, 3, 0.1),
    )
    opt, _ = config.parse("main.py", ["--retune", "61", "61", "62"])
    draws = get_retuning_batches(opt, train_set, attack, CPU)
    assert {count: len(batches) for count, batches in draws.items()} == {61: 3, 62: 3}
    assert [len(next(iter(reversed([*draws[count][0]])))[1]) for count in (61, 62)] == [64, 2]
