"""The pictures of a run, drawn with matplotlib and without a display.

A colour means one thing in all of them: blues are models, light before and dark after; grey, black and vermillion are
images: clean ones, clean ones of the target class, triggered ones. Within either group they differ in lightness as well
as in hue, for colour-blind readers and for a print in black and white.
"""

import contextlib
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.files import remove_file, write_file

MODELS = {"before": "#56B4E9", "after": "#0072B2"}
CLEAN, TARGET, TRIGGERED = "#A0A0A0", "#000000", "#D55E00"
CURVES = {  # figure -> label, the colour of the images it is measured on, marker and line
    "acc": ("ACC", CLEAN, "o-"),
    "acc_published": ("ACC*", CLEAN, "s--"),
    "ra": ("RA", TRIGGERED, "^--"),
    "asr": ("ASR", TRIGGERED, "o-"),
}
CAPTIONS = {
    "trigger.png": "The trigger, pixel by pixel: what the attack does to this image.",
    "features.png": "g(x), the pooled features before the last layer, of test images, scaled to length 1 since MCL's "
    "loss sees their directions only, on two principal components; in brackets, the share of a panel's variance along "
    "them. Triggered images carry the true trigger.",
    "curves.png": "By epoch, on the images watched during training, which are not the test images.",
    "per_class.png": "Accuracy on the clean test images of each class.",
}
COMPARED = {  # what to add where a purified model stands beside the victim
    "trigger.png": " The inverted one is the pattern that was found.",
    "features.png": " The images are the same in every panel. The same axes show where the points went; a model's own "
    "axes would show a cluster that those do not see.",
}
MARKS = {  # of an image on the map of features
    "clean": {"color": CLEAN, "marker": "o", "s": 8, "alpha": 0.7, "linewidths": 0},
    "target": {"color": TARGET, "marker": "s", "s": 12, "alpha": 0.8, "linewidths": 0},
    "triggered": {"color": TRIGGERED, "marker": "^", "s": 10, "alpha": 0.5, "linewidths": 0},
}
SAMPLE = 700  # twice as many points a panel, with the triggered ones: more would hide each other
DPI = 150
MOST_CLASSES = 50  # rows that can be read on one picture
NAME_LENGTH = 28
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a class name is no formula, whatever dollar signs are in it
}


def draw_run(folder, classes, sample, attack, models, figures, history, trigger=None) -> list[tuple]:
    """Draw all that applies to a run; curves that do not are not left there by an earlier run either.

    Args:
        classes: the K names.
        sample: images to look at, with .clean and .triggered batches of (images (B, 3, H, W) in [0, 1], labels) on
            the models' device and the (N,) .labels of the former; triggered are those where `attack.counts(labels)`.
        attack: with counts(labels), and target, the single label wanted, or None.
        models: {"before": model}, and "after" if there is one, with features((B, 3, H, W)) -> (B, D).
        figures: what utils.metrics.evaluate says of each of them, under the same names.
        history: rows of a training, an epoch each (0: its start), some with what was watched; none where nothing was
            trained.
        trigger: the inverted one that led to "after", as `draw_trigger` takes it, or None.

    Returns:
        (file name, caption) of each picture, in the order to show them; None and the reason where one is missed.

    Raises:
        RunError: a file cannot be written or removed.
    """
    target = attack.target
    clean, triggered = (torch.cat([images.cpu() for images, _ in part]) for part in (sample.clean, sample.triggered))
    of_target = torch.zeros_like(sample.labels, dtype=torch.bool) if target is None else sample.labels == target
    watched = [row for row in history if "asr" in row]
    features = {
        name: [features_of(model, part) for part in (sample.clean, sample.triggered)] for name, model in models.items()
    }
    first = attack.counts(sample.labels).nonzero()[0, 0]
    draw = {
        "trigger.png": lambda path: draw_trigger(path, clean[first], triggered[0], trigger),
        "features.png": lambda path: draw_features(path, features, of_target, figures),
        "curves.png": lambda path: draw_curves(path, watched),
        "per_class.png": lambda path: draw_per_class(path, classes, figures, target),
    }
    missed = []
    if not any(row["epoch"] > 0 for row in watched):
        del draw["curves.png"]
        remove_file(os.path.join(folder, "curves.png"))
        missed = [(None, "There are no curves by epoch: --print_freq had nothing watched.")] if history else []
    for name, drawn in draw.items():
        drawn(os.path.join(folder, name))
    compared = COMPARED if "after" in models else {}
    return [(name, CAPTIONS[name] + compared.get(name, "")) for name in draw] + missed


@contextlib.contextmanager
def new_picture(path, width, height):
    """A figure of so many inches, in this module's style whatever matplotlibrc says, written to `path` in the end."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
        yield figure
        write_file(path, lambda file: figure.savefig(file, format="png"))


def draw_trigger(path: str, clean: torch.Tensor, triggered: torch.Tensor, inverted=None) -> None:
    """The true trigger on one image and the inverted one beside it, enlarged.

    Args:
        clean, triggered: (3, H, W) in [0, 1], an image without and with the true trigger.
        inverted: with stamp and change, (3, H, W) -> (3, H, W), and describe(), or None.
    """
    rows = [[("clean image", clean), ("with the true trigger", triggered), change("true trigger", triggered - clean)]]
    if inverted is not None:
        stamped = inverted.stamp(clean)
        rows[0] = [("with the true trigger", triggered), ("with the inverted one", stamped), ("clean image", clean)]
        rows += [
            [
                change("true trigger", triggered - clean),
                change(f"inverted: {inverted.describe()}", inverted.change(clean)),
                change("true minus inverted", triggered - stamped),
            ]
        ]
    with new_picture(path, 7, 2.5 * len(rows) + 0.25) as figure:
        for panels, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
            for axes, (title, pixels) in zip(panels, row, strict=True):
                axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
                axes.set(title=title, xticks=[], yticks=[])
                axes.grid(False)
                axes.spines[:].set_visible(True)
        figure.supxlabel("Changes: mid-grey is none, brighter is added, darker is taken away.", fontsize=8)


def change(title: str, pixels: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A signed change in [-1, 1] as a picture in [0, 1], grey where it is 0, a faint one so many times as strong.

    Returns:
        the title, with the factor if there is one, and the picture, of the shape of `pixels`.
    """
    peak = pixels.abs().max().item()
    factor = max(1, int(1 / peak)) if peak else 1
    return title + f", x{factor}" * (factor > 1), (0.5 + factor * pixels / 2).clamp(0, 1)


def draw_curves(path: str, rows: list[dict]) -> None:
    """ACC, ACC*, RA and ASR by epoch; where a row of epoch 0 says where it began, the epochs after it closer as well.

    Args:
        rows: an epoch each: "epoch" and the figures of CURVES in percent.
    """
    later = [row for row in rows if row["epoch"] > 0]
    closer = 1 < len(later) < len(rows)
    with new_picture(path, 7 if closer else 5, 3.4) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[3, 2])
        axes = figure.add_subplot(grid[:, 0] if closer else grid[:, :])
        _draw_lines(axes, rows, CURVES)
        axes.set(ylabel="percent", ylim=(-3, 103), xlabel="epoch, 0: the victim" if len(later) < len(rows) else "epoch")
        figure.legend(loc="outside upper center", ncols=len(CURVES))
        if closer:
            upper, lower = (figure.add_subplot(grid[i, 1]) for i in range(2))
            _draw_lines(upper, later, ("acc", "acc_published", "ra"))
            _draw_lines(lower, later, ("asr",))
            upper.set(title="the same, closer", ylabel="percent")
            lower.set(xlabel="epoch", ylabel="percent")
            figure.align_ylabels([upper, lower])


def _draw_lines(axes, rows, names):
    for name in names:
        label, colour, line = CURVES[name]
        x, y = [row["epoch"] for row in rows], [row[name] for row in rows]
        axes.plot(x, y, line, color=colour, label=label, markersize=4.5, clip_on=False)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def draw_per_class(path: str, classes: list[str], figures: dict[str, dict], target: int | None) -> None:
    """A row a class, a dot a model; of very many classes, the target and those that changed most.

    Args:
        classes: the names, at most K.
        figures: "before", and "after" if there is one, each with "acc" and "per_class", K percentages (nan: no image).
        target: the label to mark, or None.
    """
    columns = torch.tensor([figure["per_class"] for figure in figures.values()])[:, : len(classes)]
    shown = classes_to_show(columns, target)
    columns = columns[:, shown]
    with new_picture(path, 6, 1.2 + 0.22 * len(shown)) as figure:
        axes, places = figure.add_subplot(), range(len(shown))
        if target in shown:
            axes.axhspan(shown.index(target) - 0.5, shown.index(target) + 0.5, color="#F0F0F0", zorder=0)
        axes.hlines(places, columns.amin(0), columns.amax(0), color="#BBBBBB", zorder=1)
        for (name, measured), accuracies in zip(figures.items(), columns, strict=True):
            one, all_of_them = (name, f"all classes {name}") if len(figures) > 1 else ("one class", "all classes")
            size = 70 if name == "before" else 24  # both are seen where they fall together
            axes.scatter(accuracies, places, s=size, color=MODELS[name], zorder=2, label=one, clip_on=False)
            axes.axvline(measured["acc"], color=MODELS[name], linestyle=":", label=all_of_them)
        axes.set_yticks(places, [class_name(classes[label]) + "  (target)" * (label == target) for label in shown])
        for label, text in zip(shown, axes.get_yticklabels(), strict=True):
            text.set(color=TARGET, fontweight="bold" if label == target else "normal")
        axes.set(xlabel="accuracy, percent", ylim=(len(shown) - 0.4, -0.6))
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, right - 10), right)  # a tenth of a point is not to look like a gulf
        if len(shown) < len(classes):
            chosen = "changed most" if len(figures) > 1 else "are lowest"
            axes.set(title=f"{len(shown)} of {len(classes)} classes: the target and those that {chosen}")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=len(figures) * 2)


def classes_to_show(columns: torch.Tensor, target: int | None) -> list[int]:
    """All K labels in order, or MOST_CLASSES of them: the target, and those whose accuracy changed most.

    Args:
        columns: (1 or 2, K) percentages; of one model, the classes lowest in accuracy come first.
    """
    weight = (columns[-1] - columns[0]).abs() if len(columns) > 1 else -columns[0]
    weight = weight.nan_to_num(nan=-1e3)
    if target is not None and target < len(weight):
        weight[target] = float("inf")
    return sorted(weight.argsort(descending=True, stable=True)[:MOST_CLASSES].tolist())


def class_name(name: str) -> str:
    """A name as one short line: a folder of a stranger's can be called anything."""
    line = "".join(letter if letter.isprintable() else "?" for letter in name)
    return line if len(line) <= NAME_LENGTH else line[: NAME_LENGTH - 3] + "..."


def features_of(model, batches) -> torch.Tensor:
    """g(x) of every image, scaled to length 1, (N, D) on the CPU, in the order of `batches`.

    What is not finite, as a strange model's features may be, counts as 0.
    """
    model.eval()
    with torch.inference_mode():
        features = torch.cat([model.features(images).cpu() for images, _ in batches])
        return F.normalize(features.nan_to_num(0, 0, 0))


@dataclass
class Plane:
    """Two directions in a space of features: mean (D,), directions (D, 2) of length 1, at right angles."""

    mean: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, points: torch.Tensor) -> "Plane":
        """The plane in which (N, D) points vary most (their principal components), D >= 2. Each direction has its
        largest entry above 0, so that the same points give the same map everywhere."""
        points = points.double()
        centred = points - points.mean(0)
        _, directions = torch.linalg.eigh(centred.T @ centred)  # in the order of rising variance
        directions = directions[:, [-1, -2]]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return cls(points.mean(0), directions * largest.sign())

    def map(self, points: torch.Tensor) -> torch.Tensor:
        """(N, D) points -> (N, 2) coordinates."""
        return (points.double() - self.mean) @ self.directions

    def shares(self, points: torch.Tensor) -> list[float]:
        """How much of the variance of (N, D) points lies along each direction, 0..1; 0 where there is none."""
        return (self.map(points).var(0) / points.double().var(0).sum()).nan_to_num().tolist()


def draw_features(path: str, features: dict[str, tuple], of_target: torch.Tensor, figures: dict[str, dict]) -> None:
    """A map of features: before on its principal plane, after on the same plane and on its own.

    The same plane shows where the points went, and its own would show a cluster that the other does not see.

    Args:
        features: "before", and "after" if there is one, each (N, D) of clean images and (M, D) of triggered ones.
        of_target: (N,) bool, which of the clean ones are of the target class.
        figures: of the same models, for their "asr".
    """
    planes = {name: Plane.of(torch.cat(parts)) for name, parts in features.items()}
    panels = [("before", "before", "")]
    if "after" in features:
        panels += [("after", "before", ", same axes"), ("after", "after", ", its own axes")]
    with new_picture(path, max(4.6, 3.1 * len(panels)), 3.6) as figure:
        for axes, (name, base, told) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            clean, triggered = map(planes[base].map, features[name])
            for points, mark in ((clean[~of_target], "clean"), (clean[of_target], "target"), (triggered, "triggered")):
                axes.scatter(*points.unbind(1), **MARKS[mark])
            # One square window on a plane, wide enough for every panel on it.
            here = torch.cat([planes[base].map(torch.cat(features[n])) for n, plane, _ in panels if plane == base])
            middle, half = (here.amax(0) + here.amin(0)) / 2, 0.54 * (here.amax(0) - here.amin(0)).max().clamp(min=1e-3)
            (left, bottom), (right, top) = (middle - half).tolist(), (middle + half).tolist()
            axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
            asr = f"ASR {figures[name]['asr']:.2f}%"
            axes.set(title=f"{name}{told} ({asr})" if len(features) > 1 else asr)
            shares = planes[base].shares(torch.cat(features[name]))
            for axis, number, share in zip((axes.xaxis, axes.yaxis), (1, 2), shares, strict=True):
                whose = f" of {base}" if len(features) > 1 else ""
                axis.set_label_text(f"component {number}{whose} ({share:.0%})")
        shown = [mark for mark in MARKS if mark != "target" or of_target.any()]
        handles = [Line2D([], [], linestyle="", marker=MARKS[m]["marker"], color=MARKS[m]["color"]) for m in shown]
        labels = {"clean": "clean, other classes", "target": "clean, target class", "triggered": "triggered"}
        figure.legend(handles, [labels[mark] for mark in shown], loc="outside upper center", ncols=3)
