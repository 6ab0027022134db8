"""The losses by hand, and what fine-tuning and purification do to the three models."""

import copy
import math

import pytest
import torch
from conftest import weights

from defenses.inversion import Trigger, stamp
from defenses.mcl import alignment_loss, contrastive_loss, finetune, mirrored_mean, purify

ANCHOR = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
POSITIVE = torch.tensor([[3.0, 0.0], [1.0, 1.0]])  # cosines 1 and 1/sqrt(2)
NEGATIVE = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # cosines 0 and -1
TRAINING = {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32"}


def test_contrastive_loss_by_hand():
    loss = contrastive_loss(ANCHOR, POSITIVE, NEGATIVE, 0.5)
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0 / 0.5)))
    second = -math.log(math.exp(0.5**0.5 / 0.5) / (math.exp(0.5**0.5 / 0.5) + math.exp(-1 / 0.5)))
    assert loss.tolist() == pytest.approx([first, second])


def test_contrastive_loss_is_log_2_where_positive_and_negative_agree():
    assert contrastive_loss(ANCHOR, POSITIVE, POSITIVE, 0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_contrastive_gradient_draws_to_the_positive_and_away_from_the_negative():
    anchor = torch.tensor([[1.0, 1.0]], requires_grad=True)
    contrastive_loss(anchor, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5).sum().backward()
    assert anchor.grad[0, 0] < 0 < anchor.grad[0, 1]


def test_features_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_loss(ANCHOR, POSITIVE[:1], NEGATIVE, 0.5)


def test_alignment_loss_by_hand():
    assert alignment_loss(ANCHOR, POSITIVE).tolist() == pytest.approx([0.0, 1 - 0.5**0.5], abs=1e-6)


def test_mirrored_mean_by_hand():
    images = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    assert mirrored_mean(lambda x: x[..., 0], images, False).item() == 1
    assert mirrored_mean(lambda x: x[..., 0], images, True).item() == 2


def test_patterns_are_dealt_out_in_turn():
    patterns = torch.zeros(2, 3, 2, 4)
    patterns[0, :, 1, 3], patterns[1, :, 1, 0] = 1.0, -1.0
    images = torch.rand(3, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = images.clone()
    expected[[0, 2], :, 1, 3], expected[1, :, 1, 0] = 1.0, 0.0
    assert torch.equal(stamp(images, patterns), expected)


def test_patterns_that_outnumber_the_images_are_all_dealt_out_in_time():
    patterns = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 1, 1) / 10
    seen = [stamp(torch.zeros(2, 3, 1, 1), patterns, turn)[:, 0, 0, 0].tolist() for turn in range(3)]
    assert torch.tensor(seen).mul(10).round().int().tolist() == [[0, 1], [2, 3], [4, 0]]


@pytest.fixture
def trigger():
    pattern = torch.zeros(3, 8, 8)
    pattern[:, 6:, 6:] = 1
    return Trigger(pattern, 1.0)


def purified(victim, trigger, batches, positive=None, **changes):
    settings = {"temperature": 0.5, "align_weight": 1.0, "mirror": False, "target": None, "ema": 0.0, **TRAINING}
    settings |= changes
    return purify(victim, positive or victim, trigger.pattern[None], batches, torch.device("cpu"), **settings)


def test_purify_trains_a_student_and_leaves_the_others_alone(victim, trigger, batches):
    positive = finetune(victim, batches, torch.device("cpu"), mirror=True, **TRAINING)
    before = weights(victim), weights(positive)
    student, history = purified(victim, trigger, batches, positive)
    assert torch.equal(weights(victim), before[0])
    assert torch.equal(weights(positive), before[1])
    assert not torch.equal(weights(student), before[0])
    assert not (student.training or victim.training or positive.training)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["lr"] == 0.05
    assert history[1]["loss"] < history[0]["loss"]


def test_purify_parts_the_student_from_the_victim_on_triggered_images(victim, trigger, batches):
    student, _ = purified(victim, trigger, batches, epochs=10)

    def closer_to_clean(model):
        features = [
            (
                model.features(stamp(x, trigger.pattern[None])),
                victim.features(x),
                victim.features(stamp(x, trigger.pattern[None])),
            )
            for x, _ in batches
        ]
        return sum(
            (torch.cosine_similarity(z, clean) - torch.cosine_similarity(z, bad)).mean().item()
            for z, clean, bad in features
        )

    with torch.no_grad():
        assert closer_to_clean(student) > closer_to_clean(victim)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.1},
        {"align_weight": 0.0},
        {"mirror": True},
        {"target": 1},
        {"ema": 0.5},
        {"lr": 0.01},
        {"epochs": 1},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"schedule": "onecycle"},
        {"precision": "bf16"},
    ],
)
def test_every_setting_changes_the_student(victim, trigger, batches, change):
    usual, other = (purified(victim, trigger, batches, **settings)[0] for settings in ({}, change))
    assert not torch.equal(weights(usual), weights(other))


def test_the_loss_of_a_batch_by_hand(victim, trigger, batches):
    images, labels = batches[0]
    _, history = purified(victim, trigger, batches[:1], epochs=1, align_weight=3.0, target=1)
    student, x = copy.deepcopy(victim).train(), stamp(images, trigger.pattern[None])
    clean, bad = victim.features(images), victim.features(x)
    z = student.features(torch.cat([images, x]))
    to_clean = torch.cosine_similarity(z, torch.cat([clean, clean]))
    near, far = (to_clean[8:] / 0.5).exp(), (torch.cosine_similarity(z[8:], bad) / 0.5).exp()
    contrast = -(near / (near + far)).log()[labels != 1].mean()
    assert history[0]["loss"] == pytest.approx((contrast + 3 * (1 - to_clean).mean()).item(), rel=1e-5)


def test_images_of_the_target_alone_give_no_contrast(victim, trigger):
    rng = torch.Generator().manual_seed(0)
    only_target = [(torch.rand(8, 3, 8, 8, generator=rng), torch.ones(8, dtype=torch.int64))]
    _, history = purified(victim, trigger, only_target, align_weight=0.0, target=1)
    assert [row["loss"] for row in history] == [0.0, 0.0]


def test_finetuning_keeps_the_answers_of_the_victim_and_learns_the_labels(victim, batches):
    def label_loss(model):
        return sum(torch.nn.functional.cross_entropy(model(x), y).item() for x, y in batches)

    tuned = finetune(victim, batches, torch.device("cpu"), mirror=False, **{**TRAINING, "epochs": 5})
    with torch.no_grad():
        assert label_loss(tuned) < label_loss(victim)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
