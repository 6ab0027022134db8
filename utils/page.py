"""report.html: a run on one page, pictures inside, that opens from disk and asks no one for anything."""

import base64
import html
import math
import os

from utils.files import write_file
from utils.plots import DPI, MODELS
from utils.report import FIGURES, figures_rows, published_rows, search_rows

# A browser that keeps to this loads nothing but the pictures inside the page, and runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MEANINGS = {
    "acc": "clean accuracy over all test images",
    "acc_published": "the same without the target class, as in the paper's table",
    "asr": "triggered test images of other classes that are predicted as the attacker wants",
    "ra": "the same images predicted as their true label",
    "floor": "the same images without the trigger, predicted as the attacker wants: an ASR there is a backdoor gone",
}
TILES = {"asr": "ASR", "ra": "RA", "acc": "ACC", "acc_published": "ACC*"}
CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #59636e; --line: #dfe3e8;
  --mark: #f0f1f3; --before: BEFORE; --after: AFTER; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1f25; --text: #e6e9ed; --soft: #9aa5b1;
  --line: #2e353d; --mark: #262c34; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
p, figcaption { color: var(--soft); margin: .5rem 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .9rem; }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .42rem .9rem; text-align: left; border-top: 1px solid var(--line); }
.pairs td { overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
th { font-weight: 600; }
thead th { color: var(--soft); white-space: nowrap; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.marked > * { background: var(--mark); font-weight: 600; }
.before::before, .after::before { content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .45em;
  border-radius: 50%; background: var(--before); }
.after::before { background: var(--after); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.25rem; }
figure { margin: 0 0 1.25rem; padding: .75rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; border-radius: .3rem; background: #fff; }
figcaption { margin: .6rem .25rem 0; font-size: .9rem; }
"""


def write_page(path: str, title: str, metrics: dict, classes: list[str], pictures: list[tuple]) -> None:
    """Write a run's report.

    Args:
        path: the page; the pictures lie in its folder.
        metrics: what metrics.json says: "dataset", "model", "device", "seed", "before" and, if there is one, "after"
            (the figures of utils.metrics), "target_label" (or None), "seconds", "config" and "versions", and where a
            trigger was inverted "trigger" (a flat dict), where the target was searched "search" (a dict a label).
        classes: the K names.
        pictures: (file name, caption) in order; None for a name where a caption says why there is no picture.

    Raises:
        RunError: the page cannot be written.
    """
    before, after, target = metrics["before"], metrics.get("after"), metrics["target_label"]
    header, rows = figures_rows(classes, before, after)
    published = published_rows(metrics["dataset"], before, after, metrics.get("defense", "mcl"))
    names = [f"{label} {name}" + " (target)" * (label == target) for label, name in enumerate(classes)]
    figures = [[*row, MEANINGS[key]] for key, row in zip(FIGURES, rows, strict=False)]
    per_class = [[name, *row[1:]] for name, row in zip(names, rows[len(FIGURES) :], strict=True)]
    body = [
        f"<h1>{_text(title)}</h1>",
        _paragraph(", ".join(f"{name} {metrics[name]}" for name in ("dataset", "model", "device", "seed"))),
        _tiles(before, after),
        _section("As the paper's table has it", _table(*published)),
        _section("Figures", _table([*header, "what it is"], figures)),
        *_search(metrics),
        _section("Pictures", *(_figure(os.path.dirname(path), *picture) for picture in pictures)),
        _section("Classes", _table(["class", *header[1:]], per_class, marked=target)),
    ]
    facts = {name: metrics.get(name) for name in ("trigger", "seconds", "versions")}
    body += ['<div class="facts">']
    body += [_section(name.capitalize(), _pairs(values)) for name, values in facts.items() if values]
    body += ["</div>", _section("Options", _pairs(metrics["config"]))]
    css = CSS.replace("BEFORE", MODELS["before"]).replace("AFTER", MODELS["after"])
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )
    write_file(path, lambda file: file.write(page.encode(errors="replace")))


def _text(value) -> str:
    """Anything as text that a page shows and does not obey; floats with two decimals, what is unknown as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return html.escape(f"{value:.2f}" if isinstance(value, float) else str(value))


def _paragraph(text):
    return f"<p>{_text(text)}</p>"


def _section(title, *parts):
    return "\n".join([f"<section>\n<h2>{_text(title)}</h2>", *parts, "</section>"])


def _tiles(before, after):
    tiles = []
    for key, label in TILES.items():
        now = before[key] if after is None else after[key]
        then = "" if after is None else f'<span class="before">{_text(before[key])} before</span>'
        tiles.append(f'<div class="tile"><span>{label}, percent</span><b>{_text(now)}</b>{then}</div>')
    return '<div class="tiles">' + "\n".join(tiles) + "</div>"


def _table(header, rows, marked=None):
    """Rows of cells under a header; the first cell names its row, and the row of index `marked` stands out."""
    kinds = [""] + ["number" * all(_is_number(row[i]) for row in rows) for i in range(1, len(header))]

    def line(cells, tags, classes, row_class=""):
        cells = zip(cells, tags, classes, strict=True)
        inside = "".join(f"<{tag}{_class(*kind.split())}>{_text(cell)}</{tag}>" for cell, tag, kind in cells)
        return f"<tr{_class(row_class)}>{inside}</tr>"

    head = line(
        header,
        ["th"] * len(header),
        [f"{kind} {name}" if name in MODELS else kind for name, kind in zip(header, kinds)],
    )
    body = [line(row, ["th"] + ["td"] * (len(row) - 1), kinds, "marked" * (i == marked)) for i, row in enumerate(rows)]
    return (
        '<div class="card"><table>\n<thead>'
        + head
        + "</thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody>\n</table></div>"
    )


def _search(metrics):
    """The table of a search for the target, if there was one; the label worked against stands out."""
    if not metrics.get("search"):
        return []
    told = "a backdoor is suspected" if any(found["flagged"] for found in metrics["search"]) else "no backdoor found"
    against = [i for i, found in enumerate(metrics["search"]) if found["label"] == metrics["worked_against"]]
    marked = next((i for i in against if metrics["search"][i]["flagged"]), against[0] if against else None)
    rows = _table(*search_rows(metrics["search"]), marked=marked)
    return [_section(f"Search for the target: {told}", rows)]


def _pairs(values):
    """A dict as a table of two columns; its numbers have any size, so that two decimals would not do."""
    rows = [[name, f"{value:.4g}" if isinstance(value, float) else value] for name, value in values.items()]
    body = "\n".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<div class="card pairs"><table>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _class(*names):
    kept = [name for name in names if name]
    return f' class="{" ".join(kept)}"' if kept else ""


def _is_number(cell):
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _figure(folder, name, caption):
    if name is None:
        return _paragraph(caption)
    with open(os.path.join(folder, name), "rb") as file:
        data = file.read()
    width = int.from_bytes(data[16:20]) * 96 // DPI  # of PNG's header; letters come out equally large in every picture
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{_text(name)}" '
        f'width="{width}"><figcaption><b>{_text(name)}</b> {_text(caption)}</figcaption></figure>'
    )
