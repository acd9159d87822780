"""What is on the disk: whole after a power cut, of one writer, and continued with the current settings."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from plumbing.checkpoint import Saver, load_state, restore
from plumbing.files import locked

import pytest
import torch
from conftest import preparing, refused, run
from runs import (
    arguments,
    assert_same_run,
    loadable_checkpoints,
    refused_here,
    second_shard,
    start_training,
    train_here,
    values,
    weights,
)

import train
from model import SmolLM2

# ---- Several writers


def test_only_the_first_rank_removes_old_checkpoints(tmp_path):
    names = [f"checkpoint-00000{step}" for step in (1, 2, 3)]
    for name in names:
        (tmp_path / name).mkdir()
    for rank, left in ((1, names), (0, names[1:])):
        ranks, settings = SimpleNamespace(rank=rank), train.Settings(out_dir=str(tmp_path))
        Saver(settings, 1, "scratch", ranks, None, None, [], None)
        assert sorted(path.name for path in tmp_path.iterdir()) == left


# ---- Power cuts

CHECKED = """
import atexit, os
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
atexit.register(lambda: print("LATE" if open_names else ""))
"""


def test_content_is_on_the_disk_before_the_name_and_then_the_name(corpus, data, tmp_path):
    def safe(*args):
        printed = run("tests/patched.py", CHECKED, *args)
        assert "LATE" not in printed
        return {line.split()[1] for line in printed.splitlines() if line.startswith("SAFE")}

    prepared = safe("prepare.py", *preparing(corpus, tmp_path / "data"))
    assert prepared == {"tokenizer.json", "train-00000.bin", "val-00000.bin", "shard-00000.json"}
    trained = safe("train.py", *arguments(data, tmp_path / "out", "--max_steps=2", "--save_interval=1"))
    assert trained == {"metrics.jsonl", "checkpoint-000001", "checkpoint-000002"}


# ---- One writer


def test_two_runs_in_one_folder(data, tmp_path):
    args = "--save_interval=2", "--resume=True"
    process = start_training(data, tmp_path, "--max_steps=100000", *args, until="step 5/")
    assert "in use by another run" in refused_here(data, tmp_path, *args)
    process.kill()
    process.communicate()
    train_here(data, tmp_path, "--max_steps=1", *args)  # the lock died with its owner


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("tokenizer.json", "another process trains"), ("shard-00000.json", "another process prepares")],
)
def test_two_prepare_the_same_shard_or_tokenizer(name, sentence, corpus, tmp_path):
    with locked(tmp_path / f"{name}.lock", "taken"):
        assert sentence in refused("prepare.py", *preparing(corpus, tmp_path))
    assert not (tmp_path / name).exists()


# ---- Continued with other settings


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of two steps, to be continued."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train_here(data, out, "--max_steps=2", "--weight_decay=0.1", "--optimizer=muon")
    return out


@pytest.fixture
def continued(begun, data, tmp_path):
    """Continue a copy of it, for two steps or as the arguments say: the folder, and what was printed."""

    def go_on(*args):
        out = Path(shutil.copytree(begun, tmp_path / "_".join(("run", *args))))
        always = "--max_steps=4", "--weight_decay=0.1", "--optimizer=muon", "--resume=True"
        return out, train_here(data, out, *always, *args)

    return go_on


def test_what_changes_the_weights_may_change(continued):
    plain, _ = continued()
    rates = "learning_rate=0.02", "warmup_steps=9", "decay_steps=3"
    for argument in (*rates, "weight_decay=0.9", "grad_clip=0.01", "dtype=float16"):
        assert weights(continued(f"--{argument}")[0], 4) != weights(plain, 4), argument


def test_what_changes_only_the_rounding_may_change(continued):
    plain = values(continued()[0], "loss")
    for argument in ("micro_batch=2", "recompute_activations=True", "verify_data=True", "timeout=9"):
        assert values(continued(f"--{argument}")[0], "loss") == pytest.approx(plain, rel=1e-4)


def test_what_is_logged_and_saved_may_change(continued):
    out, printed = continued(
        "--log_interval=3", "--eval_interval=1", "--eval_tokens=64", "--sample_interval=1", "--save_interval=1",
        "--keep_checkpoints=3",
    )  # fmt: skip
    assert "step 3/" in printed and printed.count("Once upon a time") == 2
    assert set(values(out, "val_loss")) == {0, 2, 3, 4}
    assert values(out, "val_loss")[4] != values(continued()[0], "val_loss")[4]
    assert loadable_checkpoints(out) == [2, 3, 4]


def test_the_trainers_state_is_given_away_when_it_is_restored(begun):
    (checkpoint,) = begun.glob("checkpoint-*")
    state = load_state(checkpoint, "cuda")  # mapped, not read
    settings = train.Settings(optimizer="muon", weight_decay=0.7)
    optimizers = train.make_optimizers(SmolLM2.from_pretrained(checkpoint), settings, torch.float32)
    assert restore(state, optimizers, torch.amp.GradScaler("cpu", enabled=False)) is False
    assert not state


def test_bins_that_were_made_again_are_the_same_data(corpus, tokenizer, tmp_path):
    """The source was touched, and another shard arrived: the batches are those of before."""
    source, folder = Path(shutil.copy(corpus, tmp_path)), tmp_path / "data"
    args = preparing(source, folder, tokenizer, "--val_fraction=0.1")
    run("prepare.py", *args)
    train_here(folder, tmp_path / "parts", "--max_steps=2")
    train_here(folder, tmp_path / "whole", "--max_steps=4")
    os.utime(source, (1, 1))
    (folder / "shard-00000.json").unlink()
    run("prepare.py", *args)
    second_shard(folder, folder)
    printed = train_here(folder, tmp_path / "parts", "--max_steps=4", "--resume=True")
    assert "left out: shard-00001.json\n" in printed
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    path = folder / "shard-00000.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    for change in (lambda: None, path.unlink):
        change()
        sentence = refused_here(folder, tmp_path / "parts", "--max_steps=5", "--resume=True")
        assert "shard-00000.json, train has" in sentence
