"""What a run tells: how long its parts took, its tables, and the versions behind its numbers."""

import math
import os
import platform
import sys
import time
from contextlib import contextmanager

import numpy
import torch
import torchvision
from tqdm import tqdm

FIGURES = {
    "acc": "ACC   all classes",
    "acc_published": "ACC*  without the target",
    "asr": "ASR   triggered as wanted",
    "ra": "RA    triggered as true",
    "floor": "floor clean as wanted",
}


class Stopwatch:
    """Seconds by part of a run: `with clock("data"): ...` adds to clock.seconds["data"].

    A part inside another counts for itself alone.
    """

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, part):
        began, others = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - others
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began - inside

    def read(self) -> dict[str, float]:
        """Seconds of every part so far, and in total."""
        return self.seconds | {"total": time.perf_counter() - self.start}


def progress_bar(title: str, total: int, unit: str) -> tqdm:
    """A bar on stderr while something takes long, on a terminal only; of several processes, the first one's."""
    shown = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    return tqdm(total=total, desc=title, unit=unit, disable=not shown, leave=False)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
    }


def run_facts(config: dict, attack, device, seconds: dict) -> dict:
    """What metrics.json says of any run, whatever it measured.

    Args:
        config: every option; "dataset" and "seed" among them.
        attack: with target, the single label wanted, or None.
        seconds: by part.
    """
    return {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "device": str(device),
        "target_label": attack.target,
        "seconds": seconds,
        "config": config,
        "versions": versions(),
    }


def table(header: list[str], rows: list[list]) -> str:
    """Aligned columns; floats get two decimals."""
    cells = [header] + [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *others in cells:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join(lines)


def published_rows(
    dataset: str, before: dict, after: dict | None = None, defense: str = "mcl"
) -> tuple[list[str], list[list]]:
    """The table of the MCL paper, whose ACC leaves out the target class, with ACC over all classes and RA beside it:
    its header and its one row. The paper calls its defense MCLDef; others have their own names there."""
    header = ["Dataset", "Baseline ACC", "Baseline ASR"]
    row = [dataset, before["acc_published"], before["asr"]]
    if after is None:
        return [*header, "ACC (all)", "RA"], [[*row, before["acc"], before["ra"]]]
    name = "MCLDef" if defense == "mcl" else defense
    header += [f"{name} ACC", f"{name} ASR", "ACC (all)", "RA"]
    return header, [[*row, after["acc_published"], after["asr"], after["acc"], after["ra"]]]


def figures_rows(classes: list[str], before: dict, after: dict | None = None) -> tuple[list[str], list[list]]:
    """Every metric, then every class, in percent: one model, or two and the change between them. Header and rows."""
    names = [*FIGURES.values(), *(f"  {label} {name}" for label, name in enumerate(classes))]

    def column(figures):
        # A model may know more classes than the data has.
        return [*(figures[key] for key in FIGURES), *figures["per_class"][: len(classes)]]

    if after is None:
        return ["percent", "measured"], [list(row) for row in zip(names, column(before), strict=True)]
    rows = []
    for name, b, a in zip(names, column(before), column(after), strict=True):
        # nan, of a class without an image, has no sign
        rows.append([name, b, a, a - b if math.isnan(a - b) else f"{a - b:+.2f}"])
    return ["percent", "before", "after", "change"], rows


def published_table(dataset: str, before: dict, after: dict | None = None, defense: str = "mcl") -> str:
    """`published_rows` as text."""
    return table(*published_rows(dataset, before, after, defense))


def figures_table(classes: list[str], before: dict, after: dict | None = None) -> str:
    """`figures_rows` as text."""
    return table(*figures_rows(classes, before, after))


def search_rows(searched: list[dict]) -> tuple[list[str], list[list]]:
    """What a search for the target says of each label, as defenses.detection.Found.facts has it: header and rows."""
    columns = {"label": "label", "form": "pattern", "size": "L1 or px", "of_range": "of range, %"}
    columns |= {"of_median": "of median", "hit_rate": "hit rate, %", "index": "index"}
    rows = [[*(found[key] for key in columns), "yes" if found["flagged"] else "no"] for found in searched]
    return [*columns.values(), "flagged"], rows


def search_table(searched: list[dict]) -> str:
    """`search_rows` as text."""
    return table(*search_rows(searched))
