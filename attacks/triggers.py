"""Triggers: pure functions on a batch of images, (B, H, W, 3) uint8 in and out, of any size, on any device."""

import torch

from utils.errors import UserError

# 0 and 255 as the BadNets checker of the MCL and NAD releases has them, rows top to bottom.
CHECKER = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


def grid_trigger(images: torch.Tensor) -> torch.Tensor:
    """A 3x3 black-and-white checker in the bottom right corner, all channels overwritten (BadNets; Gu et al., 2017)."""
    _check_room(images, 3, 3)
    stamped = images.clone()
    checker = torch.tensor(CHECKER, dtype=torch.uint8, device=images.device)
    stamped[:, -3:, -3:] = checker[:, :, None]
    return stamped


def square_trigger(images: torch.Tensor, trig_w: int, trig_h: int) -> torch.Tensor:
    """A white block of trig_w x trig_h pixels, one pixel away from the bottom and the right edge."""
    _check_room(images, trig_h + 1, trig_w + 1)
    stamped = images.clone()
    stamped[:, -1 - trig_h : -1, -1 - trig_w : -1] = 255
    return stamped


def _check_room(images, height, width):
    if images.shape[1] < height or images.shape[2] < width:
        raise UserError(f"the trigger takes {height}x{width} pixels, an image has {images.shape[1]}x{images.shape[2]}")
