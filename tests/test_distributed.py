"""Two processes that train one model: the weights are those of one process, and only the main process writes."""

import json
import os
import socket

import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import multiprocessing, nn

from data_loader import Batches, TensorImages
from utils.distributed import Processes, join_processes
from utils.seed import generator
from utils.training import train


def test_rank_0_is_the_main_process():
    assert Processes().is_main
    assert [Processes(rank, 2).is_main for rank in range(2)] == [True, False]


def train_network(images, shard, wrap):
    """The state_dict of a small network after three epochs on this shard of each batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))  # no batch norm: its statistics differ between processes
    network = wrap(model)
    rng = generator(0, "batches")
    data = TensorImages(images, torch.arange(8) % 4)
    batches = Batches(data, 4, "cpu", shuffle=True, padding=1, drop_last=True, rng=rng, shard=shard)
    train(
        model, batches, lambda x, y: F.cross_entropy(network(x), y), torch.device("cpu"), epochs=3, lr=0.1,
        momentum=0.9, weight_decay=1e-3, schedule="cosine", precision="fp32", title="test",
    )  # fmt: skip
    return model.state_dict()


def train_process(rank, port, images, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, _ = join_processes(torch.device("cpu"))
    torch.save(train_network(images, processes, processes.wrap), folder / f"{rank}.pt")
    rank_of_maker = processes.from_main(lambda: torch.tensor([rank]))
    torch.save(rank_of_maker, folder / f"maker-{rank}.pt")


def test_two_processes_end_with_the_weights_of_one_process(images, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    multiprocessing.spawn(train_process, (port, images, tmp_path), nprocs=2)
    expected = train_network(images, (0, 1), lambda model: model)
    for rank in range(2):
        weights = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.allclose(weights[name], expected[name], atol=1e-6) for name in expected)
        assert torch.load(tmp_path / f"maker-{rank}.pt", weights_only=True).item() == 0


def test_torchrun_trains_a_victim_and_only_the_main_process_writes(script, tmp_path):
    options = ("--dataset", "shapes", "--arch", "WRN-10-1", "--device", "cpu", "--epochs", 1, "--lr", 0.1)
    runner = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train_badnet.py")
    done = script(*runner, *options, "--name", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("victim: ") == done.stdout.count("poisoned 10.0%") == 1
    assert done.stdout.count("epoch   1/1") == 1
    assert json.loads((tmp_path / "results" / "two" / "metrics.json").read_text())["seconds"]["train"] > 0
    assert (tmp_path / "weight" / "shapes" / "two.pth.tar").exists()
