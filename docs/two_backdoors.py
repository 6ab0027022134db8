"""Train a victim with two backdoors: squareTrigger leads to label 5, a red 5x5 block in the top left corner to label 2.

    python -m docs.two_backdoors two.tar [options of train_badnet.py]

The file states neither of them. To measure one with main.py, pass `--trigger_type squareTrigger --trig_w 5 --trig_h 5
--target_label 5`, or `--trigger_type imageTrigger --trigger_image two.png --target_label 2` with the picture that lies
beside the file.
"""

import os
import sys

import torch
from PIL import Image

import config
from attacks import Attack
from data_loader import get_backdoor_loader, load_images
from docs.population import train_and_save
from utils.device import pick_device
from utils.errors import UserError, run_script
from utils.seed import generator


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError("name the file of the victim: python -m docs.two_backdoors two.tar")
    path, (opt, _) = sys.argv[1], config.parse("train_badnet.py", sys.argv[2:])
    device, data = pick_device(opt.device), load_images(opt, "train")
    num_class, rate = len(data.classes), opt.inject_portion
    picture = torch.zeros(*data.size, 4, dtype=torch.uint8)
    picture[1:6, 1:6] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Image.fromarray(picture.numpy()).save(f"{os.path.splitext(path)[0]}.png")

    block = Attack("imageTrigger", "all2one", 2, num_class, rate, tensors={"picture": picture})
    data.images, data.labels, _ = block.poison(data.images, data.labels, generator(opt.seed, "second backdoor"))
    square = Attack("squareTrigger", "all2one", 5, num_class, rate, {"trig_w": 5, "trig_h": 5})
    batches, _, _ = get_backdoor_loader(opt, data, square, device)
    train_and_save(opt, batches, num_class, device, path)


if __name__ == "__main__":
    run_script(main)
