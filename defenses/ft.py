"""Fine-tuning: the baseline of every other defense (recipe of NAD's authors, Li et al., ICLR 2021)."""

from defenses.base import DefenseContext, DefenseResult
from utils.training import finetune


def defend(context: DefenseContext, **training) -> DefenseResult:
    """Train a copy of the victim on the labels of the clean split; `training` as in utils.training.train."""
    with context.clock("purify"):
        settings = {"title": "ft", "monitor": context.monitor, **training}
        return DefenseResult(*finetune(context.victim, context.train_batches, context.device, **settings))
