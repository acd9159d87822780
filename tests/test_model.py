"""The architecture: counted, compared with transformers' LlamaForCausalLM, and refused where it is another one."""

import copy
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from plumbing.pretrained import read_config

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from model import RMSNorm, SmolLM2, SmolLM2Config, choose, count_parameters, report, rotary_table, training_flops
from sample import Writer
from train import Settings, make_optimizers

SOURCE = ROOT / "model.py"
SMALL = dict(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=64)
GROUPED = SmolLM2Config(num_attention_heads=6, num_key_value_heads=2, rope_theta=10_000.0, **SMALL)
MULTI_HEAD = replace(GROUPED, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)


@pytest.fixture(params=[GROUPED, MULTI_HEAD], ids=["grouped tied", "multi-head untied"])
def config(request):
    return request.param


@pytest.fixture
def model(config):
    torch.manual_seed(1)
    return SmolLM2(config)


@pytest.fixture
def ids(config):
    return torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    SmolLM2(GROUPED).save_pretrained(tmp_path)
    return tmp_path


def in_transformers(model, folder):
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---- Counting


@pytest.mark.parametrize(
    ("size", "changes", "count"),
    [("135m", {}, 134_515_008), ("360m", {}, 361_821_120), ("1_7b", {}, 1_711_376_384),
     ("135m", {"tie_word_embeddings": False}, 162_826_560)],
)  # fmt: skip
def test_parameter_count(size, changes, count):
    config = replace(getattr(SmolLM2Config, f"smollm2_{size}")(), **changes)
    with torch.device("meta"):
        module = SmolLM2(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == count == count_parameters(config)


def test_report_derives_the_count_and_the_wrong_ones(capsys):
    report("135m")
    printed = capsys.readouterr().out
    assert all(number in printed for number in ("3,540,096", "28,311,552", "1,019,426,688"))
    for mistaken in ("162,826,560", "135,104,832", "147,786,048", "121,243,968"):
        assert mistaken in printed
    assert printed.count("134,515,008") == 2  # the sum, and what PyTorch counts


def test_arithmetic_in_the_comments_holds():
    number = r"\(?[\d,.]+(?:/\d)?\)?"
    claim = rf"({number}(?: \(\w+\))?(?: [x+] {number}(?: \([\w ]+\))?)+) = ([\d,]+)"
    claims = re.findall(claim, SOURCE.read_text())
    assert len(claims) >= 10
    for left, right in claims:
        left = re.sub(r"\([a-zA-Z ]+\)", "", left).replace(",", "").replace("x", "*")
        assert eval(left) == int(right.rstrip(",").replace(",", "")), (left, right)
    rows = (re.search(row, SOURCE.read_text())[1].split() for row in ("pair j    +(.+)", "once in +(.+) tokens"))
    for pair, turn in zip(*rows, strict=True):
        assert 2 * math.pi * 100_000 ** (2 * int(pair) / 64) == pytest.approx(float(turn.replace(",", "")), abs=0.5)


def test_training_flops_are_those_that_pytorch_counts_and_attention_by_hand():
    config, T = SmolLM2Config(vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3), 128
    config = replace(config, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.randint(0, 500, (2, T))
    with FlopCounterMode(display=False) as counter:  # it counts products of matrices, and not this attention
        SmolLM2(config)(ids, ids).backward()
    pairs = sum(1 for query in range(T) for key in range(T) if key <= query)
    attention = 3 * 3 * (2 + 2) * 64 * pairs / T  # layers, forward and twice backward, q k and weights v
    assert training_flops(config, T) == pytest.approx(counter.get_total_flops() / (2 * T) + attention, rel=0.01)


# ---- Against transformers


def test_logits_loss_and_gradients_equal_transformers(model, ids, tmp_path):
    reference = in_transformers(model, tmp_path)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :5] = -100
    loss, logits = model(inputs, targets), model(inputs)
    theirs = reference(inputs).logits
    their_loss = F.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert torch.allclose(logits, theirs, atol=1e-4)
    assert abs(loss.item() - their_loss.item()) < 1e-5
    loss.backward()
    their_loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, atol=1e-5), name


def test_weights_from_transformers_load_here(config, ids, tmp_path):
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in vars(config).items() if v is not None}))
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ours = SmolLM2.from_pretrained(tmp_path / "sharded")
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    theirs.bfloat16().save_pretrained(tmp_path / "bfloat16")
    ours = SmolLM2.from_pretrained(tmp_path / "bfloat16", dtype=torch.bfloat16)
    assert ours.lm_head.weight.dtype == torch.bfloat16
    ours = SmolLM2.from_pretrained(tmp_path / "bfloat16")  # rounded weights, computed with in float32
    assert torch.allclose(ours(ids), theirs.float()(ids).logits, atol=1e-4)


def test_saved_and_loaded_is_the_same(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())  # rope_theta in its old place
    if model.config.tie_word_embeddings:  # some writers store the head all the same
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {"lm_head.weight": torch.zeros(211, 48)}, tmp_path / "model.safetensors")
    again = SmolLM2.from_pretrained(tmp_path)
    assert torch.equal(model(ids), again(ids))
    assert replace(again.config, initializer_range=None) == model.config
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_matrices_are_drawn_and_vectors_stay_as_they_were_made():
    torch.manual_seed(0)
    model = SmolLM2(replace(GROUPED, hidden_size=96, vocab_size=1000))
    layer, std = model.model.layers[1], 1 / math.sqrt(96)
    layer.experts, layer.scale = nn.Parameter(torch.zeros(4, 50, 50)), nn.Parameter(torch.tensor(3.0))
    layer.vector = nn.Parameter(torch.full((96,), 0.5))
    model.initialize()
    for drawn in (layer.mlp.up_proj.weight, layer.experts):
        assert drawn.std().item() == pytest.approx(std, rel=0.05)
    for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert writes.weight.std().item() == pytest.approx(std / math.sqrt(2 * 3), rel=0.05)
    assert layer.scale == 3 and (layer.vector == 0.5).all() and (layer.input_layernorm.weight == 1).all()
    gate, up = torch.randn(2, 100_000)
    assert (nn.functional.silu(gate) * up).pow(2).mean().item() == pytest.approx(0.36, abs=0.02)


# ---- Precision: what stays in float32, against float64, and what bfloat16 would make of it


def distance(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def test_the_rotary_table_is_right_at_the_end_of_the_longest_text():
    config, positions = SmolLM2Config(), torch.arange(8000, 8192)
    speeds = config.rope_theta ** -(torch.arange(0, 64, 2).double() / 64)
    exact = (positions.double()[:, None] * speeds).cos()
    assert distance(rotary_table(positions, config)[0], exact) < 1e-3
    assert distance((positions.bfloat16()[:, None] * speeds.bfloat16()).cos(), exact) > 0.5


def test_rmsnorm_of_16_bit_numbers_is_only_rounded():
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16() * 30
    norm = RMSNorm(SmolLM2Config(hidden_size=64)).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert distance(norm(x), exact) < 2**-8
    assert distance(norm(x), exact) < distance(x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), exact)


def test_the_loss_of_16_bit_logits_is_exact():
    torch.manual_seed(0)
    model = SmolLM2(SmolLM2Config(num_hidden_layers=1)).bfloat16()
    hidden, targets = torch.randn(1, 64, 576).bfloat16(), torch.randint(0, 49152, (1, 64))
    with torch.no_grad():
        logits, loss = model.lm_head(hidden), model.loss(hidden, targets)
    exact = F.cross_entropy(logits[0].double(), targets[0])
    assert loss.dtype == torch.float32 and abs(loss - exact) < 1e-5
    assert abs(F.cross_entropy(logits[0], targets[0]) - exact) > 1e-3


# ---- Generation


def greedy(model, ids, n, end=-1):
    return torch.stack(list(model.generate(ids, n, temperature=0, eos_token_id=end)), 1)


def test_cached_generation_equals_uncached_and_transformers(model, ids, tmp_path):
    prompt = ids[:, :7]
    uncached = prompt
    for _ in range(20):
        uncached = torch.cat((uncached, model(uncached)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(torch.cat((prompt, greedy(model, prompt, 20)), 1), uncached)
    reference = in_transformers(model, tmp_path)
    theirs = reference.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(theirs, uncached)


def test_no_token_sees_a_later_one(model, ids):
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % model.config.vocab_size
    assert torch.equal(model(ids)[:, :20], model(other)[:, :20])
    assert not torch.equal(model(ids)[:, 20:], model(other)[:, 20:])


def test_generation_ends_at_the_end_token(model, ids):
    free = greedy(model, ids[:, :5], 30)
    end = free[0, 3].item()
    for row, unbounded in zip(greedy(model, ids[:, :5], 30, end), free, strict=True):
        stop = unbounded.tolist().index(end) + 1 if end in unbounded else len(row)
        assert row[:stop].tolist() == unbounded[:stop].tolist()
        assert (row[stop:] == end).all()
    alone = greedy(model, ids[:1, :5], 30, end)[0].tolist()
    assert alone.index(end) == len(alone) - 1 <= 3
    model.config.eos_token_id = end  # what ends a text if nothing else is said
    assert torch.cat(list(model.generate(ids[:1, :5], 30, 0))).tolist() == alone
    fast = torch.cat(list(Writer(model).generate(ids[0, :5].tolist(), 1, 30, 0))).tolist()
    assert fast[: len(alone)] == alone and set(fast[len(alone) :]) <= {end} and len(fast) <= len(alone) + 7


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "compile"),
    [(0, 40, 1.0, False), (0.8, 40, 1.0, False), (1.5, 0, 0.9, False),
     pytest.param(0, 40, 1.0, True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_writer_gives_the_tokens_of_generate(temperature, top_k, top_p, compile, model, ids):
    prompt, writer = ids[0, :7], Writer(model, compile)

    def both(end):
        how = 50, temperature, top_k, top_p, end
        plain = model.generate(prompt.expand(3, -1), *how, torch.Generator().manual_seed(3))
        fast = writer.generate(prompt.tolist(), 3, *how, torch.Generator().manual_seed(3))
        return torch.stack(list(plain)), torch.stack(list(fast))

    plain, fast = both(end=-1)
    assert torch.equal(plain, fast) and len(fast) == 50
    assert len(set(map(tuple, fast.T.tolist()))) == (3 if temperature else 1)
    plain, fast = both(end=plain[20, 0].item())
    assert torch.equal(plain, fast[: len(plain)])
    assert (fast[len(plain) :] == plain[-1]).all() and len(fast) <= len(plain) + 7


def test_a_writer_reads_a_prompt_once_and_joins_matrices_in_place(model, ids):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loss, hidden_states, read = model(ids[:, :-1], ids[:, 1:]), model.hidden_states, []
    model.hidden_states = lambda tokens, *args, **more: (
        read.append(tokens.shape) or hidden_states(tokens, *args, **more)
    )
    writer, block = Writer(model), model.model.layers[1].self_attn
    assert len(list(writer.generate(ids[0].tolist(), 3, 5))) == 5 and read == [(1, 33)]
    assert block.k_proj.weight.data_ptr() == writer.weights[1]["qkv_proj"][block.q_proj.out_features :].data_ptr()
    assert torch.equal(model(ids[:, :-1], ids[:, 1:]), loss)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_next_turn_reads_only_what_is_new(model, ids):
    """Also after a text that was not read to its end, one of several, one whose reader adds it to the prompt, and texts
    that were written at the same time: the tokens are those of a model that remembers nothing."""
    plain, writer, hidden_states, read = copy.deepcopy(model), Writer(model), model.hidden_states, []
    model.hidden_states = lambda tokens, *args: read.append(tokens.size(1)) or hidden_states(tokens, *args)

    def write(prompt):
        return (new.item() for new in writer.generate(prompt, 1, 9, 0, eos_token_id=-1))

    def turn(prompt, new=None):
        new = list(new or write(prompt))
        assert new == greedy(plain, torch.tensor([prompt]), 9)[0, : len(new)].tolist()
        return [*prompt, *new, 7, 8]

    text = turn(ids[0, :5].tolist())
    text = turn(text, itertools.islice(write(text), 3))
    rows = torch.stack(list(writer.generate(text, 3, 9, 2.0, eos_token_id=-1)), 1).tolist()
    assert read == [5, 3, 3]  # the newest token of a text was not read yet
    for row in reversed(rows):
        turn([*text, *row, 7])
    grown = turn([*text[:10], text[10] + 1, 9])
    prompts = grown[:], ids[1, :9].tolist()
    for new in write(grown):
        grown.append(new)
    turn([*grown, 7])
    for prompt, new in zip(prompts, zip(*zip(*map(write, prompts), strict=True), strict=True), strict=True):
        turn(turn(prompt, new))


def test_conversations_in_several_threads_do_not_mix(model, ids):
    plain, writer = copy.deepcopy(model), Writer(model)

    def talk(text):
        for _ in range(4):
            text = [*text, *(new.item() for new in writer.generate(text, 1, 6, 0, eos_token_id=-1)), 7]
        return text

    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(talk, ids[:, :20].reshape(8, 5).tolist()))
    for text in texts:
        for end in range(5, len(text), 7):
            assert text[end : end + 6] == greedy(plain, torch.tensor([text[:end]]), 6)[0].tolist()


@pytest.mark.parametrize(("multiplies", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_a_prompt_is_read_in_float32_where_products_of_16_bits_are_emulated(multiplies, dtype, model, ids, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: multiplies)
    linear, prompt, seen = F.linear, ids[0, :9].tolist(), set()
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: (
        seen.add((x.shape[-2] > 1, x.dtype, weight.dtype)) or linear(x, weight, bias)
    ))  # fmt: skip
    writer = Writer(model.half())
    for _ in range(2):  # the second time after what the first left
        prompt += [*(new.item() for new in writer.generate(prompt, 1, 5)), 7, 8]
    assert seen == {(True, dtype, dtype), (False, torch.float16, torch.float16)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_too_many_positions_and_empty_prompts_are_refused(model, ids):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.zeros(1, 65, dtype=torch.long))
    for generate, prompt in ((model.generate, ids), (Writer(model).generate, ids[0].tolist())):
        assert len(list(generate(prompt, max_new_tokens=31, eos_token_id=-1))) == 31
        with pytest.raises(ValueError, match="64"):
            list(generate(prompt, max_new_tokens=32))
        with pytest.raises(ValueError, match="empty"):
            list(generate(prompt[:0] if prompt is not ids else ids[:, :0]))
        for wrong in ("text", ids[0], ids[0].tolist() if prompt is ids else ids):
            with pytest.raises(TypeError, match=r"tokenizer\.encode\(text\)\.ids"):
                list(generate(wrong))


def test_choose():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    assert choose(logits, 0, 0, 1.0).unique().tolist() == [1]
    assert choose(logits, 1.0, 1, 1.0).unique().tolist() == [1]
    assert choose(logits, 1.0, 2, 1.0).unique().tolist() == [1, 2]
    assert choose(logits, 1.0, 0, 0.7).unique().tolist() == [1, 2]  # 0.64 alone is less than 0.7
    drawn = choose(logits, 2.0, 0, 1.0).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, (logits[0] / 2).softmax(0), atol=0.03)


# ---- To build upon


def test_the_file_stands_alone(tmp_path):
    shutil.copy(SOURCE, tmp_path)
    code = """
import runpy, sys, torch, model
ids, small = torch.arange(20).view(2, 10), model.SmolLM2(model.SmolLM2Config(num_hidden_layers=1))
small(ids, ids).backward()
assert len(list(small.generate(ids, 5, eos_token_id=-1))) == 5
assert not {"plumbing", "tokenizers", "safetensors", "huggingface_hub"} & sys.modules.keys()
for size in ("360M", "2b"):
    sys.argv = ["model.py", size]
    runpy.run_path("model.py", run_name="__main__")
"""
    here = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **here)
    assert "361,821,120" in done.stdout, done.stderr
    assert done.returncode and done.stderr.startswith("usage: python model.py [135m | 360m | 1.7b], not 2b")


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_projections_can_be_hooked_and_replaced(wrapped, model, ids):
    """As LoRA or a quantized Linear does: the module it replaces is inside of another, and frozen."""
    text, losses, seen, frozen = greedy(model, ids[:, :5], 6), [], set(), {}
    blocks = [block for layer in model.model.layers for block in (layer.self_attn, layer.mlp)]
    for block in blocks:
        for name, projection in list(block.named_children()):
            if wrapped:
                setattr(block, name, nn.Sequential(projection.requires_grad_(False)))
                frozen[projection] = projection.weight.clone()
            getattr(block, name).register_forward_hook(lambda module, x, y: seen.add(module))
    assert torch.equal(greedy(model, ids[:, :5], 6), text) and len(seen) == 7 * len(model.model.layers)
    seen.clear()
    for optimizer in make_optimizers(model, Settings(learning_rate=0.01), torch.float32) * 3:
        losses.append(model(ids[:, :-1], ids[:, 1:]))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == 7 * len(model.model.layers) and losses[2] < losses[1] < losses[0]
    assert all(torch.equal(projection.weight, before) for projection, before in frozen.items())


# ---- What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 4), ("num_attention_heads", 5), ("hidden_size", "REMOVE"), ("vocab_size", None),
     ("vocab_size", 10**18), ("num_hidden_layers", 10**8), ("num_hidden_layers", 2.5), ("tie_word_embeddings", 1),
     ("rms_norm_eps", math.nan), ("rope_theta", 10**400), ("bos_token_id", 10**7),
     ("hidden_act", "gelu"), ("head_dim", 16), ("rope_parameters", 7),
     ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}), ("sliding_window", 4096)],
)  # fmt: skip
def test_config_json_that_makes_no_such_model_names_the_field(field, value, folder):
    values = json.loads((folder / "config.json").read_text()) | {field: value}
    values = {key: value for key, value in values.items() if value != "REMOVE"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=field):
        read_config(folder, SmolLM2Config)


def test_weights_that_do_not_fit_name_the_tensor(folder):
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file itself is written over
    for tensors, problem in (
        ({k: v for k, v in whole.items() if k != name}, f"no tensor {name}"),
        (whole | {"model.layers.1.mlp.up_proj.bias": torch.zeros(3)}, "up_proj.bias"),
        (whole | {name: torch.zeros(3, 4)}, rf"{name} has the shape \(3, 4\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=problem):
            SmolLM2.from_pretrained(folder)


def test_an_index_never_leads_out_of_its_folder(folder):
    SmolLM2(GROUPED).save_pretrained(folder / "inside")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        SmolLM2.from_pretrained(folder / "inside")
