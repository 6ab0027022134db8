"""Draw a sheet of all attacks: one row each, with originals, triggered images and ten times the difference.

    python -m docs.draw_attacks triggers.png [options of train_badnet.py]

Each attack has its default options from config.ATTACKS. The row of clTrigger shows training images, because its noise
is in training images only. An attack that needs a clean model is left out if there is none.
"""

import sys

import torch

import config
from attacks import TRIGGERS, build_attack
from data_loader import load_images
from train_badnet import load_surrogate
from utils.device import pick_device
from utils.errors import UserError, run_script
from utils.reporting.picture import new_picture
from utils.seed import generator

COLUMNS = ("original", "triggered", "difference x 10")
IMAGES = 3  # of the target class, side by side


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("name the file of the sheet: python -m docs.draw_attacks triggers.png")
    rows, data = {}, None
    for trigger in config.ATTACKS:
        opt, _ = config.parse("train_badnet.py", [*sys.argv[2:], "--trigger_type", trigger, "--inject_portion", "1"])
        data = data or load_images(opt, "train")
        images = data.images[data.labels == opt.target_label][:IMAGES]
        if len(images) < IMAGES:
            raise UserError(f"{IMAGES} images of label {opt.target_label} are needed; choose another --target_label")
        try:
            rows[trigger] = (images, apply_attack(opt, data, images))
        except UserError as error:
            print(f"{trigger} is left out: {error}")
    if not rows:
        raise UserError("no attack can be drawn; see the messages above")
    draw_sheet(sys.argv[1], rows)
    print(f"{len(rows)} attacks: {sys.argv[1]}")


def apply_attack(opt, data, images):
    """The images as the attack of `opt` shows them in a test, or in training if it perturbs training images."""
    surrogate = load_surrogate(opt, len(data.classes), data.size, pick_device("cpu"))
    attack = build_attack(opt, len(data.classes), data.size, surrogate)
    if not TRIGGERS[opt.trigger_type].perturb:
        return attack.stamp(images)
    labels = torch.full((len(images),), opt.target_label)
    return attack.poison(images, labels, generator(0, "sheet"), surrogate)[0]


def draw_sheet(path, rows):
    """Draw {trigger: (images, triggered images)}, both (B, H, W, 3) uint8, a row each."""
    with new_picture(path, 9, 0.95 * len(rows)) as figure:
        panels = figure.subplots(len(rows), IMAGES * len(COLUMNS), squeeze=False)
        for line, (trigger, (images, triggered)) in zip(panels, rows.items(), strict=True):
            difference = (10 * (triggered.int() - images.int()).abs()).clamp(max=255).to(torch.uint8)
            pictures = torch.stack([images, triggered, difference], 1).flatten(0, 1)
            for axes, picture in zip(line, pictures, strict=True):
                axes.imshow(picture.numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            line[0].set_ylabel(trigger, rotation=0, ha="right", va="center")
        for axes, title in zip(panels[0], COLUMNS * IMAGES, strict=True):
            axes.set_title(title, fontsize=7)


if __name__ == "__main__":
    run_script(main)
