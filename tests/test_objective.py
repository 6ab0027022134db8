"""The objective of trigger inversion: losses, hits and the weight of the penalty, by hand."""

import math

import pytest
import torch

from defenses.inversion import ANY_OTHER
from defenses.inversion.objective import (
    PenaltyWeight,
    attackable_images,
    attackable_parts,
    hits_and_losses,
    is_hit,
    untargeted_loss,
)

LOGITS, LABELS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])


def test_untargeted_loss_by_hand():
    p = LOGITS.softmax(1)
    expected = [-math.log(p[0, 1] + p[0, 2]), -math.log(p[1, 0] + p[1, 1])]
    assert untargeted_loss(LOGITS, LABELS).tolist() == pytest.approx(expected, rel=1e-5)


def test_a_hit_is_a_prediction_of_the_target_or_of_another_label():
    assert is_hit(LOGITS, LABELS, ANY_OTHER).tolist() == [False, True]
    assert is_hit(LOGITS, LABELS, 1).tolist() == [False, True]


def test_attackable_images_have_other_labels_or_are_classified_right():
    images = torch.arange(2.0).view(2, 1, 1, 1)
    assert attackable_images(lambda x: LOGITS, images, LABELS, ANY_OTHER)[1].tolist() == [0]
    assert attackable_images(lambda x: LOGITS, images, LABELS, 0)[1].tolist() == [2]


def test_attackable_images_come_in_parts_of_sixteen():
    images = torch.arange(40.0).view(40, 1, 1, 1)
    labels = torch.tensor([0, *[1] * 38, 2])
    only_targets = torch.full((2, 1, 1, 1), 50.0), torch.zeros(2, dtype=torch.int64)
    parts = list(attackable_parts(None, [(images, labels), only_targets, (images[:3], labels[:3])], 0))
    expected = [range(1, 17), range(17, 33), range(33, 40), range(1, 3)]
    assert [part.flatten().tolist() for part, _ in parts] == [list(numbers) for numbers in expected]
    assert [part.tolist() for _, part in parts] == [[1] * 16, [1] * 16, [1] * 6 + [2], [1] * 2]


class All2AllVictim(torch.nn.Module):
    """Predicts the reddest column, or with a red last row the label after it."""

    def forward(self, x):
        red = x[:, 0] - x[:, 1]
        logits = 10 * red.mean(1)
        return torch.where((red[:, -1].mean(1) > 0.5)[:, None], logits.roll(1, 1), logits)


def test_hits_and_losses_by_hand():
    images = 0.25 + 0.5 * torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, targets, patterns = (
        All2AllVictim()(images).argmax(1),
        torch.tensor([2, ANY_OTHER, 5]),
        torch.zeros(3, 3, 8, 8),
    )
    patterns[1, 0, -1], patterns[1, 1, -1] = 1.0, -1.0
    attackable = labels != targets[:, None]
    attackable[1, 4:] = False
    hits, losses = hits_and_losses(All2AllVictim(), images, labels, attackable, patterns, targets)
    for i, (pattern, target) in enumerate(zip(patterns, targets.tolist(), strict=True)):
        expected_losses, expected_hits = [], 0
        for image, label, counts in zip(images, labels.tolist(), attackable[i], strict=True):
            p = All2AllVictim()((image + pattern).clamp(0, 1)[None])[0].softmax(0)
            if counts:
                expected_losses.append(-(1 - p[label] if target == ANY_OTHER else p[target]).log().item())
                predicted = p.argmax().item()
                expected_hits += predicted != label if target == ANY_OTHER else predicted == target
        assert hits[i] == expected_hits
        assert losses[i].item() == pytest.approx(sum(expected_losses) / len(expected_losses), rel=1e-4)
    assert hits[1] == 4


def test_penalty_weight_rises_while_the_pattern_works_and_falls_while_it_fails():
    weight = PenaltyWeight(torch.tensor([1.0, 1.0, 1.0]), patience=2)
    tried = torch.ones(3, dtype=torch.bool)
    for works in ([True, False, True], [True, False, False], [True, False, True], [True, False, True]):
        weight.update(torch.tensor(works), tried)
    # Two steps in a row move the weight by one factor: 1.5 up, 1.5^1.5 down.
    assert weight.value.tolist() == pytest.approx([1.5**2, 1.5**-3, 1.5])
    impatient = PenaltyWeight(torch.tensor([1.0, 1.0]))
    impatient.update(torch.tensor([True, False]), tried[:2])
    assert impatient.value.tolist() == pytest.approx([1.5, 1.5**-1.5])


def test_a_step_without_an_image_to_try_a_pattern_on_does_not_count():
    weight = PenaltyWeight(torch.tensor([1.0, 1.0]), patience=2)
    for works, tried in (([True, False], True), ([False, False], False), ([True, False], True)):
        weight.update(torch.tensor(works), torch.tensor([tried, tried]))
    assert weight.value.tolist() == pytest.approx([1.5, 1.5**-1.5])  # two steps in a row, but for the one between
