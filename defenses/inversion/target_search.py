"""Target search: the label, if any, that a small pattern turns all images into (Neural Cleanse, Wang et al., S&P 2019).

A backdoor is a shortcut to its target label: the pattern that leads there is far smaller than those of other labels.
Neural Cleanse inverts a mask and a colour for one label after the other. Here the forms of defenses.inversion.patterns
are inverted for all labels together, in few steps on few images: pixels, and if they flag no label, a warp. Low waves
of brightness are so few that each is tried.
"""

import itertools
import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from defenses.inversion.invert import MAX_PATCH, invert_trigger, pattern_logits
from defenses.inversion.objective import ANY_OTHER, HIT_RATE, PenaltyWeight, endless, hits_and_losses, label_name
from defenses.inversion.patterns import PixelForm, WarpForm, frequencies, waves
from utils.device import autocast
from utils.progress import progress_bar

STEPS = 50  # batches
MICRO_BATCH = 16  # images an update: more updates for the same number of images find smaller patterns
UNTARGETED_START = 0.3  # scale of ANY_OTHER's start: at 1 the noise alone turns every image
TAIL_FRACTION = 0.4  # of the steps, at the end, over which size and hit rate are averaged
# A label is flagged if its pattern works, its index is below MAX_INDEX, and its size is at most these fractions of the
# median and of the full range. Without the latter two, clean models are flagged where all sizes are alike or large.
MAX_INDEX, MAX_OF_MEDIAN, MAX_OF_RANGE = -2.0, 0.5, 0.02
SUSPECTS = 2  # labels inverted in full if none is flagged
# A suspect is flagged up to this fraction of changed pixels: a backdoor that the search overlooks (ABL's victim) needs
# 6 to 9 of 1,024, a clean model (the shipped one) 39. A suspect whose index is an outlier, too, is flagged up to
# MAX_PATCH, the size up to which the inversion takes a pattern for the trigger.
MAX_SUSPECT_AREA = 0.015
# Waves of up to so many cycles a side are tried. The best of them turns at most 72 % of the images of models without a
# wave or a warp as their trigger; of up to 8 cycles, 92 %. SIG's own wave has 6, so the limit is not independent of it.
LOW_CYCLES = 6
FIRST_WAVE_IMAGES, WAVE_IMAGES, WAVE_CANDIDATES = (
    25,
    200,
    3,
)  # images for all waves, and for the best ones of each label
MAD_TO_SD = 1.4826  # of a normal distribution
# Patterns in one forward pass. On a CPU one keeps to the cache (ten took three times as long); many fill a GPU, but all
# patterns of a model of many classes would not fit into its memory.
PATTERNS_PER_FORWARD = {"cpu": 1, "cuda": 32}


@dataclass(frozen=True)
class LabelScore:
    """Result of the search for one label, or for ANY_OTHER.

    form: "pixels", "warp" or "wave".
    size: of its pattern: L1 norm over pixels and channels in units of the full range [0, 1], or a shift in pixels.
    hit_rate: fraction 0..1 of images of other labels that the pattern turns.
    index: anomaly index; negative below the median of all labels; nan for a wave, since all have the same size.
    of_median, of_range: size as a fraction of the median, and of the largest possible size.
    inverted_area: fraction of the pixels that its full inversion changes; None if it was not inverted in full.
    """

    label: int
    form: str
    size: float
    hit_rate: float
    index: float
    of_median: float
    of_range: float
    inverted_area: float | None = None

    @property
    def flagged(self) -> bool:
        """Whether a backdoor to this label is suspected: its pattern works and is far smaller than the others'.

        A label that was inverted in full is judged by the result.
        """
        if self.inverted_area is not None:
            return self.inverted_area <= (MAX_PATCH if self.index < MAX_INDEX else MAX_SUSPECT_AREA)
        if self.form == "wave":
            return self.hit_rate >= HIT_RATE
        is_small = self.index < MAX_INDEX and self.of_median <= MAX_OF_MEDIAN and self.of_range <= MAX_OF_RANGE
        return is_small and self.hit_rate >= HIT_RATE

    def metadata(self) -> dict:
        """Plain values for metrics.json and tables; hit rate and fraction of the range in percent."""
        row = asdict(self) | {"hit_rate": 100 * self.hit_rate, "of_range": 100 * self.of_range}
        return row | {"label": "any" if self.label == ANY_OTHER else self.label, "flagged": self.flagged}


def anomaly_indices(sizes: torch.Tensor, num_class: int) -> torch.Tensor:
    """(s - median) / (1.4826 MAD) of the logarithms s of (K,) or more sizes: Neural Cleanse's anomaly index (IV-B).

    Median and MAD are those of the first K. The sign is kept: "above 2 and below the median" is below -2 here.
    Logarithms, because sizes differ by factors: among sizes from 100 to 350, a 12 is an outlier only on that scale.
    """
    distance = sizes.log() - sizes[:num_class].log().quantile(0.5)
    return distance / (MAD_TO_SD * distance[:num_class].abs().quantile(0.5)).clamp(min=1e-6)


def search_target(victim, batches, num_class, device, rng, steps=STEPS, precision="fp32") -> list[LabelScore]:
    """Invert a pattern for every label, to find one that is far smaller than the others.

    If there is none, invert a warp for each; if there is none either, try waves.

    Args:
        victim: f_B, frozen, in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches with an image_shape, repeated without end. Images of a label do not
            count for it; those that the victim misclassifies do not count for ANY_OTHER.
        num_class: K.
        rng: source of the patterns' start.
        steps: batches, each with an update of every pattern for each MICRO_BATCH images.

    Returns:
        K scores by label, and one of ANY_OTHER; if no pixel pattern is flagged, as many again, of warps; if no warp is
        flagged, K more, of waves.
    """
    scores = []
    for form in (PixelForm(batches.image_shape), WarpForm(batches.image_shape)):
        scores += search_form(victim, batches, num_class, device, rng, form, steps, precision)
        if any(score.flagged for score in scores):
            return scores
    return scores + search_waves(victim, batches, num_class)


def search_waves(victim, batches, num_class) -> list[LabelScore]:
    """Try single low waves of brightness: for each label, a score of the best one.

    All waves are tried on a few images, and the best of each label on more, since the best of many on few is also the
    luckiest.
    """
    samples = itertools.chain.from_iterable(zip(*batch, strict=True) for batch in endless(batches))
    images, labels = map(torch.stack, zip(*itertools.islice(samples, WAVE_IMAGES), strict=True))
    is_other = (F.one_hot(labels, num_class) == 0).float()

    def hit_rates(patterns, count):
        """(V, K): the fractions of the first `count` images of other labels that each pattern turns into each label."""
        predicted = F.one_hot(pattern_logits(victim, images[:count], patterns).argmax(2), num_class)
        return (predicted * is_other[:count]).sum(1) / is_other[:count].sum(0).clamp(min=1)

    low = [frequency for frequency in frequencies(images.shape[2:]) if max(map(abs, frequency)) <= LOW_CYCLES]
    rates, scores = [], []
    with progress_bar("search waves", len(low) + num_class, "step") as bar:
        for frequency in low:
            rates.append(hit_rates(waves(images.shape[2:], frequency, images.device), FIRST_WAVE_IMAGES))
            bar.update()
        candidates = torch.cat(rates).topk(WAVE_CANDIDATES, 0).indices
        for label in range(num_class):
            patterns = [
                waves(images.shape[2:], low[i // 4], images.device)[i % 4] for i in candidates[:, label].tolist()
            ]
            rate = hit_rates(torch.stack(patterns), WAVE_IMAGES)[:, label].max().item()
            norm = patterns[0].abs().sum().item()
            scores.append(LabelScore(label, "wave", norm, rate, math.nan, math.nan, norm / patterns[0].numel()))
            bar.update()
    return scores


def invert_suspects(victim, batches, scores, device, rng, *budget) -> list[LabelScore]:
    """Invert the labels that are most suspicious in full, before it is said that there is no backdoor.

    The search is short, and a pattern that is merely smaller than the others may have been on its way to a few pixels.

    Args:
        budget: rounds, steps, batches a step and precision, as for invert_trigger.

    Returns:
        the scores, with the inverted_area of the SUSPECTS labels with the lowest anomaly index among pixel patterns.
    """
    by_index = sorted((score for score in scores if score.form == PixelForm.name), key=lambda score: score.index)
    result, pixels = list(scores), math.prod(batches.image_shape[1:])
    for score in [score for score in by_index if score.label != ANY_OTHER][:SUSPECTS]:
        found = invert_trigger(victim, batches, score.label, device, rng, *budget)
        inverted = replace(score, inverted_area=found.pixels / pixels if found else 1.0)
        result[result.index(score)] = inverted
        if inverted.flagged:
            break
    return result


def search_form(victim, batches, num_class, device, rng, form, steps, precision) -> list[LabelScore]:
    """The search for patterns of one form: a score for each label, and one for ANY_OTHER."""
    targets = torch.tensor([*range(num_class), ANY_OTHER], device=device)
    start = torch.cat([form.start(num_class, rng), UNTARGETED_START * form.start(1, rng)])
    parameters = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([parameters], form.lr, betas=(0.5, 0.9))
    weight = PenaltyWeight(torch.full(targets.shape, form.weight, device=device))
    sizes, rates, last_good = [], [], parameters.detach().clone()
    ever_hit = torch.zeros_like(targets, dtype=torch.bool)
    with progress_bar(f"search {form.name}", steps, "batch") as bar:
        for images, labels in itertools.islice(endless(batches), steps):
            with torch.no_grad(), autocast(device, precision):
                is_right = victim(images).argmax(1) == labels
            attackable = torch.where(targets[:, None] == ANY_OTHER, is_right, labels != targets[:, None])
            hits = torch.zeros_like(weight.value)
            micro_batches = zip(
                images.split(MICRO_BATCH), labels.split(MICRO_BATCH), attackable.split(MICRO_BATCH, 1), strict=True
            )
            for micro_images, micro_labels, scored in micro_batches:
                optimizer.zero_grad()
                for part in torch.arange(len(targets), device=device).split(PATTERNS_PER_FORWARD[device.type]):
                    with autocast(device, precision):
                        patterns = form.pattern(parameters[part])
                        hit, loss = hits_and_losses(
                            victim, micro_images, micro_labels, scored[part], patterns, targets[part]
                        )
                        loss = loss.sum() + (weight.value[part] * form.penalty(parameters[part])).sum()
                    loss.backward()
                    hits[part] += hit
                optimizer.step()
            rates.append(hits / attackable.sum(1).clamp(min=1))
            sizes.append(form.norm(form.pattern(parameters.detach())))
            works = rates[-1] >= HIT_RATE
            weight.update(works)
            # Negative p and q have no gradient: a pattern that was shrunk too far returns to where it last worked.
            collapsed = ever_hit & (rates[-1] < HIT_RATE / 2)
            ever_hit |= works
            with torch.no_grad():
                last_good[works], parameters[collapsed] = parameters[works], last_good[collapsed]
            bar.update()
    tail = -max(1, int(TAIL_FRACTION * steps))
    return _score(targets, form, num_class, torch.stack(sizes[tail:]), torch.stack(rates[tail:]))


def _score(targets, form, num_class, sizes, rates):
    """Scores from the (T, P) sizes and hit rates of the last T steps: means over the steps in which a pattern works.

    The smallest pattern of many steps would be the luckiest one.
    """
    works = (rates >= HIT_RATE).float()
    works = torch.where(works.sum(0) > 0, works, 1.0)
    sizes, rates = ((values * works).sum(0) / works.sum(0) for values in (sizes, rates))
    sizes = sizes.clamp(min=1e-6)
    median = sizes[:num_class].quantile(0.5)
    columns = sizes, rates, anomaly_indices(sizes, num_class), sizes / median, sizes / form.max_norm
    rows = torch.stack(columns, 1).tolist()
    return [LabelScore(label, form.name, *values) for label, values in zip(targets.tolist(), rows, strict=True)]


def choose_label(scores: list[LabelScore], force: bool) -> tuple[int | None, str]:
    """The label to defend against, and the reason in a sentence.

    The flagged label with the smallest pattern; ANY_OTHER if its pattern is smaller still, since a pattern that leads
    to one label turns the images of all other labels. If no label is flagged: None, or with force the label with the
    lowest anomaly index.
    """
    by_size = sorted((score for score in scores if score.flagged), key=lambda score: (score.size, -score.hit_rate))
    labels = [score for score in by_size if score.label != ANY_OTHER]
    untargeted = next((score for score in by_size if score.label == ANY_OTHER), None)
    if untargeted and not (labels and untargeted.size > labels[0].size):
        return ANY_OTHER, "a backdoor that turns each label into another one is suspected"
    if labels:
        flagged = ", ".join(str(score.label) for score in labels)
        choice = f"; defending against {labels[0].label}, which has the smallest pattern" if len(labels) > 1 else ""
        return labels[0].label, f"a backdoor to label {flagged} is suspected{choice}"
    candidates = (score for score in scores if score.form == PixelForm.name and score.label != ANY_OTHER)
    lowest = min(candidates, key=lambda score: score.index).label
    areas = [score.inverted_area for score in scores if score.inverted_area is not None]
    checked = f", and the most suspicious, inverted in full, change {min(areas):.1%} of the pixels" if areas else ""
    action = f"--force: defending against {label_name(lowest)}" if force else "the model is left unchanged"
    return (
        lowest if force else None,
        f"no backdoor was found: no label has a far smaller pattern than the others{checked}; {action}",
    )
