"""What a DefenseContext hands to the inversion."""

import torch
from conftest import state_vector
from test_defenses import ONE_STEP, RECIPES

from defenses import nc
from defenses.base import REMAINING_ROUNDS
from utils.seed import generator

CPU = torch.device("cpu")


def test_nc_inverts_with_its_own_budget_and_returns_the_trigger(make_context, batches, trigger, monkeypatch):
    given = []
    monkeypatch.setattr("defenses.base.find_trigger", lambda *args: given.append(args) or trigger)
    budget = {"inversion_rounds": 2, "inversion_steps": 3, "inversion_batches": 4, "precision": "bf16"}
    context = make_context()
    assert nc.defend(context, **{**RECIPES["nc"], **ONE_STEP, **budget}).trigger is trigger
    assert given == [(context.victim, batches, 1, CPU, 0, 2, 3, 4, "bf16")]


def test_a_student_is_inverted_with_the_images_and_the_label_of_its_victim(make_context, victim, batches, monkeypatch):
    given = []
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *args: given.append(args))
    assert make_context(seed=3, target=2).remaining_trigger(victim, 5, 6, "bf16") is None
    ((student, *rest, rng, rounds, steps, batches_per_step, precision),) = given
    assert torch.equal(state_vector(student), state_vector(victim))
    assert rest == [batches, 2, CPU]
    assert (rounds, steps, batches_per_step, precision) == (REMAINING_ROUNDS, 5, 6, "bf16")
    assert rng.initial_seed() == generator(3, "remaining").initial_seed()
