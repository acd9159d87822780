"""Runs of train.py: how tests begin, watch and stop them, and what they compare afterwards."""

import atexit
import contextlib
import hashlib
import io
import json
import shutil
import subprocess
from pathlib import Path

from plumbing.checkpoint import load_state
from plumbing.pretrained import list_checkpoints
from plumbing.settings import load_settings

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command, environment, metrics

import prepare
import train
from model import SmolLM2


def arguments(data, out, *args):
    """A command line for a small model."""
    return [*SMALL, f"--data_dir={data}", f"--out_dir={out}", *map(str, args)]


# ---- In this process, which saves the three seconds of starting another


def train_here(data, out, *args):
    """Train a small model; returns what is printed."""
    threads, printed = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)  # as in the processes that tests start, so that results are the same bit for bit
    try:
        with contextlib.redirect_stdout(printed):
            train.main(load_settings("train", train.Settings, arguments(data, out, *args)))
    finally:
        torch.set_num_threads(threads)
    return printed.getvalue()


def prepare_here(*args):
    """Prepare a corpus; returns what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        prepare.main(load_settings("prepare", prepare.Settings, list(args)))
    return printed.getvalue()


def refused_by(call, *args):
    """Call what must refuse; returns the sentence."""
    with pytest.raises(SystemExit) as refusal:
        call(*args)
    return str(refusal.value)


def refused_here(data, out, *args):
    """Train where it must be refused; returns the sentence."""
    return refused_by(train_here, data, out, *args)


# ---- In processes of their own


def start(*line, **options):
    options = dict(cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    process = subprocess.Popen([str(part) for part in line], **options)
    atexit.register(process.kill)  # where a test fails before it has ended what it started
    return process


def on_slow_disk(seconds, *args, nproc=0):
    """The command that trains where each file of a checkpoint takes so long to reach the disk."""
    code = f"import os, time; sync = os.fsync; os.fsync = lambda fd: (time.sleep({seconds}), sync(fd))"
    return command("tests/patched.py", code, "train.py", *args, nproc=nproc)


def start_training(data, out, *args, nproc=0, until=""):
    """A process that trains, or the launcher of several, once it has said something."""
    process = start(*command("train.py", *arguments(data, out, *args), nproc=nproc))
    wait_for(process, until)
    return process


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before it said {words!r}: {process.communicate()[1]}")


def child_of(process, rank):
    """The process id of a rank that torchrun started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, IndexError):  # it ended meanwhile
            parent = status.read_text().split("PPid:\t")[1].split("\n")[0]
            if int(parent) == process.pid and f"\0RANK={rank}\0".encode() in (status.parent / "environ").read_bytes():
                return int(status.parent.name)
    return pytest.fail(f"no rank {rank}")


# ---- What they leave


def weights(out, step):
    return (Path(out) / f"checkpoint-{step:06d}" / "model.safetensors").read_bytes()


def loadable_checkpoints(out):
    """The steps of all checkpoints, each of which must load."""
    steps = []
    for folder in list_checkpoints(out):
        SmolLM2.from_pretrained(folder)
        steps.append(load_state(folder)["step"])
        assert folder.endswith(f"checkpoint-{steps[-1]:06d}")
    return steps


def values(out, name):
    """One metric by step."""
    return {line["step"]: line[name] for line in metrics(out) if line.get(name) is not None}


def numbers(out):
    """The metrics that must repeat: all but the speed, and evaluations at the ends of parts."""
    kept = {"step", "loss", "learning_rate", "grad_norm", "tokens", "epoch", "unique_tokens"}
    return [{name: value for name, value in line.items() if name.split("/")[0] in kept} for line in metrics(out)]


def assert_same_run(out, other):
    """Both ended at the same step, with the same weights, and with the same numbers on the way, bit for bit."""
    assert numbers(out) == numbers(other)
    last = metrics(out)[-1]["step"]
    assert weights(out, last) == weights(other, last)


# ---- What they train on


def write_shard(folder, train, val, vocab_size, tokenizer):
    """A shard of given tokens, as prepare.py would leave it."""
    shard = {"tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(), "vocab_size": vocab_size}
    for split, tokens in (("train", train), ("val", val)):
        np.asarray(tokens, "<u2").tofile(folder / f"{split}-00000.bin")
        shard[split] = {"documents": 1, "tokens": len(tokens), "bytes": 3 * len(tokens), "sha256": split}
    (folder / "shard-00000.json").write_text(json.dumps(shard))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def second_shard(folder, source):
    """The first shard of another folder, or of this one, once more."""
    for path in list(source.glob("*-00000.*")):
        shutil.copy(path, folder / path.name.replace("00000", "00001"))
