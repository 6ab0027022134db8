"""select_model builds an architecture by its name; Classifier gives any network what a defense needs of it."""

import importlib.util
import inspect
import os
import re
import sys
from contextlib import contextmanager

import torch
import torchvision
from torch import nn

from models.preact_resnet import PreActResNet18
from models.resnet import ResNet18
from models.wresnet import WideResNet
from utils.checkpoint import runs_a_file
from utils.errors import UserError, did_you_mean

MAX_CLASSES = 100_000
RESNETS = {"ResNet18": ResNet18, "PreActResNet18": PreActResNet18}
LIBRARIES = ("torchvision", "timm")


class Normalize(nn.Module):
    """Per-channel (x - mean) / std. The constants are not in the state_dict; checkpoints store them as metadata."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.std


class Classifier(nn.Module):
    """A network with its normalisation in front, so that all other code works on images in [0, 1].

    `network` is the bare architecture, which state_dicts of published checkpoints load into. The feature g(x) is the
    input of its last linear layer, `head`: its name if it is known, else the last one that runs (see find_head).
    """

    def __init__(self, network, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), head: str | None = None):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network
        self.head_name, self.memory_format = head, torch.channels_last

    @property
    def head(self) -> nn.Linear:
        """The last linear layer, (B, D) features -> (B, num_class) logits."""
        return self.network.get_submodule(self.head_name)

    def find_head(self, name: str, num_class: int | None, size: tuple[int, int]) -> int:
        """Find the last linear layer by running the network, and check that it is a classifier of such images.

        Args:
            name: of the architecture, for messages.
            num_class: the number of logits that is expected; None: any.
            size: (H, W) of the images.

        Returns:
            the number of logits.

        Raises:
            UserError: the network fails on them, returns no (B, num_class) logits, or has no such layer at its end.
        """
        was_training, images = self.training, torch.zeros(2, 3, *size, device=next(self.parameters()).device)
        for layout in (torch.channels_last, torch.contiguous_format):  # x.view(len(x), -1) needs the latter
            self.memory_format = layout
            self.to(memory_format=layout)
            try:
                logits, runs = self._probe(images)
                break
            except Exception as error:  # noqa: BLE001 - the code of others can raise anything
                reason = _reason(error)
        else:
            raise UserError(f"{name} fails on images of {size[0]}x{size[1]} pixels: {reason}")
        self.train(was_training)
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        if len(shape) != 2 or shape != (2, num_class or shape[1]):
            raise UserError(f"{name} returns {shape} for 2 images, not logits of shape (2, {num_class or 'K'})")
        num_class = shape[1]
        last, output = runs[-1] if runs else ("", None)
        if output is None or not torch.equal(output, logits):
            raise UserError(f"{name} does not end with a linear layer of {num_class} logits, which MCL's features need")
        self.head_name = last
        return num_class

    def _probe(self, images):
        """The output for some images, and of each linear layer that runs its name and its output."""
        names = {module: name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)}
        runs = []
        with torch.no_grad(), _hooked(names, lambda layer, _, output: runs.append((names[layer], output))):
            return self.eval().network(self.normalize(images).contiguous(memory_format=self.memory_format)), runs

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, D) features, the input of the last linear layer: the paper's g(x).

        float32 under autocast as well: in bf16, the cosine of nearly equal features is off by up to 0.004.
        """
        features = []
        with _hooked([self.head], lambda _, inputs, output: features.append(inputs[0])):
            self(x)
        return features[-1].float()

    def maps_and_logits(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One forward pass: (B, 3, H, W) images in [0, 1] -> maps and logits.

        Returns:
            the (B, C, h, w) output of the last convolution at each of the last three resolutions, and the
            (B, num_class) logits.

        Raises:
            UserError: the network has fewer resolutions.
        """
        maps = {}

        def record(_, inputs, output):
            maps.pop(output.shape[2:], None)  # the last resolution comes last
            maps[output.shape[2:]] = output.float()

        with _hooked([module for module in self.network.modules() if isinstance(module, nn.Conv2d)], record):
            logits = self(x)
        if len(maps) < 3:
            raise UserError(f"nad compares feature maps of three resolutions, and this network has {len(maps)}")
        return list(maps.values())[-3:], logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, num_class) logits, float32 under autocast as well."""
        logits = self.network(self.normalize(x).contiguous(memory_format=self.memory_format))
        # In training, torchvision's GoogLeNet and Inception return those of auxiliary classifiers, too.
        return (logits[0] if isinstance(logits, tuple) else logits).float()


@contextmanager
def _hooked(modules, hook):
    """Call hook(module, inputs, output) whenever one of the modules has run."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def select_model(arch: str, num_class: int, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> Classifier:
    """Build an architecture with newly initialised weights.

    Args:
        arch: WRN-<depth>-<width>, ResNet18, PreActResNet18, torchvision:NAME, timm:NAME, or FILE.py:NAME, a class or
            function in a file, which is run; called with num_class or num_classes if it takes one of them.
        mean, std: constants of the normalisation per channel; the defaults change nothing.

    Returns:
        the Classifier; the head of an architecture of others is to be found with find_head.

    Raises:
        UserError: unknown architecture, one that cannot be built, or an implausibly large one.
    """
    if num_class > MAX_CLASSES:
        raise UserError(f"{num_class:,} classes are too many; at most {MAX_CLASSES:,} are supported")
    wide, head = re.fullmatch(r"WRN-(\d{1,4})-(\d{1,3})", arch), None
    source, _, name = arch.rpartition(":")
    if wide:
        network, head = WideResNet(int(wide[1]), int(wide[2]), num_class), "fc"
    elif arch in RESNETS:
        network, head = RESNETS[arch](num_class), "linear"
    elif source in LIBRARIES or runs_a_file(arch):
        network = _build(arch, source, name, num_class)
    else:
        hint = did_you_mean(arch, ["WRN-16-1", *RESNETS])
        known = f"WRN-<depth>-<width>, {', '.join(RESNETS)}, torchvision:NAME, timm:NAME or FILE.py:NAME"
        raise UserError(f"unknown architecture {arch!r}; use {known}{hint}")
    return Classifier(network, mean, std, head).to(memory_format=torch.channels_last)


def _build(arch, source, name, num_class):
    """A network of a library or of a file; any failure is a UserError."""
    try:
        if source == "torchvision":
            return torchvision.models.get_model(name, weights=None, num_classes=num_class)
        if source == "timm":
            return importlib.import_module("timm").create_model(name, num_classes=num_class)
        spec = importlib.util.spec_from_file_location(f"architectures of {source}", source)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        folder = os.path.dirname(os.path.abspath(source))
        if folder not in sys.path:
            sys.path.append(folder)  # for the modules that the file imports; those of this repository come first
        spec.loader.exec_module(module)
        make = getattr(module, name)
        taken = inspect.signature(make).parameters
        network = make(**{word: num_class for word in ("num_class", "num_classes") if word in taken})
    except ModuleNotFoundError as error:
        remedy = f"the package {error.name}: pip install {error.name}"
        missing = remedy if source in LIBRARIES else f"a module {error.name}, which was not found"
        raise UserError(f"--arch {arch} needs {missing}") from None
    except Exception as error:  # noqa: BLE001 - the code of others can raise anything
        raise UserError(f"--arch {arch} cannot be built: {_reason(error)}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"--arch {arch} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _reason(error):
    """The message of any exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__
