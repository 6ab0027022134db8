"""The last step of both scripts: pictures, history.csv, report.html and metrics.json."""

import os
import platform

import numpy
import torch
import torchvision

from utils.files import remove_file, write_csv, write_json
from utils.reporting.html import write_page
from utils.reporting.plots import draw_retuned, draw_run
from utils.reporting.tables import models_of


def save_results(folder: str, title: str, metrics: dict, *, history, options, attack, device, clock, **run) -> dict:
    """Write the pictures and files of a run into its folder, metrics.json last; RunError if that fails.

    Returns the content of metrics.json: `metrics` and the metadata of the run.

    Args:
        title: of report.html.
        metrics: what the script measured, for metrics.json: "victim" of a training, "before" and "after" of a defense.
        history, attack, run: arguments of utils.reporting.plots.draw_run.
        options, clock: every option as used, and the Stopwatch of the run.
    """
    names = "history.csv", "metrics.json", "retuned.png"
    history_path, metrics_path, retuned_path = (os.path.join(folder, name) for name in names)
    remove_file(metrics_path)  # of an earlier run
    with clock("report"):
        pictures = draw_run(folder, attack=attack, metrics=models_of(metrics), history=history, **run)
        if metrics.get("retuned"):
            pictures.append(draw_retuned(retuned_path, metrics["retuned"], metrics["retuned_reference"]))
        else:
            remove_file(retuned_path)
    metrics = metrics | {"dataset": options["dataset"], "seed": options["seed"], "device": str(device)}
    metrics |= {"target_label": attack.target, "seconds": clock.read(), "config": options, "versions": versions()}
    epochs = [row for row in history if row["epoch"] > 0]
    if epochs:
        write_csv(history_path, epochs)
    else:
        remove_file(history_path)
    write_page(os.path.join(folder, "report.html"), title, metrics, run["classes"], pictures)
    write_json(metrics_path, metrics)
    return metrics


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the results depend on."""
    libraries = {library.__name__: str(library.__version__) for library in (torch, torchvision, numpy)}
    return {"python": platform.python_version(), **libraries}
