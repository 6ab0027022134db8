"""Target search: which label, if any, a small pattern turns everything into (Wang et al., Neural Cleanse, S&P 2019).

A backdoor is a shortcut to its target: the pattern that leads there is far smaller than those that lead to the other
labels. Neural Cleanse inverts a mask and a colour for each label, one label after the other; here the patterns of
defenses.forms are inverted for all labels together, in few steps on few images: pixels, and where those say nothing, a
warp.
"""

import itertools
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from defenses.forms import Pixels, Warp, stamp
from defenses.inversion import ANY, HIT_RATE, LOWER, RAISE, label_name, loss_from
from utils.device import autocast
from utils.report import progress_bar

STEPS = 50  # batches; after each the weight of a label's size moves, by whether its pattern works
FEW = 16  # images of a batch in an update: more updates for the same number of images find smaller patterns
AWAY_START = 0.3  # of the noise, for ANY: all of it leads any image away from its label, and tells nothing of a trigger
SETTLED = 0.4  # share of the steps, at the end, whose patterns are what the search says
# A label is flagged if its pattern works, its index is below SUSPECT, and its size at most these shares of the median
# and of what changes every pixel from black to white, or moves it across the image: where the others differ little, or
# where all of them are large, the index alone flags labels of clean models too.
SUSPECT, OF_MEDIAN, OF_RANGE = -2.0, 0.5, 0.02
TO_SIGMA = 1.4826  # times the median absolute deviation: the standard deviation of a normal distribution
# Patterns stamped on images at a time: one keeps to a processor's cache (ten at once took three times as long), many
# fill a GPU, and all those of a model of many classes would not fit into memory.
AT_ONCE = {"cpu": 1, "cuda": 32}


@dataclass(frozen=True)
class Found:
    """What the search says of one label, or of ANY other than an image's own.

    form: "pixels" or "warp".
    size: of its pattern, an L1 norm over pixels and channels in units of the full range [0, 1], or a shift in pixels.
    hit_rate: share 0..1 of images of other labels turned in the step that ended with it.
    index: by how many deviations `size` is above (or, negative, below) the median of all labels.
    of_median, of_range: `size` as a share of the median, and of what changes every pixel from black to white or moves
        it across the image.
    """

    label: int
    form: str
    size: float
    hit_rate: float
    index: float
    of_median: float
    of_range: float

    @property
    def flagged(self) -> bool:
        """Whether a backdoor to this label is suspected: its pattern works, and is far smaller than the others'."""
        small = self.index < SUSPECT and self.of_median <= OF_MEDIAN and self.of_range <= OF_RANGE
        return small and self.hit_rate >= HIT_RATE

    def facts(self) -> dict:
        """Plain values for a file or a table; hit rate and share of the range in percent."""
        percent = {"hit_rate": 100 * self.hit_rate, "of_range": 100 * self.of_range}
        if self.label == ANY:
            percent["label"] = "any"
        return asdict(self) | percent | {"flagged": self.flagged}


def anomaly_indices(sizes: torch.Tensor, num_class: int) -> torch.Tensor:
    """(s - median) / (1.4826 MAD) of the logarithms s of sizes, (K,) or more: Neural Cleanse's anomaly index (IV-B).

    Median and deviation are those of the first K. The index has its sign: above 2 and below the median there is below
    -2 here. Sizes differ by factors, and none is below zero: among sizes from 100 to 350, one of 12 is no outlier,
    among their logarithms it is.
    """
    distance = sizes.log() - sizes[:num_class].log().quantile(0.5)
    return distance / (TO_SIGMA * distance[:num_class].abs().quantile(0.5)).clamp(min=1e-6)


def search_target(victim, batches, num_class, device, rng, steps=STEPS, precision="fp32") -> list[Found]:
    """Invert a pattern for every label, to see whose is far smaller than the others'; if none is, a warp for each.

    Args:
        victim: f_B, frozen and in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches, gone through again and again; a label's own images do not count for it,
            nor for ANY those that the victim has wrong as they are.
        num_class: K labels are searched.
        rng: where the patterns start.
        steps: batches, each of an update of every label's pattern for each 16 images.

    Returns:
        K of them, by label, and one of ANY; twice as many where no pattern was flagged, warps last.
    """
    shape, found = next(iter(batches))[0].shape[1:], []
    for form in (Pixels(shape), Warp(shape)):
        found += _search(victim, batches, num_class, device, rng, form, steps, precision)
        if any(one.flagged for one in found):
            break
    return found


def _search(victim, batches, num_class, device, rng, form, steps, precision):
    """The search for patterns of one form: a row a label, and one of ANY."""
    targets = torch.tensor([*range(num_class), ANY], device=device)
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    start = torch.cat([form.start(num_class, rng), AWAY_START * form.start(1, rng)])
    parameters = start.to(device).requires_grad_()
    optimizer = torch.optim.Adam([parameters], form.lr, betas=(0.5, 0.9))
    weight = torch.full(targets.shape, form.weight, device=device)
    sizes, rates, worked = [], [], parameters.detach().clone()
    ever = torch.zeros_like(targets, dtype=torch.bool)
    with progress_bar(f"search {form.name}", steps, "batch") as bar:
        for images, labels in itertools.islice(stream, steps):
            hits = torch.zeros_like(weight)
            with torch.no_grad(), autocast(device, precision):
                right = victim(images).argmax(1) == labels
            counted = torch.where(targets[:, None] == ANY, right, labels != targets[:, None])
            few_of_each = zip(images.split(FEW), labels.split(FEW), counted.split(FEW, 1), strict=True)
            for few, their, asked in few_of_each:
                optimizer.zero_grad()
                for part in torch.arange(len(targets), device=device).split(AT_ONCE[device.type]):
                    with autocast(device, precision):
                        patterns = form.pattern(parameters[part])
                        hit, loss = _turned(victim, few, their, asked[part], patterns, targets[part])
                        loss = loss + (weight[part] * form.size(parameters[part])).sum()
                    loss.backward()
                    hits[part] += hit
                optimizer.step()
            rates.append(hits / counted.sum(1).clamp(min=1))
            sizes.append(form.measure(form.pattern(parameters.detach())))
            weight = torch.where(rates[-1] >= HIT_RATE, weight * RAISE, weight / LOWER)
            # Below zero p and q have no gradient to come back by: what was shrunk too far starts from where it worked.
            works, lost = rates[-1] >= HIT_RATE, ever & (rates[-1] < HIT_RATE / 2)
            ever |= works
            with torch.no_grad():
                worked[works], parameters[lost] = parameters[works], worked[lost]
            bar.update()
    # The smallest pattern of many steps would be the luckiest one: the mean of those, at the end, that work.
    sizes, rates = (torch.stack(values[-max(1, int(SETTLED * steps)) :]) for values in (sizes, rates))
    works = (rates >= HIT_RATE).float()
    works = torch.where(works.sum(0) > 0, works, 1.0)
    sizes, rates = ((values * works).sum(0) / works.sum(0) for values in (sizes, rates))
    sizes = sizes.clamp(min=1e-6)
    median = sizes[:num_class].quantile(0.5)
    columns = sizes, rates, anomaly_indices(sizes, num_class), sizes / median, sizes / form.largest
    rows = torch.stack(columns, 1).tolist()
    return [Found(label, form.name, *values) for label, values in zip(targets.tolist(), rows, strict=True)]


def _turned(victim, images, labels, counted, patterns, targets):
    """Every one of (P, C, H, W) patterns on every one of (B, 3, H, W) images, asked for the (P,) targets.

    Args:
        counted: (P, B) bool, which images count for which.

    Returns:
        (P,) how many of those are turned, and the sum over patterns of their mean cross-entropy.
    """
    # As stamp deals the patterns out: all of them on the first image, then all on the next.
    stamped = stamp(images.repeat_interleave(len(patterns), 0), patterns)
    logits = victim(stamped.contiguous(memory_format=torch.channels_last))
    logits = logits.unflatten(0, (len(images), len(patterns))).transpose(0, 1)
    counted, from_own = counted.float(), targets[:, None] == ANY
    wanted = torch.where(from_own, labels, targets[:, None])
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(counted)
    losses = torch.where(from_own, loss_from(logits, labels.expand_as(wanted)), losses)
    hits = (((logits.argmax(2) == wanted) ^ from_own) * counted).sum(1)
    return hits, ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).sum()


def choose_label(searched: list[Found], force: bool) -> tuple[int | None, str]:
    """The label to work against, and why, in a sentence.

    The flagged one with the smallest pattern; ANY where its pattern is smaller still: one that leads to a single label
    leads away from the others as well, but not from that label itself. Where none is flagged, None, or if forced that
    of the lowest index.
    """
    by_size = sorted((found for found in searched if found.flagged), key=lambda found: found.size)
    labels = [found for found in by_size if found.label != ANY]
    away = next((found for found in by_size if found.label == ANY), None)
    if away and not (labels and away.size > labels[0].size):
        return ANY, "a backdoor is suspected that turns each label into another one"
    if labels:
        told = ", ".join(str(found.label) for found in labels)
        several = f"; {labels[0].label} has the smallest pattern and is worked against" * (len(labels) > 1)
        return labels[0].label, f"a backdoor to label {told} is suspected{several}"
    pixels = (found for found in searched if found.form == Pixels.name and found.label != ANY)
    lowest = min(pixels, key=lambda found: found.index).label
    left = f"--force: {label_name(lowest)} is worked against" if force else "the model is left as it is"
    return lowest if force else None, (
        f"no backdoor was found: no label's pattern is small, and far smaller than the others'; {left}"
    )
