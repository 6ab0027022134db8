"""What the scripts hand from one step to the next: models, data, labels and names."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, MODEL
from slow_triggers import TinyModel
from test_target_search import SMALL
from test_triggers import make_attack, random_images

import config
import main
import train_badnet
from attacks import Attack
from data_loader import Batches, TensorImages, get_backdoor_loader
from defenses.inversion import ANY_OTHER
from train_badnet import load_surrogate, train_victim
from utils.datasets import ImageSet
from utils.distributed import ONE_PROCESS, Processes
from utils.errors import UserError
from utils.shapes import draw_shapes

NOT_FLAGGED = dataclasses.replace(SMALL, index=0.0)


def test_the_purified_model_is_retuned(run_with, monkeypatch):
    retuned, saved = [], []
    monkeypatch.setattr(main, "get_retuning_batches", lambda *_: {5: []})
    monkeypatch.setattr(main, "measure_retuned", lambda model, *_: retuned.append(model) or {})
    monkeypatch.setattr(main, "save_purified", lambda path, results, model, metadata: saved.append(model))
    run_with("--retune", "5", "--print_freq", "0")
    assert retuned == saved != [None]


def test_weights_on_which_the_inverted_trigger_works_are_not_saved(run_with, monkeypatch, tmp_path):
    monkeypatch.setattr(main, "measure_inverted", lambda *_: {"inverted_hit_rate": None, "purified": False})
    run_with("--print_freq", "0")
    assert not list(tmp_path.rglob("*.tar"))


def test_what_is_reported_is_of_the_saved_model(run_with, monkeypatch):
    measured, saved, evaluate = [], [], main.evaluate
    monkeypatch.setattr(main, "evaluate", lambda model, *rest: measured.append(model) or evaluate(model, *rest))
    monkeypatch.setattr(main, "save_purified", lambda path, results, model, metadata: saved.append(model))
    run_with("--print_freq", "0")
    assert measured[1:] == saved != measured[:1]


def test_the_clean_split_and_the_monitor_are_of_training_images(run_with, monkeypatch):
    given, monitored, draw, make = [], [], main.get_clean_split, main.make_monitor

    def record(opt, data, *rest):
        given.append((data, draw(opt, data, *rest)))
        return given[-1][1]

    monkeypatch.setattr(main, "get_clean_split", record)
    monkeypatch.setattr(main, "make_monitor", lambda images, *rest: monitored.append(images) or make(images, *rest))
    run_with("--print_freq", "0")
    ((data, split),) = given
    assert torch.equal(data.images, draw_shapes("train")[0])
    assert monitored == [split.monitor_set]


def images_of(classes):
    """A test set of one image."""
    return ImageSet(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["x"] * classes)


@pytest.mark.parametrize(
    ("dataset", "classes", "message"),
    [
        ("CIFAR10", 10, "was trained on shapes, not on CIFAR10"),
        ("shapes", 11, "shapes has 11 classes, but .* was trained on 10"),
    ],
)
def test_a_victim_of_other_data_is_refused(dataset, classes, message):
    opt, explicit = config.parse("main.py", ["--dataset", dataset])
    opt = config.single_run_options(opt, model=MODEL)
    with pytest.raises(UserError, match=message):
        main.load_victim(opt, explicit, images_of(classes), CPU)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Attack("gridTrigger", "all2one", 5, 11, 0.1), "its number of classes is not 10"),
        (Attack("squareTrigger", "all2one", 5, 10, 0.1, {"trig_w": 32, "trig_h": 3}), "needs 4x33 pixels"),
    ],
)
def test_an_attack_that_does_not_fit_the_victim_is_refused(attack, message, monkeypatch):
    checkpoint = main.read_checkpoint(MODEL) | {"attack": attack.state()}
    monkeypatch.setattr(main, "read_checkpoint", lambda _: checkpoint)
    opt, explicit = config.parse("main.py", ["--dataset", "shapes"])
    with pytest.raises(UserError, match=message):
        main.load_victim(config.single_run_options(opt, model=MODEL), explicit, images_of(10), CPU)


@pytest.mark.parametrize(
    ("words", "label"), [(["--target", "any"], ANY_OTHER), (["--target", "3"], 3), (["--defense", "ft"], None)]
)
def test_a_given_label_is_not_searched_for(words, label):
    opt, _ = config.parse("main.py", words)
    assert main.label_to_defend(opt, None, None, 10, CPU, None) == (label, None)


@pytest.mark.parametrize(
    ("scores", "target", "detected", "against"),
    [([SMALL], 1, 1, 1), ([SMALL], ANY_OTHER, "any", "any"), ([NOT_FLAGGED], 1, None, 1), (None, 1, None, 1)],
)
def test_a_label_that_was_not_flagged_was_not_detected(scores, target, detected, against):
    opt = SimpleNamespace(model=MODEL, defense="mcl")
    row = main.run_metrics(opt, {}, target, scores, None)
    assert (row["detected_label"], row["worked_against"]) == (detected, against)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "WRN-16-1-badnet"),
        (["--inject_portion", "0"], "WRN-16-1-clean"),
        (["--target_type", "all2all"], "WRN-16-1-all2all"),
        (["--trigger_type", "blendTrigger"], "WRN-16-1-blend"),
        (["--trigger_type", "blendTrigger", "--target_type", "all2all"], "WRN-16-1-blend-all2all"),
    ],
)
def test_each_attack_has_a_victim_of_its_own(words, name):
    assert train_badnet.victim_name(config.parse("train_badnet.py", words)[0]) == name


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--trigger_type", "clTrigger"], True),
        (["--trigger_type", "clTrigger", "--inject_portion", "0"], False),
        (["--trigger_type", "trojanTrigger", "--inject_portion", "0"], True),
        ([], False),
    ],
)
def test_what_needs_a_clean_model_gets_one(words, needed, monkeypatch):
    monkeypatch.setattr(train_badnet, "load_clean_model", lambda *_: "clean")
    opt, _ = config.parse("train_badnet.py", words)
    assert train_badnet.load_surrogate(opt, 10, (32, 32), CPU) == ("clean" if needed else None)


def test_the_loss_is_that_of_the_network_of_all_processes():
    seen = []
    opt, _ = config.parse("train_badnet.py", ["--arch", "WRN-10-1", "--epochs", "1", "--inject_portion", "0"])
    data = TensorImages(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.arange(4))
    attack, run = Attack("gridTrigger", "all2one", 5, 10, 0.0), SimpleNamespace(read=lambda *_: None)
    processes = SimpleNamespace(is_main=False, wrap=lambda model: lambda x: seen.append(len(x)) or model(x))
    train_badnet.train_victim(opt, attack, Batches(data, 2, CPU), None, torch.zeros(0), processes, CPU, run)
    assert seen == [2, 2]


def test_each_process_has_its_part_of_each_batch(images, monkeypatch):
    monkeypatch.setattr(Processes, "from_main", lambda self, make: make())
    opt, _ = config.parse("train_badnet.py", ["--dataset", "shapes", "--batch_size", "4"])
    train, attack = ImageSet(images, torch.arange(8) % 4, list("abcd")), Attack("gridTrigger", "all2one", 0, 4, 0.5)
    assert get_backdoor_loader(opt, train, attack, "cpu", processes=Processes(1, 2))[0].shard == (1, 2)


def test_the_attackers_data_is_perturbed_with_the_clean_model():
    data, labels = random_images(8), torch.full((8,), 2)
    opt, _ = config.parse("train_badnet.py", ["--dataset", "shapes", "--batch_size", "4"])
    attack = make_attack("clTrigger", rate=1.0, epsilon=8)
    _, _, poisoned = get_backdoor_loader(opt, ImageSet(data, labels, list("abcde")), attack, "cpu", TinyModel())
    assert poisoned.tolist() == list(range(8))  # without the model, the noise has nothing to follow


def test_the_command_that_trains_a_clean_model_is_of_the_same_data():
    words = ["--dataset", "folder", "--data_root", "my data", "--image_size", "16", "--num_class", "5"]
    words += ["--trigger_type", "trojanTrigger", "--surrogate", "nowhere.tar"]
    opt, _ = config.parse("train_badnet.py", words)
    expected = "--dataset folder --num_class 5 --data_root 'my data' --image_size 16 --inject_portion 0"
    with pytest.raises(UserError, match=expected):
        load_surrogate(opt, 5, (16, 16), CPU)


def test_a_training_resumes_on_the_same_labels_alone():
    class Run:
        def read(self, data, tensors):
            raise UserError(f"{data.tolist()}")

    opt, _ = config.parse("train_badnet.py", ["--arch", "WRN-10-1", "--inject_portion", "0"])
    data = TensorImages(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([3, 0, 2, 1]))
    attack, poisoned = Attack("gridTrigger", "all2one", 5, 10, 0.0), torch.zeros(0, dtype=torch.int64)
    for positions in (poisoned, torch.tensor([7])):
        expected = [*positions.tolist(), 3, 0, 2, 1]
        with pytest.raises(UserError, match=re.escape(str(expected))):
            train_victim(opt, attack, Batches(data, 4, CPU), None, positions, ONE_PROCESS, CPU, Run())
