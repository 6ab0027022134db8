"""The architectures, the normalisation in front of them, and loading them from checkpoints."""

import pytest
import torch
from conftest import CPU, METADATA

from defenses.inversion.objective import untargeted_loss
from models import load_classifier, load_clean_model, select_model
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.device import autocast
from utils.errors import UserError

NO_NORMALIZATION = ([0.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    ("arch", "dimensions", "parameters"),
    [  # the parameter counts of the WRNs are published
        ("WRN-16-1", 64, 175_066),
        ("WRN-10-2", 128, None),
        ("WRN-40-2", 128, 2_243_546),
        ("ResNet18", 512, 11_173_962),
        ("PreActResNet18", 512, 11_171_146),
    ],
)
def test_logits_are_the_head_of_the_features(arch, dimensions, parameters):
    model = select_model(arch, 10).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features, logits = model.features(images), model(images)
        assert features.shape == (2, dimensions)
        assert torch.allclose(model.head(features), logits, atol=1e-5)
    if parameters:
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_losses_see_float32_whatever_the_precision():
    model, images, labels = select_model("WRN-10-1", 4).eval(), torch.rand(2, 3, 16, 16), torch.tensor([0, 3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.network(images).dtype == torch.bfloat16
        maps, logits = model.maps_and_logits(images)
        assert {output.dtype for output in (*maps, logits, model(images), model.features(images))} == {torch.float32}
        expected = -torch.log(1 - logits.double().softmax(1)[[0, 1], labels])
        assert torch.allclose(untargeted_loss(logits, labels).double(), expected, rtol=1e-5)


@pytest.mark.parametrize("arch", ["WRN-16-1", "ResNet18", "PreActResNet18"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nad_compares_what_the_groups_of_blocks_return(arch, precision):
    torch.manual_seed(0)
    model = select_model(arch, 3).eval()
    names = ["block1", "block2", "block3"] if arch == "WRN-16-1" else ["layer2", "layer3", "layer4"]
    returned, images = [], torch.rand(2, 3, 16, 16)
    for name in names:
        model.network.get_submodule(name).register_forward_hook(lambda *call: returned.append(call[2].float().clone()))
    with torch.no_grad(), autocast(CPU, precision):
        maps, _ = model.maps_and_logits(images)
    for feature, expected in zip(maps, returned, strict=True):
        assert torch.equal(feature, expected)


def test_images_are_normalised_once_and_the_constants_are_not_in_the_state_dict():
    torch.manual_seed(0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = select_model("WRN-10-1", 3, mean, std).eval()
    images = torch.rand(2, 3, 8, 8)
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    with torch.no_grad():
        assert torch.allclose(model(images), model.network(normalised), atol=1e-6)
    assert not any("normalize" in name for name in model.state_dict())


@pytest.mark.parametrize("arch", ["WRN-17-1", "WRN-16-0", "WRN-4-1", "VGG", "resnet18"])
def test_unknown_architectures_are_refused(arch):
    with pytest.raises(UserError):
        select_model(arch, 10)


def save_weights(folder, name, **metadata):
    """Write the state_dict of a WRN-10-1 of four classes; returns it and the path."""
    torch.manual_seed(0)
    model, path = select_model("WRN-10-1", 4), str(folder / name)
    save_checkpoint(path, model, **metadata)
    return model.network.state_dict(), path


def test_the_metadata_of_a_checkpoint_wins_over_the_arguments(tmp_path):
    weights, path = save_weights(tmp_path, "a.tar", **METADATA)
    model, metadata = load_classifier(read_checkpoint(path), path, "ResNet18", 4, NO_NORMALIZATION, CPU)
    assert metadata == METADATA
    assert model.normalize.mean.flatten().tolist() == pytest.approx(METADATA["normalization"][0])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.network.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_arguments_hold_for_a_checkpoint_without_metadata(tmp_path):
    _, path = save_weights(tmp_path, "a.tar")
    model, metadata = load_classifier(read_checkpoint(path), path, "WRN-10-1", 4, NO_NORMALIZATION, CPU)
    assert metadata == {"arch": "WRN-10-1", "num_class": 4, "normalization": NO_NORMALIZATION}
    assert model.normalize.std.flatten().tolist() == [1.0] * 3


def test_a_clean_model_that_is_missing_or_has_other_classes_is_refused(tmp_path):
    weights, path = save_weights(tmp_path, "a.tar", **METADATA)
    model = load_clean_model(path, 4, NO_NORMALIZATION, CPU, "WRN-16-1", (32, 32), "train one")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.network.state_dict().items())
    with pytest.raises(UserError, match="has 4 classes, but 10 are needed; "):
        load_clean_model(path, 10, NO_NORMALIZATION, CPU, "WRN-16-1", (32, 32), "train one")
    with pytest.raises(UserError, match="no clean model at .*; train one$"):
        load_clean_model(str(tmp_path / "b.tar"), 4, NO_NORMALIZATION, CPU, "WRN-16-1", (32, 32), "train one")
