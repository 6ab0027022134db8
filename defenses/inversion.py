"""Trigger inversion: the smallest pixel pattern that makes a victim answer with one label (Tao et al., CVPR 2022)."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.device import autocast
from utils.report import progress_bar

HIT_RATE = 0.9  # a pattern counts from this share of images predicted as the target
PATIENCE = 10  # steps in a row above or below it before the weight of the size moves
STALLED = 10  # steps without a smaller pattern that end the search, time for one rise of that weight
RAISE, LOWER = 1.5, 1.5**1.5
VISIBLE = 1 / 255  # smaller values vanish in an 8-bit image


@dataclass
class Trigger:
    """pattern: (3, H, W) float, to be added to images in [0, 1]; hit_rate: share 0..1 of images that it turns."""

    pattern: torch.Tensor
    hit_rate: float

    @property
    def pixels(self) -> int:
        """How many pixels change."""
        return int((self.pattern != 0).any(0).sum())

    @property
    def l1(self) -> float:
        """Sum of absolute values over pixels and channels, in units of the full range [0, 1]."""
        return self.pattern.abs().sum().item()

    def stamp(self, images: torch.Tensor) -> torch.Tensor:
        """x' = clamp(x + d, 0, 1) for (B, 3, H, W) images."""
        return (images + self.pattern).clamp(0, 1)


def pattern_of(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """d = clamp(p, 0, 1) - clamp(q, 0, 1), both (3, H, W)."""
    return plus.clamp(0, 1) - minus.clamp(0, 1)


def size_of(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """R: over p and q, the sum over pixels of the maximum over channels of tanh(v / 10) / (2 - 1e-7) + 0.5."""
    return sum((torch.tanh(v / 10) / (2 - 1e-7) + 0.5).amax(0).sum() for v in (plus, minus))


def invert_trigger(victim, batches, target, device, rng, steps, batches_per_step, precision="fp32"):
    """Find the smallest pattern d with f_B(clamp(x + d, 0, 1)) = target.

    Minimises CE(f_B(x'), target) + c * R with Adam; c rises while the pattern works and falls while it does not.

    Args:
        victim: f_B, frozen and in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches, gone through again and again; images of the target itself are left out.
        target: the label, 0..K-1.
        rng: where the first p and q come from, U[0, 1).
        steps: at most so many, of `batches_per_step` updates each; the search ends sooner once STALLED of them have
            found no smaller pattern than the best.

    Returns:
        the best Trigger, or None where no step reached a hit rate of 0.9: there is no such pattern.
    """
    shape = next(iter(batches))[0].shape[1:]
    plus, minus = (torch.rand(shape, generator=rng).to(device).requires_grad_() for _ in range(2))
    optimizer = torch.optim.Adam([plus, minus], lr=0.1, betas=(0.5, 0.9))
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    best, best_size = None, float("inf")
    weight, above, below, stalled = 1e-3, 0, 0, 0
    with progress_bar("invert", steps, "step") as bar:
        for _ in range(steps):
            hits, seen, sizes = torch.zeros((), device=device), 0, torch.zeros((), device=device)
            for images, labels in itertools.islice(stream, batches_per_step):
                images = images[labels != target]
                if not len(images):
                    continue
                wanted = labels.new_full((len(images),), target)
                with autocast(device, precision):
                    logits = victim((images + pattern_of(plus, minus)).clamp(0, 1))
                    size = size_of(plus, minus)
                    loss = F.cross_entropy(logits, wanted) + weight * size
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                hits, seen, sizes = hits + (logits.argmax(1) == target).sum(), seen + len(images), sizes + size.detach()
            hit_rate, size = (hits / seen).item(), (sizes / batches_per_step).item()

            stalled += 1
            if hit_rate >= HIT_RATE and size < best_size:
                found = pattern_of(plus, minus).detach()
                found = Trigger(torch.where(found.abs() < VISIBLE, 0.0, found), hit_rate)
                if best is None or found.pixels < best.pixels:
                    best, best_size, stalled = found, size, 0
            above, below = (above + 1, 0) if hit_rate >= HIT_RATE else (0, below + 1)
            if above == PATIENCE:
                weight, above = weight * RAISE, 0
            if below == PATIENCE:
                weight, below = weight / LOWER, 0
            bar.update()
            bar.set_postfix(hit_rate=f"{hit_rate:.1%}", pixels=best and best.pixels)
            if best and stalled == STALLED:
                break
    return best
