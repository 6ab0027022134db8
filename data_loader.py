"""The poisoned and the clean views of a data set, and batches ready for a model.

Images are stored as (N, H, W, 3) uint8; batches are (B, 3, H, W) floats in [0, 1], channels last, on the device.
Normalization is the model's first step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from attacks import Attack, UnknownAttack
from attacks.retune import BATCH_SIZE as RETUNE_BATCH
from attacks.retune import CLEAN_IMAGES, DRAWS
from utils.batches import Batches, TensorImages, defender_batches
from utils.datasets import MIRRORED, NORMALIZATION, ImageSet, read_dataset
from utils.distributed import ONE_PROCESS, Processes
from utils.errors import UserError
from utils.seed import generator

TRAIN_PADDING = 4  # pixels of black around a random crop, the usual value for CIFAR-10
MONITOR_IMAGES = 1_000
EVAL_BATCH = 125


class DatasetCL(TensorImages):
    """The defender's clean split, a random part of the images; `index` (n,) holds their positions.

    Args:
        ratio: the fraction of the images to draw.
        count: the number of images to draw in its place, equally many of each class as far as that is possible.

    Raises:
        UserError: ratio is not in (0, 1] or selects no image, or there are fewer than `count` images.
    """

    def __init__(self, images, labels, ratio: float, rng: torch.Generator, count: int | None = None):
        if not 0 < ratio <= 1:
            raise UserError(f"--ratio must be above 0 and up to 1, not {ratio}")
        order = torch.randperm(len(labels), generator=rng)
        if count is None:
            count = int(ratio * len(labels))
            if count == 0:
                raise UserError(f"--ratio {ratio} of {len(labels)} images selects none; raise it")
        elif count > len(labels):
            raise UserError(f"--clean {count} needs more images than the {len(labels)} of the training set; lower it")
        else:  # the first of each class, then the second of each class, ...
            one_hot = F.one_hot(labels[order])
            order = order[(one_hot.cumsum(0) * one_hot).sum(1).argsort(stable=True)]
        self.index = order[:count]
        super().__init__(images[self.index], labels[self.index])


class DatasetBD(TensorImages):
    """The backdoored view of a set.

    mode "train": `attack` poisons a random fraction of the images; the others stay clean.
    mode "test": the attackable images only, all of them triggered; `labels` are the attacker's.
    `poisoned` (N,) bool says which. Poisoning takes place before augmentation.

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
            images, labels, self.poisoned = attack.poison(images, labels, rng, surrogate)
        else:
            attackable = attack.attackable(labels)
            images, labels = attack.stamp(images[attackable]), attack.attack_labels(labels[attackable])
            self.poisoned = torch.ones(len(images), dtype=torch.bool)
        super().__init__(images, labels)


class EvalSet(NamedTuple):
    """Batches to measure a model on: all images clean, the attackable ones triggered; (N,) labels of the former."""

    clean: Batches
    triggered: Batches
    labels: torch.Tensor


class CleanSplit(NamedTuple):
    """The defender's data. The three kinds of batches draw from generators of their own.

    train: batches of the clean split, augmented if the options ask for it; an epoch has EPOCH_IMAGES images or more.
    plain: the same images without augmentation, once an epoch, but for a last batch that is not full.
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
    if len(data.classes) < 2:
        raise UserError(f"{opt.data_root} has one class: the images belong in {split}/<class>/")
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
    split, unused = _draw_clean_images(opt, train_set)
    index = unused if len(unused) else split.index
    index = index[sample_positions(len(index), MONITOR_IMAGES)]
    monitor_set = get_eval_set(train_set.images[index], train_set.labels[index], attack, device)
    augment = opt.augment == "crop_flip"
    batches = defender_batches(split, opt.batch_size, augment, opt.dataset in MIRRORED, opt.seed, device)
    return CleanSplit(*batches, split.index, monitor_set)


def get_retuning_batches(opt, train_set: ImageSet, attack: Attack, device) -> dict[int, list[Batches]]:
    """The data of the re-tuning attack (attacks.retune): clean images and K poisoned ones, outside the clean split.

    Returns:
        for each K of --retune the batches of DRAWS draws; a smaller K has the first poisoned images of a larger one.

    Raises:
        UserError: too few images.
    """
    (_, unused), batches = _draw_clean_images(opt, train_set), {count: [] for count in opt.retune}
    for draw in range(DRAWS):
        order = unused[torch.randperm(len(unused), generator=generator(opt.seed, f"retune {draw}"))]
        clean, others = order[:CLEAN_IMAGES], order[CLEAN_IMAGES:]
        candidates = others[attack.attackable(train_set.labels[others])]
        for count, draws in batches.items():
            if len(candidates) < count:
                message = f"--retune {count} needs more images than the {len(candidates)} left to attack"
                reason = f"the attack takes {CLEAN_IMAGES:,} clean ones first, none of them in the clean split"
                unknown = isinstance(attack, UnknownAttack)
                raise UserError(f"{message}; {'state the trigger with --trigger_type' if unknown else reason}")
            poisoned = candidates[:count]
            images = torch.cat([train_set.images[clean], attack.stamp(train_set.images[poisoned])])
            labels = torch.cat([train_set.labels[clean], attack.attack_labels(train_set.labels[poisoned])])
            rng = generator(opt.seed, f"retune batches {draw}")
            data = TensorImages(images, labels)
            leaves_one = len(data) % RETUNE_BATCH == 1  # which batch normalisation of vectors does not take
            draws.append(Batches(data, RETUNE_BATCH, device, shuffle=True, drop_last=leaves_one, rng=rng))
    return batches


def sample_positions(total: int, limit: int) -> torch.Tensor:
    """(n,) int64 rising positions of `total` images: all, or `limit` of them, the same random ones in every run.

    Even spacing would take images of one class from a data set whose classes take turns.
    """
    return torch.randperm(total, generator=generator(0, "sample"))[:limit].sort().values


def get_eval_set(images, labels, attack: Attack, device, limit: int | None = None) -> EvalSet:
    """Clean and triggered batches of the same images: of all, or of `limit` random ones, always the same."""
    if limit is not None:
        index = sample_positions(len(labels), limit)
        images, labels = images[index], labels[index]
    clean, triggered = TensorImages(images, labels), DatasetBD(images, labels, attack, "test")
    return EvalSet(Batches(clean, EVAL_BATCH, device), Batches(triggered, EVAL_BATCH, device), labels)


def _draw_clean_images(opt, train_set):
    """The clean split, and the (n,) positions of all other training images in rising order."""
    split = DatasetCL(train_set.images, train_set.labels, opt.ratio, generator(opt.seed, "split"), opt.clean)
    unused = torch.ones(len(train_set.labels), dtype=torch.bool)
    unused[split.index] = False
    return split, unused.nonzero()[:, 0]
