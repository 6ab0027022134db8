"""What used to end in a traceback, or in a wrong result, far from where the input was wrong."""

import re
import shutil
import sys

import pytest
import torch
from conftest import MODEL, FixedBatches
from test_inversion import RedPixelVictim
from torch import nn

import config
import main
from attacks import Attack
from defenses import purify
from defenses.inversion.patterns import PixelForm
from defenses.inversion.target_search import search_form
from docs import draw_attacks, two_backdoors
from train_badnet import load_surrogate, train_victim
from utils.batches import Batches, TensorImages
from utils.datasets import ImageSet
from utils.distributed import ONE_PROCESS
from utils.errors import UserError

CPU = torch.device("cpu")


def test_batches_of_the_target_class_alone_do_not_hide_a_backdoor():
    images = torch.rand(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    others, of_target = ((images, torch.full((32,), label)) for label in (0, 1))
    form, size = PixelForm((3, 6, 6)), {}
    for name, batches in {"balanced": [others] * 20, "mixed": ([others] + [of_target] * 3) * 20}.items():
        rng, batches = torch.Generator().manual_seed(1), FixedBatches(batches)
        scores = search_form(RedPixelVictim(), batches, 2, CPU, rng, form, len(batches), "fp32")
        size[name] = scores[1].size
    assert size["mixed"] < 1.5 * size["balanced"]


def test_a_comparison_does_not_replace_a_model_that_it_still_has_to_read(tmp_path, monkeypatch):
    folder = tmp_path / "weight" / "table"
    folder.mkdir(parents=True)
    for path in (tmp_path / "v.tar", folder / "v-ft.tar"):
        shutil.copy(MODEL, path)
    words = ["--dataset", "shapes", "--name", "table", "--checkpoint_root", tmp_path / "weight", "--log_root", tmp_path]
    words += ["--defense", "ft", "fst", "--model", tmp_path / "v.tar", folder / "v-ft.tar"]
    monkeypatch.setattr(main, "run", None)
    with pytest.raises(UserError, match=r"would replace the model .*v-ft\.tar"):
        main.compare(*config.parse("main.py", [str(word) for word in words]), ONE_PROCESS)


def test_weights_of_an_earlier_run_are_not_replaced_in_silence(tmp_path, capsys):
    opt, _ = config.parse("main.py", ["--checkpoint_root", str(tmp_path), "--log_root", str(tmp_path / "results")])
    opt.model = str(tmp_path / "victim.tar")
    (tmp_path / "mine.tar").touch()
    main.check_output(opt, "mine")
    assert "mine.tar is replaced" in capsys.readouterr().out
    main.check_output(opt, "yours")
    assert capsys.readouterr().out == ""
    for opt.model, opt.retune_reference in ((str(tmp_path / "mine.tar"), None), ("x", str(tmp_path / "mine.tar"))):
        with pytest.raises(UserError, match="would replace the model"):
            main.check_output(opt, "mine")


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


def test_a_network_of_one_logit_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 1))
    with pytest.raises(UserError, match="one logit"):
        purify(network, torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), device="cpu")


def test_the_command_that_trains_a_clean_model_is_of_the_same_data():
    words = ["--dataset", "folder", "--data_root", "my data", "--image_size", "16", "--num_class", "5"]
    words += ["--trigger_type", "trojanTrigger", "--surrogate", "nowhere.tar"]
    opt, _ = config.parse("train_badnet.py", words)
    expected = "--dataset folder --num_class 5 --data_root 'my data' --image_size 16 --inject_portion 0"
    with pytest.raises(UserError, match=expected):
        load_surrogate(opt, 5, (16, 16), CPU)


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
