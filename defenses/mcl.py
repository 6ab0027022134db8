"""Model-Contrastive Learning (MCL, arXiv 2205.04411): three models of one architecture, and one loss.

The victim f_B is frozen. The clean-finetuned model f_F is the victim fine-tuned on the clean split, then frozen. The
student f_S starts as the victim with f_F's last layer, whose input is g(.). For each clean image x and its triggered
version x', which carries the inverted trigger, the student's feature g_S(x') is pulled towards the clean feature g_F(x)
and pushed away from the backdoored feature g_B(x').

Additions to the paper; those with an option in brackets can be turned off:
- clean images pass through the student too, and the features of x and x' are aligned with the positive, since the
  contrast alone pushes x' beyond it (align_weight);
- the positive is averaged over the image and its mirror image, where the features of the two agree, and the trigger is
  shifted and mirrored (augment);
- x' carries the inverted pattern, another part of the trigger, or all of them;
- where features depend on the position in the image, the student sees images with an erased rectangle, since a
  trigger hides a part of the image as well; few clean images are mixed (augment);
- images of the target class are left out of the contrast (contrast);
- the student's weights are averaged over the last steps (ema);
- the last layer is made blind to the directions in which the trigger moves the victim's features, where clean images do
  not need them, since a trigger stronger than the inverted one moves them further the same way;
- the biases of the last layer are fitted to the labels at the end, since the push away from the backdoored feature
  makes the student avoid the target label on clean images as well (calibration);
- a student that still responds to a small pattern is replaced by a new one, trained with that pattern, too (rounds);
- the student's gradient is clipped, for networks without batch normalisation, and dropout is off;
- a student whose clean features move far from the positive ones is trained anew at a lower rate (align_weight).
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from defenses.base import DefenseContext, DefenseResult
from defenses.inversion import PatternApplier
from defenses.last_layer import calibrate, make_blind, trigger_directions
from utils.batches import CutMixBatches, erase_rectangles
from utils.errors import UserError
from utils.seed import generator
from utils.training import sgd_step, train

FULL_RATE_IMAGES = 2_500  # clean images from which the student trains at the full rate
FEW_IMAGES = 1_000  # clean images below which the features of the victim itself are the positives
# Least mean cosine of the features of an image and its mirror image at which the two are averaged: pooled features
# have 0.93 or more, features that depend on the position in the image 0.35 to 0.6, and their average is neither's.
# Below it, the student sees erased rectangles.
MIRROR_SIMILARITY = 0.8
# Least mean cosine of the student's clean features and the positive ones. Where the student falls below, it is trained
# again at a third of the rate: a WRN keeps 0.99 at the full rate, a ViT 0.94, and 0.99 only at a tenth.
CLEAN_SIMILARITY, RATE_SHARES = 0.98, (1, 1 / 3, 1 / 9)
# Largest norm of the student's gradient, relative to that of its weights: a WRN starts at 0.01 to 0.06, a network
# without batch normalisation at 0.4.
MAX_GRADIENT = 0.05


def defend(
    context: DefenseContext,
    *,
    positive,
    finetune_epochs,
    finetune_lr,
    inversion_rounds,
    inversion_steps,
    inversion_batches,
    contrast,
    temperature,
    align_weight,
    calibration,
    rounds,
    epochs,
    lr,
    **sgd,
) -> DefenseResult:
    """The paper's steps: the clean-finetuned model, the inverted trigger, the student.

    One small pattern is not always the whole trigger. So the student is inverted as the victim was: if another small
    pattern fools it, a new student is made from the victim, with all patterns found. If the last one is fooled too,
    that pattern is the trigger of the result, so that the final check of the hit rate fails and nothing is saved.

    Args:
        positive: the model of the positive features z+: "finetuned" (f_F), "backdoored" (the victim), or "auto": the
            victim below FEW_IMAGES clean images, else f_F.
        align_weight: weight of the alignment loss, doubled below FEW_IMAGES clean images.
        lr: peak rate of the student for FULL_RATE_IMAGES or more; below, it falls with the fifth root of the number of
            images, and for a network whose features it moves too far by train_student_gently.
        contrast: images in the contrastive loss: "all", "others" without those of the target label, or "none", which
            leaves the alignment alone.
        calibration: "bias" fits the biases of the last layer to the labels, with a stronger prior below FEW_IMAGES
            clean images; "none" leaves them.
        rounds: students at most; with 1, the student is not inverted.
        sgd: arguments of utils.training.train that fine-tuning and purification share.

    Raises:
        UserError: the network has no weights but those of its last layer.
        RunError: no pattern turns the clean images into the target label.
    """
    if len([*context.victim.parameters()]) == len([*context.victim.head.parameters()]):
        raise UserError("mcl trains features, and this network has no weights in front of its last layer")
    positive_model, mirror = context.victim, context.augmented and context.mirrored
    # Batch statistics of 100 images cost 1.5 points of accuracy. So z+ is the victim's feature, the alignment weight is
    # doubled, and the student sees CutMix images. The biases have a stronger prior: labels are few.
    has_few = context.image_count < FEW_IMAGES
    if positive == "finetuned" or (positive == "auto" and not has_few):
        with context.clock("finetune"):
            schedule = {"mirror": mirror, "epochs": finetune_epochs, "lr": finetune_lr, **sgd}
            positive_model = clean_finetune(context.victim, context.train_batches, context.device, **schedule)
    depends_on_position = mirror and mirror_similarity(context.victim, context.plain_batches) < MIRROR_SIMILARITY
    budget = inversion_steps, inversion_batches, sgd["precision"]
    trigger = context.invert(inversion_rounds, *budget)
    patterns, training = context.training_patterns(trigger), context
    if has_few and context.augmented:
        mixed = CutMixBatches(context.train_batches, context.target, generator(context.seed, "cutmix"))
        training = context._replace(train_batches=mixed)
    settings = {"temperature": temperature, "align_weight": 2 * align_weight if has_few else align_weight}
    settings |= {"contrast": contrast != "none", "target": context.target if contrast == "others" else None}
    settings |= {"mirror": mirror and not depends_on_position, "epochs": epochs, **sgd}
    settings["lr"] = lr * min(1, context.image_count / FULL_RATE_IMAGES) ** (1 / 5)
    if depends_on_position:
        settings["distort"] = partial(erase_rectangles, rng=generator(context.seed, "erasing"))
    for _ in range(rounds):
        with context.clock("purify"):
            student, history, _ = train_student_gently(training, positive_model, patterns, trigger, **settings)
            directions = trigger_directions(context.victim, patterns, context.plain_batches, context.target)
            make_blind(student, directions, context.train_batches, context.target)
            if calibration == "bias":
                calibrate(student, patterns, context.plain_batches, context.target, variance=0.1 if has_few else 1.0)
        remaining = context.remaining_trigger(student, trigger, *budget) if rounds > 1 else None
        if remaining is None:
            break
        patterns = torch.cat([patterns, context.training_patterns(remaining, student)])
    return DefenseResult(student, history, remaining or trigger)


def contrastive_loss(anchor, positive, negative, temperature: float) -> torch.Tensor:
    """L = -log( exp(cos(z, z+) / t) / (exp(cos(z, z+) / t) + exp(cos(z, z-) / t)) ), MCL's loss, (B,).

    Args:
        anchor, positive, negative: (B, D) features z = g_S(x'), z+ = g_F(x), z- = g_B(x').
        temperature: t > 0.

    Raises:
        ValueError: the three shapes differ.
    """
    if not anchor.shape == positive.shape == negative.shape:
        raise ValueError(f"features differ in shape: {anchor.shape}, {positive.shape}, {negative.shape}")
    logits = torch.stack([F.cosine_similarity(anchor, z) for z in (positive, negative)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(anchor), dtype=torch.int64, device=anchor.device), reduction="none")


def alignment_loss(feature, positive) -> torch.Tensor:
    """1 - cos(z, z+), (B,): the student's feature keeps the direction of the positive."""
    return 1 - F.cosine_similarity(feature, positive)


def mirrored_mean(function, images, mirror: bool) -> torch.Tensor:
    """function(images), or with `mirror` its mean over the images and their mirror images."""
    return (function(images) + function(images.flip(3))) / 2 if mirror else function(images)


def mean_cosine(first, second, batches) -> float:
    """Mean cosine of first(images) and second(images), over the clean (images, labels) batches."""
    with torch.no_grad():
        return torch.cat([F.cosine_similarity(first(images), second(images)) for images, _ in batches]).mean().item()


def mirror_similarity(model, batches) -> float:
    """Mean cosine of the features of an image and its mirror image, over the clean (images, labels) batches."""
    return mean_cosine(model.features, lambda images: model.features(images.flip(3)), batches)


def clean_finetune(victim, batches, device, *, mirror, **training):
    """Make f_F: the victim fine-tuned on the clean split, frozen.

    So few labels alone would cost accuracy; the victim's predictions as soft labels of equal weight keep it (Hinton et
    al., 2015).

    Args:
        victim: f_B, frozen.
        batches: (images, labels) of the clean split.
        mirror: average the soft labels over the image and its mirror image.
        training: arguments of utils.training.train.
    """
    model = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        with torch.no_grad():
            soft_labels = mirrored_mean(lambda x: victim(x).softmax(1), images, mirror)
        logits = model(images)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits, soft_labels)

    train(model, batches, loss_of, device, title="finetune", dropout=False, **training)
    return model.eval().requires_grad_(False)


def train_student_gently(context, positive, patterns, trigger, *, lr, align_weight, **options) -> DefenseResult:
    """train_student at one of RATE_SHARES of the rate after another, until clean features stay near the positive ones.

    If the trigger works on a student of a lower rate, the one before it is returned. Without the alignment, nothing
    holds the features, and the full rate stays.

    Args:
        trigger: the InvertedTrigger.
        lr, align_weight, options: as in train_student, which the other arguments are passed to as well.
    """
    result, judged_on = None, (context.victim, context.plain_batches, context.target)
    for share in RATE_SHARES:
        settings = {"lr": share * lr, "align_weight": align_weight, **options}
        candidate = train_student(context, positive, patterns, **settings)
        if result and trigger.still_works(candidate.student, *judged_on):
            break
        result = candidate
        similarity = mean_cosine(result.student.features, positive.features, context.plain_batches)
        if not align_weight or similarity >= CLEAN_SIMILARITY:
            break
        print(f"the student's clean features moved too far: cosine {similarity:.3f}, wanted {CLEAN_SIMILARITY}")
    return result


def train_student(
    context, positive, patterns, *, temperature, align_weight, mirror, target, contrast=True, distort=None, **training
) -> DefenseResult:
    """Make f_S from f_B, with the positive's last layer, by contrastive learning on the clean split.

    Args:
        context: the DefenseContext; its victim is f_B.
        positive: f_F, frozen, in eval mode, or f_B again (the paper's own code).
        patterns: (V, C, H, W), the inverted trigger, alone or with others that the victim responds to alike.
        align_weight: weight of the alignment loss of x and x'; at 0 clean images do not pass through the student.
        mirror: average z+ over the image and its mirror image.
        target: images of this label are left out of the contrast, since their positive and negative nearly coincide, so
            pushing hurts that class; None: no image is left out.
        contrast: whether the contrastive loss is part of the objective; without it, align_weight must be above 0.
        distort: images -> the images that the student sees in their place; z+ is that of the images themselves.
        training: arguments of utils.training.train; ema averages the student's weights over the last steps.
    """
    student = context.new_student()
    student.head.load_state_dict(positive.head.state_dict())  # the student's features are aligned with the positive's
    add_trigger = PatternApplier(patterns)

    def loss_of(images, labels):
        student_images = distort(images) if distort else images
        triggered = add_trigger(student_images)
        with torch.no_grad():
            z_positive = mirrored_mean(positive.features, images, mirror)
            z_negative = context.victim.features(triggered) if contrast else None
        if align_weight:
            features = student.features(torch.cat([student_images, triggered]))
            alignment = align_weight * alignment_loss(features, z_positive.repeat(2, 1)).mean()
            z = features[len(images) :]
        else:
            z, alignment = student.features(triggered), 0.0
        if not contrast:
            return alignment
        mask = torch.ones_like(labels) if target is None else labels != target
        losses = contrastive_loss(z, z_positive, z_negative, temperature)
        return (losses * mask).sum() / mask.sum().clamp(min=1) + alignment

    update = partial(sgd_step, max_gradient=MAX_GRADIENT)
    return context.fit(student, loss_of, title="purify", update=update, dropout=False, **training)
