"""Triggers and label modes against slow, per-image versions written from their definitions."""

import math

import pytest
import torch
from conftest import FACTS
from PIL import Image
from torch import nn

import config
from attacks import TRIGGERS, Attack
from attacks.label_consistent import adversarial_noise
from attacks.pictures import blend_picture, random_mask
from attacks.trojan import trojan_patch
from attacks.wanet import wanet_noise, warping_grid
from data_loader import DatasetBD, get_attack, get_eval_set
from models import select_model
from utils.checkpoint import load_weights, read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.metrics import evaluate
from utils.seed import generator

SIZE = (10, 11)
OPTIONS = {"trig_w": 2, "trig_h": 3, "opacity": 0.2, "delta": 40.0}


@pytest.fixture
def images():
    """Eight random uint8 images of 10 x 11 pixels."""
    return torch.randint(256, (8, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


MADE = {
    "randomPixelTrigger": random_mask,
    "blendTrigger": blend_picture,
    "trojanTrigger": lambda size, rng: {"patch": torch.randint(256, (3, 2, 3), dtype=torch.uint8, generator=rng)},
    "wanetTrigger": lambda size, rng: warping_grid(size, rng, 0.9),
}


def attack_of(trigger_type="gridTrigger", target_type=None, target_label=2, rate=0.5, seed=1, **training):
    """An attack with five classes and tensors of its own."""
    trigger, rng = TRIGGERS[trigger_type], generator(seed, "test")
    mode, options = target_type or trigger.target_types[0], {name: OPTIONS[name] for name in trigger.options}
    tensors = MADE[trigger_type](SIZE, rng) if trigger.tensors else {}
    return Attack(trigger_type, mode, target_label, 5, rate, options, tensors, training)


def checker(at_bottom, at_right):
    """The 3x3 checker of that corner: BadNets' own at the bottom right, elsewhere its mirror image."""
    rows = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    rows = rows if at_bottom else rows[::-1]
    return rows if at_right else [row[::-1] for row in rows]


def put(image, top, left, rows):
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            image[top + i, left + j] = torch.as_tensor(value)


def slow_mix(image, picture):
    for i, j, c in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        value = 0.8 * image[i, j, c].item() + 0.2 * picture[i, j, c % picture.shape[2]].item()
        image[i, j, c] = int(value + 0.5)


def slow_signal(image, delta):
    for i, j, c in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        value = image[i, j, c].item() + delta * math.sin(2 * math.pi * j * 6 / image.shape[1])
        image[i, j, c] = round(min(max(value, 0), 255))


def slow_warp(image, grid):
    """Bilinear interpolation by hand; -1 is the middle of the first pixel, 1 that of the last."""
    before, (height, width, _) = image.clone().double(), image.shape
    for i in range(height):
        for j in range(width):
            x, y = (grid[i, j, 0].item() + 1) / 2 * (width - 1), (grid[i, j, 1].item() + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            a, b = x - left, y - top
            above = (1 - a) * before[top, left] + a * before[top, left + 1]
            below = (1 - a) * before[top + 1, left] + a * before[top + 1, left + 1]
            image[i, j] = ((1 - b) * above + b * below).round().to(torch.uint8)


def slow_corners(image, attack):
    for top, left in ((0, 0), (0, 8), (7, 0), (7, 8)):
        put(image, top, left, checker(top > 0, left > 0))


SLOW = {
    "gridTrigger": lambda image, attack: put(image, 7, 8, checker(True, True)),
    "squareTrigger": lambda image, attack: put(image, 6, 8, [[255, 255]] * 3),
    "fourCornerTrigger": slow_corners,
    "centerTrigger": lambda image, attack: put(image, 7, 7, checker(True, True)),
    "randomPixelTrigger": lambda image, attack: slow_mix(image, attack.tensors["picture"]),
    "blendTrigger": lambda image, attack: slow_mix(image, attack.tensors["picture"]),
    "trojanTrigger": lambda image, attack: put(image, 6, 8, attack.tensors["patch"]),
    "signalTrigger": lambda image, attack: slow_signal(image, 40),
    "clTrigger": slow_corners,
    "wanetTrigger": lambda image, attack: slow_warp(image, attack.tensors["grid"]),
}


@pytest.mark.parametrize("trigger_type", TRIGGERS)
def test_each_trigger_image_by_image(images, trigger_type):
    attack, before = attack_of(trigger_type), images.clone()
    stamped = attack.stamp(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    for image, after in zip(images, stamped, strict=True):
        expected = image.clone()
        SLOW[trigger_type](expected, attack)
        assert not torch.equal(expected, image)
        # A value halfway between two grey levels may be rounded either way, where floats interpolate.
        differing = (after.int() - expected.int()).abs()
        assert differing.max() <= (trigger_type == "wanetTrigger")
        assert differing.float().mean() < 0.01


def test_the_centre_of_a_cifar_image_and_the_flip_of_the_corners():
    black = torch.zeros(1, 32, 32, 3, dtype=torch.uint8) + 7
    places = (attack_of("centerTrigger").stamp(black) != 7).nonzero()[:, 1:3]
    assert places.amin(0).tolist() == [18, 18]
    assert places.amax(0).tolist() == [20, 20]
    corners = attack_of("fourCornerTrigger").stamp(black)
    assert torch.equal(corners, corners.flip(2))


def test_many_images_are_stamped_as_few_are():
    images = torch.randint(256, (300, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    for trigger_type in TRIGGERS:
        attack = attack_of(trigger_type)
        assert torch.equal(attack.stamp(images)[250:], attack.stamp(images[250:]))


def test_the_warp_is_drawn_from_its_formula():
    grid = warping_grid(SIZE, generator(3, "grid"), 0.5)["grid"]
    points = torch.rand(1, 2, 4, 4, generator=generator(3, "grid")) * 2 - 1
    corner = points[0, :, 0, 0] / points.abs().mean()  # align_corners: the corner's value is the corner point's
    assert grid[0, 0].tolist() == pytest.approx((-1 + 0.5 * corner / SIZE[0]).clamp(-1, 1).tolist())
    assert grid.abs().max() <= 1


def test_noise_is_another_warp_for_each_image(images):
    still = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 10), torch.linspace(-1, 1, 11), indexing="ij")[::-1], 2)
    jitter = 2 * torch.rand(8, *SIZE, 2, generator=generator(1, "jitter")) - 1
    noisy = wanet_noise(images, generator(1, "jitter"), still)
    for image, after, shift in zip(images, noisy, jitter, strict=True):
        expected = image.clone()
        slow_warp(expected, (still + shift / 10).clamp(-1, 1))
        assert (after.int() - expected.int()).abs().max() <= 1


def test_pictures_follow_the_seed_and_a_file_is_resized(tmp_path):
    for make in (random_mask, blend_picture):
        first, same, other = (make(SIZE, generator(seed, "picture"))["picture"] for seed in (1, 1, 2))
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
    Image.new("L", (40, 30), 200).save(tmp_path / "a.png")
    picture = blend_picture(SIZE, generator(1, ""), str(tmp_path / "a.png"))["picture"]
    assert torch.equal(picture, torch.full((*SIZE, 3), 200, dtype=torch.uint8))
    (tmp_path / "b.png").write_text("none")
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match="--trigger_image .*png is not a picture"):
            blend_picture(SIZE, generator(1, ""), str(tmp_path / name))


class Small(nn.Module):
    """A stand-in for a clean model: features of the whole image, and a head that leans on the last two of eight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3 * SIZE[0] * SIZE[1], 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.head.weight[:, 6:] *= 10
            self.body.bias += 1
        self.requires_grad_(False)

    def features(self, x):
        return self.body(x.flatten(1)).relu()

    def forward(self, x):
        return self.head(self.features(x))


def test_a_trojan_patch_excites_the_neurons_with_the_largest_weights():
    patch = trojan_patch(SIZE, generator(1, "patch"), Small(), 4, 3)["patch"]
    assert patch.shape == (3, 4, 3)
    assert torch.equal(patch, trojan_patch(SIZE, generator(1, "patch"), Small(), 4, 3)["patch"])
    grey = torch.full((1, 3, *SIZE), 0.5)

    def excitement(patch):
        picture = grey.clone()
        picture[0, :, 6:9, 6:10] = patch.permute(2, 0, 1) / 255
        return Small().features(picture)[0, 6:].sum()

    rng = generator(2, "others")
    others = [torch.randint(256, patch.shape, dtype=torch.uint8, generator=rng) for _ in range(50)]
    assert excitement(patch) > max(map(excitement, others))
    with pytest.raises(UserError, match="takes 11x3 pixels"):
        trojan_patch(SIZE, generator(1, "patch"), Small(), 2, 10)


def test_adversarial_noise_lowers_the_true_label_within_its_bound(images):
    labels = torch.arange(8) % 5
    changed = adversarial_noise(images, labels, Small(), 8)
    assert (changed.int() - images.int()).abs().max() == 8
    loss = [nn.functional.cross_entropy(Small()(x.permute(0, 3, 1, 2) / 255), labels) for x in (images, changed)]
    assert loss[1] > loss[0]


def test_label_modes():
    labels = torch.tensor([0, 1, 2, 3, 4])
    for target_type in ("all2one", "cleanLabel"):
        assert attack_of(target_type=target_type).wanted(labels).tolist() == [2, 2, 2, 2, 2]
        assert attack_of(target_type=target_type).counts(labels).tolist() == [True, True, False, True, True]
    assert attack_of(target_type="all2all").wanted(labels).tolist() == [1, 2, 3, 4, 0]
    assert attack_of(target_type="all2all").counts(labels).all()
    assert Attack("gridTrigger", "all2all", 5, 3, 0.1).wanted(labels[:3]).tolist() == [1, 2, 0]  # 5 means nothing


@pytest.mark.parametrize(("target_type", "count"), [("all2one", 4), ("all2all", 4), ("cleanLabel", 1)])
def test_poisoned_set_image_by_image(images, target_type, count):
    labels, attack = torch.arange(8) % 5, attack_of(target_type=target_type, rate=0.5)
    poisoned = DatasetBD(images, labels, attack, "train", torch.Generator().manual_seed(1))
    assert poisoned.poisoned.sum() == count
    for i in range(8):
        image, label = poisoned[i]
        hit = poisoned.poisoned[i]
        wanted = {"all2one": 2, "all2all": (i % 5 + 1) % 5, "cleanLabel": i % 5}[target_type] if hit else i % 5
        assert torch.equal(image, (attack.stamp(images[i : i + 1])[0] if hit else images[i]).permute(2, 0, 1) / 255)
        assert label == wanted
        assert target_type != "cleanLabel" or not hit or i % 5 == 2
    assert torch.equal(poisoned.true_labels, labels)


def test_training_differs_from_the_test_where_the_attack_says_so(images):
    labels = torch.full((8,), 2)
    weaker = attack_of("signalTrigger", rate=1.0, train_delta=20.0).poison(images, labels, generator(1, ""))
    for image, after in zip(images, weaker[0], strict=True):
        expected = image.clone()
        slow_signal(expected, 20)
        assert torch.equal(after, expected)
    attack = attack_of("clTrigger", rate=1.0, epsilon=8)
    noisy = adversarial_noise(images, labels, Small(), 8)
    assert torch.equal(attack.poison(images, labels, generator(1, ""), Small())[0], attack.stamp(noisy))


def test_wanet_has_twice_as_many_images_with_noise_and_their_true_labels(images):
    labels, attack = torch.arange(8) % 5, attack_of("wanetTrigger", rate=0.25, noise_ratio=2.0)
    changed, renamed, poisoned = attack.poison(images, labels, generator(1, ""))
    touched = (changed != images).flatten(1).any(1)
    assert (poisoned.sum(), touched.sum()) == (2, 6)
    assert torch.equal(renamed[~poisoned], labels[~poisoned])
    assert torch.equal(changed[poisoned], attack.stamp(images[poisoned]))
    assert not (changed[touched] == attack.stamp(images[touched])).flatten(1).all(1)[~poisoned[touched]].any()
    with pytest.raises(UserError, match="leaves 4 of 8 images, too few for 8 with noise"):
        attack_of("wanetTrigger", rate=0.5, noise_ratio=2.0).poison(images, labels, generator(1, ""))


@pytest.mark.parametrize("target_type", ["all2one", "cleanLabel"])
def test_test_set_leaves_out_exactly_the_target_class(images, target_type):
    labels, attack = torch.tensor([2, 0, 1, 2, 3, 4, 2, 0]), attack_of(target_type=target_type)
    triggered = DatasetBD(images, labels, attack, "test")
    assert triggered.true_labels.tolist() == [0, 1, 3, 4, 0]
    assert triggered.labels.tolist() == [2] * 5
    assert triggered.poisoned.all()
    assert torch.equal(triggered.images, attack.stamp(images[[1, 2, 4, 5, 7]]))


@pytest.mark.parametrize("trigger_type", sorted(set(TRIGGERS) - {"clTrigger"}))
def test_poisoning_is_fixed_by_its_generator(images, trigger_type):
    labels, training = torch.full((8,), 2), {"noise_ratio": 1.0} if trigger_type == "wanetTrigger" else {}

    def draw(seed):
        attack = attack_of(trigger_type, seed=seed, **training)
        return DatasetBD(images, labels, attack, "train", generator(seed, "poison"))

    first, same, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.images, same.images)
    assert torch.equal(first.poisoned, same.poisoned)
    assert not torch.equal(first.images, other.images)


def test_a_rate_of_zero_poisons_nothing(images):
    labels = torch.arange(8) % 5
    for trigger_type in TRIGGERS:
        clean = DatasetBD(images, labels, attack_of(trigger_type, rate=0.0), "train", generator(1, ""))
        assert torch.equal(clean.images, images)
        assert torch.equal(clean.labels, labels)
        assert not clean.poisoned.any()


@pytest.mark.parametrize("trigger_type", TRIGGERS)
def test_a_reloaded_victim_measures_what_it_was_saved_with(images, trigger_type, tmp_path):
    attack, labels, path = attack_of(trigger_type), torch.arange(8) % 5, str(tmp_path / "a.tar")
    torch.manual_seed(0)
    victim, again = select_model("WRN-10-1", 5), select_model("WRN-10-1", 5)
    cpu = torch.device("cpu")
    save_checkpoint(path, victim, **FACTS, attack=attack.state())
    checkpoint = read_checkpoint(path)
    load_weights(again, checkpoint["state_dict"], path, "WRN-10-1")
    restored = Attack.restore(checkpoint["attack"])
    assert torch.equal(attack.stamp(images), restored.stamp(images))
    assert restored.describe() == attack.describe()
    before, after = (
        evaluate(model, get_eval_set(images, labels, of, cpu), of)
        for model, of in ((victim, attack), (again, restored))
    )
    assert before == after


def test_a_file_from_before_there_were_tensors_is_read():
    state = attack_of().state()
    for later in ("tensors", "training_options"):
        del state[later]
    assert Attack.restore(state).tensors == {}


@pytest.mark.parametrize("trigger_type", sorted(set(TRIGGERS) - {"trojanTrigger"}))
def test_the_defaults_of_every_trigger_make_an_attack(trigger_type):
    opt, _ = config.parse("train_badnet.py", ["--trigger_type", trigger_type])
    attack = get_attack(opt, 10, (32, 32))
    assert attack.target_type == config.ATTACKS[trigger_type][1]
    assert attack.inject_portion == config.RATES[attack.target_type]
    assert set(attack.training_options) == set(TRIGGERS[trigger_type].training)
    opt, _ = config.parse("main.py", ["--trigger_type", trigger_type])
    black = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.equal(get_attack(opt, 10, (32, 32)).stamp(black), attack.stamp(black))


def test_what_makes_no_attack_is_refused(images):
    with pytest.raises(UserError, match="not one of 0..4"):
        attack_of(target_label=5)
    with pytest.raises(UserError, match="no trigger named"):
        Attack("gridTriger", "all2one", 2, 5, 0.1)
    with pytest.raises(UserError, match="signalTrigger makes sense only with --target_type cleanLabel, not all2one"):
        attack_of("signalTrigger", "all2one")
    with pytest.raises(UserError, match="poisons none"):
        DatasetBD(images, torch.arange(8) % 5, attack_of(rate=0.1), "train", torch.Generator())
    with pytest.raises(UserError, match="only 5 classes"):
        DatasetBD(images, torch.arange(8), attack_of(), "test")
    with pytest.raises(UserError, match="takes 3x3 pixels"):
        attack_of().stamp(images[:, :2])
    for trigger_type in ("blendTrigger", "wanetTrigger"):
        with pytest.raises(UserError, match="made for images of 10x11 pixels, these have 10x10"):
            attack_of(trigger_type).stamp(images[:, :, :10])
    with pytest.raises(UserError, match="only a file that states it has it"):
        get_attack(config.parse("main.py", ["--trigger_type", "trojanTrigger"])[0], 10, (32, 32))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colour": 3}, "cannot be understood"),
        ({"target_label": "2"}, "cannot be understood"),
        ({"trigger_options": {}}, r"takes the options \(opacity\), not \(\)"),
        ({"trigger_options": {"opacity": "much"}}, "opacity of blendTrigger is a number"),
        ({"trigger_options": {"opacity": 2.0}}, "a share up to 1"),
        ({"trigger_options": {"opacity": 0}}, "changes nothing"),
        ({"tensors": {}}, r"has the tensors \(picture\), not \(\)"),
        ({"tensors": {"picture": [1]}}, "is no torch.uint8 tensor"),
        ({"tensors": {"picture": torch.zeros(4, 4, 3)}}, "is no torch.uint8 tensor"),
        ({"tensors": {"picture": torch.zeros(4, 4, 4, dtype=torch.uint8)}}, "is no torch.uint8 tensor"),
        ({"tensors": {"picture": torch.zeros(0, 4, 3, dtype=torch.uint8)}}, "none at all"),
    ],
)
def test_what_a_strange_file_states_is_checked(change, told):
    with pytest.raises(UserError, match=told):
        Attack.restore({**attack_of("blendTrigger").state(), **change})
