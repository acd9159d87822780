"""What a long run survives: killed, stopped, hung, without disk, on damaged files. Each fault is a real one."""

import contextlib
import ctypes
import gc
import json
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path

from plumbing.metrics import Log

import pytest
import torch
from conftest import command, environment, metrics, preparing, run, sentences, write_jsonl
from filelock import FileLock
from runs import (
    arguments,
    assert_same_run,
    child_of,
    loadable_checkpoints,
    numbers,
    on_slow_disk,
    prepare_here,
    refused_by,
    refused_here,
    second_shard,
    start,
    start_training,
    train_here,
    values,
    wait_for,
    weights,
)

from model import SmolLM2

KILLS = int(os.environ.get("KILLS", 8))

# ---- Killed and restarted


# A model large enough for several of DDP's buckets, where its compiler would cut a layer.
LARGER = "--model.hidden_size=256 --model.intermediate_size=1024"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "nproc"),
    [("--dtype=float16 --optimizer=muon", 0), ("--dtype=bfloat16 --compile=True", 0),
     (f"--dtype=bfloat16 --compile=True {LARGER}", 2)],
)  # fmt: skip
def test_resume_is_bitwise(variant, nproc, data, tmp_path):
    """Over the end of an epoch, with accumulation."""
    variant = [*variant.split(), "--micro_batch=2", "--seq_len=64", "--batch_tokens=1024", "--resume=True"]
    for out, parts in (("whole", [40]), ("parts", [15, 40])):
        for steps in parts:
            run("train.py", *arguments(data, tmp_path / out, f"--max_steps={steps}", *variant), nproc=nproc)
    assert numbers(tmp_path / "whole")[-1]["epoch"] > 1
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_any_moment(data, tmp_path):
    """SIGKILL at random times, half of them while a save is under way; then the weights of an undisturbed run."""
    rng, out, inside = random.Random(KILLS), tmp_path / "killed", 0
    args = f"--max_steps={20 * KILLS}", "--save_interval=5", "--resume=True"
    for kill in range(KILLS):
        process = start(*on_slow_disk(0.05, *arguments(data, out, *args)))
        wait_for(process, "sequences of")
        while kill % 2 and not list(out.glob("checkpoint-*.tmp")) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3 if kill % 2 else 2))
        process.kill()
        process.communicate()
        inside += bool(list(out.glob("checkpoint-*.tmp")))
        loadable_checkpoints(out)
    assert inside, "no kill hit a save"
    for folder in (out, tmp_path / "whole"):
        train_here(data, folder, *args)
    assert_same_run(out, tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun(data, tmp_path):
    args = "--max_steps=400", "--save_interval=10", "--micro_batch=2", "--resume=True"
    launcher = command("train.py", *arguments(data, tmp_path / "killed", *args), nproc=2)
    launcher.insert(launcher.index("train.py"), "--max-restarts=2")
    process = start(*launcher, env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1))  # as the README says
    wait_for(process, "step 25/")
    os.kill(child_of(process, rank=1), signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed from" in printed
    run("train.py", *arguments(data, tmp_path / "whole", *args), nproc=2)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_hung_rank_ends_the_job(data, tmp_path):
    args = "--max_steps=100000", "--micro_batch=2", "--timeout=3"
    process = start_training(data, tmp_path, *args, nproc=2, until="step 5/")
    os.kill(child_of(process, rank=1), signal.SIGSTOP)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "--timeout=3" in errors


# ---- Asked to stop


def test_asked_to_stop_it_saves_and_leaves_and_evaluates_when_it_continues(data, tmp_path):
    """Each step ends with an evaluation, which a stop leaves out, and with a sample."""
    args = "--eval_interval=1", "--sample_interval=1", "--sample_prompt=9: ", "--resume=True"
    process = start_training(data, tmp_path, *args, "--max_steps=100000", until="step 5/")
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    (last,) = loadable_checkpoints(tmp_path)
    assert metrics(tmp_path)[-1]["step"] == last < 1000
    assert last not in values(tmp_path, "val_loss")
    assert printed.split(f"step {last}/")[1].count("9: ") == 1, "the sample of the last step"
    for _ in range(2):  # the second time, nothing is left to do
        train_here(data, tmp_path, *args, f"--max_steps={last + 1}")
        assert [line["step"] for line in metrics(tmp_path) if "val_loss" in line] == list(range(last + 2))


def test_all_ranks_stop_at_one_step(data, tmp_path):
    """One of them is told; all stop, and the job ends well."""
    process = start_training(data, tmp_path, "--max_steps=100000", "--micro_batch=2", nproc=2, until="step 5/")
    os.kill(child_of(process, rank=1), signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(loadable_checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_a_signal_to_launcher_and_ranks_at_once_is_one(data, tmp_path):
    """As a terminal, systemd and Slurm send it; torchrun sends it on to the ranks, which then have it twice."""
    slow = "--max_steps=1000", "--batch_tokens=262144", "--eval_tokens=32"  # seconds for a step
    process = start_training(data, tmp_path, *slow, nproc=2, until="step 1/")
    before = time.monotonic()
    for receiver in (child_of(process, rank=0), child_of(process, rank=1), process.pid):
        os.kill(receiver, signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - before > 0.5, "the step was over too soon to be disturbed"
    assert len(loadable_checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_a_second_interrupt_of_a_person_stops_at_once(data, tmp_path):
    slow = "--max_steps=1000", "--batch_tokens=33554432", "--eval_tokens=32"  # minutes for a step
    process = start_training(data, tmp_path, *slow, until="step 0/")
    for pause in (0.5, 2.5):
        time.sleep(pause)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert "--resume=True continues" in errors and "Traceback" not in errors


def test_a_signal_after_the_end_changes_nothing(data, tmp_path):
    """A launcher sends on what the terminal has sent already."""
    late = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    run("tests/patched.py", late, "train.py", *arguments(data, tmp_path, "--max_steps=1"))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_however_main_ends_the_process_is_as_before(error, data, tmp_path, monkeypatch):
    """Ctrl-C works, the folder is free, but not before the save in the thread is done, and memory can be freed."""
    handlers, frozen, fsync, log = [], [], os.fsync, Log.__call__
    args = "--max_steps=2", "--save_interval=1", "--resume=True", "--deterministic=True"

    def interrupted(self, step, *args, **evaluation):
        log(self, step, *args, **evaluation)
        handlers.append(signal.getsignal(signal.SIGINT))
        frozen.append(gc.get_freeze_count())
        if error and step == 2:
            raise error

    monkeypatch.setattr(Log, "__call__", interrupted)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.05), fsync(descriptor)))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) if error else contextlib.nullcontext():
        train_here(data, tmp_path, *args)
    assert handlers[0] != before[0] and (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert loadable_checkpoints(tmp_path) == ([1] if error else [1, 2])
    assert max(frozen) > 0 and gc.get_freeze_count() == 0 and not torch.are_deterministic_algorithms_enabled()
    with FileLock(tmp_path / ".lock", timeout=0):
        pass
    monkeypatch.undo()
    train_here(data, tmp_path, *args, "--max_steps=3")
    assert loadable_checkpoints(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    ("script", "slow", "status", "said"),
    [("train.py", "plumbing.corpus.open_bins", 1, "stopped; --resume=True continues from the newest checkpoint\n"),
     ("sample.py", "model.SmolLM2.from_pretrained", 130, "")],
)  # fmt: skip
def test_an_interrupt_before_it_begins(script, slow, status, said, data, trained, tmp_path):
    args = {"train.py": arguments(data, tmp_path), "sample.py": [f"--model={trained}"]}[script]
    code = f"import model, plumbing.corpus, time; {slow} = lambda *_: (print('here', flush=True), time.sleep(60))"
    process = start(*command("tests/patched.py", code, script, *args))
    wait_for(process, "here")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == said
    assert process.returncode == status


# ---- A full disk


def with_room_for(size, script, *args):
    """Run a script that can write no file longer than so many bytes, as on a disk that is full after so many."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # noqa: E731
    process = start(*command(script, *args), preexec_fn=limit)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    return printed, errors


@pytest.mark.slow
def test_no_room_for_a_checkpoint(data, tmp_path):
    train_here(data, tmp_path, "--max_steps=5")
    before = weights(tmp_path, 5)
    for size in (30_000, len(before) + 1000):  # full in the middle of the weights; of the trainer's state
        args = arguments(data, tmp_path, "--max_steps=9", "--save_interval=2", "--resume=True")
        printed, errors = with_room_for(size, "train.py", *args)
        assert "checkpoint-000006 could not be saved" in errors
        assert "step 9/9" in printed, "it did not go on"
        assert loadable_checkpoints(tmp_path) == [5] and weights(tmp_path, 5) == before
        assert not list(tmp_path.glob("*.tmp"))


def test_no_room_for_a_shard(corpus, tokenizer, tmp_path):
    args = preparing(corpus, tmp_path / "out", tokenizer)
    assert "shard 00000 could not be written" in with_room_for(40_000, "prepare.py", *args)[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]
    other = preparing(corpus, tmp_path / "other", tokenizer)
    with_room_for(4000, "prepare.py", *other)  # not even for the tokenizer
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("script", "output", "left"),
    [("train.py", ">/dev/full", "checkpoint-000002"), ("train.py", ">&-", "checkpoint-000002"),
     ("prepare.py", ">/dev/full", "shard-00000.json"), ("prepare.py", "2>&-", "shard-00000.json"),
     ("sample.py", "| head -c 5", "")],
)  # fmt: skip
def test_output_that_cannot_be_printed_costs_the_lines_only(script, output, left, corpus, data, trained, tmp_path):
    args = {
        "train.py": arguments(data, tmp_path, "--max_steps=2", "--save_interval=1", "--sample_interval=1"),
        "prepare.py": preparing(corpus, tmp_path),
        "sample.py": [f"--model={trained}", "--max_new_tokens=90"],
    }
    process = start("bash", "-c", f"{shlex.join(command(script, *args[script]))} {output}")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0 and (tmp_path / left).exists()


# ---- Places where nothing can be written


def without_root():
    """Even root needs permission then: no CAP_DAC_OVERRIDE, no CAP_DAC_READ_SEARCH."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability)


def sentence_without_permission(script, *args):
    process = start(*command(script, *args), preexec_fn=without_root)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and len(errors.splitlines()) == 1, errors
    return errors


def test_folders_and_files_without_permission(corpus, data, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    out = tmp_path / "closed" / "out"
    said = f"={out} is not a folder that can be written: Permission denied."
    assert f"--data_dir{said}" in sentence_without_permission("prepare.py", *preparing(corpus, out))
    assert f"--out_dir{said}" in sentence_without_permission("train.py", *arguments(data, out))
    unreadable = Path(shutil.copytree(data, tmp_path / "data")) / "train-00000.bin"
    unreadable.chmod(0o000)
    args = arguments(unreadable.parent, tmp_path / "out")
    assert sentence_without_permission("train.py", *args) == f"{unreadable}: Permission denied\n"
    args = preparing(corpus, tmp_path / "out", unreadable)
    assert f"{unreadable}: Permission denied" in sentence_without_permission("prepare.py", *args)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_a_folder(corpus, data, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        said = f"={path} is not a folder that can be written: "
        assert f"--data_dir{said}" in refused_by(prepare_here, *preparing(corpus, path))
        assert f"--out_dir{said}" in refused_here(data, path)


# ---- Loss or gradient NaN or infinite


def test_steps_without_numbers_are_skipped_not_saved_and_the_run_goes_on(trained, data, tmp_path):
    """Gradients too large for float16, until the scaler has found a scale for them."""
    model = SmolLM2.from_pretrained(trained)
    with torch.no_grad():
        model.model.norm.weight *= 100
    model.save_pretrained(tmp_path / "loud")
    args = "--dtype=float16", f"--init_from={tmp_path / 'loud'}", "--save_interval=1", "--keep_checkpoints=99"
    printed = train_here(data, tmp_path / "out", "--max_steps=30", *args)
    bad = {int(line.split()[1]) for line in printed.splitlines() if "is skipped" in line}
    assert bad and loadable_checkpoints(tmp_path / "out") == sorted({*range(1, 31)} - bad)
    assert metrics(tmp_path / "out")[-1]["val_loss"] < metrics(tmp_path / "out")[0]["val_loss"]
    assert all(parameter.isfinite().all() for parameter in SmolLM2.from_pretrained(tmp_path / "out").parameters())
    resumed = train_here(data, tmp_path / "out", "--max_steps=32", "--resume=True", *args)
    assert "is skipped" not in resumed, "the scale is forgotten"


def test_too_many_of_them_stop_the_run(data, tmp_path):
    train_here(data, tmp_path, "--max_steps=2")
    model = SmolLM2.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    model.save_pretrained(tmp_path / "checkpoint-000002")
    sentence = refused_here(data, tmp_path, "--max_steps=9", "--max_bad_steps=3", "--resume=True")
    assert "3 steps in a row" in sentence and "checkpoint-000002" in sentence


# ---- Damaged data


@pytest.fixture
def own_data(data, tmp_path):
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("train-00000.bin", lambda content: content[:-2], "train-00000.bin has"),
        ("train-00000.bin", lambda content: b"\x60\xea" * (len(content) // 2), "token 60000 beyond"),
        ("tokenizer.json", lambda content: content + b"\n", "not the one that the bins were made with"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("shard-00000.json", lambda content: b"{", "shard-00000.json is damaged"),
        ("shard-00000.json", lambda content: b'{"train": {"tokens": 3}}', "shard-00000.json is damaged"),
        ("shard-00000.json", None, "holds no shard"),
    ],
)
def test_damaged_data(name, change, sentence, own_data):
    """A file that is changed, or gone."""
    content = (own_data / name).read_bytes()
    (own_data / name).unlink()
    if change:
        (own_data / name).write_bytes(change(content))
    assert sentence in refused_here(own_data, own_data / "out")


def test_an_edited_bin_is_found_when_asked_for(own_data):
    content = bytearray((own_data / "val-00000.bin").read_bytes())
    content[100] ^= 1
    (own_data / "val-00000.bin").write_bytes(content)
    assert "val-00000.bin is not what" in refused_here(own_data, own_data / "out", "--verify_data=True")


def test_shards_of_different_tokenizers(own_data):
    second_shard(own_data, own_data)
    shard = json.loads((own_data / "shard-00000.json").read_text())
    (own_data / "shard-00001.json").write_text(json.dumps(shard | {"tokenizer_sha256": "other"}))
    assert "different tokenizers" in refused_here(own_data, own_data / "out")


def test_a_bin_without_its_json_is_left_out(own_data, data, tmp_path):
    second_shard(own_data, own_data)
    (own_data / "shard-00001.json").unlink()
    for folder, out in ((own_data, "more"), (data, "out")):
        train_here(folder, tmp_path / out, "--max_steps=2")
    assert_same_run(tmp_path / "more", tmp_path / "out")


def test_too_little_data(corpus, data, tokenizer, tmp_path):
    run("prepare.py", *preparing(corpus, tmp_path / "data", tokenizer), "--val_fraction=0")
    assert "no val bin" in refused_here(tmp_path / "data", tmp_path / "out")
    long = "--seq_len=65536", "--micro_batch=1", "--batch_tokens=65536"
    assert "no train bin" in refused_here(data, tmp_path / "out", *long)
    assert not (tmp_path / "out").exists()


# ---- Damaged checkpoints, and others than the run's


@pytest.fixture
def own_run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(own_run, data):
    args = "--max_steps=41", "--resume=True"
    for name in ("model.safetensors", "trainer_state.pt", "config.json"):
        path = own_run / "checkpoint-000040" / name
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"hello world " * 100):
            path.write_bytes(damaged)
            assert str(path) in refused_here(data, own_run, *args)
        path.unlink()
        assert str(path) in refused_here(data, own_run, *args)
        path.write_bytes(content)
    torch.save({"weights": torch.zeros(3)}, own_run / "checkpoint-000040" / "trainer_state.pt")
    assert "not the state of a trainer" in refused_here(data, own_run, *args)
    shutil.rmtree(own_run / "checkpoint-000040")
    assert "checkpoint-000020" in train_here(data, own_run, *args)


def test_settings_that_a_resumed_run_must_keep(trained, data):
    kept = dict(seed=1, seq_len=16, batch_tokens=512, optimizer="muon", repeat_steps=1) | {"model.hidden_size": 64}
    for name, value in kept.items():
        sentence = refused_here(data, trained, "--max_steps=50", "--resume=True", f"--{name}={value}")
        assert f"was trained with {name} = " in sentence and f"now it is {value}" in sentence


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_executed(own_run, data, tmp_path):
    written, checkpoint = tmp_path / "written", own_run / "checkpoint-000040"
    torch.save({"step": 40, "rng": Evil(written)}, checkpoint / "trainer_state.pt")
    torch.load(checkpoint / "trainer_state.pt", weights_only=False)
    assert written.exists(), "the pickle is harmless, so this test shows nothing"
    written.unlink()
    assert "trainer_state.pt cannot be read" in refused_here(data, own_run, "--resume=True")
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(written)))
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        SmolLM2.from_pretrained(checkpoint)
    assert not written.exists()


# ---- Preparing


def talk(folder, files, count):
    """Some jsonl files: a pattern for all of them."""
    for number in range(files):
        write_jsonl(folder / f"{number}.jsonl", sentences(count, number))
    return folder / "*.jsonl"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_prepare_killed_and_started_again(tokenizer, tmp_path):
    source, out, rng, made = talk(tmp_path, 3, 20_000), tmp_path / "killed", random.Random(0), {}
    run("prepare.py", *preparing(source, tmp_path / "whole", tokenizer))
    whole = contents(tmp_path / "whole")
    for finished in range(3):  # killed early, after one shard, after two
        process = start(*command("prepare.py", *preparing(source, out, tokenizer)))
        while process.poll() is None and len(list(out.glob("shard-*.json"))) < finished:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.communicate()
        for path in out.glob("shard-*.json"):
            assert path.read_bytes() == whole[path.name]
            assert made.setdefault(path, path.stat().st_mtime_ns) == path.stat().st_mtime_ns, "made twice"
    printed = run("prepare.py", *preparing(source, out, tokenizer))
    assert contents(out) == whole
    assert printed.count("there already") == len(made) >= 2


def test_two_prepare_different_shards_at_once(tokenizer, tmp_path):
    source, one, two = talk(tmp_path, 2, 5000), tmp_path / "one", tmp_path / "two"
    run("prepare.py", *preparing(source, one, tokenizer))
    both = [start(*command("prepare.py", *preparing(source, two, tokenizer), f"--shards={n}")) for n in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert contents(two) == contents(one)


# ---- Out of time

PATIENT = """
import os
from plumbing.ranks import StopSignal
if os.environ.get("RANK") == "0":
    StopSignal.asked = lambda self: self.signaled
"""


def test_out_of_time_it_stops_saved_and_the_schedule_continues(data, tmp_path):
    """Each part has time for one step."""
    args, over = ("--max_steps=3", "--decay_steps=2", "--resume=True"), "--max_minutes=1e-6"
    for part in (1, 2):
        assert f"stopped after step {part} of 3" in train_here(data, tmp_path / "parts", *args, over)
        assert loadable_checkpoints(tmp_path / "parts")[-1] == part
    for out in ("parts", "whole"):
        assert "stopped after" not in train_here(data, tmp_path / out, *args, "--max_minutes=1000")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_of_two_ranks_the_clock_of_one_ends_the_time(data, tmp_path):
    args = "--max_steps=3", "--max_minutes=1e-6", "--timeout=20", "--micro_batch=2"
    line = arguments(data, tmp_path / "ranks", *args)
    run("tests/patched.py", PATIENT, "train.py", *line, nproc=2)
    assert loadable_checkpoints(tmp_path / "ranks") == [1]
