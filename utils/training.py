"""The training loop of victims, fine-tuning and purification, which differ only in their loss."""

import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, MultiStepLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.device import autocast
from utils.errors import RunError, UserError
from utils.progress import progress_bar

# name -> schedule over the n steps of a run. --lr is the peak of onecycle and the initial rate of the others, also in
# a run of few steps.
SCHEDULES = {
    "onecycle": lambda optimizer, lr, n: OneCycleLR(optimizer, lr, total_steps=max(n, 2), cycle_momentum=False),
    "cosine": lambda optimizer, lr, n: CosineAnnealingLR(optimizer, n),
    "constant": lambda optimizer, lr, n: ConstantLR(optimizer, factor=1.0),
    # MCL's published schedule, over 20 epochs: lr in epoch 1, lr / 10 to epoch 10, lr / 100 to the end.
    "steps": lambda optimizer, lr, n: MultiStepLR(optimizer, [max(n // 20, 1), max(n // 2, 2)], gamma=0.1),
    # Fine-tuning's and NAD's, over 20 epochs: lr in epochs 1 and 2, lr / 10 to the end.
    "drop": lambda optimizer, lr, n: MultiStepLR(optimizer, [max(n // 10, 1)], gamma=0.1),
}
# name -> optimizer of the weights; AdamW, which has no use for a momentum, is for transformers and ConvNeXts.
OPTIMIZERS = {
    "sgd": lambda weights, lr, momentum, decay: torch.optim.SGD(
        weights, lr, momentum, weight_decay=decay, nesterov=momentum > 0
    ),
    "adamw": lambda weights, lr, momentum, decay: torch.optim.AdamW(weights, lr, weight_decay=decay),
}


def sgd_step(optimizer, loss_of, max_gradient: float = math.inf) -> torch.Tensor:
    """Take one optimizer step on loss_of(); returns the loss, detached.

    Args:
        max_gradient: the gradient is scaled down to at most so many times the norm of the weights, which spares
            networks without normalisation layers steps that they do not survive (after Brock et al., ICML 2021).
    """
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    if max_gradient < math.inf:
        weights = [weight for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
        clip_grad_norm_(weights, max_gradient * get_total_norm([weight.detach() for weight in weights]))
    optimizer.step()
    return loss.detach()


def train(
    model,
    batches,
    loss_of,
    device,
    *,
    epochs,
    lr,
    momentum,
    weight_decay,
    schedule,
    precision,
    title,
    optimizer="sgd",
    monitor=None,
    update=sgd_step,
    ema=0.0,
    dropout=True,
    generators=(),
    resume=None,
    save=None,
) -> list[dict]:
    """Train `model` in place.

    Args:
        batches: an iterable with a length, of (images, labels) on the device.
        loss_of: (images, labels) -> a scalar loss; called under autocast with the model in training mode.
        lr: the highest rate of `schedule`, a name in SCHEDULES, which spans epochs * len(batches) steps.
        optimizer: a name in OPTIMIZERS; "sgd" has Nesterov momentum.
        monitor: (model, epoch from 1) -> a dict of metrics for the history, or {}; may change the model's mode.
        update: (optimizer, () -> loss of the batch) -> that loss, detached; replaces the usual step.
        ema: decay per step of the exponential moving average of the weights that the model ends with; 0: its last
            weights.
        dropout: without it, only batch normalisation is in training mode: nothing in the network is random.
        generators: the torch.Generators that `batches` and `loss_of` draw from, besides torch's global one.
        resume: a state passed to `save` earlier; the caller has loaded the model's weights. Training continues as if
            never interrupted, bit for bit on a CPU.
        save: called after each epoch with the training state (tensors and plain values) without the model's weights,
            which the caller stores with it.

    Returns:
        the history, a dict per epoch: epoch, lr, loss, seconds and the monitor's metrics.

    Raises:
        RunError: the loss or the weights are no longer finite.
        UserError: the state to resume belongs to another training.
    """
    steps = epochs * len(batches)
    optimizer = OPTIMIZERS[optimizer](trained_parameters(model), lr, momentum, weight_decay)
    scheduler = SCHEDULES[schedule](optimizer, lr, steps)
    average = AveragedModel(model, multi_avg_fn=_moving_average(ema), use_buffers=True) if ema else None
    components = {"optimizer": optimizer, "scheduler": scheduler} | ({"average": average} if average else {})
    history = _restore(resume, components, generators, epochs) if resume else []
    with progress_bar(title, steps, "batch") as bar:
        bar.update(len(history) * len(batches))
        for epoch in range(len(history) + 1, epochs + 1):
            start, rate = time.perf_counter(), scheduler.get_last_lr()[0]
            set_training_mode(model, dropout)
            total = torch.zeros((), device=device)  # read once an epoch: each read stalls a GPU
            for images, labels in batches:
                batch_loss = partial(_loss_under_autocast, device, precision, loss_of, images, labels)
                total += update(optimizer, batch_loss)
                scheduler.step()
                if average:
                    average.update_parameters(model)
                bar.update()
            row = {"epoch": epoch, "lr": rate, "loss": total.item() / len(batches)}
            row["seconds"] = time.perf_counter() - start
            history.append(end_epoch(row, model, average.module if average else model, epochs, title, monitor, bar))
            if save:
                save(_state(components, generators, history))
    if average:
        model.load_state_dict(average.module.state_dict())
    return history


def finetune(model, batches, device, *, title, **training):
    """Train a copy of a model on the labels of (images, labels) batches; `training` as in `train`.

    Returns:
        the copy, in eval mode, and the history of its training.
    """
    student = copy.deepcopy(model).requires_grad_(True)

    def loss_of(images, labels):
        return F.cross_entropy(student(images), labels)

    history = train(student, batches, loss_of, device, title=title, **training)
    return student.eval(), history


def trained_parameters(model) -> list[torch.nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_training_mode(model, dropout: bool) -> None:
    """Put a model, or without dropout only its batch normalisation, into training mode."""
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()


def end_epoch(row, model, measured, epochs, title, monitor, bar) -> dict:
    """Check that an epoch left finite numbers, add the monitor's metrics of the `measured` model, and log the row.

    Args:
        row: "epoch", "lr", "loss" and "seconds".
        title: opens the logged row; without one, the epoch is not logged.

    Raises:
        RunError: the loss or the weights are no longer finite.
    """
    if not math.isfinite(row["loss"]) or not _is_finite(model):
        raise RunError(f"{title}: loss or weights no longer finite in epoch {row['epoch']}; lower the learning rate")
    row |= monitor(measured, row["epoch"]) if monitor else {}
    if title:
        log_epoch(bar, title, row, epochs)
    return row


def log_epoch(bar, title, row, epochs):
    """Print one aligned row per epoch; ACC and ASR, if measured, are shown on the progress bar too."""
    measured = {name.upper(): row[name] for name in ("acc", "asr") if not math.isnan(row.get(name, math.nan))}
    measured = {name: f"{value:.2f}" for name, value in measured.items()}
    bar.set_postfix(measured)
    metrics = "".join(f"  {name} {value:>6}" for name, value in measured.items())
    progress = f"{title:<9} epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.5f}  loss {row['loss']:8.4f}"
    bar.write(f"{progress}  {row['seconds']:6.1f} s{metrics}")


def _moving_average(decay):
    """For AveragedModel: the moving average of floats; integers, as of the positions in a Swin, stay what they are."""
    average = get_ema_multi_avg_fn(decay)

    def update(averages, values, count):
        average(averages, values, count) if averages[0].is_floating_point() else torch._foreach_copy_(averages, values)

    return update


def _loss_under_autocast(device, precision, loss_of, images, labels):
    with autocast(device, precision):
        return loss_of(images, labels)


def _state(components, generators, history):
    """Everything that the next epoch depends on, except the model's weights."""
    rng_states = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    state = {name: component.state_dict() for name, component in components.items()}
    return {"history": history, "generators": rng_states, **state}


def _restore(state, components, generators, epochs):
    """Load what `_state` returned, and return its history."""
    try:
        for name, component in components.items():
            component.load_state_dict(state[name])
        global_state, *rng_states = state["generators"]
        for generator, rng_state in zip(generators, rng_states, strict=True):
            generator.set_state(rng_state)
        torch.set_rng_state(global_state)
        history = [dict(row) for row in state["history"]]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError("the state to resume belongs to another training; start anew without --resume") from None
    if len(history) > epochs:
        raise UserError(f"the state to resume has {len(history)} epochs, more than --epochs {epochs}")
    return history


def _is_finite(model):
    statistics = [value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return bool(torch.stack([tensor.isfinite().all() for tensor in (*model.parameters(), *statistics)]).all())
