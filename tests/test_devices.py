"""On the machines that people have: other processors, older GPUs, busy cores, other systems' rules."""

import dataclasses
import subprocess
import sys

from plumbing.devices import peak_of, sampling_dtype, training_dtype

import pytest
import torch
from conftest import ROOT, SMALL, command, environment, metrics, run

import model
import train
from model import SmolLM2, SmolLM2Config

# ---- Processors


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="this processor has no AVX2")
@pytest.mark.parametrize(
    ("capability", "training", "sampling"),
    [
        (
            "avx2",
            torch.float32,
            torch.float16,
        ),  # bfloat16 products are emulated, 300 tokens/s where float32 makes 7,000
        ("default", torch.float32, torch.float32),  # so are float16's
    ],
)
def test_auto_takes_the_fastest_type_of_the_processor(capability, training, sampling):
    code = (
        "from plumbing.devices import *; cpu = torch.device('cpu');"
        "print(training_dtype('auto', cpu), sampling_dtype('auto', cpu))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(ATEN_CPU_CAPABILITY=capability),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split() == [str(training), str(sampling)]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_asked_for_is_taken(name):
    cpu = torch.device("cpu")
    assert training_dtype(name, cpu) == sampling_dtype(name, cpu) == getattr(torch, name)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch brings GNU's OpenMP on Linux only")
@pytest.mark.parametrize("script", ["train.py", "sample.py", "tools.demo", "tools.bench"])
def test_threads_do_not_spin_for_long(script):
    def spin_count(**variables):
        variables = environment(OMP_DISPLAY_ENV="verbose") | {"GOMP_SPINCOUNT": None} | variables
        variables = {name: value for name, value in variables.items() if value}
        printed = subprocess.run(command(script, "--help"), cwd=ROOT, env=variables, capture_output=True, text=True)
        return next(line.split("'")[1] for line in printed.stderr.splitlines() if "GOMP_SPINCOUNT" in line)

    assert spin_count() == "2000"
    assert spin_count(GOMP_SPINCOUNT="7") == "7"
    assert int(spin_count(OMP_WAIT_POLICY="active")) > 10**9


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_it_says_so_and_goes_on(missing, data, trained, tmp_path):
    """As on a system without g++, and on one without python3-dev."""
    variables = {"PATH": tmp_path, "CXX": ""} if missing == "compiler" else {"PYTHONPATH": tmp_path}
    (tmp_path / "sitecustomize.py").write_text("import sysconfig; sysconfig.get_path = lambda *names: 'nowhere'")
    printed = run(
        "train.py",
        *SMALL,
        "--compile=True",
        "--max_steps=1",
        f"--data_dir={data}",
        f"--out_dir={tmp_path / 'out'}",
        **variables,
    )
    assert {"compiler": "a compiler, ", "headers": "python3-dev"}[missing] in printed
    text = ("--prompt=7: A cat", "--max_new_tokens=9")
    compiled = run("sample.py", f"--model={trained}", "--compile=True", *text, **variables)
    assert compiled == run("sample.py", f"--model={trained}", *text)


# ---- GPUs


def test_repeated_keys_give_the_numbers_of_grouped_queries(monkeypatch):
    torch.manual_seed(0)
    ours = SmolLM2(
        SmolLM2Config(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
    )
    ids = torch.randint(64, (2, 17))
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(model, "has_grouped_kernel", lambda q, mask, grouped=grouped: grouped)
        ours.zero_grad()
        loss = ours(ids[:, :-1], ids[:, 1:])
        loss.backward()
        prompts = [ids[0, :5].tolist(), ids[1, :3].tolist()]
        texts = torch.stack(list(ours.generate(prompts, 8, temperature=0, eos_token_id=None)))
        results.append(([loss.detach()] + [parameter.grad for parameter in ours.parameters()], texts))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("major", "dtype", "grouped"),
    [
        (7, torch.float16, False),
        (8, torch.float16, True),
        (9, torch.bfloat16, True),
        (9, torch.float32, False),
    ],
)
def test_which_gpus_have_a_kernel_for_grouped_queries(major, dtype, grouped, monkeypatch):
    @dataclasses.dataclass
    class Query:
        device: torch.device
        dtype: torch.dtype

    @dataclasses.dataclass
    class Properties:
        major: int

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(major))
    mask = torch.ones(1)
    assert model.has_grouped_kernel(Query(torch.device("cuda"), dtype), None) is grouped
    assert not model.has_grouped_kernel(Query(torch.device("cuda"), dtype), mask)
    assert model.has_grouped_kernel(Query(torch.device("cpu"), torch.float32), mask)
    assert not model.has_grouped_kernel(Query(torch.device("mps"), torch.float32), None)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
    ],
)
def test_peaks_of_gpus(name, teraflops):
    assert peak_of(name) == (teraflops and teraflops * 1e12)


# ---- Systems


def test_files_are_handled_as_windows_asks_and_consoles_need_no_utf_8(data, tmp_path):
    prompt = "1: A \N{RIGHT SINGLE QUOTATION MARK}cat\N{RIGHTWARDS ARROW}"  # cp1252 has the first, not the second
    source = tmp_path / "talk.jsonl"
    source.write_text('{"text": "A cat sees 3 bees. The old dog follows the sun."}\n' * 99 + '{"text": "Her bird."}\n')
    arguments = {
        "prepare.py": [
            f"--source={source}",
            f"--data_dir={tmp_path / 'data'}",
            "--tokenizer=train:300",
            "--val_fraction=0.5",
        ],
        "train.py": [
            *SMALL,
            f"--data_dir={data}",
            f"--out_dir={tmp_path / 'out'}",
            "--save_interval=1",
            "--keep_checkpoints=1",
            "--resume=True",
            "--sample_interval=2",
            f"--sample_prompt={prompt}",
        ],
        "sample.py": [f"--model={tmp_path / 'out'}", f"--prompt={prompt}", "--max_new_tokens=9"],
    }

    def on_windows(script, *more):
        return run("tests/windows.py", script, *arguments[script], *more, PYTHONIOENCODING="cp1252", PYTHONUTF8=0)

    on_windows("prepare.py")
    assert "A \N{RIGHT SINGLE QUOTATION MARK}cat?" in on_windows("train.py", "--max_steps=2")
    on_windows("train.py", "--max_steps=4")
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000004"]
    assert "cat?" in on_windows("sample.py")


# ---- The optimizer that runs everywhere


def test_muon_is_torchs(monkeypatch):
    """On tall, wide and square matrices; torch's own multiplies in bfloat16, unless it is kept from it."""
    torch.manual_seed(0)
    shapes = [(48, 16), (16, 48), (32, 32), (48, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine = train.Muon(ours, lr=0.02, weight_decay=0.1)
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


def test_orthogonalize():
    torch.manual_seed(0)
    for shape in ((3, 20, 8), (2, 8, 20)):
        matrices = torch.randn(shape)
        U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
        assert (S / S.norm(dim=1, keepdim=True) > 0.01).all()
        found = U.mT @ train.orthogonalize(matrices) @ Vh.mT  # the directions stay, the singular values become about 1
        values = found.diagonal(dim1=1, dim2=2)
        assert ((values > 0.65) & (values < 1.25)).all()
        assert (found - torch.diag_embed(values)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "products"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_muon_multiplies_in_the_type_of_training(dtype, products, monkeypatch):
    settings = train.Settings(optimizer="muon")
    ours = SmolLM2(
        SmolLM2Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    )
    ours(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
    seen, orthogonalize = set(), train.orthogonalize
    monkeypatch.setattr(train, "orthogonalize", lambda X: seen.add(X.dtype) or orthogonalize(X))
    train.make_optimizers(ours, settings, dtype)[1].step()
    assert seen == {products}
