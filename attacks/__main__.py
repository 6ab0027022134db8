"""A contact sheet of every attack: a row each, with the original, the triggered image and ten times the difference.

    python -m attacks --out triggers.png                     on CIFAR-10
    python -m attacks --out triggers.png --dataset shapes    on drawn pictures, no download

Each attack has the defaults that train_badnet.py trains it with, and the view of the test, but for clTrigger, whose
noise is in the training images alone. It and victim.py are the parts of this package that know the others.
"""

from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont

import config
from attacks.victim import load_surrogate
from data_loader import get_attack, load_images
from utils.device import pick_device
from utils.errors import UserError, run_script
from utils.files import write_file
from utils.seed import generator

COLUMNS = ("original", "triggered", "difference x 10")
IMAGES = 3  # examples of the target class, side by side
SIDE = 80  # pixels of a picture on the sheet
GAP, TEXT = 6, 15
LABELS = 150  # width of the column with the attacks' names


def main():
    parser = config.OneLineParser(prog="-m attacks", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="the picture to write")
    parser.add_argument("--dataset", default="CIFAR10", choices=config.DATASETS)
    parser.add_argument("--data_root", default=config.DATA_ROOT)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--surrogate", help="a clean model's checkpoint, for trojanTrigger and clTrigger")
    chosen = parser.parse_args()
    rows, data = {}, None
    for trigger in config.ATTACKS:
        words = ["--trigger_type", trigger, "--dataset", chosen.dataset, "--data_root", chosen.data_root]
        if chosen.surrogate and "surrogate" in config.ATTACKS[trigger][-1]:
            words += ["--surrogate", chosen.surrogate]
        opt, _ = config.parse("train_badnet.py", [*words, "--seed", chosen.seed])
        data = data or load_images(opt, "train")
        images = data.images[data.labels == opt.target_label][:IMAGES]
        try:
            rows[trigger] = (images, triggered(opt, data, images))
        except UserError as error:
            print(f"left out: {error}")
    if not rows:
        raise UserError("no attack is left to draw")
    write_file(chosen.out, lambda file: draw(rows).save(file, "PNG"))
    print(f"{len(rows)} attacks: {chosen.out}")


def triggered(opt, data, images):
    """The images with the trigger of `opt` on them."""
    num_class, surrogate = len(data.classes), None
    if "surrogate" in config.ATTACKS[opt.trigger_type][-1]:
        surrogate = load_surrogate(opt, num_class, pick_device("cpu"))
    attack = get_attack(opt, num_class, data.size, surrogate)
    if opt.trigger_type != "clTrigger":
        return attack.stamp(images)
    labels = torch.full((len(images),), opt.target_label)
    return replace(attack, inject_portion=1.0).poison(images, labels, generator(0, "sheet"), surrogate)[0]


def draw(rows):
    """rows: attack -> (images, the same triggered), both (B, H, W, 3) uint8. Returns the sheet."""
    width = LABELS + IMAGES * (len(COLUMNS) * (SIDE + GAP) + 2 * GAP)
    sheet = Image.new("RGB", (width, TEXT + 2 * GAP + len(rows) * (SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (name, (images, stamped)) in enumerate(rows.items()):
        top = TEXT + 2 * GAP + number * (SIDE + GAP)
        pen.text((GAP, top + SIDE // 2), name, "black", font, anchor="lm")
        difference = (10 * (stamped.int() - images.int()).abs()).clamp(max=255).to(torch.uint8)
        for i, pictures in enumerate(zip(images, stamped, difference, strict=True)):
            for j, (picture, told) in enumerate(zip(pictures, COLUMNS, strict=True)):
                left = LABELS + i * (len(COLUMNS) * (SIDE + GAP) + 2 * GAP) + j * (SIDE + GAP)
                large = Image.fromarray(picture.numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                sheet.paste(large, (left, top))
                if number == 0:
                    pen.text((left + SIDE // 2, GAP), told, "black", font, anchor="mt")
    return sheet


if __name__ == "__main__":
    run_script(main)
