"""Draw a sheet of all attacks: one row each, with originals, triggered images and ten times the difference.

    python -m docs.draw_attacks --out triggers.png                     CIFAR-10
    python -m docs.draw_attacks --out triggers.png --dataset shapes    drawn images: no download

Each attack has its default options from config.ATTACKS. The row of clTrigger shows training images, because its noise
is in training images only. An attack that needs a clean model is left out if there is none.
"""

from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont

import config
from attacks import TRIGGERS, build_attack
from data_loader import get_normalization, load_images
from models.loading import load_clean_model
from utils.checkpoint import find_weights
from utils.cli import OneLineParser
from utils.datasets import NORMALIZATION
from utils.device import pick_device
from utils.errors import UserError, run_script
from utils.files import write_file
from utils.seed import generator

COLUMNS = ("original", "triggered", "difference x 10")
IMAGES = 3  # of the target class, side by side
SIDE, GAP, LINE = 80, 6, 15  # pixels: an image, the space between two, a line of text
NAME_WIDTH = 150  # of the column with the triggers' names, in pixels
EXAMPLE_WIDTH = len(COLUMNS) * (SIDE + GAP) + 2 * GAP


def main():
    parser = OneLineParser(prog="-m docs.draw_attacks", description=__doc__)
    parser.add_argument("--out", required=True, help="file of the sheet (PNG)")
    parser.add_argument("--dataset", default=config.RUN["dataset"], choices=NORMALIZATION, help="as in train_badnet.py")
    parser.add_argument("--data_root", default=config.RUN["data_root"], help="as in train_badnet.py")
    parser.add_argument("--seed", default=str(config.RUN["seed"]), help="as in train_badnet.py")
    parser.add_argument("--surrogate", help="checkpoint of a clean model, for trojanTrigger and clTrigger")
    arguments = parser.parse_args()
    shared = [word for name in ("dataset", "data_root", "seed") for word in (f"--{name}", getattr(arguments, name))]
    rows, data = {}, None
    for trigger in config.ATTACKS:
        argv = ["--trigger_type", trigger, *shared]
        if arguments.surrogate and needs_surrogate(trigger):
            argv += ["--surrogate", arguments.surrogate]
        opt, _ = config.parse("train_badnet.py", argv)
        data = data or load_images(opt, "train")
        images = data.images[data.labels == opt.target_label][:IMAGES]
        try:
            rows[trigger] = (images, apply_attack(opt, data, images))
        except UserError as error:
            print(f"{trigger} is left out: {error}")
    if not rows:
        raise UserError("no attack can be drawn; see the messages above")
    write_file(arguments.out, lambda file: draw_sheet(rows).save(file, "PNG"))
    print(f"{len(rows)} attacks: {arguments.out}")


def needs_surrogate(trigger):
    """Whether a trigger is built on a clean model."""
    return "surrogate" in config.trigger_options(training=True)[trigger]


def apply_attack(opt, data, images):
    """The images as the attack of `opt` shows them in a test, or in training if it perturbs training images."""
    num_class, surrogate = len(data.classes), None
    if needs_surrogate(opt.trigger_type):
        path = opt.surrogate or find_weights(opt.checkpoint_root, opt.dataset, "WRN-16-1-clean")
        hint = f"train one: python train_badnet.py --dataset {opt.dataset} --inject_portion 0 --name WRN-16-1-clean"
        surrogate = load_clean_model(path, num_class, get_normalization(opt), pick_device("cpu"), opt.arch, hint)
    attack = build_attack(opt, num_class, data.size, surrogate)
    if not TRIGGERS[opt.trigger_type].perturb:
        return attack.stamp(images)
    labels = torch.full((len(images),), opt.target_label)
    return replace(attack, inject_portion=1.0).poison(images, labels, generator(0, "sheet"), surrogate)[0]


def draw_sheet(rows):
    """Draw {trigger: (images, triggered images)}, both (B, H, W, 3) uint8, as a PIL image."""
    header = LINE + 2 * GAP
    sheet = Image.new("RGB", (NAME_WIDTH + IMAGES * EXAMPLE_WIDTH, header + len(rows) * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, (trigger, (images, triggered)) in enumerate(rows.items()):
        top = header + row * (SIDE + GAP)
        pen.text((GAP, top + SIDE // 2), trigger, "black", font, anchor="lm")
        difference = (10 * (triggered.int() - images.int()).abs()).clamp(max=255).to(torch.uint8)
        for example, panels in enumerate(zip(images, triggered, difference, strict=True)):
            for column, (panel, title) in enumerate(zip(panels, COLUMNS, strict=True)):
                left = NAME_WIDTH + example * EXAMPLE_WIDTH + column * (SIDE + GAP)
                sheet.paste(Image.fromarray(panel.numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
                if row == 0:
                    pen.text((left + SIDE // 2, GAP), title, "black", font, anchor="mt")
    return sheet


if __name__ == "__main__":
    run_script(main)
