"""The tables of a run and its verdict, as rows for report.html and as text for a terminal."""

import math

METRICS = {  # key -> label, meaning; all in percent
    "acc": ("ACC", "accuracy on clean test images"),
    "acc_published": ("ACC*", "the same without the target class, as in the MCL paper"),
    "asr": ("ASR", "triggered images predicted as the attack label"),
    "ra": ("RA", "triggered images predicted as their true label"),
    "floor": ("floor", "their clean versions predicted as the attack label"),
}
SEARCH_COLUMNS = {
    "label": "label",
    "form": "form",
    "size": "L1 or px",
    "of_range": "of range, %",
    "of_median": "of median",
    "hit_rate": "hit rate, %",
    "index": "index",
}
MARGIN = 1.0  # points of ASR above the floor that may be noise; more is a backdoor


def format_cell(value, missing: str = "-") -> str:
    """A float with two decimals, `missing` for None and nan, anything else as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return missing
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def text_table(header: list[str], rows: list[list]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [header, *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *others in cells:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join(lines)


def published_rows(
    dataset: str, before: dict, after: dict | None = None, defense: str = "mcl"
) -> tuple[list[str], list[list]]:
    """Header and row of the MCL paper's table, with ACC over all classes and RA beside it.

    Its accuracy leaves out the target class: ACC*. The paper calls its defense MCLDef.
    """
    header, row = ["Dataset", "Baseline ACC*", "Baseline ASR"], [dataset, before["acc_published"], before["asr"]]
    if after is not None:
        name = "MCLDef" if defense == "mcl" else defense
        header += [f"{name} ACC*", f"{name} ASR"]
        row += [after["acc_published"], after["asr"]]
    final = before if after is None else after
    return [*header, "ACC", "RA"], [[*row, final["acc"], final["ra"]]]


def published_table(dataset: str, before: dict, after: dict | None = None, defense: str = "mcl") -> str:
    """`published_rows` as text."""
    return text_table(*published_rows(dataset, before, after, defense))


def metrics_rows(classes: list[str], before: dict, after: dict | None = None) -> tuple[list[str], list[list]]:
    """Header and rows of every metric, then of every class: one model, or two and the change between them."""
    names = [*(label for label, _ in METRICS.values()), *(f"{label} {name}" for label, name in enumerate(classes))]
    # A model may have more classes than the data.
    columns = [
        [*(metrics[key] for key in METRICS), *metrics["per_class"][: len(classes)]]
        for metrics in (before, after)
        if metrics is not None
    ]
    if after is None:
        return ["percent", "measured"], [list(row) for row in zip(names, *columns, strict=True)]
    rows = [[name, b, a, _change(b, a)] for name, b, a in zip(names, *columns, strict=True)]
    return ["percent", "before", "after", "change"], rows


def metrics_table(classes: list[str], before: dict, after: dict | None = None) -> str:
    """`metrics_rows` as text, with the meaning of each metric."""
    header, rows = metrics_rows(classes, before, after)
    names = [f"{label:<6}{meaning}" for label, meaning in METRICS.values()]
    names += [f"  {name}" for name, *_ in rows[len(METRICS) :]]
    return text_table(header, [[name, *row[1:]] for name, row in zip(names, rows, strict=True)])


def search_rows(scores: list[dict]) -> tuple[list[str], list[list]]:
    """Header and rows of the target search, from its rows in metrics.json."""
    rows = [[*(score[key] for key in SEARCH_COLUMNS), "yes" if score["flagged"] else "no"] for score in scores]
    return [*SEARCH_COLUMNS.values(), "flagged"], rows


def search_table(scores: list[dict]) -> str:
    """`search_rows` as text."""
    return text_table(*search_rows(scores))


def is_backdoored(metrics: dict) -> bool | None:
    """Whether the ASR of a model is above its floor by more than MARGIN; None if one of them was not measured."""
    asr, floor = metrics["asr"], metrics["floor"]
    if any(value is None or math.isnan(value) for value in (asr, floor)):
        return None
    return asr > floor + MARGIN


def verdict(metrics: dict) -> str:
    """The outcome of a run in one sentence.

    Args:
        metrics: content of metrics.json: of a training, with "victim", or of a defense, with "before" and "after".
    """
    before, after = metrics.get("victim") or metrics["before"], metrics.get("after")
    final = after or before
    backdoored, accuracy = is_backdoored(final), f"ACC {_from_to('acc', before, after)} %"
    if after:
        claims = {None: "The model was purified", True: "The backdoor is still there", False: "The backdoor is gone"}
        if is_backdoored(before) is False:
            claims[False] = "There was no backdoor, and there is none now"
    elif "victim" in metrics or metrics["defense"] == "none":
        name = "victim" if "victim" in metrics else "model"
        claims = {None: f"The {name} was measured", True: f"The {name} is backdoored"}
        claims[False] = f"The {name} is not backdoored"
    else:
        left = "No backdoor was found, and the model is left unchanged"
        claims = {None: left, True: f"{left}, although the trigger works", False: left}
    if backdoored is None:
        return f"{claims[None]}; ASR was not measured, because the trigger is unknown; {accuracy}."
    rate = f"ASR {_from_to('asr', before, after)} %, floor {format_cell(final['floor'])} %"
    return f"{claims[backdoored]}: {rate}, {accuracy}."


def _from_to(key, before, after):
    values = [before[key]] if after is None else [before[key], after[key]]
    return " -> ".join(map(format_cell, values))


def _change(before, after):
    if before is None or after is None or math.isnan(after - before):
        return None
    return f"{after - before:+.2f}"
