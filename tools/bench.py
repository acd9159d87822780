"""Speed, measured side by side with what people use instead.

    python -m tools.bench all                     all of the below, hours on a CPU; on a GPU, what runs there
    python -m tools.bench train --size=135m       a training step, against transformers with and without torch.compile
    python -m tools.bench sample                  generation, against transformers and, with --gguf=FILE, llama.cpp
    python -m tools.bench evaluate                questions like HellaSwag's, against lm-eval
    python -m tools.bench prepare                 tokenizing, against the tokenizer alone and datasets.map
    python -m tools.bench load                    reading batches from bins
    python -m tools.bench learn                   time to a loss: the settings of config/tiny.py, against plain AdamW
    python -m tools.bench start                   seconds from the command to the first step, with an empty cache
    python -m tools.bench ranks                   two processes, against one

A machine's speed drifts, so ratios say more than seconds. The contestants take turns for some rounds, one at a time,
and each round gives a ratio. The table shows the median of the rounds and their range. A contestant that fails, for
lack of memory or of its package, is left out, and the screen says why. Results are kept in tools/results/DEVICE.json.

This needs requirements-dev.txt. For llama.cpp, `pip install llama-cpp-python`, and make a file of the model with its
convert_hf_to_gguf.py.
"""

import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from plumbing.corpus import open_corpus
from plumbing.devices import device_name, peak_flops, sampling_dtype, set_up_device, training_dtype, training_memory
from plumbing.sources import python_docs
from plumbing.tokens import get_tokenizer

import torch
import tyro

import model
import prepare
import train
from model import SmolLM2, SmolLM2Config, count_parameters, training_flops
from sample import Writer
from tools.evaluate import evaluate

ROOT = Path(__file__).parent.parent
SIZES = model.SIZES | {"toy": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)}
COMMANDS = "train", "sample", "evaluate", "prepare", "load", "learn", "start", "ranks"
NEW = 128  # tokens to generate
CUDA = torch.cuda.is_available()


@dataclass
class Settings:
    """Measure speed, side by side with what people use instead."""

    what: tyro.conf.Positional[Literal["all", *COMMANDS]]
    size: Literal["135m", "360m", "1.7b", "toy"] = "135m"  # of the model
    rounds: int = 3 if CUDA else 5  # turns of each contestant
    ours_only: bool = False  # leave the others out
    seq_len: int = 2048 if CUDA else 512  # tokens of a training sequence
    micro_batches: tuple[int, ...] = (16, 32) if CUDA else (2,)  # training sequences at once
    batch_sizes: tuple[int, ...] = (1, 64) if CUDA else (1,)  # texts to generate at once
    gguf: str | None = None  # the model of that size, made by llama.cpp's convert_hf_to_gguf.py with --outtype=bf16
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"  # hub id or path
    steps: int = 500  # of AdamW, to whose loss `learn` measures the time
    out: str = str(ROOT / "tools" / "results")  # folder for the results
    device: str = "auto"  # cuda, mps or cpu


# ---- A race ---------------------------------------------------------------------------------------------------------


def races(what, settings):
    """The races of a command: each a label, a unit, the contestants, the function that makes one, and its arguments."""
    size, T = settings.size, settings.seq_len
    if what == "train":
        names = ["ours", "transformers", "transformers, compiled"]
        for count in settings.micro_batches:
            yield f"training, {size}, {count} x {T}", "tokens/s", names, trainer, count
    elif what == "sample":
        names = ["ours", "ours, not compiled", "ours, model.generate"]
        names += ["transformers, dynamic cache", "transformers, static cache"]
        alone = ["reading the weights alone"] + (["llama.cpp"] if settings.gguf else [])  # the first ratio is MBU
        for count in settings.batch_sizes:
            texts = names + alone if count == 1 else names
            yield f"generation, {size}, batch {count}", "tokens/s", texts, generator, count
    elif what == "evaluate":
        names = ["ours", "lm-eval, batch 1", "lm-eval, batch 8", "lm-eval, batch 32"]
        for like, words in (("HellaSwag", 16), ("ARC", 3)):
            yield f"questions like {like}'s, {size}", "questions/s", names, evaluator, words
    elif what == "prepare":
        names = ["ours", "encode_batch_fast on texts in memory", "datasets.map"]
        yield "preparing 50 MB", "MB/s", names, preparer
    elif what == "load":
        yield "loading batches of 32 x 512", "tokens/s", ["ours"], loader
    elif what == "start":
        data = "--data_dir=data/python-docs", "--model.vocab_size=49152", "--eval_tokens=1024"
        large = [*data, "--seq_len=512", "--micro_batch=2", "--batch_tokens=1024"]
        for name, args in (("config/tiny.py", ["config/tiny.py"]), ("135m, 2 x 512", large)):
            yield f"command to first step, {name}", "s", ["ours"], starter, args
    elif what == "ranks":
        yield "training in two processes", "tokens/s", ["ours", "in one"], ranked


def race(settings, what, unit, names, make, *args):
    """Rows of the table: the first contestant, which is ours, against each of the others."""
    names = [name for name in names if name.startswith("ours") or not settings.ours_only]
    found, memory = {name: [] for name in names}, {}
    for name in names * settings.rounds:
        if name not in found or names[0] not in found:
            continue
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # it ends, and leaves its memory to the next
                value, memory[name] = process.submit(turn, make, name, settings, args).result()
            found[name].append(value)
            said = f"{figure(value)} {unit}"
        except (Exception, SystemExit) as error:  # each library has words of its own for "out of memory"
            del found[name]
            said = f"left out: {type(error).__name__}: {error}".splitlines()[0]
        print(f"{what}, {name}: {said}", flush=True)
    if not (ours := found.pop(names[0], None)):
        return []
    rows = [row(what, name, ours, theirs, unit) for name, theirs in found.items()] or [row(what, "", ours, [], unit)]
    return rows + (limits(settings, what, *args, ours, memory) if make is trainer else [])


def limits(settings, what, micro_batch, ours, memory):
    """Rows of training against the device's peak, and of its memory against the others' and the formula's."""
    config, device, rows = SmolLM2Config(**SIZES[settings.size]), settings.device, []
    if peak := peak_flops(device_name(device)):
        possible = peak / training_flops(config, settings.seq_len)
        rows.append(row(what, "the device's peak (MFU)", ours, [possible] * len(ours), "tokens/s"))
    how = count_parameters(config), micro_batch * settings.seq_len, training_dtype("auto", device)
    here, label = memory.pop("ours"), what.replace("training", "peak memory")
    for name, there in [*memory.items(), ("the formula", training_memory(config, *how))]:
        rows.append(row(label, name, [here / 1e9], [there / 1e9], "GB"))
    return rows


def turn(make, name, settings, args):
    """In a contestant's process: the speed of the fastest of three calls (their seconds, if there is no amount), and
    the peak of the GPU's or the process's memory.

    make(name, settings, folder, *args) returns an amount of work and a function that does it. If that returns a float,
    it has measured its seconds itself, once.
    """
    with tempfile.TemporaryDirectory() as folder:
        (amount, work), seconds = make(name, settings, folder, *args), []
        while len(seconds) < 3:
            start = time.perf_counter()
            result = work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds += [result] * 3 if isinstance(result, float) else [time.perf_counter() - start]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else memory
    return amount / min(seconds) if amount else min(seconds), memory


def row(what, against, ours, theirs, unit):
    """A row of the table: the medians of the rounds, and of their ratios, which have a range too."""
    ratios = [here / there for here, there in zip(ours, theirs, strict=True)] if theirs else []
    if unit == "s":
        ratios = [1 / ratio for ratio in ratios]  # how many times as fast
    spread = dict(least=min(ratios), most=max(ratios)) if len(ratios) > 1 else {}
    ratio, here, there = (statistics.median(values) if values else None for values in (ratios, ours, theirs))
    return dict(what=what, against=against, ratio=ratio, ours=here, theirs=there, unit=unit) | spread


# ---- The contestants ------------------------------------------------------------------------------------------------


def new_model(name, settings, dtype):
    """A model with random weights: ours, or transformers' of the same architecture."""
    config, device = SmolLM2Config(**SIZES[settings.size]), settings.device
    if name.startswith("ours"):
        set_up_device(device.type)
        with device:
            return SmolLM2(config).to(dtype)
    from transformers import LlamaConfig, LlamaForCausalLM

    with device:
        return LlamaForCausalLM(LlamaConfig(**asdict(config) | {"initializer_range": 0.02})).to(dtype)


def trainer(name, settings, folder, micro_batch):
    """A training step on random tokens."""
    device, dtype = settings.device, training_dtype("auto", settings.device)
    model = new_model(name, settings, torch.float32)
    tokens = torch.randint(0, model.config.vocab_size, (micro_batch, settings.seq_len), device=device)
    (optimizer,) = train.make_optimizers(model, train.Settings(), dtype)
    if name == "ours":
        train.compile_parts(model)
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        loss_of = lambda: model(tokens, targets)  # noqa: E731
    else:
        run = torch.compile(model.train(), dynamic=False) if "compiled" in name else model.train()
        loss_of = lambda: run(tokens, labels=tokens, use_cache=False).loss  # noqa: E731  it shifts the labels itself

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return tokens.numel(), step


def generator(name, settings, folder, count):
    """Continues a prompt of 16 tokens, always with the likeliest, in the 16-bit type that suits it."""
    prompt, device, amount = list(range(1, 17)), settings.device, NEW * count
    if name == "reading the weights alone":
        parameters = count_parameters(SmolLM2Config(**SIZES[settings.size]))
        weights = torch.ones(parameters, dtype=torch.uint8, device=device)
        copy = torch.empty_like(weights)  # each byte is read and written: as many as 16-bit weights have
        return amount, lambda: [copy.copy_(weights) for _ in range(NEW)]
    if name == "llama.cpp":
        from llama_cpp import Llama

        llama = Llama(settings.gguf, n_ctx=len(prompt) + NEW, n_threads=torch.get_num_threads(), verbose=False)
        return amount, lambda: llama.reset() or list(itertools.islice(llama.generate(prompt, temp=0.0), NEW))
    model = new_model(name, settings, sampling_dtype("auto", device) if name.startswith("ours") else torch.bfloat16)
    prompts = torch.tensor([prompt] * count, device=device)
    if name == "ours, model.generate":
        return amount, lambda: list(model.generate(prompts, NEW, temperature=0, eos_token_id=-1))
    if name.startswith("ours"):
        writer = Writer(model, compile=name == "ours")
        return amount, lambda: list(writer.generate(prompt, count, NEW, temperature=0, eos_token_id=-1))
    how = dict(attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0)
    how |= dict(max_new_tokens=NEW, min_new_tokens=NEW, cache_implementation=name.split()[1])  # dynamic, or static
    return amount, lambda: list(model.eval().generate(prompts, **how))


def evaluator(name, settings, folder, length):
    """The log-probabilities of the four choices of each of many questions, a choice of some words."""
    words, count = iter(" ".join(python_docs()).split()), 1000 if settings.device.type == "cuda" else 50
    some = lambda number: " ".join(itertools.islice(words, number))  # noqa: E731
    asked = [(f"{some(30)} ", [f" {some(length)}" for _ in range(4)], 0) for _ in range(count)]
    tokenizer, _ = get_tokenizer(folder, settings.tokenizer, None)
    model = new_model(name, settings, training_dtype("auto", settings.device))
    if name == "ours":
        budget = 256 if settings.device.type == "cpu" else 4096
        return count, lambda: list(evaluate(model, tokenizer, asked, budget, "questions"))
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    ends = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    harness = HFLM(model.eval(), tokenizer=theirs, batch_size=int(name.split()[-1]))
    requests = [SimpleNamespace(args=(context, choice)) for context, choices, _ in asked for choice in choices]
    return count, lambda: harness.loglikelihood(requests, disable_tqdm=True)


def preparer(name, settings, folder):
    """Tokenizes Python's documentation, 6 times, from and to files; encode_batch_fast in memory."""
    from datasets import Dataset, load_dataset

    corpus, texts = f"{folder}/corpus.parquet", python_docs() * 6
    amount = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer, _ = get_tokenizer(folder, settings.tokenizer, None)
    Dataset.from_dict({"text": texts}).to_parquet(corpus)
    if name == "ours":
        how = dict(source=corpus, tokenizer=settings.tokenizer)
        return amount, lambda: prepare.main(prepare.Settings(tempfile.mkdtemp(dir=folder), **how))
    if name == "datasets.map":
        data = load_dataset("parquet", data_files=corpus, split="train", cache_dir=folder)
        ids = lambda document: {"ids": tokenizer.encode(document["text"]).ids}  # noqa: E731
        how = dict(remove_columns="text", num_proc=os.cpu_count(), load_from_cache_file=False)
        return amount, lambda: data.map(ids, **how)
    return amount, lambda: tokenizer.encode_batch_fast(texts)


def loader(name, settings, folder):
    """Makes 100 batches of 32 x 512 tokens."""
    prepare.main(prepare.Settings(folder, "python-docs", tokenizer=settings.tokenizer))
    sequences = open_corpus(folder, 512, seed=0, eval_tokens=512).train
    return 100 * 32 * 512, lambda: [sequences.batch(batch * 32, 32) for batch in range(100)]


def starter(name, settings, folder, args):
    """The seconds from the command to the first step, where nothing is compiled yet."""
    return None, lambda: run_training(*args, "--max_steps=2").first


def ranked(name, settings, folder):
    """A step of config/tiny.py in a process for each half of the cores, or in one for all."""
    count = 2 if name == "ours" else 1
    args = "config/tiny.py", "--device=cpu", "--micro_batch=4", "--max_steps=61"
    return 2048, lambda: run_training(*args, processes=count, OMP_NUM_THREADS=str(os.cpu_count() // count)).step


def learn(settings):
    """The time of config/tiny.py to the validation loss that AdamW, at its best rate, has after settings.steps."""

    def time_of(steps, *args):
        length = f"--max_steps={steps}", f"--decay_steps={steps // 2}", f"--eval_interval={steps}"
        run = run_training("config/tiny.py", *length, *args)
        print(f"{run.val_bpb:.4f} bits per byte after {steps} steps, {run.seconds:.0f} s", *args, flush=True)
        return run.val_bpb, run.seconds

    rates = "1e-3", "2e-3", "3e-3"
    goal, theirs = min(time_of(settings.steps, "--optimizer=adamw", f"--learning_rate={rate}") for rate in rates)
    runs = (time_of(round(settings.steps * share)) for share in (0.4, 0.45, 0.5, 0.6, 0.8, 1.0))
    ours = next((seconds for bpb, seconds in runs if bpb <= goal), None)
    label = f"time to {goal:.3f} bits per byte, config/tiny.py"
    return [row(label, "AdamW, its best rate", [ours], [theirs], "s")] if ours else []


def run_training(*args, processes=1, **variables):
    """A run of train.py that finds nothing compiled: its val_bpb, and the seconds to the first step, of a step, and of
    all steps after the first."""
    subprocess.run([sys.executable, "prepare.py", "config/tiny.py"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as out:
        env = os.environ | dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), f"{out}/cache")
        command = [sys.executable, *launcher, "train.py", *args, f"--out_dir={out}", "--sample_interval=0"]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=env | variables, stdout=subprocess.PIPE, text=True)
        first = [time.perf_counter() - start for line in process.stdout if line.startswith("step 1/")]
        if process.wait():
            sys.exit(f"{' '.join(command)} failed")
        metrics = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    seconds = [2048 / line["tokens_per_second"] for line in metrics if line["tokens_per_second"]]
    times = dict(first=first[0], step=statistics.median(seconds or [0]), seconds=sum(seconds))
    return SimpleNamespace(val_bpb=metrics[-1]["val_bpb"], **times)


# ---- The command ----------------------------------------------------------------------------------------------------


def figure(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows):
    lines = ["| what | against | ratio | range | here | there | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        spread = f"{row['least']:.2f} to {row['most']:.2f}" if ratio and "least" in row else ""
        sides = ["" if value is None else figure(value) for value in (row["ours"], row["theirs"])]
        lines.append(f"| {' | '.join([row['what'], row['against'], ratio, spread, *sides, row['unit']])} |")
    return "\n".join(lines)


def main(settings):
    settings = replace(settings, device=set_up_device(settings.device))
    cuda = settings.device.type == "cuda"
    name = device_name(settings.device) + ("" if cuda else f"-{os.cpu_count()}-cores")
    path = Path(settings.out, f"{re.sub('[^A-Za-z0-9]+', '-', name).lower()}.json")
    rows, nothing = json.loads(path.read_text()) if path.exists() else [], []
    everything = ["train", "sample", "evaluate", "start"] if cuda else COMMANDS
    for what in everything if settings.what == "all" else [settings.what]:
        new = (
            learn(settings)
            if what == "learn"
            else [row for one in races(what, settings) for row in race(settings, *one)]
        )
        nothing += [] if new else [what]
        found = {(row["what"], row["against"]) for row in new}
        rows = [row for row in rows if (row["what"], row["against"]) not in found] + new
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{table(rows)}")
    if nothing:
        sys.exit(f"nothing was measured: {', '.join(nothing)}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
