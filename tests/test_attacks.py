"""Triggers and label modes against slow, per-image versions written from their definitions."""

import pytest
import torch

from attacks import Attack
from data_loader import DatasetBD
from utils.errors import UserError


def attack_of(trigger_type="gridTrigger", target_type="all2one", target_label=2, rate=0.5, **sizes):
    return Attack(trigger_type, target_type, target_label, 5, rate, sizes)


def test_grid_overwrites_the_last_nine_pixels_with_the_checker(images):
    stamped = attack_of().stamp(images)
    for before, after in zip(images, stamped, strict=True):
        expected = before.clone()
        for row, values in zip((5, 6, 7), ((0, 0, 255), (0, 255, 0), (255, 0, 255)), strict=True):
            for column, value in zip((5, 6, 7), values, strict=True):
                for channel in range(3):
                    expected[row, column, channel] = value
        assert torch.equal(after, expected)


def test_square_is_white_and_one_pixel_from_the_corner(images):
    stamped = attack_of("squareTrigger", trig_w=2, trig_h=3).stamp(images)
    for before, after in zip(images, stamped, strict=True):
        expected = before.clone()
        for row in (4, 5, 6):
            for column in (5, 6):
                expected[row, column] = 255
        assert torch.equal(after, expected)


def test_stamping_leaves_its_input_alone(images):
    before = images.clone()
    attack_of().stamp(images)
    assert torch.equal(images, before)


def test_a_trigger_larger_than_the_image_is_refused(images):
    with pytest.raises(UserError, match="takes 9x3 pixels"):
        attack_of("squareTrigger", trig_w=2, trig_h=8).stamp(images)


def test_label_modes():
    labels = torch.tensor([0, 1, 2, 3, 4])
    assert attack_of().wanted(labels).tolist() == [2, 2, 2, 2, 2]
    assert attack_of().counts(labels).tolist() == [True, True, False, True, True]
    assert attack_of(target_type="all2all").wanted(labels).tolist() == [1, 2, 3, 4, 0]
    assert attack_of(target_type="all2all").counts(labels).all()


@pytest.mark.parametrize("target_type", ["all2one", "all2all"])
def test_poisoned_set_image_by_image(images, target_type):
    labels, attack = torch.arange(8) % 5, attack_of(target_type=target_type, rate=0.5)
    poisoned = DatasetBD(images, labels, attack, "train", torch.Generator().manual_seed(1))
    assert poisoned.poisoned.sum() == 4
    for i in range(8):
        image, label = poisoned[i]
        stamped = attack.stamp(images[i : i + 1])[0] if poisoned.poisoned[i] else images[i]
        wanted = {"all2one": 2, "all2all": (i % 5 + 1) % 5}[target_type] if poisoned.poisoned[i] else i % 5
        assert torch.equal(image, stamped.permute(2, 0, 1) / 255)
        assert label == wanted
    assert torch.equal(poisoned.true_labels, labels)


def test_test_set_leaves_out_exactly_the_target_class(images):
    labels = torch.tensor([2, 0, 1, 2, 3, 4, 2, 0])
    triggered = DatasetBD(images, labels, attack_of(), "test")
    assert triggered.true_labels.tolist() == [0, 1, 3, 4, 0]
    assert triggered.labels.tolist() == [2] * 5
    assert torch.equal(triggered.images, attack_of().stamp(images[[1, 2, 4, 5, 7]]))


def test_poisoning_is_fixed_by_its_generator(images):
    draws = [
        DatasetBD(images, torch.zeros(8, dtype=torch.int64), attack_of(), "train", torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0].poisoned, draws[1].poisoned)
    assert not torch.equal(draws[0].poisoned, draws[2].poisoned)


def test_what_makes_no_attack_is_refused(images):
    with pytest.raises(UserError, match="not one of 0..4"):
        attack_of(target_label=5)
    with pytest.raises(UserError, match="no trigger named"):
        attack_of("gridTriger")
    with pytest.raises(UserError, match="poisons none"):
        DatasetBD(images, torch.arange(8) % 5, attack_of(rate=0.1), "train", torch.Generator())
    with pytest.raises(UserError, match="only 5 classes"):
        DatasetBD(images, torch.arange(8), attack_of(), "test")
