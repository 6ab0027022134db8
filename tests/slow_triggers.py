"""The triggers image by image, written from their definitions, for test_triggers and test_attacks."""

import math

import torch
from torch import nn

from attacks import TRIGGERS, Attack
from attacks.blended import blend_picture, random_mask
from attacks.wanet import warping_grid
from utils.seed import generator

SIZE = (10, 11)
OPTIONS = {"trig_w": 2, "trig_h": 3, "opacity": 0.2, "delta": 40.0}
BUILD = {
    "randomPixelTrigger": random_mask,
    "blendTrigger": blend_picture,
    "imageTrigger": lambda size, rng: {"picture": torch.randint(256, (*size, 4), dtype=torch.uint8, generator=rng)},
    "trojanTrigger": lambda size, rng: {"patch": torch.randint(256, (3, 2, 3), dtype=torch.uint8, generator=rng)},
    "wanetTrigger": lambda size, rng: warping_grid(size, rng, 0.9),
}


def random_images(count, seed=0):
    """Random uint8 images of 10 x 11 pixels."""
    return torch.randint(256, (count, *SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make_attack(trigger_type="gridTrigger", target_type=None, target_label=2, rate=0.5, seed=1, **training):
    """An attack for five classes and images of SIZE."""
    spec, rng = TRIGGERS[trigger_type], generator(seed, "test")
    mode, options = target_type or spec.target_types[0], {name: OPTIONS[name] for name in spec.options}
    tensors = BUILD[trigger_type](SIZE, rng) if spec.tensors else {}
    return Attack(trigger_type, mode, target_label, 5, rate, options, tensors, training)


class TinyModel(nn.Module):
    """A stand-in for a clean model: features of the whole image; the head's weights are largest for the last two."""

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


def checker(at_bottom, at_right):
    """The 3x3 checker of a corner: that of BadNets in the bottom right one, its mirror image in the others."""
    rows = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    rows = rows if at_bottom else rows[::-1]
    return rows if at_right else [row[::-1] for row in rows]


def slow_patch(image, top, left, rows):
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            image[top + i, left + j] = torch.as_tensor(value)


def slow_blend(image, picture):
    for i, j, c in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        value = 0.8 * image[i, j, c].item() + 0.2 * picture[i, j, c % picture.shape[2]].item()
        image[i, j, c] = int(value + 0.5)


def slow_image(image, picture):
    for i, j, c in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        opacity = picture[i, j, 3].item() / 255
        image[i, j, c] = round((1 - opacity) * image[i, j, c].item() + opacity * picture[i, j, c].item())


def slow_signal(image, delta):
    for i, j, c in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
        value = image[i, j, c].item() + delta * math.sin(2 * math.pi * j * 6 / image.shape[1])
        image[i, j, c] = round(min(max(value, 0), 255))


def slow_warp(image, grid):
    """Bilinear interpolation; -1 is the centre of the first pixel, 1 that of the last."""
    original, (height, width, _) = image.clone().double(), image.shape
    for i in range(height):
        for j in range(width):
            x, y = (grid[i, j, 0].item() + 1) / 2 * (width - 1), (grid[i, j, 1].item() + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            a, b = x - left, y - top
            above = (1 - a) * original[top, left] + a * original[top, left + 1]
            below = (1 - a) * original[top + 1, left] + a * original[top + 1, left + 1]
            image[i, j] = ((1 - b) * above + b * below).round().to(torch.uint8)


def slow_corners(image, attack):
    for top, left in ((0, 0), (0, 8), (7, 0), (7, 8)):
        slow_patch(image, top, left, checker(top > 0, left > 0))


# trigger -> function (image, attack) that applies it in place
SLOW_TRIGGERS = {
    "gridTrigger": lambda image, attack: slow_patch(image, 7, 8, checker(True, True)),
    "squareTrigger": lambda image, attack: slow_patch(image, 6, 8, [[255, 255]] * 3),
    "fourCornerTrigger": slow_corners,
    "centerTrigger": lambda image, attack: slow_patch(image, 7, 7, checker(True, True)),
    "randomPixelTrigger": lambda image, attack: slow_blend(image, attack.tensors["picture"]),
    "blendTrigger": lambda image, attack: slow_blend(image, attack.tensors["picture"]),
    "imageTrigger": lambda image, attack: slow_image(image, attack.tensors["picture"]),
    "trojanTrigger": lambda image, attack: slow_patch(image, 6, 8, attack.tensors["patch"]),
    "signalTrigger": lambda image, attack: slow_signal(image, 40),
    "clTrigger": slow_corners,
    "wanetTrigger": lambda image, attack: slow_warp(image, attack.tensors["grid"]),
}
