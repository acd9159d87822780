"""Several processes as one: signals, agreement, resuming, and what DDP keeps in memory."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, command, environment, metrics, run
from test_faults import arguments, assert_all_checkpoints_load, child_of, numbers, start, wait_for, weights
from test_train import values

pytestmark = pytest.mark.slow

# ---- Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_launcher_and_ranks_at_once_is_one(number, data, tmp_path):
    """As a terminal, systemd and Slurm send it; torchrun sends it on to the ranks, which then have it twice."""
    slow = ["--max_steps=1000", "--batch_tokens=262144", "--eval_tokens=32"]  # seconds for a step
    launcher = command("train.py", *arguments(data, tmp_path, *slow), nproc=2)
    process = start(*launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "step 1/")
    before = time.monotonic()
    for receiver in (child_of(process, rank=0), child_of(process, rank=1), process.pid):
        os.kill(receiver, number)
    process.communicate(timeout=60)
    assert time.monotonic() - before > 0.5, "the step was over too soon to be disturbed"
    assert_all_checkpoints_load(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_a_second_interrupt_of_a_person_stops_at_once(data, tmp_path):
    slow = ["--max_steps=1000", "--batch_tokens=33554432", "--eval_tokens=32"]  # minutes for a step
    process = start(
        *command("train.py", *arguments(data, tmp_path, *slow)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(process, "step 0/")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "--resume=True continues" in errors and "Traceback" not in errors


def test_an_interrupt_before_the_loop(data, tmp_path):
    args = arguments(data, tmp_path, "--max_steps=3")
    code = "import plumbing.bins as bins, runpy, sys, time\n"
    code += "bins.open_bins = lambda *args: (print('open', flush=True), time.sleep(60))\n"
    code += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    process = start(sys.executable, "-c", code, "train.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "open")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and errors.startswith("stopped;")


def test_an_evaluation_that_a_stop_left_out_is_made_when_it_continues(data, tmp_path):
    args = arguments(data, tmp_path, "--eval_interval=1", "--sample_interval=1", "--resume=True", "--sample_prompt=9: ")
    process = start(*command("train.py", *args, "--max_steps=100000"), stdout=subprocess.PIPE)
    wait_for(process, "step 5/")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=30)[0]
    last = metrics(tmp_path)[-1]["step"]
    assert last not in values(tmp_path, "val_loss")
    assert rest.split(f"step {last}/")[1].count("9: ") == 1, "the sample of the last step"
    run("train.py", *args, f"--max_steps={last + 1}")
    assert set(values(tmp_path, "val_loss")) == set(range(last + 2))
    before = len(metrics(tmp_path))
    run("train.py", *args, f"--max_steps={last + 1}")
    assert len(metrics(tmp_path)) == before, "an evaluation was made again"


# ---- Agreement


def two_ranks(first, second, **options):
    """Two ranks started by hand, each with its own arguments: [(exit code, stdout, stderr)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        start(
            *command("train.py", *args),
            env=environment(RANK=rank, LOCAL_RANK=rank, **world),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, args in enumerate((first, second))
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    return [(process.returncode, *output) for process, output in zip(ranks, outputs, strict=True)]


def refuse_two(first, second):
    """The sentence with which two ranks refuse to train together: said by the first, once."""
    (code, _, sentence), (other_code, other_out, other) = two_ranks(first, second)
    assert code == other_code == 1
    assert "Traceback" not in sentence + other and other_out == other == ""
    assert len(sentence.splitlines()) == 1
    return sentence


def test_ranks_that_see_other_shards(data, tmp_path):
    more = Path(shutil.copytree(data, tmp_path / "more"))
    for path in data.glob("*-00000.*"):
        shutil.copy(path, more / path.name.replace("00000", "00001"))
    one, other = (arguments(folder, tmp_path / "out", "--max_steps=3", "--micro_batch=2") for folder in (data, more))
    assert "shard-00001.json, train is None on rank 0" in refuse_two(one, other)


def test_ranks_that_see_other_checkpoints(trained, data, tmp_path):
    older = Path(shutil.copytree(trained, tmp_path / "older"))
    shutil.rmtree(older / "checkpoint-000040")
    newer = shutil.copytree(trained, tmp_path / "newer")
    last = ("--max_steps=60", "--micro_batch=2", "--resume=True")
    assert "step is 40 on rank 0, and 20 on rank 1" in refuse_two(
        *(arguments(data, out, *last) for out in (newer, older))
    )


def test_ranks_with_other_settings(data, tmp_path):
    one = arguments(data, tmp_path, "--max_steps=3", "--micro_batch=2")
    assert "learning_rate is 0.01 on rank 0, and 0.5" in refuse_two(one, [*one, "--learning_rate=0.5"])


def test_a_refusal_is_said_once_and_by_one_rank_with_its_number(data, tmp_path):
    one = arguments(data, tmp_path / "out", "--max_steps=3", "--micro_batch=2")
    nowhere = [*one, f"--data_dir={tmp_path / 'nowhere'}"]
    assert refuse_two(nowhere, nowhere).startswith(f"{tmp_path / 'nowhere'} holds no shard")
    assert refuse_two(one, nowhere).startswith(f"rank 1: {tmp_path / 'nowhere'} holds no shard")


# ---- DDP


def test_compiled_ranks_resume_bitwise(data, tmp_path):
    """A model large enough for several of DDP's buckets, where its compiler would cut a layer."""
    variant = ["--dtype=bfloat16", "--compile=True", "--micro_batch=2", "--batch_tokens=128"]
    variant += ["--model.hidden_size=256", "--model.intermediate_size=1024", "--eval_tokens=128"]
    run("train.py", *arguments(data, tmp_path / "whole", "--max_steps=10", *variant), nproc=2)
    for steps in (5, 10):
        args = arguments(data, tmp_path / "parts", f"--max_steps={steps}", "--resume=True", *variant)
        run("train.py", *args, nproc=2)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "parts", 10) == weights(tmp_path / "whole", 10)


INSPECTED = """
import gc, runpy, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
leave = dist.destroy_process_group
def inspect():
    (replica,) = [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
    gradients = [parameter.grad for parameter in replica.parameters()]
    print("buffers", len({gradient.untyped_storage().data_ptr() for gradient in gradients}), "of", len(gradients))
    leave()
dist.destroy_process_group = inspect
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_gradients_are_views_of_the_buffers_that_are_exchanged(data, tmp_path):
    (tmp_path / "inspected.py").write_text(INSPECTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = arguments(data, tmp_path / "out", "--max_steps=3", "--micro_batch=2")
    done = subprocess.run(
        [*launcher, tmp_path / "inspected.py", "train.py", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "buffers 1 of 20" in done.stdout  # one bucket holds them all: no gradient has memory of its own


# ---- Saves that take long


def test_a_slow_save_does_not_hold_up_training_nor_trip_the_timeout(data, tmp_path):
    """Seven files, half a second each, with ranks that wait four seconds for each other."""
    args = arguments(data, tmp_path, "--max_steps=50", "--save_interval=10", "--micro_batch=2", "--timeout=4")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "tests/slow_saves.py", "0.5", "train.py", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint-000020 is left out" in done.stdout
    assert done.stdout.index("step 15/") < done.stdout.index("checkpoint-000010:"), "training waited for the save"
    assert_all_checkpoints_load(tmp_path)
    assert weights(tmp_path, 50)
