"""select_model builds an architecture by its name; Classifier gives any network what a defense needs of it."""

import copy
import importlib.util
import inspect
import os
import re
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
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
WEIGHT_NAME = re.compile(r"(weight|bias)(_g|_v|_orig|\.original\d?)?$")  # parametrized ones, too


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
        self.network = getattr(network, "_orig_mod", network)  # a compiled one does not call hooks
        self.head_name, self.memory_format, self.image_size = head, torch.channels_last, None
        # A frozen weight or bias is trained, since the backdoor may be in it; other frozen parameters stay.
        self.constants = {
            name
            for name, parameter in self.named_parameters()
            if not (parameter.requires_grad or (parameter.is_floating_point() and WEIGHT_NAME.search(name)))
        }

    def requires_grad_(self, requires_grad: bool = True):
        """Freeze all parameters, or have all but the constants trained."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.constants)
        return self

    def __deepcopy__(self, memo):
        """A copy, after a pass without gradients: torch cannot copy a tensor with a graph that the network keeps."""
        if self.image_size is not None:
            self._probe()
        duplicate = memo[id(self)] = self.__new__(type(self))
        vars(duplicate).update(copy.deepcopy(vars(self), memo))
        return duplicate

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
            UserError: the network fails on them, returns no finite (B, num_class) logits, has no such layer at its end,
                or gives the images no gradient.
        """
        if next(self.parameters(), None) is None:
            raise UserError(f"{name} has no parameters")
        self.image_size = size
        for layout in (torch.channels_last, torch.contiguous_format):  # x.view(len(x), -1) needs the latter
            self.memory_format = layout
            try:
                logits, runs = self.to(memory_format=layout)._probe()
                break
            except Exception as error:  # noqa: BLE001 - the code of others can raise anything
                reason = _reason(error)
        else:
            raise UserError(f"{name} fails on images of {size[0]}x{size[1]} pixels: {reason}")
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        if len(shape) != 2 or shape != (2, num_class or shape[1]):
            raise UserError(f"{name} returns {shape} for 2 images, not logits of shape (2, {num_class or 'K'})")
        if not logits.isfinite().all():
            raise UserError(f"{name} returns numbers that are not finite")
        if not runs or not torch.equal(runs[-1][1], logits) or not torch.allclose(runs[-1][2], logits, 1e-3, 1e-3):
            raise UserError(f"{name} does not end with a linear layer of {shape[1]} logits, which MCL's features need")
        self.head_name = runs[-1][0]
        if not self._has_gradient():
            raise UserError(f"{name} gives images no gradient, which the inversion needs: is it under torch.no_grad?")
        return shape[1]

    def _network_input(self, x):
        return self.normalize(x).contiguous(memory_format=self.memory_format)

    def _images(self):
        """Two random images: constant ones would have no spread to divide by."""
        images = torch.rand(2, 3, *self.image_size, generator=torch.Generator().manual_seed(0))
        return images.to(next(self.parameters()).device)

    def _probe(self):
        """The output for two images, and of each linear layer that runs its name, its output, and W z + b."""
        names = {module: name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)}
        runs = []

        def record(layer, inputs, output):  # a copy: the network may change its logits in place
            runs.append((names[layer], output.clone(), F.linear(inputs[0], layer.weight, layer.bias)))

        with torch.no_grad(), _evaluating(self), _hooked(names, record):
            return self.network(self._network_input(self._images())), runs

    def _has_gradient(self):
        """Whether the features have a gradient with respect to the images, which the inversion follows."""
        images = self._images().requires_grad_()
        with torch.enable_grad(), _evaluating(self):
            features = self.features(images)
            if not features.requires_grad:
                return False
            weights = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
            (gradient,) = torch.autograd.grad((features * weights).sum(), images, allow_unused=True)
        return gradient is not None and bool(gradient.any())

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
            the (B, C, h, w) output of the last convolution, or block of some, at each of the last three resolutions,
            and the (B, num_class) logits.

        Raises:
            UserError: the network has fewer resolutions.
        """
        maps = {}

        def record(_, inputs, output):
            # Squeeze-and-excitation, of 1x1, is no resolution.
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output[0, 0].numel() > 1:
                maps.pop(output.shape[2:], None)  # the last resolution comes last
                maps[output.shape[2:]] = output.float()

        def has_convolution(module):
            return any(isinstance(part, nn.Conv2d) for part in module.modules())

        with _hooked(filter(has_convolution, self.network.modules()), record):
            logits = self(x)
        if len(maps) < 3:
            raise UserError(f"nad compares feature maps of three resolutions, and this network has {len(maps)}")
        return list(maps.values())[-3:], logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) images in [0, 1] -> (B, num_class) logits, float32 under autocast as well."""
        logits = self.network(self._network_input(x))
        # In training, torchvision's GoogLeNet and Inception return those of auxiliary classifiers, too.
        logits = logits[0] if isinstance(logits, tuple) else logits
        if not isinstance(logits, torch.Tensor):
            raise UserError(f"in training the network returns a {type(logits).__name__}, not logits")
        return logits.float()


@contextmanager
def _evaluating(model):
    """Put a model into eval mode, and each of its modules back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
    model = Classifier(network, mean, std, head)
    return model.to(memory_format=torch.channels_last) if head else model


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
