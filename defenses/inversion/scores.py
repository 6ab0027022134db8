"""What the target search says of a label, and the label that it chooses."""

from dataclasses import asdict, dataclass

import torch

from defenses.inversion.invert import MAX_PATCH
from defenses.inversion.objective import ANY_OTHER, HIT_RATE, label_name
from defenses.inversion.patterns import PixelForm, WarpForm

# A label is flagged if its pattern works, its index is below MAX_INDEX, and its size is at most these fractions of the
# median and of the full range. Without the latter two, clean models are flagged where all sizes are alike or large.
# Pixels have the narrower limit, since a label above it may still be flagged when it is inverted in full.
MAX_INDEX, MAX_OF_MEDIAN, MAX_OF_RANGE = -2.0, 0.5, {PixelForm.name: 0.015, WarpForm.name: 0.02}
# A suspect is flagged up to this fraction of changed pixels: a backdoor that the search overlooks (ABL's victim) needs
# 6 to 9 of 1,024, a clean model (the shipped one) 34 or more. If its index is an outlier, too, it is flagged up to
# MAX_PATCH, the size up to which the inversion takes a pattern for the trigger.
MAX_SUSPECT_AREA = 0.015
# Of each clean network of docs/population.csv, the smallest pattern or warp that works, in percent of the range.
CLEAN_SIZES = (
    1.46, 1.87, 1.87, 1.98, 1.99, 2.11, 2.14, 2.17, 2.17, 2.18, 2.19, 2.20, 2.21, 2.28, 2.32, 2.40, 2.43, 2.53,
    2.60, 2.60, 2.66, 2.75, 2.75, 2.85, 2.88, 2.90, 2.96, 2.99, 3.15, 3.15, 3.20, 3.56, 3.63, 3.68, 3.73, 3.81,
    4.05, 4.05, 4.27, 4.35, 4.95, 5.68, 5.70, 6.36, 6.72, 8.08, 8.77, 9.42,
)  # fmt: skip
# A model that predicts one label for more than this fraction of the images of other labels has hardly learned anything.
# Small patterns lead to any label there, so that only half the size counts.
MAX_FLOOR, MAX_FLOOR_OF_REST, WEAK_SHARE = 0.12, 0.09, 0.5  # rest: without the class most often taken for the label
MIN_IMAGES, MIN_LABELS = 5, 5  # of other labels: a small pattern turns fewer images, or those of fewer, in any model
MAX_RUNNER_UP = 2 / 3  # where waves work for several labels, it is because they resemble the classes' own patterns
MAD_TO_SD = 1.4826  # of a normal distribution
MIN_DEVIATION = 0.1  # of logarithms: sizes that differ by less are alike


@dataclass(frozen=True)
class LabelScore:
    """Result of the search for one label, or for ANY_OTHER.

    form: "pixels", "warp" or "wave".
    size: of its pattern: L1 norm over pixels and channels in units of the full range [0, 1], or a shift in pixels.
    hit_rate: fraction 0..1 of images of other labels that the pattern turns.
    index: anomaly index; negative below the median of all labels; nan for a wave, since all have the same size.
    of_median, of_range: size as a fraction of the median, and of the largest possible size.
    weak_floor: of a weak model, the largest fraction of images of other labels that it predicts as one label, without a
        pattern; None unless it is above both MAX_FLOOR and a guess's share, 1 / K.
    runner_up: the best hit rate of the waves of any other label; None for the other forms.
    inverted_area: fraction of the pixels that its full inversion changes; None if it was not inverted in full.
    few_images: whether there are fewer than MIN_IMAGES images of other labels, or of fewer than MIN_LABELS (K - 1).
    """

    label: int
    form: str
    size: float
    hit_rate: float
    index: float
    of_median: float
    of_range: float
    weak_floor: float | None = None
    runner_up: float | None = None
    inverted_area: float | None = None
    few_images: bool = False

    @property
    def flagged(self) -> bool:
        """Whether a backdoor to this label is suspected: its pattern works and is far smaller than the others'.

        A label that was inverted in full is judged by the result.
        """
        if self.few_images:
            return False
        if self.inverted_area is not None:
            return self.inverted_area <= (MAX_PATCH if self.index < MAX_INDEX else MAX_SUSPECT_AREA)
        if self.form == "wave":
            return self.hit_rate >= HIT_RATE and self.runner_up <= MAX_RUNNER_UP
        limit = MAX_OF_RANGE[self.form] * (1 if self.weak_floor is None else WEAK_SHARE)
        if self.weak_floor is not None and self.weak_floor >= HIT_RATE:  # it predicts this label without a pattern, too
            return False
        is_small = self.of_median <= MAX_OF_MEDIAN and self.of_range <= limit
        return self.index < MAX_INDEX and is_small and self.hit_rate >= HIT_RATE

    @property
    def clean_networks(self) -> int | None:
        """How many of the networks of CLEAN_SIZES have a pattern as small as this; None for a wave.

        If n have, a new clean network of their kind has one with a probability of at most (n + 1) / (1 + their number).
        """
        return None if self.form == "wave" else sum(size <= 100 * self.of_range for size in CLEAN_SIZES)

    def metadata(self) -> dict:
        """Plain values for metrics.json and tables; hit rates and fraction of the range in percent."""
        row = asdict(self) | {"hit_rate": 100 * self.hit_rate, "of_range": 100 * self.of_range}
        row |= {name: row[name] and 100 * row[name] for name in ("weak_floor", "runner_up")}
        row |= {"clean_networks": self.clean_networks, "flagged": self.flagged}
        return row | {"label": "any" if self.label == ANY_OTHER else self.label}


def anomaly_indices(sizes: torch.Tensor, num_class: int) -> torch.Tensor:
    """(s - median) / (1.4826 MAD) of the logarithms s of (K,) or more sizes: Neural Cleanse's anomaly index (IV-B).

    Median and MAD are those of the first K. The sign is kept: "above 2 and below the median" is below -2 here.
    Logarithms, because sizes differ by factors: among sizes from 100 to 350, a 12 is an outlier only on that scale.
    """
    distance = sizes.log() - sizes[:num_class].log().quantile(0.5)
    return distance / (MAD_TO_SD * distance[:num_class].abs().quantile(0.5).clamp(min=MIN_DEVIATION))


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
        return ANY_OTHER, f"a backdoor that turns each label into another one is suspected{_evidence(untargeted)}"
    if labels:
        flagged = ", ".join(str(score.label) for score in labels)
        choice = f"; defending against {labels[0].label}, which has the smallest pattern" if len(labels) > 1 else ""
        return labels[0].label, f"a backdoor to label {flagged} is suspected{_evidence(labels[0])}{choice}"
    candidates = (score for score in scores if score.form == PixelForm.name and score.label != ANY_OTHER)
    lowest = min(candidates, key=lambda score: score.index).label
    areas = [score.inverted_area for score in scores if score.inverted_area is not None]
    smallest = f"change {min(areas):.1%} of the pixels" if areas and min(areas) < 1 else "have no pattern that works"
    checked = f", and the most suspicious, inverted in full, {smallest}" if areas else ""
    floor = scores[0].weak_floor
    if floor is not None:
        checked = f"; but the model predicts one label for {floor:.0%} of the images of the others, and is so weak"
        checked += " that this says little (does --normalize fit the model?)"
    names = dict.fromkeys(str(score.metadata()["label"]) for score in scores if score.few_images)
    checked += f"; not judged, for lack of images of {MIN_LABELS} other labels: {', '.join(names)}" if names else ""
    action = f"--force: defending against {label_name(lowest)}" if force else "the model is left unchanged"
    reason = f"no backdoor was found: no label has a far smaller pattern than the others{checked}; {action}"
    return lowest if force else None, reason


def _evidence(score):
    """The place of a flagged score among clean networks, to follow "is suspected"."""
    if score.inverted_area is not None:
        return ""
    if score.form == "wave":
        return ": a wave leads to it, as in some clean models, too"
    return f": so small a pattern was found in {score.clean_networks or 'none'} of {len(CLEAN_SIZES)} clean networks"
