"""The training loop: its schedules, its averaging, its guard."""

import pytest
import torch

from utils.errors import RunError
from utils.seed import generator
from utils.training import SCHEDULES, train

CPU = torch.device("cpu")


def rates(schedule, steps=40):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = SCHEDULES[schedule](optimizer, 0.2, steps)
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return seen


def test_schedules_are_scaled_from_the_rate_and_the_steps():
    assert rates("steps") == pytest.approx([0.2] * 2 + [0.02] * 18 + [0.002] * 20)
    assert rates("drop") == pytest.approx([0.2] * 4 + [0.02] * 36)
    assert rates("cosine")[0] == 0.2
    assert rates("cosine")[20] == pytest.approx(0.1)
    assert max(rates("onecycle")) == pytest.approx(0.2, rel=0.01)
    assert rates("onecycle")[-1] < 0.001


class Scalar(torch.nn.Module):
    """One weight, whose loss is its product with what a batch holds."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def run(model, batches, **settings):
    usual = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32"}
    return train(model, batches, lambda x, _: model.weight * x, CPU, title="test", **{**usual, **settings})


def test_a_step_is_the_rate_times_the_gradient():
    model = Scalar()
    run(model, [(torch.tensor(2.0), None)])
    assert model.weight.item() == pytest.approx(-0.1 * 2)


def test_another_step_takes_the_place_of_the_usual_one():
    model = Scalar()

    def climb(optimizer, loss_of):
        with torch.no_grad():
            model.weight += 1
        return loss_of().detach()

    history = run(model, [(torch.tensor(2.0), None)] * 3, update=climb)
    assert (model.weight.item(), history[0]["loss"]) == (3, 4)  # of 2, 4 and 6


def test_averaging_by_hand():
    model = Scalar()
    run(model, [(torch.tensor(1.0), None)] * 2, ema=0.75)
    first = -0.1
    last = first - 0.05  # the cosine is at a half after one step of two
    assert model.weight.item() == pytest.approx(0.75 * first + 0.25 * last)


def test_history_has_a_row_an_epoch_with_what_was_watched():
    model = Scalar()
    history = run(model, [(torch.tensor(1.0), None)], epochs=3, watch=lambda seen, epoch: {"acc": float(epoch)})
    assert [row["acc"] for row in history] == [1.0, 2.0, 3.0]
    assert all({"epoch", "lr", "loss", "seconds"} <= set(row) for row in history)


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(RunError, match="no longer finite in epoch 1"):
        run(Scalar(), [(torch.tensor(float("inf")), None)])


def test_what_was_saved_before_the_loss_turned_is_the_last_good_state():
    class Turning:
        """A number in the first epoch, none in the second."""

        def __init__(self):
            self.epochs = 0

        def __len__(self):
            return 1

        def __iter__(self):
            self.epochs += 1
            yield torch.tensor(1.0 if self.epochs == 1 else float("inf")), None

    model, kept = Scalar(), []
    with pytest.raises(RunError, match="in epoch 2"):
        run(model, Turning(), epochs=3, save=lambda state: kept.append((model.weight.item(), len(state["history"]))))
    assert kept == [(pytest.approx(-0.1), 1)]


def test_generators_belong_to_their_seed_and_purpose():
    draws = [torch.rand(3, generator=generator(*key)).tolist() for key in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]
