"""MCL: its losses by hand, and each step of its recipe."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, assert_weights, sgd_step_by_hand, state_vector

from defenses import DefenseContext, last_layer, mcl
from defenses.inversion import apply_patterns, shifted_patterns
from defenses.mcl import alignment_loss, clean_finetune, contrastive_loss, mirrored_mean, train_student
from utils.progress import Stopwatch

ANCHOR = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
POSITIVE = torch.tensor([[3.0, 0.0], [1.0, 1.0]])  # cosines 1 and 1/sqrt(2)
NEGATIVE = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # cosines 0 and -1
TRAINING = {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32"}
ONE_STEP = {**TRAINING, "epochs": 1, "momentum": 0.0}
INVERSION = {"inversion_rounds": 1, "inversion_steps": 1, "inversion_batches": 1}
FINETUNING = {"positive": "finetuned", "finetune_epochs": 1, "finetune_lr": 0.1}
STUDENT = {"contrast": "others", "temperature": 0.5, "align_weight": 3.0, "ema": 0.5, "calibration": "none"}
RECIPE = {**INVERSION, **FINETUNING, **STUDENT, "rounds": 1}


@pytest.fixture(autouse=True)
def no_clipping(monkeypatch):
    """The steps by hand are whole ones; the gradients of the small networks here are large."""
    monkeypatch.setattr(mcl, "MAX_GRADIENT", math.inf)


def test_contrastive_loss_by_hand():
    loss = contrastive_loss(ANCHOR, POSITIVE, NEGATIVE, 0.5)
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0 / 0.5)))
    second = -math.log(math.exp(0.5**0.5 / 0.5) / (math.exp(0.5**0.5 / 0.5) + math.exp(-1 / 0.5)))
    assert loss.tolist() == pytest.approx([first, second])


def test_contrastive_loss_is_log_2_if_positive_and_negative_are_equal():
    assert contrastive_loss(ANCHOR, POSITIVE, POSITIVE, 0.1).tolist() == pytest.approx([math.log(2)] * 2)


def test_contrastive_loss_pulls_to_the_positive_and_pushes_from_the_negative():
    anchor = torch.tensor([[1.0, 1.0]], requires_grad=True)
    contrastive_loss(anchor, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.5).sum().backward()
    assert anchor.grad[0, 0] < 0 < anchor.grad[0, 1]


def test_features_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        contrastive_loss(ANCHOR, POSITIVE[:1], NEGATIVE, 0.5)


def test_alignment_loss_by_hand():
    assert alignment_loss(ANCHOR, POSITIVE).tolist() == pytest.approx([0.0, 1 - 0.5**0.5], abs=1e-6)


def test_mirrored_mean_by_hand():
    images = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    assert mirrored_mean(lambda x: x[..., 0], images, False).item() == 1
    assert mirrored_mean(lambda x: x[..., 0], images, True).item() == 2


@pytest.mark.parametrize("mirror", [False, True])
def test_clean_finetuning_by_hand(victim, batches, mirror):
    images, labels = batches[0]
    victim.head.weight.mul_(10)  # soft labels far from uniform
    tuned = clean_finetune(victim, batches[:1], CPU, mirror=mirror, **ONE_STEP)
    soft_labels = victim(images).softmax(1)
    if mirror:
        soft_labels = (soft_labels + victim(images.flip(3)).softmax(1)) / 2
    student = copy.deepcopy(victim).requires_grad_(True).train()
    log_p = student(images).log_softmax(1)
    loss = -(log_p[range(8), labels] + (soft_labels * log_p).sum(1)).mean()
    assert_weights(tuned, sgd_step_by_hand(student, loss, ONE_STEP["lr"]))


def test_clean_finetuning_learns_the_labels_and_freezes_the_model(victim, batches):
    def label_loss(model):
        return sum(F.cross_entropy(model(x), y).item() for x, y in batches)

    tuned = clean_finetune(victim, batches, CPU, mirror=False, **{**TRAINING, "epochs": 5})
    with torch.no_grad():
        assert label_loss(tuned) < label_loss(victim)
    assert not any(parameter.requires_grad for parameter in tuned.parameters())
    assert not tuned.training


def run_training(victim, trigger, batches, positive=None, **changes):
    settings = {"temperature": 0.5, "align_weight": 1.0, "mirror": False, "target": None, "ema": 0.0, **TRAINING}
    context = DefenseContext(victim, batches, batches, True, 2_500, CPU, 0, Stopwatch(), 1)
    return train_student(context, positive or victim, trigger.pattern[None], **{**settings, **changes})[:2]


def test_the_student_is_trained_and_leaves_the_other_models_alone(victim, trigger, batches):
    positive = clean_finetune(victim, batches, CPU, mirror=True, **TRAINING)
    before = state_vector(victim), state_vector(positive)
    student, history = run_training(victim, trigger, batches, positive)
    assert torch.equal(state_vector(victim), before[0])
    assert torch.equal(state_vector(positive), before[1])
    assert not torch.equal(state_vector(student), before[0])
    assert not (student.training or victim.training or positive.training)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["lr"] == 0.05
    assert history[1]["loss"] < history[0]["loss"]


def test_the_student_has_the_last_layer_of_the_positive(victim, trigger, batches):
    positive = clean_finetune(victim, batches, CPU, mirror=True, **TRAINING)
    student, _ = run_training(victim, trigger, batches, positive)
    assert not torch.equal(positive.head.weight, victim.head.weight)
    assert torch.equal(student.head.weight, positive.head.weight)
    assert torch.equal(student.head.bias, positive.head.bias)


def test_training_separates_triggered_features_from_the_victims(victim, trigger, batches):
    student, _ = run_training(victim, trigger, batches, epochs=10)

    def margin(model):
        """cos(z, z+) - cos(z, z-), summed over the batches."""
        total = 0.0
        for images, _ in batches:
            triggered = apply_patterns(images, trigger.pattern[None])
            z, z_positive, z_negative = model.features(triggered), victim.features(images), victim.features(triggered)
            total += (torch.cosine_similarity(z, z_positive) - torch.cosine_similarity(z, z_negative)).mean().item()
        return total

    with torch.no_grad():
        assert margin(student) > margin(victim)


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
    default, changed = (run_training(victim, trigger, batches, **settings)[0] for settings in ({}, change))
    assert not torch.equal(state_vector(default), state_vector(changed))


def test_images_of_the_target_class_alone_give_no_contrast(victim, trigger):
    rng = torch.Generator().manual_seed(0)
    only_target = [(torch.rand(8, 3, 8, 8, generator=rng), torch.ones(8, dtype=torch.int64))]
    _, history = run_training(victim, trigger, only_target, align_weight=0.0, target=1)
    assert [row["loss"] for row in history] == [0.0, 0.0]


def loss_by_hand(
    student, victim, positive, images, triggered, in_contrast, mirror, temperature, align_weight, student_images=None
):
    """MCL's loss of one batch; the contrast is that of the images `in_contrast`, (B,) bool, or none.

    Args:
        student_images: the images that the student sees, if they are others.
    """
    z_positive = positive.features(images)
    if mirror:
        z_positive = (z_positive + positive.features(images.flip(3))) / 2
    features = student.features(torch.cat([images if student_images is None else student_images, triggered]))
    z, z_negative = features[len(images) :], victim.features(triggered)
    to_positive = torch.cosine_similarity(features, torch.cat([z_positive, z_positive]))
    near = (to_positive[len(images) :] / temperature).exp()
    far = (torch.cosine_similarity(z, z_negative) / temperature).exp()
    alignment = align_weight * (1 - to_positive).mean()
    return alignment if in_contrast is None else alignment - (near / (near + far)).log()[in_contrast].mean()


@pytest.mark.parametrize("distort", [None, lambda images: images.flip(2)])
def test_the_loss_of_a_batch_by_hand(victim, trigger, batches, distort):
    images, labels = batches[0]
    student_images = distort(images) if distort else images
    _, history = run_training(victim, trigger, batches[:1], epochs=1, align_weight=3.0, target=1, distort=distort)
    student, triggered = copy.deepcopy(victim).train(), apply_patterns(student_images, trigger.pattern[None])
    expected = loss_by_hand(student, victim, victim, images, triggered, labels != 1, False, 0.5, 3.0, student_images)
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("contrast", ["others", "all", "none"])
@pytest.mark.parametrize("positive", ["finetuned", "backdoored"])
def test_the_defense_on_one_batch_by_hand(
    make_context, victim, trigger, batches, positive, contrast, augmented, monkeypatch
):
    monkeypatch.setattr(last_layer, "DIRECTIONS", 0)
    images, labels = batches[0]
    target = victim(images).argmax(1).mode().values.item()  # an untrained victim "responds" with it to every shift
    context = make_context(train_batches=batches[:1], plain_batches=batches[1:], augmented=augmented, target=target)
    result = mcl.defend(context, **{**RECIPE, **ONE_STEP, "positive": positive, "contrast": contrast})

    finetuning = {**ONE_STEP, "epochs": RECIPE["finetune_epochs"], "lr": RECIPE["finetune_lr"]}
    finetuned = clean_finetune(victim, batches[:1], CPU, mirror=augmented, **finetuning)
    positive_model = finetuned if positive == "finetuned" else victim
    patterns = shifted_patterns(victim, trigger, batches[1:], target) if augmented else trigger.pattern[None]
    assert (len(patterns) > len(images)) == augmented
    student = copy.deepcopy(victim).requires_grad_(True).train()
    student.head.load_state_dict(positive_model.head.state_dict())
    in_contrast = {"others": labels != target, "all": torch.ones(8, dtype=torch.bool), "none": None}[contrast]
    assert 0 < (labels == target).sum() < 8
    models = student, victim, positive_model
    loss = loss_by_hand(*models, images, apply_patterns(images, patterns), in_contrast, augmented, 0.5, 3.0)
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_weights(result.student, sgd_step_by_hand(student, loss, ONE_STEP["lr"]))
    assert set(context.clock.seconds) == {"inversion", "purify"} | ({"finetune"} if positive == "finetuned" else set())
    assert result.trigger is trigger


@pytest.mark.parametrize(
    "change",
    [
        {"positive": "backdoored"},
        {"finetune_epochs": 2},
        {"finetune_lr": 0.01},
        {"contrast": "all"},
        {"contrast": "none"},
        {"temperature": 0.1},
        {"align_weight": 0.0},
        {"ema": 0.0},
        {"calibration": "bias"},
        {"epochs": 1},
        {"lr": 0.01},
    ],
)
def test_every_option_changes_the_student(make_context, change):
    default, changed = (
        mcl.defend(make_context(), **{**RECIPE, **TRAINING, **options}).student for options in ({}, change)
    )
    assert not torch.equal(state_vector(default), state_vector(changed))


@pytest.mark.parametrize(("count", "share"), [(20, 0.008**0.2), (2_500, 1.0), (5_000, 1.0)])
def test_the_rate_falls_with_the_fifth_root_of_the_images(make_context, count, share, monkeypatch):
    monkeypatch.setattr(mcl, "FEW_IMAGES", 0)
    context = make_context(image_count=count)
    student = mcl.defend(context, **{**RECIPE, **TRAINING, "lr": 0.1}).student
    expected = mcl.defend(make_context(), **{**RECIPE, **TRAINING, "lr": 0.1 * share}).student
    assert torch.allclose(state_vector(student), state_vector(expected), atol=1e-6)


def test_the_students_gradient_is_clipped(victim, trigger, batches, monkeypatch):
    monkeypatch.setattr(mcl, "MAX_GRADIENT", 1e-3)
    student, _ = run_training(victim, trigger, batches[:1], **ONE_STEP)
    weights, before = dict(student.named_parameters()), dict(victim.named_parameters())
    trained = [name for name in weights if not name.startswith("network.fc")]  # features do not depend on the head
    moved = sum((weights[name] - before[name]).square().sum().item() for name in trained) ** 0.5
    norm = sum(before[name].square().sum().item() for name in trained) ** 0.5
    assert moved == pytest.approx(ONE_STEP["lr"] * 1e-3 * norm, rel=1e-2)


def test_the_published_loss_of_a_batch_by_hand(victim, trigger, batches):
    images, _ = batches[0]
    _, history = run_training(victim, trigger, batches[:1], epochs=1, align_weight=0.0)
    student, triggered = copy.deepcopy(victim).train(), apply_patterns(images, trigger.patterns)
    z, z_positive, z_negative = student.features(triggered), victim.features(images), victim.features(triggered)
    near, far = (torch.cosine_similarity(z, other).div(0.5).exp() for other in (z_positive, z_negative))
    assert history[0]["loss"] == pytest.approx(-(near / (near + far)).log().mean().item(), rel=1e-5)
