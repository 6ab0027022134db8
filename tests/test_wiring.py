"""What each part hands to the next: victims, students, batches, patterns, seeds, options, the order of the steps."""

import copy

import pytest
import torch
from conftest import CPU, FixedBatches, state_vector
from slow_triggers import TinyModel, random_images
from test_defenses import RECIPES
from test_inversion import RedColumnsVictim, label_zero
from test_last_layer import FixedFeatures
from test_mcl import ONE_STEP, RECIPE, TRAINING
from test_purify import IMAGES, LABELS, MODEL, AlwaysPredicts, CountingTrigger, purify_module
from test_training import Scalar, run

import config
import main
from attacks import Attack, build_attack, label_consistent
from attacks.blended import blend_picture
from attacks.label_consistent import adversarial_noise
from data_loader import CleanSplit, DatasetCL, get_clean_split
from defenses import DefenseContext, DefenseResult, base, ibau, last_layer, mcl, nc, purify, remove_backdoors
from defenses.inversion import InvertedTrigger, PatternApplier, objective, shifted_patterns
from defenses.inversion import invert as invert_module
from defenses.inversion import trigger as trigger_module
from defenses.inversion.invert import find_waves
from defenses.inversion.patterns import frequencies, waves
from defenses.last_layer import calibrate, make_blind, trigger_directions
from defenses.nc import trigger_some
from utils.datasets import ImageSet
from utils.seed import generator
from utils.training import train


def test_what_each_step_is_given_and_in_which_order(make_context, victim, batches, trigger, monkeypatch):
    patterns, calls = torch.cat([trigger.patterns, -trigger.patterns]), []

    def record(name, result=None):
        return lambda *args, **options: calls.append((name, *args, *([options] if options else []))) or result

    monkeypatch.setattr(DefenseContext, "training_patterns", lambda *_: patterns)
    monkeypatch.setattr("defenses.base.find_trigger", lambda *args: calls.append(("invert", *args[5:])) or trigger)
    for name, result in (("clean_finetune", victim), ("mirror_similarity", 1.0), ("trigger_directions", "directions")):
        monkeypatch.setattr(mcl, name, record(name, result))
    for name in ("make_blind", "calibrate"):
        monkeypatch.setattr(mcl, name, record(name))
    context = make_context(plain_batches=FixedBatches(batches[1:]))
    options = {"inversion_rounds": 4, "inversion_steps": 5, "inversion_batches": 6, "calibration": "bias", "rounds": 1}
    options |= {"precision": "bf16", "weight_decay": 0.1}
    sgd = {"ema": 0.5, "momentum": 0.0, "weight_decay": 0.1, "schedule": "cosine", "precision": "bf16"}
    student = mcl.defend(context, **{**RECIPE, **ONE_STEP, **options}).student
    train, plain = context.train_batches, context.plain_batches
    assert calls == [
        ("clean_finetune", victim, train, CPU, {"mirror": True, "epochs": 1, "lr": 0.1, **sgd}),
        ("mirror_similarity", victim, plain),
        ("invert", 4, 5, 6, "bf16"),
        ("trigger_directions", victim, patterns, plain, 1),
        ("make_blind", student, "directions", train, 1),
        ("calibrate", student, patterns, plain, 1, {"variance": 1.0}),
    ]


def test_each_student_starts_from_the_victim_and_is_the_one_that_is_inverted(make_context, trigger, monkeypatch):
    made, inverted, train_student = [], [], mcl.train_student

    def record(context, *args, **options):
        made.append((context.victim, train_student(context, *args, **options)))
        return made[-1][1]

    monkeypatch.setattr(mcl, "train_student", record)
    monkeypatch.setattr(
        DefenseContext, "remaining_trigger", lambda _, student, *__: inverted.append(student) or trigger
    )
    context = make_context(augmented=False)
    mcl.defend(context, **{**RECIPE, **ONE_STEP, "rounds": 2, "positive": "backdoored"})
    assert [victim is context.victim for victim, _ in made] == [True, True]
    assert inverted == [result.student for _, result in made]


def test_every_pattern_has_its_turn_in_training(make_context, victim, batches, monkeypatch):
    patterns, seen, features = torch.zeros(16, 3, 8, 8), [], type(victim).features
    patterns[8:] = 1

    def record(self, images):
        if self is victim:
            seen.append(bool((images == 1).all()))
        return features(self, images)

    monkeypatch.setattr(type(victim), "features", record)
    settings = {"temperature": 0.5, "align_weight": 1.0, "mirror": False, "target": None, "ema": 0.0, **TRAINING}
    mcl.train_student(make_context(train_batches=batches[:2]), victim, patterns, **{**settings, "epochs": 1})
    assert seen == [False, False, False, True]  # of each batch, the clean and the triggered images


def test_every_pattern_has_its_turn_in_the_last_layer(victim, batches, trigger, monkeypatch):
    monkeypatch.setattr(last_layer, "DIRECTIONS", 64)
    patterns = torch.stack([trigger.pattern.roll((i // 4, 2 * i), (1, 2)) for i in range(16)])
    add_trigger = PatternApplier(patterns)
    triggered = [(add_trigger(x), y) for x, y in batches]
    pairs = zip(batches, triggered, strict=True)
    shift = torch.cat([(victim.features(t) - victim.features(x))[y != 1] for (x, y), (t, _) in pairs])
    found = trigger_directions(victim, patterns, batches, 1)
    assert torch.allclose((shift @ found.T).square().sum(), shift.square().sum(), rtol=1e-4)
    model = copy.deepcopy(victim)
    calibrate(model, patterns, batches, 1)
    images = torch.cat([x for x, _ in batches] + [t[y != 1] for t, y in triggered])
    labels = torch.cat([y for _, y in batches] + [y[y != 1] for _, y in batches])
    excess = model(images).softmax(1).sum(0) - torch.stack([(labels == label).sum() for label in range(3)])
    assert torch.allclose(excess, victim.head.bias - model.head.bias, atol=3e-3)


def test_nc_unlearns_every_shift_of_the_trigger(make_context, monkeypatch):
    patterns, used = torch.stack([torch.full((3, 8, 8), i / 10) for i in range(5)]), []
    monkeypatch.setattr("defenses.base.shifted_patterns", lambda *_: patterns)
    black = torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr(nc, "trigger_some", lambda x, add: used.append(add(black)[:, 0, 0, 0]) or x)
    nc.defend(make_context(), **{**RECIPES["nc"], "epochs": 1})
    assert torch.cat(used).mul(10).round().tolist() == [0, 1, 2, 3, 4, 0]


def test_each_round_perturbs_the_student_anew(make_context, monkeypatch):
    given, worst = [], ibau.worst_perturbation
    monkeypatch.setattr(ibau, "worst_perturbation", lambda model, *args: given.append(model) or worst(model, *args))
    student = ibau.defend(make_context(), epochs=2, lr=0.01, precision="fp32").student
    assert given == [student, student]


def test_verify_searches_the_purified_model(make_context, victim, trigger, monkeypatch):
    student, searched = copy.deepcopy(victim), []
    student.head.bias.data += 1
    monkeypatch.setattr(purify_module, "run_defense", lambda *_: DefenseResult(student, [], trigger))
    monkeypatch.setattr(purify_module, "find_target", lambda model, *_: searched.append(model) or (None, [], ""))
    remove_backdoors("mcl", make_context(), {"verify": True}, None, 3)
    assert torch.equal(state_vector(searched[0]), state_vector(student))


def test_one_of_several_triggers_that_works_is_enough_to_fail(monkeypatch):
    triggers = {1: CountingTrigger(0.0), 2: CountingTrigger(0.5)}
    monkeypatch.setattr(purify_module, "remove_backdoors", lambda *_: (AlwaysPredicts(2), [], triggers))
    result = purify(MODEL, IMAGES, LABELS, target=1, device="cpu")
    assert (result.model, result.purified) == (None, False)


def test_the_worst_of_several_triggers_is_reported():
    class Trigger(InvertedTrigger):
        def rate_on(self, model, batches, label):
            return model[label]

        def excess_on(self, model, victim, batches, label):
            assert victim is models["before"]
            return model[label]

    models = {"before": {1: 1.0, 2: 0.75}, "after": {1: 0.0, 2: 0.5}}
    expected = {"inverted_hit_rate": {"before": 75.0, "after": 50.0}, "purified": False}
    assert main.measure_inverted(models, dict.fromkeys((1, 2), Trigger(None, 1.0)), None) == expected
    assert main.measure_inverted(models, {}, None) == {"inverted_hit_rate": None, "purified": None}


def test_a_run_hands_its_data_and_options_to_the_defense(monkeypatch):
    given = []
    monkeypatch.setattr(main, "remove_backdoors", lambda *args: given.append(args))
    opt, _ = config.parse("main.py", ["--dataset", "GTSRB", "--seed", "7", "--augment", "none", "--precision", "bf16"])
    split = CleanSplit("train", "plain", "search", range(5), None)
    main.defend(opt, "victim", split, 3, 43, CPU, "clock", "monitor")
    context = DefenseContext("victim", "train", "plain", False, 5, CPU, 7, "clock", 3, "monitor", False)
    assert given == [("mcl", context, vars(opt), "search", 43, "bf16")]


def test_the_seed_draws_the_clean_split_and_its_batches():
    images, labels = torch.zeros(200, 8, 8, 3, dtype=torch.uint8), torch.arange(200) % 10
    opt, _ = config.parse("main.py", ["--dataset", "shapes", "--seed", "3"])
    attack = Attack("gridTrigger", "all2one", 0, 10, 0.1)
    split = get_clean_split(opt, ImageSet(images, labels, list("0123456789")), attack, CPU)
    assert torch.equal(split.index, DatasetCL(images, labels, opt.ratio, generator(3, "split")).index)
    for batches, purpose in (
        (split.train, "batches"),
        (split.plain, "plain batches"),
        (split.search, "search batches"),
    ):
        assert batches.rng.initial_seed() == generator(3, purpose).initial_seed()


def test_the_seed_draws_the_picture_of_an_attack():
    opt, _ = config.parse("train_badnet.py", ["--trigger_type", "blendTrigger", "--seed", "3"])
    expected = blend_picture((8, 8), generator(3, "blendTrigger"))["picture"]
    assert torch.equal(build_attack(opt, 10, (8, 8)).tensors["picture"], expected)


def test_every_epoch_is_in_training_mode_whatever_the_monitor_does():
    model, modes = Scalar(), []
    settings = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32", "title": "test"}

    def loss_of(x, _):
        modes.append(model.training)
        return model.weight * x

    batches, monitor = [(torch.tensor(1.0), None)], lambda model, _: model.eval() and {}
    train(model, batches, loss_of, CPU, epochs=2, lr=0.1, monitor=monitor, **settings)
    assert modes == [True, True]


def test_the_model_that_is_monitored_is_the_averaged_one():
    model, measured = Scalar(), []
    run(model, [(torch.tensor(1.0), None)] * 2, ema=0.75, monitor=lambda m, _: measured.append(m.weight.item()) or {})
    assert measured == [pytest.approx(model.weight.item())]


def test_momentum_is_nesterovs():
    model = Scalar()
    run(model, [(torch.tensor(1.0), None)] * 2, momentum=0.5, schedule="constant")
    assert model.weight.item() == pytest.approx(-0.1 * ((1 + 0.5 * 1) + (1 + 0.5 * 1.5)))


def test_the_surrogate_sees_images_from_0_to_1():
    class Bounded(TinyModel):
        def forward(self, x):
            assert 0 <= x.min() and 0.5 < x.max() <= 1
            return super().forward(x)

    adversarial_noise(random_images(8), torch.arange(8) % 5, Bounded(), 8)


@pytest.mark.parametrize("limit", [3, 5])
def test_the_best_waves_that_work_are_kept(limit, monkeypatch):
    first, second = (waves((8, 8), frequency, CPU) for frequency in frequencies((8, 8))[:2])
    hits = dict(zip([*first, *second], (17, 18, 20, 19, 0, 0, 0, 20), strict=True))  # of the 20 images, the last ones
    tried = []

    def pattern_logits(victim, images, patterns):
        tried.append((len(images), len(patterns)))
        counts = [
            next((count for wave, count in hits.items() if torch.equal(wave, pattern)), 0) for pattern in patterns
        ]
        is_hit = torch.arange(len(images)) >= 20 - torch.tensor(counts)[:, None]
        return torch.stack([~is_hit, is_hit], 2).float()

    monkeypatch.setattr(invert_module, "pattern_logits", pattern_logits)
    monkeypatch.setattr(invert_module, "MAX_WAVES", limit)
    trigger = find_waves(None, label_zero(torch.zeros(25, 3, 8, 8)), 1)
    assert torch.equal(trigger.patterns, torch.stack([first[2], second[3], first[3], first[1]][:limit]))
    assert trigger.hit_rate == 1
    assert tried[:5] == [(5, 4), (20, 3), (5, 4), (20, 1), (5, 4)]  # those that cannot work any more are left out


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 3)])
def test_a_shift_is_kept_if_it_turns_half_of_the_images(count, kept):
    class OfSome(RedColumnsVictim):
        def forward(self, x):
            return super().forward(x) * torch.stack([torch.ones(len(x)), x[:, 2, 0, 0]], 1)

    pattern, images = torch.zeros(3, 6, 6), torch.zeros(4, 3, 6, 6)
    pattern[0, 2, 4], images[:count, 2, 0, 0] = 1.0, 1.0
    assert len(shifted_patterns(OfSome([4]), InvertedTrigger(pattern, 1.0), label_zero(images), 1)) == kept


def test_the_biases_count_in_what_blindness_costs(monkeypatch):
    monkeypatch.setattr(last_layer, "MAX_COST", 0.0)
    model = FixedFeatures([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    model.head.bias.data = torch.tensor([0.0, 1.0])
    images = torch.tensor([[-1.0, 0.0, 0.0]] * 4)[:, :, None, None]
    assert make_blind(model, torch.eye(3)[:1], [(images, torch.ones(4, dtype=torch.int64))], 1) is True


def test_a_student_is_inverted_on_images_without_augmentation(make_context, victim, batches, trigger, monkeypatch):
    given = []
    monkeypatch.setattr("defenses.base.invert_trigger", lambda *args: given.append(args[1]))
    context = make_context(plain_batches=FixedBatches(batches[1:]))
    context.remaining_trigger(victim, trigger, 1, 1, "fp32")
    assert given[0] is context.plain_batches


def test_the_first_round_has_the_lighter_penalty(batches, victim, monkeypatch):
    weights, found = [], InvertedTrigger(torch.ones(3, 8, 8), 1.0)
    monkeypatch.setattr(invert_module, "optimise_pattern", lambda *args: weights.append(args[5]) or found)
    invert_module.invert_trigger(victim, batches, 1, CPU, generator(0, ""), 2, 1, 1)
    assert weights == [1e-3, 1e-2]


def test_the_limits_that_were_chosen_by_measurements():
    assert (mcl.CLEAN_SIMILARITY, mcl.MIRROR_SIMILARITY, mcl.MAX_GRADIENT) == (0.98, 0.8, 0.05)
    assert (last_layer.DIRECTIONS, last_layer.MAX_COST) == (4, 0.02)
    assert (base.REMAINING_ROUNDS, label_consistent.STEPS, objective.MICRO_BATCH) == (2, 100, 16)
    assert (base.MAX_REMAINING, invert_module.MAX_PATCH, invert_module.MAX_WARP) == (0.05, 0.03, 0.02)
    assert (objective.HIT_RATE, trigger_module.MAX_EXCESS, purify_module.MIN_MOMENTUM) == (0.9, 0.1, 0.1)
    assert (invert_module.MAX_PARTS, invert_module.MAX_PART, invert_module.PART_ROUNDS) == (3, 0.01, 2)
    assert [config.DEFENSES["mcl"][name] for name in ("rounds", "contrast", "calibration")] == [3, "others", "bias"]


def test_small_batches_have_the_trigger_too():
    assert trigger_some(torch.zeros(2, 3, 2, 2), lambda images: images + 1).mean() == 0.5
