"""All that tools/README.md still wants measured on a GPU, by one command, in half an hour.

    python -m tools.measure                    what out/measured.md lacks, one measurement after the other
    python -m tools.measure --only=generation  one of them, printed
    python -m tools.measure --rehearse=True    at toy sizes, also on a CPU: does it run?

Each measurement has processes of its own and a time limit. As soon as it ends, its table is in out/measured.md, ready
to be pasted. If it fails, the error stands there instead, and the next call tries it again. This needs
requirements-dev.txt.
"""

import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import say, write_whole
from plumbing.settings import Positive, run

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    """Measure what only a GPU can tell."""

    out: str = "out/measured.md"  # file for the tables
    only: str | None = None  # name of a measurement, to be printed
    minutes: Positive = 30.0  # when they are over, what is running is stopped, and left to the next call
    data_dir: str = "data/python-docs"  # to train on; made if it is not there
    rehearse: bool = False  # toy sizes


# ---- The measurements -----------------------------------------------------------------------------------------------


def call(*command, cwd=ROOT, **variables):
    """What a Python command prints; if it fails, exits with what it had to leave out or its last line."""
    options = dict(cwd=cwd, env=os.environ | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run([sys.executable, *command], **options)
    if done.returncode:
        lines = [f"exit status {done.returncode}", *done.stdout.splitlines(), *done.stderr.splitlines()]
        sys.exit(next((line for line in lines if " left out: " in line), lines[-1]))
    return done.stdout


def bench(settings, arguments):
    """The table of tools.bench, and what it left out."""
    toy = " --size=toy --seq_len=64 --micro_batches 1 --batch_sizes 1 --ours_only=True" if settings.rehearse else ""
    compiler = {"TORCH_COMPILE_DISABLE": str(int(settings.rehearse))}
    with tempfile.TemporaryDirectory() as out:
        said = call("-m", "tools.bench", *(arguments + toy).split(), "--rounds=1", f"--out={out}", **compiler)
    return "\n".join([*re.findall(r"^\|.*", said, re.MULTILINE), "", *re.findall(".* left out: .*", said)])


UNFROZEN = "without gc.freeze"
TOY = (
    "--seq_len=32 --batch_tokens=64 --max_steps=12 --eval_interval=6 --eval_tokens=32 --compile=False "
    "--model.vocab_size=0 --model.hidden_size=32 --model.num_hidden_layers=1 --model.num_attention_heads=2 "
    "--model.num_key_value_heads=1"
)


def train(settings, steps, arguments, variants):
    """A table of runs of the 135M on Python's documentation: the arguments, and those of each variant."""
    if not list(Path(ROOT, settings.data_dir).glob("shard-*.json")):
        call("prepare.py", "config/tiny.py", f"--data_dir={settings.data_dir}")
    arguments += f" --max_steps={steps} --eval_interval={steps // 4} --save_interval={steps} --sample_interval=0"
    table = []
    for variant in variants[-1:] if settings.rehearse else variants:
        first = "import gc; gc.freeze = lambda: None" if variant == UNFROZEN else "pass"
        changes = f"{arguments} {'' if variant == UNFROZEN else variant} {TOY if settings.rehearse else ''}".split()
        with tempfile.TemporaryDirectory() as out:
            folders = f"--data_dir={settings.data_dir}", f"--out_dir={out}"
            call("tests/patched.py", first, "train.py", *folders, *changes)
            metrics = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
            (weights,) = Path(out).glob("checkpoint-*/model.safetensors")
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        speeds = [line["tokens_per_second"] for line in metrics if line["step"] > 5]  # all is warm by then
        times = [1000 * metrics[1]["tokens"] / speed for speed in speeds]
        found = {line["step"]: f"{line['val_bpb']:.4f}" for line in metrics if line["step"] and "val_bpb" in line}
        figures = f"{statistics.median(speeds):,.0f}", f"{statistics.median(times):.1f}", f"{max(times):.1f}"
        table.append(" | ".join([variant or "as it is", *figures, *found.values(), digest]))
    head = ["", "tokens/s", "ms a step", "longest", *(f"bits per byte, step {step}" for step in found), "weights"]
    return "\n".join(f"| {row} |" for row in [" | ".join(head), " | ".join(["---"] * len(head)), *table])


def tests(settings):
    """What pytest says. Those with several ranks need several GPUs."""
    toy, all_of_them = ["tests/test_settings.py", "-k", "precedence"], ["tests", "-n", "8", "-k", "not rank"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *(toy if settings.rehearse else all_of_them)]
    options = dict(cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    done = subprocess.run(command, env={"DEVICE": "cpu" if settings.rehearse else "cuda"} | os.environ, **options)
    if done.returncode > 1:  # 1: some fail
        sys.exit((done.stderr or done.stdout).strip().splitlines()[-1])
    return "\n".join([*re.findall("^FAILED.*|^ERROR.*", done.stdout, re.MULTILINE), *done.stdout.splitlines()[-1:]])


def evaluation(settings):
    """The accuracies of the published 135M, which should be the published ones."""
    with tempfile.TemporaryDirectory() as folder:  # where evaluation.json is written
        model = "HuggingFaceTB/SmolLM2-135M"
        try:
            said = call("-m", "tools.evaluate", f"--model={model}", "--tasks=all", cwd=folder, PYTHONPATH=str(ROOT))
        except SystemExit as error:  # no network, no hub
            return f"left out: {error}"
        return f"```\n{said}```"


LONG = "--batch_tokens=65536 --warmup_steps=10 --decay_steps=10 --eval_tokens=4096 --model.vocab_size=49152"
SHORT = "--seq_len=512 --batch_tokens=8192 --warmup_steps=20 --decay_steps=140 --eval_tokens=65536 --compile=False"
RATES = [f"--learning_rate={rate}" for rate in (1e-3, 3e-3, 6e-3, 1e-2)]
MEASUREMENTS = {  # name: (seconds that it may take, function, arguments)
    "training-135m": (330, bench, "train --size=135m --micro_batches 16 32"),
    "training-360m": (120, bench, "train --size=360m --micro_batches 16 24 --ours_only=True"),
    "training-1.7b": (150, bench, "train --size=1.7b --micro_batches 4 8 --ours_only=True"),
    "generation": (330, bench, "sample"),
    "garbage-collector": (200, train, 200, LONG, ["", UNFROZEN]),
    "deterministic": (250, train, 60, LONG, ["", "", "--deterministic=True", "--deterministic=True"]),
    "flash-attention-3": (150, train, 60, LONG, ["", "--flash_attention_3=True"]),
    "adamw": (240, train, 280, f"{SHORT} --optimizer=adamw", RATES),
    "muon": (240, train, 280, f"{SHORT} --optimizer=muon", RATES),
    "evaluation": (300, evaluation),
    "tests": (400, tests),
}


# ---- The command ----------------------------------------------------------------------------------------------------


def main(settings):
    if settings.only and settings.only not in MEASUREMENTS:
        sys.exit(f"--only={settings.only} is none of {', '.join(MEASUREMENTS)}.")
    if settings.only:
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
        _, function, *arguments = MEASUREMENTS[settings.only]
        return print(function(settings, *arguments))
    import torch

    if not torch.cuda.is_available() and not settings.rehearse:
        sys.exit("this needs an NVIDIA GPU; --rehearse=True tries it at toy sizes on a CPU.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"# {device}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    path, over = Path(settings.out), time.monotonic() + 60 * settings.minutes
    was, *parts = re.split(r"^## (.*)\n", path.read_text(), flags=re.MULTILINE) if path.exists() else [title]
    if was.strip() != title:
        sys.exit(f"{path} begins with {was.strip()!r}, and this is {title!r}: take another --out.")
    found = {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in missing(found):
        seconds = min(MEASUREMENTS[name][0], over - time.monotonic())
        if seconds > 0:
            say(f"{name}, at most {seconds:.0f} s")
            found[name] = measure(name, settings, seconds)
            sections = [f"## {name}\n\n{text}\n" for name, text in found.items()]
            write_whole(path, "\n".join([f"{title}\n", *sections]).encode())
            say(f"{found[name]}\n")
    lacking = f", but for {', '.join(missing(found))}: the same command tries again" if missing(found) else ""
    say(f"{path} has the tables{lacking}")


def missing(found):
    return [name for name in MEASUREMENTS if found.get(name, "failed").startswith(("failed", "left out"))]


def measure(name, settings, seconds):
    """What --only=name prints, in a session of its own; or how it failed."""
    same = [f"--data_dir={settings.data_dir}", f"--rehearse={settings.rehearse}"]
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen([sys.executable, "-m", "tools.measure", f"--only={name}", *same], **options)
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"failed: not done after {seconds:.0f} s"
    return f"failed: {(errors.strip() or 'killed').splitlines()[-1]}" if process.returncode else printed.strip()


def end_with(parent):
    """End this measurement, and all that it started, once the process that waits for it is gone."""
    while os.getppid() == parent or os.getsid(0) != os.getpid():
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    run(main, "measure", Settings)
