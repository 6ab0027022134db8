"""Data sets as two tensors, the poisoned and the clean view of them, and batches ready for a model.

Images are stored as (N, H, W, 3) uint8 and leave here as (B, 3, H, W) float batches in [0, 1], channels last, on the
device. Normalisation belongs to the model.
"""

import os
import socket
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.datasets
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from attacks import TRIGGERS, Attack
from utils.errors import UserError
from utils.seed import generator
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
GTSRB_PICTURES = {"train": 26_640, "test": 12_630}
TRAINING_PADDING = 4  # pixels of black around a random crop, as CIFAR-10 is trained by everyone
CLEAN_PADDING = 2  # less for the defender, whose teacher may never have seen a shifted image
WATCHED_IMAGES = 1_000
EVAL_BATCH = 125


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


class TensorImages(Dataset):
    """A data set held as two tensors; d[i] -> ((3, H, W) float image in [0, 1], int label)."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i].permute(2, 0, 1) / 255, int(self.labels[i])


class DatasetCL(TensorImages):
    """The clean split: a random share `ratio` of the images, for the defender.

    `index` (n,) says which ones, n = ratio * N rounded down.

    Raises:
        UserError: ratio not above 0 and up to 1, or no image in the split.
    """

    def __init__(self, images, labels, ratio: float, rng: torch.Generator):
        if not 0 < ratio <= 1:
            raise UserError(f"--ratio is a share above 0 and up to 1, not {ratio}")
        count = int(ratio * len(labels))
        if count == 0:
            raise UserError(f"--ratio {ratio} of {len(labels)} images is not a single one")
        self.index = torch.randperm(len(labels), generator=rng)[:count]
        super().__init__(images[self.index], labels[self.index])


class DatasetBD(TensorImages):
    """The backdoored view of a set.

    mode "train": a random share of the images is attacked, as `attack.poison` says, the rest left alone.
    mode "test": only the images that the attack would rename, every one of them stamped; `labels` are the attacker's.
    `true_labels` (N,) and `poisoned` (N,) bool say what was done. Poisoning takes place before augmentation.

    Args:
        rng: where the choice of images comes from, in training.
        surrogate: the frozen model that clTrigger needs in training.

    Raises:
        UserError: a poison rate that yields no image, or a label beyond the attack's classes.
    """

    def __init__(self, images, labels, attack: Attack, mode: str, rng: torch.Generator | None = None, surrogate=None):
        if int(labels.max()) >= attack.num_class:
            raise UserError(f"the data has label {int(labels.max())}, but there are only {attack.num_class} classes")
        if mode == "train":
            self.true_labels = labels
            images, labels, self.poisoned = attack.poison(images, labels, rng, surrogate)
        else:
            keep = attack.counts(labels)
            self.true_labels = labels[keep]
            images, labels = attack.stamp(images[keep]), attack.wanted(self.true_labels)
            self.poisoned = torch.ones(len(images), dtype=torch.bool)
        super().__init__(images, labels)


class Batches:
    """Iterates over (images (B, 3, H, W) float in [0, 1], labels (B,)), a whole batch at a time, on the device.

    The uint8 set lies on the device; a batch is one gather, with the random crop and the
    random flip folded into its index, and it comes out channels last.

    Args:
        shuffle: a new order each epoch.
        padding: random flips and crops, with so many pixels of black around the image; None: the images as they are.
        rng: where order, crops and flips come from.
        drop_last: leave out a last batch that is not full.
        part: (i, n): the i-th of n equal parts of each batch, for a process that trains with n - 1 others.
    """

    def __init__(
        self, data, batch_size, device, *, shuffle=False, padding=None, drop_last=False, rng=None, part=(0, 1)
    ):
        self.labels = data.labels.to(device)
        self.count, self.height, self.width, _ = data.images.shape
        self.padding = padding
        images = data.images if padding is None else F.pad(data.images, (0, 0, *[padding] * 4))
        self.row, self.image = images.shape[2], images.shape[1] * images.shape[2]
        self.pixels = images.reshape(-1, 3).to(device)
        self.batch_size, self.shuffle, self.drop_last, self.rng = batch_size, shuffle, drop_last, rng
        self.part, self.parts = part
        window = torch.arange(self.height)[:, None] * self.row + torch.arange(self.width)
        self.windows = torch.stack([window, window.flip(1)]).to(device)

    def __len__(self):
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        device = self.labels.device
        order = torch.randperm(self.count, generator=self.rng) if self.shuffle else torch.arange(self.count)
        corner, flip = order * self.image, torch.zeros_like(order)
        if self.padding is not None:
            shifts = torch.randint(2 * self.padding + 1, (2, self.count), generator=self.rng)
            corner += shifts[0] * self.row + shifts[1]
            flip = torch.randint(2, (self.count,), generator=self.rng)
        order, corner, flip = order.to(device), corner.to(device), flip.to(device)
        own = self.batch_size // self.parts
        for i in range(len(self)):
            start = i * self.batch_size + self.part * own
            batch = slice(start, start + own)
            index = corner[batch, None, None] + self.windows[flip[batch]]
            images = self.pixels[index.view(-1)].view(*index.shape, 3)
            yield images.permute(0, 3, 1, 2).float().div_(255), self.labels[order[batch]]


class Pictures(Dataset):
    """A torchvision data set of files: d[i] -> ((3, size, size) uint8, label, what is wrong with it or "").

    A worker of a DataLoader that raised would be told with tracebacks of several processes.
    """

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size
        self.files = dataset.samples if hasattr(dataset, "samples") else dataset._samples  # ImageFolder's, GTSRB's

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            return *self.dataset[i], ""
        except Exception as error:  # noqa: BLE001 - Pillow has many words for a broken file
            told = f"{self.files[i][0]}: {error or type(error).__name__}"
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1, told


def load_images(opt, split: str) -> ImageSet:
    """Read the "train" or "test" part of opt.dataset from opt.data_root; what is missing is downloaded if it can be.

    Raises:
        UserError: the data is not there and cannot be had, is damaged, or --num_class is too small for it.
    """
    images, labels, classes = READERS[opt.dataset](opt, split)
    if opt.num_class is not None and opt.num_class < len(classes):
        raise UserError(f"--num_class {opt.num_class} is too few for {opt.dataset}, which has {len(classes)} classes")
    return ImageSet(images, labels, classes)


def _read_shapes(opt, split):
    return *draw_shapes(split), SHAPES_CLASSES


def _read_cifar(opt, split):
    dataset = _fetch(opt, getattr(torchvision.datasets, opt.dataset), train=split == "train")
    return torch.from_numpy(dataset.data), torch.tensor(dataset.targets), dataset.classes


def _read_gtsrb(opt, split):
    dataset = _fetch(opt, torchvision.datasets.GTSRB, split=split, transform=_resize(opt.image_size))
    classes = [str(label) for label in range(43)]
    if len(dataset) != GTSRB_PICTURES[split]:  # torchvision takes a folder that is there for a whole one
        folder = os.path.join(opt.data_root, "gtsrb")
        raise UserError(
            f"GTSRB has {GTSRB_PICTURES[split]:,} pictures to {split} with, {folder} {len(dataset):,}: a download that "
            f"was stopped? Remove {folder} and start again"
        )
    return *_decode(dataset, opt.image_size), classes


def _read_folder(opt, split):
    path = os.path.join(opt.data_root, split)
    try:
        dataset = torchvision.datasets.ImageFolder(path, transform=_resize(opt.image_size))
    except OSError as error:
        raise UserError(f"--dataset folder needs pictures in {path}/<class>/: {error}".split("\n")[0]) from None
    trained = sorted(entry.name for entry in os.scandir(os.path.join(opt.data_root, "train")) if entry.is_dir())
    if dataset.classes != trained:
        other = ", ".join(sorted(set(trained) ^ set(dataset.classes)))
        raise UserError(f"train/ and test/ in {opt.data_root} have not the same classes: {other}")
    return *_decode(dataset, opt.image_size), dataset.classes


READERS = {
    "CIFAR10": _read_cifar,
    "CIFAR100": _read_cifar,
    "GTSRB": _read_gtsrb,
    "folder": _read_folder,
    "shapes": _read_shapes,
}


def _fetch(opt, dataset, **arguments):
    """A torchvision data set from disk, else from the network."""
    try:
        return dataset(opt.data_root, download=False, **arguments)
    except (RuntimeError, OSError):  # torchvision's words for "not there, or not whole"
        pass
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a network that swallows packets must not hang the run
    try:
        return dataset(opt.data_root, download=True, **arguments)
    except Exception as error:  # noqa: BLE001 - no network, no room, a broken archive: the way out is the same
        raise UserError(
            f"{opt.dataset} is not whole in {opt.data_root!r} and could not be downloaded ({error}); put torchvision's "
            f"{opt.dataset} files there, or say where they are with --data_root or MCL_DATA_ROOT, "
            f"or take the built-in set, which needs none: --dataset shapes"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def _resize(size):
    return v2.Compose([v2.Resize((size, size)), v2.PILToTensor()])


def _decode(dataset, size):
    """Read every picture of a torchvision data set once, with workers, into one uint8 tensor."""
    needed = 3 * size**2 * len(dataset)
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(f"pictures of --image_size {size} take {needed / 2**30:,.0f} GiB, more than this machine has")
    loader = DataLoader(Pictures(dataset, size), batch_size=256, num_workers=min(8, os.cpu_count() or 1))
    images, labels, told = zip(*loader, strict=True)
    broken = [words for batch in told for words in batch if words]
    if broken:
        raise UserError(f"{len(broken)} of {len(dataset)} pictures cannot be read; the first: {broken[0]}")
    return torch.cat(images).permute(0, 2, 3, 1).contiguous(), torch.cat(labels)


class EvalSet(NamedTuple):
    """What a model is measured on: all images clean, those that count triggered, and the (N,) labels of the former."""

    clean: Batches
    triggered: Batches
    labels: torch.Tensor


class CleanSplit(NamedTuple):
    """What the defender has: `plain` batches of the split, `search` ones in another order (so that a search for the
    target moves nothing else), `training` ones (augmented if so asked), and its (n,) `index` in the training set.
    `watched` are 1,000 other training images, for the history alone."""

    plain: Batches
    search: Batches
    training: Batches
    index: torch.Tensor
    watched: EvalSet


def get_normalization(opt) -> tuple:
    """Mean and standard deviation per channel, for images in [0, 1]."""
    return NORMALIZATION[opt.dataset] if opt.normalize == "dataset" else ((0.0,) * 3, (1.0,) * 3)


def get_attack(opt, num_class: int, size: tuple[int, int], surrogate=None) -> Attack:
    """The attack that the options describe, its tensors made from --seed for images of `size` (H, W).

    Args:
        surrogate: the frozen clean model that a trojan patch is made on; no other attack needs one here.

    Raises:
        UserError: they describe none that makes sense, or a trojan patch without a model.
    """
    trigger = TRIGGERS[opt.trigger_type]
    if "surrogate" in trigger.made_from and surrogate is None:
        raise UserError(f"the patch of {opt.trigger_type} belongs to its victim: only a file that states it has it")
    made_from = {name: surrogate if name == "surrogate" else getattr(opt, name) for name in trigger.made_from}
    tensors = trigger.make(size, generator(opt.seed, opt.trigger_type), **made_from) if trigger.make else {}

    def chosen(names):  # main.py has no option of the training view, and no poison rate: they mean nothing there
        return {name: getattr(opt, name) for name in names if hasattr(opt, name)}

    rate, options, training = getattr(opt, "inject_portion", 0.0), chosen(trigger.options), chosen(trigger.training)
    return Attack(opt.trigger_type, opt.target_type, opt.target_label, num_class, rate, options, tensors, training)


def get_backdoor_loader(
    opt, train: ImageSet, attack: Attack, device, surrogate=None, part=(0, 1)
) -> tuple[Batches, EvalSet, torch.Tensor]:
    """The attacker's training batches, cropped and flipped, a small set to watch the training by (1,000 training
    images), and which images are poisoned, (n,) int64 in rising order.

    Args:
        part: (i, n): this process's part of each batch, of --batch_size images in all, n a divisor of that.
    """
    if opt.batch_size % part[1]:
        raise UserError(f"--batch_size {opt.batch_size} cannot be shared out evenly among {part[1]} processes")
    poisoned = DatasetBD(train.images, train.labels, attack, "train", generator(opt.seed, "poison"), surrogate)
    _check_batch(poisoned, opt.batch_size, "the training set")
    rng = generator(opt.seed, "batches")
    augment = {"shuffle": True, "padding": TRAINING_PADDING, "drop_last": True, "rng": rng}
    batches = Batches(poisoned, opt.batch_size, device, **augment, part=part)
    few = spread(len(train.labels), WATCHED_IMAGES)
    watched = get_eval_set(train.images[few], train.labels[few], attack, device)
    return batches, watched, poisoned.poisoned.nonzero()[:, 0]


def get_clean_split(opt, train: ImageSet, attack: Attack, device) -> CleanSplit:
    """Draw the defender's clean split and make its batches."""
    split = DatasetCL(train.images, train.labels, opt.ratio, generator(opt.seed, "split"))
    _check_batch(split, opt.batch_size, f"the clean split (--ratio {opt.ratio})")

    def batches(padding, purpose):
        rng = generator(opt.seed, purpose)
        return Batches(split, opt.batch_size, device, shuffle=True, padding=padding, drop_last=True, rng=rng)

    others = torch.ones(len(train.labels), dtype=torch.bool)
    others[split.index] = False
    unseen = others.nonzero()[:, 0] if others.any() else split.index
    watched = unseen[spread(len(unseen), WATCHED_IMAGES)]
    watched = get_eval_set(train.images[watched], train.labels[watched], attack, device)
    training = batches(CLEAN_PADDING if opt.augment == "crop_flip" else None, "batches")
    plain, search = batches(None, "plain batches"), batches(None, "search batches")
    return CleanSplit(plain, search, training, split.index, watched)


def spread(total: int, most: int) -> torch.Tensor:
    """Which of `total` images to look at: `most` or all of them, evenly spread, (n,) int64; a set may be sorted."""
    count = min(total, most)
    return torch.arange(count) * total // count


def get_eval_set(images, labels, attack: Attack, device) -> EvalSet:
    """Clean and triggered batches of the same images."""
    clean, triggered = TensorImages(images, labels), DatasetBD(images, labels, attack, "test")
    return EvalSet(Batches(clean, EVAL_BATCH, device), Batches(triggered, EVAL_BATCH, device), labels)


def _check_batch(data, batch_size, told):
    if len(data) < batch_size:
        raise UserError(f"{told} has {len(data)} images, fewer than one batch of {batch_size}; lower --batch_size")
