"""Triggers and label modes. The poisoned data set itself is data_loader.DatasetBD."""

from attacks.attack import TARGET_TYPES, TRIGGERS, Attack

__all__ = ["TARGET_TYPES", "TRIGGERS", "Attack"]
