"""The device that a run computes on, its precision, and its allocator."""

import ctypes
import sys

import torch

from utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; auto takes CUDA if available.

    Raises:
        UserError: another name, or cuda was requested but is not available.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be 'auto', 'cpu' or 'cuda', not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is promised as such
    else:
        # A confident victim has gradients below float32's normal range, on which CPUs are many times slower: with
        # denormals an inversion took 247 s, without them 49 s, and found the same pattern.
        torch.set_flush_denormal(True)
    return torch.device(name)


def keep_freed_memory():
    """Let glibc reuse freed activations instead of returning them to the kernel; call it once the data is loaded.

    By default large blocks are unmapped, and page faults take an eighth to a quarter of a training step on a CPU.
    Buffers used to read a data set should be returned first. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_precision(name: str, device: torch.device) -> str:
    """auto, fp32 or bf16 -> fp32 or bf16; auto takes bf16 on CUDA devices that support it and CPUs with AMX.

    CPUs with bf16 through AVX-512 alone get fp32: on an Intel Xeon, bf16 made a training step 1.3 times as long.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # torch has no public function for it
    return "bf16" if has_amx() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that runs convolutions and matrix products in `precision`; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
