"""The objective of trigger inversion, for one target label or many: loss, hits, and the weight of the penalty."""

import itertools

import torch
import torch.nn.functional as F

from defenses.inversion.patterns import apply_patterns

ANY_OTHER = -1  # in place of a target label: any label but an image's own, as an all2all backdoor needs
MICRO_BATCH = 16  # images per update: more updates for the same number of images find smaller patterns
HIT_RATE = 0.9  # a pattern works if at least this fraction of the images is predicted as the target
RAISE, LOWER = 1.5, 1.5**1.5  # factors of the penalty's weight (Tao et al., CVPR 2022)


def label_name(target) -> str:
    """A target in words."""
    return "any other label" if target == ANY_OTHER else f"label {target}"


def is_hit(logits, labels, target) -> torch.Tensor:
    """(..., B, K) -> (..., B) bool: predicted as the target; for ANY_OTHER, as another label than the image's own."""
    predicted = logits.argmax(-1)
    return predicted != labels if target == ANY_OTHER else predicted == target


def untargeted_loss(logits, labels) -> torch.Tensor:
    """-log(1 - p of the image's own label), (..., K) and (...) -> (...): the loss for ANY_OTHER."""
    others = logits.scatter(-1, labels[..., None], float("-inf"))
    return logits.logsumexp(-1) - others.logsumexp(-1)


def attackable_images(victim, images, labels, target):
    """The images and labels that a trigger can turn: those of other labels; for ANY_OTHER those classified right."""
    with torch.no_grad():
        attackable = victim(images).argmax(1) == labels if target == ANY_OTHER else labels != target
    return images[attackable], labels[attackable]


def attackable_parts(victim, batches, target):
    """The attackable images of each of the (images, labels) batches, and their labels, MICRO_BATCH at a time."""
    for batch in batches:
        images, labels = attackable_images(victim, *batch, target)
        if len(images):
            yield from zip(images.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)


def pattern_logits(victim, images, patterns) -> torch.Tensor:
    """Logits of each of (B, 3, H, W) images with each of (P, C, H, W) patterns, (P, B, K)."""
    # All patterns on the first image, then all on the next, as apply_patterns assigns them.
    triggered = apply_patterns(images.repeat_interleave(len(patterns), 0), patterns)
    logits = victim(triggered.contiguous(memory_format=torch.channels_last))
    return logits.unflatten(0, (len(images), len(patterns))).transpose(0, 1)


def hits_and_losses(victim, images, labels, attackable, patterns, targets):
    """Apply each of (P, C, H, W) patterns to each of (B, 3, H, W) images.

    Args:
        attackable: (P, B) bool, the images that count for each pattern.
        targets: (P,) target labels or ANY_OTHER, one for each pattern.

    Returns:
        (P,) numbers of hits, and (P,) mean losses: cross-entropy to the target, or the untargeted loss.
    """
    logits = pattern_logits(victim, images, patterns)
    weights, is_untargeted = attackable.float(), targets[:, None] == ANY_OTHER
    wanted = torch.where(is_untargeted, labels, targets[:, None])
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(weights)
    losses = torch.where(is_untargeted, untargeted_loss(logits, labels.expand_as(wanted)), losses)
    hits = (((logits.argmax(2) == wanted) ^ is_untargeted) * weights).sum(1)
    return hits, (losses * weights).sum(1) / weights.sum(1).clamp(min=1)


class PenaltyWeight:
    """c, the weight of the penalty on the size of each of P patterns.

    It rises after `patience` steps in a row in which the pattern works, and falls after as many in which it does not.
    """

    def __init__(self, start: torch.Tensor, patience: int = 1):
        self.value, self.patience = start, patience
        self.working, self.failing = torch.zeros_like(start), torch.zeros_like(start)

    def update(self, works: torch.Tensor, tried: torch.Tensor) -> None:
        """Count a step of the patterns that were tried on an image, which worked or did not; both (P,) bool."""
        self.working = torch.where(tried, torch.where(works, self.working + 1, 0), self.working)
        self.failing = torch.where(tried, torch.where(works, 0, self.failing + 1), self.failing)
        raised, lowered = self.working == self.patience, self.failing == self.patience
        self.value = torch.where(raised, self.value * RAISE, torch.where(lowered, self.value / LOWER, self.value))
        self.working[raised], self.failing[lowered] = 0, 0


def endless(batches):
    """The batches, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(batches))
