"""Each trigger against its slow version, and the pictures, patches, warps and noise that triggers are built from."""

import pytest
import torch
from PIL import Image
from slow_triggers import SIZE, SLOW_TRIGGERS, TinyModel, make_attack, random_images, slow_warp
from torch import nn

from attacks import TRIGGERS
from attacks.blended import blend_picture, own_picture, random_mask
from attacks.label_consistent import adversarial_noise
from attacks.triggers import center_trigger, four_corner_trigger, grid_trigger, patch_trigger, square_trigger
from attacks.trojan import trojan_patch
from attacks.wanet import wanet_noise, warping_grid
from utils.errors import UserError
from utils.seed import generator


@pytest.fixture
def images():
    """Eight random uint8 images of 10 x 11 pixels."""
    return random_images(8)


@pytest.mark.parametrize("trigger_type", TRIGGERS)
def test_each_trigger_equals_its_slow_version(images, trigger_type):
    attack, originals = make_attack(trigger_type), images.clone()
    triggered = attack.stamp(images)
    assert torch.equal(images, originals)
    assert triggered.dtype == torch.uint8
    for original, result in zip(images, triggered, strict=True):
        expected = original.clone()
        SLOW_TRIGGERS[trigger_type](expected, attack)
        assert not torch.equal(expected, original)
        # Float interpolation may round a value halfway between two grey levels either way.
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= (1 if trigger_type == "wanetTrigger" else 0)
        assert difference.float().mean() < 0.01


def test_the_center_trigger_of_a_cifar_image_covers_rows_and_columns_18_to_20():
    grey = torch.zeros(1, 32, 32, 3, dtype=torch.uint8) + 7
    positions = (make_attack("centerTrigger").stamp(grey) != 7).nonzero()[:, 1:3]
    assert positions.amin(0).tolist() == [18, 18]
    assert positions.amax(0).tolist() == [20, 20]


def test_a_flip_leaves_the_four_corner_trigger_unchanged():
    grey = torch.zeros(1, 32, 32, 3, dtype=torch.uint8) + 7
    triggered = make_attack("fourCornerTrigger").stamp(grey)
    assert torch.equal(triggered, triggered.flip(2))


def test_the_number_of_images_does_not_change_the_result():
    images = random_images(300, seed=2)
    for trigger_type in TRIGGERS:
        attack = make_attack(trigger_type)
        assert torch.equal(attack.stamp(images)[250:], attack.stamp(images[250:]))


def test_a_trigger_refuses_images_that_it_does_not_fit(images):
    with pytest.raises(UserError, match="needs 3x3 pixels, but the images have 2x11"):
        make_attack().stamp(images[:, :2])
    for trigger_type in ("blendTrigger", "wanetTrigger"):
        with pytest.raises(UserError, match="for images of 10x11 pixels, but these have 10x10"):
            make_attack(trigger_type).stamp(images[:, :, :10])


def test_a_picture_of_ones_own_is_the_trigger_if_it_has_the_size_of_the_images(tmp_path):
    path, pixels = str(tmp_path / "a.png"), torch.randint(256, (*SIZE, 4), dtype=torch.uint8)
    Image.fromarray(pixels.numpy(), "RGBA").save(path)
    assert torch.equal(own_picture(SIZE, None, path)["picture"], pixels)
    pixels[..., 3] = 0
    for useless in (pixels[..., :3], pixels):  # opaque everywhere, or nowhere
        Image.fromarray(useless.numpy()).save(str(tmp_path / "b.png"))
        with pytest.raises(UserError, match="b.png is opaque or transparent everywhere"):
            own_picture(SIZE, None, str(tmp_path / "b.png"))
    with pytest.raises(UserError, match="a.png has 10x11 pixels, but the images have 11x10"):
        own_picture(SIZE[::-1], None, path)
    with pytest.raises(UserError, match="imageTrigger needs --trigger_image FILE.png"):
        own_picture(SIZE, None)
    with pytest.raises(UserError, match="cannot be read as an image"):
        own_picture(SIZE, None, __file__)


def test_the_warp_follows_its_formula():
    grid = warping_grid(SIZE, generator(3, "grid"), 0.5)["grid"]
    points = torch.rand(1, 2, 4, 4, generator=generator(3, "grid")) * 2 - 1
    corner = points[0, :, 0, 0] / points.abs().mean()  # with align_corners, the first control point is the first pixel
    assert grid[0, 0].tolist() == pytest.approx((-1 + 0.5 * corner / SIZE[0]).clamp(-1, 1).tolist())
    assert grid.abs().max() <= 1
    rows, columns = (torch.linspace(-1, 1, length) for length in SIZE)
    identity = torch.stack([columns.expand(SIZE), rows[:, None].expand(SIZE)], 2)
    field = torch.nn.functional.interpolate(points / points.abs().mean(), SIZE, mode="bicubic", align_corners=True)[0]
    shift = (grid - identity)[1:-1, 1:-1] * SIZE[0] / 0.5  # inside, where no position is clamped
    assert torch.allclose(shift, field.permute(1, 2, 0)[1:-1, 1:-1], atol=1e-4)


def test_wanet_noise_warps_each_image_differently(images):
    identity = torch.stack(torch.meshgrid(torch.linspace(-1, 1, 10), torch.linspace(-1, 1, 11), indexing="ij")[::-1], 2)
    jitter = 2 * torch.rand(8, *SIZE, 2, generator=generator(1, "jitter")) - 1
    noisy = wanet_noise(images, generator(1, "jitter"), identity)
    for original, result, offset in zip(images, noisy, jitter, strict=True):
        expected = original.clone()
        slow_warp(expected, (identity + offset / 10).clamp(-1, 1))
        assert (result.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("build", [random_mask, blend_picture])
def test_pictures_follow_the_seed(build):
    first, same, other = (build(SIZE, generator(seed, "picture"))["picture"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_picture_file_is_resized(tmp_path):
    Image.new("L", (40, 30), 200).save(tmp_path / "a.png")
    picture = blend_picture(SIZE, generator(1, ""), str(tmp_path / "a.png"))["picture"]
    assert torch.equal(picture, torch.full((*SIZE, 3), 200, dtype=torch.uint8))
    Image.new("I;16", (40, 30), 257 * 100).save(tmp_path / "b.png")  # read as a viewer shows it
    assert (blend_picture(SIZE, generator(1, ""), str(tmp_path / "b.png"))["picture"] == 100).all()


def test_a_missing_or_broken_picture_file_is_refused(tmp_path):
    (tmp_path / "b.png").write_text("none")
    Image.fromarray(torch.randint(256, (300, 300, 3), dtype=torch.uint8).numpy()).save(tmp_path / "d.png")
    start, rest = (tmp_path / "d.png").read_bytes().rsplit(b"IDAT", 1)
    (tmp_path / "d.png").write_bytes(start + b"ID\x00T" + rest)  # a SyntaxError of Pillow
    for name in ("b.png", "c.png", "d.png"):
        with pytest.raises(UserError, match="--trigger_image .*png cannot be read as an image"):
            blend_picture(SIZE, generator(1, ""), str(tmp_path / name))


def test_a_drawn_picture_has_discs_on_a_vertical_gradient():
    picture = blend_picture((64, 48), generator(1, "picture"))["picture"]
    top, bottom = 255 * torch.randint(2, (14, 3), generator=generator(1, "picture")).float()[:2]
    share = torch.linspace(0, 1, 64)[:, None]
    gradient = (top * (1 - share) + bottom * share).round()
    is_gradient = ((picture - gradient[:, None]).abs() <= 1).all(2)
    assert is_gradient.any(1).all()  # in each row, something is left of it
    assert is_gradient[0].float().mean() > 0.5
    discs = picture[~is_gradient]
    assert ((discs == 0) | (discs == 255)).all()  # saturated colours
    assert 0.2 < (~is_gradient).float().mean() < 0.9


def test_a_trojan_patch_excites_the_neurons_with_the_largest_weights(monkeypatch):
    patch = trojan_patch(SIZE, generator(1, "patch"), TinyModel(), 4, 3)["patch"]
    assert patch.shape == (3, 4, 3)
    assert torch.equal(patch, trojan_patch(SIZE, generator(1, "patch"), TinyModel(), 4, 3)["patch"])
    grey = torch.full((1, 3, *SIZE), 0.5)

    def activation(patch):
        image = grey.clone()
        image[0, :, 6:9, 6:10] = patch.permute(2, 0, 1) / 255
        return TinyModel().features(image)[0, 6:].sum()

    rng = generator(2, "others")
    others = [torch.randint(256, patch.shape, dtype=torch.uint8, generator=rng) for _ in range(50)]
    assert activation(patch) > max(map(activation, others))
    monkeypatch.setattr("attacks.trojan.STEPS", 0)
    monkeypatch.setattr("attacks.trojan.CANDIDATES", 8)
    drawn = (torch.rand(8, 3, 3, 4, generator=generator(1, "patch")) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
    best = trojan_patch(SIZE, generator(1, "patch"), TinyModel(), 4, 3)["patch"]
    assert torch.equal(best, max(drawn, key=activation))
    with pytest.raises(UserError, match="needs 11x3 pixels"):
        trojan_patch(SIZE, generator(1, "patch"), TinyModel(), 2, 10)


def test_adversarial_noise_raises_the_loss_within_its_bound(images):
    labels = torch.arange(8) % 5
    noisy = adversarial_noise(images, labels, TinyModel(), 8)
    assert (noisy.int() - images.int()).abs().max() == 8
    before, after = (
        nn.functional.cross_entropy(TinyModel()(x.permute(0, 3, 1, 2) / 255), labels) for x in (images, noisy)
    )
    assert after > before


def test_the_noise_of_an_image_does_not_depend_on_its_batch(images, monkeypatch):
    labels = torch.arange(8) % 5
    noisy = adversarial_noise(images, labels, TinyModel(), 8)
    monkeypatch.setattr("attacks.label_consistent.BATCH_SIZE", 3)
    assert torch.equal(adversarial_noise(images, labels, TinyModel(), 8), noisy)


def test_the_center_trigger_is_two_pixels_below_and_right_of_the_center_of_any_image():
    changed = (center_trigger(torch.full((1, 12, 20, 3), 77, dtype=torch.uint8)) != 77).any(3)[0].nonzero()
    assert changed.min(0).values.tolist() == [8, 12]


@pytest.mark.parametrize(
    ("trigger", "options", "height", "width"),
    [
        (grid_trigger, {}, 3, 3),
        (square_trigger, {"trig_h": 2, "trig_w": 4}, 3, 5),
        (four_corner_trigger, {}, 6, 6),
        (center_trigger, {}, 9, 9),
        (patch_trigger, {"patch": torch.full((2, 4, 3), 9, dtype=torch.uint8)}, 3, 5),
    ],
)
def test_a_trigger_fits_its_own_size_and_no_smaller_one(trigger, options, height, width):
    assert trigger(torch.full((1, height, width, 3), 77, dtype=torch.uint8), **options).shape == (1, height, width, 3)
    for size in ((height - 1, width), (height, width - 1)):
        with pytest.raises(UserError, match=f"needs {height}x{width} pixels, but the images have {size[0]}x{size[1]}"):
            trigger(torch.zeros(1, *size, 3, dtype=torch.uint8), **options)
