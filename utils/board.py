"""The curves of a training for TensorBoard, where that package is installed."""

from utils.errors import UserError


def open_board(folder: str):
    """A function of (figures, epoch) that writes a dict of numbers as one point of each curve, at once, into `folder`.

    Raises:
        UserError: the package is not here.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, since only --tensorboard needs it
    except ImportError:
        raise UserError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    writer = None

    def log(figures, epoch):
        nonlocal writer
        # What an earlier run of this name wrote from this epoch on is no longer true: TensorBoard is told to drop it.
        writer = writer or SummaryWriter(folder, purge_step=epoch)
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return log
