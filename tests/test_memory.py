"""How many windows are trained on at once, and the formula behind it."""

import contextlib
from types import SimpleNamespace

from plumbing import memory
from plumbing.memory import choose_micro_batch, training_memory
from plumbing.ranks import reports_lost_ranks

import pytest
import torch
from conftest import SMALL, run

from model import SmolLM2, SmolLM2Config, count_parameters
from train import compile_parts

SIZES = {size: getattr(SmolLM2Config, f"smollm2_{size}")() for size in ("135m", "360m", "1_7b")}


@pytest.mark.parametrize(
    ("size", "windows", "length", "recompute", "gigabytes"),
    [
        ("135m", 8, 2048, False, 13.8),  # of an H100
        ("135m", 16, 2048, False, 25.5),
        ("135m", 32, 2048, False, 47.4),
        ("1_7b", 4, 2048, False, 49.8),
        ("135m", 2, 1024, False, 3.9),  # of a CPU
        ("135m", 8, 1024, False, 8.6),
        ("135m", 2, 1024, True, 2.9),
        ("135m", 8, 1024, True, 4.1),
    ],
)
def test_the_formula_gives_what_was_measured(size, windows, length, recompute, gigabytes):
    config = SIZES[size]
    needed = training_memory(config, count_parameters(config), windows * length, torch.bfloat16, recompute=recompute)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.slow
def test_the_formula_counts_what_a_layer_keeps():
    """In bfloat16, where the copies of the weights are counted apart."""
    kept = []
    for layers in (1, 2):
        torch._dynamo.reset()
        model = SmolLM2(SmolLM2Config(vocab_size=512, num_hidden_layers=layers))
        compile_parts(model)
        tokens, storages = torch.zeros(2, 256, dtype=torch.long), {}
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def keep(tensor, storages=storages, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            loss = model(tokens, tokens)
        kept.append(sum(storages.values()))
        del loss
    one, two = (
        training_memory(SmolLM2Config(vocab_size=512, num_hidden_layers=layers), 0, tokens.numel(), torch.bfloat16)
        for layers in (1, 2)
    )
    copies = 2 * (3_540_096 - 2 * 576)
    assert kept[1] - kept[0] - copies == pytest.approx(two - one, rel=0.05)


def of_a_gpu(size, gigabytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 10**9, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    config = SIZES[size]
    weight = SimpleNamespace(device=torch.device("cuda"), numel=lambda: count_parameters(config))
    head = SimpleNamespace(weight=weight)
    return SimpleNamespace(config=config, lm_head=head, recompute=False, parameters=lambda: [weight])


@pytest.mark.parametrize(
    ("size", "gigabytes", "share", "limit", "windows"),
    [
        ("135m", 80, 512, 999, 32),
        ("135m", 80, 64, 999, 32),
        ("135m", 80, 512, 20, 16),  # the formula was wrong: half of it
        ("135m", 80, 512, 0, 1),
        ("135m", 24, 512, 999, 8),
        ("135m", 15.8, 512, 999, 4),
        ("135m", 2, 512, 999, 1),
        ("360m", 80, 768, 999, 24),
        ("1_7b", 80, 1024, 999, 8),
        ("135m", 80, 7 * 17, 20, 17),  # only what divides the share
    ],
)
def test_as_many_as_fit(size, gigabytes, share, limit, windows, monkeypatch):
    monkeypatch.setattr(memory, "fits", lambda model, windows, *args: windows <= limit)
    model = of_a_gpu(size, gigabytes, monkeypatch)
    said = []
    ranks = SimpleNamespace(gather=lambda value: [value, 99], say=said.append)
    assert choose_micro_batch(model, share, 2048, torch.bfloat16, None, True, ranks) == windows
    assert said[0].startswith(f"{windows} windows at once") and f" of {gigabytes:.1f} GB" in said[0]
    ranks.gather = lambda value: [value, 1]  # another rank has less room
    assert choose_micro_batch(model, share, 2048, torch.bfloat16, None, True, ranks) == 1


def test_one_pass_tries_whether_it_fits(monkeypatch):
    model = SmolLM2(SmolLM2Config(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                                  num_key_value_heads=1))  # fmt: skip
    forward = model.forward

    def of_little_memory(tokens, targets):
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return forward(tokens, targets)

    def broken(tokens, targets):
        raise RuntimeError("shapes differ")

    model.forward = of_little_memory
    assert not memory.fits(model, 8, 16, contextlib.nullcontext(), 10)
    model.forward = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.fits(model, 4, 16, contextlib.nullcontext(), 10)
    model.forward = of_little_memory
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: taken.append(empty(*args, **kwargs).nbytes))
    assert memory.fits(model, 4, 16, contextlib.nullcontext(), 10)
    assert taken == [10]  # beside what the optimizer will need
    assert all(parameter.grad is None for parameter in model.parameters())


def test_out_of_memory_is_one_sentence():
    @reports_lost_ranks
    def main(settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity of ...")

    with pytest.raises(SystemExit, match="CUDA out of memory, with --micro_batch=8: a smaller one needs less"):
        main(SimpleNamespace(micro_batch=8, timeout=1))


def test_it_is_chosen_said_and_kept(data, tmp_path):
    small = [arg for arg in SMALL if not arg.startswith("--micro_batch")]
    args = ["train.py", *small, f"--data_dir={data}", "--max_steps=1"]
    state = "checkpoint-00000{}/trainer_state.pt"

    def used(folder, step):
        return torch.load(tmp_path / folder / state.format(step))["settings"]["micro_batch"]

    assert "8 windows at once on a device" in run(*args, f"--out_dir={tmp_path / 'a'}")
    assert used("a", 1) == 8  # 256 tokens a step, in windows of 32: all of them
    run(*args, f"--out_dir={tmp_path / 'b'}", "--micro_batch=2")
    resumed = run(*args, f"--out_dir={tmp_path / 'b'}", "--resume=True", "--max_steps=2")
    assert used("b", 2) == 2 and "2 windows at once on a device, as before" in resumed
    elsewhere = torch.load(tmp_path / "b" / state.format(2)) | {"device": "NVIDIA H100 80GB HBM3"}
    torch.save(elsewhere, tmp_path / "b" / state.format(2))
    assert "8 windows at once on a device\n" in run(
        *args, f"--out_dir={tmp_path / 'b'}", "--resume=True", "--max_steps=3"
    )
