"""What only a GPU runs, on a machine without one.

    python tests/nogpu.py LIBRARY SCENARIO [DATA]        LIBRARY: nogpu.cpp, compiled; DATA: a folder of prepare.py

Tensors are on "cuda" but have no data (FakeTensorMode), so mixing devices raises as on a GPU, and every operation can
be watched below autograd and autocast: does Python wait for the device there? could a CUDA graph record it? Where
Python asks for a number, it gets 1; a truth is false. Each scenario prints what it found as a line of JSON.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import sys
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
for library in (libraries / "libc10.so", libraries / "libtorch_cpu.so", sys.argv[1]):  # before torch is imported
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import plumbing  # noqa: E402, F401, I001
import torch  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from model import SmolLM2, SmolLM2Config, rotary_table  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from tools import evaluate  # noqa: E402

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
SHAPED_BY_DATA = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
CONFIG = SmolLM2Config(
    vocab_size=300,
    hidden_size=96,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def place():
    """The innermost line of the project that is being run."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    others = (__file__, sys.prefix)  # this file, and a virtual environment inside of the project's folder
    frames = [frame for frame in frames if not any(map(Path(frame.filename).is_relative_to, others))]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "nogpu.py"


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """waits: where Python waits for the device. unrecordable: what a CUDA graph cannot record, inside `recording`."""

    def __init__(self):
        super().__init__()
        self.waits, self.unrecordable, self.inside, self.read = Counter(), [], False, None
        self.wishes = itertools.cycle((1.0, 1.0, 0.0))  # a loss, a norm, and whether a rank wants to stop

    @contextlib.contextmanager
    def recording(self):
        self.inside = True
        yield
        self.inside = False

    def wait(self):
        self.waits[place()] += 1
        self.note("Python waits")

    def note(self, what):
        if self.inside:
            self.unrecordable.append(f"{what} at {place()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {tensor.device.type for tensor in tensors((args, kwargs))}
        if func in WAITS:
            storage = args[0].untyped_storage()._cdata
            if "cuda" in before and storage != self.read:  # the numbers of one tensor are one transfer
                self.wait()
            self.read = storage
            if func is aten.equal.default:
                return args[0].shape == args[1].shape
            if func is aten.is_nonzero.default or args[0].dtype == torch.bool:
                return False
            return next(self.wishes) if "asked" in place() else 1.0 if args[0].dtype.is_floating_point else 1
        self.read = self.read if func in (aten.select.int, aten.unbind.int) else None
        if func in (aten.uniform_.default, aten.exponential_.default, aten.normal_.default):
            return args[0]  # fake tensors do not know all of their options
        if func in SHAPED_BY_DATA:
            self.note(f"{func} makes a shape that depends on data")
        out = func(*args, **kwargs)
        devices = before | {tensor.device.type for tensor in tensors(out)}
        if "cpu" in devices:
            self.note(f"{func} has a tensor of the CPU")
        copies = func in (aten._to_copy.default, aten.copy_.default) and devices == {"cpu", "cuda"}
        if copies and not kwargs.get("non_blocking") and True not in args[2:]:
            self.wait()
        return out


class Fakes(FakeTensorMode):
    avoid_device_init = True  # it would start CUDA, as torch.cuda.is_available says yes here


@contextlib.contextmanager
def gpu(name="NVIDIA H100 80GB HBM3", major=9, memory=80 * 10**9):
    """A GPU of that name and compute capability: everything inside is watched."""
    watch = Watch()

    def tensor(values, dtype=None, device=None):  # fake tensors cannot be made of Python's numbers in inference mode
        shape, inner = [], values
        while isinstance(inner, list):
            shape, inner = [*shape, len(inner)], inner[0] if inner else 0.0
        if torch.device(device or "cpu").type == "cuda":
            watch.wait()
        return torch.zeros(shape, dtype=dtype or (torch.long if isinstance(inner, int) else None), device=device)

    def pin_memory(tensor):
        assert tensor.device.type == "cpu", "only a tensor of the CPU can be pinned"
        return tensor

    properties = SimpleNamespace(major=major, minor=0, name=name, total_memory=memory, multi_processor_count=132)
    pretended = dict(
        is_available=lambda: True,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda device=None: name,
        get_device_capability=lambda device=None: (major, 0),
        get_device_properties=lambda device=None: properties,
        mem_get_info=lambda device=None: (memory, memory),
        memory_reserved=lambda device=None: 0,
        empty_cache=lambda: None,
        synchronize=lambda device=None: watch.wait(),
    )
    with (
        mock.patch.multiple(torch.cuda, **pretended),
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch, "tensor", tensor),
        Fakes(allow_non_fake_inputs=True),
        watch,
    ):
        yield watch


def on_the_gpu(config, dtype=torch.float32):
    """A model made on the device: Module.to has trouble with fake tensors."""
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = SmolLM2(config)
    torch.set_default_dtype(torch.float32)
    return model


# ---- Scenarios ------------------------------------------------------------------------------------------------------


def training(data, name, major, changes="{}"):
    """train.main for three steps: where it waits and how often, what it says, where the model goes, on which devices is
    what it saves."""

    def say(ranks, text):
        said.append(text)
        deterministic.add(torch.are_deterministic_algorithms_enabled())

    corpus, saved, said, moved, deterministic = train.open_corpus(data, 32, 0, 640), [], [], [], set()
    with tempfile.TemporaryDirectory() as out, gpu(name, int(major)) as watch:
        settings = train.Settings(
            data_dir=data, out_dir=f"{out}/run", device="cuda", seq_len=32, batch_tokens=256, max_steps=3,
            eval_tokens=640, eval_interval=2, save_interval=2, sample_interval=0, compile=False,
            model=SmolLM2Config(**vars(CONFIG) | dict(vocab_size=0)), **json.loads(changes),
        )  # fmt: skip
        with (
            mock.patch.object(train, "SmolLM2", on_the_gpu),
            mock.patch.object(torch.nn.Module, "to", lambda module, *args: moved.append(str(args[0])) or module),
            mock.patch.object(train, "open_corpus", return_value=corpus),
            mock.patch.object(checkpoint, "save_checkpoint", lambda *args: saved.append(args) or True),
            mock.patch.object(train, "newest_checkpoint", lambda folder: folder),
            mock.patch.object(train.Ranks, "say", say),
            mock.patch("signal.signal"),
        ):
            train.main(settings)
    saves = {tensor.device.type for tensor in tensors(saved)}
    after = torch.are_deterministic_algorithms_enabled()
    return dict(
        waits=watch.waits, saves=sorted(saves), said=said, moved=moved, deterministic=[*deterministic], after=after
    )


def generation(data, name, major, dtype):
    """Writer.generate, with its second step looked at as the one that a CUDA graph records."""
    recorded = []

    def look_at(step, device, generator):
        calls = itertools.count(1)

        def run():
            if next(calls) != 2:
                return step()
            with watch.recording():
                step()
            recorded.append(device.type)

        return run

    with gpu(name, int(major)) as watch, mock.patch.object(sample, "recorded", look_at):
        writer = sample.Writer(on_the_gpu(CONFIG, getattr(torch, dtype)))
        ways = [(0, 40, 1.0), (0.8, 40, 1.0), (0.8, 0, 0.7)]
        for prompt, count, way in itertools.product(([5, 6, 7], [5]), (1, 3), ways):
            list(writer.generate(prompt, count, 4, *way, generator=torch.Generator("cuda")))
    return dict(recorded=recorded, unrecordable=sorted(set(watch.unrecordable)))


def evaluation(data):
    """tools.evaluate on a GPU: no device is mixed up."""
    from tokenizers import Tokenizer

    asked = [(f"{n}: A cat sees ", ["a mouse", "3 bees"], 0) for n in range(20)]
    with gpu():
        model = on_the_gpu(CONFIG, torch.bfloat16)
        tokenizer = Tokenizer.from_file(f"{data}/tokenizer.json")
        return dict(answers=len(list(evaluate.evaluate(model, tokenizer, asked, 100, "questions"))))


def compiling(data, major):
    """How many graphs torch.compile makes of a training step: one for all layers, one for the loss."""
    graphs = []
    with gpu(major=int(major)), torch.device("cuda"):
        model, autocast = SmolLM2(CONFIG), torch.autocast("cuda", torch.bfloat16)
        rotary, tokens = rotary_table(torch.arange(32), CONFIG), torch.zeros(2, 33, dtype=torch.long)
        x = torch.zeros(2, 32, CONFIG.hidden_size, requires_grad=True)
    fake = x.fake_mode

    def backend(graph, inputs):
        def run(*args):
            with fake:
                return graph.forward(*args)

        graphs.append(graph)
        return run

    properties = SimpleNamespace(major=int(major))
    with (
        mock.patch.object(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),  # noqa: PT008  traced
        mock.patch.object(torch.cuda, "current_device", lambda: 0),  # noqa: PT008
    ):
        train.compile_parts(model)
        for targets in (tokens[:, 1:].contiguous(), tokens[:, 1:].clone()):
            with autocast:
                stream = x
                for layer in model.model.layers:
                    stream = layer(stream, rotary)
                model.loss(stream.detach().requires_grad_(), targets).backward()
    return dict(graphs=len(graphs))


if __name__ == "__main__":
    _, _, scenario, *arguments = sys.argv
    print(json.dumps(globals()[scenario](*arguments)))
