"""Where a run computes, and how."""

import ctypes
import sys

import torch

from utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; auto takes CUDA where there is one.

    Raises:
        UserError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    else:
        # Gradients of a victim that is very sure are below float32's normal range, where processors are many times
        # slower: an inversion took 247 s with them and 49 s without, to the same pattern.
        torch.set_flush_denormal(True)
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc to keep freed activations for the next step; to be called once the data are there.

    By default it hands large blocks back to the kernel, and page faults then take an eighth to a quarter of a training
    step on a CPU. What is left of reading a data set had better go back first. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def pick_precision(name: str, device: torch.device) -> str:
    """auto, fp32 or bf16 -> fp32 or bf16; auto takes bf16 on CUDA devices that compute in it, and on CPUs with AMX.

    CPUs with AVX-512's bf16 instructions alone are left out: on an Intel Xeon a training step took 1.3 times as long.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # torch says it nowhere else
    return "bf16" if has_amx() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which convolutions and matrix products run in `precision`; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
