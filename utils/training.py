"""The one training loop: victims, fine-tuning and purification differ only in the loss they hand it."""

import math
import time

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from utils.device import autocast
from utils.errors import RunError
from utils.report import progress_bar

# name -> schedule of a whole run of n steps, all scaled from --lr: the peak, the start, the first step.
SCHEDULES = {
    "onecycle": lambda optimizer, lr, n: OneCycleLR(optimizer, lr, total_steps=n, cycle_momentum=False),
    "cosine": lambda optimizer, lr, n: CosineAnnealingLR(optimizer, n),
    # MCL's published schedule over 20 epochs: lr for the first, a tenth of it to the tenth, a hundredth to the end.
    "steps": lambda optimizer, lr, n: MultiStepLR(optimizer, [n // 20, n // 2], gamma=0.1),
}


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
    ema=0.0,
) -> list[dict]:
    """Train `model` in place with Nesterov SGD and return a row an epoch: epoch, lr, loss, seconds, what `watch` says.

    Args:
        batches: an iterable with a length, of (images, labels) on the device.
        loss_of: (images, labels) -> a scalar loss; it runs under the precision's autocast, in training mode.
        lr: the highest rate of `schedule` (a name in SCHEDULES), which covers exactly epochs * len(batches) steps.
        watch: (model, epoch from 1) -> a dict of figures for the row, or {}; any mode of the model may result.
        ema: the model ends as the exponential moving average of its weights with this decay a step; 0: as the last.

    Raises:
        RunError: the loss is no longer finite.
    """
    steps = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
    scheduler = SCHEDULES[schedule](optimizer, lr, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    history = []
    with progress_bar(title, steps, "batch") as bar:
        for epoch in range(1, epochs + 1):
            start, rate = time.perf_counter(), scheduler.get_last_lr()[0]
            model.train()
            total = torch.zeros((), device=device)  # stays there: reading it each step would stall a GPU
            for images, labels in batches:
                with autocast(device, precision):
                    loss = loss_of(images, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                if average:
                    average.update_parameters(model)
                total += loss.detach()
                bar.update()
            mean_loss = total.item() / len(batches)
            if not math.isfinite(mean_loss):
                raise RunError(f"{title}: the loss is no longer finite in epoch {epoch}; lower --lr")
            row = {"epoch": epoch, "lr": rate, "loss": mean_loss, "seconds": time.perf_counter() - start}
            if watch:
                row |= watch(average.module if average else model, epoch)
            history.append(row)
            _tell(bar, title, row, epochs)
    if average:
        model.load_state_dict(average.module.state_dict())
    return history


def _tell(bar, title, row, epochs):
    """One aligned row an epoch on stdout; ACC and ASR, where they are known, on the bar as well."""
    known = {name.upper(): f"{row[name]:.2f}" for name in ("acc", "asr") if name in row}
    bar.set_postfix(known)
    figures = "".join(f"  {name} {value:>6}" for name, value in known.items())
    progress = f"{title:<9} epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.5f}  loss {row['loss']:8.4f}"
    bar.write(f"{progress}  {row['seconds']:6.1f} s{figures}")
