"""What a trigger may be, how it is inverted from a model, and the search for the target label."""

from defenses.inversion.invert import find_trigger, invert_trigger, invert_warp, shifted_patterns
from defenses.inversion.objective import ANY_OTHER, HIT_RATE, label_name
from defenses.inversion.patterns import PatternApplier, apply_patterns
from defenses.inversion.scores import LabelScore, choose_label
from defenses.inversion.target_search import invert_suspects, search_target
from defenses.inversion.trigger import InvertedTrigger

__all__ = [
    "ANY_OTHER",
    "HIT_RATE",
    "InvertedTrigger",
    "LabelScore",
    "PatternApplier",
    "apply_patterns",
    "choose_label",
    "find_trigger",
    "invert_suspects",
    "invert_trigger",
    "invert_warp",
    "label_name",
    "search_target",
    "shifted_patterns",
]
