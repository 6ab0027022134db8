"""report.html: a run on one page that opens from disk, holds its pictures and loads nothing from elsewhere."""

import base64
import os

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.files import write_text
from utils.reporting import tables
from utils.reporting.picture import DPI, MODELS, Picture

# A browser that follows it loads nothing but the pictures inside the page, and runs no script.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_page(path: str, title: str, metrics: dict, classes: list[str], pictures: list[tuple]) -> None:
    """Write a run's report; RunError if it cannot be written.

    Args:
        metrics: the content of metrics.json, as utils.reporting.save.save_results builds it.
        classes: the K names.
        pictures: utils.reporting.picture.Picture tuples, in order; their files are in the folder of `path`.
    """
    models = tables.models_of(metrics)
    final = models.get("after", models["before"])
    names = [f"{name} (target)" if label == metrics["target_label"] else name for label, name in enumerate(classes)]
    header, rows = tables.metrics_rows(names, **models)
    is_backdoored = metrics.get("purified") is False or tables.is_backdoored(final)
    scores = metrics.get("search") or []
    defended = [i for i, score in enumerate(scores) if score["label"] == metrics["worked_against"]]
    loader = FileSystemLoader(os.path.dirname(__file__))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = lambda value: tables.format_cell(value, "–")
    page = environment.get_template("report.html.jinja").render(
        title=title,
        policy=POLICY,
        colours=MODELS,
        labels=tables.METRICS,
        metrics=metrics,
        models=models,
        final=final,
        verdict=tables.verdict(metrics),
        state={True: "backdoored", False: "clean", None: "unknown"}[is_backdoored],
        published=tables.published_rows(metrics["dataset"], **models, defense=metrics.get("defense", "mcl")),
        header=header,
        metrics_rows=rows[: len(tables.METRICS)],
        class_rows=rows[len(tables.METRICS) :],
        search=tables.search_rows(scores),
        marked_score=max(defended, key=lambda i: scores[i]["flagged"], default=None),  # a flagged row first
        retuned=metrics.get("retuned") and tables.retuned_rows(metrics["retuned"], metrics["retuned_reference"]),
        pictures=[_embed(os.path.dirname(path), picture) for picture in pictures],
    )
    write_text(path, page)


def _embed(folder, picture):
    picture = Picture(*picture)._asdict()
    if picture["name"]:
        with open(os.path.join(folder, picture["name"]), "rb") as file:
            data = file.read()
        # The width in the PNG's header, in CSS pixels: letters are equally large in every picture.
        picture |= {"width": int.from_bytes(data[16:20]) * 96 // DPI, "data": base64.b64encode(data).decode()}
    return picture
