"""An attack: what is stamped on an image, what it is to be called, and how a training set is poisoned."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from attacks.label_consistent import adversarial_noise
from attacks.pictures import blend_picture, random_mask
from attacks.triggers import (
    blend_trigger,
    center_trigger,
    four_corner_trigger,
    grid_trigger,
    patch_trigger,
    signal_trigger,
    square_trigger,
)
from attacks.trojan import trojan_patch
from attacks.wanet import wanet_noise, wanet_trigger, warping_grid
from utils.errors import UserError

# What a poisoned image is called: the target label; the label after its own; its own, for it is of the target class.
TARGET_TYPES = ("all2one", "all2all", "cleanLabel")
CHUNK = 128  # images at a time, so that what is worked out in float stays in the processor's cache


@dataclass(frozen=True)
class Trigger:
    """How one attack marks images; what an attack does not need is left out.

    Args:
        stamp: (images, **trigger_options, **tensors) -> images, the view of the test, and of the training as well
            but for what is said below.
        options: its options, name -> int or float. In training, an option train_<name> takes the place of <name>.
        tensors: its tensors, name -> (dtype, lengths); a length of None is free.
        make: (size, rng, [surrogate,] **the options named in made_from) -> those tensors; size is (H, W).
        training: options of the training view alone: train_<name>, and those that disguise and decoy take.
        disguise: (images, labels, surrogate, **training) -> images, what is done to them before they are stamped.
        decoy: (images, rng, **tensors) -> images that look nearly attacked and keep their labels; there are
            noise_ratio times as many of them as poisoned images.
        target_types: the label modes that make sense.
    """

    stamp: Callable
    options: dict[str, type] = field(default_factory=dict)
    tensors: dict[str, tuple] = field(default_factory=dict)
    make: Callable | None = None
    made_from: tuple[str, ...] = ()
    training: dict[str, type] = field(default_factory=dict)
    disguise: Callable | None = None
    decoy: Callable | None = None
    target_types: tuple[str, ...] = TARGET_TYPES


PICTURE = (torch.uint8, (None, None, 3))
SIZES = {"trig_w": int, "trig_h": int}

# A new trigger is a function and an entry here, and a line with its defaults in config.py.
TRIGGERS = {
    "gridTrigger": Trigger(grid_trigger),
    "squareTrigger": Trigger(square_trigger, SIZES),
    "fourCornerTrigger": Trigger(four_corner_trigger),
    "centerTrigger": Trigger(center_trigger),
    "randomPixelTrigger": Trigger(
        blend_trigger, {"opacity": float}, {"picture": (torch.uint8, (None, None, 1))}, random_mask
    ),
    "blendTrigger": Trigger(blend_trigger, {"opacity": float}, {"picture": PICTURE}, blend_picture, ("trigger_image",)),
    "trojanTrigger": Trigger(patch_trigger, {}, {"patch": PICTURE}, trojan_patch, ("surrogate", *SIZES)),
    # Of these two, images of other classes would only be blended and stamped: the label mode is the attack.
    "signalTrigger": Trigger(
        signal_trigger, {"delta": float}, training={"train_delta": float}, target_types=("cleanLabel",)
    ),
    "clTrigger": Trigger(
        four_corner_trigger, training={"epsilon": int}, disguise=adversarial_noise, target_types=("cleanLabel",)
    ),
    "wanetTrigger": Trigger(
        wanet_trigger,
        tensors={"grid": (torch.float32, (None, None, 2))},
        make=warping_grid,
        made_from=("warp",),
        training={"noise_ratio": float},
        decoy=wanet_noise,
        target_types=("all2one", "all2all"),
    ),
}


@dataclass(frozen=True, eq=False)
class Attack:
    """A trigger with its label mode, its strength and its tensors.

    Args:
        trigger_type: a name in TRIGGERS.
        target_type: all2one (every label becomes target_label), all2all (y becomes (y + 1) mod num_class) or
            cleanLabel (only images of target_label are poisoned, and no label changes).
        target_label: the label of all2one and cleanLabel, 0..num_class - 1; all2all has none and ignores it.
        num_class: K.
        inject_portion: the poison rate, 0..1: share of the training images, for cleanLabel of those of target_label.
        trigger_options: what the trigger function takes beside the images.
        tensors: what it takes that is too large to be an option: a picture, a patch, a grid.
        training_options: what only the training view needs; an attack that is only measured may leave it out.

    Raises:
        UserError: an unknown name, a value out of range, a label mode that the trigger has no use for.
    """

    trigger_type: str
    target_type: str
    target_label: int
    num_class: int
    inject_portion: float
    trigger_options: dict = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    training_options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.trigger_type not in TRIGGERS:
            raise UserError(f"no trigger named {self.trigger_type!r}; there are {', '.join(TRIGGERS)}")
        if self.target_type not in TARGET_TYPES:
            raise UserError(f"no target type named {self.target_type!r}; there are {', '.join(TARGET_TYPES)}")
        if self.target_type not in self._trigger.target_types:
            modes = " or ".join(self._trigger.target_types)
            raise UserError(f"{self.trigger_type} makes sense only with --target_type {modes}, not {self.target_type}")
        if self.target is not None and not 0 <= self.target < self.num_class:
            raise UserError(f"target label {self.target_label} is not one of 0..{self.num_class - 1}")
        if not 0 <= self.inject_portion <= 1:
            raise UserError(f"the poison rate is a share between 0 and 1, not {self.inject_portion}")
        _check_options(self.trigger_type, self._trigger.options, self.trigger_options)
        if 0 in self.trigger_options.values():
            raise UserError("a trigger without size or strength changes nothing; give it some")
        if self.training_options:
            _check_options(self.trigger_type, self._trigger.training, self.training_options)
        _check_tensors(self.trigger_type, self._trigger.tensors, self.tensors)

    @property
    def _trigger(self) -> Trigger:
        return TRIGGERS[self.trigger_type]

    @property
    def target(self) -> int | None:
        """The label that triggered images are to get, where it is a single one."""
        return None if self.target_type == "all2all" else self.target_label

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """The view of the test: (B, H, W, 3) uint8 images -> the same with the trigger on them.

        Raises:
            UserError: the trigger does not fit on images of this size.
        """
        return self._stamp(images, self.trigger_options)

    def poison(
        self, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, surrogate=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The view of the training: a random share of the images attacked, all others (but for decoys) left alone.

        Args:
            images: (N, H, W, 3) uint8, left as they are.
            labels: (N,) true labels.
            surrogate: the frozen model that clTrigger's noise is made against; no other attack needs one here.

        Returns:
            the (N, H, W, 3) images, the (N,) labels to train with, and the (N,) bool mask of the poisoned ones. A rate
            of 0 poisons nothing.

        Raises:
            UserError: a rate above 0 that yields no image, or too few images left for the decoys.
        """
        chosen, beside = self._choose(labels, rng)
        poisoned = torch.zeros(len(labels), dtype=torch.bool)
        poisoned[chosen] = True
        images, pictures = images.clone(), images[chosen]
        training = self.training_options
        if self._trigger.disguise and len(chosen):
            pictures = self._trigger.disguise(pictures, labels[chosen], surrogate, **training)
        options = {name: training.get(f"train_{name}", value) for name, value in self.trigger_options.items()}
        images[chosen] = self._stamp(pictures, options)
        if len(beside):
            images[beside] = _in_chunks(lambda part: self._trigger.decoy(part, rng, **self.tensors), images[beside])
        return images, torch.where(poisoned, self.wanted(labels), labels), poisoned

    def _choose(self, labels, rng):
        """Indices of the images to attack, and of those to have decoys."""
        if self.target_type == "cleanLabel":
            candidates = (labels == self.target_label).nonzero()[:, 0]
        else:
            candidates = torch.arange(len(labels))
        count = int(self.inject_portion * len(candidates))
        if count == 0 and self.inject_portion > 0:
            raise UserError(f"--inject_portion {self.inject_portion} of {len(candidates)} images poisons none")
        decoys = int(self.training_options.get("noise_ratio", 0) * count)
        if count + decoys > len(candidates):
            raise UserError(
                f"--inject_portion {self.inject_portion} leaves {len(candidates) - count} of {len(candidates)} images, "
                f"too few for {decoys} with noise; lower it, or --noise_ratio"
            )
        order = candidates[torch.randperm(len(candidates), generator=rng)]
        return order[:count], order[count : count + decoys]

    def _stamp(self, images, options):
        tensors = {name: tensor.to(images.device) for name, tensor in self.tensors.items()}
        return _in_chunks(lambda part: self._trigger.stamp(part, **options, **tensors), images)

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
        target = "" if self.target is None else f", target {self.target}"
        return f"{self.trigger_type}, {self.target_type}{target}"

    def state(self) -> dict:
        """Plain values and tensors for a checkpoint; Attack(**state) is the same attack."""
        return asdict(self)

    @classmethod
    def restore(cls, state: dict, num_class: int | None = None, image: torch.Tensor | None = None) -> "Attack":
        """The attack that a file states, whoever wrote it.

        Args:
            num_class: how many classes it must be for.
            image: (1, H, W, 3) uint8, on which it is tried.

        Raises:
            UserError: what it states is no attack, not for so many classes, or nothing to stamp on such an image.
        """
        try:
            attack = cls(**state)
            if type(attack.target_label) is not int or num_class not in (None, attack.num_class):
                raise UserError(f"no label of {num_class} classes")
            if image is not None:
                attack.stamp(image)
        except UserError as error:
            raise UserError(f"the attack it states cannot be: {error}") from None
        except Exception as error:  # noqa: BLE001 - an unknown or missing field, a text where a number belongs
            raise UserError(f"the attack it states cannot be understood ({' '.join(str(error).split())})") from None
        return attack


def _in_chunks(change, images):
    changed = torch.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        changed[part] = change(images[part])
    return changed


def _check_options(trigger, kinds, options):
    if set(options) != set(kinds):
        raise UserError(f"{trigger} takes the options ({', '.join(kinds)}), not ({', '.join(map(str, options))})")
    for name, value in options.items():
        if not isinstance(value, int | kinds[name]) or not 0 <= value < math.inf:
            raise UserError(f"{name} of {trigger} is a number, 0 or more, not {value!r}")
    if options.get("opacity", 1) > 1:
        raise UserError(f"the opacity of {trigger} is a share up to 1, not {options['opacity']}")


def _check_tensors(trigger, expected, tensors):
    if set(tensors) != set(expected):
        raise UserError(f"{trigger} has the tensors ({', '.join(expected)}), not ({', '.join(map(str, tensors))})")
    for name, (dtype, lengths) in expected.items():
        tensor = tensors[name]
        fits = isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.dim() == len(lengths)
        if not fits or any(want not in (None, have) for want, have in zip(lengths, tensor.shape, strict=True)):
            raise UserError(f"{name} of {trigger} is no {dtype} tensor of {len(lengths)} dimensions, {lengths}")
        if not tensor.isfinite().all() or 0 in tensor.shape:
            raise UserError(f"{name} of {trigger} has values that are not finite numbers, or none at all")
