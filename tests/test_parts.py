"""Other parts of a trigger than the smallest pattern that works: found one after another, and put together."""

import itertools

import pytest
import torch
from conftest import CPU, FixedBatches

from defenses.inversion import InvertedTrigger, find_trigger, invert_trigger
from defenses.inversion import invert as invert_module
from defenses.inversion.invert import find_parts
from utils.seed import generator


@pytest.fixture
def batches():
    rng = torch.Generator().manual_seed(0)
    drawn = [(torch.rand(16, 3, 6, 6, generator=rng), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]
    return FixedBatches(drawn)


class EitherPixelVictim(torch.nn.Module):
    """Predicts 1 if one of some pixels, (row, column), is red without green, else 0."""

    def __init__(self, pixels):
        super().__init__()
        self.rows, self.columns = zip(*pixels, strict=True)

    def forward(self, x):
        logit = 20 * ((x[:, 0] - x[:, 1])[:, self.rows, self.columns].amax(1) - 0.5)
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def pixels_of(pattern):
    return set(map(tuple, pattern.any(0).nonzero().tolist()))


def test_the_parts_of_a_trigger_are_found_one_after_another_and_put_together(batches, monkeypatch):
    monkeypatch.setattr(invert_module, "MAX_PATCH", 3 / 36)
    monkeypatch.setattr(invert_module, "MAX_PART", 3 / 36)
    victim, pixels = EitherPixelVictim([(0, 0), (1, 1), (2, 0)]), {(0, 0), (1, 1), (2, 0)}
    budget = 50, 4, "fp32"
    trigger = invert_trigger(victim, batches, 1, CPU, generator(1, "inversion"), 2, *budget)
    assert len(pixels_of(trigger.pattern) & pixels) == 1
    *parts, together = find_parts(victim, batches, 1, CPU, 1, trigger, *budget)
    found = [pixels_of(pattern) & pixels for pattern in (trigger.pattern, *parts)]
    assert [len(part) for part in found] == [1, 1, 1]
    assert set().union(*found) == pixels
    assert torch.equal(together, trigger.pattern + sum(parts))
    for first, second in itertools.combinations([trigger.pattern, *parts], 2):
        assert not pixels_of(first) & pixels_of(second)  # also none that does not matter
    monkeypatch.setattr(invert_module, "MAX_PARTS", 1)
    assert len(find_parts(victim, batches, 1, CPU, 1, trigger, *budget)) == 2


def test_a_pattern_of_many_pixels_is_no_part_and_has_none(batches, monkeypatch):
    monkeypatch.setattr(invert_module, "MAX_PATCH", 3 / 36)
    arguments = None, batches, 1, CPU, 1
    monkeypatch.setattr(invert_module, "MAX_PART", 2 / 36)
    pattern, large = torch.zeros(3, 6, 6), torch.ones(3, 6, 6)
    pattern[:, 0, :3] = 1
    trigger = InvertedTrigger(pattern, 1.0)
    inversions = []
    monkeypatch.setattr(
        invert_module, "invert_trigger", lambda *_, **__: inversions.append(1) or InvertedTrigger(pattern, 1.0)
    )
    assert find_parts(*arguments, trigger, 1, 1) == []
    assert len(inversions) == 1
    assert find_parts(*arguments, InvertedTrigger(large, 1.0), 1, 1) == []
    assert len(inversions) == 1  # not tried


def test_the_trigger_is_found_with_its_parts(batches, monkeypatch):
    given, parts, pattern = [], [torch.ones(3, 6, 6)], torch.zeros(3, 6, 6)
    monkeypatch.setattr(invert_module, "invert_trigger", lambda *_: InvertedTrigger(pattern, 0.97))
    monkeypatch.setattr(invert_module, "find_parts", lambda *args: given.append(args) or parts)
    found = find_trigger(None, batches, 1, CPU, 3, 2, 4, 5, "bf16")
    assert (found.pattern is pattern, found.hit_rate, found.parts) == (True, 0.97, parts)
    ((*arguments, trigger, steps, batches_per_step, precision),) = given
    assert arguments == [None, batches, 1, CPU, 3]
    assert (trigger.pattern is pattern, steps, batches_per_step, precision) == (True, 4, 5, "bf16")


def test_each_part_has_its_own_number_of_rounds(batches, monkeypatch):
    rounds, pattern = [], torch.zeros(3, 6, 6)
    pattern[0, 0, 0] = 1
    monkeypatch.setattr(invert_module, "invert_trigger", lambda *args, free: rounds.append(args[5:]))
    monkeypatch.setattr(invert_module, "MAX_PATCH", 1)
    assert find_parts(None, batches, 1, CPU, 1, InvertedTrigger(pattern, 1.0), 4, 5, "bf16") == []
    assert rounds == [(invert_module.PART_ROUNDS, 4, 5, "bf16")]


def test_a_trigger_works_if_a_part_of_it_works(batches):
    victim, rising = EitherPixelVictim([(1, 1)]), torch.zeros(3, 6, 6)
    rising[0, 1, 1], rising[1, 1, 1] = 1, -1
    alone, excess = InvertedTrigger(rising, 1.0), InvertedTrigger(rising, 1.0).excess_on(victim, victim, batches, 1)
    assert alone.rate_on(victim, batches, 1) == 1 > excess > 0.5
    for parts in ([rising], [rising, -rising], [-rising, rising]):
        trigger = InvertedTrigger(-rising, 1.0, parts=parts)
        assert trigger.rate_on(victim, batches, 1) == 1
        assert trigger.excess_on(victim, victim, batches, 1) == excess
    assert InvertedTrigger(-rising, 1.0, parts=[-rising]).rate_on(victim, batches, 1) == 0


def test_the_parts_are_in_the_metadata_all_together():
    pattern, together = torch.zeros(3, 6, 6), torch.zeros(3, 6, 6)
    pattern[:, 0, 0], together[:, 0, :2] = 1, 1
    trigger = InvertedTrigger(pattern, 0.9, parts=[pattern.flip(2), together])
    assert trigger.metadata() == {"pattern": "1 px, L1 3.0", "hit_rate": 90.0, "with_parts": "2 px, L1 6.0"}


def test_pixels_that_are_not_free_stay_out_of_every_round(batches, monkeypatch):
    starts, excluded = [], torch.zeros(6, 6, dtype=torch.bool)
    excluded[0, :2] = True

    def optimise_pattern(victim, stream, target, form, start, *_):
        starts.append(start)
        return InvertedTrigger(torch.full((3, 6, 6), 0.5), 1.0)

    monkeypatch.setattr(invert_module, "optimise_pattern", optimise_pattern)
    invert_trigger(None, batches, 1, CPU, generator(1, "inversion"), 2, 1, 1, free=~excluded)
    assert [(start[..., excluded] < 0).all() for start in starts] == [True, True]
    assert [(start[..., ~excluded] >= 0).all() for start in starts] == [True, True]
