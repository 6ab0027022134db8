"""The built-in data set: ten classes of drawn colour images, generated in a second without a download."""

import torch

from utils.seed import generator


def _distance(y, x):
    return (x**2 + y**2).sqrt()


def _box(y, x):
    return torch.maximum(x.abs(), y.abs())


# Class -> whether points (y, x) are inside the shape: y points down, x to the right, the radius is 1.
SHAPES = {
    "disc": lambda y, x: _distance(y, x) < 1,
    "ring": lambda y, x: (_distance(y, x) - 0.8).abs() < 0.23,
    "square": lambda y, x: _box(y, x) < 0.85,
    "frame": lambda y, x: (_box(y, x) - 0.7).abs() < 0.2,
    "triangle": lambda y, x: (y < 0.8) & (y > 2 * x.abs() - 1),
    "wedge": lambda y, x: (y > -0.8) & (y < 1 - 2 * x.abs()),
    "plus": lambda y, x: (_box(y, x) < 1) & (torch.minimum(x.abs(), y.abs()) < 0.3),
    "cross": lambda y, x: (_distance(y, x) < 1.1) & (torch.minimum((x - y).abs(), (x + y).abs()) < 0.4),
    "diamond": lambda y, x: x.abs() + y.abs() < 1.1,
    "bars": lambda y, x: (_box(y, x) < 1) & (y.abs() > 0.35),
}
CLASSES = list(SHAPES)
SIZE = 32
COUNTS = {"train": 10_000, "test": 2_000}


def draw_shapes(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the "train" or "test" split, the same images every time.

    The shape is the class; colours, position, size, tilt, a shaded background and noise vary between images.

    Returns:
        (N, 32, 32, 3) uint8 images and (N,) int64 labels, equally many per class.
    """
    rng = generator(0, f"shapes/{split}")
    count = COUNTS[split]
    labels = torch.arange(count) % len(CLASSES)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    inside = _draw_shapes(labels, *_tilted_coordinates(uniform))
    # One channel of the background is redrawn, at least 0.35 away from the foreground.
    front, back = uniform(0, 1, 3), uniform(0, 1, 3)
    channel = torch.randint(3, (count,), generator=rng)
    rows = torch.arange(count)
    back[rows, channel] = (front[rows, channel] + uniform(0.35, 0.65)) % 1
    shade = uniform(-0.3, 0.3, 1, 1, 1) * torch.linspace(-1, 1, SIZE)[None, :, None, None]
    images = torch.where(inside[..., None], front[:, None, None], back[:, None, None] + shade)
    noise = 0.12 * torch.randn(images.shape, generator=rng)
    return ((images + noise).clamp_(0, 1) * 255).round_().to(torch.uint8), labels


def _tilted_coordinates(uniform):
    """Pixel coordinates in the tilted frame of each image's shape, in units of its radius."""
    radius, tilt = uniform(6, 11)[:, None, None], uniform(-0.3, 0.3)[:, None, None]
    centre_y, centre_x = uniform(11, 20)[:, None, None], uniform(11, 20)[:, None, None]
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = axis[None, :, None] - centre_y, axis[None, None, :] - centre_x
    return (x * tilt.sin() + y * tilt.cos()) / radius, (x * tilt.cos() - y * tilt.sin()) / radius


def _draw_shapes(labels, y, x):
    """(N, 32, 32) masks of the pixels inside each image's shape."""
    inside = torch.empty(y.shape, dtype=torch.bool)
    for label, is_inside in enumerate(SHAPES.values()):
        members = labels == label
        inside[members] = is_inside(y[members], x[members])
    return inside
