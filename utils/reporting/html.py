"""report.html: a run on one page that opens from disk, holds its pictures and loads nothing from elsewhere."""

import base64
import os

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.files import write_file
from utils.reporting.picture import DPI, MODELS
from utils.reporting.tables import (
    METRICS,
    format_cell,
    is_backdoored,
    metrics_rows,
    published_rows,
    search_rows,
    verdict,
)

TEMPLATE = "report.html.jinja"
# A browser that follows it loads nothing but the pictures inside the page, and runs no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TILES = ("asr", "ra", "acc", "acc_published")


def write_page(path: str, title: str, metrics: dict, classes: list[str], pictures: list[tuple]) -> None:
    """Write a run's report.

    Args:
        path: of the page; the pictures are in its folder.
        metrics: the content of metrics.json, as utils.reporting.save.save_results builds it.
        classes: the K names.
        pictures: utils.reporting.picture.Picture tuples, in order.

    Raises:
        RunError: the page cannot be written.
    """
    before, after = metrics.get("victim") or metrics["before"], metrics.get("after")
    names = [f"{name} (target)" if label == metrics["target_label"] else name for label, name in enumerate(classes)]
    header, rows = metrics_rows(names, before, after)
    environment = Environment(
        loader=FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": lambda value: format_cell(value, "–"), "short": _short}
    page = environment.get_template(TEMPLATE).render(
        title=title,
        policy=POLICY,
        colours=MODELS,
        verdict=verdict(metrics),
        state={True: "backdoored", False: "clean", None: "unknown"}[is_backdoored(after or before)],
        metrics=metrics,
        tiles=[(METRICS[key][0], before[key], after and after[key]) for key in TILES],
        published=published_rows(metrics["dataset"], before, after, metrics.get("defense", "mcl")),
        header=header,
        metrics_rows=rows[: len(METRICS)],
        meanings=[meaning for _, meaning in METRICS.values()],
        class_rows=rows[len(METRICS) :],
        search=search_rows(metrics["search"]) if metrics.get("search") else None,
        marked_score=_marked_score(metrics),
        pictures=[_picture(os.path.dirname(path), *picture) for picture in pictures],
    )
    write_file(path, lambda file: file.write(page.encode(errors="replace")))


def _short(value):
    """Options and times are of any size: four significant digits instead of two decimals."""
    return f"{value:.4g}" if isinstance(value, float) else format_cell(value, "–")


def _marked_score(metrics):
    """The row of the target search to highlight: the label that the defense worked against, a flagged row first."""
    scores = metrics.get("search") or []
    rows = [i for i, score in enumerate(scores) if score["label"] == metrics["worked_against"]]
    return next((i for i in rows if scores[i]["flagged"]), rows[0] if rows else None)


def _picture(folder, name, caption, alt=""):
    if name is None:
        return {"name": None, "caption": caption}
    with open(os.path.join(folder, name), "rb") as file:
        data = file.read()
    # The width in the PNG's header, in CSS pixels: letters are equally large in every picture.
    width = int.from_bytes(data[16:20]) * 96 // DPI
    return {"name": name, "caption": caption, "alt": alt, "width": width, "data": base64.b64encode(data).decode()}
