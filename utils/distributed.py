"""Several processes started by torchrun: data-parallel training (torch.distributed), or the runs of a comparison."""

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
    """The rank of this process, 0 to count - 1, and the number of processes."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process measures, writes and reports."""
        return self.rank == 0

    @contextmanager
    def main_process_first(self):
        """The main process runs the body, such as a download, before any other process enters it."""
        if not self.is_main:
            distributed.barrier()
        yield
        if self.is_main and self.count > 1:
            distributed.barrier()

    def from_main(self, make):
        """make(), called in the main process alone; every process gets its result."""
        if self.count == 1:
            return make()
        result = [make() if self.is_main else None]
        distributed.broadcast_object_list(result)
        return result[0]

    def wrap(self, model):
        """The model to compute the loss with; its gradients are averaged over all processes."""
        return model if self.count == 1 else DistributedDataParallel(model)


ONE_PROCESS = Processes()


def torchrun_processes() -> Processes:
    """This process among those of torchrun, if any, on its GPU; from here on, only the main process prints."""
    processes = Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if processes.count > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not processes.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    return processes


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Connect the processes of torchrun, if any, and pick this one's device: GPU i for local rank i.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    processes = torchrun_processes()
    if processes.count == 1:
        return processes, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        gpu_count = torch.cuda.device_count()
        if device.index >= gpu_count:
            raise UserError(f"more processes than GPUs ({gpu_count}); lower --nproc_per_node or use --device cpu")
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)
    return processes, device
