"""An inverted trigger: the result of an inversion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from defenses.inversion.objective import attackable_images, is_hit
from defenses.inversion.patterns import WarpForm, apply_patterns

MAX_EXCESS = 0.1  # a trigger whose excess_on a model is at most this no longer works


@dataclass
class InvertedTrigger:
    """A pattern that makes a victim predict the target label for the clean images.

    pattern: (3, H, W) or (2, H, W) float, as in defenses.inversion.patterns.
    hit_rate: fraction 0..1 of images predicted as the target in the step of the inversion that ended with it.
    other_waves: (V, 3, H, W) further waves that the victim responds to alike; None if the pattern is no wave.
    parts: (3, H, W) patterns of other parts of the trigger, and of all of them together, if they were looked for.
    """

    pattern: torch.Tensor
    hit_rate: float
    other_waves: torch.Tensor | None = None
    parts: Sequence[torch.Tensor] = ()

    @property
    def patterns(self) -> torch.Tensor:
        """All patterns, (V, C, H, W)."""
        return self.pattern[None] if self.other_waves is None else torch.cat([self.pattern[None], self.other_waves])

    @property
    def pixels(self) -> int:
        """Number of changed pixels."""
        return int((self.pattern != 0).any(0).sum())

    @property
    def area(self) -> float:
        """The fraction of the pixels that are changed; a warp and waves change all."""
        return self.pixels / self.pattern[0].numel()

    @property
    def l1(self) -> float:
        """L1 norm over pixels and channels, in units of the full range [0, 1]."""
        return self.pattern.abs().sum().item()

    def rate_on(self, model, batches, target) -> float:
        """The fraction 0..1 of the images of other labels that the pattern makes a model predict as the target.

        With parts, of the pattern or the part that turns the most images.

        Args:
            model: on (B, 3, H, W) images in [0, 1].
            batches: clean (images, labels), on the model's device.
            target: a label, or ANY_OTHER.
        """
        hits, count = torch.zeros(1 + len(self.parts)), 0
        with torch.inference_mode():
            for batch in batches:
                images, labels = attackable_images(model, *batch, target)
                if not len(images):  # which not every network takes
                    continue
                for index, pattern in enumerate([self.pattern, *self.parts]):
                    triggered = apply_patterns(images, pattern[None].to(images.device))
                    hits[index] += is_hit(model(triggered), labels, target).sum().item()
                count += len(images)
        return hits.max().item() / max(count, 1)

    def excess_on(self, model, victim, batches, target) -> float:
        """rate_on, less the victim's rate of the same images without the pattern: errors that no trigger causes."""
        nothing = replace(self, pattern=torch.zeros_like(self.pattern), parts=())
        return self.rate_on(model, batches, target) - nothing.rate_on(victim, batches, target)

    def still_works(self, model, victim, batches, target) -> bool:
        """Whether the excess is above MAX_EXCESS."""
        return self.excess_on(model, victim, batches, target) > MAX_EXCESS

    def apply(self, image: torch.Tensor) -> torch.Tensor:
        """A (3, H, W) image in [0, 1] with the pattern on it."""
        return apply_patterns(image[None], self.pattern[None].to(image.device))[0]

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """The change of a (3, H, W) image: the pattern itself where that is added."""
        return self.pattern.to(image.device) if len(self.pattern) == 3 else self.apply(image) - image

    def describe(self) -> str:
        """The trigger in a few words."""
        if self.other_waves is not None:
            return f"best of {len(self.patterns)} waves"
        if len(self.pattern) == 2:
            return f"warp by {WarpForm(self.pattern.shape).extent(self.pattern):.2f} px"
        return f"{self.pixels} px, L1 {self.l1:.1f}"

    def metadata(self) -> dict:
        """Plain values for metrics.json; the hit rate in percent."""
        with_parts = replace(self, pattern=self.parts[-1]).describe() if self.parts else None
        return {"pattern": self.describe(), "hit_rate": 100 * self.hit_rate, "with_parts": with_parts}
