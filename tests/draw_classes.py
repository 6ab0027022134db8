"""Draw a data set of many classes for `--dataset folder`: the built-in shapes, in frames of several hues.

python -m tests.draw_classes FOLDER [--classes 100] [--size 32] [--count 10000]
"""

import argparse
import colorsys
import os

from PIL import Image, ImageOps

from utils.shapes import draw_shapes

BORDER = 2  # of 32 pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--classes", type=int, default=100, help="at least 10; c has shape c %% 10, hue c // 10")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--count", type=int, default=10_000, help="training images; a fifth as many test images")
    opt = parser.parse_args()
    for split, count in (("train", opt.count), ("test", opt.count // 5)):
        images, labels = draw_shapes(split)
        by_shape = [images[labels == shape] for shape in range(10)]
        for i in range(count):
            label = i % opt.classes
            shapes, number = by_shape[label % 10], i // opt.classes * (opt.classes // 10) + label // 10
            hue = colorsys.hsv_to_rgb(label // 10 * 10 / opt.classes, 1, 1)
            inside = Image.fromarray(shapes[number % len(shapes)].numpy()).resize((32 - 2 * BORDER,) * 2)
            picture = ImageOps.expand(inside, BORDER, tuple(round(255 * value) for value in hue))
            folder = os.path.join(opt.folder, split, f"{label:03d}")
            os.makedirs(folder, exist_ok=True)
            picture.resize((opt.size,) * 2).save(os.path.join(folder, f"{i:05d}.png"))


if __name__ == "__main__":
    main()
