"""Randomness: every draw of this project comes from a generator with a name."""

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that belongs to (seed, purpose), so that one more draw for one purpose moves no other."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def seed_weights(seed: int) -> None:
    """Fix the global generator, from which torch initialises a fresh network's weights."""
    torch.manual_seed(seed)
