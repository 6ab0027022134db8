"""The defenses: functions of a DefenseContext and their own options that return a DefenseResult; purify runs one."""

from defenses.base import DefenseContext, DefenseResult
from defenses.purify import DEFENSE_FUNCTIONS, PurifyResult, find_target, is_purified, purify, remove_backdoors

__all__ = [
    "DEFENSE_FUNCTIONS",
    "DefenseContext",
    "DefenseResult",
    "PurifyResult",
    "find_target",
    "is_purified",
    "purify",
    "remove_backdoors",
]
