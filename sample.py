"""Let a model write: text from a checkpoint, to the terminal, as it is made.

python sample.py --model=out/tiny --prompt="Parameters"
python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt=FILE:opening.txt --num_samples=3
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

import train
from checkpoint import find_checkpoint
from config import load_settings
from model import SmolLM2


@dataclass
class Settings:
    """Let a model continue a prompt."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    prompt: str = "Once upon a time"  # text to continue, or FILE:path of one; empty: begin a document
    num_samples: int = 1  # continuations, one after the other
    max_new_tokens: int = 256  # longest continuation
    temperature: float = 0.8  # below 1 likelier text, above 1 wilder, 0 always the likeliest token
    top_k: int = 40  # choose among the k likeliest tokens; 0: among all
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest to read
    compile: bool = False  # fuse the layers first: takes a while, which long texts repay


def choose_dtype(name, device):
    """The type of a name, or for auto the one whose weights are read fastest, for that is what each token waits for.

    On a GPU it is the one of training. A CPU reads half the bytes in float16, and reads bfloat16 more slowly: PyTorch's
    products of a matrix and one row are made for the other. Without AVX2, float16 is emulated, and slower than either.
    """
    if name != "auto" or device.type == "cuda":
        return train.choose_dtype(name, device)
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return torch.float32 if slow else torch.float16


def load(settings):
    """The model and its tokenizer, ready to write; exits with one sentence if that cannot be."""
    device = train.choose_device(settings.device)
    try:
        folder = find_checkpoint(settings.model)
        model = SmolLM2.from_pretrained(folder, choose_dtype(settings.dtype, device), device)
    except ValueError as error:
        sys.exit(str(error))
    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"{folder} has no readable tokenizer.json: {error}")
    if settings.compile:
        for layer in model.model.layers:
            layer.compile()
    return model, tokenizer


def stream(model, tokenizer, prompt, settings, generator):
    """Yield the continuation of a prompt in pieces of whole characters.

    A character may be split over several tokens: the decoder holds its first bytes back until the last has come.
    Special tokens are not shown.
    """
    ids = tokenizer.encode(prompt).ids or [model.config.bos_token_id]
    decoder = DecodeStream(ids, skip_special_tokens=True)
    tokens = model.generate(
        torch.tensor([ids], device=generator.device),
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        model.config.eos_token_id,
        generator,
    )
    for token in tokens:
        yield decoder.step(tokenizer, token.item()) or ""


def check_settings(settings):
    for name, fits, wanted in (
        ("num_samples", settings.num_samples >= 1, "at least 1"),
        ("max_new_tokens", settings.max_new_tokens >= 1, "at least 1"),
        ("seed", 0 <= settings.seed < 2**63, "0 or above"),
        ("temperature", settings.temperature >= 0, "0 or above"),
        ("top_k", settings.top_k >= 0, "0 or above"),
        ("top_p", 0 < settings.top_p <= 1, "above 0 and at most 1"),
    ):
        if not fits:
            sys.exit(f"--{name}={getattr(settings, name)} must be {wanted}.")


def main(settings):
    check_settings(settings)
    prompt = settings.prompt
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"--prompt={prompt} cannot be read: {error}")
    model, tokenizer = load(settings)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(settings.seed)
    try:
        for number in range(settings.num_samples):
            if number:
                print("\n" + "-" * 80)
            pieces = stream(model, tokenizer, prompt, settings, generator)
            print(prompt + next(pieces, ""), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
    except ValueError as error:  # prompt and continuation are longer than the model's positions
        sys.exit(str(error))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main(load_settings("sample", Settings))
