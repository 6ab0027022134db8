"""Triggers, label modes and attacks. The poisoned data set itself is data_loader.DatasetBD."""

from attacks.attack import TRIGGERS, Attack
from attacks.build import build_attack
from attacks.unknown import UnknownAttack

__all__ = ["TRIGGERS", "Attack", "UnknownAttack", "build_attack"]
