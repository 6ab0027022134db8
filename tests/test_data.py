"""Batches against a slow crop and flip, the poisoned and the clean set, and the readers."""

import argparse
from contextlib import nullcontext

import pytest
import torch
from PIL import Image

import config
from attacks import Attack, UnknownAttack
from data_loader import (
    Batches,
    DatasetBD,
    DatasetCL,
    TensorImages,
    get_backdoor_loader,
    get_clean_split,
    get_normalization,
    load_images,
)
from utils.datasets import NORMALIZATION, ImageSet
from utils.distributed import Processes
from utils.errors import UserError
from utils.seed import generator


def test_plain_batches_are_the_images_in_order(images):
    labels = torch.arange(8)
    batches = list(Batches(TensorImages(images, labels), 3, "cpu"))
    assert [len(y) for _, y in batches] == [3, 3, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), images.permute(0, 3, 1, 2) / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


def crops_equal_to(image, original):
    """(row, column, flipped) of every crop of the padded original, flipped or not, that is the image."""
    padded = torch.zeros(3, 16, 16)
    padded[:, 4:12, 4:12] = original.permute(2, 0, 1) / 255
    places = [(row, column) for row in range(9) for column in range(9)]
    crops = {place: padded[:, place[0] : place[0] + 8, place[1] : place[1] + 8] for place in places}
    straight = [(*place, False) for place in places if torch.equal(image, crops[place])]
    return straight + [(*place, True) for place in places if torch.equal(image, crops[place].flip(2))]


@pytest.mark.parametrize("mirror", [True, False])
def test_augmented_batches_are_crops_and_flips_of_the_padded_image(images, mirror):
    data, augment = TensorImages(images, torch.arange(8)), {"padding": 4, "mirror": mirror, "rng": generator(1, "")}
    batches = Batches(data, 8, "cpu", shuffle=True, **augment)
    seen = set()
    for _ in range(20):
        for batch, labels in batches:
            for image, label in zip(batch, labels, strict=True):
                matches = crops_equal_to(image, images[label])
                assert matches
                seen.update(matches)
    assert {flipped for *_, flipped in seen} == {False, mirror}
    assert {row for row, *_ in seen} == {column for _, column, _ in seen} == set(range(9))


def test_each_epoch_has_every_image_once_in_a_new_order(images):
    batches = Batches(TensorImages(images, torch.arange(8)), 3, "cpu", shuffle=True, rng=generator(1, "order"))
    first, second = (torch.cat([y for _, y in batches]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_a_repeated_epoch_has_every_image_as_often(images):
    settings = {"shuffle": True, "padding": 1, "drop_last": True, "repeat": 3}
    batches = Batches(TensorImages(images, torch.arange(8)), 5, "cpu", **settings, rng=generator(1, "order"))
    labels = [y for _, y in batches]
    assert len(labels) == len(batches) == 4  # of 24 images, 4 are left out
    order = torch.cat(labels).tolist()
    assert sorted(order[:8]) == sorted(order[8:16]) == list(range(8))
    assert order[:8] != order[8:16]


def test_the_image_shape_costs_no_draw(images):
    batches = Batches(TensorImages(images, torch.arange(8)), 3, "cpu", shuffle=True, rng=generator(1, "order"))
    before = batches.rng.get_state()
    assert batches.image_shape == (3, 8, 8)
    assert torch.equal(batches.rng.get_state(), before)


def test_a_small_clean_split_is_repeated_to_an_epoch_of_1280_images():
    images, attack = torch.zeros(200, 8, 8, 3, dtype=torch.uint8), Attack("gridTrigger", "all2one", 0, 10, 0.1)
    train_set, opt = ImageSet(images, torch.arange(200) % 10, list("0123456789")), options("--dataset", "shapes")
    opt.batch_size, opt.augment, opt.ratio = 64, "none", 0.1
    split = get_clean_split(opt, train_set, attack, "cpu")
    assert [len(y) for _, y in split.train] == [64] * 20
    assert [len(y) for _, y in split.plain] == [20]  # a batch is no larger than the split


def test_drop_last(images):
    batches = Batches(TensorImages(images, torch.arange(8)), 3, "cpu", drop_last=True)
    assert len(batches) == len(list(batches)) == 2


def test_the_clean_split_is_a_random_fraction_fixed_by_the_seed(images):
    splits = [DatasetCL(images, torch.arange(8), 0.5, generator(seed, "split")) for seed in (1, 1, 2)]
    assert all(len(set(split.index.tolist())) == 4 for split in splits)
    assert torch.equal(splits[0].index, splits[1].index)
    assert not torch.equal(splits[0].index, splits[2].index)
    assert torch.equal(splits[0].images, images[splits[0].index])
    assert torch.equal(splits[0].labels, splits[0].index)
    image, label = splits[0][0]
    assert torch.equal(image, images[label].permute(2, 0, 1) / 255)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, 0.1])
def test_a_ratio_outside_0_to_1_or_without_images_is_refused(images, ratio):
    with pytest.raises(UserError):
        DatasetCL(images, torch.arange(8), ratio, generator(1, "split"))


@pytest.mark.parametrize(("count", "least"), [(3, 1), (4, 1), (20, 6), (60, 10)])
def test_a_number_of_clean_images_is_balanced(count, least):
    labels = torch.arange(60).clamp(max=11) % 3  # 10, 10 and 40 images
    labels[:30] = torch.arange(30) % 3
    split = DatasetCL(torch.zeros(60, 2, 2, 3), labels, 0.05, generator(1, "split"), count)
    counts = labels[split.index].bincount(minlength=3)
    assert len(set(split.index.tolist())) == len(split) == count
    assert counts.min() == least
    other = DatasetCL(torch.zeros(60, 2, 2, 3), labels, 0.05, generator(2, "split"), count)
    assert not torch.equal(split.index, other.index)
    with pytest.raises(UserError, match="--clean 61 needs more images than the 60"):
        DatasetCL(torch.zeros(60, 2, 2, 3), labels, 0.05, generator(1, "split"), 61)


@pytest.mark.parametrize("labels", [torch.arange(5000) // 500, torch.arange(5000) % 10])
def test_the_monitor_set_covers_classes_in_any_order(labels):
    images = torch.zeros(5000, 8, 8, 3, dtype=torch.uint8)
    train, attack = ImageSet(images, labels, list("0123456789")), Attack("gridTrigger", "all2one", 0, 10, 0.1)
    opt = options("--dataset", "shapes")
    opt.batch_size, opt.augment = 64, "none"
    assert get_clean_split(opt, train, attack, "cpu").monitor_set.labels.bincount().min() > 70
    searched, other = (get_clean_split(opt, train, attack, "cpu") for _ in range(2))
    list(searched.search)  # the target search has a generator of its own
    assert all(torch.equal(x[1], y[1]) for x, y in zip(searched.train, other.train, strict=True))
    opt.inject_portion = 0.1
    counts = get_backdoor_loader(opt, train, attack, "cpu")[1].labels.bincount()
    assert (counts.sum(), counts.min() > 70) == (1_000, True)
    with pytest.raises(UserError, match="--batch_size 64 is not divisible by the 3 processes"):
        get_backdoor_loader(opt, train, attack, "cpu", processes=Processes(0, 3))


def test_the_attackers_batches_are_full_and_each_purpose_has_a_generator(images):
    train = ImageSet(images, torch.arange(8) % 4, list("abcd"))
    opt = config.parse("train_badnet.py", ["--dataset", "shapes", "--seed", "3", "--batch_size", "5"])[0]
    attack = Attack("gridTrigger", "all2one", 0, 4, 0.5)
    batches, _, poisoned = get_backdoor_loader(opt, train, attack, "cpu")
    assert (len(batches), batches.padding, batches.shuffle) == (1, 4, True)
    assert batches.rng.initial_seed() == generator(3, "batches").initial_seed()
    expected = DatasetBD(train.images, train.labels, attack, "train", generator(3, "poison"))
    assert poisoned.tolist() == expected.poisoned.nonzero()[:, 0].tolist()
    assert batches.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize(("num_class", "fits"), [(4, True), (3, False)])
def test_labels_beyond_the_attacks_classes_are_refused(images, num_class, fits):
    attack = Attack("gridTrigger", "all2one", 0, num_class, 0.5)
    with nullcontext() if fits else pytest.raises(UserError, match="the data has label 3, but there are only 3"):
        DatasetBD(images, torch.arange(8) % 4, attack, "test")


@pytest.mark.parametrize(("augment", "padding"), [("crop_flip", 2), ("none", None)])
def test_the_clean_split_is_of_the_size_that_the_options_ask_for(augment, padding):
    train = ImageSet(torch.zeros(40, 8, 8, 3, dtype=torch.uint8), torch.arange(40) % 4, list("abcd"))
    opt = options("--dataset", "shapes", "--clean", "8", "--augment", augment)
    split = get_clean_split(opt, train, Attack("gridTrigger", "all2one", 0, 4, 0.5), "cpu")
    assert train.labels[split.index].bincount().tolist() == [2, 2, 2, 2]
    assert (split.train.padding, split.plain.padding) == (padding, None)
    opt.clean = 40
    assert len(get_clean_split(opt, train, UnknownAttack(4), "cpu").monitor_set.labels) == 40  # there are no others


@pytest.mark.parametrize(
    ("value", "expected"),
    [("dataset", NORMALIZATION["CIFAR10"]), ("none", ((0.0,) * 3, (1.0,) * 3)), (((1, 2, 3), (4, 5, 6)), None)],
)
def test_the_normalization_is_the_data_sets_none_or_the_numbers_given(value, expected):
    opt = options()
    opt.normalize = value
    assert get_normalization(opt) == (expected or value)


def test_the_monitor_set_and_the_clean_split_share_no_image():
    images, attack = torch.zeros(200, 8, 8, 3, dtype=torch.uint8), Attack("gridTrigger", "all2one", 0, 10, 0.1)
    images[:, 0, 0, 0] = torch.arange(200)
    train_set, opt = ImageSet(images, torch.arange(200) % 10, list("0123456789")), options("--dataset", "shapes")
    opt.batch_size, opt.augment, opt.ratio = 8, "none", 0.25
    split = get_clean_split(opt, train_set, attack, "cpu")
    monitored = torch.cat([x[:, 0, 0, 0] for x, _ in split.monitor_set.clean]).mul(255).round().int().tolist()
    assert sorted([*monitored, *split.index.tolist()]) == list(range(200))


@pytest.mark.parametrize(("dataset", "mirror"), [("shapes", True), ("GTSRB", False)])
def test_traffic_signs_are_not_mirrored(dataset, mirror):
    images, attack = torch.zeros(200, 8, 8, 3, dtype=torch.uint8), Attack("gridTrigger", "all2one", 0, 10, 0.1)
    train_set, opt = ImageSet(images, torch.arange(200) % 10, list("0123456789")), options("--dataset", dataset)
    opt.batch_size, opt.augment, opt.ratio, opt.inject_portion = 8, "crop_flip", 0.25, 0.1
    assert get_clean_split(opt, train_set, attack, "cpu").train.mirror == mirror
    assert get_backdoor_loader(opt, train_set, attack, "cpu")[0].mirror == mirror


def options(*words):
    return config.parse("main.py", [*words])[0]


def test_shapes_are_the_same_each_time_and_balanced():
    first, second = (
        load_images(options("--dataset", "shapes"), "test"),
        load_images(options("--dataset", "shapes"), "test"),
    )
    assert torch.equal(first.images, second.images)
    assert first.images.shape == (2000, 32, 32, 3)
    assert first.labels.bincount().tolist() == [200] * 10


def test_a_folder_of_pictures(tmp_path):
    for split in ("train", "test"):
        for label, colour in enumerate(((255, 0, 0), (0, 0, 255))):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            Image.new("RGB", (20 + label, 10), colour).save(folder / "a.png")
    opt = options("--dataset", "folder", "--data_root", str(tmp_path), "--image_size", "6")
    data = load_images(opt, "train")
    assert data.classes == ["class0", "class1"]
    assert data.images.shape == (2, 6, 6, 3)
    assert data.images[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    whole = (tmp_path / "train" / "class0" / "a.png").read_bytes()
    for content in (b"no picture", whole[:-30], whole[:40] + b"x" + whole[41:]):
        (tmp_path / "train" / "class0" / "b.png").write_bytes(content)
        with pytest.raises(UserError, match="1 of 3 images cannot be read; the first: [^ ]*b.png: "):
            load_images(opt, "train")
    with pytest.raises(UserError, match="more than this machine has"):
        load_images(argparse.Namespace(**{**vars(opt), "image_size": 10**6}), "test")
    with pytest.raises(UserError, match="needs images in"):
        load_images(argparse.Namespace(**{**vars(opt), "data_root": "nowhere"}), "test")
    (tmp_path / "train" / "class0" / "b.png").unlink()
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "class2")
    with pytest.raises(UserError, match="must have the same classes; only one of them has class1, class2"):
        load_images(opt, "test")
    (tmp_path / "test" / "empty").mkdir()
    with pytest.raises(UserError, match="no valid file for the classes empty"):
        load_images(opt, "test")
    (tmp_path / "train" / "class1" / "notes.txt").write_text("no picture")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "train" / "class1" / "9.gif")
    assert len(load_images(opt, "train").labels) == len(data.labels) + 1
    Image.new("F", (9, 9)).save(tmp_path / "train" / "class1" / "10.tiff")
    with pytest.raises(UserError, match="1 of .* images cannot be read; .*10.tiff: a picture of 32-bit floats"):
        load_images(opt, "train")
    (tmp_path / "train" / "class1" / "10.tiff").unlink()
    with pytest.raises(UserError, match="--num_class 1 is too small"):
        load_images(argparse.Namespace(**{**vars(opt), "num_class": 1}), "train")


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    levels = torch.tensor([[0, 257 * 100], [257 * 200, 65535]]).numpy().astype("uint16")
    upright = Image.fromarray(torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8).numpy())
    exif = upright.getexif()
    exif[0x0112] = 3  # upside down
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(levels).save(tmp_path / split / "a" / "1.png")
        upright.save(tmp_path / split / "a" / "2.png", exif=exif)
        (tmp_path / split / "b").mkdir()
        upright.save(tmp_path / split / "b" / "1.png")
    opt = options("--dataset", "folder", "--data_root", str(tmp_path), "--image_size", "2")
    data = load_images(opt, "train")
    assert data.images[:2][:, :, :, 0].tolist() == [[[0, 100], [200, 255]], [[40, 30], [20, 10]]]
    for split in ("train", "test"):
        (tmp_path / split / "a").rename(tmp_path / f"{split} a")
    with pytest.raises(UserError, match="has one class: the images belong in train/<class>/"):
        load_images(opt, "train")


def test_missing_data_names_the_options_and_the_data_set_without_files(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"--data_root or MCL_DATA_ROOT.*--dataset shapes"):
        load_images(options("--data_root", str(tmp_path)), "train")


def test_cifar10_is_whole(cifar_root):
    data = load_images(options("--data_root", cifar_root), "test")
    assert data.images.shape == (10_000, 32, 32, 3)
    assert data.labels.bincount().tolist() == [1000] * 10
    assert data.classes[5] == "dog"


def test_a_partly_downloaded_gtsrb_is_refused(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.GTSRB", lambda *_, **__: range(5))
    opt = argparse.Namespace(dataset="GTSRB", data_root="there", image_size=32, num_class=None)
    with pytest.raises(UserError, match=r"there.gtsrb has 5 of GTSRB's 26,640 train images"):
        load_images(opt, "train")
