"""The last step of both scripts: pictures, history.csv, report.html and metrics.json."""

import os
import platform
from functools import partial

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
    path = partial(os.path.join, folder)
    for name in ("metrics.json", "history.csv", "retuned.png"):  # of an earlier run
        remove_file(path(name))
    with clock("report"):
        pictures = draw_run(folder, attack=attack, metrics=models_of(metrics), history=history, **run)
        if metrics.get("retuned"):
            pictures.append(draw_retuned(path("retuned.png"), metrics["retuned"], metrics["retuned_reference"]))
    metrics = metrics | {"dataset": options["dataset"], "seed": options["seed"], "device": str(device)}
    metrics |= {"target_label": attack.target, "seconds": clock.read(), "config": options, "versions": versions()}
    epochs = [row for row in history if row["epoch"] > 0]
    if epochs:
        write_csv(path("history.csv"), epochs)
    write_page(path("report.html"), title, metrics, run["classes"], pictures)
    write_json(path("metrics.json"), metrics)
    return metrics


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the results depend on."""
    libraries = {library.__name__: str(library.__version__) for library in (torch, torchvision, numpy)}
    return {"python": platform.python_version(), **libraries}
