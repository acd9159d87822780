"""Device, dtype, compiler and micro-batch: what the machine computes with."""

import contextlib
import copy
import ctypes
import gc
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from functools import partial

from plumbing import TOO_LATE
from plumbing.files import AFTERWARDS, say

import torch

# ---- Device ---------------------------------------------------------------------------------------------------------

# Dense 16-bit matrix products with 32-bit sums, in teraflops, from the makers' data sheets. A name stands for the
# devices that have all its words; of several names, the first.
PEAKS = """
    B200 2250,  GH200 989,  H200 NVL 835,  H200 989,  H100 NVL 835,  H100 PCIe 756,  H100 989,  A100 312,  A10G 70,
    A10 125,  L40S 362,  L40 181,  L4 121,  V100 125,  T4 65,  RTX 5090 210,  RTX 4090 165,  RTX 3090 71
"""
VARIANTS = {"Laptop", "Max", "Ti", "D", "MIG"}  # words that make it another device, or a part of one


def set_up_device(name, local_rank=0, deterministic=False, flash_attention_3=False):
    """The device of a name, ready for use; for auto, the best there is. Exits with one sentence if it is unusable."""
    if deterministic:  # flash attention's backward pass, for one, otherwise adds in no fixed order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        AFTERWARDS.callback(torch.use_deterministic_algorithms, False)
    if flash_attention_3:
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
        except Exception as error:  # no such package, an older PyTorch, another GPU
            sys.exit(f"--flash_attention_3=True cannot be used here: {error}")
        say("using FlashAttention 3")
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
        if TOO_LATE:
            reason = "torch was imported before train and sample: see the head of plumbing/__init__.py"
            say(f"on a CPU that other programs use too, training will be slow, because {reason}", sys.stderr)
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            # glibc returns large blocks to the system and asks for new ones, whose pages have to be cleared: a tenth of
            # a step of the 135M. Keep them: no block outside the heap (M_MMAP_MAX), no trimming (M_TRIM_THRESHOLD).
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)
            libc.mallopt(-1, -1)
    return device


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(name):
    """Operations per second that a GPU of this name reaches at most; None where that is not known."""
    words = set(re.findall(r"\w+", name))
    for *known, teraflops in map(str.split, PEAKS.split(",")):
        if set(known) <= words and not words & VARIANTS:
            return float(teraflops) * 1e12
    return None


def to_device(array, device):
    """A numpy array as a tensor on the device. From pinned memory, the copy overlaps with the GPU's work."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- Dtype ----------------------------------------------------------------------------------------------------------


def training_dtype(name, device):
    """The dtype of matrix products in training. auto: bfloat16 where the hardware multiplies it, float16 on older
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

    On a GPU that is the dtype of training. A CPU reads float16 at full speed and bfloat16 more slowly, because
    PyTorch's products of a matrix and one row are made for float16. Without AVX2, float16 is emulated and slower than
    float32.
    """
    if name != "auto" or device.type == "cuda":
        return training_dtype(name, device)
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return torch.float32 if slow else torch.float16


def read_in_float32(model):
    """Where a CPU would emulate products of 16-bit matrices, several times slower than float32: convert each layer for
    as long as it reads a prompt. Returns the dtype of keys and values then."""
    weight = model.lm_head.weight
    multiplies = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if weight.device.type != "cpu" or weight.dtype.itemsize > 2 or multiplies:
        return weight.dtype
    for layer in model.model.layers:
        layer.forward = partial(in_float32, layer)
    return torch.float32


def in_float32(layer, x, *args):
    return type(layer).forward(copy.deepcopy(layer).float(), x.float(), *args).type_as(x)


# ---- Compiler -------------------------------------------------------------------------------------------------------


def can_compile(wanted, device, say=print):
    """Whether to use torch.compile; says why not if it is wanted and cannot work here."""
    if wanted and (reason := lacks_compiler(device)):
        say(f"running without torch.compile: {reason}")
        return False
    return wanted


def lacks_compiler(device):
    """Why torch.compile cannot work here, in words, or None. It generates C++ for a CPU, and for a GPU Triton with a
    launcher in C; both are compiled against Python's headers."""
    if device.type == "cuda":
        if not importlib.util.find_spec("triton"):
            return "it needs the package triton"
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


# ---- The micro-batch ------------------------------------------------------------------------------------------------


def share_of_step(settings, ranks):
    """How many sequences of a step one rank trains on; exits if batch_tokens cannot be divided like that."""
    unit = settings.seq_len * (settings.micro_batch or 1) * ranks.size
    if settings.batch_tokens % unit:
        sys.exit(
            f"--batch_tokens={settings.batch_tokens} must be a multiple of seq_len x micro_batch x devices, "
            f"{settings.seq_len} x {settings.micro_batch or 1} x {ranks.size}: "
            f"{max(1, round(settings.batch_tokens / unit)) * unit} is one."
        )
    share = settings.batch_tokens // settings.seq_len // ranks.size
    if not settings.micro_batch and share > 8 and all(share % count for count in range(2, 9)):
        near = round(share / 8) * 8 * settings.seq_len * ranks.size
        ranks.say(
            f"--batch_tokens={settings.batch_tokens} is {share} sequences per device, which few micro-batches divide: "
            f"{near} would leave more choice"
        )
    return share


def training_memory(config, parameters, tokens, dtype, compiled=True, recompute=False):
    """Estimated bytes to train a model of N parameters, with this number of tokens in a micro-batch and matrix products
    in a dtype of b bytes.

        (16 + b) N       weights, gradients and two moments in float32, and a copy of the weights in dtype
        L (12 C + b (2 C + 2 K D + 3 F))     for each token and layer, for the backward pass: in float32 the stream
                         before and after the attention, and a norm; in dtype the rotated queries and keys, the values,
                         the attention's output, gate, up and the product of both
        b V              for each token: the logits

    That is with torch.compile; without it, each token takes about twice as much. With recompute the inputs of all
    layers are kept, 4 L C, and everything of a single one. On an H100, in bfloat16 with sequences of 2048 tokens, the
    135M took 13.8, 25.5 and 47.4 GB for 8, 16 and 32 of them, and the 1.7B 49.8 GB for 4: the formula is within 5%.
    """
    L, V, C, F = config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size
    K, D, b = config.num_key_value_heads, config.head_dim, dtype.itemsize
    layer = 12 * C + b * (2 * C + 2 * K * D + 3 * F)
    per_token = (4 * L * C + layer if recompute else L * layer) + b * V
    return (16 + b) * parameters + tokens * per_token * (1 if compiled else 2)


def choose_micro_batch(model, share, settings, dtype, autocast, compiled, previous, ranks):
    """How many sequences to train on at once, a divisor of a device's share of a step; the same on all ranks.

    On a GPU as many as fit, by the formula above, into nine tenths of its memory; one forward and backward pass tries
    them, and if they do not fit, half as many. On a CPU, where more are not faster, about 2048 tokens. A resumed run
    keeps the previous number, so that it rounds as before, if all ranks have the same devices again.
    """
    device, parameters = model.lm_head.weight.device, sum(parameter.numel() for parameter in model.parameters())
    choices = [count for count in range(share, 0, -1) if share % count == 0]
    if settings.micro_batch:
        return settings.micro_batch
    if all(ranks.gather(previous in choices)):
        ranks.say(f"micro-batch: {previous} sequences per device, as before")
        return previous
    if device.type == "cpu":
        chosen = next((count for count in choices if count * settings.seq_len <= 2048), 1)
        ranks.say(f"micro-batch: {chosen} sequences per device")
        return chosen
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # free, and what it has already
    else:
        room = torch.mps.recommended_max_memory()

    def needed(count):
        tokens, recompute = count * settings.seq_len, settings.recompute_activations
        return training_memory(model.config, parameters, tokens, dtype, compiled, recompute)

    chosen = next((count for count in choices if needed(count) <= 0.9 * room), 1)
    while chosen > 1 and not fits(model, chosen, settings.seq_len, autocast, 8 * parameters):
        chosen = next(count for count in choices if count <= chosen // 2)
    chosen = min(ranks.gather(chosen))
    expected = f"about {needed(chosen) / 1e9:.1f} of {room / 1e9:.1f} GB"
    ranks.say(f"micro-batch: {chosen} sequences per device ({expected})")
    return chosen


def fits(model, count, seq_len, autocast, reserved):
    """Whether a forward and backward pass succeeds beside reserved bytes, which the optimizer will take."""
    device = model.lm_head.weight.device

    def one_pass():
        taken = torch.empty(reserved, dtype=torch.uint8, device=device)
        tokens = torch.zeros(count, seq_len, dtype=torch.long, device=device)
        with autocast:
            loss = model(tokens, tokens)
        loss.backward()
        del taken

    try:
        one_pass()
        return True
    except RuntimeError as error:  # PyTorch's OutOfMemoryError is one; cuBLAS, Triton and MPS have words only
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        return False
    finally:
        model.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
