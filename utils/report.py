"""What a run tells: how long its parts took, its tables, and the versions behind its numbers."""

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
    """Seconds by part of a run: `with clock("data"): ...` adds to clock.seconds["data"]."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), {}

    @contextmanager
    def __call__(self, part):
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds of every part so far, and in total."""
        return self.seconds | {"total": time.perf_counter() - self.start}


def progress_bar(title: str, total: int, unit: str) -> tqdm:
    """A bar on stderr while something takes long, on a terminal only."""
    return tqdm(total=total, desc=title, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
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


def published_table(dataset: str, before: dict, after: dict | None = None) -> str:
    """The table of the MCL paper, whose ACC leaves out the target class, with ACC over all classes and RA beside it."""
    header = ["Dataset", "Baseline ACC", "Baseline ASR"]
    row = [dataset, before["acc_published"], before["asr"]]
    if after is None:
        return table([*header, "ACC (all)", "RA"], [[*row, before["acc"], before["ra"]]])
    header += ["MCLDef ACC", "MCLDef ASR", "ACC (all)", "RA"]
    return table(header, [[*row, after["acc_published"], after["asr"], after["acc"], after["ra"]]])


def figures_table(classes: list[str], before: dict, after: dict | None = None) -> str:
    """Every metric and every class in percent: one model, or two and the change between them."""
    names = [*FIGURES.values(), *(f"  {label} {name}" for label, name in enumerate(classes))]

    def column(figures):
        return [*(figures[key] for key in FIGURES), *figures["per_class"]]

    if after is None:
        return table(["percent", "measured"], [list(row) for row in zip(names, column(before), strict=True)])
    rows = [[n, b, a, f"{a - b:+.2f}"] for n, b, a in zip(names, column(before), column(after), strict=True)]
    return table(["percent", "before", "after", "change"], rows)
