"""The forms of a trigger: a pattern of few pixels, a smooth warp, or waves of brightness.

A pattern is (3, H, W) in [-1, 1], added to an image in [0, 1]; or a warp, (2, H, W): the offset, in x and in y, of the
position that each pixel is read from, in grid_sample's coordinates (-1 and 1 are the outermost pixels).

PixelForm and WarpForm are what an inversion optimises, P patterns at a time: (P, ...) parameters, their start, the
patterns they stand for, the penalty on a pattern's size in the loss, and that size as reported.
"""

import itertools
import math

import torch
import torch.nn.functional as F

VISIBLE = 1 / 255  # smaller changes vanish in an 8-bit image
CONTROL_POINTS = 8  # of a warp, a side: twice WaNet's, which a defender cannot know
WAVE_HEIGHT = 1 / 8  # amplitude, of the range [0, 1]
MAX_CYCLES = 16  # of a wave, over the height and over the width


def apply_patterns(images, patterns) -> torch.Tensor:
    """x', (B, 3, H, W): each image with one of (V, C, H, W) patterns, in turn; clamp(x + d, 0, 1) where C is 3."""
    if len(patterns) == 1:  # expanded, not indexed: the gradient of an index is summed in no fixed order
        assigned = patterns.expand(len(images), -1, -1, -1)
    else:
        assigned = patterns[torch.arange(len(images), device=images.device) % len(patterns)]
    if patterns.shape[1] == 3:
        return (images + assigned).clamp(0, 1)
    height, width = images.shape[2:]
    y, x = (torch.linspace(-1, 1, n, device=images.device) for n in (height, width))
    identity = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], 2)
    grid = identity + assigned.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


class PatternApplier:
    """apply_patterns for one batch after another; where V exceeds B, each batch starts where the last one ended."""

    def __init__(self, patterns):
        self.patterns = patterns

    def __call__(self, images) -> torch.Tensor:
        triggered = apply_patterns(images, self.patterns)
        if len(self.patterns) > len(images):
            self.patterns = self.patterns.roll(-len(images), 0)
        return triggered


def mirror(patterns) -> torch.Tensor:
    """Mirrored (..., C, H, W) patterns: applied to a mirrored image, they give the mirrored triggered image."""
    mirrored = patterns.flip(-1)
    if patterns.shape[-3] == 2:
        mirrored[..., 0, :, :] *= -1
    return mirrored


class PixelForm:
    """d = clamp(p, 0, 1) - clamp(q, 0, 1), in few pixels (Tao et al., CVPR 2022); parameters (P, 2, 3, H, W)."""

    name = "pixels"
    lr = 0.1  # of Adam
    first_weight = 1e-3  # of the penalty, in the first round of an inversion
    weight = 1e-2  # in later rounds, and in the target search

    def __init__(self, shape):
        self.shape = tuple(shape)
        self.max_norm = math.prod(shape)

    def start(self, count, rng):
        """p and q of `count` patterns, U[0, 1)."""
        return torch.rand(2, count, *self.shape, generator=rng).transpose(0, 1).contiguous()

    def pattern(self, parameters):
        """d, (P, 3, H, W)."""
        return parameters[:, 0].clamp(0, 1) - parameters[:, 1].clamp(0, 1)

    def quantised(self, parameters):
        """d without the changes that vanish in an 8-bit image."""
        pattern = self.pattern(parameters)
        return torch.where(pattern.abs() < VISIBLE, 0.0, pattern)

    def penalty(self, parameters):
        """R, (P,): the sum over p and q and over pixels of max over channels of tanh(v / 10) / (2 - 1e-7) + 0.5."""
        return (torch.tanh(parameters / 10) / (2 - 1e-7) + 0.5).amax(2).flatten(2).sum(2).sum(1)

    def norm(self, patterns):
        """(P,) L1 norms over pixels and channels, in units of the full range [0, 1]."""
        return patterns.abs().flatten(1).sum(1)

    def extent(self, pattern):
        """Number of changed pixels of one pattern."""
        return int((pattern != 0).any(0).sum())


class WarpForm:
    """A smooth warp, as in WaNet (Nguyen and Tran, ICLR 2021); parameters: offsets of control points, (P, 2, 8, 8)."""

    name = "warp"
    lr, first_weight, weight = 3e-3, 400.0, 400.0

    def __init__(self, shape):
        self.shape = tuple(shape[1:])
        self.max_norm = self.shape[1]

    def start(self, count, rng):
        """Offsets of about a tenth of a pixel in an image of 32."""
        return 6e-3 * torch.randn(count, 2, CONTROL_POINTS, CONTROL_POINTS, generator=rng)

    def pattern(self, parameters):
        """The offset at each pixel, (P, 2, H, W)."""
        return F.interpolate(parameters, self.shape, mode="bicubic", align_corners=True)

    quantised = pattern

    def penalty(self, parameters):
        """(P,) mean squared offsets."""
        return self.pattern(parameters).square().flatten(1).mean(1)

    def norm(self, patterns):
        """(P,) root mean squared offsets along an axis, in pixels of the width."""
        return patterns.square().flatten(1).mean(1).sqrt() * (self.shape[1] - 1) / 2

    def extent(self, pattern):
        """`norm` of one pattern."""
        return self.norm(pattern[None]).item()


def frequencies(size) -> list[tuple[int, int]]:
    """All distinct waves over an image of `size` (H, W), as cycles over the height and over the width."""
    max_down, max_across = (min(MAX_CYCLES, n // 2) for n in size)  # beyond half the pixels, waves alias
    candidates = itertools.product(range(1 - max_down, max_down + 1), range(max_across + 1))
    # The rest are constant, or equal to another one read backwards (at the finest frequency: forwards).
    return [
        (down, across)
        for down, across in candidates
        if down > 0 or (across > 0 and (down == 0 or 2 * across < size[1]))
    ]


def waves(size, frequency, device) -> torch.Tensor:
    """A wave of brightness in four phases, (4, 3, H, W); SIG's trigger is one (Barni et al., ICIP 2019)."""
    rows, columns = (torch.arange(n, device=device) / n for n in size)
    cycles = frequency[0] * rows[:, None] + frequency[1] * columns
    phases = torch.arange(4, device=device)[:, None, None] / 4
    return WAVE_HEIGHT * torch.sin(2 * math.pi * (cycles + phases))[:, None].expand(-1, 3, -1, -1)
