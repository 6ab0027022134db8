"""The curves of a training for TensorBoard, if that package is installed."""

from utils.errors import UserError


def open_tensorboard(folder: str):
    """Return log(metrics, epoch), which writes each metric into `folder` at once; UserError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # imported here: only --tensorboard needs it
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    writer = None

    def log(metrics, epoch):
        nonlocal writer
        # purge_step: TensorBoard drops what an earlier run of this name wrote from this epoch on.
        writer = writer or SummaryWriter(folder, purge_step=epoch)
        for name, value in metrics.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log
