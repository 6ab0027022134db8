"""Trigger inversion: the smallest pixel pattern that makes a victim answer with one label (Tao et al., CVPR 2022)."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.device import autocast
from utils.errors import RunError
from utils.report import progress_bar
from utils.seed import generator

HIT_RATE = 0.9  # a pattern counts from this share of images predicted as the target
PATIENCE = 0.1  # share of the steps, in a row above or below it, after which the weight of the size moves
RAISE, LOWER = 1.5, 1.5**1.5
FIRST_WEIGHT, LATER_WEIGHT = 1e-3, 1e-2  # of the size, at the start of the first round and of the others
REACH, NOISE = 2, 0.5  # a later round starts with noise up to NOISE, within REACH pixels of the pattern
IDLE_ROUNDS = 2  # rounds in a row without a smaller pattern that end the search
MOVES, ANSWERED = 2, 0.5  # a pattern moved by up to MOVES pixels counts from this share of images
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


def stamp(images, patterns) -> torch.Tensor:
    """x' = clamp(x + d, 0, 1), (B, 3, H, W), with the (V, 3, H, W) patterns dealt out to the images in turn."""
    return (images + patterns[torch.arange(len(images), device=images.device) % len(patterns)]).clamp(0, 1)


def pattern_of(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """d = clamp(p, 0, 1) - clamp(q, 0, 1), all (..., 3, H, W)."""
    return plus.clamp(0, 1) - minus.clamp(0, 1)


def size_of(plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """R: over p and q, the sum over pixels of the maximum over channels of tanh(v / 10) / (2 - 1e-7) + 0.5.

    (..., 3, H, W) -> (...): a size for each pattern.
    """
    return sum((torch.tanh(v / 10) / (2 - 1e-7) + 0.5).amax(-3).flatten(-2).sum(-1) for v in (plus, minus))


def invert_trigger(victim, batches, target, device, rng, rounds, steps, batches_per_step, precision="fp32"):
    """Find the smallest pattern d with f_B(clamp(x + d, 0, 1)) = target.

    The first round is the published search, from noise all over the image. It often ends in two halves of a trigger,
    far apart, where one would do; so each further round sets noise around what is left and shrinks it again.

    Args:
        victim: f_B, frozen and in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches, gone through again and again; images of the target itself are left out.
        target: the label, 0..K-1.
        rng: where p and q of each round come from, U[0, 1).
        rounds: at most so many; the search ends sooner once IDLE_ROUNDS in a row found no smaller pattern.
        steps: of a round, each of `batches_per_step` updates.

    Returns:
        the best Trigger, or None where no step of the first round reached a hit rate of 0.9: there is no such pattern.
    """
    shape = next(iter(batches))[0].shape[1:]
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    start, weight = torch.rand(2, *shape, generator=rng), FIRST_WEIGHT
    best, idle = None, 0
    with progress_bar("invert", rounds * steps, "step") as bar:
        for _ in range(rounds):
            found = _shrink(victim, stream, target, start.to(device), weight, steps, batches_per_step, precision, bar)
            smaller = found and (best is None or found.pixels < best.pixels)
            best, idle = (found, 0) if smaller else (best, idle + 1)
            if best is None or idle == IDLE_ROUNDS:
                break
            start, weight = noise_around((found or best).pattern.cpu(), rng), LATER_WEIGHT
    return best


def find_trigger(case, rounds, steps, batches_per_step, precision) -> Trigger:
    """`invert_trigger` for a defenses.case.Case, told and timed.

    Raises:
        RunError: there is no such pattern.
    """
    with case.clock("inversion"):
        rng, budget = generator(case.seed, "inversion"), (rounds, steps, batches_per_step)
        trigger = invert_trigger(case.victim, case.plain, case.target, case.device, rng, *budget, precision)
    if trigger is None:
        raise RunError(
            f"no pixel pattern turns {HIT_RATE:.0%} of the clean images into label {case.target}: it has no backdoor "
            f"that a pattern expresses, or --inversion_steps {steps} is too few; nothing was purified"
        )
    print(f"inverted trigger: {trigger.pixels} pixels, L1 {trigger.l1:.1f}, hit rate {trigger.hit_rate:.1%}")
    return trigger


def noise_around(pattern, rng):
    """p and q, (2, 3, H, W), for a round to start from: the (3, H, W) pattern, and noise near it.

    Elsewhere they are negative, where pattern_of has no gradient: those pixels stay out of the round.
    """
    near = F.max_pool2d((pattern != 0).any(0).float()[None], 2 * REACH + 1, stride=1, padding=REACH) > 0
    noise = NOISE * torch.rand(2, *pattern.shape, generator=rng)
    return torch.where(near, torch.maximum(noise, torch.stack([pattern, -pattern])), -VISIBLE)


def _shrink(victim, stream, target, start, weight, steps, batches_per_step, precision, bar):
    """One round: minimise CE(f_B(x'), target) + c * R with Adam; c rises while the pattern works, falls while not.

    Returns the smallest pattern with a hit rate of HIT_RATE or more, or None.
    """
    plus, minus = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.Adam([plus, minus], lr=0.1, betas=(0.5, 0.9))
    patience = max(1, int(PATIENCE * steps))
    best, best_size = None, float("inf")
    above = below = 0
    for _ in range(steps):
        hits, seen, sizes = (torch.zeros((), device=start.device) for _ in range(3))
        for images, labels in itertools.islice(stream, batches_per_step):
            images = images[labels != target]
            if not len(images):
                continue
            wanted = labels.new_full((len(images),), target)
            with autocast(start.device, precision):
                logits = victim((images + pattern_of(plus, minus)).clamp(0, 1))
                size = size_of(plus, minus)
                loss = F.cross_entropy(logits, wanted) + weight * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits, seen, sizes = hits + (logits.argmax(1) == target).sum(), seen + len(images), sizes + size.detach()
        hit_rate, size = (hits / seen).item(), (sizes / batches_per_step).item()

        if hit_rate >= HIT_RATE and size < best_size:
            found = pattern_of(plus, minus).detach()
            found = Trigger(torch.where(found.abs() < VISIBLE, 0.0, found), hit_rate)
            if best is None or found.pixels < best.pixels:
                best, best_size = found, size
        above, below = (above + 1, 0) if hit_rate >= HIT_RATE else (0, below + 1)
        if above == patience:
            weight, above = weight * RAISE, 0
        if below == patience:
            weight, below = weight / LOWER, 0
        bar.update()
        bar.set_postfix(hit_rate=f"{hit_rate:.1%}", pixels=best and best.pixels)
    return best


def moved_patterns(victim, trigger, batches, target) -> torch.Tensor:
    """The pattern, then what the victim answers to alike of its shifts by up to 2 pixels and its mirror image's.

    Victims are mostly trained on images cropped and flipped at random, poisoned ones among them, and answer to the
    trigger wherever that has moved it: a student cured of one place may keep the others. A victim trained without has
    no such answers, and where its layers stride, one pixel silences the trigger; so the victim is asked.

    Args:
        victim: f_B, frozen and in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches, of which one is asked about, without images of the target.

    Returns:
        (V, 3, H, W), V from 1 to 50; what leaves the image is cut off.
    """
    images, labels = next(iter(batches))
    images = images[labels != target]
    height, width = trigger.pattern.shape[1:]
    padded = [F.pad(pattern, (MOVES,) * 4) for pattern in (trigger.pattern, trigger.pattern.flip(2))]
    moved = torch.stack(
        [
            pattern[:, down : down + height, right : right + width]
            for pattern in padded
            for down in range(2 * MOVES + 1)
            for right in range(2 * MOVES + 1)
        ]
    )
    with torch.no_grad():
        hits = [(victim((images + pattern).clamp(0, 1)).argmax(1) == target).float().mean() for pattern in moved]
    answered = moved[torch.stack(hits) >= ANSWERED]
    return torch.cat([trigger.pattern[None], answered[(answered != trigger.pattern).flatten(1).any(1)]])
