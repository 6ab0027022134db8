"""The defenses: functions of a DefenseContext and their own options that return a DefenseResult."""

from defenses import fst, ft, ftsam, ibau, mcl, nad, nc, pam
from defenses.base import DefenseContext, DefenseResult

# A new defense is a file in this folder, an entry here, and a recipe in config.DEFENSES.
DEFENSE_FUNCTIONS = {
    "mcl": mcl.defend,
    "ft": ft.defend,
    "nad": nad.defend,
    "ibau": ibau.defend,
    "nc": nc.defend,
    "ftsam": ftsam.defend,
    "fst": fst.defend,
    "pam": pam.defend,
}

__all__ = ["DEFENSE_FUNCTIONS", "DefenseContext", "DefenseResult"]
