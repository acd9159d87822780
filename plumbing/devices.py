"""What the machine has to compute with, and what it is good at."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import sysconfig

import torch

# Dense 16-bit matrix products with 32-bit sums, in operations a second, from the makers' data sheets: what MFU is a
# fraction of. A name counts for the devices that have all its words; of several, the first.
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
VARIANTS = {"Laptop", "Max", "Ti", "D", "MIG"}  # words that make it another device, or a part of one


def peak_flops(device):
    """The peak of a device that PEAK_FLOPS knows, else None."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name):
    words = set(re.findall(r"\w+", name))
    known = (flops for known, flops in PEAK_FLOPS.items() if set(known.split()) <= words)
    return None if words & VARIANTS else next(known, None)


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
    """The type of the matrix products in training. auto: bfloat16 where the hardware multiplies it, float16 on older
    NVIDIA GPUs, else float32. Exits with one sentence for a type that the device lacks."""
    if name != "auto":
        dtype = getattr(torch, name)
        try:
            torch.ones(2, device=device, dtype=dtype).sum().item()
        except (RuntimeError, TypeError) as error:  # bfloat16 on older versions of macOS
            sys.exit(f"--dtype={name} cannot be used on {device.type} here: {str(error).splitlines()[0]}")
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and in_hardware and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return torch.bfloat16
    return torch.float32


def lacks_compiler(device):
    """Why torch.compile cannot work here, in words, or None. What it generates for a CPU is C++, for a GPU Triton with a
    launcher in C; both are compiled against Python's headers."""
    if device.type == "cuda":
        compilers = [os.environ.get("CC"), "gcc", "clang"]
    elif device.type == "cpu":
        compilers = [os.environ.get("CXX"), {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")]
    else:
        return f"it is not supported on {device.type}"
    if not any(name and shutil.which(name) for name in compilers):
        return f"it needs a compiler, {compilers[1]}"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "it needs Python's header files, which Debian and Ubuntu have in python3-dev"
    return None


def keep_freed_memory():
    """On a CPU with glibc, reuse large blocks. It would hand them back to the system and ask for new ones, whose pages
    have to be cleared: a tenth of a step of the 135M."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
