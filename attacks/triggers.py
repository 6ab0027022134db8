"""Triggers: pure functions on (B, H, W, 3) uint8 images, of any size and on any device."""

import math

import torch

from utils.errors import UserError

# The 3x3 checker of BadNets, as in the released code of NAD and MCL; rows from top to bottom.
CHECKER = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
SIGNAL_PERIODS = 6  # f of the SIG paper: periods over the image's width


def grid_trigger(images: torch.Tensor) -> torch.Tensor:
    """A 3x3 black-and-white checker in the bottom right corner (BadNets; Gu et al., 2017)."""
    return _with_patch(images, _checker(images))


def square_trigger(images: torch.Tensor, trig_w: int, trig_h: int) -> torch.Tensor:
    """A white block of trig_w x trig_h pixels, one pixel away from the bottom and the right edge."""
    return _with_patch(images, images.new_tensor(255).expand(trig_h, trig_w, 1), margin=1)  # expanded: no memory yet


def four_corner_trigger(images: torch.Tensor) -> torch.Tensor:
    """The checker in each corner, mirrored so that a flipped image has the same trigger (Turner et al., 2019)."""
    check_patch_fits(images.shape[1:3], 6, 6)
    triggered, checker = images.clone(), _checker(images)
    triggered[:, -3:, -3:] = checker
    triggered[:, -3:, :3] = checker.flip(1)
    triggered[:, :3, -3:] = checker.flip(0)
    triggered[:, :3, :3] = checker.flip(0, 1)
    return triggered


def center_trigger(images: torch.Tensor) -> torch.Tensor:
    """The checker two pixels below and right of the middle: rows and columns 18 to 20 of a 32x32 image."""
    check_patch_fits(images.shape[1:3], 9, 9)
    top, left = images.shape[1] // 2 + 2, images.shape[2] // 2 + 2
    triggered = images.clone()
    triggered[:, top : top + 3, left : left + 3] = _checker(images)
    return triggered


def blend_trigger(images: torch.Tensor, picture: torch.Tensor, opacity: float | torch.Tensor) -> torch.Tensor:
    """x' = (1 - opacity) x + opacity picture, over the whole image (Blended; Chen et al., 2017).

    Args:
        picture: (H, W, 3) uint8, or (H, W, 1) for grey.
        opacity: in (0, 1], or (H, W, 1), from 0 to 1.

    Raises:
        UserError: the images do not have the picture's size.
    """
    check_size(images, picture)
    return images.float().mul_(1 - opacity).add_(picture * opacity).round_().to(torch.uint8)


def image_trigger(images: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """x' = (1 - a) x + a p, with the colours p and the opacity a, in [0, 1], of each pixel of a picture.

    Args:
        picture: (H, W, 4) uint8, RGB and opacity.

    Raises:
        UserError: the images do not have the picture's size.
    """
    return blend_trigger(images, picture[:, :, :3], picture[:, :, 3:] / 255)


def patch_trigger(images: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
    """A (h, w, 3) uint8 patch in the place of square_trigger's block."""
    return _with_patch(images, patch, margin=1)


def signal_trigger(images: torch.Tensor, delta: float) -> torch.Tensor:
    """x' = clip(x + delta sin(2 pi j f / W)) in column j, the same in every channel (SIG; Barni et al., ICIP 2019).

    Args:
        delta: amplitude in grey levels of 0..255.
    """
    width = images.shape[2]
    columns = torch.arange(width, device=images.device)
    wave = delta * torch.sin(2 * math.pi * SIGNAL_PERIODS / width * columns)
    return images.float().add_(wave[:, None]).round_().clamp_(0, 255).to(torch.uint8)


def check_size(images: torch.Tensor, tensor: torch.Tensor) -> None:
    """Raise a UserError if a trigger's tensor, (H, W, ...), does not have the size of the images."""
    if images.shape[1:3] != tensor.shape[:2]:
        expected, found = ("x".join(map(str, shape)) for shape in (tensor.shape[:2], images.shape[1:3]))
        raise UserError(f"the trigger is for images of {expected} pixels, but these have {found}")


def check_patch_fits(size: tuple[int, int], height: int, width: int) -> None:
    """Raise a UserError if a trigger of height x width pixels with its margin does not fit images of `size` (H, W)."""
    if size[0] < height or size[1] < width:
        raise UserError(f"the trigger needs {height}x{width} pixels, but the images have {size[0]}x{size[1]}")


def _with_patch(images, patch, margin=0):
    """The images with a (h, w, channels) patch `margin` pixels away from the bottom and the right edge."""
    height, width = patch.shape[0] + margin, patch.shape[1] + margin
    check_patch_fits(images.shape[1:3], height, width)
    triggered = images.clone()
    triggered[:, -height : -margin or None, -width : -margin or None] = patch
    return triggered


def _checker(images):
    return torch.tensor(CHECKER, dtype=torch.uint8, device=images.device)[:, :, None]
