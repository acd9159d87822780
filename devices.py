"""What the machine has to compute with, and what it is good at."""

import contextlib
import ctypes
import os
import shutil
import sys

import torch

# Dense 16-bit matrix products, in operations a second, from the makers' data sheets: what MFU is a fraction of.
PEAK_FLOPS = {  # the first name that is part of the device's counts
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device):
    """The peak of a device that PEAK_FLOPS knows, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def choose_device(name, local_rank=0):
    """The device of a name, or for auto the best there is; exits with one sentence if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # no such device; a PyTorch without CUDA
        sys.exit(f"--device={name} cannot be used here: {str(error).splitlines()[0]}")
    return device


def choose_dtype(name, device):
    """The type of a name; auto is bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast_on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and fast_on_cpu else torch.float32


def can_compile(device):
    """Whether torch.compile has the compiler that it needs: on a CPU one for C++, which not every machine has."""
    compiler = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return device.type == "cuda" or (device.type == "cpu" and shutil.which(os.environ.get("CXX", compiler)))


def keep_freed_memory():
    """On a CPU with glibc, reuse large blocks. It would hand them back to the system and ask for new ones, whose pages
    have to be cleared: a tenth of a step of the 135M."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
