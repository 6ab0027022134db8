"""Trigger inversion: the smallest pattern that makes a victim predict the target label (Tao et al., CVPR 2022).

Few pixels express most triggers. If they do not, the pattern is large or there is none; a smooth warp is tried next,
then single waves of brightness.
"""

import itertools

import torch
import torch.nn.functional as F

from defenses.inversion.objective import (
    HIT_RATE,
    PenaltyWeight,
    attackable_images,
    attackable_parts,
    endless,
    hits_and_losses,
    is_hit,
    label_name,
    pattern_logits,
)
from defenses.inversion.patterns import VISIBLE, PixelForm, WarpForm, apply_patterns, frequencies, mirror, waves
from defenses.inversion.trigger import InvertedTrigger
from utils.device import autocast
from utils.errors import RunError
from utils.progress import progress_bar
from utils.seed import generator

PATIENCE = 0.1  # fraction of the steps, in a row above or below HIT_RATE, after which the penalty's weight moves
NOISE, NOISE_RADIUS = 0.5, 2  # height of the noise in a later round, and its distance in pixels to the last pattern
IDLE_ROUNDS = 2  # rounds in a row without a smaller pattern that end the inversion
MAX_SHIFT, SHIFT_HIT_RATE = 2, 0.5  # a pattern shifted by up to 2 pixels is kept from this hit rate on
# Limits up to which a pattern is taken for the trigger: a fraction of the image's pixels (the shipped clean
# model's patterns have 34 or more of 1,024), and for a warp a fraction of the image's width.
MAX_PATCH, MAX_WARP = 0.03, 0.02
# Further parts of a trigger, the size of each, a fraction of the pixels, and its rounds: parts of two grid triggers
# have up to 5 of 1,024; what is left once the paper's victim has lost its whole trigger has 18 and more.
MAX_PARTS, MAX_PART, PART_ROUNDS = 3, 0.01, 2
# Images that each wave is tried on, first and in all, and waves kept: all 58 of a SIG victim would cost accuracy.
FIRST_WAVE_IMAGES, WAVE_IMAGES, MAX_WAVES = 5, 20, 16


def find_trigger(victim, batches, target, device, seed, rounds, steps, batches_per_step, precision):
    """Invert the trigger in the first form that fits: a patch and its further parts, a warp, waves.

    A pattern of many pixels, such as makes any model predict any label, is the last resort. Arguments as in
    invert_trigger; seed fixes the draws.

    Raises:
        RunError: no form reaches a hit rate of 0.9.
    """
    rng, budget = generator(seed, "inversion"), (steps, batches_per_step, precision)
    trigger = invert_trigger(victim, batches, target, device, rng, rounds, *budget)
    if trigger is None or trigger.area > MAX_PATCH:
        warp = invert_warp(victim, batches, target, device, rng, *budget)
        trigger = warp or find_waves(victim, batches, target) or trigger
    if trigger is None:
        raise RunError(
            f"no pattern turns {HIT_RATE:.0%} of the clean images into {label_name(target)}: either the model has no "
            f"backdoor of a known form, or --inversion_steps {steps} is too small; nothing was purified"
        )
    print(f"inverted trigger: {trigger.describe()}, hit rate {trigger.hit_rate:.1%}")
    trigger.parts = find_parts(victim, batches, target, device, seed, trigger, *budget)
    return trigger


def find_parts(victim, batches, target, device, seed, trigger, *budget) -> list[torch.Tensor]:
    """Other parts of a trigger of few pixels, and all of them together: (3, H, W) patterns.

    A victim responds to a part of its trigger, which is all that the smallest pattern shows of it, and a student that
    ignores this part alone soon relearns the backdoor. So the victim is inverted again, without the pixels found, until
    a pattern is too large for a part. Arguments as in find_trigger.
    """
    rng, patterns = generator(seed, "parts"), [trigger.pattern]
    for _ in range(MAX_PARTS if trigger.area <= MAX_PATCH else 0):
        unchanged = (torch.stack(patterns) == 0).flatten(0, 1).all(0)
        part = invert_trigger(victim, batches, target, device, rng, PART_ROUNDS, *budget, free=unchanged)
        if part is None or part.area > MAX_PART:
            break
        patterns.append(part.pattern)
    if len(patterns) == 1:
        return []
    together = torch.stack(patterns).sum(0)
    print(f"{len(patterns) - 1} further parts; all together {InvertedTrigger(together, trigger.hit_rate).describe()}")
    return [*patterns[1:], together]


def invert_trigger(victim, batches, target, device, rng, rounds, steps, batches_per_step, precision="fp32", free=None):
    """Find the smallest pattern d with f_B(clamp(x + d, 0, 1)) = target.

    The first round is the published inversion, from noise all over the image. It often ends in two halves of a trigger,
    far apart, where one would do. So each further round puts noise around the last pattern and shrinks it again.

    Args:
        victim: f_B, frozen, in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches with an image_shape, repeated without end; images of the target class
            are left out.
        target: the label, 0..K-1, or ANY_OTHER.
        rng: source of the start of each round.
        rounds: maximum; the inversion ends after IDLE_ROUNDS rounds in a row without a smaller pattern.
        steps: per round; each takes `batches_per_step` batches, with an update for every MICRO_BATCH images.
        free: (H, W) bool, the pixels that the pattern may change; None: all.

    Returns:
        the best InvertedTrigger, or None if no step of the first round reaches a hit rate of 0.9.
    """
    form, stream, budget = PixelForm(batches.image_shape), endless(batches), (steps, batches_per_step, precision)
    start, weight = form.start(1, rng).to(device), form.first_weight
    best, idle_rounds = None, 0
    for _ in range(rounds):
        start = start if free is None else torch.where(free, start, -VISIBLE)  # the others have no gradient
        found = optimise_pattern(victim, stream, target, form, start, weight, *budget)
        is_smaller = found and (best is None or found.pixels < best.pixels)
        best, idle_rounds = (found, 0) if is_smaller else (best, idle_rounds + 1)
        if best is None or idle_rounds == IDLE_ROUNDS:
            break
        start, weight = noise_around((found or best).pattern.cpu(), rng)[None].to(device), form.weight
    return best


def noise_around(pattern, rng):
    """Start of a later round, p and q as (2, 3, H, W): the (3, H, W) pattern, and noise near it.

    Elsewhere they are negative, where PixelForm.pattern has no gradient: those pixels stay out of the round.
    """
    size = 2 * NOISE_RADIUS + 1
    near = F.max_pool2d((pattern != 0).any(0).float()[None], size, stride=1, padding=NOISE_RADIUS) > 0
    noise = NOISE * torch.rand(2, *pattern.shape, generator=rng)
    return torch.where(near, torch.maximum(noise, torch.stack([pattern, -pattern])), -VISIBLE)


def invert_warp(victim, batches, target, device, rng, steps, batches_per_step, precision="fp32"):
    """Find the smallest smooth warp that makes f_B predict the target, in one round; arguments as in invert_trigger.

    Returns:
        the InvertedTrigger, or None if no warp within MAX_WARP of the width reaches a hit rate of 0.9.
    """
    form, budget = WarpForm(batches.image_shape), (steps, batches_per_step, precision)
    start = form.start(1, rng).to(device)
    found = optimise_pattern(victim, endless(batches), target, form, start, form.first_weight, *budget)
    return found if found and form.extent(found.pattern) <= MAX_WARP * form.max_norm else None


@torch.no_grad()
def find_waves(victim, batches, target):
    """Try each single wave of brightness on the first WAVE_IMAGES attackable images.

    Returns:
        an InvertedTrigger of the best MAX_WAVES waves with a hit rate of 0.9, best first, or None if there is none.
    """
    attackable = (zip(*attackable_images(victim, *batch, target), strict=True) for batch in batches)
    samples = list(itertools.islice(itertools.chain.from_iterable(attackable), WAVE_IMAGES))
    if not samples:
        return None
    images, labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
    size, found, rates = images.shape[2:], [], []
    with progress_bar("waves", len(frequencies(size)), "wave") as bar:
        for frequency in frequencies(size):
            patterns = waves(size, frequency, images.device)
            for count in (FIRST_WAVE_IMAGES, len(images)):  # a wave that has missed too many images can no longer work
                if len(patterns):
                    hits = is_hit(pattern_logits(victim, images[:count], patterns), labels[:count], target).sum(1)
                    can_work = hits + len(images[count:]) >= HIT_RATE * len(images)
                    patterns, hits = patterns[can_work], hits[can_work]
            found.append(patterns)
            rates.append(hits / len(images))
            bar.update()
    rates, order = torch.cat(rates).sort(descending=True, stable=True)
    patterns = torch.cat(found)[order[:MAX_WAVES]]
    return InvertedTrigger(patterns[0], rates[0].item(), patterns[1:]) if len(patterns) else None


def optimise_pattern(victim, stream, target, form, start, weight, steps, batches_per_step, precision):
    """One round: minimise CE(f_B(x'), target) + c * penalty with Adam; c follows PenaltyWeight.

    Returns the smallest pattern with a hit rate of HIT_RATE or more, or None.
    """
    parameters = start.clone().requires_grad_()
    targets = torch.tensor([target], device=start.device)
    optimizer = torch.optim.Adam([parameters], form.lr, betas=(0.5, 0.9))
    penalty_weight = PenaltyWeight(torch.tensor([weight], dtype=torch.float64), max(1, int(PATIENCE * steps)))
    best, lowest_penalty = None, float("inf")
    with progress_bar(f"invert {form.name}", steps, "step") as bar:
        for _ in range(steps):
            hits, seen, penalties = (torch.zeros((), device=start.device) for _ in range(3))
            weight = penalty_weight.value.item()
            for images, labels in attackable_parts(victim, itertools.islice(stream, batches_per_step), target):
                all_attackable = torch.ones(1, len(images), dtype=torch.bool, device=start.device)
                with autocast(start.device, precision):
                    patterns, penalty = form.pattern(parameters), form.penalty(parameters).sum()
                    hit, loss = hits_and_losses(victim, images, labels, all_attackable, patterns, targets)
                    loss = loss.sum() + weight * penalty
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                hits, seen = hits + hit.sum(), seen + len(images)
                penalties += len(images) * penalty.detach()
            hit_rate, penalty = (hits / seen).item(), (penalties / seen).item()

            if hit_rate >= HIT_RATE and penalty < lowest_penalty:
                found = InvertedTrigger(form.quantised(parameters.detach())[0], hit_rate)
                if best is None or form.extent(found.pattern) < form.extent(best.pattern):
                    best, lowest_penalty = found, penalty
            penalty_weight.update(torch.tensor([hit_rate >= HIT_RATE]), torch.tensor([bool(seen)]))
            bar.update()
            bar.set_postfix(hit_rate=f"{hit_rate:.1%}", found=best and best.describe())
    return best


def shifted_patterns(victim, trigger, batches, target) -> torch.Tensor:
    """The pattern, and those of its shifts by up to 2 pixels and of its mirror image's that the victim responds to.

    Most victims are trained on randomly cropped and flipped images, poisoned ones included, and respond to the trigger
    wherever that has moved it. A student purified for one position may keep the others. A victim trained without
    augmentation responds to none of these, so each shift is tried on the victim.

    Args:
        victim: f_B, frozen, in eval mode, on images in [0, 1].
        batches: clean (images, labels) batches; the attackable images of the first one that has any are used.

    Returns:
        (V, C, H, W), V from 1 to 50; what leaves the image is cut off.
    """
    candidates = (attackable_images(victim, *batch, target) for batch in batches)
    images, labels = next(((images, labels) for images, labels in candidates if len(images)), (None, None))
    if images is None:  # all attackable ones are in the last batch, which is left out
        return trigger.pattern[None]
    height, width = trigger.pattern.shape[1:]
    padded = [F.pad(pattern, (MAX_SHIFT,) * 4) for pattern in (trigger.pattern, mirror(trigger.pattern))]
    offsets = list(itertools.product(range(2 * MAX_SHIFT + 1), repeat=2))
    shifted = [pattern[:, down : down + height, right : right + width] for pattern in padded for down, right in offsets]
    with torch.no_grad():
        rates = [
            is_hit(victim(apply_patterns(images, pattern[None])), labels, target).float().mean() for pattern in shifted
        ]
    effective = torch.stack(shifted)[torch.stack(rates) >= SHIFT_HIT_RATE]
    is_new = (effective != trigger.pattern).flatten(1).any(1)
    return torch.cat([trigger.pattern[None], effective[is_new]])
