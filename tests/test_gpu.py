"""What only a GPU runs, on a machine without one: nogpu.py pretends it, a recorded step is replayed on the CPU."""

import contextlib
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from model import SmolLM2, SmolLM2Config

H100, T4 = ("NVIDIA H100 80GB HBM3", "9"), ("Tesla T4", "7")
CONFIG = SmolLM2Config(
    vocab_size=60,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="session")
def pretend(data, tmp_path_factory):
    """Run a scenario of nogpu.py, and return what it found."""
    if sys.platform != "linux" or not shutil.which("g++") or torch.version.cuda or torch.version.hip:
        pytest.skip("a pretended GPU needs Linux, g++, and a PyTorch that was built for CPUs alone")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    library = tmp_path_factory.mktemp("nogpu") / "nogpu.so"
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    subprocess.run(["g++", *options, "tests/nogpu.cpp", "-o", library, "-lc10", "-ltorch_cpu"], cwd=ROOT, check=True)

    def scenario(*arguments):
        command = [sys.executable, "tests/nogpu.py", library, *arguments[:1], data, *arguments[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return scenario


@pytest.mark.parametrize(
    ("card", "changes", "dtype", "scaler_waits"),
    [
        (H100, {"micro_batch": 4}, "bfloat16", False),
        (H100, {"optimizer": "muon", "recompute_activations": True}, "bfloat16", False),
        (T4, {}, "float16", False),  # the fused AdamW looks for overflows on the device; Muon's scaler asks
        (T4, {"optimizer": "muon"}, "float16", True),
    ],
)
def test_training_waits_for_the_gpu_once_a_step(card, changes, dtype, scaler_waits, pretend):
    found = pretend("training", *card, json.dumps(changes))
    before = "devices.py: torch.zeros(1, device=device)", "checkpoint.py"  # the device is tried; a save copies all
    waits = {place: count for place, count in found["waits"].items() if not place.startswith(before)}
    scaler = [waits.pop(place) for place in list(waits) if "scaler.step" in place]
    assert sorted(waits.values()) == [3, 3], waits  # three steps, and the evaluations of steps 0, 2 and 3
    assert bool(scaler) == scaler_waits
    assert found["saves"] == ["cpu"] and found["moved"] == ["cuda:0"]
    assert any(f"torch.{dtype} on 1 x cuda" in line for line in found["said"])


@pytest.mark.parametrize(("card", "dtype"), [(H100, "bfloat16"), (H100, "float32"), (T4, "float16")])
def test_nothing_in_a_recorded_step_waits_or_depends_on_data(card, dtype, pretend):
    found = pretend("generation", *card, dtype)
    assert found["recorded"] == ["cuda"] * 12
    assert found["unrecordable"] == []


def test_evaluation_mixes_no_devices(pretend):
    assert pretend("evaluation")["answers"] == 20


@pytest.mark.parametrize("major", ["9", "7"])
def test_one_graph_serves_all_layers_and_one_the_loss(major, pretend):
    assert pretend("compiling", major)["graphs"] == 2


def test_a_step_is_recorded_and_replayed_on_its_own_device(monkeypatch):
    """A thread begins with device 0, whichever one the model is on."""
    current, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], str(device)
        yield
        current[0] = before

    graph = SimpleNamespace(register_generator_state=lambda generator: None, replay=lambda: seen.append(current[0]))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: seen.append(f"stream of {current[0]}"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: contextlib.nullcontext(seen.append(current[0])))
    step = sample.recorded(lambda: None, torch.device("cuda:1"), torch.Generator())
    for _ in range(3):
        step()
    assert seen == ["stream of cuda:1", *["cuda:1"] * 3]  # recorded once, replayed twice


def test_deterministic_training_runs_on_the_pretended_gpu(pretend):
    found = pretend("training", *H100, '{"deterministic": true}')
    assert found["deterministic"] == [True] and not found["after"]


# ---- A CUDA graph, replayed on the CPU


class Graph(TorchDispatchMode):
    """The operations of a step with the tensors they had, as a CUDA graph knows them: replayed without Python."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.operations:
            given = {address(tensor) for tensor in tensors((args, kwargs))}
            for then, now in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if address(then) not in given:  # not a view, and not in place: what follows reads the old address
                    then.copy_(now)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage()._cdata


def replayed(step, device, generator):
    graph, calls = Graph(), itertools.count(1)

    def run():
        call = next(calls)
        if call == 2:
            with graph:
                step()
        elif call > 2:
            graph.replay()
        else:
            step()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_replayed_step_gives_the_tokens_and_random_numbers_of_a_step(dtype, monkeypatch):
    torch.manual_seed(0)
    model = SmolLM2(CONFIG).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # preferences as strong as after training; else most texts are alike
        for layer in model.model.layers:  # and what was read before counts as much as the newest token
            layer.self_attn.o_proj.weight.mul_(50)
    writer, texts = sample.Writer(model), {}
    ways = [(0, 40, 1.0), (0.8, 40, 1.0), (0.8, 0, 1.0), (1.5, 40, 0.7)]
    for recorded in (sample.recorded, replayed):
        monkeypatch.setattr(sample, "recorded", recorded)
        for case in itertools.product(([5, 6, 7], [5]), (1, 3), (1, 3, 20), ways, (-1, 17)):
            prompt, count, length, way, end = case
            generator = torch.Generator().manual_seed(3)
            text = [new.tolist() for new in writer.generate(prompt, count, length, *way, end, generator)]
            text.append(generator.get_state().tolist())
            assert texts.setdefault(str(case), text) == text


def test_several_texts_at_a_time_are_replayed_apart(monkeypatch):
    writer, alone = sample.Writer(SmolLM2(CONFIG)), []

    def write(seed):
        return writer.generate([seed, 2], 1, 20, eos_token_id=-1, generator=torch.Generator().manual_seed(seed))

    alone = [[new.item() for new in write(seed)] for seed in (1, 2)]
    monkeypatch.setattr(sample, "recorded", replayed)
    both = list(zip(write(1), write(2), strict=True))
    assert [[new.item() for new in text] for text in zip(*both, strict=True)] == alone


def test_generation_compiles_nothing_after_its_first_step(monkeypatch):
    torch._dynamo.reset()
    graphs, steps, compile_with = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(step, device, generator):
        def run():
            before = len(graphs)
            step()
            steps.append(len(graphs) - before)

        return run

    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_with(function, backend=backend, **how))
    monkeypatch.setattr(sample, "recorded", counted)
    writer = sample.Writer(SmolLM2(CONFIG), compile=True)
    for prompt, length in (([1, 2, 3], 5), ([1, 2, 3], 5), ([1, 2], 9), ([1, 2, 3, 4], 30)):
        steps.clear()
        list(writer.generate(prompt, 1, length, 0, eos_token_id=-1))
        assert not any(steps[1:]), f"graphs made in each step: {steps}"
    assert 1 <= len(graphs) <= 2  # for one length, then for any
