"""Trigger inversion: the smallest pattern that makes a victim answer with one label (Tao et al., CVPR 2022).

Few pixels express most triggers. Where they do not, the pattern is large, or there is none; then a smooth warp is
looked for, and then single waves of brightness.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from defenses.forms import VISIBLE, Pixels, Warp, frequencies, mirror, stamp, waves
from utils.device import autocast
from utils.errors import RunError
from utils.report import progress_bar
from utils.seed import generator

ANY = -1  # in place of a target: any label but an image's own, where a backdoor turns each into another one
HIT_RATE = 0.9  # a pattern counts from this share of images predicted as the target
PATIENCE = 0.1  # share of the steps, in a row above or below it, after which the weight of the size moves
RAISE, LOWER = 1.5, 1.5**1.5
REACH, NOISE = 2, 0.5  # a later round starts with noise up to NOISE, within REACH pixels of the pattern
IDLE_ROUNDS = 2  # rounds in a row without a smaller pattern that end the search
MOVES, ANSWERED = 2, 0.5  # a pattern moved by up to MOVES pixels counts from this share of images
# A pattern is taken for the trigger up to this share of the image's pixels (those to labels without one have twice as
# many), and a warp up to this share of the image's width.
PATCH, SHIFT = 0.03, 0.02
# Images that each wave is tried on, and waves kept: all those that a victim of SIG answers to, 58, cost ACC.
ASKED, MOST_WAVES = 20, 16


@dataclass
class Trigger:
    """An inverted trigger.

    pattern: (3, H, W) or (2, H, W) float, as defenses.forms has it; where it is added, what 8 bits cannot show is 0.
    hit_rate: share 0..1 of images turned in the step of the search that ended with it.
    others: (V, C, H, W), more of them, that the victim answers to alike, or None.
    """

    pattern: torch.Tensor
    hit_rate: float
    others: torch.Tensor | None = None

    @property
    def patterns(self) -> torch.Tensor:
        """All of them, (V, C, H, W)."""
        return self.pattern[None] if self.others is None else torch.cat([self.pattern[None], self.others])

    @property
    def pixels(self) -> int:
        """How many pixels the pattern changes."""
        return int((self.pattern != 0).any(0).sum())

    @property
    def l1(self) -> float:
        """Sum of absolute values over pixels and channels, in units of the full range [0, 1]."""
        return self.pattern.abs().sum().item()

    def stamp(self, image: torch.Tensor) -> torch.Tensor:
        """A (3, H, W) image in [0, 1] with the pattern on it."""
        return stamp(image[None], self.pattern[None].to(image.device))[0]

    def change(self, image: torch.Tensor) -> torch.Tensor:
        """What it does to a (3, H, W) image: the pattern itself where that is added."""
        return self.pattern.to(image.device) if len(self.pattern) == 3 else self.stamp(image) - image

    def describe(self) -> str:
        """What was found, in words."""
        if self.others is not None:
            return f"best of {len(self.patterns)} waves"
        if len(self.pattern) == 2:
            return f"warp by {Warp(self.pattern.shape).extent(self.pattern):.2f} px"
        return f"{self.pixels} px, L1 {self.l1:.1f}"

    def facts(self) -> dict:
        """Plain values for a file; the hit rate in percent."""
        return {"pattern": self.describe(), "hit_rate": 100 * self.hit_rate}


def label_name(target) -> str:
    """How a target is told."""
    return "another label" if target == ANY else f"label {target}"


def turned(logits, labels, target) -> torch.Tensor:
    """(..., B, K) -> (..., B) bool: what is predicted as the target, for ANY as another label than the image's own."""
    answers = logits.argmax(-1)
    return answers != labels if target == ANY else answers == target


def loss_from(logits, labels) -> torch.Tensor:
    """-log(1 - p of the image's own label), (..., K) and (...) -> (...): cross-entropy to ANY."""
    logits = logits.float()  # a difference, which autocast would round away
    others = logits.scatter(-1, labels[..., None], float("-inf"))
    return logits.logsumexp(-1) - others.logsumexp(-1)


def asked(victim, images, labels, target):
    """The images and labels that count: those of other labels; for ANY those that the victim has right as they are."""
    with torch.no_grad():
        counted = victim(images).argmax(1) == labels if target == ANY else labels != target
    return images[counted], labels[counted]


def find_trigger(case, rounds, steps, batches_per_step, precision) -> Trigger:
    """The inverted trigger of a defenses.case.Case, of the first form that fits: a patch, a warp, waves; told, timed.

    A pattern of many pixels, as those that make any model say any label, is the last resort.

    Raises:
        RunError: there is none of any form.
    """
    with case.clock("inversion"):
        rng, budget = generator(case.seed, "inversion"), (steps, batches_per_step, precision)
        trigger = invert_trigger(case.victim, case.plain, case.target, case.device, rng, rounds, *budget)
        if trigger is None or trigger.pixels > PATCH * trigger.pattern[0].numel():
            warp = invert_warp(case.victim, case.plain, case.target, case.device, rng, *budget)
            trigger = warp or find_waves(case.victim, case.plain, case.target) or trigger
    if trigger is None:
        raise RunError(
            f"no pattern turns {HIT_RATE:.0%} of the clean images into {label_name(case.target)}: the victim has no "
            f"backdoor that a pattern expresses, or --inversion_steps {steps} is too few; nothing was purified"
        )
    print(f"inverted trigger: {trigger.describe()}, hit rate {trigger.hit_rate:.1%}")
    return trigger


def invert_trigger(victim, batches, target, device, rng, rounds, steps, batches_per_step, precision="fp32"):
    """Find the smallest pattern d with f_B(clamp(x + d, 0, 1)) = target.

    The first round is the published search, from noise all over the image. It often ends in two halves of a trigger,
    far apart, where one would do; so each further round sets noise around what is left and shrinks it again.

    Args:
        victim: f_B, frozen and in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches, gone through again and again; images of the target itself are left out.
        target: the label, 0..K-1, or ANY.
        rng: where p and q of each round come from, U[0, 1).
        rounds: at most so many; the search ends sooner once IDLE_ROUNDS in a row found no smaller pattern.
        steps: of a round, each of `batches_per_step` updates.

    Returns:
        the best Trigger, or None where no step of the first round reached a hit rate of 0.9: there is no such pattern.
    """
    form = Pixels(next(iter(batches))[0].shape[1:])
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    start, weight = form.start(1, rng), form.first_weight
    best, idle = None, 0
    with progress_bar("invert", rounds * steps, "step") as bar:
        shrink = partial(_shrink, victim, stream, target, form, steps, batches_per_step, precision, bar)
        for _ in range(rounds):
            found = shrink(start.to(device), weight)
            smaller = found and (best is None or found.pixels < best.pixels)
            best, idle = (found, 0) if smaller else (best, idle + 1)
            if best is None or idle == IDLE_ROUNDS:
                break
            start, weight = noise_around((found or best).pattern.cpu(), rng)[None], form.weight
    return best


def noise_around(pattern, rng):
    """p and q, (2, 3, H, W), for a round to start from: the (3, H, W) pattern, and noise near it.

    Elsewhere they are negative, where Pixels.pattern has no gradient: those pixels stay out of the round.
    """
    near = F.max_pool2d((pattern != 0).any(0).float()[None], 2 * REACH + 1, stride=1, padding=REACH) > 0
    noise = NOISE * torch.rand(2, *pattern.shape, generator=rng)
    return torch.where(near, torch.maximum(noise, torch.stack([pattern, -pattern])), -VISIBLE)


def invert_warp(victim, batches, target, device, rng, steps, batches_per_step, precision="fp32"):
    """Find the smallest smooth warp after which f_B says the target, in one round; arguments as in invert_trigger.

    Returns:
        the Trigger, or None where there is no warp of SHIFT of the width that reaches a hit rate of 0.9.
    """
    form = Warp(next(iter(batches))[0].shape[1:])
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    with progress_bar("warp", steps, "step") as bar:
        budget = steps, batches_per_step, precision, bar
        found = _shrink(victim, stream, target, form, *budget, form.start(1, rng).to(device), form.first_weight)
    return found if found and form.extent(found.pattern) <= SHIFT * form.largest else None


def find_waves(victim, batches, target):
    """Try each single wave of brightness (defenses.forms.waves) on the first ASKED images that count.

    Returns:
        a Trigger of the best MOST_WAVES of those that reach a hit rate of 0.9, the best first, or None where none does.
    """
    few = itertools.chain.from_iterable(zip(*asked(victim, *batch, target), strict=True) for batch in batches)
    few = list(itertools.islice(few, ASKED))
    if not few:
        return None
    images, labels = (torch.stack(parts) for parts in zip(*few, strict=True))
    size, found, rates = images.shape[2:], [], []
    with torch.no_grad(), progress_bar("waves", len(frequencies(size)), "wave") as bar:
        for frequency in frequencies(size):
            patterns = waves(size, frequency, images.device)
            stamped = (images + patterns[:, None]).clamp(0, 1).flatten(0, 1)
            answers = victim(stamped.contiguous(memory_format=torch.channels_last)).view(len(patterns), len(images), -1)
            rate = turned(answers, labels, target).float().mean(1)
            found.append(patterns[rate >= HIT_RATE])
            rates.append(rate[rate >= HIT_RATE])
            bar.update()
    rates, order = torch.cat(rates).sort(descending=True, stable=True)
    patterns = torch.cat(found)[order[:MOST_WAVES]]
    return Trigger(patterns[0], rates[0].item(), patterns[1:]) if len(patterns) else None


def _shrink(victim, stream, target, form, steps, batches_per_step, precision, bar, start, weight):
    """One round: minimise CE(f_B(x'), target) + c * size with Adam; c rises while the pattern works, falls while not.

    Returns the smallest pattern with a hit rate of HIT_RATE or more, or None.
    """
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], form.lr, betas=(0.5, 0.9))
    patience = max(1, int(PATIENCE * steps))
    best, best_size = None, float("inf")
    above = below = 0
    for _ in range(steps):
        hits, seen, sizes = (torch.zeros((), device=start.device) for _ in range(3))
        for images, labels in itertools.islice(stream, batches_per_step):
            images, labels = asked(victim, images, labels, target)
            if not len(images):
                continue
            with autocast(start.device, precision):
                logits = victim(stamp(images, form.pattern(parameters)))
                size = form.size(parameters).sum()
                if target == ANY:
                    loss = loss_from(logits, labels).mean()
                else:
                    loss = F.cross_entropy(logits, torch.full_like(labels, target))
                loss = loss + weight * size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hits, seen, sizes = hits + turned(logits, labels, target).sum(), seen + len(images), sizes + size.detach()
        hit_rate, size = (hits / seen).item(), (sizes / batches_per_step).item()

        if hit_rate >= HIT_RATE and size < best_size:
            found = Trigger(form.shown(parameters.detach())[0], hit_rate)
            if best is None or form.extent(found.pattern) < form.extent(best.pattern):
                best, best_size = found, size
        above, below = (above + 1, 0) if hit_rate >= HIT_RATE else (0, below + 1)
        if above == patience:
            weight, above = weight * RAISE, 0
        if below == patience:
            weight, below = weight / LOWER, 0
        bar.update()
        bar.set_postfix(hit_rate=f"{hit_rate:.1%}", found=best and best.describe())
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
        (V, C, H, W), V from 1 to 50; what leaves the image is cut off.
    """
    images, labels = asked(victim, *next(iter(batches)), target)
    height, width = trigger.pattern.shape[1:]
    padded = [F.pad(pattern, (MOVES,) * 4) for pattern in (trigger.pattern, mirror(trigger.pattern))]
    moved = torch.stack(
        [
            pattern[:, down : down + height, right : right + width]
            for pattern in padded
            for down in range(2 * MOVES + 1)
            for right in range(2 * MOVES + 1)
        ]
    )
    with torch.no_grad():
        hits = [turned(victim(stamp(images, pattern[None])), labels, target).float().mean() for pattern in moved]
    answered = moved[torch.stack(hits) >= ANSWERED]
    return torch.cat([trigger.pattern[None], answered[(answered != trigger.pattern).flatten(1).any(1)]])
