"""Device, dtype and compiler: what the machine computes with."""

import contextlib
import ctypes
import os
import re
import shutil
import sys
import sysconfig

import torch

# ---- Device ---------------------------------------------------------------------------------------------------------

# Dense 16-bit matrix products with 32-bit sums, in teraflops, from the makers' data sheets. A name stands for the
# devices that have all its words; of several names, the first.
PEAKS = """
    B200 2250,  GH200 989,  H200 NVL 835,  H200 989,  H100 NVL 835,  H100 PCIe 756,  H100 989,  A100 312,  A10G 70,
    A10 125,  L40S 362,  L40 181,  L4 121,  V100 125,  T4 65,  RTX 5090 210,  RTX 4090 165,  RTX 3090 71
"""
VARIANTS = {"Laptop", "Max", "Ti", "D", "MIG"}  # words that make it another device, or a part of one


def set_up_device(name, local_rank=0):
    """The device of a name, ready for training; for auto the best there is. Exits with one sentence if it cannot be
    used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # no such device; a PyTorch without CUDA
        sys.exit(f"--device={name} cannot be used here: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    elif device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Make glibc reuse large blocks. It would return them to the system and ask for new ones, whose pages have to be
    cleared: a tenth of a step of the 135M."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block outside the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device):
    """Operations a second that a device reaches at most, of which MFU is a fraction; None where it is not known."""
    return peak_of(device_name(device)) if device.type == "cuda" else None


def peak_of(name):
    words = set(re.findall(r"\w+", name))
    for *known, teraflops in map(str.split, PEAKS.split(",")):
        if set(known) <= words and not words & VARIANTS:
            return float(teraflops) * 1e12
    return None


def to_device(tensor, device):
    """From pinned memory, a copy to a GPU goes on while the GPU computes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- Dtype ----------------------------------------------------------------------------------------------------------


def training_dtype(name, device):
    """The dtype of the matrix products in training. auto: bfloat16 where the hardware multiplies it, float16 on older
    NVIDIA GPUs, else float32. Exits with one sentence for a dtype that the device lacks."""
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


def sampling_dtype(name, device):
    """The dtype of the weights in generation. auto: the one that is read fastest, since each token reads all weights.

    On a GPU it is that of training. A CPU reads float16 at full speed and bfloat16 more slowly, for PyTorch's products
    of a matrix and one row are made for float16. Without AVX2, float16 is emulated and slower than float32.
    """
    if name != "auto" or device.type == "cuda":
        return training_dtype(name, device)
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return torch.float32 if slow else torch.float16


# ---- Compiler -------------------------------------------------------------------------------------------------------


def lacks_compiler(device):
    """Why torch.compile cannot work here, in words, or None. It generates C++ for a CPU, and for a GPU Triton with a
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


# ---- Attention ------------------------------------------------------------------------------------------------------


def has_grouped_kernel(q, mask):
    """Whether PyTorch has a fused attention kernel for grouped queries, which never holds the T x S weights in memory.

    There is one for CPUs, and one for 16 bits without a mask on GPUs of compute capability 8.0 or later (NVIDIA Ampere,
    2020). Elsewhere keys and values are repeated, so that its other fused kernels apply.
    """
    if q.device.type == "cuda":
        return mask is None and q.dtype != torch.float32 and torch.cuda.get_device_properties(q.device).major >= 8
    return q.device.type == "cpu"
