"""Text from a checkpoint, printed as it is generated.

    python sample.py --model=out/tiny --prompt="Parameters"
    python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt=FILE:opening.txt --num_samples=3
    python sample.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True

Messages go to standard error, so `> story.txt` keeps the text; lines of dashes separate several samples.
"""

import contextlib
import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plumbing.chat import chat_template
from plumbing.devices import lacks_compiler, sampling_dtype, set_up_device
from plumbing.generation import join
from plumbing.pretrained import find_model
from plumbing.settings import Count, Natural, NotNegative, Probability, run

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from model import SmolLM2


@dataclass
class Settings:
    """Continue a prompt."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    prompt: str = "Once upon a time"  # text to continue, or FILE:path of one; empty: begin a document
    num_samples: Count = 1  # continuations, generated together: the first is printed as it grows, then the others
    max_new_tokens: Count = 256  # longest continuation
    temperature: NotNegative = 0.8  # below 1 likelier text, above 1 wilder, 0 always the likeliest token
    top_k: Natural = 40  # choose among the k likeliest tokens; 0: among all
    top_p: Probability = 1.0  # choose among the likeliest tokens that together have this probability
    seed: Natural = 0  # the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here
    compile: bool = False  # torch.compile the layers first: takes a while, and pays off for long texts
    stats: bool = False  # say at the end how fast it was
    chat: bool = False  # a conversation instead of the prompt, for models that were trained to have one


def load(settings):
    """The model, its tokenizer, and the folder they are from; exits with one sentence if that cannot be."""
    device = set_up_device(settings.device)
    try:
        folder = find_model(settings.model)
        model = SmolLM2.from_pretrained(folder, sampling_dtype(settings.dtype, device), device)
    except ValueError as error:
        sys.exit(str(error))
    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"{folder} has no readable tokenizer.json: {error}")
    join(model)
    if settings.compile and (reason := lacks_compiler(device)):
        print(f"generating without torch.compile: {reason}", file=sys.stderr)
    elif settings.compile:
        print("compiling: the first token waits for it", file=sys.stderr)
        for layer in model.model.layers:
            layer.compile()
    return model, tokenizer, folder


def stream(model, tokenizer, ids, settings, generator, trace=None):
    """Yield the continuation of a prompt, given as ids, in pieces of whole characters: one piece for each token."""
    one = dataclasses.replace(settings, num_samples=1)
    yield from (piece for (piece,) in streams(model, tokenizer, ids, one, generator, trace))


def streams(model, tokenizer, ids, settings, generator, trace=None):
    """Yield num_samples continuations of a prompt at once: for each token a list of the next piece of every one.

    A character may be split over several tokens: the decoder holds its first bytes back until the last has come, and
    the piece is empty. Special tokens are not shown. Tokens are noted in a trace, if there is one. Raises ValueError if
    prompt and continuation exceed the model's positions.
    """
    ids = ids or [model.config.bos_token_id]  # an empty prompt begins a document
    end, count = model.config.eos_token_id, settings.num_samples
    options = dict(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, generator=generator)
    decoders, trace = [DecodeStream(ids, skip_special_tokens=True) for _ in range(count)], trace or Trace()
    for new in model.generate([ids] * count, settings.max_new_tokens, eos_token_id=end, **options):
        tokens = new.tolist()
        for row, token in enumerate(tokens):
            if token == end:
                decoders[row] = None
        trace.add(tokens[0], sum(decoder is not None for decoder in decoders))
        pairs = zip(decoders, tokens, strict=True)
        yield [(decoder and decoder.step(tokenizer, token)) or "" for decoder, token in pairs]
        if not any(decoders):
            return


class Trace:
    """What is generated from here on, token by token, and how fast."""

    def __init__(self):
        self.ids, self.counted, self.start, self.first = [], 0, time.perf_counter(), None

    def add(self, token, count):
        """A token of the first continuation, and how many were generated with it in all."""
        self.last = time.perf_counter()
        self.ids.append(token)
        self.counted += count if self.first else 0  # the first is a time of its own: it waits for the prompt
        self.first = self.first or self.last

    def __str__(self):
        if not self.counted:
            return ""
        rate = self.counted / (self.last - self.first)
        return f"{rate:,.1f} tokens per second, the first after {self.first - self.start:.2f} s"


# ---- Conversations --------------------------------------------------------------------------------------------------
#
# A model that chats continues a text, like any other. The text is the conversation so far, in the format that the model
# was trained on, up to where its answer belongs; the token with which it ends the answer is its eos_token_id.


def answer(model, tokenizer, template, messages, settings, generator):
    """Yield the answer to the last of the messages in pieces, as stream does. A conversation too long for the model's
    positions loses its beginning, a question and its answer at a time."""
    room = model.config.max_position_embeddings - settings.max_new_tokens
    ids = tokenizer.encode(template(messages), add_special_tokens=False).ids
    while len(ids) > room and len(messages) > 2:
        messages = messages[2:]
        ids = tokenizer.encode(template(messages), add_special_tokens=False).ids
    yield from stream(model, tokenizer, ids, settings, generator)


def chat(model, tokenizer, template, settings, generator):
    """A conversation in the terminal. Ctrl-C ends an answer; at the prompt it ends the conversation, as Ctrl-D does."""
    with contextlib.suppress(ImportError):  # with it, the arrow keys work in input()
        import readline  # noqa: F401
    messages = []
    while True:
        try:
            question = {"role": "user", "content": input("> " if sys.stdin.isatty() else "")}
        except (EOFError, KeyboardInterrupt):
            return
        text = ""
        try:
            for piece in answer(model, tokenizer, template, [*messages, question], settings, generator):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            pass
        except ValueError as error:  # the question alone is too long, or refused by the template
            print(error, file=sys.stderr)
            continue
        print("\n")
        messages += [question, {"role": "assistant", "content": text}]


# ---- The command ----------------------------------------------------------------------------------------------------


def main(settings):
    prompt = settings.prompt
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"--prompt={prompt} cannot be read: {error}")
    model, tokenizer, folder = load(settings)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(settings.seed)
    if settings.chat:
        template = chat_template(folder)
        if not template:
            sys.exit(
                f"--model={settings.model} has no chat template, it only continues texts; "
                "HuggingFaceTB/SmolLM2-135M-Instruct has one, or leave out --chat=True."
            )
        return chat(model, tokenizer, template, settings, generator)
    opening, others, trace = prompt, [""] * (settings.num_samples - 1), Trace()
    try:
        for first, *rest in streams(model, tokenizer, tokenizer.encode(prompt).ids, settings, generator, trace):
            print(opening + first, end="", flush=True)
            opening = ""
            others = [text + piece for text, piece in zip(others, rest, strict=True)]
        for text in others:
            print(f"\n\n{'-' * 80}\n{prompt}{text}", end="")
        print()
    except ValueError as error:  # prompt and continuation exceed the model's positions; logits that are NaN
        sys.exit(str(error))
    if settings.stats:
        print(trace, file=sys.stderr)


if __name__ == "__main__":
    run(main, "sample", Settings)
