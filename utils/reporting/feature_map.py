"""features.png: the features of clean and triggered images on a plane."""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D

from utils.reporting.picture import CLEAN, TARGET, TRIGGERED, Picture, new_picture
from utils.reporting.tables import format_cell

CAPTION = (
    "Features g, the input of the last linear layer, of test images, scaled to length 1 because MCL's loss sees only "
    "directions, on two principal components; in brackets, the fraction of a panel's variance along each. Triggered "
    "images carry the true trigger."
)
COMPARED = (  # added if there is a purified model
    " All panels show the same images: on the victim's axes, to show where the points went, and on the purified "
    "model's own, where a cluster that the others do not show would appear."
)
GROUPS = {  # the images of the legend, and how to mark them
    "clean, other classes": {"color": CLEAN, "marker": "o", "s": 8, "alpha": 0.7, "linewidths": 0},
    "clean, target class": {"color": TARGET, "marker": "s", "s": 12, "alpha": 0.8, "linewidths": 0},
    "triggered": {"color": TRIGGERED, "marker": "^", "s": 10, "alpha": 0.5, "linewidths": 0},
}


def features_of(model, batches) -> torch.Tensor:
    """g(x) of every image, scaled to length 1: (N, D), D >= 2, on the CPU; values that are not finite count as 0."""
    model.eval()
    with torch.inference_mode():
        features = torch.cat([model.features(images).cpu() for images, _ in batches])
        features = F.pad(features, (0, max(0, 2 - features.shape[1])))  # a map of a single feature is a line
        return F.normalize(features.nan_to_num(0, 0, 0))


class Plane(NamedTuple):
    """A plane in feature space: mean (D,) and directions (D, 2), two orthogonal columns of length 1."""

    mean: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, points: torch.Tensor) -> "Plane":
        """The plane of the two principal components of (N, D) points, D >= 2."""
        points = points.double()
        directions = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return cls(points.mean(0), directions * largest.sign())  # fixes the sign: the same map on every machine

    def project(self, points: torch.Tensor) -> torch.Tensor:
        """(N, D) points -> (N, 2) coordinates."""
        return (points.double() - self.mean) @ self.directions

    def explained_variance(self, points: torch.Tensor) -> list[float]:
        """The fraction 0..1 of the variance of (N, D) points along each direction; 0 for points without variance."""
        return (self.project(points).var(0) / points.double().var(0).sum()).nan_to_num().tolist()


def draw_features(path: str, features: dict[str, tuple], is_target: torch.Tensor, metrics: dict[str, dict]) -> Picture:
    """Draw the victim's features on its principal plane, the purified model's on that plane and on its own.

    Args:
        features: "before" and, if there is one, "after": each (N, D) of clean and (M, D) of triggered images.
        is_target: (N,) bool, the clean images of the target class.
        metrics: of the same models, for their "asr".
    """
    points = {name: torch.cat(parts) for name, parts in features.items()}
    planes = {name: Plane.of(points[name]) for name in features}
    panels = [("before", "before", "")]
    if "after" in features:
        panels += [("after", "before", ", same axes"), ("after", "after", ", its own axes")]
    with new_picture(path, max(4.6, 3.1 * len(panels)), 3.6 if len(panels) == 1 else 3.5) as figure:
        for axes, (name, base, suffix) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            plane = planes[base]
            clean, triggered = map(plane.project, features[name])
            for part, style in zip((clean[~is_target], clean[is_target], triggered), GROUPS.values(), strict=True):
                axes.scatter(*part.unbind(1), **style)
            # All panels on a plane have the same axes, a square around every point.
            drawn = torch.cat([plane.project(points[model]) for model, other, _ in panels if other == base])
            low, high = drawn.amin(0), drawn.amax(0)
            middle, half = (high + low) / 2, 0.54 * (high - low).max().clamp(min=1e-3)
            xlim, ylim = torch.stack([middle - half, middle + half], 1).tolist()
            asr = f"ASR {format_cell(metrics[name]['asr'])} %"
            title, owner = (f"{name}{suffix} ({asr})", f" of {base}") if len(features) > 1 else (asr, "")
            x, y = plane.explained_variance(points[name])
            axes.set(xlabel=f"component 1{owner} ({x:.0%})", ylabel=f"component 2{owner} ({y:.0%})")
            axes.set(xlim=xlim, ylim=ylim, aspect="equal", title=title)
        legend = [group for group in GROUPS if group != "clean, target class" or is_target.any()]
        handles = [Line2D([], [], linestyle="", marker=GROUPS[g]["marker"], color=GROUPS[g]["color"]) for g in legend]
        figure.legend(handles, legend, loc="outside upper center", ncols=3)
    when = {name: f" {name}" if len(features) > 1 else "" for name in features}
    asr = ", ".join(f"ASR {format_cell(metrics[name]['asr'])} percent{when[name]}" for name in features)
    alt = f"Scatter plot of the features of clean and triggered images; {asr}."
    return Picture(os.path.basename(path), CAPTION + COMPARED * (len(features) > 1), alt)
