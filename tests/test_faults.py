"""What a long run survives: killed, stopped, hung, without disk, on damaged files. Each fault is a real one."""

import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from plumbing.checkpoint import load_state

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command, environment, metrics, refused, run, sentences

from model import SmolLM2

KILLS = int(os.environ.get("KILLS", 8))


def arguments(data, out, *args):
    return [*SMALL, f"--data_dir={data}", f"--out_dir={out}", *args]


def start(*command_line, **options):
    options = {"cwd": ROOT, "env": environment(), "text": True} | options
    return subprocess.Popen([str(part) for part in command_line], **options)


def weights(out, step):
    return (Path(out) / f"checkpoint-{step:06d}" / "model.safetensors").read_bytes()


def numbers(out):
    """The metrics that must repeat: all but the speed, and evaluations at the ends of parts."""
    left_out = {"tokens_per_second", "mfu", "val_loss", "val_bpb", "unigram_loss", "bigram_loss"}
    return [{name: value for name, value in line.items() if name not in left_out} for line in metrics(out)]


def assert_all_checkpoints_load(out):
    for folder in Path(out).glob("checkpoint-*"):
        if folder.suffix != ".tmp":
            SmolLM2.from_pretrained(folder)
            assert load_state(folder)["step"] == int(folder.name[11:])


def wait_for(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended before it said {words!r}")


def child_of(process, rank):
    """The process id of a rank that torchrun started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = status.read_text().split("PPid:\t")[1].split("\n")[0]
            if int(parent) == process.pid and f"\0RANK={rank}\0".encode() in (status.parent / "environ").read_bytes():
                return int(status.parent.name)
        except (OSError, IndexError):  # it ended meanwhile
            continue
    pytest.fail(f"no rank {rank}")


# ---- Restarts


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        ["--dtype=float32"],
        ["--dtype=bfloat16"],
        ["--dtype=float16", "--optimizer=muon"],
        ["--dtype=float32", "--compile=True"],
        ["--dtype=bfloat16", "--compile=True", "--optimizer=muon"],
    ],
    ids=" ".join,
)
def test_resume_is_bitwise(variant, data, tmp_path):
    """Over the end of an epoch, with accumulation: in one go, and in three parts."""
    variant = [*variant, "--micro_batch=2", "--seq_len=64", "--batch_tokens=1024"]
    run("train.py", *arguments(data, tmp_path / "whole", "--max_steps=40", *variant))
    for steps in (7, 8, 40):
        run("train.py", *arguments(data, tmp_path / "parts", f"--max_steps={steps}", "--resume=True", *variant))
    assert numbers(tmp_path / "whole")[-1]["epoch"] > 1
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert weights(tmp_path / "parts", 40) == weights(tmp_path / "whole", 40)


@pytest.mark.slow
def test_killed_at_any_moment(data, tmp_path):
    """SIGKILL at random times, half of them while a save is under way; then the weights of an undisturbed run."""
    rng, out, inside = random.Random(KILLS), tmp_path / "killed", 0
    steps = 20 * KILLS
    settings = [f"--max_steps={steps}", "--save_interval=5", "--resume=True"]
    for kill in range(KILLS):
        process = start(
            sys.executable,
            "tests/slow_saves.py",
            0.05,
            "train.py",
            *arguments(data, out, *settings),
            stdout=subprocess.PIPE,
        )
        wait_for(process, "an epoch")
        if kill % 2:
            while not list(out.glob("checkpoint-*.tmp")) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        inside += bool(list(out.glob("checkpoint-*.tmp")))
        assert_all_checkpoints_load(out)
    run("train.py", *arguments(data, out, *settings))
    run("train.py", *arguments(data, tmp_path / "whole", f"--max_steps={steps}"))
    assert weights(out, steps) == weights(tmp_path / "whole", steps)
    assert numbers(out) == numbers(tmp_path / "whole")
    assert not list(out.glob("*.tmp"))
    assert inside, "no kill hit a save"


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun(data, tmp_path):
    settings = ["--max_steps=400", "--save_interval=10", "--micro_batch=2", "--resume=True"]
    launcher = command("train.py", *arguments(data, tmp_path / "killed", *settings), nproc=2)
    launcher.insert(launcher.index("train.py"), "--max-restarts=2")
    own_store = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)  # as the README says
    process = start(*launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=own_store)
    wait_for(process, "step 25/")
    os.kill(child_of(process, rank=1), signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed from" in printed
    run("train.py", *arguments(data, tmp_path / "whole", *settings), nproc=2)
    assert weights(tmp_path / "killed", 400) == weights(tmp_path / "whole", 400)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_go_on_as_one_and_one_as_two(data, tmp_path):
    run("train.py", *arguments(data, tmp_path / "whole", "--max_steps=16", "--micro_batch=2"))
    for name, first, second in (("shrunk", 2, 0), ("grown", 0, 2)):
        for steps, nproc in ((8, first), (16, second)):
            args = arguments(data, tmp_path / name, f"--max_steps={steps}", "--micro_batch=2", "--resume=True")
            run("train.py", *args, nproc=nproc)
        losses = [[line["loss"] for line in metrics(tmp_path / out)[1:]] for out in (name, "whole")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job(data, tmp_path):
    args = arguments(data, tmp_path, "--max_steps=100000", "--micro_batch=2", "--timeout=3")
    process = start(*command("train.py", *args, nproc=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "step 5/")
    os.kill(child_of(process, rank=1), signal.SIGSTOP)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "--timeout=3" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_leaves(number, data, tmp_path):
    process = start(*command("train.py", *arguments(data, tmp_path, "--max_steps=100000")), stdout=subprocess.PIPE)
    wait_for(process, "step 5/")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert metrics(tmp_path)[-1]["step"] == load_state(checkpoint)["step"] < 1000


def test_all_ranks_stop_at_one_step(data, tmp_path):
    args = arguments(data, tmp_path, "--max_steps=100000", "--micro_batch=2")
    process = start(*command("train.py", *args, nproc=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(process, "step 5/")
    os.kill(child_of(process, rank=1), signal.SIGTERM)  # one of them is told; all stop, and the job ends well
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert_all_checkpoints_load(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


# ---- A full disk


def limited(size):
    """Let a process write no file longer than so many bytes: what a disk does that is full after so many."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_no_room_for_a_checkpoint(data, tmp_path):
    run("train.py", *arguments(data, tmp_path, "--max_steps=5"))
    before = weights(tmp_path, 5)
    for limit in (30_000, len(before) + 1000):  # in the middle of the weights; of the trainer's state
        args = arguments(data, tmp_path, "--max_steps=9", "--save_interval=2", "--resume=True")
        process = start(
            *command("train.py", *args), stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=limited(limit)
        )
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "checkpoint-000006 could not be saved" in errors and "Traceback" not in errors
        assert "step 9/9" in printed  # it went on
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000005"]
        assert weights(tmp_path, 5) == before
    run("train.py", *arguments(data, tmp_path, "--max_steps=9", "--resume=True"))
    assert_all_checkpoints_load(tmp_path)


def test_no_room_for_a_shard(corpus, data, tmp_path):
    args = (f"--source={corpus}", f"--data_dir={tmp_path / 'out'}", f"--tokenizer={data / 'tokenizer.json'}")
    process = start(*command("prepare.py", *args), stderr=subprocess.PIPE, preexec_fn=limited(40_000))
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "shard 00000 could not be written" in errors and "Traceback" not in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


# ---- Numbers that are none


def test_steps_without_numbers_are_skipped_and_the_run_goes_on(trained, data, tmp_path):
    """Gradients too large for float16, until the scaler has found a scale for them."""
    model = SmolLM2.from_pretrained(trained)
    with torch.no_grad():
        model.model.norm.weight *= 100
    model.save_pretrained(tmp_path / "loud")
    settings = ["--dtype=float16", "--max_steps=30", f"--init_from={tmp_path / 'loud'}"]
    printed = run("train.py", *arguments(data, tmp_path / "out", *settings))
    assert "is skipped" in printed
    assert metrics(tmp_path / "out")[-1]["val_loss"] < metrics(tmp_path / "out")[0]["val_loss"]
    model = SmolLM2.from_pretrained(tmp_path / "out")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_of_them_stop_the_run(data, tmp_path):
    run("train.py", *arguments(data, tmp_path / "good", "--max_steps=2"))
    model = SmolLM2.from_pretrained(tmp_path / "good")
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    model.save_pretrained(tmp_path / "good" / "checkpoint-000002")
    args = arguments(data, tmp_path / "good", "--max_steps=9", "--max_bad_steps=3", "--resume=True")
    sentence = refused("train.py", *args)
    assert "3 steps in a row" in sentence and "checkpoint-000002" in sentence


# ---- Damaged data


@pytest.fixture
def own_data(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "data"))


def refuse_data(folder, *args):
    return refused("train.py", *arguments(folder, folder / "out", *args))


def test_a_truncated_bin(own_data):
    path = own_data / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "train-00000.bin" in refuse_data(own_data)
    path.unlink()
    assert "train-00000.bin" in refuse_data(own_data)


def test_an_edited_bin_is_found_when_asked_for(own_data):
    content = bytearray((own_data / "val-00000.bin").read_bytes())
    content[100] ^= 1
    (own_data / "val-00000.bin").write_bytes(content)
    assert "val-00000.bin is not what" in refuse_data(own_data, "--verify_data=True")


def test_a_token_outside_the_vocabulary(own_data):
    tokens = np.fromfile(own_data / "train-00000.bin", "<u2")
    tokens[::10] = 60_000
    tokens.tofile(own_data / "train-00000.bin")
    assert "60000" in refuse_data(own_data)


def test_shards_of_different_tokenizers(own_data):
    for split in ("train", "val"):
        shutil.copy(own_data / f"{split}-00000.bin", own_data / f"{split}-00001.bin")
    shard = json.loads((own_data / "shard-00000.json").read_text())
    (own_data / "shard-00001.json").write_text(json.dumps(shard | {"tokenizer_sha256": "other"}))
    assert "different tokenizers" in refuse_data(own_data)


def test_a_bin_without_its_json_is_left_out(own_data, data, tmp_path):
    shutil.copy(own_data / "train-00000.bin", own_data / "train-00001.bin")
    for folder in (own_data, data):
        run("train.py", *arguments(folder, tmp_path / folder.name / "out", "--max_steps=2"))
    assert numbers(own_data / "out") == numbers(tmp_path / data.name / "out")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": {"tokens": 3}}'])
def test_a_damaged_json(content, own_data):
    (own_data / "shard-00000.json").write_text(content)
    assert "shard-00000.json is damaged" in refuse_data(own_data)


def test_too_little_data(corpus, data, tmp_path):
    prepared = (f"--source={corpus}", f"--tokenizer={data / 'tokenizer.json'}", f"--data_dir={tmp_path / 'data'}")
    run("prepare.py", *prepared, "--val_fraction=0")
    assert "no val bin" in refuse_data(tmp_path / "data")
    assert "no train bin" in refuse_data(data, "--seq_len=65536", "--micro_batch=1", "--batch_tokens=65536")
    assert not (data / "out").exists()


# ---- Damaged checkpoints


@pytest.fixture
def own_run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refuse_resume(data, out, *args):
    return refused("train.py", *arguments(data, out, "--max_steps=50", "--resume=True", *args))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.pt", "config.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(name, own_run, data):
    path = own_run / "checkpoint-000040" / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"hello world " * 100):
        path.write_bytes(damaged)
        assert str(path) in refuse_resume(data, own_run)
    path.unlink()
    assert str(path) in refuse_resume(data, own_run)
    shutil.rmtree(own_run / "checkpoint-000040")
    run("train.py", *arguments(data, own_run, "--max_steps=41", "--resume=True"))


def test_a_state_of_something_else(own_run, data):
    torch.save({"weights": torch.zeros(3)}, own_run / "checkpoint-000040" / "trainer_state.pt")
    assert "not the state of a trainer" in refuse_resume(data, own_run)


@pytest.mark.parametrize(
    "argument",
    ["--seed=1", "--seq_len=16", "--batch_tokens=512", "--optimizer=muon", "--model.hidden_size=64"],
)
def test_settings_that_a_resumed_run_must_keep(argument, trained, data):
    assert f"with {argument[2:].split('=')[0]} = " in refuse_resume(data, trained, argument)


def test_data_that_a_resumed_run_must_keep(own_run, own_data):
    shard = json.loads((own_data / "shard-00000.json").read_text())
    shard["train"]["sha256"] = "other"
    (own_data / "shard-00000.json").write_text(json.dumps(shard))
    assert "shard-00000.json, train" in refuse_resume(own_data, own_run)


# ---- Preparing


def talk(path, seed, count):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed)))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_prepare_killed_and_started_again(data, tmp_path):
    for number in range(3):
        talk(tmp_path / f"{number}.jsonl", number, 20_000)
    args = (f"--source={tmp_path}/*.jsonl", f"--tokenizer={data / 'tokenizer.json'}")
    run("prepare.py", *args, f"--data_dir={tmp_path / 'whole'}")
    rng, out, made = random.Random(0), tmp_path / "killed", {}
    for finished in range(3):  # killed early, after one shard, after two
        process = start(*command("prepare.py", *args, f"--data_dir={out}"), stdout=subprocess.PIPE)
        while process.poll() is None and len(list(out.glob("shard-*.json"))) < finished:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        for path in out.glob("shard-*.json"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
            assert made.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "made twice"
    printed = run("prepare.py", *args, f"--data_dir={out}")
    assert contents(out) == contents(tmp_path / "whole")
    assert printed.count("there already") == len(made) >= 2


def test_two_prepare_different_shards_at_once(data, tmp_path):
    for number in range(2):
        talk(tmp_path / f"{number}.jsonl", number, 5000)
    args = (f"--source={tmp_path}/*.jsonl", f"--tokenizer={data / 'tokenizer.json'}")
    run("prepare.py", *args, f"--data_dir={tmp_path / 'one'}")
    both = [start(*command("prepare.py", *args, f"--data_dir={tmp_path / 'two'}", f"--shards={n}")) for n in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ---- Security


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_executed(own_run, data, tmp_path):
    written = tmp_path / "written"
    checkpoint = own_run / "checkpoint-000040"
    torch.save({"step": 40, "rng": Evil(written)}, checkpoint / "trainer_state.pt")
    torch.load(checkpoint / "trainer_state.pt", weights_only=False)
    assert written.exists(), "the pickle is harmless, so this test shows nothing"
    written.unlink()
    assert "trainer_state.pt cannot be read" in refuse_resume(data, own_run)
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(written)))
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused("sample.py", f"--model={checkpoint}")
    assert not written.exists()
