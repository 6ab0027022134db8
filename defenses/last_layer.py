"""What MCL does to the last layer, once the features are trained: blindness to the trigger, and the biases."""

import torch
import torch.nn.functional as F

from defenses.inversion import ANY_OTHER, PatternApplier

# Directions that the last layer is made blind to, and the fractions of all clean images, and of the target class's,
# that this may cost. Where features are few, that class needs them: they cost a WRN (64 features) 17 to 40 %.
DIRECTIONS, MAX_COST, MAX_TARGET_COST = 4, 0.02, 0.5
DIRECTION_IMAGES = 1_000  # clean images from which the directions are computed
RELATIVE_ZERO = 1e-5  # shifts that are shorter, relative to the longest, are rounding errors


def trigger_directions(victim, patterns, batches, target) -> torch.Tensor:
    """The main directions of g_B(x') - g_B(x) over up to DIRECTION_IMAGES images x of other labels than the target.

    Arguments as in defenses.mcl.train_student.

    Returns:
        (D', D) right singular vectors, D' up to DIRECTIONS, the one of the largest shifts first.
    """
    add_trigger, shifts, count = PatternApplier(patterns), [], 0
    with torch.no_grad():
        for images, labels in batches:
            shift = victim.features(add_trigger(images)) - victim.features(images)
            shifts.append(shift[labels != target])
            count += len(shifts[-1])
            if count >= DIRECTION_IMAGES:
                break
    _, lengths, directions = torch.linalg.svd(torch.cat(shifts), full_matrices=False)
    return directions[:DIRECTIONS][lengths[:DIRECTIONS] > RELATIVE_ZERO * lengths[:1]]


def make_blind(model, directions, batches, target) -> bool:
    """Make the last layer, in place, blind to directions in feature space, if clean images hardly need them.

    The rows of its weight are projected onto the complement: the null-space projection of Ravfogel et al. (ACL 2020).

    Args:
        model: in eval mode.
        directions: (D', D), orthonormal.
        batches: clean (images, labels), to measure the cost on.
        target: the label whose own images count, too, and must not be missing; or ANY_OTHER.

    Returns:
        whether the layer was changed; a weight that is computed from others (weight normalisation) is not.
    """
    if not isinstance(model.head.weight, torch.nn.Parameter):
        return False
    weight, hits, seen = model.head.weight, torch.zeros(2, 2, device=directions.device), 0
    with torch.no_grad():
        directions = directions.to(weight)
        blind = weight - weight @ directions.T @ directions
        for images, labels in batches:
            features = model.features(images).to(weight)  # networks of others may compute in bf16
            logits = torch.stack([F.linear(features, rows, model.head.bias) for rows in (weight, blind)])
            correct = logits.argmax(2) == labels
            hits += torch.stack([correct.sum(1), (correct & (labels == target)).sum(1)])
            seen += len(labels)
        (all_before, all_after), (target_before, target_after) = hits.tolist()
        keeps_target = target == ANY_OTHER or 0 < target_before * (1 - MAX_TARGET_COST) <= target_after
        can_spare = keeps_target and all_before - all_after <= MAX_COST * seen
        if can_spare:
            weight.copy_(blind)
    return can_spare


def calibrate(model, patterns, batches, target, variance=1.0) -> None:
    """Fit the biases of the last layer, in place, to the labels of x and of the x' that a trigger could turn.

    Mean cross-entropy, all other weights fixed. A normal prior on each change keeps the bias of a class with few images
    or none. A last layer without biases stays as it is.

    Args:
        model: in eval mode.
        patterns: (V, C, H, W), as in defenses.mcl.train_student.
        batches: clean (images, labels).
        target: the label whose images carry no trigger, or ANY_OTHER.
        variance: of the prior.
    """
    if model.head.bias is None:
        return
    add_trigger, logits, labels = PatternApplier(patterns), [], []
    with torch.no_grad():
        for images, true_labels in batches:
            others = true_labels != target
            logits.append(model(images))
            labels.append(true_labels)
            if others.any():
                logits.append(model(add_trigger(images)[others]))
                labels.append(true_labels[others])
    logits, labels = torch.cat(logits), torch.cat(labels)
    change = torch.zeros_like(model.head.bias, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=50, line_search_fn="strong_wolfe")

    def loss_of():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits + change, labels) + change.square().sum() / (2 * variance * len(labels))
        loss.backward()
        return loss

    optimizer.step(loss_of)
    with torch.no_grad():
        model.head.bias += change
