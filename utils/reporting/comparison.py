"""Comparison of several defenses on one or more victims: comparison.csv and .md, and the text for a terminal."""

import os
import statistics
from collections import Counter

from utils.files import write_csv, write_text
from utils.reporting.tables import METRICS, format_cell, is_backdoored, is_missing, markdown_table, text_table

# column -> label, function for its best value
COLUMNS = {key: (METRICS[key][0], min if key == "asr" else max) for key in ("acc", "acc_published", "asr", "ra")}
COLUMNS |= {"seconds": ("seconds", min)}
DEFENSE_STAGES = ("finetune", "detect", "inversion", "purify")  # stages of a run that are the defense's own
NOTE = "best of its {}, among the defenses after which the backdoor is gone (ASR at most 1 point above its floor)"
SEEDS_NOTE = "Mean ± standard deviation over the seeds {}; values that differ by no more than that are equally good."


def comparison_row(victim: str, defense: str, metrics: dict) -> dict:
    """The row of one run in comparison.csv, from its metrics.json.

    "before_..." are the victim's metrics. If the defense left the victim unchanged, the others are the victim's too.
    """
    before, after = metrics["before"], metrics["after"]
    row = {"victim": victim, "defense": defense, "changed": after is not None}
    row |= {key: (after or before)[key] for key in METRICS}
    row["seconds"] = sum(metrics["seconds"].get(stage, 0.0) for stage in DEFENSE_STAGES)
    row |= {name: metrics[name] for name in ("seed", "detected_label", "purified")}
    row |= {f"before_{key}": before[key] for key in METRICS}
    return row | {f"retuned_{count}": values["asr"] for count, values in (metrics.get("retuned") or {}).items()}


def columns_of(rows: list[dict]) -> dict[str, tuple]:
    """The columns of the tables, key -> label and function for the best value; ASR after re-tuning if measured."""
    counts = dict.fromkeys(key.removeprefix("retuned_") for row in rows for key in row if key.startswith("retuned_"))
    return {**COLUMNS, **{f"retuned_{count}": (f"ASR re-tuned, {count}", min) for count in counts}}


def mean_rows(rows: list[dict], planned: list[tuple[str, str]]) -> list[dict]:
    """One row for each victim and defense: means over its seeds and, under "sd", standard deviations (one seed: 0).

    A backdoor counts as removed only if every planned run removed it.

    Args:
        rows: from `comparison_row`, those of the runs with a result.
        planned: victim and defense of every run of the comparison.
    """
    means = []
    for (victim, defense), count in Counter(planned).items():
        runs = [row for row in rows if (row["victim"], row["defense"]) == (victim, defense)]
        mean = {"victim": victim, "defense": defense, "sd": {}, "runs": len(runs), "missing": count - len(runs)}
        mean |= {name: value for row in runs[:1] for name, value in row.items() if name.startswith("before_")}
        mean["unchanged"] = sum(not row["changed"] for row in runs if defense != "none")
        mean["working"] = sum(row["purified"] is False for row in runs)
        for key in {**METRICS, **columns_of(rows)}:
            values = [row.get(key) for row in runs]  # none, if the re-tuning attack failed
            complete = bool(runs) and not any(map(is_missing, values))
            mean[key] = statistics.fmean(values) if complete else None
            mean["sd"][key] = statistics.stdev(values) if complete and len(values) > 1 else 0.0
        mean["removed"] = not mean["missing"] and all(map(_removed_backdoor, runs))
        means.append(mean)
    return means


def comparison_tables(rows: list[dict], planned, mark) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of each table: one of all metrics for a single victim, else one for each metric.

    Args:
        rows, planned: as in `mean_rows`; the victims' own metrics become the row or column "none".
        mark: text -> marked text, of the best cells of the defenses that removed the backdoor, and of those that differ
            from the best by no more than the larger standard deviation of the two.
    """
    columns, cells = columns_of(rows), {}  # cells: victim -> defense -> metric -> text
    means = mean_rows(rows, planned)
    for victim, runs in _by_victim(means).items():
        cells[victim] = {"none": dict.fromkeys(columns, "")}  # holds the first place
        for row in runs:
            cells[victim][row["defense"]] = {key: _mean_cell(row, key) for key in columns}
        for key, (_, choose) in columns.items():
            successes = [row for row in runs if row["removed"] and row[key] is not None]
            best = choose(successes, key=lambda row: row[key], default=None)
            for row in successes:
                if abs(round(row[key], 2) - round(best[key], 2)) <= max(row["sd"][key], best["sd"][key]):
                    cells[victim][row["defense"]][key] = mark(cells[victim][row["defense"]][key])
        before = next((row for row in runs if row["runs"]), {})
        cells[victim]["none"] |= {key: format_cell(before.get(f"before_{key}")) for key in columns if key in METRICS}
        cells[victim]["none"]["seconds"] = ""
    if len(cells) == 1:
        names = {row["defense"]: " ".join([row["defense"], *_remarks(row)]) for row in means}
        table = [[names.get(name, name), *texts.values()] for name, texts in cells[victim].items()]
        table[0][0] = "none"
        return [(victim, ["defense", *(label for label, _ in columns.values())], table)]
    tables = []
    for key, (label, _) in columns.items():
        names = [name for name in cells[victim] if any(texts[name][key] for texts in cells.values())]
        table = [[victim, *(texts[name][key] for name in names)] for victim, texts in cells.items()]
        if names:
            tables.append((label, ["victim", *names], table))
    return tables


def comparison_text(rows: list[dict], planned) -> str:
    """The tables for a terminal; the best cells are marked with >."""
    tables = comparison_tables(rows, planned, ">{}".format)
    parts = [f"{title}\n{text_table(header, cells)}" for title, header, cells in tables]
    return "\n\n".join(parts + _notes(rows, planned, ">"))


def write_comparison(folder: str, rows: list[dict], planned) -> None:
    """Write comparison.csv (the rows) and .md (the tables), if there are rows; RunError if that fails."""
    if not rows:
        return
    write_csv(os.path.join(folder, "comparison.csv"), rows)
    tables = comparison_tables(rows, planned, "**{}**".format)
    parts = [f"{title}\n\n{markdown_table(header, cells)}\n" for title, header, cells in tables]
    parts += [f"{note}\n" for note in _notes(rows, planned, "Bold:")]
    write_text(os.path.join(folder, "comparison.md"), "\n".join(parts))


def _by_victim(rows):
    victims = dict.fromkeys(row["victim"] for row in rows)
    return {victim: [row for row in rows if row["victim"] == victim] for victim in victims}


def _removed_backdoor(row):
    return row["changed"] and row["purified"] is not False and is_backdoored(row) is False


def _mean_cell(row, key):
    """The mean of a column, and the standard deviation of several seeds."""
    text = format_cell(row[key])
    return text if row["runs"] == 1 or is_missing(row[key]) else f"{text} ± {row['sd'][key]:.2f}"


def _remarks(row):
    """What the metrics of a defense do not show, in how many of its runs."""

    def remark(count, text):
        total = row["runs"] + row["missing"]
        return [f"({text}{'' if total == 1 else f' in {count} of {total}'})"] if count else []

    remarks = remark(row["unchanged"], "found nothing") + remark(row["working"], "inverted trigger still works")
    return remarks + remark(row["missing"], "no result")


def _notes(rows, planned, marked):
    """What the numbers and the marks mean."""
    seeds, means = dict.fromkeys(str(row["seed"]) for row in rows), mean_rows(rows, planned)
    lines = "column" if len(_by_victim(means)) == 1 else "row"
    notes = [f"{marked} {NOTE.format(lines)}."] if any(row["removed"] for row in means) else []
    if lines == "row":
        notes += [f"{row['victim']}, {row['defense']}: {' '.join(_remarks(row))}" for row in means if _remarks(row)]
    return [SEEDS_NOTE.format(", ".join(seeds)), *notes] if len(seeds) > 1 else notes
