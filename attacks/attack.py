"""Attacks: a trigger, a label mode, and the poisoning of a training set."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from attacks import triggers
from attacks.blended import blend_picture, own_picture, random_mask
from attacks.label_consistent import adversarial_noise
from attacks.trojan import trojan_patch
from attacks.wanet import wanet_noise, wanet_trigger, warping_grid
from utils.errors import UserError

# Label modes: all2one, all2all (y + 1 mod K), cleanLabel (labels unchanged).
TARGET_TYPES = ("all2one", "all2all", "cleanLabel")
CHUNK_SIZE = 128  # images at a time: their float intermediates fit in the processor's cache


@dataclass(frozen=True)
class TriggerSpec:
    """The functions of a trigger and what they take; only `apply` is required.

    Args:
        apply: (images, **trigger_options, **tensors) -> triggered images, (B, H, W, 3) uint8 both.
        options: name -> int or float. On training images, an option train_<name> replaces <name>.
        tensors: name -> (dtype, shape); None in a shape is any length.
        build: (size, rng, **build_options) -> the tensors; size is (H, W).
        build_options: the options that `build` takes; "surrogate" stands for the clean model.
        training: options for training images only: train_<name>, noise_ratio, and those that `perturb` takes.
        perturb: (images, labels, surrogate, **training) -> images, before `apply`, on training images only.
        cover: (images, rng, **tensors) -> cover images: they look nearly attacked and keep their labels. Training
            has noise_ratio of them for each poisoned image.
        target_types: the label modes that the trigger works with.
    """

    apply: Callable
    options: dict[str, type] = field(default_factory=dict)
    tensors: dict[str, tuple] = field(default_factory=dict)
    build: Callable | None = None
    build_options: tuple[str, ...] = ()
    training: dict[str, type] = field(default_factory=dict)
    perturb: Callable | None = None
    cover: Callable | None = None
    target_types: tuple[str, ...] = TARGET_TYPES


PICTURE, MASK, OVERLAY = ((torch.uint8, (None, None, channels)) for channels in (3, 1, 4))
GRID = (torch.float32, (None, None, 2))
BLOCK = {"trig_w": int, "trig_h": int}

# To add a trigger: write its function in a file of this folder, add one entry here, and add one line with its values to
# config.ATTACKS.
TRIGGERS = {
    "gridTrigger": TriggerSpec(triggers.grid_trigger),
    "squareTrigger": TriggerSpec(triggers.square_trigger, BLOCK),
    "fourCornerTrigger": TriggerSpec(triggers.four_corner_trigger),
    "centerTrigger": TriggerSpec(triggers.center_trigger),
    "randomPixelTrigger": TriggerSpec(triggers.blend_trigger, {"opacity": float}, {"picture": MASK}, random_mask),
    "blendTrigger": TriggerSpec(
        triggers.blend_trigger, {"opacity": float}, {"picture": PICTURE}, blend_picture, ("trigger_image",)
    ),
    "imageTrigger": TriggerSpec(triggers.image_trigger, {}, {"picture": OVERLAY}, own_picture, ("trigger_image",)),
    "trojanTrigger": TriggerSpec(triggers.patch_trigger, {}, {"patch": PICTURE}, trojan_patch, ("surrogate", *BLOCK)),
    # SIG and the label-consistent attack are clean-label attacks: with other labels, they are a blend and a patch.
    "signalTrigger": TriggerSpec(
        triggers.signal_trigger, {"delta": float}, training={"train_delta": float}, target_types=("cleanLabel",)
    ),
    "clTrigger": TriggerSpec(
        triggers.four_corner_trigger, training={"epsilon": int}, perturb=adversarial_noise, target_types=("cleanLabel",)
    ),
    "wanetTrigger": TriggerSpec(
        wanet_trigger,
        tensors={"grid": GRID},
        build=warping_grid,
        build_options=("warp",),
        training={"noise_ratio": float},
        cover=wanet_noise,
        target_types=("all2one", "all2all"),
    ),
}


@dataclass(frozen=True, eq=False)
class Attack:
    """A trigger with its options and tensors, a label mode and a poison rate.

    Args:
        trigger_type: a name in TRIGGERS.
        target_type: all2one (every label becomes target_label), all2all (y becomes (y + 1) mod num_class) or
            cleanLabel (only images of target_label are poisoned; no label changes).
        target_label: 0..num_class - 1; ignored by all2all.
        num_class: number of classes K.
        inject_portion: the poison rate, 0..1: fraction of the training images, for cleanLabel of the target class.
        trigger_options: values of the trigger's options.
        tensors: the trigger's picture, patch or warp.
        training_options: values of its options for training images; not needed to measure the attack.

    Raises:
        UserError: an unknown name, a value out of range, or a label mode that the trigger does not work with.
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
            raise UserError(f"no trigger named {self.trigger_type!r}; choose from {', '.join(TRIGGERS)}")
        if self.target_type not in TARGET_TYPES:
            raise UserError(f"no label mode named {self.target_type!r}; choose from {', '.join(TARGET_TYPES)}")
        if self.target_type not in self._spec.target_types:
            modes = " or ".join(self._spec.target_types)
            raise UserError(f"{self.trigger_type} works only with --target_type {modes}, not {self.target_type}")
        if self.target is not None and not 0 <= self.target < self.num_class:
            raise UserError(f"target label {self.target_label} is not one of the labels 0..{self.num_class - 1}")
        if not 0 <= self.inject_portion <= 1:
            raise UserError(f"the poison rate must be from 0 to 1, not {self.inject_portion}")
        _check_options(self.trigger_type, self._spec.options, self.trigger_options)
        if 0 in self.trigger_options.values():
            raise UserError("a trigger of size or strength 0 leaves images unchanged; choose a value above 0")
        if self.training_options:
            _check_options(self.trigger_type, self._spec.training, self.training_options)
        _check_tensors(self.trigger_type, self._spec.tensors, self.tensors)

    @property
    def _spec(self) -> TriggerSpec:
        return TRIGGERS[self.trigger_type]

    @property
    def target(self) -> int | None:
        """The single target label; None for all2all."""
        return None if self.target_type == "all2all" else self.target_label

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the trigger as in a test: (B, H, W, 3) uint8 -> the same with the trigger.

        Raises:
            UserError: the trigger does not fit images of this size.
        """
        return self._apply(images, self.trigger_options)

    def poison(
        self, images: torch.Tensor, labels: torch.Tensor, rng: torch.Generator, surrogate=None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Poison a random fraction of a training set; all images but these and the cover images stay as they are.

        Args:
            images: (N, H, W, 3) uint8; not modified.
            labels: (N,) true labels.
            surrogate: the frozen clean model that clTrigger's noise is optimised against; other attacks ignore it.

        Returns:
            the (N, H, W, 3) images, the (N,) labels to train with, and the (N,) bool mask of the poisoned images. A
            rate of 0 poisons none.

        Raises:
            UserError: a rate above 0 that selects no image, or too few images left for the cover images.
        """
        poisoned_index, cover_index = self._draw_indices(labels, rng)
        poisoned = torch.zeros(len(labels), dtype=torch.bool)
        poisoned[poisoned_index] = True
        images, selected = images.clone(), images[poisoned_index]
        training = self.training_options
        if self._spec.perturb and len(poisoned_index):
            selected = self._spec.perturb(selected, labels[poisoned_index], surrogate, **training)
        options = {name: training.get(f"train_{name}", value) for name, value in self.trigger_options.items()}
        images[poisoned_index] = self._apply(selected, options)
        if len(cover_index):
            images[cover_index] = _in_chunks(lambda x: self._spec.cover(x, rng, **self.tensors), images[cover_index])
        return images, torch.where(poisoned, self.attack_labels(labels), labels), poisoned

    def _draw_indices(self, labels, rng):
        """Draw the positions of the poisoned and of the cover images."""
        candidates = ((labels == self.target_label) | (self.target_type != "cleanLabel")).nonzero()[:, 0]
        total = len(candidates)
        count = int(self.inject_portion * total)
        if total == 0:
            raise UserError(f"no training image has the label {self.target_label}; choose another --target_label")
        if count == 0 and self.inject_portion > 0:
            raise UserError(f"--inject_portion {self.inject_portion} poisons none of {total} images; raise it")
        cover_count = int(self.training_options.get("noise_ratio", 0) * count)
        if count + cover_count > total:
            left = f"leaves {total - count} of {total} images, too few for {cover_count} cover images"
            raise UserError(f"--inject_portion {self.inject_portion} {left}; lower it or --noise_ratio")
        order = candidates[torch.randperm(total, generator=rng)]
        return order[:count], order[count : count + cover_count]

    def _apply(self, images, options):
        tensors = {name: tensor.to(images.device) for name, tensor in self.tensors.items()}
        return _in_chunks(lambda x: self._spec.apply(x, **options, **tensors), images)

    def attack_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> (B,) labels that the attacker wants for the triggered images."""
        if self.target_type == "all2all":
            return (labels + 1) % self.num_class
        return torch.full_like(labels, self.target_label)

    def attackable(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> (B,) bool mask of the images whose attack label is not their true label."""
        return self.attack_labels(labels) != labels

    def describe(self) -> str:
        """Trigger, label mode and target label as text."""
        target = "" if self.target is None else f", target {self.target}"
        return f"{self.trigger_type}, {self.target_type}{target}"

    def state(self) -> dict:
        """Plain values and tensors for a checkpoint; Attack(**state) is the same attack."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict, num_class: int | None = None, image: torch.Tensor | None = None) -> "Attack":
        """Restore and check the attack of a checkpoint, which may be from an untrusted source.

        Args:
            num_class: the number of classes of the model, if known.
            image: a (1, H, W, 3) uint8 image that the trigger must fit.

        Raises:
            UserError: not a valid attack, one for another number of classes, or one that does not fit the image.
        """
        try:
            attack = cls(**state)
            if type(attack.target_label) is not int:
                raise UserError(f"its target label must be an integer, not a {type(attack.target_label).__name__}")
            if type(attack.num_class) is not int or num_class not in (None, attack.num_class):
                raise UserError(f"its number of classes is not {num_class}, that of the model")
            if image is not None:
                attack.stamp(image)
        except UserError as error:
            raise UserError(f"the checkpoint's attack is invalid: {error}") from None
        except Exception as error:  # noqa: BLE001 - an unknown or missing field, or a value of another type
            raise UserError(f"the checkpoint's attack cannot be read: {' '.join(str(error).split())}") from None
        return attack


def _in_chunks(function, images):
    """Apply a function to CHUNK_SIZE images at a time."""
    return torch.cat([function(chunk) for chunk in images.split(CHUNK_SIZE)])


def _check_options(trigger, expected, options):
    if set(options) != set(expected):
        raise UserError(f"{trigger} takes the options ({', '.join(expected)}), not ({', '.join(map(str, options))})")
    for name, value in options.items():
        if not isinstance(value, int | expected[name]) or not 0 <= value < math.inf:
            raise UserError(f"{name} of {trigger} must be a number, 0 or more")
    if options.get("opacity", 1) > 1:
        raise UserError(f"opacity of {trigger} must be at most 1, not {options['opacity']}")


def _check_tensors(trigger, expected, tensors):
    if set(tensors) != set(expected):
        raise UserError(f"{trigger} takes the tensors ({', '.join(expected)}), not ({', '.join(map(str, tensors))})")
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        fits = isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.dim() == len(shape)
        if not fits or any(length not in (None, n) for length, n in zip(shape, tensor.shape, strict=True)):
            lengths = ", ".join("any" if length is None else str(length) for length in shape)
            raise UserError(f"{name} of {trigger} must be a {dtype} tensor of shape ({lengths})")
        if not tensor.isfinite().all() or 0 in tensor.shape:
            raise UserError(f"{name} of {trigger} must not be empty and must have finite values")
