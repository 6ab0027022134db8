"""Model-Contrastive Learning (MCL, arXiv 2205.04411): three models of one architecture, and one loss.

The victim f_B is frozen. The clean-finetuned model f_F is the victim after fine-tuning on the clean split, then frozen.
The student f_S starts as the victim. g(.) is the pooled feature before the last linear layer. On each clean image x
with the inverted trigger stamped on it, x', the student's feature is drawn to the clean one, g_F(x), and pushed away
from the backdoored one, g_B(x').

Beyond the paper, each with an option that turns it off: clean images pass through the student as well, and its features
of both are held to the positive, lest the contrast push x' past it (align_weight); the positive is averaged over the
image and its mirror image (mirror); the trigger is moved about (patterns); images of the target class are left out of
the contrast (target); and the student's last weights are averaged (ema).
"""

import copy
import itertools

import torch
import torch.nn.functional as F

from defenses.case import Purified
from defenses.forms import stamp
from defenses.inversion import find_trigger, moved_patterns
from utils.training import train


def defend(
    case,
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
    epochs,
    lr,
    **sgd,
) -> Purified:
    """The paper's steps: f_F, the inverted trigger, the student.

    Args:
        case: a defenses.case.Case.
        positive: whose clean features are z+: "finetuned", f_F's, or "backdoored", the victim's.
        contrast: "others" leaves images of the target label out of it, "all" does not.
        sgd: what fine-tuning and purification share of what utils.training.train takes.

    Raises:
        RunError: no pattern makes the victim say the target.
    """
    teacher = case.victim
    if positive == "finetuned":
        with case.clock("finetune"):
            size = {"epochs": finetune_epochs, "lr": finetune_lr}
            teacher = finetune(case.victim, case.training, case.device, mirror=case.mirrored, **size, **sgd)
    trigger = find_trigger(case, inversion_rounds, inversion_steps, inversion_batches, sgd["precision"])
    with case.clock("purify"):
        student, history = purify(
            case.victim,
            teacher,
            patterns_of(case, trigger),
            case.training,
            case.device,
            temperature=temperature,
            align_weight=align_weight,
            mirror=case.mirrored,
            target=case.target if contrast == "others" else None,
            epochs=epochs,
            lr=lr,
            watch=case.watch,
            **sgd,
        )
    return Purified(student, history, trigger)


def patterns_of(case, trigger) -> torch.Tensor:
    """The inverted trigger, (V, C, H, W), moved as the training images are, where the victim answers to that.

    Waves are not moved: other phases of theirs are among them.
    """
    if trigger.others is not None or not case.mirrored:
        return trigger.patterns
    return moved_patterns(case.victim, trigger, case.plain, case.target)


def contrastive_loss(anchor, positive, negative, temperature: float) -> torch.Tensor:
    """L = -log( exp(cos(z, z+) / t) / (exp(cos(z, z+) / t) + exp(cos(z, z-) / t)) ), MCL's loss, (B,).

    Args:
        anchor, positive, negative: (B, D) features z = g_S(x'), z+ = g_F(x), z- = g_B(x').
        temperature: t > 0.

    Raises:
        ValueError: the three differ in shape.
    """
    if not anchor.shape == positive.shape == negative.shape:
        raise ValueError(f"features differ in shape: {anchor.shape}, {positive.shape}, {negative.shape}")
    logits = torch.stack([F.cosine_similarity(anchor, z) for z in (positive, negative)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(anchor), dtype=torch.int64, device=anchor.device), reduction="none")


def alignment_loss(feature, positive) -> torch.Tensor:
    """1 - cos(z, z+), (B,): the student's feature keeps the direction of the positive."""
    return 1 - F.cosine_similarity(feature, positive)


def mirrored_mean(function, images, mirror: bool) -> torch.Tensor:
    """function(images), or its mean over the images and their mirror images."""
    return (function(images) + function(images.flip(3))) / 2 if mirror else function(images)


def finetune(victim, batches, device, *, mirror, **training):
    """Make f_F: the victim, fine-tuned on the clean split, frozen.

    The labels alone would cost accuracy on so few images; the victim's own answers, as soft labels of equal weight
    (Hinton et al., 2015), keep it.

    Args:
        victim: f_B, frozen.
        batches: (images, labels) of the clean split.
        mirror: soft labels are averaged over the image and its mirror image.
        training: what utils.training.train takes.
    """
    model = copy.deepcopy(victim).requires_grad_(True)

    def loss_of(images, labels):
        with torch.no_grad():
            soft = mirrored_mean(lambda x: victim(x).softmax(1), images, mirror)
        logits = model(images)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits, soft)

    train(model, batches, loss_of, device, title="finetune", **training)
    return model.eval().requires_grad_(False)


def purify(victim, positive, patterns, batches, device, *, temperature, align_weight, mirror, target, **training):
    """Make f_S from f_B: the paper's contrastive learning on the clean split.

    Args:
        victim: f_B, frozen, in eval mode. positive: f_F, likewise, or f_B again (the pairing of the paper's own code).
        patterns: (V, C, H, W), the inverted trigger, alone or with others that the victim answers to alike.
        batches: (images, labels) of the clean split.
        align_weight: of the alignment loss of x and x'; at 0 clean images do not pass through the student.
        mirror: z+ is averaged over the image and its mirror image.
        target: images of this label are left out of the contrast, since their z- is where their z+ is; None: none are.
        training: what utils.training.train takes; its ema averages the student's weights over the last steps.

    Returns:
        the student, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(victim).requires_grad_(True)
    student.head.load_state_dict(positive.head.state_dict())  # it is to read features like f_F's

    turns = itertools.count()

    def loss_of(images, labels):
        triggered = stamp(images, patterns, next(turns))
        with torch.no_grad():
            z_positive = mirrored_mean(positive.features, images, mirror)
            z_negative = victim.features(triggered)
        if align_weight:
            both = student.features(torch.cat([images, triggered]))
            extra = align_weight * alignment_loss(both, z_positive.repeat(2, 1)).mean()
            z = both[len(images) :]
        else:
            z, extra = student.features(triggered), 0.0
        counted = torch.ones_like(labels) if target is None else labels != target
        contrast = contrastive_loss(z, z_positive, z_negative, temperature)
        return (contrast * counted).sum() / counted.sum().clamp(min=1) + extra

    history = train(student, batches, loss_of, device, title="purify", **training)
    return student.eval(), history
