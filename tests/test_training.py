"""The training loop: schedules, steps, weight averaging, history, and the check for finite numbers."""

import pytest
import torch
from conftest import CPU

from utils.errors import RunError
from utils.seed import generator
from utils.training import OPTIMIZERS, SCHEDULES, set_training_mode, sgd_step, train


def learning_rates(schedule, steps=40):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = SCHEDULES[schedule](optimizer, 0.2, steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_schedules_scale_with_the_rate_and_the_number_of_steps():
    assert learning_rates("steps") == pytest.approx([0.2] * 2 + [0.02] * 18 + [0.002] * 20)
    assert learning_rates("drop") == pytest.approx([0.2] * 4 + [0.02] * 36)
    assert learning_rates("cosine")[0] == 0.2
    assert learning_rates("cosine")[20] == pytest.approx(0.1)
    assert max(learning_rates("onecycle")) == pytest.approx(0.2, rel=0.01)
    assert learning_rates("onecycle")[-1] < 0.001


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_few_steps_starts_at_a_rate_above_zero(schedule):
    assert learning_rates(schedule, 1)[0] > 0
    assert schedule == "onecycle" or learning_rates(schedule, 4)[0] == 0.2


class Scalar(torch.nn.Module):
    """One weight w; the loss of a batch x is w * x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))


def run(model, batches, **settings):
    defaults = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32"}
    return train(model, batches, lambda x, _: model.weight * x, CPU, title="test", **{**defaults, **settings})


def test_a_step_is_the_rate_times_the_gradient():
    model = Scalar()
    run(model, [(torch.tensor(2.0), None)])
    assert model.weight.item() == pytest.approx(-0.1 * 2)


@pytest.mark.parametrize("gradient", [0.5, -3.0])
def test_a_first_step_of_adamw_shrinks_the_weight_and_follows_the_sign_of_the_gradient(gradient):
    model = Scalar()
    model.weight.data.fill_(2.0)
    run(model, [(torch.tensor(gradient), None)], optimizer="adamw", weight_decay=0.5)
    assert model.weight.item() == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1 * (1 if gradient > 0 else -1), abs=1e-6)


@pytest.mark.parametrize(("max_gradient", "gradient"), [(0.5, 2.5), (2.0, 7.0)])
def test_a_large_gradient_is_scaled_down_to_a_share_of_the_weights(max_gradient, gradient):
    weights = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    loss = sgd_step(optimizer, lambda: 7 * weights[0], max_gradient)
    assert loss.item() == 21
    assert weights.tolist() == pytest.approx([3 - gradient, 4])


def test_a_given_update_replaces_the_sgd_step():
    model = Scalar()

    def increment(optimizer, loss_of):
        with torch.no_grad():
            model.weight += 1
        return loss_of().detach()

    history = run(model, [(torch.tensor(2.0), None)] * 3, update=increment)
    assert (model.weight.item(), history[0]["loss"]) == (3, 4)  # the mean of 2, 4 and 6


def test_ema_averages_the_weights_of_all_steps():
    model = Scalar()
    run(model, [(torch.tensor(1.0), None)] * 2, ema=0.75)
    after_step_1 = -0.1
    after_step_2 = after_step_1 - 0.05  # the cosine schedule halves the rate after one of two steps
    assert model.weight.item() == pytest.approx(0.75 * after_step_1 + 0.25 * after_step_2)


def test_ema_averages_the_statistics_of_batch_norm_too():
    model = torch.nn.BatchNorm1d(1, momentum=1.0)  # its running mean is the mean of the last batch
    batches = [(torch.tensor([[mean - 1.0], [mean + 1.0]]), None) for mean in (2.0, 6.0)]
    settings = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine", "precision": "fp32", "title": "test"}
    train(model, batches, lambda x, _: model(x).sum(), CPU, epochs=1, lr=0.1, ema=0.75, **settings)
    assert model.running_mean.item() == pytest.approx(0.75 * 2 + 0.25 * 6)


def test_ema_does_not_average_integers():
    model, positions = Scalar(), torch.arange(5_000)
    model.register_buffer("positions", positions.clone())
    run(model, [(torch.tensor(1.0), None)] * 3, ema=0.95)
    assert torch.equal(model.positions, positions)


def test_history_has_a_row_per_epoch_with_the_monitored_metrics():
    model = Scalar()
    history = run(model, [(torch.tensor(1.0), None)], epochs=3, monitor=lambda model, epoch: {"acc": float(epoch)})
    assert [row["acc"] for row in history] == [1.0, 2.0, 3.0]
    assert all({"epoch", "lr", "loss", "seconds"} <= set(row) for row in history)


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(RunError, match="no longer finite in epoch 1"):
        run(Scalar(), [(torch.tensor(float("inf")), None)])


def test_the_last_saved_state_is_from_before_the_loss_became_infinite():
    class DivergingBatches:
        """Finite in the first epoch, infinite from the second."""

        def __init__(self):
            self.epochs = 0

        def __len__(self):
            return 1

        def __iter__(self):
            self.epochs += 1
            yield torch.tensor(1.0 if self.epochs == 1 else float("inf")), None

    model, saved = Scalar(), []
    with pytest.raises(RunError, match="in epoch 2"):
        run(
            model,
            DivergingBatches(),
            epochs=3,
            save=lambda state: saved.append((model.weight.item(), len(state["history"]))),
        )
    assert saved == [(pytest.approx(-0.1), 1)]


def test_generators_depend_on_seed_and_purpose_alone():
    draws = [torch.rand(3, generator=generator(*key)).tolist() for key in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3] != draws[0]


def test_without_dropout_only_batch_normalisation_trains():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5), torch.nn.LayerNorm(2))
    set_training_mode(model, dropout=True)
    assert [module.training for module in model] == [True, True, True]
    set_training_mode(model, dropout=False)
    assert [module.training for module in model] == [True, False, False]


def test_weight_decay_is_added_to_the_gradient():
    model = Scalar()
    model.weight.data.fill_(2.0)
    run(model, [(torch.tensor(1.0), None)], weight_decay=0.25)
    assert model.weight.item() == pytest.approx(2 - 0.1 * (1 + 0.25 * 2))


def test_the_momentum_stays_what_it_is():
    optimizer = OPTIMIZERS["sgd"]([torch.zeros(1, requires_grad=True)], 0.1, 0.9, 0.0)
    for schedule in SCHEDULES:
        SCHEDULES[schedule](optimizer, 0.1, 10)
        assert optimizer.param_groups[0]["momentum"] == 0.9
