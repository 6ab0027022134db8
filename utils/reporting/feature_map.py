"""features.png: the features of clean and triggered images on a plane."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.lines import Line2D

from utils.reporting.picture import CLEAN, TARGET, TRIGGERED, new_picture
from utils.reporting.tables import format_cell

MARKERS = {
    "clean": {"color": CLEAN, "marker": "o", "s": 8, "alpha": 0.7, "linewidths": 0},
    "target": {"color": TARGET, "marker": "s", "s": 12, "alpha": 0.8, "linewidths": 0},
    "triggered": {"color": TRIGGERED, "marker": "^", "s": 10, "alpha": 0.5, "linewidths": 0},
}
LABELS = {"clean": "clean, other classes", "target": "clean, target class", "triggered": "triggered"}


def features_of(model, batches) -> torch.Tensor:
    """g(x) of every image, scaled to length 1: (N, D) on the CPU, in the order of `batches`.

    Values that are not finite count as 0.
    """
    model.eval()
    with torch.inference_mode():
        features = torch.cat([model.features(images).cpu() for images, _ in batches])
        return F.normalize(features.nan_to_num(0, 0, 0))


@dataclass
class Plane:
    """A plane in feature space: mean (D,) and directions (D, 2), two orthogonal columns of length 1."""

    mean: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, points: torch.Tensor) -> "Plane":
        """The plane of the two principal components of (N, D) points, D >= 2.

        The largest entry of each direction is positive, so that the same points give the same map everywhere.
        """
        points = points.double()
        centred = points - points.mean(0)
        _, directions = torch.linalg.eigh(centred.T @ centred)  # in order of rising variance
        directions = directions[:, [-1, -2]]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return cls(points.mean(0), directions * largest.sign())

    def project(self, points: torch.Tensor) -> torch.Tensor:
        """(N, D) points -> (N, 2) coordinates."""
        return (points.double() - self.mean) @ self.directions

    def explained_variance(self, points: torch.Tensor) -> list[float]:
        """The fraction 0..1 of the variance of (N, D) points along each direction; 0 for points without variance."""
        return (self.project(points).var(0) / points.double().var(0).sum()).nan_to_num().tolist()


def draw_features(path: str, features: dict[str, tuple], is_target: torch.Tensor, metrics: dict[str, dict]) -> None:
    """Draw the features of the victim on its principal plane, those of the purified model on that plane and on its own.

    The same plane shows where the points went; the model's own would show a cluster that the other does not.

    Args:
        features: "before" and, if there is one, "after": each (N, D) of clean and (M, D) of triggered images.
        is_target: (N,) bool, the clean images of the target class.
        metrics: of the same models, for their "asr".
    """
    planes = {name: Plane.of(torch.cat(parts)) for name, parts in features.items()}
    panels = [("before", "before", "")]
    if "after" in features:
        panels += [("after", "before", ", same axes"), ("after", "after", ", its own axes")]
    with new_picture(path, max(4.6, 3.1 * len(panels)), 3.6 if len(panels) == 1 else 3.5) as figure:
        for axes, (name, base, suffix) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            clean, triggered = map(planes[base].project, features[name])
            groups = {"clean": clean[~is_target], "target": clean[is_target], "triggered": triggered}
            for group, points in groups.items():
                axes.scatter(*points.unbind(1), **MARKERS[group])
            low, high = _window(
                [planes[base].project(torch.cat(features[n])) for n, plane, _ in panels if plane == base]
            )
            axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
            asr = f"ASR {format_cell(metrics[name]['asr'])} %"
            axes.set(title=f"{name}{suffix} ({asr})" if len(features) > 1 else asr)
            fractions = planes[base].explained_variance(torch.cat(features[name]))
            owner = f" of {base}" if len(features) > 1 else ""
            for axis, number, fraction in zip((axes.xaxis, axes.yaxis), (1, 2), fractions, strict=True):
                axis.set_label_text(f"component {number}{owner} ({fraction:.0%})")
        legend = [group for group in MARKERS if group != "target" or is_target.any()]
        handles = [Line2D([], [], linestyle="", marker=MARKERS[g]["marker"], color=MARKERS[g]["color"]) for g in legend]
        figure.legend(handles, [LABELS[group] for group in legend], loc="outside upper center", ncols=3)


def _window(parts):
    """Corners of a square that holds the (N, 2) points of every panel on a plane."""
    points = torch.cat(parts)
    high, low = points.amax(0), points.amin(0)
    middle, half = (high + low) / 2, 0.54 * (high - low).max().clamp(min=1e-3)
    return (middle - half).tolist(), (middle + half).tolist()
