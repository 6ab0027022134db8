"""Target search: the label, if any, that a small pattern turns all images into (Neural Cleanse, Wang et al., S&P 2019).

A backdoor is a shortcut to its target label: the pattern that leads there is far smaller than those of other labels.
Neural Cleanse inverts a mask and a colour for one label after the other. Here the forms of defenses.inversion.patterns
are inverted for all labels together, in few steps on few images: pixels, and if they flag no label, a warp. Low waves
of brightness are so few that each is tried.
"""

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from defenses.inversion.invert import invert_trigger
from defenses.inversion.objective import (
    ANY_OTHER,
    HIT_RATE,
    MICRO_BATCH,
    PenaltyWeight,
    endless,
    hits_and_losses,
    pattern_logits,
)
from defenses.inversion.patterns import PixelForm, WarpForm, frequencies, waves
from defenses.inversion.scores import MAX_FLOOR, MAX_FLOOR_OF_REST, MIN_IMAGES, MIN_LABELS, LabelScore, anomaly_indices
from utils.device import autocast
from utils.progress import progress_bar

STEPS = 50  # batches
UNTARGETED_START = 0.3  # scale of ANY_OTHER's start: at 1 the noise alone turns every image
# Of more than FULL_SEARCHES labels, the PROMISING ones with the smallest patterns are searched in full, and a sample of
# the others to compare them with; all share the first steps, on half of the images. After 20 steps the target labels of
# six victims of ten classes have the smallest patterns; after 12, that of the paper's is the last of ten.
FULL_SEARCHES, PROMISING, FIRST_STEPS = 10, 4, 20
MAX_FAILING = 8  # steps in a row after which a pattern that has worked counts as shrunk too far
TAIL_FRACTION = 0.4  # of the steps, at the end, over which size and hit rate are averaged
SUSPECTS = 2  # labels inverted in full if none is flagged
# Waves of up to LOW_CYCLES cycles a side are tried. The best of them turns at most 72 % of the images of CIFAR-10
# models without a wave or a warp as their trigger, of up to 8 cycles 92 %. SIG's wave has 6: the limit depends on it.
LOW_CYCLES = 6
FIRST_WAVE_IMAGES, WAVE_IMAGES, WAVE_CANDIDATES = 25, 200, 3  # for all waves, and for the best ones of each label
# Patterns in one forward pass, of 32x32 pixels; fewer of more. On a CPU one keeps to the cache (ten took three times as
# long); many fill a GPU, but all patterns of a model of many classes would not fit into its memory.
PATTERNS_PER_FORWARD = {"cpu": 1, "cuda": 32}


def search_target(victim, batches, num_class, device, rng, steps=STEPS, precision="fp32") -> list[LabelScore]:
    """Invert a pattern for every label, to find one that is far smaller than the others.

    If there is none, invert a warp for each; if there is none either, try waves. These two need other labels to compare
    with: of two classes, only pixels are tried, and none is flagged before it is inverted in full (invert_suspects). A
    weak model (LabelScore.weak_floor) is searched for pixels alone, too.

    Args:
        victim: f_B, frozen, in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches with an image_shape, repeated without end. Images of a label do not
            count for it; those that the victim misclassifies do not count for ANY_OTHER.
        num_class: K.
        rng: source of the patterns' start.
        steps: batches, each with an update of every pattern for each MICRO_BATCH images.

    Returns:
        scores by label, and one of ANY_OTHER; if no pixel pattern is flagged, those of warps, too; if no warp is
        flagged, those of waves. Of more than FULL_SEARCHES labels, not all have scores.
    """
    scores = []
    for form in (PixelForm(batches.image_shape), WarpForm(batches.image_shape)):
        scores += search_form(victim, batches, num_class, device, rng, form, steps, precision)
        if num_class == 2 or any(score.flagged or score.weak_floor for score in scores):
            return scores
    return scores + search_waves(victim, batches, num_class)


@torch.no_grad()
def search_waves(victim, batches, num_class) -> list[LabelScore]:
    """Try single low waves of brightness: for each of up to FULL_SEARCHES labels, a score of the best one.

    All waves are tried on a few images, and the best ones of the best labels on more, since the best of many on few is
    also the luckiest.
    """
    samples = itertools.chain.from_iterable(zip(*batch, strict=True) for batch in endless(batches))
    images, labels = map(torch.stack, zip(*itertools.islice(samples, WAVE_IMAGES), strict=True))
    is_other, few_images = (F.one_hot(labels, num_class) == 0).float(), _few_images(batches.labels, num_class)

    def hit_rates(patterns, count):
        """(V, K): the fractions of the first `count` images of other labels that each pattern turns into each label."""
        logits = torch.cat([pattern_logits(victim, images[:count], pattern[None]) for pattern in patterns])
        predicted = F.one_hot(logits.argmax(2), num_class)
        return (predicted * is_other[:count]).sum(1) / is_other[:count].sum(0).clamp(min=1)

    low = [frequency for frequency in frequencies(images.shape[2:]) if max(map(abs, frequency)) <= LOW_CYCLES]
    rates, best, candidate_count = [], {}, min(num_class, FULL_SEARCHES)
    with progress_bar("search waves", len(low) + candidate_count, "step") as bar:
        for frequency in low:
            rates.append(hit_rates(waves(images.shape[2:], frequency, images.device), FIRST_WAVE_IMAGES))
            bar.update()
        top = torch.cat(rates).topk(WAVE_CANDIDATES, 0)
        candidates = sorted(top.values[0].topk(candidate_count).indices.tolist())
        for label in [label for label in candidates if not few_images[label]]:
            chosen = top.indices[:, label].tolist()
            patterns = torch.stack([waves(images.shape[2:], low[i // 4], images.device)[i % 4] for i in chosen])
            best[label] = hit_rates(patterns, WAVE_IMAGES)[:, label].max().item()
            bar.update()
    norm = waves(images.shape[2:], low[0], images.device)[0].abs().sum().item()
    of_range = norm / math.prod(batches.image_shape)
    runners_up = {label: max((rate for other, rate in best.items() if other != label), default=0.0) for label in best}
    return [
        LabelScore(label, "wave", norm, rate, math.nan, math.nan, of_range, runner_up=runners_up[label])
        for label, rate in best.items()
    ]


def invert_suspects(victim, batches, scores, device, rng, *budget) -> list[LabelScore]:
    """Invert the labels that are most suspicious in full, before it is said that there is no backdoor.

    The search is short, and a pattern that is merely smaller than the others may have been on its way to a few pixels.

    Args:
        budget: rounds, steps, batches per step and precision, as for invert_trigger.

    Returns:
        the scores, with the inverted_area of the SUSPECTS labels with the lowest anomaly index among pixel patterns.
    """
    by_index = sorted((score for score in scores if score.form == PixelForm.name), key=lambda score: score.index)
    result = list(scores)
    for score in [score for score in by_index if score.label != ANY_OTHER and not score.few_images][:SUSPECTS]:
        found = invert_trigger(victim, batches, score.label, device, rng, *budget)
        inverted = replace(score, inverted_area=found.area if found else 1.0)
        result[result.index(score)] = inverted
        if inverted.flagged:
            break
    return result


def search_form(victim, batches, num_class, device, rng, form, steps, precision) -> list[LabelScore]:
    """The search for patterns of one form: a score for each label, and one for ANY_OTHER.

    Of more than FULL_SEARCHES labels, those that cannot win are dropped after FIRST_STEPS steps, and have no score:
    successive halving (Jamieson and Talwalkar, AISTATS 2016) with one cut.
    """
    targets = torch.tensor([*range(num_class), ANY_OTHER], device=device)
    start = torch.cat([form.start(num_class, rng), UNTARGETED_START * form.start(1, rng)])
    parameters = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([parameters], form.lr, betas=(0.5, 0.9))
    weight = PenaltyWeight(torch.full(targets.shape, form.weight, device=device))
    sizes, rates, seen, last_good = [], [], [], parameters.detach().clone()
    ever_hit, failing = torch.zeros_like(targets, dtype=torch.bool), torch.zeros_like(targets)
    kept, reference_count = torch.arange(len(targets), device=device), num_class
    divisor = 2 if num_class > FULL_SEARCHES else 1  # of the images, until labels are dropped
    patterns_at_once = max(1, int(min(1, 32**2 / math.prod(form.shape[-2:])) * PATTERNS_PER_FORWARD[device.type]))
    with progress_bar(f"search {form.name}", steps, "batch") as bar:
        for step, (images, labels) in enumerate(itertools.islice(endless(batches), steps)):
            if divisor == 2 and step == FIRST_STEPS:
                divisor, (kept, reference_count) = 1, promising(sizes[-1], ever_hit)
            images, labels, micro_batch = images[::divisor], labels[::divisor], MICRO_BATCH // divisor
            with torch.no_grad(), autocast(device, precision):
                predicted = victim(images).argmax(1)
            seen.append((labels, predicted))
            attackable = torch.where(targets[:, None] == ANY_OTHER, predicted == labels, labels != targets[:, None])
            hits = torch.zeros_like(weight.value)
            parts = (images.split(micro_batch), labels.split(micro_batch), attackable.split(micro_batch, 1))
            for micro_images, micro_labels, scored in zip(*parts, strict=True):
                parameters.grad = torch.zeros_like(parameters)
                for group in kept.split(divisor * patterns_at_once):
                    part = parameters.detach()[group].requires_grad_()
                    with autocast(device, precision):
                        wanted = scored[group], form.pattern(part), targets[group]
                        hit, loss = hits_and_losses(victim, micro_images, micro_labels, *wanted)
                        loss = loss.sum() + (weight.value[group] * form.penalty(part)).sum()
                    loss.backward()
                    parameters.grad[group] = part.grad
                    hits[group] += hit
                optimizer.step()
            rates.append(hits / attackable.sum(1).clamp(min=1))
            sizes.append(form.norm(form.pattern(parameters.detach())))
            works = rates[-1] >= HIT_RATE
            tried = attackable.any(1)
            weight.update(works, tried)
            # Negative p and q have no gradient: a pattern that was shrunk too far returns to where it last worked.
            failing = torch.where(works, 0, failing + 1)
            collapsed = ever_hit & tried & ((rates[-1] < HIT_RATE / 2) | (failing >= MAX_FAILING))
            ever_hit |= works
            with torch.no_grad():
                last_good[works], parameters[collapsed], failing[collapsed] = parameters[works], last_good[collapsed], 0
            bar.update()
    tail = -max(1, int(TAIL_FRACTION * steps))
    sizes, rates = torch.stack(sizes[tail:])[:, kept], torch.stack(rates[tail:])[:, kept]
    floor = _weak_floor(*map(torch.cat, zip(*seen, strict=True)), num_class)
    scores = _score(targets[kept], form, reference_count, sizes, rates)
    few_images = _few_images(batches.labels, num_class)
    scores = [replace(score, weak_floor=floor, few_images=few_images[score.label]) for score in scores]
    return sorted(scores, key=lambda score: (score.label == ANY_OTHER, score.label))


def _few_images(labels, num_class):
    """LabelScore.few_images of each label and, last, of ANY_OTHER."""
    counts = labels.bincount(minlength=num_class)
    other_labels = (counts > 0).sum() - (counts > 0).long()
    too_few = (len(labels) - counts < MIN_IMAGES) | (other_labels < min(MIN_LABELS, num_class - 1))
    return [*too_few.tolist(), too_few.any().item()]


def _weak_floor(labels, predicted, num_class):
    """LabelScore.weak_floor of a model with these predictions.

    One class that is often taken for another does not make a model weak: a few of its images may be all there are.
    """
    confused = F.one_hot(labels, num_class).float().T @ F.one_hot(predicted, num_class).float()  # class, prediction
    counts, wrong = confused.sum(1), confused.fill_diagonal_(0)
    floor = (wrong.sum(0) / (len(labels) - counts).clamp(min=1)).max().item()
    most, taken = wrong.max(0)
    rest = ((wrong.sum(0) - most) / (len(labels) - counts - counts[taken]).clamp(min=1)).max()
    is_weak = floor > max(MAX_FLOOR, 1 / num_class) and (num_class == 2 or rest > MAX_FLOOR_OF_REST)
    return floor if is_weak else None


def promising(sizes, works) -> tuple[torch.Tensor, int]:
    """The labels to go on with: a sample of those with larger patterns, the PROMISING ones, ANY_OTHER.

    Args:
        sizes: (K + 1,), the last one ANY_OTHER's.
        works: (K + 1,), whether a label's pattern ever worked.

    Returns:
        (FULL_SEARCHES + 1,) positions, and how many of the first are the sample.
    """
    order = torch.where(works, sizes, math.inf)[:-1].argsort().tolist()
    others, count = order[PROMISING:], FULL_SEARCHES - PROMISING
    sample = [others[i * (len(others) - 1) // (count - 1)] for i in range(count)]
    return torch.tensor([*sample, *order[:PROMISING], len(order)], device=sizes.device), count


def _score(targets, form, reference_count, sizes, rates):
    """Scores from the (T, P) sizes and hit rates of the last T steps: means over the steps in which a pattern works.

    The smallest pattern of many steps would be the luckiest one. A pattern that never works has the full range as its
    size: it may be small only because it was given up. Median and index are relative to the first `reference_count`.
    """
    works = (rates >= HIT_RATE).float()
    ever_works = works.sum(0) > 0
    works = torch.where(ever_works, works, 1.0)
    sizes, rates = ((values * works).sum(0) / works.sum(0) for values in (sizes, rates))
    sizes = torch.where(ever_works, sizes.clamp(min=1e-6), form.max_norm)
    median = sizes[:reference_count].quantile(0.5)
    columns = sizes, rates, anomaly_indices(sizes, reference_count), sizes / median, sizes / form.max_norm
    rows = torch.stack(columns, 1).tolist()
    labels = targets.tolist()
    return [LabelScore(label, form.name, *row) for label, row in zip(labels, rows, strict=True)]
