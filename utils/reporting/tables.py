"""The tables of a run, each as a header and rows, and its verdict."""

import math

METRICS = {  # key -> label, meaning; all in percent
    "acc": ("ACC", "accuracy on clean test images"),
    "acc_published": ("ACC*", "the same without the target class, as in the MCL paper"),
    "asr": ("ASR", "triggered images predicted as the target label"),
    "ra": ("RA", "triggered images predicted as their true label"),
    "floor": ("floor", "their clean versions predicted as the target label"),
}
MARGIN = 1.0  # points of ASR above the floor that may be noise; more is a backdoor
MAX_ACC_DROP = 3.0  # points of ACC; the verdict mentions a larger loss


def is_missing(value) -> bool:
    """Whether a value is None or nan: it was not measured, or measured on no image."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_cell(value, missing: str = "-") -> str:
    """A float with two decimals, `missing` for None and nan, anything else as it is."""
    if is_missing(value):
        return missing
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def text_table(header: list[str], rows: list[list]) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    cells = [header, *([format_cell(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)


def markdown_table(header: list[str], rows: list[list]) -> str:
    """The same table in Markdown; a cell may contain any character."""
    cells = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    escaped = [[format_cell(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def models_of(metrics: dict) -> dict[str, dict]:
    """The metrics in metrics.json by model: "before" of the victim and, if it was purified, "after"."""
    models = {"before": metrics.get("victim") or metrics["before"], "after": metrics.get("after")}
    return {name: model for name, model in models.items() if model}


def published_rows(dataset: str, before: dict, after: dict | None = None, defense: str = "mcl"):
    """Header and row of the MCL paper's table, of ACC* and ASR, with ACC and RA beside them."""
    header, row = ["Dataset", "Baseline ACC*", "Baseline ASR"], [dataset, before["acc_published"], before["asr"]]
    if after is not None:
        name = "MCLDef" if defense == "mcl" else defense  # the paper's name
        header += [f"{name} ACC*", f"{name} ASR"]
        row += [after["acc_published"], after["asr"]]
    return [*header, "ACC", "RA"], [[*row, *((after or before)[key] for key in ("acc", "ra"))]]


def metrics_rows(classes: list[str], before: dict, after: dict | None = None) -> tuple[list[str], list[list]]:
    """Header and rows of every metric, then of every class: one model, or two and the change between them."""
    names = [*(label for label, _ in METRICS.values()), *(f"{label} {name}" for label, name in enumerate(classes))]
    models = {"measured": before} if after is None else {"before": before, "after": after}
    columns = {name: [model[key] for key in METRICS] for name, model in models.items()}
    for name, model in models.items():
        columns[name] += model["per_class"][: len(classes)]  # a model may have more classes than the data
    if after is not None:
        pairs = zip(columns["before"], columns["after"], strict=True)
        columns["change"] = [None if is_missing(b) or is_missing(a) else f"{a - b:+.2f}" for b, a in pairs]
    return ["percent", *columns], [list(row) for row in zip(names, *columns.values(), strict=True)]


def metrics_table(classes: list[str], before: dict, after: dict | None = None) -> str:
    """`metrics_rows` as text, with the meaning of each metric."""
    header, rows = metrics_rows(classes, before, after)
    names = [f"{label:<6}{meaning}" for label, meaning in METRICS.values()]
    names += [f"  {row[0]}" for row in rows[len(METRICS) :]]
    return text_table(header, [[name, *row[1:]] for name, row in zip(names, rows, strict=True)])


def search_rows(scores: list[dict]) -> tuple[list[str], list[list]]:
    """Header and rows of the target search, from its rows in metrics.json."""
    header = ["label", "form", "L1 or px", "of range, %", "of median", "hit rate, %", "index", "flagged"]
    keys = ["label", "form", "size", "of_range", "of_median", "hit_rate", "index"]
    return header, [[*(score[key] for key in keys), "yes" if score["flagged"] else "no"] for score in scores]


def retuned_rows(retuned: dict, reference: dict | None) -> tuple[list[str], list[list]]:
    """Header and rows of the re-tuning attack, a row for each number of poisoned images: mean ± sd over the draws."""
    header, rows = ["poisoned images", "ASR", "RA", "ACC"], []
    for count, values in retuned.items():
        rows.append([count, *(f"{values[key]:.2f} ± {values['sd'][key]:.2f}" for key in ("asr", "ra", "acc"))])
        if reference:
            rows[-1].append(f"{reference[count]['asr']:.2f} ± {reference[count]['sd']['asr']:.2f}")
    return [*header, "ASR of a clean model"] if reference else header, rows


def is_backdoored(metrics: dict) -> bool | None:
    """Whether the ASR of a model is above its floor by more than MARGIN; None if one of them was not measured."""
    if is_missing(metrics["asr"]) or is_missing(metrics["floor"]):
        return None
    return metrics["asr"] > metrics["floor"] + MARGIN


def verdict(metrics: dict) -> str:
    """The outcome of a run in one sentence, from the content of its metrics.json; a high price in a second one."""
    models = models_of(metrics)
    before, final = models["before"], models.get("after", models["before"])
    if "after" in models:
        claims = {None: "The model was purified", True: "The backdoor is still there", False: "The backdoor is gone"}
        if is_backdoored(before) is False:
            claims[False] = "This trigger works neither before nor after"
    elif "victim" in metrics or metrics["defense"] == "none":
        name = "The victim" if "victim" in metrics else "The model"
        claims = {None: f"{name} was measured", True: f"{name} is backdoored", False: "This trigger does not work"}
    else:
        left = "No backdoor was found, and the model is left unchanged"
        claims = {None: left, True: f"{left}, although the trigger works", False: left}
    asr, acc = (" -> ".join(format_cell(model[key]) for model in models.values()) for key in ("asr", "acc"))
    loss, inverted, backdoored = before["acc"] - final["acc"], "", is_backdoored(final)
    price = f" That is a loss of {loss:.2f} points of ACC." if loss > MAX_ACC_DROP else ""
    if metrics.get("inverted_hit_rate"):
        rates = " -> ".join(format_cell(rate) for rate in metrics["inverted_hit_rate"].values())
        inverted = f"; the inverted trigger works on {rates} % of the images"
    claim = claims[True] if metrics.get("purified") is False else claims[backdoored]
    if backdoored is None:
        return f"{claim}{inverted}; ASR was not measured, because the trigger is unknown; ACC {acc} %.{price}"
    inverted = inverted if metrics.get("purified") is False or not is_backdoored(before) else ""
    return f"{claim}: ASR {asr} %, floor {format_cell(final['floor'])} %, ACC {acc} %{inverted}.{price}"
