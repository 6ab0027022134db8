"""The pictures of a run: trigger.png, curves.png and per_class.png; features.png is drawn by feature_map.py."""

import os
from functools import partial

import torch

from utils.files import remove_file
from utils.reporting.feature_map import draw_features, features_of
from utils.reporting.picture import CLEAN, MODELS, TRIGGERED, Picture, missing_letters, new_picture
from utils.reporting.tables import METRICS, format_cell, is_missing

SAMPLE_SIZE = 700  # images on the feature map, and as many triggered ones; more would hide each other
MAX_CLASSES = 50  # rows that are readable on one picture
NAME_LENGTH = 28
LINES = {  # metric -> the colour of the images that it is measured on, marker and line
    "acc": (CLEAN, "o-"), "acc_published": (CLEAN, "s--"), "ra": (TRIGGERED, "^--"), "asr": (TRIGGERED, "o-"),
}  # fmt: skip


def draw_run(folder, classes, sample, attack, models, metrics, history, trigger=None) -> list[Picture]:
    """Draw every picture that applies to a run, and remove those of an earlier run. RunError if that fails.

    Returns the pictures in the order to show them; for missing curves, a caption that says why.

    Args:
        classes: the K names.
        sample: test images: .clean and .triggered batches of (images (B, 3, H, W) in [0, 1], labels) on the models'
            device, and the (N,) .labels of the former; the triggered images are those with `attack.attackable(labels)`.
        attack: with attackable(labels), and target: the target label, or None if there is no single one.
        models: {"before": model} and, if there is one, "after"; with features((B, 3, H, W)) -> (B, D).
        metrics: of each of them, as utils.metrics.evaluate returns them, under the same names.
        history: a row for each epoch of the training (0: before it), some with metrics; [] if nothing was trained.
        trigger: the inverted trigger that led to "after", as `draw_trigger` takes it, or None.
    """
    pictures, path = [], partial(os.path.join, folder)
    for name in ("trigger.png", "features.png", "curves.png"):
        remove_file(path(name))
    attackable, parts = attack.attackable(sample.labels), (sample.clean, sample.triggered)
    if attackable.any():
        clean, triggered = (torch.cat([images.cpu() for images, _ in part]) for part in parts)
        features = {name: [features_of(model, part) for part in parts] for name, model in models.items()}
        is_target = sample.labels == (-1 if attack.target is None else attack.target)
        pictures.append(draw_trigger(path("trigger.png"), clean[attackable], triggered, trigger))
        pictures.append(draw_features(path("features.png"), features, is_target, metrics))
    elif trigger is not None:  # the attack is unknown
        pictures.append(draw_trigger(path("trigger.png"), next(iter(sample.clean))[0].cpu(), None, trigger))
    measured = [row for row in history if "asr" in row]
    has_curves = any(row["epoch"] > 0 for row in measured)
    if has_curves:
        pictures.append(draw_curves(path("curves.png"), measured))
    pictures.append(draw_per_class(path("per_class.png"), classes, metrics, attack.target))
    if history and not has_curves:
        pictures.append(Picture(None, "There are no curves: by --print_freq no epoch was measured."))
    return pictures


def draw_trigger(path: str, clean: torch.Tensor, triggered: torch.Tensor | None, inverted=None) -> Picture:
    """Draw the true trigger on the first image and, if there is one, the inverted trigger beside it, enlarged.

    Args:
        clean, triggered: (N, 3, H, W) in [0, 1], images without and with the true trigger; None if it is unknown.
        inverted: with apply and change, (3, H, W) -> (3, H, W), and describe(), or None.
    """
    panels = _trigger_panels(clean, triggered, inverted)
    with new_picture(path, 7, 2.5 * len(panels) / 3 + 0.25) as figure:
        for axes, (title, pixels) in zip(figure.subplots(len(panels) // 3, 3).flat, panels, strict=True):
            axes.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(True)
        figure.supxlabel("Mid-grey: unchanged. In changes, brighter is added and darker is removed.", fontsize=8)
    caption = "The trigger on a test image, pixel by pixel."
    triggers = [] if triggered is None else ["the true trigger"]
    if inverted is not None:
        caption += " The inverted trigger is the pattern that the defense found."
        triggers += [f"the inverted one ({inverted.describe()})"]
    alt = f"An enlarged test image, clean and with {' and '.join(triggers)}, and what is changed in it."
    return Picture(os.path.basename(path), caption, alt)


def _trigger_panels(clean, triggered, inverted):
    """Titles and pictures of draw_trigger, three in a row."""
    if triggered is None:
        image = clean[0]
        panels = [("clean image", image), ("with the inverted trigger", inverted.apply(image))]
        return [*panels, change(f"inverted: {inverted.describe()}", inverted.change(image))]
    patch, clean, triggered = stamped_patch(clean, triggered), clean[0], triggered[0]
    is_patch = patch is not None
    true_trigger = ("true trigger, as stamped", patch) if is_patch else change("true trigger", triggered - clean)
    if inverted is None:
        return [("clean image", clean), ("with the true trigger", triggered), true_trigger]
    stamped, grey = inverted.apply(clean), torch.full_like(clean, 0.5)
    # A patch is compared on grey, since a difference on the image has the image's colours.
    rest = 2 * (patch - inverted.apply(grey)) if is_patch else triggered - stamped
    panels = [("with the true trigger", triggered), ("with the inverted trigger", stamped), ("clean image", clean)]
    panels += [true_trigger, change(f"inverted: {inverted.describe()}", inverted.change(clean))]
    return [*panels, change("true minus inverted", rest)]


def stamped_patch(clean: torch.Tensor, triggered: torch.Tensor) -> torch.Tensor | None:
    """A trigger that overwrites pixels of (N, 3, H, W) images: its own values on mid-grey, (3, H, W).

    None if the changed pixels are not the same on all images (blended, warped), or if one image cannot tell.
    """
    changed = (triggered != clean).any(1).any(0)
    values = triggered[:, :, changed]
    if len(clean) < 2 or not changed.any() or (values != values[0]).any():
        return None
    return torch.where(changed, triggered[0], 0.5)


def change(title: str, pixels: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A signed change in [-1, 1] around mid-grey, as a picture in [0, 1]; the title of an amplified one says so."""
    peak = pixels.abs().max().item()
    factor = max(1, int(1 / peak)) if peak else 1
    return title if factor == 1 else f"{title}, x{factor}", (0.5 + factor * pixels / 2).clamp(0, 1)


def draw_curves(path: str, rows: list[dict]) -> Picture:
    """Draw the metrics of LINES by epoch; epoch 0 is the victim."""
    epochs = [row["epoch"] for row in rows]
    with new_picture(path, 5, 3.4) as figure:
        axes = figure.add_subplot()
        for key, (colour, line) in LINES.items():
            values = [row[key] for row in rows]
            axes.plot(epochs, values, line, color=colour, label=METRICS[key][0], markersize=4.5, clip_on=False)
        axes.set(ylim=(-3, 103), ylabel="percent", xlabel="epoch (0: the victim)" if epochs[0] == 0 else "epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        figure.legend(loc="outside upper center", ncols=len(LINES))
    ends = rows[:1] + rows[-1:]
    lines = [f"{METRICS[key][0]} from {' to '.join(format_cell(row[key]) for row in ends)} percent" for key in LINES]
    caption = "Metrics by epoch, on a monitor set of training images; the test images are not used."
    return Picture(os.path.basename(path), caption, f"Line plot, first to last epoch: {', '.join(lines)}.")


def draw_per_class(path: str, classes: list[str], metrics: dict[str, dict], target: int | None) -> Picture:
    """Draw a row for each class and a dot for each model; of very many classes, the target and those that changed most.

    Args:
        metrics: "before" and, if there is one, "after", each with "acc" and "per_class": K percentages (nan: no image).
        classes, target: at most K names, and the label to highlight or None.
    """
    accuracies = torch.tensor([model["per_class"] for model in metrics.values()])[:, : len(classes)]
    labels = classes_to_show(accuracies, target)
    accuracies = accuracies[:, labels]
    names = class_names({label: classes[label] for label in labels})
    with new_picture(path, 6, 1.2 + 0.22 * len(labels)) as figure:
        axes, positions = figure.add_subplot(), range(len(labels))
        if target in labels:
            axes.axhspan(labels.index(target) - 0.5, labels.index(target) + 0.5, color="#F0F0F0", zorder=0)
        axes.hlines(positions, accuracies.amin(0), accuracies.amax(0), color="#BBBBBB", zorder=1)
        for (model, measured), values in zip(metrics.items(), accuracies, strict=True):
            dots, line = (model, f"all classes {model}") if len(metrics) > 1 else ("one class", "all classes")
            size = 70 if model == "before" else 24  # both are visible where they coincide
            axes.scatter(values, positions, s=size, color=MODELS[model], zorder=2, label=dots, clip_on=False)
            axes.axvline(measured["acc"], color=MODELS[model], linestyle=":", label=line)
        texts = [f"{names[label]}  (target)" if label == target else names[label] for label in labels]
        axes.set_yticks(positions, texts)
        if target in labels:
            axes.get_yticklabels()[labels.index(target)].set_fontweight("bold")
        left, right = axes.get_xlim()
        left = min(left, right - 10)  # a tenth of a point must not look like a gulf
        axes.set(xlabel="accuracy, percent", xlim=(left, right), ylim=(len(labels) - 0.4, -0.6))
        if len(labels) < len(classes):
            rest = "that changed most" if len(metrics) > 1 else "of lowest accuracy"
            those = "the target and those" if target in labels else "those"
            axes.set(title=f"{len(labels)} of {len(classes)} classes: {those} {rest}")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside upper center", ncols=len(metrics) * 2)
    ranges = []
    for name, model in metrics.items():
        values = [value for value in model["per_class"] if not is_missing(value)]
        when = f" {name}" if len(metrics) > 1 else ""
        ranges.append(f"{format_cell(min(values))} to {format_cell(max(values))} percent{when}")
    alt = f"Dot plot of the accuracy of each class: {', '.join(ranges)}."
    return Picture(os.path.basename(path), "Accuracy on the clean test images of each class.", alt)


def draw_retuned(path: str, retuned: dict, reference: dict | None) -> Picture:
    """Draw ASR after the re-tuning attack against the number of poisoned images, a clean model's beside it."""
    with new_picture(path, 5, 3.2) as figure:
        axes = figure.add_subplot()
        for rows, label, style in ((retuned, "this model", "o-"), (reference, "clean model", "s--")):
            if rows:
                values, errors = [row["asr"] for row in rows.values()], [row["sd"]["asr"] for row in rows.values()]
                colour = TRIGGERED if rows is retuned else CLEAN
                axes.errorbar(list(rows), values, errors, fmt=style, color=colour, capsize=3, label=label)
        axes.set(xlabel="poisoned images", ylabel="ASR after re-tuning, percent", ylim=(-3, 103))
        figure.legend(loc="outside upper center", ncols=2)
    asr = ", ".join(f"{format_cell(row['asr'])} percent with {count}" for count, row in retuned.items())
    caption = "ASR after fine-tuning on clean and a few poisoned images, mean and standard deviation over the draws."
    return Picture(os.path.basename(path), caption, f"Line plot of the ASR by number of poisoned images: {asr}.")


def classes_to_show(accuracies: torch.Tensor, target: int | None) -> list[int]:
    """At most MAX_CLASSES labels of (1 or 2, K) accuracies: the target and those that changed most, or are lowest."""
    weight = (accuracies[-1] - accuracies[0]).abs() if len(accuracies) > 1 else -accuracies[0]
    weight = weight.nan_to_num(nan=-1e3)
    if target is not None and target < len(weight):
        weight[target] = float("inf")
    return sorted(weight.argsort(descending=True, stable=True)[:MAX_CLASSES].tolist())


def class_names(classes: dict[int, str]) -> dict[int, str]:
    """Short names by label, "class <label>" for one that is blank or has letters that the font lacks."""
    lines = {label: "".join(x if x.isprintable() else "?" for x in name) for label, name in classes.items()}
    for label, line in lines.items():
        if missing_letters(line) or not line.strip():
            lines[label] = f"class {label}"
        elif len(line) > NAME_LENGTH:
            lines[label] = line[: NAME_LENGTH - 3] + "..."
    return lines
