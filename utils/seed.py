"""Randomness: every random draw comes from a generator named after its purpose."""

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose): an extra draw for one purpose does not affect any other."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
