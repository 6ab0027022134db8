"""The defender's batches: to train on, plain ones, and those of the search."""

import pytest
import torch
from conftest import CPU

from utils.batches import TensorImages, balanced_positions, defender_batches


def test_rare_classes_are_searched_as_often_as_the_others():
    labels = torch.tensor([1, 4, 4, 4, 4, 4, 2, 4])
    assert labels[balanced_positions(labels)].bincount().tolist() == [0, 6, 6, 0, 6]
    assert balanced_positions(torch.tensor([0, 0, 0, 1, 2, 3])).tolist() == [0, 1, 2, 3, 4, 5]  # twice the mean
    data = TensorImages(torch.zeros(8, 4, 4, 3, dtype=torch.uint8), labels)
    train, plain, search = defender_batches(data, 8, False, True, 0, CPU)
    assert torch.cat([batch for _, batch in plain]).bincount().tolist() == [0, 1, 1, 0, 6]
    assert sorted(search.positions.tolist()) == [0] * 6 + [1, 2, 3, 4, 5] + [6] * 6 + [7]
    assert torch.equal(search.labels, labels)
    assert len(train) == 160


@pytest.mark.parametrize(("count", "size", "per_epoch"), [(10, 10, 10), (64, 64, 64), (200, 64, 192)])
def test_the_batches_of_the_inversion_do_not_depend_on_the_batch_size(count, size, per_epoch):
    data = TensorImages(torch.zeros(count, 4, 4, 3, dtype=torch.uint8), torch.arange(count) % 5)
    for batch_size in (16, 128):
        _, plain, search = defender_batches(data, batch_size, False, True, 0, CPU)
        assert {len(batch) for batches in (plain, search) for _, batch in batches} == {size}
        assert sum(len(batch) for _, batch in search) == per_epoch
