"""Comparison of several defenses on one or more victims: comparison.csv, .md and .png, and the text for a terminal."""

import os

from utils.files import write_csv, write_text
from utils.reporting.picture import CLEAN, MODELS, TRIGGERED, new_picture
from utils.reporting.tables import METRICS, format_cell, is_backdoored, text_table

BETTER = {
    "acc": max,
    "acc_published": max,
    "asr": min,
    "ra": max,
    "seconds": min,
}  # the columns, and which way is better
LABELS = {key: METRICS[key][0] if key in METRICS else key for key in BETTER}
BAR_COLOURS = {"acc": CLEAN, "asr": TRIGGERED, "ra": MODELS["after"]}
DEFENSE_STAGES = ("finetune", "detect", "inversion", "purify")  # stages of a run that are the defense's own
NOTE = "best of its {}, among the defenses after which the backdoor is gone (ASR at most 1 point above its floor)"


def comparison_row(victim: str, defense: str, metrics: dict) -> dict:
    """The row of one run in comparison.csv, from its metrics.json.

    The metrics are the purified model's; "before_..." are the victim's. If the defense found no backdoor and left the
    victim unchanged, "changed" is False and both are the victim's.
    """
    before, after = metrics["before"], metrics["after"]
    row = {"victim": victim, "defense": defense, "changed": after is not None}
    row |= {key: (after or before)[key] for key in METRICS}
    row["seconds"] = sum(metrics["seconds"].get(stage, 0.0) for stage in DEFENSE_STAGES)
    row |= {"seed": metrics["seed"], "detected_label": metrics["detected_label"]}
    return row | {f"before_{key}": before[key] for key in METRICS}


def comparison_tables(rows: list[dict], mark) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of each table: one of all metrics for a single victim, else one for each metric.

    Args:
        rows: from `comparison_row`; the victims' own metrics become the row or column "none".
        mark: called on the text of the best cells, returns the marked text. A defense that left the victim unchanged or
            backdoored has no best cell.
    """
    victims = list(dict.fromkeys(row["victim"] for row in rows))
    if len(victims) == 1:
        best = {key: _best(rows, key) for key in BETTER}
        cells = [["none", *(format_cell(rows[0][f"before_{key}"]) for key in BETTER if key != "seconds"), ""]]
        for row in rows:
            name = row["defense"] if row["changed"] else f"{row['defense']} (found nothing)"
            cells.append([name, *(_cell(row, key, best[key], mark) for key in BETTER)])
        return [(victims[0], ["defense", *LABELS.values()], cells)]
    defenses = [name for name in dict.fromkeys(row["defense"] for row in rows) if name != "none"]
    tables = []
    for key in BETTER:
        if key == "seconds" and not defenses:
            continue
        cells = []
        for victim in victims:
            by_defense = {row["defense"]: row for row in rows if row["victim"] == victim}
            best, first = _best(by_defense.values(), key), next(iter(by_defense.values()))
            before = [] if key == "seconds" else [format_cell(first[f"before_{key}"])]
            values = [_cell(by_defense[name], key, best, mark) if name in by_defense else "failed" for name in defenses]
            cells.append([victim, *before, *values])
        tables.append((LABELS[key], ["victim", *(["none"] if key != "seconds" else []), *defenses], cells))
    return tables


def comparison_text(rows: list[dict]) -> str:
    """The tables for a terminal; the best cells are marked with >."""
    tables = [f"{title}\n{text_table(header, cells)}" for title, header, cells in comparison_tables(rows, ">{}".format)]
    return "\n\n".join([*tables, *(f"> {note}" for note in _notes(rows, tables))])


def write_comparison(folder: str, rows: list[dict]) -> None:
    """Write comparison.csv (the rows), .md (the tables) and .png (bars); nothing if there are no rows.

    Raises:
        RunError: a file cannot be written.
    """
    if not rows:
        return
    write_csv(os.path.join(folder, "comparison.csv"), rows)
    parts = []
    for title, header, cells in comparison_tables(rows, "**{}**".format):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        table = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
        parts.append(f"{_escape(title)}\n\n{table}")
    notes = [f"Bold: {note}." for note in _notes(rows, parts)]
    write_text(os.path.join(folder, "comparison.md"), "\n\n".join([*parts, *notes]) + "\n")
    draw_comparison(os.path.join(folder, "comparison.png"), rows)


def draw_comparison(path: str, rows: list[dict]) -> None:
    """Draw ACC, ASR and RA of each defense as bars, a row of panels for each victim; lines show the victim itself."""
    by_victim = {}
    for row in rows:
        by_victim.setdefault(row["victim"], []).append(row)
    with new_picture(path, 9, len(by_victim) * (0.9 + 0.22 * max(map(len, by_victim.values())))) as figure:
        panels = figure.subplots(len(by_victim), len(BAR_COLOURS), squeeze=False, sharex=True)
        for line, (victim, runs) in zip(panels, by_victim.items(), strict=True):
            for panel, (key, colour) in zip(line, BAR_COLOURS.items(), strict=True):
                values = [row[key] or 0 for row in runs]
                bars = panel.barh(range(len(runs)), values, color=colour, height=0.7)
                panel.bar_label(bars, [format_cell(row[key]) for row in runs], padding=2, fontsize=8)
                if runs[0][f"before_{key}"] is not None:
                    panel.axvline(runs[0][f"before_{key}"], color="black", linewidth=1, linestyle=":")
                panel.set_yticks(range(len(runs)), [row["defense"] for row in runs] if key == "acc" else [])
                panel.set_xlim(0, 115)
                panel.set_xticks(range(0, 101, 25))
                panel.invert_yaxis()
                panel.grid(axis="y", visible=False)
                panel.set_title(f"{LABELS[key]}, %   {victim}" if key == "acc" else f"{LABELS[key]}, %", loc="left")
        figure.supxlabel("percent; dotted: the victim itself", fontsize=8)


def _notes(rows, tables):
    """What the marks mean, if there are any."""
    return [NOTE.format("column" if len(tables) == 1 else "row")] if any(map(_can_be_best, rows)) else []


def _can_be_best(row):
    return row["changed"] and is_backdoored(row) is False


def _best(rows, key):
    """The best value, to two decimals, of the defenses that removed the backdoor; None if there is none."""
    values = [round(row[key], 2) for row in rows if _can_be_best(row)]
    return BETTER[key](values) if values else None


def _cell(row, key, best, mark):
    text = format_cell(row[key])
    return mark(text) if _can_be_best(row) and round(row[key], 2) == best else text


def _escape(text):
    """A name as one Markdown cell, whatever is in it."""
    return text.replace("|", "\\|").replace("\n", " ")
