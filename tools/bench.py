"""Speed, side by side with what people use instead, on the machine it runs on.

    python -m tools.bench all                     all of the below, hours; on a GPU what runs there, under ten minutes
    python -m tools.bench train --size=135m       a training step against transformers, as it comes and compiled
    python -m tools.bench sample                  generation against transformers and, with --gguf=FILE, llama.cpp
    python -m tools.bench evaluate                questions like HellaSwag's, against lm-eval
    python -m tools.bench prepare                 tokenizing against the tokenizer alone, and against datasets.map
    python -m tools.bench load                    reading batches against streaming and tokenizing them
    python -m tools.bench learn                   time to a loss: the settings of config/tiny.py against plain AdamW
    python -m tools.bench start                   seconds from the command to the first step, nothing compiled before
    python -m tools.bench ranks                   two processes against one

A machine's speed drifts, so seconds say little and ratios more: the contestants, each in a process of its own, take
turns, and each round gives a ratio. The table shows the median of the rounds and their range. Results are kept in
tools/results/DEVICE.json.

It needs requirements-dev.txt. To compare with llama.cpp, `pip install llama-cpp-python` and a file that its
convert_hf_to_gguf.py made of the model.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from plumbing.bins import open_corpus
from plumbing.devices import peak_flops, sampling_dtype, set_up_device, to_device, training_dtype
from plumbing.generation import join
from plumbing.pretrained import write_json
from plumbing.python_docs import texts

import torch
import tyro
from tokenizers import Tokenizer

from model import SmolLM2, SmolLM2Config, count_parameters, training_flops
from tools.evaluate import evaluate
from train import Settings as TrainSettings
from train import compile_parts, make_optimizers

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    """Measure speed, side by side with what people use instead."""

    what: tyro.conf.Positional[
        Literal["all", "train", "sample", "evaluate", "prepare", "load", "learn", "start", "ranks"]
    ]
    size: Literal["135m", "360m", "1.7b"] = "135m"  # of the model to train and to sample from
    rounds: int | None = None  # turns that each contestant takes; unset: 5 on a CPU, 3 on a GPU
    seq_len: int | None = None  # tokens of a training window; unset: 512 on a CPU, 2048 on a GPU
    micro_batches: tuple[int, ...] | None = None  # windows at once, of which the best counts; unset: 2, or 16 and 32
    batch_sizes: tuple[int, ...] | None = None  # texts to generate at once; unset: 1, and on a GPU 64
    gguf: str | None = None  # the model of that size, as llama.cpp's convert_hf_to_gguf.py made it with --outtype=bf16
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"  # to prepare with: hub id or path
    megabytes: int = 100  # of text to prepare
    device: str = "auto"  # cuda, mps or cpu


# ---- Measuring ------------------------------------------------------------------------------------------------------


class Contestant:
    """A function in a process of its own: make(*args) makes it there, and what it allocates is nobody else's."""

    def __init__(self, make, *args):
        self.process = ProcessPoolExecutor(1, get_context("spawn"), initializer=enter, initargs=(make, args))

    def __call__(self, function):
        """What function(the contestant) returns in its process."""
        return self.process.submit(ask, function).result()

    def leave(self):
        self.process.shutdown()


def enter(make, args):
    global contestant
    contestant = make(*args)


def ask(function):
    return function(contestant)


def seconds(function):
    """How long a call takes, with all that it has a GPU do."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def warm_seconds(function, calls=3):
    """The median of some calls after one that does not count; then a GPU's memory is left to the next contestant."""
    function()
    median = statistics.median(seconds(function) for _ in range(calls))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return median


def run(function):
    return function()


def first_loss(step):
    return step().item()


def take_turns(contestants, rounds, clock=seconds):
    """{name: Contestant} -> {name: [seconds of each round]}; then they leave."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant(clock))
    for contestant in contestants.values():
        contestant.leave()
    return times


def row(what, against, ratio, ours, theirs, unit, **spread):
    """A row of the table; None where there is nothing to say."""
    return dict(what=what, against=against, ratio=ratio, ours=ours, theirs=theirs, unit=unit) | spread


def compare(ours, theirs, what, against, amount, unit):
    """A row of the table: rounds of seconds on both sides, and the amount of work that was done in each."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio, here, there = statistics.median(ratios), amount / statistics.median(ours), amount / statistics.median(theirs)
    spread = f"{ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"{what} / {against}: {spread}; {here:,.1f} and {there:,.1f} {unit}", flush=True)
    return row(what, against, ratio, here, there, unit, least=ratios[0], most=ratios[-1])


def script(*args, **environment):
    """Run one of the project's scripts, or another command; returns its output, [(seconds since the start, line)]."""
    command = [sys.executable, *args] if str(args[0]).endswith(".py") else list(args)
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        lines.append((time.perf_counter() - start, line.rstrip()))
    if process.wait():
        sys.exit("\n".join([" ".join(map(str, command)), *(line for _, line in lines[-20:])]))
    return lines


# ---- Training -------------------------------------------------------------------------------------------------------


def trainer(name, size, seq_len, micro_batch, device_name):
    """A contestant: a function that takes one step of training, on random tokens, and returns the loss."""
    device = contestants_device(name, device_name)
    dtype = training_dtype("auto", device)
    torch.manual_seed(0)
    config = model_config(size)
    with torch.device(device):
        model = SmolLM2(config)
        tokens = torch.randint(0, config.vocab_size, (micro_batch, seq_len))
    optimizer = make_optimizers(model, TrainSettings(), dtype)[0]
    if name.startswith("transformers"):
        model = in_transformers(model, torch.float32)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        run = torch.compile(model, dynamic=False) if "compile" in name else model
        loss_of = lambda: run(tokens, labels=tokens, use_cache=False).loss  # noqa: E731  it shifts the labels itself
    else:
        compile_parts(model)
        targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), 1)
        loss_of = lambda: model(tokens, targets)  # noqa: E731

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def contestants_device(name, device_name):
    """Each as its users have it: set_up_device is ours."""
    if name.startswith("ours"):
        return set_up_device(device_name)
    torch.set_float32_matmul_precision("high")
    return torch.device(device_name)


def model_config(size):
    return getattr(SmolLM2Config, f"smollm2_{size.replace('.', '_')}")()


def in_transformers(model, dtype):
    """The same weights in transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**asdict(model.config) | {"initializer_range": 0.02}))
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.lm_head.weight.device, dtype)


def peak_memory(step):
    """Bytes of memory at the peak of a step, when all is there that will be."""
    step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    step()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def bench_train(settings, device):
    cuda = device.type == "cuda"
    seq_len = settings.seq_len or (2048 if cuda else 512)
    micro_batches = settings.micro_batches or ((16, 32) if cuda else (2,))
    contestants, sizes, memory, losses = {}, {}, {}, {}
    for name in ("ours", "transformers", "transformers, compiled"):
        speeds = {}
        for micro_batch in micro_batches:  # which suits it best; what does not fit into memory is out
            contestant = Contestant(trainer, name, settings.size, seq_len, micro_batch, settings.device)
            try:
                if micro_batch == micro_batches[0]:
                    losses[name], memory[name] = contestant(first_loss), contestant(peak_memory)
                speeds[micro_batch] = micro_batch * seq_len / contestant(warm_seconds)
            except torch.OutOfMemoryError:
                contestant.leave()
                break
            print(f"{name}, micro-batch {micro_batch}: {speeds[micro_batch]:,.0f} tokens/s", flush=True)
            if speeds[micro_batch] < max(speeds.values()):
                contestant.leave()
                continue
            if name in contestants:
                contestants[name].leave()
            contestants[name], sizes[name] = contestant, micro_batch
    if "ours" not in contestants:
        sys.exit(f"--micro_batches={micro_batches[0]} is too much for the memory of this device")
    if max(losses.values()) - min(losses.values()) > 0.02:
        sys.exit(f"the contestants do not compute the same loss: {losses}")
    names = [name for name in contestants if name != "ours"]
    times = take_turns(contestants, settings.rounds, warm_seconds)
    per_token = {name: [t / (sizes[name] * seq_len) for t in times[name]] for name in times}
    label = f"training, {settings.size}, length {seq_len}"
    rows = [compare(per_token["ours"], per_token[name], label, name, 1, "tokens/s") for name in names]
    if peak := peak_flops(device):
        mfu = training_flops(model_config(settings.size), seq_len) / statistics.median(per_token["ours"]) / peak
        rows.append(row(label, "peak of the device", mfu, None, None, "MFU"))
    for name in names:
        what, ratio = f"peak memory, {settings.size}, {micro_batches[0]} x {seq_len}", memory["ours"] / memory[name]
        rows.append(row(what, name, ratio, memory["ours"] / 1e9, memory[name] / 1e9, "GB"))
    return rows


# ---- Generation -----------------------------------------------------------------------------------------------------


COPY = "reading the weights alone"  # the ratio is MBU, the share of the memory's speed that generation uses


def generator(name, size, batch_size, device_name, gguf=None):
    """A contestant: writes 128 tokens after a prompt of 16, always the likeliest, in the 16-bit type that suits it."""
    device, new = contestants_device(name, device_name), 128
    torch.manual_seed(0)
    if name == COPY:
        here = torch.ones(count_parameters(model_config(size)), dtype=torch.uint8, device=device)
        there = torch.empty_like(here)  # each byte is read and written: as many as 16-bit weights have

        def copy():
            for _ in range(new):
                there.copy_(here)

        return copy
    model = SmolLM2(model_config(size)).to(device)
    prompt = torch.randint(1, model.config.vocab_size, (batch_size, 16), device=device)
    if name == "llama.cpp":
        from llama_cpp import Llama

        llama = Llama(gguf, n_ctx=prompt.size(1) + new, n_threads=torch.get_num_threads(), verbose=False)

        def generate():
            llama.reset()
            tokens = llama.generate(prompt[0].tolist(), temp=0.0)
            for _ in range(new):
                next(tokens)
            tokens.close()
    elif name.startswith("ours"):
        model.to(sampling_dtype("auto", device))
        join(model)
        if name == "ours":
            for layer in model.model.layers:
                layer.compile()

        def generate():
            return len(list(model.generate(prompt, new, temperature=0, eos_token_id=None)))
    else:
        theirs, cache = in_transformers(model, torch.bfloat16).eval(), name.split(", ")[1].split()[0]
        length, cache = dict(max_new_tokens=new, min_new_tokens=new), dict(cache_implementation=cache)

        def generate():
            mask = torch.ones_like(prompt)
            theirs.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length, **cache)

    return generate


def bench_sample(settings, device):
    rows = []
    for batch_size in settings.batch_sizes or ((1, 64) if device.type == "cuda" else (1,)):
        names = ["ours", "ours, not compiled", "transformers, dynamic cache", "transformers, static cache"]
        if batch_size == 1:
            names += [COPY] + (["llama.cpp"] if settings.gguf else [])
        args = settings.size, batch_size, settings.device, settings.gguf
        contestants = {name: Contestant(generator, name, *args) for name in names}
        for contestant in contestants.values():  # what is compiled is compiled
            contestant(run)
        times = take_turns(contestants, settings.rounds)
        label = f"generation, {settings.size}, batch {batch_size}"
        rows += [compare(times["ours"], times[name], label, name, 128 * batch_size, "tokens/s") for name in names[1:]]
    return rows


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def evaluator(name, folder, asked, device_name):
    """A contestant: the log-probabilities of all choices of (context, choices, number of the right one)."""
    device = contestants_device(name, device_name)
    dtype = training_dtype("auto", device)
    if name == "ours":
        model, tokenizer = (
            SmolLM2.from_pretrained(folder, dtype, device),
            Tokenizer.from_file(f"{folder}/tokenizer.json"),
        )
        join(model)
        budget = 256 if device.type == "cpu" else 4096
        return lambda: len(list(evaluate(model, tokenizer, asked, budget, "questions")))
    from lm_eval.models.huggingface import HFLM

    batch_size = int(name.rsplit(" ", 1)[1])
    harness = HFLM(pretrained=folder, device=device.type, dtype=str(dtype)[6:], batch_size=batch_size)
    requests = [SimpleNamespace(args=(context, choice)) for context, choices, _ in asked for choice in choices]
    return lambda: len(harness.loglikelihood(requests, disable_tqdm=True))


def bench_evaluate(settings, device):
    words, count = iter(" ".join(texts()).split()), 1000 if device.type == "cuda" else 50

    def some(number):
        return " ".join(next(words) for _ in range(number))

    rows = []
    for like, length in (("HellaSwag", 16), ("ARC", 3)):
        asked = [(f"{some(30)} ", [f" {some(length)}" for _ in range(4)], 0) for _ in range(count)]
        rows.append(compare_evaluators(settings, f"questions like {like}'s, {settings.size}", asked))
    return rows


def compare_evaluators(settings, what, asked):
    with tempfile.TemporaryDirectory() as folder:
        SmolLM2(model_config(settings.size)).save_pretrained(folder)
        shutil.copy(tokenizer_file(settings, f"{folder}/cache"), f"{folder}/tokenizer.json")
        special = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
        write_json(f"{folder}/tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special)
        names = ["ours", "lm-eval, batch 1", "lm-eval, batch 8", "lm-eval, batch 32"]
        contestants = {name: Contestant(evaluator, name, folder, asked, settings.device) for name in names}
        first = {name: contestant(warm_seconds) for name, contestant in contestants.items()}
        best = min(names[1:], key=first.get)
        for name in set(names[1:]) - {best}:
            contestants.pop(name).leave()
        times = take_turns(contestants, settings.rounds)
    return compare(times["ours"], times[best], what, best, len(asked), "questions/s")


# ---- Data -----------------------------------------------------------------------------------------------------------


def corpus(folder, megabytes):
    """A parquet file of about so much text, from the Python files of this environment, and the texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, left = [], megabytes * 10**6
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        text = path.read_text(errors="replace")
        texts += [text] if text.strip() else []
        left -= len(text)
        if left < 0:
            break
    pq.write_table(pa.table({"text": texts}), f"{folder}/corpus.parquet", row_group_size=1000)
    return texts


NANOGPT = """
import sys
import numpy as np
from datasets import load_dataset
from tokenizers import Tokenizer
source, tokenizer_file, processes, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer_file)
def process(example):
    ids = tokenizer.encode(example["text"]).ids + [0]
    return {"ids": ids, "len": len(ids)}
data = load_dataset("parquet", data_files=source, split="train", cache_dir=out + ".cache")
data = data.map(process, remove_columns=data.column_names, num_proc=int(processes))
bin = np.memmap(out, dtype=np.uint16, mode="w+", shape=(sum(data["len"]),))
parts, place = min(1024, len(data)), 0
for part in range(parts):
    batch = data.shard(num_shards=parts, index=part, contiguous=True).with_format("numpy")
    ids = np.concatenate(batch["ids"])
    bin[place : place + len(ids)] = ids
    place += len(ids)
bin.flush()
"""  # one document at a time in as many processes as there are cores, then all of them into one array


def tokenizer_file(settings, folder):
    if os.path.isfile(settings.tokenizer):
        return settings.tokenizer
    from huggingface_hub import hf_hub_download

    return hf_hub_download(settings.tokenizer, "tokenizer.json", cache_dir=folder)


def preparer(name, folder, file):
    """A contestant: tokenizes folder/corpus.parquet in its way."""
    if name == "encode_batch_fast on texts in memory":
        import pyarrow.parquet as pq
        from tokenizers import Tokenizer

        texts = pq.read_table(f"{folder}/corpus.parquet")["text"].to_pylist()
        tokenizer = Tokenizer.from_file(file)
        return lambda: len(tokenizer.encode_batch_fast(texts))
    new = map(str, range(10**6))
    if name == "ours":
        args = ["prepare.py", f"--source={folder}/corpus.parquet", f"--tokenizer={file}"]
        return lambda: script(*args, f"--data_dir={folder}/data{next(new)}")
    args = [f"{folder}/nanogpt.py", f"{folder}/corpus.parquet", file, str(os.cpu_count())]
    return lambda: script(*args, f"{folder}/bin{next(new)}")


def bench_prepare(settings, device):
    with tempfile.TemporaryDirectory() as folder:
        texts, file = corpus(folder, settings.megabytes), tokenizer_file(settings, folder)
        Path(f"{folder}/nanogpt.py").write_text(NANOGPT)
        names = ("ours", "encode_batch_fast on texts in memory", "datasets.map, then one array")
        times = take_turns({name: Contestant(preparer, name, folder, file) for name in names}, settings.rounds)
        size = sum(len(text.encode()) for text in texts) / 1e6
        label = f"preparing {size:.0f} MB"
        return [compare(times["ours"], times[name], label, name, size, "MB/s") for name in names[1:]]


def loader(name, folder, file, batches=100):
    """A contestant: makes batches of 32 x 512 tokens, of bins or of a stream of documents."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    tokenizer, cpu = Tokenizer.from_file(file), torch.device("cpu")

    def ours():
        corpus = open_corpus(f"{folder}/data", 512, seed=0, eval_tokens=512)
        for batch in range(batches):
            to_device(corpus.train.batch(batch * 32, 32), cpu)

    def streaming():
        ids, made = [], 0
        for example in load_dataset("parquet", data_files=f"{folder}/corpus.parquet", split="train", streaming=True):
            ids += [*tokenizer.encode(example["text"]).ids, 0]
            while len(ids) >= 32 * 513 and made < batches:
                torch.tensor(ids[: 32 * 513]).view(32, 513)
                ids, made = ids[32 * 513 :], made + 1
            if made == batches:
                return

    return ours if name == "ours" else streaming


def bench_load(settings, device):
    with tempfile.TemporaryDirectory() as folder:
        corpus(folder, 20)
        file = tokenizer_file(settings, folder)
        script("prepare.py", f"--source={folder}/corpus.parquet", f"--tokenizer={file}", f"--data_dir={folder}/data")
        contestants = {name: Contestant(loader, name, folder, file) for name in ("ours", "streaming")}
        times, tokens = take_turns(contestants, settings.rounds), 100 * 32 * 512
        what, against = "loading batches of 32 x 512", "datasets streaming, tokenized on the way"
        return [compare(times["ours"], times["streaming"], what, against, tokens, "tokens/s")]


# ---- Runs -----------------------------------------------------------------------------------------------------------


def read_metrics(folder):
    return [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]


def tiny(*args, **environment):
    """Train config/tiny.py in a new folder: its last metrics, seconds to the first step and after it."""
    script("prepare.py", "config/tiny.py")
    with tempfile.TemporaryDirectory() as folder:
        command = "train.py", "config/tiny.py", f"--out_dir={folder}/run", "--sample_interval=0"
        lines = script(*command, *args, **environment)
        steps = [(when, line) for when, line in lines if re.match(r"step [1-9]", line)]
        metrics = read_metrics(folder)
    return metrics[-1], steps[0][0], steps[-1][0] - steps[0][0]


def bench_learn(settings, device):
    """How long config/tiny.py takes to the validation loss that it has after 120 s of AdamW at its best rate."""
    metrics = tiny("--max_steps=100", "--log_interval=100")[0]
    budget = round(120 * metrics["tokens_per_second"] * metrics["step"] / metrics["tokens"])

    def train(steps, *args):
        length = f"--max_steps={steps}", f"--decay_steps={steps // 2}", f"--eval_interval={steps}"
        metrics, _, took = tiny(*length, *args)
        return metrics["val_bpb"], took

    adamw = {}
    for rate in (1e-3, 2e-3, 3e-3):
        bpb, took = train(budget, "--optimizer=adamw", f"--learning_rate={rate}")
        adamw[bpb] = took
        print(f"AdamW, learning rate {rate}: {bpb:.4f} bits per byte after {budget} steps, {took:.0f} s", flush=True)
    goal = min(adamw)
    for share in (0.4, 0.45, 0.5, 0.6, 0.8, 1.0):
        bpb, took = train(round(budget * share))
        print(f"config/tiny.py: {bpb:.4f} after {round(budget * share)} steps, {took:.0f} s", flush=True)
        if bpb <= goal:
            what, against = f"time to {goal:.3f} bits per byte, config/tiny.py", "AdamW, its best rate"
            return [row(what, against, adamw[goal] / took, took, adamw[goal], "s")]
    return []


def bench_start(settings, device):
    rows = []
    large = asdict(SmolLM2Config.smollm2_135m()).items()
    large = [f"--model.{name}={value}" for name, value in large if name.endswith(("_size", "_layers", "_heads"))]
    large += ["--compile=True", "--seq_len=512", "--micro_batch=2", "--batch_tokens=1024", "--eval_tokens=1024"]
    for name, args in (("config/tiny.py", ()), ("135m, 2 x 512", large)):
        times = []
        for _ in range(settings.rounds):
            with tempfile.TemporaryDirectory() as cache:
                fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
                times.append(tiny(*args, "--max_steps=2", **fresh)[1])
        what, median = f"command to first step, {name}", statistics.median(times)
        rows.append(row(what, "", None, median, None, "s", least=min(times), most=max(times)))
        print(f"{what}: {median:.1f} s", flush=True)
    return rows


def ranked(processes):
    """A contestant: trains config/tiny.py on the CPU in so many processes, and returns the seconds of a step."""
    launcher = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}") if processes > 1 else ()
    args = "train.py config/tiny.py --device=cpu --micro_batch=4 --max_steps=61 --log_interval=61".split()
    args += ["--eval_interval=1000", "--sample_interval=0"]

    def train():
        with tempfile.TemporaryDirectory() as folder:
            threads = str(os.cpu_count() // processes)
            script(sys.executable, *launcher, *args, f"--out_dir={folder}/run", OMP_NUM_THREADS=threads)
            return 2048 / read_metrics(folder)[-1]["tokens_per_second"]

    return train


def bench_ranks(settings, device):
    """A process for each half of the cores against one for all: what is left is what the code and gloo add."""
    script("prepare.py", "config/tiny.py")
    contestants = {processes: Contestant(ranked, processes) for processes in (2, 1)}
    times = take_turns(contestants, settings.rounds, clock=run)
    return [compare(times[2], times[1], "training in two processes", "in one", 2048, "tokens/s")]


# ---- Results --------------------------------------------------------------------------------------------------------


def table(rows):
    def number(value):
        return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    lines = ["| what | against | ratio | range | here | there | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
        spread = f"{row['least']:.2f} to {row['most']:.2f}" if "least" in row else ""
        numbers = f"{number(row.get('ours'))} | {number(row.get('theirs'))}"
        lines.append(f"| {row['what']} | {row['against']} | {ratio} | {spread} | {numbers} | {row['unit']} |")
    return "\n".join(lines)


def main(settings):
    try:  # contestants import what they need, but in processes of their own
        import transformers  # noqa: F401

        if settings.gguf:
            import llama_cpp  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}; pip install -r requirements-dev.txt, and for --gguf pip install llama-cpp-python")
    device = set_up_device(settings.device)
    settings.device = device.type
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}-{os.cpu_count()}-cores"
    path = ROOT / "tools" / "results" / f"{re.sub('[^A-Za-z0-9]+', '-', name).lower()}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    benches = {name[6:]: function for name, function in globals().items() if name.startswith("bench_")}
    settings.rounds = settings.rounds or (3 if device.type == "cuda" else 5)
    everything = ("train", "sample", "evaluate", "start") if device.type == "cuda" else benches
    for what in everything if settings.what == "all" else [settings.what]:
        new = benches[what](settings, device)
        mine = {(row["what"], row["against"]) for row in new}
        rows = [row for row in rows if (row["what"], row["against"]) not in mine] + new
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
