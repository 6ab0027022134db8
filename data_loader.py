"""The poisoned and the clean views of a data set, and batches ready for a model.

Images are stored as (N, H, W, 3) uint8; batches are (B, 3, H, W) floats in [0, 1], channels last, on the device.
Normalization is the model's first step.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from attacks import Attack
from attacks.retune import BATCH_SIZE as RETUNE_BATCH
from attacks.retune import CLEAN_IMAGES, DRAWS
from utils.datasets import MIRRORED, NORMALIZATION, ImageSet, read_dataset
from utils.distributed import ONE_PROCESS, Processes
from utils.errors import UserError
from utils.seed import generator

TRAIN_PADDING = 4  # pixels of black around a random crop, the usual value for CIFAR-10
CLEAN_PADDING = 2  # less for the defender, whose positive model may never have seen a shifted image
EPOCH_IMAGES = 1_280  # of the defender, at least: fewer clean images are repeated, so that the steps do not fall
MONITOR_IMAGES = 1_000
EVAL_BATCH = 125


class TensorImages(Dataset):
    """A data set held as two tensors; d[i] -> ((3, H, W) float image in [0, 1], int label)."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i].permute(2, 0, 1) / 255, int(self.labels[i])


class DatasetCL(TensorImages):
    """The defender's clean split: a random fraction `ratio` of the images; `index` (n,) holds their positions.

    Raises:
        UserError: ratio is not in (0, 1], or selects no image.
    """

    def __init__(self, images, labels, ratio: float, rng: torch.Generator):
        if not 0 < ratio <= 1:
            raise UserError(f"--ratio must be above 0 and up to 1, not {ratio}")
        count = int(ratio * len(labels))
        if count == 0:
            raise UserError(f"--ratio {ratio} of {len(labels)} images selects none; raise it")
        self.index = torch.randperm(len(labels), generator=rng)[:count]
        super().__init__(images[self.index], labels[self.index])


class DatasetBD(TensorImages):
    """The backdoored view of a set.

    mode "train": `attack` poisons a random fraction of the images; the others stay clean.
    mode "test": the attackable images only, all of them triggered; `labels` are the attacker's.
    `true_labels` (N,) and `poisoned` (N,) bool describe the result. Poisoning takes place before augmentation.

    Args:
        rng: source of the random choice, in training.
        surrogate: the frozen clean model that clTrigger needs in training.

    Raises:
        UserError: the poison rate selects no image, or a label exceeds the attack's number of classes.
    """

    def __init__(self, images, labels, attack: Attack, mode: str, rng: torch.Generator | None = None, surrogate=None):
        if int(labels.max()) >= attack.num_class:
            raise UserError(f"the data has label {int(labels.max())}, but there are only {attack.num_class} classes")
        if mode == "train":
            self.true_labels = labels
            images, labels, self.poisoned = attack.poison(images, labels, rng, surrogate)
        else:
            attackable = attack.attackable(labels)
            self.true_labels = labels[attackable]
            images, labels = attack.stamp(images[attackable]), attack.attack_labels(self.true_labels)
            self.poisoned = torch.ones(len(images), dtype=torch.bool)
        super().__init__(images, labels)


class Batches:
    """Iterates over (images (B, 3, H, W) float in [0, 1], labels (B,)) on the device.

    The uint8 set lies on the device. A batch is one gather: the random crop and flip are folded into its index.

    Args:
        shuffle: a new order each epoch.
        padding: random crops with so many pixels of black around the image; None: no augmentation.
        mirror: random flips as well.
        rng: source of order, crops and flips.
        drop_last: leave out a last batch that is not full.
        repeat: how often an epoch has each image, each time in a new order.
        shard: (i, n): the i-th of n equal parts of each batch, for data-parallel training in n processes.
    """

    def __init__(
        self,
        data,
        batch_size,
        device,
        *,
        shuffle=False,
        padding=None,
        mirror=True,
        drop_last=False,
        repeat=1,
        rng=None,
        shard=(0, 1),
    ):
        self.labels = data.labels.to(device)
        self.count, self.height, self.width, _ = data.images.shape
        self.padding, self.mirror = padding, mirror
        images = data.images if padding is None else F.pad(data.images, (0, 0, *[padding] * 4))
        self.row_stride, self.image_stride = images.shape[2], images.shape[1] * images.shape[2]
        self.pixels = images.reshape(-1, 3).to(device)
        self.batch_size, self.shuffle, self.drop_last, self.rng = batch_size, shuffle, drop_last, rng
        self.repeat, self.shard = repeat, shard
        window = torch.arange(self.height)[:, None] * self.row_stride + torch.arange(self.width)
        self.windows = torch.stack([window, window.flip(1)]).to(device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        return 3, self.height, self.width

    def __len__(self):
        full, rest = divmod(self.count * self.repeat, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        device = self.labels.device
        orders = [
            torch.randperm(self.count, generator=self.rng) if self.shuffle else torch.arange(self.count)
            for _ in range(self.repeat)
        ]
        order = torch.cat(orders)
        corner, flip = order * self.image_stride, torch.zeros_like(order)
        if self.padding is not None:
            shifts = torch.randint(2 * self.padding + 1, (2, len(order)), generator=self.rng)
            corner += shifts[0] * self.row_stride + shifts[1]
            flip = torch.randint(1 + self.mirror, (len(order),), generator=self.rng)
        order, corner, flip = order.to(device), corner.to(device), flip.to(device)
        shard_index, shard_count = self.shard
        shard_size = self.batch_size // shard_count
        for i in range(len(self)):
            start = i * self.batch_size + shard_index * shard_size
            batch = slice(start, start + shard_size)
            index = corner[batch, None, None] + self.windows[flip[batch]]
            images = self.pixels[index.view(-1)].view(*index.shape, 3)
            yield images.permute(0, 3, 1, 2).float().div_(255), self.labels[order[batch]]


class EvalSet(NamedTuple):
    """Batches to measure a model on: all images clean, the attackable ones triggered; (N,) labels of the former."""

    clean: Batches
    triggered: Batches
    labels: torch.Tensor


class CleanSplit(NamedTuple):
    """The defender's data. The three kinds of batches draw from generators of their own.

    train: batches of the clean split, augmented if the options ask for it; an epoch has EPOCH_IMAGES images or more.
    plain: the same images without augmentation, once an epoch.
    search: the same again, for the target search.
    index: (n,) positions of the split in the training set.
    monitor_set: up to 1,000 other training images, for the history alone.
    """

    train: Batches
    plain: Batches
    search: Batches
    index: torch.Tensor
    monitor_set: EvalSet


def load_images(opt, split: str) -> ImageSet:
    """The "train" or "test" split of opt.dataset.

    Raises:
        UserError: the data is missing or damaged, or --num_class is too small for it.
    """
    data = read_dataset(opt.dataset, split, opt.data_root, opt.image_size)
    if opt.num_class is not None and opt.num_class < len(data.classes):
        raise UserError(f"{opt.dataset} has {len(data.classes)} classes; --num_class {opt.num_class} is too small")
    return data


def get_normalization(opt) -> tuple:
    """Mean and standard deviation per channel, for images in [0, 1]."""
    if opt.normalize == "dataset":
        return NORMALIZATION[opt.dataset]
    return ((0.0,) * 3, (1.0,) * 3) if opt.normalize == "none" else opt.normalize  # numbers that a checkpoint states


def get_backdoor_loader(
    opt, train_set: ImageSet, attack: Attack, device, surrogate=None, processes: Processes = ONE_PROCESS
) -> tuple[Batches, EvalSet, torch.Tensor]:
    """The attacker's data: augmented batches of the poisoned training set, a monitor set, the poisoned positions.

    Args:
        processes: they share each batch of --batch_size images equally; the main one poisons for all.

    Returns:
        the batches, up to 1,000 training images to monitor the training with, and (n,) int64 in rising order.
    """
    if opt.batch_size % processes.count:
        raise UserError(f"--batch_size {opt.batch_size} is not divisible by the {processes.count} processes")
    data, rng = (train_set.images, train_set.labels), generator(opt.seed, "poison")
    poisoned = processes.from_main(lambda: DatasetBD(*data, attack, "train", rng, surrogate))
    if len(poisoned) < opt.batch_size:
        raise UserError(f"the training set has {len(poisoned)} images, fewer than --batch_size {opt.batch_size}")
    rng = generator(opt.seed, "batches")
    augment = {"shuffle": True, "padding": TRAIN_PADDING, "mirror": opt.dataset in MIRRORED, "drop_last": True}
    batches = Batches(poisoned, opt.batch_size, device, **augment, rng=rng, shard=processes)
    monitor_set = get_eval_set(train_set.images, train_set.labels, attack, device, MONITOR_IMAGES)
    return batches, monitor_set, poisoned.poisoned.nonzero()[:, 0]


def get_clean_split(opt, train_set: ImageSet, attack: Attack, device) -> CleanSplit:
    """Draw the defender's clean split and make its batches."""
    split = DatasetCL(train_set.images, train_set.labels, opt.ratio, generator(opt.seed, "split"))
    repeat = math.ceil(EPOCH_IMAGES / len(split))

    def batches(padding, purpose, repeat=1):
        augment = {"padding": padding, "mirror": opt.dataset in MIRRORED, "rng": generator(opt.seed, purpose)}
        batch_size = min(opt.batch_size, len(split) * repeat)
        return Batches(split, batch_size, device, shuffle=True, drop_last=True, repeat=repeat, **augment)

    unused = _positions_outside(split, len(train_set.labels))
    index = unused if len(unused) else split.index
    index = index[evenly_spaced(len(index), MONITOR_IMAGES)]
    monitor_set = get_eval_set(train_set.images[index], train_set.labels[index], attack, device)
    train = batches(CLEAN_PADDING if opt.augment == "crop_flip" else None, "batches", repeat)
    plain, search = batches(None, "plain batches"), batches(None, "search batches")
    return CleanSplit(train, plain, search, split.index, monitor_set)


def get_retuning_batches(opt, train_set: ImageSet, attack: Attack, device) -> dict[int, list[Batches]]:
    """The data of the re-tuning attack (attacks.retune): clean images and K poisoned ones, outside the clean split.

    Returns:
        for each K of --retune the batches of DRAWS draws; a smaller K has the first poisoned images of a larger one.

    Raises:
        UserError: too few images.
    """
    split = DatasetCL(train_set.images, train_set.labels, opt.ratio, generator(opt.seed, "split"))
    unused, batches = _positions_outside(split, len(train_set.labels)), {count: [] for count in opt.retune}
    for draw in range(DRAWS):
        order = unused[torch.randperm(len(unused), generator=generator(opt.seed, f"retune {draw}"))]
        clean, others = order[:CLEAN_IMAGES], order[CLEAN_IMAGES:]
        candidates = others[attack.attackable(train_set.labels[others])]
        for count in opt.retune:
            if len(candidates) < count:
                hint = "lower it" if len(candidates) else "state the trigger with --trigger_type"
                raise UserError(f"--retune {count} needs more images than the {len(candidates)} left to attack; {hint}")
            poisoned = candidates[:count]
            images = torch.cat([train_set.images[clean], attack.stamp(train_set.images[poisoned])])
            labels = torch.cat([train_set.labels[clean], attack.attack_labels(train_set.labels[poisoned])])
            rng = generator(opt.seed, f"retune batches {draw}")
            data = TensorImages(images, labels)
            batches[count].append(Batches(data, RETUNE_BATCH, device, shuffle=True, rng=rng))
    return batches


def evenly_spaced(total: int, limit: int) -> torch.Tensor:
    """(n,) int64 positions, up to `limit`, evenly spaced in `total` images, which may be sorted by class."""
    count = min(total, limit)
    return torch.arange(count) * total // count


def get_eval_set(images, labels, attack: Attack, device, limit: int | None = None) -> EvalSet:
    """Clean and triggered batches of the same images: of all, or of up to `limit` that are evenly spaced."""
    if limit is not None:
        index = evenly_spaced(len(labels), limit)
        images, labels = images[index], labels[index]
    clean, triggered = TensorImages(images, labels), DatasetBD(images, labels, attack, "test")
    return EvalSet(Batches(clean, EVAL_BATCH, device), Batches(triggered, EVAL_BATCH, device), labels)


def _positions_outside(split, total):
    """(n,) positions of the training images that are not in the clean split, in rising order."""
    unused = torch.ones(total, dtype=torch.bool)
    unused[split.index] = False
    return unused.nonzero()[:, 0]
