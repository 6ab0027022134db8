"""PreActResNet18 for small images (He et al., ECCV 2016), with the parameter names of published victims."""

import torch
import torch.nn.functional as F
from torch import nn


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, around a shortcut."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x):
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True)).add_(shortcut)


class PreActResNet18(nn.Module):
    """Four groups of two blocks, 64 to 512 channels; the features have 512 dimensions."""

    def __init__(self, num_class):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_class)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) normalised images -> (B, C, h, w) feature maps of the last three groups."""
        layer2 = self.layer2(self.layer1(self.conv1(x)))
        layer3 = self.layer3(layer2)
        return [layer2, layer3, self.layer4(layer3)]

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, 512, h, w) feature maps of the last group -> (B, 512) features."""
        return maps.mean((2, 3))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised images -> (B, 512) pooled features."""
        return self.pool(self.maps(x)[-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised images -> (B, num_class) logits."""
        return self.linear(self.features(x))
