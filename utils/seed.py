"""Randomness: every random draw comes from a generator named after its purpose."""

import hashlib
from contextlib import contextmanager

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose): an extra draw for one purpose does not affect any other."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def seeded(seed: int):
    """Seed torch's global generator, which dropout draws from, and leave it as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
