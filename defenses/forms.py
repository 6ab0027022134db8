"""What an inverted trigger may be: a change of a few pixels, a smooth warp, or waves of brightness over the image.

A pattern is (3, H, W) in [-1, 1], to be added to an image in [0, 1]; or (2, H, W), a warp: the shift, in x and in y, of
the place from which each pixel is read, where the outermost pixels are at -1 and 1, as torch's grid_sample has it.

Pixels and Warp are what an inversion optimises, P patterns at a time: (P, ...) parameters, where they start, the
patterns that they stand for, and their size, as a loss has it and as it is told.
"""

import itertools
import math

import torch
import torch.nn.functional as F

VISIBLE = 1 / 255  # smaller changes vanish in an 8-bit image
CONTROL_POINTS = 8  # of a warp, a side: twice WaNet's, which a defender cannot know
WAVE_HEIGHT = 40 / 255  # SIG's, in the test
MOST_CYCLES = 16  # of a wave, over the height and over the width, of any image


def stamp(images, patterns, turn=0) -> torch.Tensor:
    """x', (B, 3, H, W): the (V, C, H, W) patterns dealt out to the images in turn; clamp(x + d, 0, 1) where C is 3.

    turn: of several batches, which it is; where V is more than B, each starts where the last one ended.
    """
    first = turn * len(images) if len(patterns) > len(images) else 0
    if len(patterns) == 1:  # not by index: threads would sum its gradient in any order
        dealt = patterns.expand(len(images), -1, -1, -1)
    else:
        dealt = patterns[(torch.arange(len(images), device=images.device) + first) % len(patterns)]
    if patterns.shape[1] == 3:
        return (images + dealt).clamp(0, 1)
    height, width = images.shape[2:]
    y, x = (torch.linspace(-1, 1, n, device=images.device) for n in (height, width))
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2) + dealt.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def mirror(patterns) -> torch.Tensor:
    """(..., C, H, W), such that a stamped image's mirror image is the mirror image stamped with these."""
    flipped = patterns.flip(-1)
    if patterns.shape[-3] == 2:
        flipped[..., 0, :, :] *= -1
    return flipped


class Pixels:
    """d = clamp(p, 0, 1) - clamp(q, 0, 1), in few pixels (Tao et al., CVPR 2022); parameters (P, 2, 3, H, W)."""

    name = "pixels"
    lr, first_weight, weight = 0.1, 1e-3, 1e-2  # of Adam; of the size in a first inversion, and later or in a search

    def __init__(self, shape):
        self.shape = tuple(shape)
        self.largest = math.prod(shape)

    def start(self, count, rng):
        """p and q of so many patterns, U[0, 1)."""
        return torch.rand(2, count, *self.shape, generator=rng).transpose(0, 1).contiguous()

    def pattern(self, parameters):
        """d, (P, 3, H, W)."""
        return parameters[:, 0].clamp(0, 1) - parameters[:, 1].clamp(0, 1)

    def shown(self, parameters):
        """d as 8-bit images show it: what vanishes there is 0."""
        pattern = self.pattern(parameters)
        return torch.where(pattern.abs() < VISIBLE, 0.0, pattern)

    def size(self, parameters):
        """R, (P,): over p and q, the sum over pixels of the channels' maximum of tanh(v / 10) / (2 - 1e-7) + 0.5."""
        return (torch.tanh(parameters / 10) / (2 - 1e-7) + 0.5).amax(2).flatten(2).sum(2).sum(1)

    def measure(self, patterns):
        """(P,) sums of absolute values over pixels and channels, in units of the full range [0, 1]."""
        return patterns.abs().flatten(1).sum(1)

    def extent(self, pattern):
        """How many pixels a pattern changes: what a smaller pattern has fewer of."""
        return int((pattern != 0).any(0).sum())


class Warp:
    """A smooth warp, as of WaNet (Nguyen and Tran, ICLR 2021); parameters: the control points' shifts, (P, 2, 8, 8)."""

    name = "warp"
    lr, first_weight, weight = 3e-3, 400.0, 400.0

    def __init__(self, shape):
        self.shape = tuple(shape[1:])
        self.largest = self.shape[1]

    def start(self, count, rng):
        """Shifts of a tenth of a pixel of 32 or so."""
        return 6e-3 * torch.randn(count, 2, CONTROL_POINTS, CONTROL_POINTS, generator=rng)

    def pattern(self, parameters):
        """The field at each pixel, (P, 2, H, W)."""
        return F.interpolate(parameters, self.shape, mode="bicubic", align_corners=True)

    shown = pattern

    def size(self, parameters):
        """(P,) mean squared shifts."""
        return self.pattern(parameters).square().flatten(1).mean(1)

    def measure(self, patterns):
        """(P,) root mean squared shifts along an axis, in pixels of the width."""
        return patterns.square().flatten(1).mean(1).sqrt() * (self.shape[1] - 1) / 2

    def extent(self, pattern):
        """`measure` of one pattern."""
        return self.measure(pattern[None]).item()


def frequencies(size) -> list[tuple[int, int]]:
    """All whole numbers of cycles over the height and the width, (down, across), that waves over an image may have."""
    most_down, most_across = (min(MOST_CYCLES, n // 2) for n in size)  # finer ones look like coarse ones again
    every = itertools.product(range(1 - most_down, most_down + 1), range(most_across + 1))
    # The others are none, or the same read backwards, which is forwards for the finest.
    return [(down, across) for down, across in every if down > 0 or 0 < across and (down == 0 or 2 * across < size[1])]


def waves(size, frequency, device) -> torch.Tensor:
    """A wave of brightness in four phases, (4, 3, H, W). SIG's are such (Barni et al., 2019)."""
    rows, columns = (torch.arange(n, device=device) / n for n in size)
    cycles = frequency[0] * rows[:, None] + frequency[1] * columns
    phases = torch.arange(4, device=device)[:, None, None] / 4
    return WAVE_HEIGHT * torch.sin(2 * math.pi * (cycles + phases))[:, None].expand(-1, 3, -1, -1)
