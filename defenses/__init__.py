"""The defenses: each makes a purified student from a frozen victim and batches of the clean split."""

from collections.abc import Callable
from typing import NamedTuple

from defenses import fst, ft, ftsam, ibau, mcl, nad, nc


class Defense(NamedTuple):
    """How to run one.

    Args:
        defend: (victim, batches, device, **what it takes, **its options) -> the student, and a row an epoch.
        takes: what it is given beside its options, of teacher, trigger, target (the label), plain (batches without
            crops and flips), mirror (whether `batches` has them) and rng.
        teach: (victim, batches, device, [mirror,] **options) -> the frozen teacher, where it takes one.
    """

    defend: Callable
    takes: tuple[str, ...] = ()
    teach: Callable | None = None


# A new defense is a file and an entry here, and an entry with its defaults in config.DEFENSES.
DEFENSES = {
    "mcl": Defense(mcl.defend, ("teacher", "trigger", "target", "plain", "mirror"), mcl.finetune),
    "ft": Defense(ft.finetune),
    "nad": Defense(nad.distill, ("teacher",), ft.make_teacher),
    "ibau": Defense(ibau.unlearn),
    "nc": Defense(nc.unlearn, ("trigger",)),
    "ftsam": Defense(ftsam.tune),
    "fst": Defense(fst.tune, ("rng",)),
}
