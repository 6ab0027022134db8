"""docs/draw_attacks.py and docs/two_backdoors.py: what they do with unusual input."""

import sys

import pytest
import torch

from docs import draw_attacks, two_backdoors
from utils.datasets import ImageSet
from utils.errors import UserError


def small_set(*_):
    """Two images of label 5 and one of label 1."""
    return ImageSet(torch.zeros(3, 16, 16, 3, dtype=torch.uint8), torch.tensor([5, 5, 1]), list("abcdefghij"))


def test_too_few_images_for_the_sheet_of_attacks_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_attacks, "load_images", small_set)
    monkeypatch.setattr(sys, "argv", ["draw_attacks", str(tmp_path / "a.png"), "--dataset", "shapes"])
    with pytest.raises(UserError, match="3 images of label 5 are needed"):
        draw_attacks.main()


def test_a_rate_of_zero_still_shows_the_attack(monkeypatch):
    rates = []
    monkeypatch.setattr(
        draw_attacks, "load_images", lambda *_: ImageSet(torch.zeros(3, 16, 16, 3), torch.full((3,), 5), [])
    )
    monkeypatch.setattr(draw_attacks, "apply_attack", lambda opt, *_: rates.append(opt.inject_portion))
    monkeypatch.setattr(draw_attacks, "draw_sheet", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["draw_attacks", "a.png", "--dataset", "shapes", "--inject_portion", "0"])
    draw_attacks.main()
    assert set(rates) == {1.0}


def test_a_victim_of_two_backdoors_gets_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(two_backdoors, "train_and_save", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["two_backdoors", str(tmp_path / "new" / "two.tar"), "--dataset", "shapes"])
    two_backdoors.main()
    assert (tmp_path / "new" / "two.png").exists()
