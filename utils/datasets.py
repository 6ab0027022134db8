"""Data sets read from disk, downloaded or drawn, each as one uint8 tensor of images and one tensor of labels."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.datasets
from PIL import Image, ImageOps
from torchvision.transforms import v2

from utils.errors import UserError
from utils.shapes import CLASSES as SHAPES_CLASSES
from utils.shapes import draw_shapes

# Per-channel mean and standard deviation in [0, 1], as published victims of each data set use them.
NORMALIZATION = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "GTSRB": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}
MIRRORED = set(NORMALIZATION) - {"GTSRB"}  # data sets whose mirror images have the same label
GTSRB_IMAGES = {"train": 26_640, "test": 12_630}
DOWNLOAD_TIMEOUT = 30  # seconds; a network that swallows packets must not hang the run


@dataclass
class ImageSet:
    """images: (N, H, W, 3) uint8; labels: (N,) int64; classes: the K names."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return tuple(self.images.shape[1:3])


def read_dataset(name: str, split: str, root: str, image_size: int) -> ImageSet:
    """Read the "train" or "test" split of a data set in NORMALIZATION; a missing one is downloaded if possible.

    Args:
        root: the folder of torchvision's files, or of train/ and test/; shapes needs none.
        image_size: side in pixels to which GTSRB and folder are resized.

    Raises:
        UserError: the data is missing and cannot be downloaded, or is damaged.
    """
    if name == "shapes":
        return ImageSet(*draw_shapes(split), SHAPES_CLASSES)
    if name == "GTSRB":
        return _read_gtsrb(split, root, image_size)
    if name == "folder":
        return _read_folder(split, root, image_size)
    dataset = _load_torchvision(name, root, train=split == "train")  # CIFAR10 or CIFAR100
    return ImageSet(torch.from_numpy(dataset.data), torch.tensor(dataset.targets), dataset.classes)


def _read_gtsrb(split, root, image_size):
    dataset = _load_torchvision("GTSRB", root, split=split, transform=_resize(image_size))
    if len(dataset) != GTSRB_IMAGES[split]:  # torchvision accepts a partly downloaded folder
        folder = os.path.join(root, "gtsrb")
        found = f"{len(dataset):,} of GTSRB's {GTSRB_IMAGES[split]:,} {split} images"
        raise UserError(f"{folder} has {found}, probably from an interrupted download; remove {folder} and start again")
    return ImageSet(*_decode(dataset, image_size), [str(label) for label in range(43)])


def _read_folder(split, root, image_size):
    path = os.path.join(root, split)
    try:
        settings = {"transform": _resize(image_size), "loader": open_picture, "is_valid_file": _is_picture}
        dataset = torchvision.datasets.ImageFolder(path, **settings)
    except OSError as error:
        raise UserError(f"--dataset folder needs images in {path}/<class>/: {error}".split("\n")[0]) from None
    train_classes = sorted(entry.name for entry in os.scandir(os.path.join(root, "train")) if entry.is_dir())
    if dataset.classes != train_classes:
        unmatched = ", ".join(sorted(set(train_classes) ^ set(dataset.classes)))
        raise UserError(f"train/ and test/ in {root} must have the same classes; only one of them has {unmatched}")
    return ImageSet(*_decode(dataset, image_size), dataset.classes)


def _load_torchvision(name, root, **arguments):
    """A torchvision data set from disk, else from the network."""
    dataset = getattr(torchvision.datasets, name)
    try:
        return dataset(root, download=False, **arguments)
    except (RuntimeError, OSError):  # torchvision's errors for missing and for corrupt files
        pass
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return dataset(root, download=True, **arguments)
    except Exception as error:  # noqa: BLE001 - no network, a full disk, a broken archive: the remedy is the same
        raise UserError(
            f"{name} is not complete in {root!r} and could not be downloaded ({error}); put torchvision's {name} files "
            f"there, name their folder with --data_root or MCL_DATA_ROOT, or use --dataset shapes, which needs no files"
        ) from None
    finally:
        socket.setdefaulttimeout(previous_timeout)


def _is_picture(path):
    """Whether the ending of the name is that of a format that Pillow reads."""
    return Image.registered_extensions().get(os.path.splitext(path)[1].lower()) in Image.OPEN


def open_picture(path, mode="RGB"):
    """The PIL picture as a viewer shows it: turned as its EXIF data say, 16-bit greys scaled to 8 bits."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode == "F":
            raise ValueError("a picture of 32-bit floats has no range")
        if picture.mode.startswith("I"):  # convert would cut greys off at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        return picture.convert(mode)


def _resize(size):
    return v2.Compose([v2.Resize((size, size)), v2.PILToTensor()])


def _decode(dataset, size):
    """Read every image of a torchvision data set once, in threads, into one uint8 tensor."""
    needed = 3 * size**2 * len(dataset)
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(f"images of --image_size {size} need {needed / 2**30:,.0f} GiB, more than this machine has")
    files = dataset.samples if hasattr(dataset, "samples") else dataset._samples  # ImageFolder's, GTSRB's
    images = torch.empty(len(dataset), size, size, 3, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)

    def read(i):
        try:
            image, labels[i] = dataset[i]
            images[i] = image.permute(1, 2, 0)
        except Exception as error:  # noqa: BLE001 - Pillow raises many kinds for a broken file
            return f"{files[i][0]}: {error or type(error).__name__}"

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        errors = [message for message in threads.map(read, range(len(dataset))) if message]
    if errors:
        raise UserError(f"{len(errors)} of {len(dataset)} images cannot be read; the first: {errors[0]}")
    return images, labels
