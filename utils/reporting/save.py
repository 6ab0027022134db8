"""The last step of both scripts: pictures, history.csv, report.html and metrics.json."""

import os
import platform

import numpy
import torch
import torchvision

from utils.files import remove_file, write_csv, write_json
from utils.reporting.html import write_page
from utils.reporting.plots import draw_run


def save_results(
    folder: str,
    title: str,
    metrics: dict,
    *,
    classes: list[str],
    sample,
    attack,
    models: dict,
    history: list[dict],
    options: dict,
    device,
    clock,
    trigger=None,
) -> dict:
    """Write the pictures and files of a run into its folder. metrics.json comes last: a run that has it is complete.

    Args:
        title: of report.html.
        metrics: what the script measured, for metrics.json: "victim" of a training, "before" and "after" of a defense.
        classes, sample, attack, models, history, trigger: see utils.reporting.plots.draw_run.
        options: every option, as used.
        clock: the Stopwatch of the run.

    Returns:
        the content of metrics.json: `metrics` and the metadata of the run.

    Raises:
        RunError: a file cannot be written or removed.
    """
    history_path, metrics_path = (os.path.join(folder, name) for name in ("history.csv", "metrics.json"))
    remove_file(metrics_path)  # of an earlier run
    by_model = {"before": metrics.get("victim") or metrics["before"]}
    if metrics.get("after"):
        by_model["after"] = metrics["after"]
    with clock("report"):
        pictures = draw_run(folder, classes, sample, attack, models, by_model, history, trigger)
    metrics = {
        **metrics,
        "dataset": options["dataset"],
        "seed": options["seed"],
        "device": str(device),
        "target_label": attack.target,
        "seconds": clock.read(),
        "config": options,
        "versions": versions(),
    }
    epochs = [row for row in history if row["epoch"] > 0]
    if epochs:
        write_csv(history_path, epochs)
    else:
        remove_file(history_path)
    write_page(os.path.join(folder, "report.html"), title, metrics, classes, pictures)
    write_json(metrics_path, metrics)
    return metrics


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }
