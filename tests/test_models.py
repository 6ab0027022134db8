"""The architectures and the normalisation in front of them."""

import pytest
import torch

from models import select_model
from utils.errors import UserError


@pytest.mark.parametrize(
    ("arch", "dimensions", "parameters"),
    [
        ("WRN-16-1", 64, 175_066),  # the count published for WRN-16-1 with ten classes
        ("WRN-10-2", 128, None),
        ("WRN-40-2", 128, 2_243_546),  # likewise for WRN-40-2
        ("ResNet18", 512, 11_173_962),
        ("PreActResNet18", 512, 11_171_146),
    ],
)
def test_features_lead_to_the_logits(arch, dimensions, parameters):
    model = select_model(arch, 10).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features, logits = model.features(images), model(images)
        assert features.shape == (2, dimensions)
        assert torch.allclose(model.head(features), logits, atol=1e-5)
    if parameters:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_images_are_normalised_once_and_the_constants_are_no_weights():
    torch.manual_seed(0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = select_model("WRN-10-1", 3, mean, std).eval()
    images = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        assert torch.allclose(model(images), model.network(by_hand), atol=1e-6)
    assert not any("normalize" in name for name in model.state_dict())


@pytest.mark.parametrize("arch", ["WRN-17-1", "WRN-16-0", "WRN-4-1", "VGG", "resnet18"])
def test_unknown_architectures_are_refused(arch):
    with pytest.raises(UserError):
        select_model(arch, 10)
