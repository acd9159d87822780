"""Text from a checkpoint, printed as it is generated.

    python sample.py --model=out/tiny --prompt="Parameters"
    python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt=FILE:opening.txt --num_samples=3
    python sample.py --model=HuggingFaceTB/SmolLM2-135M-Instruct                a conversation: it was made to answer

Messages go to standard error, so `> story.txt` keeps the text; lines of dashes separate several samples.
"""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from plumbing.chat import ChatML
from plumbing.devices import can_compile, read_in_float32, sampling_dtype, set_up_device
from plumbing.pretrained import find_model, read_tokenizer
from plumbing.settings import Count, Natural, NotNegative, Probability, run

import torch
import torch.nn.functional as F
from tokenizers.decoders import DecodeStream

from model import KVCache, SmolLM2, choose, rotary_table, rotate

CONTINUING = dict(temperature=0.8, top_p=1.0)  # where they are unset
ANSWERING = dict(temperature=0.2, top_p=0.9)  # as the card of SmolLM2's Instruct models says


@dataclass
class Settings:
    """Continue a prompt."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    prompt: str | None = None  # text to continue, or FILE:path of one; unset: Once upon a time; empty: begin a document
    num_samples: Count = 1  # continuations, generated together: the first is printed as it grows, then the others
    max_new_tokens: Count = 256  # longest continuation
    # Below 1 likelier text, above 1 wilder, 0 always the likeliest token. Unset: 0.8, and 0.2 for answers.
    temperature: NotNegative | None = None
    top_k: Natural = 40  # choose among the k likeliest tokens; 0: among all
    # Choose among the likeliest tokens that together have this probability. Unset: 1, and 0.9 for answers.
    top_p: Probability | None = None
    seed: Natural = 0  # the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here
    compile: bool = False  # torch.compile the layers first: takes a while, and pays off for long texts
    stats: bool = False  # print the speed at the end
    chat: bool | None = None  # hold a conversation, which a prompt begins; unset: if the model was trained to answer
    system: str | None = None  # system message of the conversation; unset: the model's own; empty: none


# ---- Generation, fast -----------------------------------------------------------------------------------------------
#
# model.generate shows what generation is. The functions below compute the same, up to rounding, and faster. For each
# new token a device reads every weight once, and uses it in one multiplication per sample. A GPU does that so fast that
# it then waits for Python, which starts hundreds of small operations per token. So:
#
# - Matrices that multiply the same input are joined into one: one large product instead of three, or two.
# - The cache has a slot for every token from the start, instead of growing. Attention reads all slots, and a mask hides
#   the empty ones. The queries that share a key/value head form a small matrix: its product with the keys gives the
#   scores, and their softmax is multiplied by the values.
# - So a step works in place, on tensors whose shapes and addresses never change, and nothing in it waits for the
#   device. A GPU can record it as a CUDA graph and replay it, hundreds of kernels, with a single launch.
# - Several samples share one reading of the prompt, and the turns of a conversation share what they begin with.


@torch.no_grad()
def join(layer):
    """The weights of a layer by name, with the matrices of one input joined. The layer keeps working: its own matrices
    become views of the joined ones, so nothing is stored twice, but it can no longer be trained."""
    attention, mlp = layer.self_attn, layer.mlp
    weights = {
        "input_norm": layer.input_layernorm.weight,
        "o_proj": attention.o_proj.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
        "down_proj": mlp.down_proj.weight,
    }
    for name, *projections in (
        ("qkv_proj", attention.q_proj, attention.k_proj, attention.v_proj),
        ("gate_up_proj", mlp.gate_proj, mlp.up_proj),
    ):
        weights[name] = torch.cat([projection.weight for projection in projections])
        rows = weights[name].split([projection.out_features for projection in projections])
        for projection, its_rows in zip(projections, rows, strict=True):
            projection.weight = torch.nn.Parameter(its_rows, requires_grad=False)
    return weights


def decode_layer(x, rotary, slot, visible, weights, keys, values, eps):
    """model.DecoderLayer for the newest token of each text: x (B, C) -> (B, C).

    Its key and value are written to a slot of keys and values (B, K, S, D); visible (S,) tells which slots to read.
    """
    (B, C), (_, K, _, D) = x.shape, keys.shape
    heads = F.linear(F.rms_norm(x, (C,), weights["input_norm"], eps), weights["qkv_proj"]).view(B, -1, 1, D)
    qk, v = heads[:, :-K], heads[:, -K:]  # (B, H + K, 1, D), (B, K, 1, D)
    qk = rotate(qk, rotary).type_as(keys)  # queries and keys at once; the cache may be float32 where weights are not
    q, k = qk[:, :-K].view(B, K, -1, D), qk[:, -K:]  # (B, K, H / K, D), (B, K, 1, D)
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, v.type_as(values))
    scores = (q / math.sqrt(D)) @ keys.mT  # (B, K, H / K, S)
    y = scores.where(visible, -math.inf).softmax(-1) @ values  # (B, K, H / K, D)
    x = x + F.linear(y.type_as(x).view(B, -1), weights["o_proj"])
    gate, up = F.linear(F.rms_norm(x, (C,), weights["mlp_norm"], eps), weights["gate_up_proj"]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, weights["down_proj"])


class Writer:
    """A SmolLM2 that is ready to generate. Its model can no longer be trained."""

    def __init__(self, model, compile=False):
        self.model, self.config, self.device = model, model.config, model.lm_head.weight.device
        self.weights = [join(layer) for layer in model.model.layers]
        self.decode_layer = torch.compile(decode_layer) if compile else decode_layer
        # Where a CPU is slow in 16 bits, this makes the model read prompts in float32. It returns the dtype of the keys
        # and values that reading gives.
        self.reading_dtype = read_in_float32(model)
        self.last = [], []  # ids and slots of the previous text

    def read(self, prompt):
        """Read a prompt in one pass. Returns the logits for the next token (1, V), and the caches of the layers.
        Keys and values of a beginning that the previous text had as well are taken from there."""
        ids, slots = self.last
        different = (i for i, (old, new) in enumerate(zip(ids, prompt, strict=False)) if old != new)
        known = min(next(different, len(ids)), len(prompt) - 1)  # tokens; the last is read in any case, for the logits
        caches, positions = [KVCache() for _ in self.weights], torch.arange(len(prompt), device=self.device)
        mask = None
        if known:
            mask = positions <= positions[known:, None]  # (T - known, T): each new token reads all up to itself
            for cache, previous in zip(caches, slots, strict=True):  # (2, B, K, S, D)
                keys, values = previous[:, :1, :, :known].to(self.reading_dtype)  # those of the first row
                cache.append(keys, values)
        new = torch.tensor([prompt[known:]], device=self.device)
        hidden = self.model.hidden_states(new, positions[known:], mask, caches)
        return self.model.lm_head(hidden[:, -1]), caches

    @torch.inference_mode()
    def generate(
        self, prompt, count=1, max_new_tokens=128, temperature=0.8, top_k=40, top_p=1, eos_token_id=None, generator=None
    ):
        """Continue a prompt, a list of ids, count times: yields (count,) int64, the next token of each.

        The tokens are those of model.generate for count copies of the prompt. A row that has produced eos_token_id
        (None: the configuration's; -1: no row ends early) goes on yielding it; generation ends at most 7 tokens after
        all have. If the prompt begins like the previous text, as each turn of a conversation does, only what is new is
        read. Raises ValueError for an empty prompt, too many positions, or logits that are NaN, and TypeError for
        anything but a list of ids.
        """
        model, config, device = self.model, self.config, self.device
        end = config.eos_token_id if eos_token_id is None else eos_token_id
        prompt = list(prompt)  # a copy, to be remembered
        if not all(isinstance(id, int) for id in prompt):
            raise TypeError("the prompt must be a list of ids: tokenizer.encode(text).ids")
        T, S = len(prompt), len(prompt) + max_new_tokens
        if T == 0:
            raise ValueError("the prompt is empty: begin with bos_token_id")
        if (room := config.max_position_embeddings) < S:
            raise ValueError(f"{T} tokens of prompt and {max_new_tokens} new ones are more than the model's {room}")

        logits, caches = self.read(prompt)
        if logits.isnan().any():
            raise ValueError("the model's logits are NaN: its weights are damaged, or too large for this dtype")
        # Copy the keys and values of the prompt into the slots of every row. On a CPU slots are float32 whatever the
        # dtype of the weights, as each step would otherwise convert all of them to float32. They begin as zeros, not as
        # torch.empty: masked slots are multiplied by 0, and 0 x NaN would be NaN.
        dtype = torch.float32 if device.type == "cpu" else logits.dtype
        shape = 2, count, config.num_key_value_heads, S, config.head_dim
        slots = [torch.zeros(shape, dtype=dtype, device=device) for _ in caches]
        for (keys, values), cache in zip(slots, caches, strict=True):
            keys[:, :, :T], values[:, :, :T] = cache.keys, cache.values
        del caches

        slot, all_slots = torch.tensor([T - 1], device=device), torch.arange(S, device=device)
        tokens = torch.zeros(count, dtype=torch.long, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)

        def draw(logits):
            new = choose(logits, temperature, top_k, top_p, generator).masked_fill(finished, end)
            finished.logical_or_(new == end)
            tokens.copy_(new)

        def step():
            slot.add_(1)
            x, rotary, visible = model.model.embed_tokens(tokens), rotary_table(slot, config), all_slots <= slot
            for weights, (keys, values) in zip(self.weights, slots, strict=True):
                x = self.decode_layer(x, rotary, slot, visible, weights, keys, values, config.rms_norm_eps)
            draw(model.lm_head(model.model.norm(x)))

        draw(logits.expand(count, -1))
        step, written = recorded(step, device, generator), []
        try:
            for i in range(max_new_tokens):
                written.append(tokens.clone())
                yield written[-1]
                # Whether all have finished is checked every 8 tokens only, because Python then waits for the device.
                if i + 1 == max_new_tokens or (i % 8 == 7 and finished.all()):
                    return
                step()
        finally:  # also if the rest is not wanted; the newest token has no slot yet
            self.last = (prompt + [new[0].item() for new in written[:-1]], slots)


def recorded(step, device, generator):
    """A function that does what step does: on a GPU, from the second call on, by replaying a CUDA graph. Step must take
    and return nothing, work in place, and draw from generator (None: the device's own)."""
    if device.type != "cuda":
        return step
    graph, calls = torch.cuda.CUDAGraph(), 0

    def run():
        nonlocal calls
        calls += 1
        if calls == 1:  # run normally: what is set up and compiled in a first call must not be recorded
            return step()
        with torch.cuda.device(device):  # the caller may be a thread of tools.demo, and a thread begins with device 0
            if calls == 2:
                if generator is not None:
                    graph.register_generator_state(generator)
                stream = torch.cuda.Stream()  # PyTorch's own for this is of the device that recorded first
                # thread_local: other threads may use the device.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    step()  # recorded, not run
            graph.replay()

    return run


# ---- Text -----------------------------------------------------------------------------------------------------------


def load(settings):
    """The model, its tokenizer, and the folder they are from; exits with one sentence if they cannot be loaded."""
    device = set_up_device(settings.device)
    try:
        folder = find_model(settings.model)
        model = SmolLM2.from_pretrained(folder, sampling_dtype(settings.dtype, device), device)
        tokenizer = read_tokenizer(folder, model.config)
        tokenizer.encode_special_tokens = True  # despite its name: what people type is text, also if it spells a marker
        if (end_of_text := tokenizer.token_to_id("<|endoftext|>")) is not None:
            model.config.bos_token_id = end_of_text  # begins a document; an Instruct model's config has <|im_start|>
    except ValueError as error:
        sys.exit(str(error))
    compile = can_compile(settings.compile, device, say=partial(print, file=sys.stderr))
    if compile:
        print("compiling: the second token waits for it", file=sys.stderr)
    return Writer(model, compile), tokenizer, folder


def stream(writer, tokenizer, ids, settings, generator, trace=None):
    """Yield the continuations of a prompt, given as ids: for each token, a list of the next piece of every sample.

    A sample ends with the token that ends an answer, or a text (the configuration's eos_token_id and bos_token_id). A
    character may be split over several tokens: the decoder holds its first bytes back until the last has come, and
    the piece is empty. Special tokens are not shown. Raises ValueError if prompt and continuation exceed the model's
    positions.
    """
    ids = ids or [writer.config.bos_token_id]  # an empty prompt begins a document
    count, trace = settings.num_samples, trace or Trace()
    ends = writer.config.eos_token_id, writer.config.bos_token_id
    settings = filled(settings, **CONTINUING)
    how = settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p
    decoders = [DecodeStream(ids, skip_special_tokens=True) for _ in range(count)]
    for new in writer.generate(ids, count, *how, generator=generator):
        tokens = new.tolist()
        pairs = zip(decoders, tokens, strict=True)
        decoders = [None if token in ends else decoder for decoder, token in pairs]  # None: that sample has ended
        trace.add(tokens[0], sum(decoder is not None for decoder in decoders))
        pairs = zip(decoders, tokens, strict=True)
        yield [(decoder.step(tokenizer, token) or "") if decoder else "" for decoder, token in pairs]
        if not any(decoders):
            trace.ended = True
            return


def filled(settings, **defaults):
    """The settings, with defaults for those that are unset."""
    unset = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, **unset)


class Trace:
    """The tokens of the first sample, and how fast all were generated."""

    def __init__(self):
        self.ids, self.counted, self.start, self.first = [], 0, time.perf_counter(), None
        self.ended = False  # by tokens that end a text, not by a limit

    def add(self, token, count):
        self.last = time.perf_counter()
        self.ids.append(token)
        self.counted += count if self.first else 0  # without the first, which waits for the prompt
        self.first = self.first or self.last

    def __str__(self):
        if not self.counted:
            return ""
        rate = self.counted / (self.last - self.first)
        return f"{rate:,.1f} tokens per second, the first after {self.first - self.start:.2f} s"


# ---- Conversations --------------------------------------------------------------------------------------------------
#
# A model that chats continues a text, like any other. The text is the conversation so far, in the format that the model
# was trained on, up to where its answer begins; the token with which it ends the answer is its eos_token_id.


def chat_format_of(writer, tokenizer, folder, settings):
    """The chat format for a conversation with a model; None where it is to continue a text.

    Raises ValueError if a conversation is asked for, also by a system message, and the model has none.
    """
    if settings.chat is False and settings.system is not None:
        raise ValueError(f"--system={settings.system} is for a conversation, and --chat=False for a text")
    if settings.chat is False:
        return None
    asked_for = settings.chat or settings.system is not None
    try:
        chat_format = ChatML.of(folder, tokenizer)
    except ValueError:
        if asked_for:
            raise
        return None
    if settings.system is not None:
        chat_format.system = [{"role": "system", "content": settings.system}] if settings.system else []
    return chat_format if asked_for or writer.config.eos_token_id == chat_format.end else None


def answer(writer, tokenizer, chat_format, messages, settings, generator, trace=None):
    """Yield the answer to the last of the messages in pieces. A conversation too long for the model's positions loses
    its beginning, a question and its answer at a time, until max_new_tokens, or half of the positions, are free."""
    positions = writer.config.max_position_embeddings
    room = positions - min(settings.max_new_tokens, positions // 2)
    while len(ids := chat_format.ids(messages)) > room and len(messages) > 2:
        messages = messages[2:]
    length = max(1, min(settings.max_new_tokens, positions - len(ids)))
    one = filled(dataclasses.replace(settings, num_samples=1, max_new_tokens=length), **ANSWERING)
    yield from (piece for (piece,) in stream(writer, tokenizer, ids, one, generator, trace))


def chat(writer, tokenizer, chat_format, first, settings, generator):
    """A conversation in the terminal, with a first question or "". Ctrl-C ends an answer; at the prompt it ends the
    conversation, as Ctrl-D does."""
    with contextlib.suppress(ImportError):  # where there is readline, the arrow keys work in input()
        import readline  # noqa: F401
    messages = []
    while True:
        try:
            typed = first or input("> " if sys.stdin.isatty() else "")
            first = ""
        except (EOFError, KeyboardInterrupt):
            return
        if not typed.strip():
            continue
        question, text, cut, trace = {"role": "user", "content": typed}, "", False, Trace()
        try:
            for piece in answer(writer, tokenizer, chat_format, [*messages, question], settings, generator, trace):
                print(piece, end="", flush=True)
                text += piece
            cut = not trace.ended
        except KeyboardInterrupt:
            pass
        except ValueError as error:  # the question alone is too long, or logits are NaN
            print(error, file=sys.stderr)
            continue
        print()
        if cut:
            print(f"(cut after {len(trace.ids)} tokens, by --max_new_tokens or the model's positions)", file=sys.stderr)
        if settings.stats:
            print(trace, file=sys.stderr)
        print()
        messages += [question, {"role": "assistant", "content": text}]


# ---- The command ----------------------------------------------------------------------------------------------------


def main(settings):
    prompt = settings.prompt or ""
    if prompt.startswith("FILE:"):
        try:
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"--prompt={prompt} cannot be read: {error}")
    writer, tokenizer, folder = load(settings)
    generator, trace = torch.Generator(writer.device).manual_seed(settings.seed), Trace()
    try:
        if chat_format := chat_format_of(writer, tokenizer, folder, settings):
            if settings.num_samples > 1:
                sys.exit(f"--num_samples={settings.num_samples} is for a text; in a conversation there is one answer.")
            return chat(writer, tokenizer, chat_format, prompt, settings, generator)
        prompt = "Once upon a time" if settings.prompt is None else prompt
        opening, others = prompt, [""] * (settings.num_samples - 1)
        for first, *rest in stream(writer, tokenizer, tokenizer.encode(prompt).ids, settings, generator, trace):
            print(opening + first, end="", flush=True)
            opening = ""
            others = [text + piece for text, piece in zip(others, rest, strict=True)]
        for text in others:
            print(f"\n\n{'-' * 80}\n{prompt}{text}", end="")
        print()
    except ValueError as error:  # too many positions; logits that are NaN; no chat format
        sys.exit(str(error))
    if settings.stats:
        print(trace, file=sys.stderr)


if __name__ == "__main__":
    run(main, "sample", Settings)
