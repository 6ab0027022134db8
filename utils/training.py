"""The one training loop: victims, fine-tuning and purification differ only in the loss they hand it."""

import math
import time
from functools import partial

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.device import autocast
from utils.errors import RunError, UserError
from utils.report import progress_bar

# name -> schedule of a whole run of n steps, all scaled from --lr: the peak, the start, the first step.
SCHEDULES = {
    "onecycle": lambda optimizer, lr, n: OneCycleLR(optimizer, lr, total_steps=n, cycle_momentum=False),
    "cosine": lambda optimizer, lr, n: CosineAnnealingLR(optimizer, n),
    # MCL's published schedule over 20 epochs: lr for the first, a tenth of it to the tenth, a hundredth to the end.
    "steps": lambda optimizer, lr, n: MultiStepLR(optimizer, [n // 20, n // 2], gamma=0.1),
    # Fine-tuning's and NAD's: lr for 2 of 20 epochs, a tenth of it from there.
    "drop": lambda optimizer, lr, n: MultiStepLR(optimizer, [n // 10], gamma=0.1),
}


def descend(optimizer, loss_of) -> torch.Tensor:
    """One step down the gradient of loss_of(), which is returned, detached."""
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
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
    watch=None,
    update=descend,
    ema=0.0,
    generators=(),
    resume=None,
    save=None,
) -> list[dict]:
    """Train `model` in place with Nesterov SGD and return a row an epoch: epoch, lr, loss, seconds, what `watch` says.

    Args:
        batches: an iterable with a length, of (images, labels) on the device.
        loss_of: (images, labels) -> a scalar loss; it runs under the precision's autocast, in training mode.
        lr: the highest rate of `schedule` (a name in SCHEDULES), which covers exactly epochs * len(batches) steps.
        watch: (model, epoch from 1) -> a dict of figures for the row, or {}; any mode of the model may result.
        update: (optimizer, () -> loss of the batch) -> that loss, detached: the step, where it is not the usual one.
        ema: the model ends as the exponential moving average of its weights with this decay a step; 0: as the last.
        generators: the torch.Generators that `batches` and `loss_of` draw from, beside torch's global one.
        save: called after each epoch with the state of the training: all but the model's weights, which are the
            caller's to keep with it, as tensors and plain values.
        resume: a state that `save` was given, and the model has its weights: go on from there, with the same numbers,
            bit for bit on a CPU, as if there had been no stop.

    Raises:
        RunError: the loss or the weights are no longer finite.
        UserError: the state to resume is not of such a training.
    """
    steps = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    scheduler = SCHEDULES[schedule](optimizer, lr, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    parts = {"optimizer": optimizer, "scheduler": scheduler} | ({"average": average} if average else {})
    history = _restore(resume, parts, generators, epochs) if resume else []
    with progress_bar(title, steps, "batch") as bar:
        bar.update(len(history) * len(batches))
        for epoch in range(len(history) + 1, epochs + 1):
            start, rate = time.perf_counter(), scheduler.get_last_lr()[0]
            model.train()
            total = torch.zeros((), device=device)  # stays there: reading it each step would stall a GPU
            for images, labels in batches:
                compute = partial(_under, device, precision, loss_of, images, labels)
                total += update(optimizer, compute)
                scheduler.step()
                if average:
                    average.update_parameters(model)
                bar.update()
            row = {"epoch": epoch, "lr": rate, "loss": total.item() / len(batches)}
            row["seconds"] = time.perf_counter() - start
            history.append(end_epoch(row, model, average.module if average else model, epochs, title, watch, bar))
            if save:
                save(_state(parts, generators, history))
    if average:
        model.load_state_dict(average.module.state_dict())
    return history


def end_epoch(row, model, measured, epochs, title, watch, bar) -> dict:
    """See that an epoch left numbers, add what `watch` says of the model that is `measured`, and tell it.

    Args:
        row: its "epoch", "lr", "loss" and "seconds".

    Raises:
        RunError: the loss or the weights are no longer finite.
    """
    if not math.isfinite(row["loss"]) or not _is_finite(model):
        raise RunError(f"{title}: loss or weights are no longer finite in epoch {row['epoch']}; lower --lr")
    row |= watch(measured, row["epoch"]) if watch else {}
    _tell(bar, title, row, epochs)
    return row


def _under(device, precision, loss_of, images, labels):
    with autocast(device, precision):
        return loss_of(images, labels)


def _state(parts, generators, history):
    """Everything that the next epoch depends on, but for the model's weights."""
    draws = [torch.get_rng_state(), *(generator.get_state() for generator in generators)]
    return {"history": history, "generators": draws, **{name: part.state_dict() for name, part in parts.items()}}


def _restore(state, parts, generators, epochs):
    """Put a state back to where `_state` took it from, and return its history."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, *others = state["generators"]
        for generator, draws in zip(generators, others, strict=True):
            generator.set_state(draws)
        torch.set_rng_state(first)
        history = [dict(row) for row in state["history"]]
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        raise UserError("the state to resume is not of such a training") from None
    if len(history) > epochs:
        raise UserError(f"the state to resume has {len(history)} epochs, more than the {epochs} asked for")
    return history


def _is_finite(model):
    return bool(torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all())


def _tell(bar, title, row, epochs):
    """One aligned row an epoch on stdout; ACC and ASR, where they are known, on the bar as well."""
    known = {name.upper(): f"{row[name]:.2f}" for name in ("acc", "asr") if name in row}
    bar.set_postfix(known)
    figures = "".join(f"  {name} {value:>6}" for name, value in known.items())
    progress = f"{title:<9} epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.5f}  loss {row['loss']:8.4f}"
    bar.write(f"{progress}  {row['seconds']:6.1f} s{figures}")
