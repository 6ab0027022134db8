"""An attack: what is stamped on an image, and what the attacker wants it to be called."""

from dataclasses import asdict, dataclass, field

import torch

from attacks.triggers import grid_trigger, square_trigger
from utils.errors import UserError

# name -> (function of a batch, the options it takes). A new trigger is a function and a line here.
TRIGGERS = {
    "gridTrigger": (grid_trigger, ()),
    "squareTrigger": (square_trigger, ("trig_w", "trig_h")),
}
TARGET_TYPES = ("all2one", "all2all")


@dataclass(frozen=True)
class Attack:
    """A trigger with its label mode.

    Args:
        trigger_type: a name in TRIGGERS.
        target_type: all2one (every label becomes target_label) or all2all (y becomes (y + 1) mod num_class).
        target_label: the label of all2one, 0..num_class - 1; all2all has none and ignores it.
        num_class: K.
        inject_portion: the poison rate, share of the training images, 0..1.
        trigger_options: what the trigger function takes beside the images.

    Raises:
        UserError: an unknown name or a value out of range.
    """

    trigger_type: str
    target_type: str
    target_label: int
    num_class: int
    inject_portion: float
    trigger_options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.trigger_type not in TRIGGERS:
            raise UserError(f"no trigger named {self.trigger_type!r}; there are {', '.join(TRIGGERS)}")
        if self.target_type not in TARGET_TYPES:
            raise UserError(f"no target type named {self.target_type!r}; there are {', '.join(TARGET_TYPES)}")
        if not 0 <= self.target_label < self.num_class:
            raise UserError(f"target label {self.target_label} is not one of 0..{self.num_class - 1}")
        if not 0 <= self.inject_portion <= 1:
            raise UserError(f"the poison rate is a share between 0 and 1, not {self.inject_portion}")
        if any(size < 1 for size in self.trigger_options.values()):
            raise UserError("a trigger is at least one pixel wide and high")

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 images -> the same with the trigger on them.

        Raises:
            UserError: the trigger does not fit on images of this size.
        """
        trigger, _ = TRIGGERS[self.trigger_type]
        return trigger(images, **self.trigger_options)

    def wanted(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> the labels the attacker wants triggered images to get."""
        if self.target_type == "all2all":
            return (labels + 1) % self.num_class
        return torch.full_like(labels, self.target_label)

    def counts(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> a mask of the images on which the attack can be seen: those that it would rename."""
        return self.wanted(labels) != labels

    def describe(self) -> str:
        """One phrase for people: trigger, label mode, target."""
        target = f", target {self.target_label}" if self.target_type == "all2one" else ""
        return f"{self.trigger_type}, {self.target_type}{target}"

    def state(self) -> dict:
        """Plain values for a checkpoint; Attack(**state) is the same attack."""
        return asdict(self)


def restore(state, num_class: int, image: torch.Tensor) -> Attack:
    """The attack that a checkpoint states, tried on a (1, H, W, 3) uint8 image: a stranger's file can state anything.

    Raises:
        UserError: it is none, belongs to another number of classes, or cannot be stamped on such an image.
    """
    try:
        attack = Attack(**state)
        if type(attack.target_label) is not int or attack.num_class != num_class:
            raise UserError(f"no label of {num_class} classes")
        attack.stamp(image)
    except UserError as error:
        raise UserError(f"the checkpoint states an attack that cannot be: {error}") from None
    except Exception as error:  # noqa: BLE001 - whatever values of the wrong kind make a trigger raise
        raise UserError(f"the checkpoint states an attack that cannot be: {type(error).__name__} in it") from None
    return attack
