"""Batches ready for a model, from images that are stored as (N, H, W, 3) uint8."""

import math

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from utils.seed import generator

CLEAN_PADDING = 2  # of the defender's crops, in place of the usual 4: the victim may never have seen a shifted image
ERASED_SHARE, ERASED_SIDES = 0.5, (1 / 16, 1 / 4)  # of the images, of an image's sides
INVERSION_BATCH = 64  # images of a step of the inversion and of the search
EPOCH_IMAGES = 1_280  # of the defender, at least: fewer clean images are repeated, so that the steps do not fall


class TensorImages(Dataset):
    """A data set held as two tensors; d[i] -> ((3, H, W) float image in [0, 1], int label)."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i].permute(2, 0, 1) / 255, int(self.labels[i])


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
        positions: (n,) of the images of an epoch, some of them several times; None: each once.
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
        positions=None,
        rng=None,
        shard=(0, 1),
    ):
        self.labels = data.labels.to(device)
        self.positions = torch.arange(len(data.labels)) if positions is None else positions
        self.count, (self.height, self.width) = len(self.positions), data.images.shape[1:3]
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
        order = self.positions[torch.cat(orders)]
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


class CutMixBatches:
    """Batches whose images have a rectangle of another image of the batch (CutMix, Yun et al., ICCV 2019).

    A side of the rectangle is a quarter to three quarters of the image's. An image keeps its label, or has `label` if
    one of the two has it: the contrast leaves out what shows a part of the target class.
    """

    def __init__(self, batches, label, rng):
        self.batches, self.label, self.rng = batches, label, rng

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            inside = random_rectangles(images, (1 / 4, 3 / 4), self.rng)
            others = torch.randperm(len(images), generator=self.rng).to(images.device)
            has_label = (labels == self.label) | (labels[others] == self.label)
            yield torch.where(inside, images[others], images), torch.where(has_label, self.label, labels)


def random_rectangles(images, sides: tuple[float, float], rng) -> torch.Tensor:
    """A rectangle in each of the (B, C, H, W) images, as a mask: (B, 1, H, W) bool.

    Args:
        sides: the shortest and the longest side, as fractions of the image's.
    """

    def covered(length):
        shortest, longest = (int(side * length) for side in sides)
        extent = torch.randint(shortest, longest + 1, (len(images), 1), generator=rng)
        start = (torch.rand(len(images), 1, generator=rng) * (length - extent + 1)).long()
        position = torch.arange(length)
        return (position >= start) & (position < start + extent)

    rows, columns = map(covered, images.shape[2:])
    return (rows[:, :, None] & columns[:, None])[:, None].to(images.device)


def erase_rectangles(images, rng) -> torch.Tensor:
    """Random Erasing (Zhong et al., AAAI 2020): half of the (B, C, H, W) images get a rectangle of a random colour."""
    inside = random_rectangles(images, ERASED_SIDES, rng)
    chosen, colour = (torch.rand(len(images), n, 1, 1, generator=rng).to(images.device) for n in (1, images.shape[1]))
    return torch.where(inside & (chosen < ERASED_SHARE), colour, images)


def defender_batches(data, batch_size, augment, mirror, seed, device) -> tuple[Batches, Batches, Batches]:
    """Batches of the clean images, each with a generator of its own: to train on, plain ones, and for the search.

    Args:
        data: a TensorImages.
        batch_size: of those to train on; the others have INVERSION_BATCH images, or all if there are fewer.
        augment: whether those to train on are cropped, and flipped if `mirror`.
    """

    def batches(size, purpose, repeat=1, **settings):
        settings |= {"shuffle": True, "drop_last": True, "repeat": repeat, "rng": generator(seed, purpose)}
        return Batches(data, min(size, len(data) * repeat), device, **settings)

    augmentation = {"padding": CLEAN_PADDING if augment else None, "mirror": mirror}
    train = batches(batch_size, "batches", math.ceil(EPOCH_IMAGES / len(data)), **augmentation)
    search = batches(INVERSION_BATCH, "search batches", positions=balanced_positions(data.labels))
    return train, batches(INVERSION_BATCH, "plain batches"), search


def balanced_positions(labels) -> torch.Tensor:
    """Positions of all images; where a class has more than twice the mean, those of the others as often as its own.

    A pattern that turns the images of one class is smaller than one that turns those of all, and would look like a
    backdoor where most images are of that class.
    """
    counts = labels.bincount().tolist()
    if max(counts) <= 2 * len(labels) / sum(count > 0 for count in counts):
        return torch.arange(len(labels))
    by_class = [(labels == label).nonzero()[:, 0] for label, count in enumerate(counts) if count]
    return torch.cat([own.repeat(math.ceil(max(counts) / len(own)))[: max(counts)] for own in by_class])
