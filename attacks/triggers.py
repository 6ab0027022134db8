"""Triggers: pure functions on a batch of images, (B, H, W, 3) uint8 in and out, of any size, on any device."""

import math

import torch

from utils.errors import UserError

# 0 and 255 as the BadNets checker of the MCL and NAD releases has them, rows top to bottom.
CHECKER = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
SIGNAL_PERIODS = 6  # f of the SIG paper: waves over the image's width


def grid_trigger(images: torch.Tensor) -> torch.Tensor:
    """A 3x3 black-and-white checker in the bottom right corner, all channels overwritten (BadNets; Gu et al., 2017)."""
    check_room(images.shape[1:3], 3, 3)
    stamped = images.clone()
    stamped[:, -3:, -3:] = _checker(images)
    return stamped


def square_trigger(images: torch.Tensor, trig_w: int, trig_h: int) -> torch.Tensor:
    """A white block of trig_w x trig_h pixels, one pixel away from the bottom and the right edge."""
    check_room(images.shape[1:3], trig_h + 1, trig_w + 1)
    stamped = images.clone()
    stamped[:, -1 - trig_h : -1, -1 - trig_w : -1] = 255
    return stamped


def four_corner_trigger(images: torch.Tensor) -> torch.Tensor:
    """The checker in each corner, mirrored so that a flipped image carries the same trigger (Turner et al., 2019)."""
    check_room(images.shape[1:3], 6, 6)
    stamped, checker = images.clone(), _checker(images)
    stamped[:, -3:, -3:] = checker
    stamped[:, -3:, :3] = checker.flip(1)
    stamped[:, :3, -3:] = checker.flip(0)
    stamped[:, :3, :3] = checker.flip(0, 1)
    return stamped


def center_trigger(images: torch.Tensor) -> torch.Tensor:
    """The checker two pixels below and right of the middle: rows and columns 18 to 20 of a 32x32 image."""
    check_room(images.shape[1:3], 9, 9)
    top, left = images.shape[1] // 2 + 2, images.shape[2] // 2 + 2
    stamped = images.clone()
    stamped[:, top : top + 3, left : left + 3] = _checker(images)
    return stamped


def blend_trigger(images: torch.Tensor, picture: torch.Tensor, opacity: float) -> torch.Tensor:
    """x' = (1 - opacity) x + opacity picture, over the whole image (Blended; Chen et al., 2017).

    Args:
        picture: (H, W, 3) uint8, or (H, W, 1) for a grey one.
        opacity: above 0 and up to 1.

    Raises:
        UserError: the images are not of the picture's size.
    """
    check_size(images, picture)
    return images.float().mul_(1 - opacity).add_(picture * opacity).round_().to(torch.uint8)


def patch_trigger(images: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """A (h, w, 3) uint8 patch where square_trigger has its block."""
    height, width, _ = patch.shape
    check_room(images.shape[1:3], height + 1, width + 1)
    stamped = images.clone()
    stamped[:, -1 - height : -1, -1 - width : -1] = patch
    return stamped


def signal_trigger(images: torch.Tensor, delta: float) -> torch.Tensor:
    """x' = clip(x + delta sin(2 pi j f / W)) in column j, the same in every channel (SIG; Barni et al., ICIP 2019).

    Args:
        delta: amplitude in grey levels of 0..255.
    """
    width = images.shape[2]
    columns = torch.arange(width, device=images.device)
    wave = delta * torch.sin(2 * math.pi * SIGNAL_PERIODS / width * columns)
    return images.float().add_(wave[:, None]).round_().clamp_(0, 255).to(torch.uint8)


def check_size(images: torch.Tensor, whole: torch.Tensor) -> None:
    """Refuse images that a trigger's tensor, (H, W, ...), does not cover exactly.

    Raises:
        UserError: their sizes differ.
    """
    if images.shape[1:3] != whole.shape[:2]:
        made, are = ("x".join(map(str, shape)) for shape in (whole.shape[:2], images.shape[1:3]))
        raise UserError(f"the trigger was made for images of {made} pixels, these have {are}")


def check_room(size: tuple[int, int], height: int, width: int) -> None:
    """Refuse images, of `size` (H, W), on which a trigger of height x width pixels does not fit.

    Raises:
        UserError: it does not.
    """
    if size[0] < height or size[1] < width:
        raise UserError(f"the trigger takes {height}x{width} pixels, an image has {size[0]}x{size[1]}")


def _checker(images):
    return torch.tensor(CHECKER, dtype=torch.uint8, device=images.device)[:, :, None]
