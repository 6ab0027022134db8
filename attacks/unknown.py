"""The attack of a file that states none: no image is triggered, so nothing is measured that would be a guess."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UnknownAttack:
    """In place of an attacks.Attack on a model of num_class labels; ASR, RA and floor of no image are nan."""

    num_class: int
    target: None = None

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 -> the same."""
        return images

    def attack_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> the same."""
        return labels

    def attackable(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) true labels -> (B,) False."""
        return torch.zeros_like(labels, dtype=torch.bool)

    def describe(self) -> str:
        """The attack as text."""
        return "trigger unknown: ASR, RA and floor are not measured"

    def state(self) -> None:
        """Nothing to save in a checkpoint."""
