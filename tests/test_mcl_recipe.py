"""What surrounds MCL's training: further rounds, the mirror mean, dropout, and the patterns."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, state_vector
from test_mcl import RECIPE, TRAINING, run_training

from defenses import DefenseResult, mcl
from defenses.inversion import InvertedTrigger, shifted_patterns
from defenses.mcl import clean_finetune, train_student
from utils.batches import CutMixBatches, erase_rectangles
from utils.seed import generator


@pytest.mark.parametrize("remains", [False, True])
def test_a_student_that_answers_to_another_pattern_is_made_anew(make_context, trigger, remains, monkeypatch, capsys):
    other = InvertedTrigger(0.5 * trigger.pattern.flip(1), 1.0)
    rests, used, inverted, shifted = [other, other, other if remains else None], [], [], []
    monkeypatch.setattr("defenses.base.invert_trigger", lambda model, *_: inverted.append(model) or rests.pop(0))
    monkeypatch.setattr("defenses.base.MAX_REMAINING", 1.0)
    monkeypatch.setattr(mcl, "train_student", lambda *args, **_: used.append(args[2]) or train_student(*args, **_))
    monkeypatch.setattr(
        "defenses.base.shifted_patterns", lambda model, found, *_: shifted.append(model) or found.pattern[None]
    )
    result = mcl.defend(make_context(), **{**RECIPE, **TRAINING, "rounds": 3})
    expected = [trigger.pattern, other.pattern, other.pattern]
    assert [len(patterns) for patterns in used] == [1, 2, 3]
    assert torch.equal(used[2], torch.stack(expected))
    assert len(inverted) == 3
    assert len({id(model) for model in shifted[:3]}) == 3  # the victim, and the students that the patterns are from
    assert result.trigger is (other if remains else trigger)
    assert capsys.readouterr().out.count("the student still responds to a pattern") == len(inverted) - (not remains)
    assert not any(parameter.requires_grad for model in inverted for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in result.student.parameters())


def test_a_student_of_a_warp_is_inverted_for_a_warp(make_context, trigger, monkeypatch):
    warp = InvertedTrigger(torch.full((2, 8, 8), 0.1), 1.0)
    monkeypatch.setattr("defenses.base.find_trigger", lambda *_: warp)
    monkeypatch.setattr("defenses.base.invert_warp", lambda *_: warp)
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *_: trigger)
    assert mcl.defend(make_context(), **{**RECIPE, **TRAINING, "rounds": 2}).trigger is warp


def test_a_large_pattern_of_the_student_is_no_rest_of_the_backdoor(make_context, victim, trigger, monkeypatch):
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *_: trigger)
    monkeypatch.setattr("defenses.base.MAX_REMAINING", 4 / 64)
    assert make_context().remaining_trigger(victim, trigger, 1, 1, "fp32") is trigger
    monkeypatch.setattr("defenses.base.MAX_REMAINING", 3 / 64)
    assert make_context().remaining_trigger(victim, trigger, 1, 1, "fp32") is None


@pytest.mark.parametrize(
    ("similarity", "mirrored", "averaged", "erased"),
    [(0.81, True, True, False), (0.79, True, False, True), (0.79, False, False, False)],
)
def test_features_that_keep_their_place_are_erased_and_not_averaged(
    make_context, similarity, mirrored, averaged, erased, monkeypatch
):
    used = []
    monkeypatch.setattr(mcl, "mirror_similarity", lambda *_: similarity)
    monkeypatch.setattr(
        mcl, "train_student", lambda *args, **options: used.append(options) or train_student(*args, **options)
    )
    mcl.defend(make_context(augmented=True, mirrored=mirrored, seed=5), **{**RECIPE, **TRAINING})
    (settings,) = used
    assert settings["mirror"] == averaged
    assert ("distort" in settings) == erased
    if erased:
        assert settings["distort"].keywords["rng"].initial_seed() == generator(5, "erasing").initial_seed()
        assert settings["distort"].func is erase_rectangles


@pytest.mark.parametrize(
    ("count", "positive", "is_victim", "weight"),
    [(1_000, "auto", False, 3), (999, "auto", True, 6), (2_500, "backdoored", True, 3), (20, "finetuned", False, 6)],
)
def test_few_images_keep_the_victims_features(make_context, count, positive, is_victim, weight, monkeypatch):
    used = []
    monkeypatch.setattr(
        mcl, "train_student", lambda *args, **options: used.append((args, options)) or train_student(*args, **options)
    )
    context = make_context(image_count=count)
    mcl.defend(context, **{**RECIPE, **TRAINING, "positive": positive, "align_weight": 3})
    ((given, positive_model, _), options) = used[0]
    assert given.victim is context.victim
    assert (positive_model is context.victim, options["align_weight"]) == (is_victim, weight)


@pytest.mark.parametrize(
    ("count", "augmented", "mixed"), [(999, True, True), (1_000, True, False), (999, False, False)]
)
def test_few_images_are_mixed_for_the_student(make_context, batches, count, augmented, mixed, monkeypatch):
    used = []

    def record(context, *args, **options):
        used.append(context.train_batches)
        return train_student(context, *args, **options)

    monkeypatch.setattr(mcl, "train_student", record)
    mcl.defend(make_context(image_count=count, augmented=augmented, target=2, seed=5), **{**RECIPE, **TRAINING})
    assert isinstance(used[0], CutMixBatches) == mixed
    if mixed:
        assert (used[0].batches, used[0].label) == (batches, 2)
        assert used[0].rng.initial_seed() == generator(5, "cutmix").initial_seed()
    else:
        assert used[0] is batches


def test_lower_rates_are_judged_by_the_inverted_trigger(make_context, trigger, monkeypatch):
    used, train = [], mcl.train_student_gently
    monkeypatch.setattr(
        mcl, "train_student_gently", lambda *args, **options: used.append(args) or train(*args, **options)
    )
    context = make_context(augmented=False)
    mcl.defend(context, **{**RECIPE, **TRAINING, "positive": "backdoored"})
    ((*models, patterns, judge),) = used
    assert models == [context, context.victim]
    assert torch.equal(patterns, trigger.patterns)
    assert judge is trigger


@pytest.mark.parametrize(("count", "variance"), [(999, 0.1), (1_000, 1.0)])
def test_few_images_move_the_biases_less(make_context, batches, trigger, count, variance, monkeypatch):
    used = []
    monkeypatch.setattr(mcl, "calibrate", lambda student, *args, variance: used.append((*args, variance)))
    mcl.defend(make_context(image_count=count, augmented=False), **{**RECIPE, **TRAINING, "calibration": "bias"})
    ((patterns, *rest),) = used
    assert torch.equal(patterns, trigger.patterns)
    assert rest == [batches, 1, variance]


@pytest.mark.parametrize(
    ("cosines", "rates_on", "align_weight", "trained", "returned"),
    [
        ([0.98], [], 1.0, 1, 0),  # close enough at the full rate
        ([0.97, 0.98], [0.0], 1.0, 2, 1),  # at a third
        ([0.5, 0.97, 0.9], [0.0, 0.05], 1.0, 3, 2),  # never: the last one
        ([0.97], [0.11], 1.0, 2, 0),  # the trigger still works at a third
        ([0.97, 0.97], [0.0, 0.2], 1.0, 3, 1),
        ([0.5], [], 0.0, 1, 0),  # nothing holds the features
    ],
)
def test_the_rate_falls_until_clean_features_stay(
    make_context, batches, cosines, rates_on, align_weight, trained, returned, monkeypatch
):
    students, used, compared, tried = [torch.nn.Linear(1, 1) for _ in range(3)], [], [], []
    cosines, rates_on = list(cosines), list(rates_on)
    for student in students:
        student.features = student.forward
    context, positive = make_context(plain_batches=batches[1:]), make_context().victim

    def train(*args, **options):
        used.append((args, options))
        return DefenseResult(students[len(used) - 1], [len(used) - 1])

    class Trigger(InvertedTrigger):
        def excess_on(self, *args):
            tried.append(args)
            return rates_on.pop(0)

    monkeypatch.setattr(mcl, "CLEAN_SIMILARITY", 0.98)
    monkeypatch.setattr(mcl, "train_student", train)
    monkeypatch.setattr(mcl, "mean_cosine", lambda *args: compared.append(args) or cosines.pop(0))
    options = {"lr": 0.9, "align_weight": align_weight, "mirror": True}
    result = mcl.train_student_gently(context, positive, "patterns", Trigger(None, 1.0), **options)
    assert (result[0] is students[returned], result[1]) == (True, [returned])
    assert [args for args, _ in used] == [(context, positive, "patterns")] * trained
    assert [settings for _, settings in used] == [{**options, "lr": pytest.approx(0.9 / 3**i)} for i in range(trained)]
    assert compared[-1] == (students[returned].features, positive.features, batches[1:])
    assert tried == [(student, context.victim, batches[1:], 1) for student in students[1:trained]]
    assert (cosines, rates_on) == ([], [])


def test_mean_cosine_by_hand():
    batches = [(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), None), (torch.tensor([[0.0, 2.0]]), None)]
    cosine = mcl.mean_cosine(lambda x: x, lambda x: x * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, -1.0]), batches)
    assert cosine == pytest.approx((0.5**0.5 + 0 - 1) / 3)


def test_mirror_similarity_by_hand(victim, batches):
    expected = [
        F.cosine_similarity(victim.features(x)[i], victim.features(x.flip(3))[i], dim=0)
        for x, _ in batches
        for i in range(8)
    ]
    assert mcl.mirror_similarity(victim, batches) == pytest.approx(torch.stack(expected).mean().item())


def test_dropout_is_off_in_fine_tuning_and_in_the_student(victim, trigger, batches):
    head = victim.network.fc
    victim.network.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), head).eval()
    victim.head_name = "fc.1"
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        positive = clean_finetune(victim, batches, CPU, mirror=False, **TRAINING)
        results.append((positive, run_training(victim, trigger, batches, positive)[0]))
    for first, second in zip(*results, strict=True):
        assert torch.equal(state_vector(first), state_vector(second))


def test_the_inversion_uses_images_without_augmentation(make_context, victim, batches, trigger, monkeypatch):
    calls = []
    monkeypatch.setattr("defenses.base.find_trigger", lambda *args: calls.append(args) or trigger)
    context = make_context(plain_batches=batches[1:], seed=7, target=2)
    assert context.invert(4, 3, 2, "fp32") is trigger
    assert calls == [(victim, batches[1:], 2, CPU, 7, 4, 3, 2, "fp32")]


def test_the_trigger_is_shifted_if_images_are_augmented_and_the_victim_responds(make_context, trigger, batches):
    class CornerVictim(torch.nn.Module):
        """Predicts 1 if one of the last two pixels of the last row is white."""

        def forward(self, x):
            white = x[:, :, 7, 6:].amin(1).amax(1)
            return torch.stack([torch.full_like(white, 0.999), white], 1)

    dark = [(0.5 * images, torch.zeros_like(labels)) for images, labels in batches]
    context = make_context(victim=CornerVictim(), train_batches=[], plain_batches=dark)
    patterns = context.training_patterns(trigger)
    assert torch.equal(patterns[0], trigger.pattern)
    assert torch.equal(patterns, shifted_patterns(CornerVictim(), trigger, dark, 1))
    assert len(patterns) > 1
    assert torch.equal(context._replace(augmented=False).training_patterns(trigger), trigger.pattern[None])
    waves = InvertedTrigger(trigger.pattern, 1.0, -trigger.pattern[None])
    assert torch.equal(context.training_patterns(waves), torch.stack([trigger.pattern, -trigger.pattern]))
