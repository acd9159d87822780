"""The loop against a second one, written here with transformers' model and plain PyTorch; and what it counts."""

import math
from types import SimpleNamespace

from plumbing import metrics as plumbing_metrics
from plumbing.corpus import Mix, open_corpus

import numpy as np
import pytest
import torch
from conftest import run
from runs import arguments, train_here, values, write_shard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from model import SmolLM2

RATE, DECAY = 0.01, 0.3


def reference(folder, data, steps, grad_clip, batch=8):
    """The losses, gradient norms and final weights of AdamW on transformers' model, a sequence at a time."""
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    matrices, norms = ([p for p in theirs.parameters() if p.dim() == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    mix, losses, lengths = open_corpus(data, 32, 0, 32).train, [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 2)
        losses.append(0.0)
        for tokens in torch.tensor(mix.batch(step * batch, batch)[0]):
            logits = theirs(tokens[None, :-1]).logits[0]
            loss = sum(-logits[t].log_softmax(-1)[tokens[t + 1]] for t in range(32)) / 32 / batch
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
    train_here(data, tmp_path / "out", *args, "--micro_batch=2")
    losses, lengths, weights = reference(start, data, 8, grad_clip)
    assert list(values(tmp_path / "out", "loss").values()) == pytest.approx(losses, rel=1e-4)
    assert list(values(tmp_path / "out", "grad_norm").values()) == pytest.approx(lengths, rel=1e-3)
    for name, ours in load_file(tmp_path / "out" / "checkpoint-000008" / "model.safetensors").items():
        assert torch.allclose(ours, weights[name], atol=3e-5), name


# ---- Evaluations and samples

STILL = "--learning_rate=1e-30", "--weight_decay=0"


@pytest.mark.parametrize("nproc", [0, pytest.param(2, id="ranks")])
def test_an_evaluation_is_the_mean_over_its_sequences(nproc, trained, data, tmp_path):
    """Seven sequences in micro-batches of four: the last is filled up, and must not count what it is filled with."""
    args = f"--init_from={trained}", "--max_steps=1", *STILL, "--eval_tokens=224", "--micro_batch=4"
    run("train.py", *arguments(data, tmp_path, *args), nproc=nproc)
    theirs = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000040")
    sequences = torch.from_numpy(open_corpus(data, 32, 0, 224).val[data.name][0])
    assert len(sequences) == 7
    with torch.no_grad():
        losses = [theirs(tokens[None], labels=tokens[None]).loss.item() for tokens in sequences]
    assert np.std(losses) > 0.01
    assert values(tmp_path, "val_loss")[0] == pytest.approx(np.mean(losses), rel=1e-5)


# ---- What is counted


def test_unique_tokens_stop_where_the_text_comes_again(data, tmp_path):
    """In the second epoch; or, with --repeat_steps, after its steps, also where a resumed run goes on."""
    pattern = np.tile(np.arange(20, 60), 50)
    write_shard(tmp_path, pattern, pattern[:400], 64, data / "tokenizer.json")
    train_here(tmp_path, tmp_path / "epochs", "--max_steps=10")
    assert values(tmp_path / "epochs", "tokens")[10] == 2560
    seen = [0, 256, 512, 768, 1024, 1280, 1536, 1792, 1952, 1952, 1952]  # 61 sequences of 32, and room for the offset
    assert list(values(tmp_path / "epochs", "unique_tokens").values()) == seen
    assert values(tmp_path / "epochs", "epoch")[10] == pytest.approx(2560 / 1952)
    for steps in (3, 6):
        train_here(data, tmp_path / "steps", "--repeat_steps=2", "--resume=True", f"--max_steps={steps}")
    assert list(values(tmp_path / "steps", "unique_tokens").values()) == [0, 256, 512, 512, 512, 512, 512]
    assert values(tmp_path / "steps", "epoch")[6] == pytest.approx(3)


def log_of(out, said, device="cpu"):
    """The log of a run on four devices, for steps of 1000 tokens of a million operations each."""
    ranks = SimpleNamespace(rank=0, size=4, say=said.append)
    settings = train.Settings(out_dir=str(out), batch_tokens=1000, seq_len=1000, max_steps=9)
    mix = Mix({"": SimpleNamespace(per_epoch=9, seq_len=1000)}, [1])
    return plumbing_metrics.Log(settings, ranks, mix, torch.device(device), 1e6)


def test_mfu_is_of_all_devices(monkeypatch, tmp_path):
    """1000 tokens of a million operations each in 2 s are 0.5 Gflop/s, of four devices with 1 Tflop/s each."""
    monkeypatch.setattr(plumbing_metrics, "device_name", lambda device: "Abacus")
    monkeypatch.setattr(plumbing_metrics, "peak_flops", {"Abacus": 1e12}.get)
    said = []
    log = log_of(tmp_path, said, "cuda")
    log(1, 5.0, 0.1, 1.0, 9.0)  # the first step, which may have waited for the compiler, does not count
    log(2, 5.0, 0.1, 1.0, 2.0)
    assert "1 Tflop/s" in said[0] and "causal half" in said[0]
    assert values(tmp_path, "tokens_per_second") == {2: 500}
    assert values(tmp_path, "mfu")[2] == pytest.approx(0.5e9 / 4e12)


def test_lines_that_a_power_cut_left_behind_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\x00\n[]\n{"step": 2}\n{"step": 3}\n{"ste')
    plumbing_metrics.rewind(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_of_metrics_that_cannot_be_written_is_said_and_lost(tmp_path, capsys):
    log = log_of(tmp_path, [])
    log.path.unlink()
    log.path.mkdir()
    log(1, 5.0, 0.1, 1.0)
    assert "metrics.jsonl could not be written: Is a directory" in capsys.readouterr().out
    log.path.rmdir()
    log(2, 4.0, 0.1, 1.0)
    assert values(tmp_path, "loss") == {2: 4.0}
