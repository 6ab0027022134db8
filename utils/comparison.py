"""Several defenses on one victim or several: the table, with the best in it marked, as text, CSV, Markdown, picture."""

import os

from utils.files import write_csv, write_text
from utils.plots import CLEAN, MODELS, TRIGGERED, new_picture
from utils.report import table

# figure -> its name in tables, and which way is better.
COLUMNS = {"acc": ("ACC", max), "acc_published": ("ACC*", max), "asr": ("ASR", min), "ra": ("RA", max)}
COLUMNS |= {"seconds": ("seconds", min)}
BARS = {"acc": CLEAN, "asr": TRIGGERED, "ra": MODELS["after"]}
WORK = ("finetune", "detect", "inversion", "purify")  # parts of a run that are the defense's own
NOTE = "best of its column; a defense that found nothing to do is not counted"


def comparison_row(victim: str, defense: str, metrics: dict) -> dict:
    """One run in one row of comparison.csv, from its metrics.json.

    Figures are the purified model's, under "before_..." the victim's. Where a defense found no backdoor and left the
    victim as it is, "changed" is False and the figures are the victim's.
    """
    before, after = metrics["before"], metrics["after"]
    row = {"victim": victim, "defense": defense, "changed": after is not None}
    row |= {name: (after or before)[name] for name in ("acc", "acc_published", "asr", "ra", "floor")}
    row["seconds"] = sum(metrics["seconds"].get(part, 0.0) for part in WORK)
    row |= {"seed": metrics["seed"], "detected_label": metrics["detected_label"]}
    return row | {f"before_{name}": before[name] for name in ("acc", "acc_published", "asr", "ra", "floor")}


def comparison_tables(rows: list[dict], mark) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of each table of a comparison.

    Of one victim there is one table, a row a defense; of several one for each figure, a row a victim. What each row of
    `rows` says of its victim comes first, as what "none" leaves. `mark` is called on the text of a best cell.
    """
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    if len(victims) == 1:
        (victim,) = victims
        best = {key: _best(rows, key) for key in COLUMNS}
        cells = [["none", *(f"{rows[0][f'before_{key}']:.2f}" for key in COLUMNS if key != "seconds"), ""]]
        for row in rows:
            figures = [_cell(row, key, best[key], mark) for key in COLUMNS]
            cells.append([row["defense"] + " (found nothing)" * (not row["changed"]), *figures])
        return [(victim, ["defense", *(name for name, _ in COLUMNS.values())], cells)]
    defenses, tables = [name for name in dict.fromkeys(row["defense"] for row in rows) if name != "none"], []
    for key, (name, _) in COLUMNS.items():
        if key == "seconds" and not defenses:
            continue
        cells = []
        for victim in victims:
            own = {row["defense"]: row for row in rows if row["victim"] == victim}
            best, first = _best(list(own.values()), key), next(iter(own.values()))
            start = [] if key == "seconds" else [f"{first[f'before_{key}']:.2f}"]
            cells.append(
                [victim, *start, *(_cell(own[d], key, best, mark) if d in own else "failed" for d in defenses)]
            )
        tables.append((name, ["victim", *(["none"] if key != "seconds" else []), *defenses], cells))
    return tables


def comparison_text(rows: list[dict]) -> str:
    """The tables for a terminal; the best cells have a > before them."""
    told = [f"{title}\n{table(header, cells)}" for title, header, cells in comparison_tables(rows, ">{}".format)]
    return "\n\n".join([*told, f"> {NOTE if len(told) == 1 else NOTE.replace('column', 'row')}"])


def write_comparison(folder: str, rows: list[dict]) -> None:
    """Write comparison.csv, .md and .png: a row a run, the tables, the bars. Without rows nothing is written.

    Raises:
        RunError: a file cannot be written.
    """
    if not rows:
        return
    write_csv(os.path.join(folder, "comparison.csv"), rows)
    parts = []
    for title, header, cells in comparison_tables(rows, "**{}**".format):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        parts.append(f"{_plain(title)}\n\n" + "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines))
    write_text(os.path.join(folder, "comparison.md"), "\n\n".join(parts) + "\n")
    draw_comparison(os.path.join(folder, "comparison.png"), rows)


def draw_comparison(path: str, rows: list[dict]) -> None:
    """ACC, ASR and RA of each defense as bars, a row of panels a victim; the line is the victim's own figure."""
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    most = max(sum(row["victim"] == victim for row in rows) for victim in victims)
    with new_picture(path, 9, len(victims) * (0.9 + 0.22 * most)) as figure:
        panels = figure.subplots(len(victims), len(BARS), squeeze=False, sharex=True)
        for line, victim in zip(panels, victims, strict=True):
            own = [row for row in rows if row["victim"] == victim]
            for panel, (key, colour) in zip(line, BARS.items(), strict=True):
                bars = panel.barh(range(len(own)), [row[key] for row in own], color=colour, height=0.7)
                panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
                panel.axvline(own[0][f"before_{key}"], color="black", linewidth=1, linestyle=":")
                panel.set_yticks(range(len(own)), [row["defense"] for row in own] if key == "acc" else [])
                panel.set_xlim(0, 115)
                panel.set_xticks(range(0, 101, 25))
                panel.invert_yaxis()
                panel.grid(axis="y", visible=False)
                panel.set_title(f"{COLUMNS[key][0]}, %" + f"   {victim}" * (key == "acc"), loc="left")
        figure.supxlabel("percent; dotted: the victim as it was", fontsize=8)


def _best(rows, key):
    """The best figure of the defenses that changed something, as it is shown; None where none did."""
    shown = [round(row[key], 2) for row in rows if row["changed"]]
    return COLUMNS[key][1](shown) if shown else None


def _cell(row, key, best, mark):
    text = f"{row[key]:.2f}"
    return mark(text) if row["changed"] and round(row[key], 2) == best else text


def _plain(text):
    """A file's name may hold what Markdown reads as the end of a cell."""
    return text.replace("|", "\\|").replace("\n", " ")
