"""The pictures that blendTrigger, randomPixelTrigger and imageTrigger blend into the image."""

import torch
from torchvision.transforms.v2.functional import pil_to_tensor

from utils.datasets import open_picture
from utils.errors import UserError

DISCS = 12  # in a drawn picture


def random_mask(size: tuple[int, int], rng: torch.Generator) -> dict:
    """A random grey value, 0..255, for each pixel: {"picture": (H, W, 1) uint8}."""
    return {"picture": torch.randint(256, (*size, 1), dtype=torch.uint8, generator=rng)}


def blend_picture(size: tuple[int, int], rng: torch.Generator, trigger_image: str | None = None) -> dict:
    """The file `trigger_image`, resized, or without one a drawn picture: {"picture": (H, W, 3) uint8}.

    Raises:
        UserError: the file cannot be read as an image.
    """
    return {"picture": _draw(size, rng) if trigger_image is None else _read(trigger_image, "RGB", size)}


def own_picture(size: tuple[int, int], rng: torch.Generator, trigger_image: str | None = None) -> dict:
    """The file `trigger_image`, which has the size of the images: {"picture": (H, W, 4) uint8}, RGB and opacity.

    Raises:
        UserError: there is no file, it cannot be read as an image, it has another size, or it is opaque or transparent
            everywhere.
    """
    if trigger_image is None:
        raise UserError(
            "imageTrigger needs --trigger_image FILE.png, a picture of the images' size with an alpha channel"
        )
    picture = _read(trigger_image, "RGBA")
    if picture.shape[:2] != size:
        found, expected = ("x".join(map(str, shape)) for shape in (picture.shape[:2], size))
        raise UserError(f"--trigger_image {trigger_image} has {found} pixels, but the images have {expected}")
    if picture[..., 3].min() == 255 or picture[..., 3].max() == 0:
        raise UserError(
            f"--trigger_image {trigger_image} is opaque or transparent everywhere; its alpha must show the trigger"
        )
    return {"picture": picture}


def _read(path, mode, size=None):
    """A picture of PIL's `mode`, (H, W, channels) uint8, resized to (H, W) `size` if given."""
    try:
        picture = open_picture(path, mode)
        return pil_to_tensor(picture.resize(size[::-1]) if size else picture).permute(1, 2, 0).contiguous()
    except Exception as error:  # noqa: BLE001 - Pillow raises many kinds for a broken file
        raise UserError(f"--trigger_image {path} cannot be read as an image ({error})") from None


def _draw(size, rng):
    """Overlapping discs in saturated colours on a vertical gradient."""
    y, x = torch.linspace(-1, 1, size[0])[:, None], torch.linspace(-1, 1, size[1])
    top, bottom, *colours = torch.randint(2, (2 + DISCS, 3), generator=rng).float()
    picture = torch.lerp(top, bottom, (y[..., None] + 1) / 2).repeat(1, size[1], 1)
    centres, radii = 2 * torch.rand(DISCS, 2, generator=rng) - 1, 0.15 + 0.3 * torch.rand(DISCS, generator=rng)
    for colour, (row, column), radius in zip(colours, centres, radii, strict=True):
        picture[(y - row) ** 2 + (x - column) ** 2 < radius**2] = colour
    return (picture * 255).round().to(torch.uint8)
