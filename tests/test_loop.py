"""The loop against a second one, written here with transformers' model and plain PyTorch; and what it may never do."""

import math
import subprocess
import sys
from types import SimpleNamespace

from plumbing import metrics as plumbing_metrics
from plumbing.bins import open_corpus

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, run
from safetensors.torch import load_file
from test_faults import arguments
from test_train import trainer, values, write_shard
from transformers import AutoModelForCausalLM

from model import SmolLM2

RATE, DECAY = 0.01, 0.3


def reference(folder, data, steps, grad_clip, batch=8):
    """The losses, gradient norms and final weights of AdamW on transformers' model, a window at a time."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    matrices, norms = ([p for p in theirs.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    windows, losses, lengths = open_corpus(data, 32, 0, 32).train, [], []
    for step in range(steps):
        rate = RATE * min(1, (step + 1) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(0.0)
        for index in range(step * batch, step * batch + batch):
            window = torch.tensor(np.array(windows[index]).astype(np.int64))
            logits = theirs(window[None, :-1]).logits[0]
            loss = sum(-logits[t].log_softmax(-1)[window[t + 1]] for t in range(32)) / 32 / batch
            loss.backward()
            losses[-1] += loss.item()
        squares = sum((p.grad**2).sum().item() for p in theirs.parameters())
        lengths.append(math.sqrt(squares))
        for parameter in theirs.parameters():
            parameter.grad *= min(1, grad_clip / lengths[-1])
        optimizer.step()
        optimizer.zero_grad()
    return losses, lengths, theirs.state_dict()


@pytest.mark.parametrize("grad_clip", [1e-4, 100.0])
def test_losses_norms_and_weights_are_those_of_a_second_loop(grad_clip, trained, data, tmp_path):
    """With gradients clipped to next to nothing, where AdamW's eps is seen, and not clipped at all."""
    torch.manual_seed(5)
    model = SmolLM2(SmolLM2.from_pretrained(trained).config)
    start = tmp_path / "start"
    model.save_pretrained(start)
    (start / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    args = f"--init_from={start}", f"--grad_clip={grad_clip}", f"--weight_decay={DECAY}", "--max_steps=8"
    trainer(data, tmp_path / "out", *args, "--micro_batch=2")
    losses, lengths, weights = reference(start, data, 8, grad_clip)
    assert list(values(tmp_path / "out", "loss").values()) == pytest.approx(losses, rel=1e-4)
    assert list(values(tmp_path / "out", "grad_norm").values()) == pytest.approx(lengths, rel=1e-3)
    for name, ours in load_file(tmp_path / "out" / "checkpoint-000008" / "model.safetensors").items():
        assert torch.allclose(ours, weights[name], atol=3e-5), name


@pytest.mark.parametrize("nproc", [0, 2])
def test_an_evaluation_is_the_mean_over_its_windows(nproc, trained, data, tmp_path):
    """Seven windows in micro-batches of four: the last is filled up, with a window of another loss."""
    args = f"--init_from={trained}", "--max_steps=1", "--learning_rate=1e-30", "--weight_decay=0"
    trainer(data, tmp_path, *args, "--eval_tokens=224", "--micro_batch=4", nproc=nproc)
    theirs = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000040")
    windows = open_corpus(data, 32, 0, 224).val
    assert len(windows) == 7
    with torch.no_grad():
        losses = [theirs(window[None], labels=window[None]).loss.item() for window in windows]
    assert np.std(losses) > 0.01
    assert values(tmp_path, "val_loss")[0] == pytest.approx(np.mean(losses), rel=1e-5)


def test_samples_differ_only_by_the_model(trained, data, tmp_path):
    still = (
        f"--init_from={trained}",
        "--learning_rate=1e-30",
        "--weight_decay=0",
        "--max_steps=3",
        "--sample_interval=1",
    )
    printed = trainer(data, tmp_path, *still, "--sample_prompt=7: ")
    samples = [part.split("\n\n")[0] for part in printed.split("\n\n7: ")[1:]]
    assert len(samples) == 3 and len(set(samples)) == 1
    other = trainer(data, tmp_path / "other", *still, "--seed=1")
    assert samples[0] not in other


def test_unique_tokens_stop_where_the_text_comes_again(data, tmp_path):
    pattern = np.tile(np.arange(20, 60), 50)
    write_shard(tmp_path, 0, pattern, pattern[:400], 64, data / "tokenizer.json")
    trainer(tmp_path, tmp_path / "out", "--max_steps=10")
    assert values(tmp_path / "out", "tokens")[10] == 2560
    seen = [0, 256, 512, 768, 1024, 1280, 1536, 1792, 1952, 1952, 1952]  # 61 windows of 32, and room for the offset
    assert list(values(tmp_path / "out", "unique_tokens").values()) == seen
    assert values(tmp_path / "out", "epoch")[10] == pytest.approx(2560 / 1952)


def test_no_checkpoint_is_saved_after_a_step_that_was_bad(trained, data, tmp_path):
    model = SmolLM2.from_pretrained(trained)
    with torch.no_grad():
        model.model.norm.weight *= 100
    model.save_pretrained(tmp_path / "loud")
    settings = ["--dtype=float16", "--max_steps=20", "--save_interval=1", "--keep_checkpoints=99"]
    printed = run("train.py", *arguments(data, tmp_path / "out", *settings, f"--init_from={tmp_path / 'loud'}"))
    bad = {int(line.split()[1]) for line in printed.splitlines() if "is skipped" in line}
    saved = {int(path.name[11:]) for path in (tmp_path / "out").glob("checkpoint-*")}
    assert bad and saved == set(range(1, 21)) - bad
    resumed = ["--dtype=float16", "--max_steps=22", "--resume=True", f"--init_from={tmp_path / 'loud'}"]
    assert "is skipped" not in run("train.py", *arguments(data, tmp_path / "out", *resumed))  # the scale is known


def test_mfu_is_of_all_devices(monkeypatch, tmp_path):
    """1000 tokens of a million operations each in 2 s are 0.5 Gflop/s, of four devices with 1 Tflop/s each."""
    monkeypatch.setattr(plumbing_metrics, "peak_flops", lambda device: 1e12)
    lines = []
    ranks = SimpleNamespace(rank=0, size=4, say=lines.append)
    settings = SimpleNamespace(
        out_dir=str(tmp_path), batch_tokens=1000, repeat_steps=None, log_to="none", log_interval=1, max_steps=9
    )
    log = plumbing_metrics.Log(settings, ranks, SimpleNamespace(per_epoch=9, seq_len=1000), None, 1e6)
    log.timed(2.0)
    log(1, 5.0, 0.1, 1.0)
    assert "1 Tflop/s" in lines[0] and "by half" in lines[0]
    assert values(tmp_path, "tokens_per_second")[1] == 500
    assert values(tmp_path, "mfu")[1] == pytest.approx(0.5e9 / 4e12)


def test_a_line_of_metrics_that_cannot_be_written_is_said_and_lost(tmp_path, capsys):
    ranks = SimpleNamespace(rank=0, size=1)
    settings = SimpleNamespace(
        out_dir=str(tmp_path), batch_tokens=1000, repeat_steps=None, log_to="none", log_interval=1, max_steps=9
    )
    log = plumbing_metrics.Log(settings, ranks, SimpleNamespace(per_epoch=9, seq_len=1000), torch.device("cpu"), 1e6)
    log.path.unlink()
    log.path.mkdir()
    log(1, 5.0, 0.1, 1.0)
    assert "metrics.jsonl could not be written: Is a directory" in capsys.readouterr().out
    log.path.rmdir()
    log(2, 4.0, 0.1, 1.0)
    assert values(tmp_path, "loss") == {2: 4.0}


COUNTED = """
import runpy, sys
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
create, exchanges = DistributedDataParallel.__init__, []
def created(self, *args, **options):
    create(self, *args, **options)
    self.register_comm_hook(None, lambda state, bucket: (exchanges.append(1), allreduce_hook(None, bucket))[1])
DistributedDataParallel.__init__ = created
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
print("exchanges", len(exchanges))
"""


def test_ranks_exchange_gradients_once_a_step(data, tmp_path):
    (tmp_path / "counted.py").write_text(COUNTED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [*SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}", "--max_steps=3", "--micro_batch=1"]
    done = subprocess.run(
        [*launcher, tmp_path / "counted.py", "train.py", *args],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "exchanges 3" in done.stdout  # one bucket; each rank has four micro-batches
