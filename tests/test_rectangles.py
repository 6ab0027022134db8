"""CutMix and erasing: a rectangle of another image, or of one colour."""

import torch

from utils.batches import CutMixBatches, erase_rectangles
from utils.seed import generator


def cut_and_mixed(seed=0, label=-1):
    """200 batches of six images of 8x16 pixels; image i has the value i everywhere, and the label i."""
    values = torch.arange(6)
    batches = [(values[:, None, None, None].expand(6, 3, 8, 16).float(), values)] * 200
    return list(CutMixBatches(batches, label, generator(seed, "test")))


def test_cutmix_puts_a_rectangle_of_another_image_into_each():
    heights, widths, starts = set(), set(), set()
    for images, labels in cut_and_mixed():
        assert labels.tolist() == [0, 1, 2, 3, 4, 5]
        others = []
        for label, image in enumerate(images):
            inside = image[0] != label
            assert (image == image[:1]).all()
            if inside.any():  # a permutation may keep an image in its place
                rows, columns = inside.any(1), inside.any(0)
                assert torch.equal(inside, rows[:, None] & columns)
                assert len(image[0][inside].unique()) == 1
                for axis in (rows, columns):
                    assert axis.nonzero().diff(dim=0).max() == 1
                heights.add(int(rows.sum()))
                widths.add(int(columns.sum()))
                starts.add((int(rows.nonzero()[0]), int(columns.nonzero()[0])))
                others.append(int(image[0][inside][0]))
        assert len(set(others)) == len(others)
    assert heights == {2, 3, 4, 5, 6}
    assert widths == set(range(4, 13))
    assert {row for row, _ in starts} == set(range(7))
    assert {column for _, column in starts} == set(range(13))


def test_cutmix_gives_the_label_to_both_images_that_share_one():
    for images, labels in cut_and_mixed(label=3):
        shows = [(image == 3).any().item() for image in images]
        expected = [3 if shows[label] else label for label in range(6)]
        assert labels.tolist() == expected


def test_cutmix_draws_from_its_generator():
    first, again, other = (torch.cat([images for images, _ in cut_and_mixed(seed)]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(CutMixBatches([1, 2], 0, None)) == 2


def test_erasing_hides_a_rectangle_of_half_of_the_images():
    rng, heights, widths, colours, erased_count = generator(0, "test"), set(), set(), [], 0
    for image in erase_rectangles(torch.full((2_000, 3, 32, 16), 2.0), rng):
        inside = image[0] != 2
        if inside.any():
            rows, columns = inside.any(1), inside.any(0)
            assert torch.equal(inside, rows[:, None] & columns)
            colour = image[:, inside]
            assert (colour == colour[:, :1]).all()
            heights.add(int(rows.sum()))
            widths.add(int(columns.sum()))
            colours.append(colour[:, 0])
            erased_count += 1
    assert 900 < erased_count < 1_100
    assert heights == set(range(2, 9))
    assert widths == {1, 2, 3, 4}
    colours = torch.stack(colours)
    assert torch.allclose(colours.mean(0), torch.tensor(0.5), atol=0.05)
    assert torch.allclose(colours.std(0), torch.tensor(12**-0.5), atol=0.02)
    assert colours.T.corrcoef().fill_diagonal_(0).abs().max() < 0.15


def test_erasing_draws_from_its_generator():
    images = torch.zeros(50, 3, 8, 8)
    first, again, other = (erase_rectangles(images, generator(seed, "test")) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not images.any()
