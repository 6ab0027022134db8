"""Label modes, the poisoning of a training set, and attacks built from options or restored from checkpoints."""

import pytest
import torch
from conftest import CPU, METADATA
from slow_triggers import TinyModel, make_attack, random_images, slow_signal

import config
from attacks import TRIGGERS, Attack, build_attack
from attacks.attack import TriggerSpec
from attacks.label_consistent import adversarial_noise
from attacks.stated import options_as_used
from data_loader import DatasetBD, get_eval_set
from models import select_model
from utils.checkpoint import load_weights, read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.metrics import evaluate
from utils.seed import generator


@pytest.fixture
def images():
    """Eight random uint8 images of 10 x 11 pixels."""
    return random_images(8)


@pytest.mark.parametrize("target_type", ["all2one", "cleanLabel"])
def test_all2one_and_clean_label_attack_all_classes_but_the_target(target_type):
    labels, attack = torch.tensor([0, 1, 2, 3, 4]), make_attack(target_type=target_type)
    assert attack.attack_labels(labels).tolist() == [2, 2, 2, 2, 2]
    assert attack.attackable(labels).tolist() == [True, True, False, True, True]


def test_all2all_targets_the_next_label():
    labels, attack = torch.tensor([0, 1, 2, 3, 4]), make_attack(target_type="all2all")
    assert attack.attack_labels(labels).tolist() == [1, 2, 3, 4, 0]
    assert attack.attackable(labels).all()


def test_all2all_ignores_the_target_label():
    attack = Attack("gridTrigger", "all2all", 5, 3, 0.1)
    assert attack.attack_labels(torch.tensor([0, 1, 2])).tolist() == [1, 2, 0]


@pytest.mark.parametrize(("target_type", "count"), [("all2one", 4), ("all2all", 4), ("cleanLabel", 1)])
def test_a_training_set_is_poisoned_as_its_label_mode_says(images, target_type, count):
    labels, attack = torch.arange(8) % 5, make_attack(target_type=target_type, rate=0.5)
    dataset = DatasetBD(images, labels, attack, "train", torch.Generator().manual_seed(1))
    assert dataset.poisoned.sum() == count
    for i in range(8):
        image, label = dataset[i]
        poisoned, true_label = dataset.poisoned[i], i % 5
        attack_label = {"all2one": 2, "all2all": (true_label + 1) % 5, "cleanLabel": true_label}[target_type]
        expected = attack.stamp(images[i : i + 1])[0] if poisoned else images[i]
        assert torch.equal(image, expected.permute(2, 0, 1) / 255)
        assert label == (attack_label if poisoned else true_label)
        assert target_type != "cleanLabel" or not poisoned or true_label == 2


def test_sig_is_trained_with_its_training_amplitude(images):
    attack = make_attack("signalTrigger", rate=1.0, train_delta=20.0)
    poisoned, _, _ = attack.poison(images, torch.full((8,), 2), generator(1, ""))
    for original, result in zip(images, poisoned, strict=True):
        expected = original.clone()
        slow_signal(expected, 20)
        assert torch.equal(result, expected)


def test_the_label_consistent_attack_adds_noise_before_the_trigger(images):
    labels, attack = torch.full((8,), 2), make_attack("clTrigger", rate=1.0, epsilon=8)
    noisy = adversarial_noise(images, labels, TinyModel(), 8)
    poisoned, _, _ = attack.poison(images, labels, generator(1, ""), TinyModel())
    assert torch.equal(poisoned, attack.stamp(noisy))


def test_wanet_adds_cover_images_that_keep_their_labels(images):
    labels, attack = torch.arange(8) % 5, make_attack("wanetTrigger", rate=0.25, noise_ratio=2.0)
    result, train_labels, poisoned = attack.poison(images, labels, generator(1, ""))
    changed = (result != images).flatten(1).any(1)
    assert (poisoned.sum(), changed.sum()) == (2, 6)
    assert torch.equal(train_labels[~poisoned], labels[~poisoned])
    assert torch.equal(result[poisoned], attack.stamp(images[poisoned]))
    triggered = (result[changed] == attack.stamp(images[changed])).flatten(1).all(1)
    assert not triggered[~poisoned[changed]].any()


@pytest.mark.parametrize("rate", [0.125, 0.375])
def test_there_are_as_many_cover_images_as_poisoned_ones_by_default(images, rate):
    attack = make_attack("wanetTrigger", rate=rate, noise_ratio=1.0)
    result, _, poisoned = attack.poison(images, torch.arange(8) % 5, generator(1, ""))
    changed = (result != images).flatten(1).any(1)
    assert (poisoned.sum(), (changed & ~poisoned).sum()) == (8 * rate, 8 * rate)


@pytest.mark.parametrize("chunk_size", [3, 4, 8])
def test_the_images_of_a_chunk_do_not_depend_on_its_size(images, chunk_size, monkeypatch):
    attack = make_attack("blendTrigger", rate=1.0)
    expected = attack.stamp(images)
    monkeypatch.setattr("attacks.attack.CHUNK_SIZE", chunk_size)
    assert torch.equal(attack.stamp(images), expected)


def test_too_few_images_for_the_cover_images_are_refused(images):
    attack = make_attack("wanetTrigger", rate=0.5, noise_ratio=2.0)
    with pytest.raises(UserError, match="leaves 4 of 8 images, too few for 8 cover images"):
        attack.poison(images, torch.arange(8) % 5, generator(1, ""))


@pytest.mark.parametrize("target_type", ["all2one", "cleanLabel"])
def test_the_triggered_test_set_leaves_out_the_target_class(images, target_type):
    labels, attack = torch.tensor([2, 0, 1, 2, 3, 4, 2, 0]), make_attack(target_type=target_type)
    triggered = DatasetBD(images, labels, attack, "test")
    assert triggered.labels.tolist() == [2] * 5
    assert triggered.poisoned.all()
    assert torch.equal(triggered.images, attack.stamp(images[[1, 2, 4, 5, 7]]))


@pytest.mark.parametrize("trigger_type", sorted(set(TRIGGERS) - {"clTrigger"}))
def test_the_generator_fixes_the_poisoning(images, trigger_type):
    labels, training = torch.full((8,), 2), {"noise_ratio": 1.0} if trigger_type == "wanetTrigger" else {}

    def poison(seed):
        attack = make_attack(trigger_type, seed=seed, **training)
        return DatasetBD(images, labels, attack, "train", generator(seed, "poison"))

    first, same, other = poison(1), poison(1), poison(2)
    assert torch.equal(first.images, same.images)
    assert torch.equal(first.poisoned, same.poisoned)
    assert not torch.equal(first.images, other.images)


def test_a_poison_rate_of_zero_poisons_nothing(images):
    labels = torch.arange(8) % 5
    for trigger_type in TRIGGERS:
        clean = DatasetBD(images, labels, make_attack(trigger_type, rate=0.0), "train", generator(1, ""))
        assert torch.equal(clean.images, images)
        assert torch.equal(clean.labels, labels)
        assert not clean.poisoned.any()


@pytest.mark.parametrize("trigger_type", TRIGGERS)
def test_a_saved_victim_and_its_attack_measure_the_same(images, trigger_type, tmp_path):
    attack, labels, path = make_attack(trigger_type), torch.arange(8) % 5, str(tmp_path / "a.tar")
    torch.manual_seed(0)
    victim, loaded = select_model("WRN-10-1", 5), select_model("WRN-10-1", 5)
    save_checkpoint(path, victim, **METADATA, attack=attack.state())
    checkpoint = read_checkpoint(path)
    load_weights(loaded, checkpoint["state_dict"], path, "WRN-10-1")
    restored = Attack.from_state(checkpoint["attack"])
    assert torch.equal(attack.stamp(images), restored.stamp(images))
    assert restored.describe() == attack.describe()
    before = evaluate(victim, get_eval_set(images, labels, attack, CPU), attack)
    after = evaluate(loaded, get_eval_set(images, labels, restored, CPU), restored)
    assert before == after


def test_a_checkpoint_without_tensors_and_training_options_is_read():
    state = make_attack().state()
    del state["tensors"], state["training_options"]  # fields that older checkpoints lack
    assert Attack.from_state(state).tensors == {}


@pytest.mark.parametrize("trigger_type", sorted(set(TRIGGERS) - {"trojanTrigger", "imageTrigger"}))
def test_the_defaults_of_each_trigger_make_an_attack(trigger_type):
    opt, _ = config.parse("train_badnet.py", ["--trigger_type", trigger_type])
    attack = build_attack(opt, 10, (32, 32))
    assert attack.target_type == config.ATTACKS[trigger_type]["target_type"]
    assert attack.inject_portion == config.POISON_RATES[attack.target_type]
    assert set(attack.training_options) == set(TRIGGERS[trigger_type].training)
    opt, _ = config.parse("main.py", ["--trigger_type", trigger_type])
    black = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(build_attack(opt, 10, (32, 32)).stamp(black), attack.stamp(black))


@pytest.mark.parametrize("script", ["train_badnet.py", "main.py"])
def test_a_new_trigger_needs_a_function_an_entry_and_its_values(images, script, monkeypatch):
    def stripe_trigger(images, stripe_h):
        triggered = images.clone()
        triggered[:, :stripe_h] = 255
        return triggered

    values = {"name": "stripe", "target_type": "all2one", "options": {"stripe_h": 2}}
    monkeypatch.setitem(TRIGGERS, "stripeTrigger", TriggerSpec(stripe_trigger, {"stripe_h": int}))
    monkeypatch.setitem(config.ATTACKS, "stripeTrigger", values)
    for argv, height in (([], 2), (["--stripe_h", "4"], 4)):
        opt, _ = config.parse(script, ["--trigger_type", "stripeTrigger", *argv])
        attack = build_attack(opt, 10, (10, 11))
        assert torch.equal(attack.stamp(images), stripe_trigger(images, height))
        assert torch.equal(Attack.from_state(attack.state()).stamp(images), attack.stamp(images))


def test_a_checkpoint_states_the_attack_that_is_used():
    opt, attack = config.parse("main.py", [])[0], make_attack("blendTrigger", target_type="all2all")
    opt.model = "file"
    stated = {"arch": "WRN-10-1", "num_class": 5, "normalization": "numbers", "attack": attack.state()}
    used = options_as_used(opt, set(), stated)
    assert (used.arch, used.num_class, used.normalize) == ("WRN-10-1", 5, "numbers")
    assert (used.trigger_type, used.target_type, used.target_label) == ("blendTrigger", "all2all", None)
    assert used.opacity == attack.trigger_options["opacity"]
    assert used.delta is None
    for name, message in {"opacity": "its attack, blendTrigger, all2all; leave", "arch": "its arch, WRN-10-1;"}.items():
        with pytest.raises(UserError, match=f"file states {message}.*--{name}"):
            options_as_used(opt, {name}, stated)
    assert options_as_used(opt, set(), {}).trigger_type is None
    assert options_as_used(opt, {"trigger_type"}, {}).trigger_type == opt.trigger_type


def test_an_attack_refuses_invalid_values():
    with pytest.raises(UserError, match="not one of the labels 0..4"):
        make_attack(target_label=5)
    with pytest.raises(UserError, match="no trigger named"):
        Attack("gridTriger", "all2one", 2, 5, 0.1)
    with pytest.raises(UserError, match="signalTrigger works only with --target_type cleanLabel, not all2one"):
        make_attack("signalTrigger", "all2one")


def test_a_data_set_that_the_attack_does_not_fit_is_refused(images):
    with pytest.raises(UserError, match="poisons none"):
        DatasetBD(images, torch.arange(8) % 5, make_attack(rate=0.1), "train", torch.Generator())
    with pytest.raises(UserError, match="no training image has the label 2; choose another --target_label"):
        attack = make_attack("signalTrigger", "cleanLabel", rate=0.1)
        DatasetBD(images, torch.ones(8, dtype=torch.int64), attack, "train", torch.Generator())
    with pytest.raises(UserError, match="only 5 classes"):
        DatasetBD(images, torch.arange(8), make_attack(), "test")


def test_a_trojan_patch_is_not_built_without_a_clean_model():
    opt, _ = config.parse("main.py", ["--trigger_type", "trojanTrigger"])
    with pytest.raises(UserError, match="another patch in every victim"):
        build_attack(opt, 10, (32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 3}, "cannot be read"),
        ({"target_label": "2"}, "cannot be read"),
        ({"target_label": 2.0}, "must be an integer"),
        ({"num_class": 6}, "its number of classes is not 5, that of the model"),
        ({"trigger_options": {}}, r"takes the options \(opacity\), not \(\)"),
        ({"trigger_options": {"opacity": "much"}}, "opacity of blendTrigger must be a number"),
        ({"trigger_options": {"opacity": 2.0}}, "must be at most 1"),
        ({"trigger_options": {"opacity": 0}}, "leaves images unchanged"),
        ({"tensors": {}}, r"takes the tensors \(picture\), not \(\)"),
        ({"tensors": {"picture": [1]}}, "must be a torch.uint8 tensor"),
        ({"tensors": {"picture": torch.zeros(4, 4, 3)}}, "must be a torch.uint8 tensor"),
        ({"tensors": {"picture": torch.zeros(4, 4, 4, dtype=torch.uint8)}}, r"of shape \(any, any, 3\)"),
        ({"tensors": {"picture": torch.zeros(0, 4, 3, dtype=torch.uint8)}}, "must not be empty"),
    ],
)
def test_an_invalid_attack_in_a_checkpoint_is_refused(change, message):
    with pytest.raises(UserError, match=f"the checkpoint's attack .*{message}"):
        Attack.from_state({**make_attack("blendTrigger").state(), **change}, num_class=5)
