"""Progress bars and the time that each stage of a run takes."""

import os
import sys
import time
from contextlib import contextmanager

from tqdm import tqdm


class Stopwatch:
    """Seconds by stage: `with clock("data"): ...` adds to clock.seconds["data"].

    The time of a nested stage counts for that stage alone.
    """

    def __init__(self):
        self.seconds = {}

    @contextmanager
    def __call__(self, stage):
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            nested = sum(self.seconds.values()) - before
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start - nested

    def read(self) -> dict[str, float]:
        """Seconds of every stage so far, and their sum as "total"."""
        return self.seconds | {"total": sum(self.seconds.values())}


def progress_bar(title: str, total: int, unit: str) -> tqdm:
    """A progress bar on stderr, if that is a terminal and this is the main process."""
    visible = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    return tqdm(total=total, desc=title, unit=unit, disable=not visible, leave=False)
