"""PreActResNet18 for small images (He et al., ECCV 2016), with the parameter names of published victims."""

import torch.nn.functional as F
from torch import nn

from models.resnet import ResNet18


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


class PreActResNet18(ResNet18):
    """ResNet18 of pre-activation blocks, without batch norm in the stem."""

    def __init__(self, num_class):
        super().__init__(num_class, PreActBlock, stem_norm=False)
