"""On the machines that people have: processors, GPUs old and new, little memory, no compiler, other systems' rules."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

from plumbing import devices, muon
from plumbing.checkpoint import load_state
from plumbing.devices import peak_flops, sampling_dtype, training_dtype, training_memory
from plumbing.ranks import ends_well

import pytest
import torch
from conftest import ROOT, command, environment, metrics, preparing, run
from runs import arguments, train_here
from torch.autograd.graph import saved_tensors_hooks

import model as model_file
from model import SmolLM2, SmolLM2Config, count_parameters
from train import Settings, compile_parts, make_optimizers

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
SIZES = {size: getattr(SmolLM2Config, f"smollm2_{size}")() for size in ("135m", "360m", "1_7b")}


def small_model():
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=2)
    return SmolLM2(SmolLM2Config(num_attention_heads=6, num_key_value_heads=2, **shape))


# ---- Dtypes


@pytest.mark.parametrize(
    ("capability", "bf16_in_hardware", "training", "sampling"),
    [
        ("AVX512", True, BFLOAT16, FLOAT16),
        ("AVX512", False, FLOAT32, FLOAT16),
        ("AVX2", True, FLOAT32, FLOAT16),  # bfloat16 is emulated, 300 tokens/s where float32 makes 7,000
        ("DEFAULT", False, FLOAT32, FLOAT32),  # so is float16
    ],
)
def test_auto_takes_the_fastest_type_of_a_processor(capability, bf16_in_hardware, training, sampling, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for feature in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, feature, lambda: bf16_in_hardware)
    assert (training_dtype("auto", CPU), sampling_dtype("auto", CPU)) == (training, sampling)
    assert training_dtype("float16", CPU) == sampling_dtype("float16", CPU) == FLOAT16


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), FLOAT16), ((8, 0), BFLOAT16), ((9, 0), BFLOAT16)])
def test_auto_takes_the_fastest_type_of_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert training_dtype("auto", CUDA) == sampling_dtype("auto", CUDA) == dtype


# ---- Threads and compilers


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize(("variables", "spins"), [({}, 2000), ({"GOMP_SPINCOUNT": "7"}, 7)])
def test_threads_do_not_spin_for_long(variables, spins):
    given = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env = given | {"OMP_DISPLAY_ENV": "verbose"} | variables
    done = subprocess.run(command("train.py", "--help"), cwd=ROOT, env=env, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize(
    ("imports", "variables", "late"),
    [("torch, sample", {}, 1), ("sample, torch", {}, 0), ("torch, sample", {"GOMP_SPINCOUNT": 7}, 0)],
)
def test_pytorch_that_came_first_is_said(imports, variables, late):
    variables = environment(**{"GOMP_SPINCOUNT": ""} | variables)
    variables = {name: value for name, value in variables.items() if value}
    line = [sys.executable, "-c", f"import {imports}; sample.set_up_device('cpu')"]
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout == "" and len(done.stderr.splitlines()) == done.stderr.count("torch was imported") == late


def test_what_compiling_needs(monkeypatch, tmp_path):
    lacks, here = devices.lacks_compiler, set()
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name in here)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name in here)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "the package triton" in lacks(CUDA) and "a compiler, " in lacks(CPU) and "on mps" in lacks(MPS)
    here.add("triton")
    assert "a compiler, gcc" in lacks(CUDA)
    here.update(("gcc", "g++", "clang++", "cl"))
    assert "python3-dev" in lacks(CPU) and "python3-dev" in lacks(CUDA)
    (tmp_path / "Python.h").touch()
    assert lacks(CPU) is lacks(CUDA) is None


def test_without_a_compiler_it_says_so_and_goes_on(data, tmp_path):
    here = {"PATH": tmp_path, "CXX": ""}
    args = arguments(data, tmp_path / "out", "--compile=True", "--max_steps=1")
    assert "a compiler, " in run("train.py", *args, **here)
    assert run("sample.py", f"--model={tmp_path / 'out'}", "--compile=True", "--max_new_tokens=9", **here)


# ---- GPUs


def test_repeated_keys_give_the_numbers_of_grouped_queries(monkeypatch):
    model, ids, losses, texts, heads = small_model(), torch.randint(64, (2, 17)), [], [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v, mask, is_causal, enable_gqa):
        heads.append((k.size(1) < q.size(1), v.size(1) < q.size(1), enable_gqa))
        return attend(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    for grouped in (True, False):
        monkeypatch.setattr(model_file, "kernel_shares_heads", lambda q, mask, grouped=grouped: grouped)
        heads.clear()
        losses.append(model(ids[:, :-1], ids[:, 1:]).item())
        texts.append(torch.stack(list(model.generate(ids[:, :5], 8, temperature=0, eos_token_id=-1))).tolist())
        assert set(heads) == {(grouped,) * 3}
    assert losses[0] == pytest.approx(losses[1]) and texts[0] == texts[1]


@pytest.mark.parametrize(
    ("device", "major", "dtype", "without_mask", "with_mask"),
    [(CUDA, 7, FLOAT16, False, False), (CUDA, 8, FLOAT16, True, False), (CUDA, 9, BFLOAT16, True, False),
     (CUDA, 9, FLOAT32, False, False), (CPU, None, FLOAT32, True, True), (MPS, None, FLOAT32, False, False)],
)  # fmt: skip
def test_where_the_kernel_shares_heads(device, major, dtype, without_mask, with_mask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    q = SimpleNamespace(device=device, dtype=dtype)
    assert model_file.kernel_shares_heads(q, None) is without_mask
    assert model_file.kernel_shares_heads(q, torch.ones(1)) is with_mask


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
     ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA T400 4GB", None),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GB200", None)],
)  # fmt: skip
def test_peaks_of_gpus(name, teraflops):
    assert peak_flops(name) == (teraflops and teraflops * 1e12)


# ---- The micro-batch and the memory it takes


@pytest.mark.parametrize(
    ("size", "sequences", "length", "recompute", "gigabytes"),
    [
        ("135m", 8, 2048, False, 13.8), ("135m", 16, 2048, False, 25.5), ("135m", 32, 2048, False, 47.4),  # of an H100
        ("1_7b", 4, 2048, False, 49.8),
        ("135m", 2, 1024, False, 3.9),  # of a CPU
        ("135m", 2, 1024, True, 2.9), ("135m", 8, 1024, True, 4.1),
    ],
)  # fmt: skip
def test_the_formula_gives_what_was_measured(size, sequences, length, recompute, gigabytes):
    config = SIZES[size]
    needed = training_memory(config, count_parameters(config), sequences * length, BFLOAT16, recompute=recompute)
    assert needed / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.slow
def test_the_formula_counts_what_a_layer_keeps():
    """In bfloat16, where the copies of the weights are counted apart."""
    kept, counted, tokens = [], [], torch.zeros(2, 256, dtype=torch.long)
    for layers in (1, 2):
        torch._dynamo.reset()
        model = SmolLM2(SmolLM2Config(vocab_size=512, num_hidden_layers=layers))
        compile_parts(model)
        parameters, storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            loss = model(tokens, tokens)
        kept.append(sum(size for address, size in storages.items() if address not in parameters))
        counted.append(training_memory(model.config, 0, tokens.numel(), BFLOAT16))
        del loss
    copies = 2 * (3_540_096 - 2 * 576)
    assert kept[1] - kept[0] - copies == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.parametrize(
    ("size", "gigabytes", "share", "limit", "sequences"),
    [
        ("135m", 80, 512, 999, 32), ("135m", 24, 512, 999, 8), ("135m", 2, 512, 999, 1), ("1_7b", 80, 1024, 999, 8),
        ("135m", 80, 512, 20, 16),  # the formula was wrong: half of it
        ("135m", 80, 7 * 17, 20, 17),  # only what divides the share
    ],
)  # fmt: skip
def test_as_many_as_fit(size, gigabytes, share, limit, sequences, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 0.7e9, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: gigabytes * 0.3e9)
    monkeypatch.setattr(devices, "fits", lambda model, count, *args: count <= limit)
    weight, said = SimpleNamespace(device=CUDA, numel=lambda: count_parameters(SIZES[size])), []
    model = SimpleNamespace(config=SIZES[size], lm_head=SimpleNamespace(weight=weight), parameters=lambda: [weight])

    def chosen(other_rank, previous=None, **settings):
        ranks = SimpleNamespace(gather=lambda value: [value, value is not True and other_rank], say=said.append)
        settings = Settings(seq_len=2048, **settings)
        return devices.choose_micro_batch(model, share, settings, BFLOAT16, None, True, previous, ranks)

    assert chosen(99) == sequences
    assert said[0].startswith(f"micro-batch: {sequences} sequences") and f" of {gigabytes:.1f} GB" in said[0]
    assert chosen(1) == 1  # another rank has less room
    assert chosen(99, micro_batch=7) == 7
    assert chosen(99, previous=1) == sequences  # resumed, but another rank has another device than before


def test_a_share_that_few_micro_batches_divide_is_said():
    said = []
    ranks = SimpleNamespace(size=1, say=said.append)
    assert devices.share_of_step(Settings(seq_len=32, batch_tokens=509 * 32), ranks) == 509
    assert f"{512 * 32} would leave more choice" in said[0]
    assert devices.share_of_step(Settings(seq_len=32, batch_tokens=512 * 32), ranks) == 512
    assert len(said) == 1


def test_flash_attention_3_is_said_when_it_is_used(monkeypatch, capsys):
    used = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", used.append)
    devices.set_up_device("cpu", flash_attention_3=True)
    assert used == ["FA3"] and "FlashAttention 3" in capsys.readouterr().out


def test_one_pass_tries_whether_it_fits(monkeypatch):
    model, taken, empty = small_model(), [], torch.empty
    forward = model.forward

    def forward_of_few(tokens, targets):
        if len(tokens) > 4:
            raise error
        return forward(tokens, targets)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: taken.append(empty(*args, **kwargs).nbytes))
    model.forward, error = forward_of_few, torch.OutOfMemoryError("out of memory")
    assert not devices.fits(model, 8, 16, contextlib.nullcontext(), 10)
    assert devices.fits(model, 4, 16, contextlib.nullcontext(), 10)
    assert taken == [10, 10]  # beside what the optimizer will need
    assert all(parameter.grad is None for parameter in model.parameters())
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        devices.fits(model, 8, 16, contextlib.nullcontext(), 10)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "^CUDA out of memory: .*--micro_batch"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:144] Connection closed by peer"), "^a rank died, .*--timeout=600"),
        (RuntimeError("Gloo connectFullMesh failed with [gloo/...] no error"), "cannot connect.* GLOO_SOCKET_IFNAME"),
    ],
)
def test_failures_that_a_person_can_mend_are_one_sentence(error, sentence):
    @ends_well
    def main(settings):
        raise error

    with pytest.raises(SystemExit, match=sentence):
        main(Settings())


def test_it_is_chosen_said_and_kept(data, tmp_path):
    def train(steps, micro_batch):
        args = f"--max_steps={steps}", f"--micro_batch={micro_batch}", "--resume=True"
        said, checkpoint = train_here(data, tmp_path, *args), tmp_path / f"checkpoint-00000{steps}"
        return said, load_state(checkpoint), checkpoint / "trainer_state.pt"

    _, state, _ = train(1, micro_batch=2)
    assert state["settings"]["micro_batch"] == 2
    said, state, path = train(2, micro_batch=None)
    assert "2 sequences per device, as before" in said and state["settings"]["micro_batch"] == 2
    torch.save(state | {"device": "another"}, path)
    said, state, _ = train(3, micro_batch=None)  # 256 tokens a step, in sequences of 32: all of them
    assert "8 sequences per device" in said and "as before" not in said and state["settings"]["micro_batch"] == 8


def test_files_are_handled_as_windows_asks_and_consoles_need_no_utf_8(corpus, data, tmp_path):
    prompt = "1: A \N{RIGHT SINGLE QUOTATION MARK}cat\N{RIGHTWARDS ARROW}"  # cp1252 has the first, not the second
    out = tmp_path / "out"

    def on_windows(*args):
        return run("tests/windows.py", *args, PYTHONIOENCODING="cp1252", PYTHONUTF8=0)

    on_windows("prepare.py", *preparing(corpus, tmp_path / "data"), "--val_fraction=0.5")
    saves = "--save_interval=1", "--keep_checkpoints=1", "--resume=True"
    train = ["train.py", *arguments(data, out, *saves)]
    printed = on_windows(*train, "--max_steps=2", "--sample_interval=2", f"--sample_prompt={prompt}")
    assert "A \N{RIGHT SINGLE QUOTATION MARK}cat?" in printed
    on_windows(*train, "--max_steps=4")
    assert [line["step"] for line in metrics(out)] == [0, 1, 2, 3, 4]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert "cat?" in on_windows("sample.py", f"--model={out}", f"--prompt={prompt}", "--max_new_tokens=9")


# ---- The optimizer that runs everywhere


def test_muon_is_torchs(monkeypatch):
    """On tall, wide and square matrices; torch's own multiplies in bfloat16, unless it is kept from it."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((48, 16), (16, 48), (32, 32), (48, 16))]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine = muon.Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())
    for step in range(5):
        for group in (*mine.param_groups, *reference.param_groups):
            group["lr"] = 0.02 / (step + 1)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape) * 10.0**-step
            other.grad = one.grad.clone()
        mine.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "products"), [(FLOAT32, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)])
def test_muon_multiplies_in_the_type_of_training(dtype, products, monkeypatch):
    model, seen, orthogonalize = small_model(), set(), muon.orthogonalize
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    monkeypatch.setattr(muon, "orthogonalize", lambda X: seen.add(X.dtype) or orthogonalize(X))
    make_optimizers(model, Settings(optimizer="muon"), dtype)[1].step()
    assert seen == {products}
