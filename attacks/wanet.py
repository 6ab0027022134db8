"""WaNet: a smooth warp as the trigger (Nguyen and Tran, ICLR 2021)."""

import torch
import torch.nn.functional as F

from attacks.triggers import check_size

CONTROL_POINTS = 4  # k of the paper: the warp is interpolated between k x k random points


def warping_grid(size: tuple[int, int], rng: torch.Generator, warp: float) -> dict:
    """The source position of each pixel of a warped image: {"grid": (H, W, 2) float32}, x and y in [-1, 1].

    Args:
        warp: the strength s of the paper; the mean shift is about s/2 pixels in each direction.
    """
    height, width = size
    points = 2 * torch.rand(1, 2, CONTROL_POINTS, CONTROL_POINTS, generator=rng) - 1
    field = F.interpolate(points / points.abs().mean(), size, mode="bicubic", align_corners=True)[0]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack([x, y], 2) + warp * field.permute(1, 2, 0) / height
    return {"grid": grid.clamp(-1, 1)}


def wanet_trigger(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Warp (B, H, W, 3) uint8 images by an (H, W, 2) grid.

    Raises:
        UserError: the images do not have the grid's size.
    """
    check_size(images, grid)
    return _warp(images, grid.expand(len(images), *grid.shape))


def wanet_noise(images: torch.Tensor, rng: torch.Generator, grid: torch.Tensor) -> torch.Tensor:
    """The paper's noise mode: warp each image by the grid plus its own jitter, U(-1, 1) / H a pixel.

    Such cover images keep their true labels in training, so that the backdoor responds to the exact warp only.
    """
    check_size(images, grid)
    jitter = 2 * torch.rand(len(images), *grid.shape, generator=rng) - 1
    return _warp(images, (grid + jitter.to(images.device) / images.shape[1]).clamp_(-1, 1))


def _warp(images, grids):
    warped = F.grid_sample(images.permute(0, 3, 1, 2).float(), grids, align_corners=True)
    return warped.permute(0, 2, 3, 1).round_().to(torch.uint8)
