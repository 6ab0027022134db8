"""Several processes that train one model together, started by torchrun (torch.distributed)."""

import atexit
import os
import sys
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError


class Processes(NamedTuple):
    """How many there are, and which one this is, 0 to count - 1."""

    rank: int = 0
    count: int = 1

    @contextmanager
    def first_goes_ahead(self):
        """What the first process does inside, such as a download, is done before the others begin with it."""
        if self.rank > 0:
            distributed.barrier()
        yield
        if self.rank == 0 and self.count > 1:
            distributed.barrier()

    def wrap(self, model):
        """The model to compute the loss with: its gradients are the means over all processes."""
        return model if self.count == 1 else DistributedDataParallel(model)


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the other processes, if torchrun started any, and take this one's part of the device: GPU i for process i.

    All but the first print nothing from here on.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if processes.count == 1:
        return processes, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"more processes than the {torch.cuda.device_count()} GPUs here; or give --device cpu")
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)
    if processes.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    return processes, device
