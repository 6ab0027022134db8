"""The defenses: each is a function of a case (defenses.case.Case) and its own options to a purified student."""

from defenses import fst, ft, ftsam, ibau, mcl, nad, nc
from defenses.case import Case

# A new defense is a file and an entry here, and an entry with its options and their defaults in config.DEFENSES.
DEFENSES = {
    "mcl": mcl.defend,
    "ft": ft.defend,
    "nad": nad.defend,
    "ibau": ibau.defend,
    "nc": nc.defend,
    "ftsam": ftsam.defend,
    "fst": fst.defend,
}

__all__ = ["DEFENSES", "Case"]
