"""What is on the disk: whole after a power cut, of one writer, and continued with the current settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from plumbing.checkpoint import load_state, restore

import pytest
import torch
from conftest import ROOT, environment, metrics, refused, run, sentences
from test_faults import arguments, start, wait_for, weights
from test_train import values

import train
from model import SmolLM2, SmolLM2Config

# ---- Power cuts

SYNCED = """
import os, runpy, sys
fsync, replace, synced, open_names = os.fsync, os.replace, set(), []
def name(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")
def note_sync(descriptor):
    fsync(descriptor)
    synced.add(name(descriptor))
    if open_names and name(descriptor) == os.path.dirname(open_names[-1]):
        print(f"SAFE {os.path.basename(open_names.pop())}\\n", end="", flush=True)
def check_replace(source, target):
    source, target = os.path.abspath(source), os.path.abspath(target)
    inside = [os.path.join(source, name) for name in os.listdir(source)] if os.path.isdir(source) else []
    for path in [source, *inside]:
        assert path in synced, f"{path} is renamed before it is on the disk"
    replace(source, target)
    assert not open_names, f"the name {open_names} is not on the disk"
    open_names.append(target)
os.fsync, os.replace = note_sync, check_replace
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
assert not open_names, f"the name {open_names} is not on the disk"
"""


def test_content_is_on_the_disk_before_the_name_and_then_the_name(corpus, data, tmp_path):
    (tmp_path / "synced.py").write_text(SYNCED)

    def safe(*args):
        command = [sys.executable, tmp_path / "synced.py", *map(str, args)]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {line.split()[1] for line in done.stdout.splitlines() if line.startswith("SAFE")}

    prepared = safe("prepare.py", f"--source={corpus}", f"--data_dir={tmp_path / 'data'}", "--tokenizer=train:300")
    assert prepared == {"tokenizer.json", "train-00000.bin", "val-00000.bin", "shard-00000.json"}
    trained = safe("train.py", *arguments(data, tmp_path / "out", "--max_steps=2", "--save_interval=1"))
    assert trained == {"metrics.jsonl", "checkpoint-000001", "checkpoint-000002"}


# ---- One writer


def test_two_runs_in_one_folder(data, tmp_path):
    args = arguments(data, tmp_path, "--max_steps=100000", "--save_interval=2", "--resume=True")
    process = start(sys.executable, "train.py", *args, stdout=subprocess.PIPE)
    wait_for(process, "step 5/")
    assert "in use by another run" in refused("train.py", *args)
    process.kill()
    process.communicate()
    run("train.py", *args[:-3], "--max_steps=1", "--resume=True")  # the lock died with its owner


def test_a_lock_that_is_released_is_free(tmp_path):
    from plumbing.files import lock

    code = "import sys; from plumbing.files import lock; lock(sys.argv[1], 'taken')"
    another = [sys.executable, "-c", code, tmp_path / "lock"]
    release = lock(tmp_path / "lock", "taken")
    assert subprocess.run(another, cwd=ROOT, capture_output=True, text=True).stderr == "taken\n"
    release()
    assert not (tmp_path / "lock").exists()
    assert subprocess.run(another, cwd=ROOT).returncode == 0
    lock(tmp_path / "lock", "taken")()


def test_two_prepare_the_same_shard(data, tmp_path):
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(60_000)))
    args = (f"--source={talk}", f"--tokenizer={data / 'tokenizer.json'}", f"--data_dir={tmp_path / 'out'}")
    process = start(sys.executable, "prepare.py", *args)
    while not list(tmp_path.glob("out/train-*.tmp")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGSTOP)
    try:
        assert "another process prepares" in refused("prepare.py", *args)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "train-00000.bin",
        "val-00000.bin",
        "shard-00000.json",
    }


def test_two_train_a_tokenizer(corpus, tmp_path):
    import fcntl

    args = (f"--source={corpus}", f"--data_dir={tmp_path}", "--tokenizer=train:300")
    with open(tmp_path / "tokenizer.json.lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process trains" in refused("prepare.py", *args)
    run("prepare.py", *args)
    assert "has 300 tokens" in refused("prepare.py", *args[:2], "--tokenizer=train:310")


# ---- Continued with other settings


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of two steps, to be continued."""
    out = tmp_path_factory.mktemp("begun") / "run"
    run("train.py", *arguments(data, out, "--max_steps=2", "--weight_decay=0.1", "--optimizer=muon"))
    return out


@pytest.fixture(scope="module")
def continue_it(begun, data, tmp_path_factory):
    """Continue it for two steps with some settings: the folder, and what was printed."""
    known = {}

    def continued(*args):
        if args not in known:
            out = Path(shutil.copytree(begun, tmp_path_factory.mktemp("continued") / "run"))
            always = ("--max_steps=4", "--weight_decay=0.1", "--optimizer=muon", "--resume=True")
            known[args] = out, run("train.py", *arguments(data, out, *always, *args))
        return known[args]

    return continued


@pytest.mark.parametrize(
    "argument",
    ["--learning_rate=0.02", "--weight_decay=0.9", "--grad_clip=0.01", "--warmup_steps=9", "--decay_steps=3"],
)
def test_what_changes_the_weights_may_change(argument, continue_it):
    assert weights(continue_it(argument)[0], 4) != weights(continue_it()[0], 4)


def test_weight_decay_is_that_of_today(begun, continue_it):
    """From one state and gradient on, a step with more decay is shorter by rate x decay x weight."""
    before, decayed, kept = (
        SmolLM2.from_pretrained(folder).model["embed_tokens"].weight
        for folder in (begun, continue_it("--max_steps=3", "--weight_decay=0.9")[0], continue_it("--max_steps=3")[0])
    )
    assert torch.allclose(kept - decayed, 0.01 * (0.9 - 0.1) * before, atol=1e-6)
    assert (kept - decayed).abs().max() > 1e-4


@pytest.mark.parametrize(
    "argument", ["--micro_batch=2", "--recompute_activations=True", "--verify_data=True", "--timeout=9"]
)
def test_what_changes_only_the_rounding_may_change(argument, continue_it):
    changed, plain = (values(continue_it(*args)[0], "loss") for args in ((argument,), ()))
    assert changed == pytest.approx(plain, rel=1e-4)


def test_what_is_logged_may_change(continue_it):
    plain, printed = continue_it("--log_interval=3", "--eval_interval=1", "--eval_tokens=64", "--sample_interval=1")
    assert "step 3/" in printed and printed.count("Once upon a time") == 2
    assert set(values(plain, "val_loss")) == {0, 2, 3, 4}
    few, many = (values(out, "val_loss")[4] for out in (plain, continue_it()[0]))
    assert few != many


def test_what_is_saved_may_change(continue_it):
    out, _ = continue_it("--save_interval=1", "--keep_checkpoints=3")
    assert sorted(path.name[-1] for path in out.glob("checkpoint-*")) == ["2", "3", "4"]


def test_repeat_steps_must_stay(begun, data):
    args = arguments(data, begun, "--max_steps=4", "--weight_decay=0.1", "--optimizer=muon", "--resume=True")
    assert "repeat_steps" in refused("train.py", *args, "--repeat_steps=1")


def test_the_trainers_state_is_given_away_when_it_is_restored(begun):
    (checkpoint,) = begun.glob("checkpoint-*")
    state = load_state(checkpoint, "cuda")  # mapped, not read
    settings = train.Settings(optimizer="muon", weight_decay=0.7)
    fields = json.loads((checkpoint / "config.json").read_text())
    config = SmolLM2Config(**{name: fields[name] for name in vars(SmolLM2Config())})
    optimizers = train.make_optimizers(SmolLM2(config), settings, torch.float32)
    assert restore(state, optimizers, torch.amp.GradScaler("cpu", enabled=False)) is False
    assert not state
    decays = {group["weight_decay"] for optimizer in optimizers for group in optimizer.param_groups}
    assert decays == {0.7, 0.0}
    for optimizer in optimizers:
        assert len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups)


# ---- Continued with other data


def test_bins_that_were_made_again_are_the_same_data(corpus, data, tmp_path):
    """The source was touched, and another shard arrived: the batches are those of before."""
    source, folder = tmp_path / "talk.jsonl", tmp_path / "data"
    shutil.copy(corpus, source)
    args = (
        f"--source={source}",
        f"--data_dir={folder}",
        f"--tokenizer={data / 'tokenizer.json'}",
        "--val_fraction=0.1",
    )
    run("prepare.py", *args)
    for out in ("parts", "whole"):
        steps = 2 if out == "parts" else 4
        run("train.py", *arguments(folder, tmp_path / out, f"--max_steps={steps}"))
    os.utime(source, (1, 1))
    assert "revision" in refused("prepare.py", *args)
    (folder / "shard-00000.json").unlink()
    run("prepare.py", *args)
    for path in folder.glob("*-00000.*"):
        shutil.copy(path, folder / path.name.replace("00000", "00001"))
    printed = run("train.py", *arguments(folder, tmp_path / "parts", "--max_steps=4", "--resume=True"))
    assert "left out: shard-00001.json\n" in printed
    assert weights(tmp_path / "parts", 4) == weights(tmp_path / "whole", 4)
    (folder / "shard-00000.json").unlink()
    assert "shard-00000.json" in refused(
        "train.py", *arguments(folder, tmp_path / "parts", "--max_steps=5", "--resume=True")
    )


def test_a_tokenizer_that_did_not_make_the_bins(data, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    (folder / "tokenizer.json").write_text((data / "tokenizer.json").read_text() + "\n")
    assert "not the one that the bins were made with" in refused("train.py", *arguments(folder, tmp_path / "out"))


# ---- Standard output


def test_a_full_disk_under_standard_output_costs_the_lines_only(data, tmp_path):
    with open("/dev/full", "w") as full:
        args = arguments(data, tmp_path, "--max_steps=4", "--save_interval=1", "--sample_interval=1")
        process = start(sys.executable, "train.py", *args, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=60)[1]
    assert (process.returncode, errors) == (0, "")
    assert metrics(tmp_path)[-1]["step"] == 4 and weights(tmp_path, 4)


def test_nobody_reads_to_the_end(trained):
    pipeline = f"{sys.executable} sample.py --model={trained} --max_new_tokens=90 --seed=3 | head -c 5"
    done = subprocess.run(pipeline, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (len(done.stdout), done.stderr) == (5, "")


# ---- What is counted


def test_repeated_steps_are_passes_over_little(data, tmp_path):
    args = arguments(data, tmp_path, "--repeat_steps=2", "--resume=True")
    for steps in (3, 6):
        run("train.py", *args, f"--max_steps={steps}")
    assert values(tmp_path, "unique_tokens") == dict(enumerate([0, 256, 512, 512, 512, 512, 512]))
    assert values(tmp_path, "epoch")[6] == pytest.approx(3)


def test_every_step_is_in_the_file_and_few_on_the_screen(data, tmp_path):
    printed = run("train.py", *arguments(data, tmp_path, "--max_steps=9", "--log_interval=4"))
    assert list(values(tmp_path, "loss")) == list(range(1, 10))
    assert [line.split("/")[0] for line in printed.splitlines() if line.startswith("step ")] == [
        f"step {step}" for step in (0, 1, 4, 8, 9)
    ]
    assert "left" in printed
