"""The architecture: counted, compared with transformers' LlamaForCausalLM, and refused where it is another one."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from plumbing.generation import join
from plumbing.pretrained import read_config

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from model import (
    KVCache,
    SmolLM2,
    SmolLM2Config,
    attention_mask,
    choose,
    count_parameters,
    make_norm,
    rotary_table,
    rotate,
    training_flops,
)

ROOT = Path(__file__).parent.parent
GROUPED = SmolLM2Config(
    vocab_size=211,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=10_000.0,
)
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


def in_transformers(model, folder):
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "REMOVE"}))


# ---- Counting


@pytest.mark.parametrize(("size", "count"), [("135m", 134_515_008), ("360m", 361_821_120), ("1_7b", 1_711_376_384)])
def test_parameter_count(size, count):
    config = getattr(SmolLM2Config, f"smollm2_{size}")()
    with torch.device("meta"):
        module = SmolLM2(config)
    assert sum(parameter.numel() for parameter in module.parameters()) == count == count_parameters(config)


def test_defaults_are_the_published_135m():
    assert SmolLM2Config() == SmolLM2Config.smollm2_135m()


def test_report_derives_the_count_and_the_wrong_ones():
    report = subprocess.run([sys.executable, "model.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for number in ("134,515,008", "121,243,968", "135,104,832", "3,540,096", "28,311,552", "1,019,426,688"):
        assert number in report
    assert report.count("134,515,008") == 2  # the sum, and what PyTorch counts
    refused = subprocess.run([sys.executable, "model.py", "2b"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode and "2b" in refused.stderr and "Traceback" not in refused.stderr


def test_arithmetic_in_the_comments_holds():
    number = r"\(?[\d,.]+(?:/\d)?\)?"
    claims = re.findall(
        rf"({number}(?: \(\w+\))?(?: [x+] {number}(?: \([\w ]+\))?)+) = ([\d,]+)", (ROOT / "model.py").read_text()
    )
    assert len(claims) >= 10
    for left, right in claims:
        left = re.sub(r"\([a-zA-Z ]+\)", "", left).replace(",", "").replace("x", "*")
        assert eval(left) == int(right.rstrip(",").replace(",", "")), (left, right)


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


def test_rope_theta_in_its_old_place_and_a_tied_head_stored_twice(ids, tmp_path):
    model = SmolLM2(GROUPED)
    model.save_pretrained(tmp_path)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    again = SmolLM2.from_pretrained(tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_saved_and_loaded_is_the_same(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    again = SmolLM2.from_pretrained(tmp_path)
    assert torch.equal(model(ids), again(ids))
    assert replace(again.config, initializer_range=None) == model.config
    assert all(parameter.requires_grad for parameter in again.parameters())


# ---- Initialisation and loss


@pytest.mark.parametrize("vocab_size", [211, 4096])
def test_first_loss_is_ln_vocabulary(vocab_size, config):
    torch.manual_seed(0)
    model = SmolLM2(replace(config, vocab_size=vocab_size, hidden_size=96))
    ids = torch.randint(vocab_size, (16, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:]).item() / math.log(vocab_size) - 1) < 0.02


def test_initial_standard_deviations():
    model = SmolLM2(replace(GROUPED, hidden_size=96, vocab_size=1000))
    layer, std = model.model.layers[1], 1 / math.sqrt(96)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert writes.weight.std().item() == pytest.approx(std / math.sqrt(2 * 3), rel=0.05)


# ---- Rotary positions


def test_attention_scores_depend_on_the_distance_only():
    config = SmolLM2Config()
    q, k = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(m, n):
        turned = [rotate(x, rotary_table(torch.tensor([p]), config)) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum().item()

    near = score(5, 3)
    assert score(1005, 1003) == pytest.approx(near, abs=1e-2)
    assert score(8005, 8003) == pytest.approx(near, abs=1e-2)
    assert abs(score(6, 3) - near) > 0.1
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)


def test_turns_in_the_comment():
    turns = [2 * math.pi * 100_000 ** (2 * pair / 64) for pair in (0, 8, 16, 24, 31)]
    assert [round(turn, 1 if turn < 10 else 0) for turn in turns] == [6.3, 112, 1987, 35333, 438460]


# ---- Precision: what stays in float32, against float64, and what bfloat16 would make of it


def distance(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def test_the_rotary_table_is_right_at_the_end_of_the_longest_text():
    config, positions = SmolLM2Config(), torch.arange(8000, 8192)
    speeds = config.rope_theta ** -(torch.arange(0, 64, 2).double() / 64)
    exact = (positions.double()[:, None] * speeds).cos()
    assert distance(rotary_table(positions, config)[0, :, :32], exact) < 1e-3
    assert distance((positions.bfloat16()[:, None] * speeds.bfloat16()).cos(), exact) > 0.5


def test_rmsnorm_of_16_bit_numbers_is_only_rounded(model):
    x = torch.randn(4, 64).bfloat16() * 30
    norm = make_norm(SmolLM2Config(hidden_size=64)).bfloat16()
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


def test_what_bfloat16_costs(ids):
    torch.manual_seed(0)
    model = SmolLM2(SmolLM2Config(num_hidden_layers=4))
    ids, exact = ids % 256, SmolLM2(model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference = exact(ids)
        assert distance(model(ids), reference) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-4 < distance(model(ids), reference) < 2e-2


# ---- Generation


def greedy(model, ids, n, **options):
    return torch.stack(list(model.generate(ids, n, temperature=0, eos_token_id=None, **options)), 1)


def test_cached_generation_equals_uncached_and_transformers(model, ids, tmp_path):
    prompt = ids[:, :7]
    cached = greedy(model, prompt, 20)
    uncached = prompt
    for _ in range(20):
        uncached = torch.cat((uncached, model(uncached)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(torch.cat((prompt, cached), 1), uncached)
    reference = in_transformers(model, tmp_path)
    theirs = reference.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(theirs, uncached)


def test_a_text_in_pieces_through_the_cache_gives_the_same(model, ids):
    none, slots, pieces = torch.zeros(2, 1, dtype=torch.long), torch.arange(40), []
    caches = [KVCache(model, 2, 40, None) for _ in model.model.layers]
    for first, last in ((0, 10), (10, 11), (11, 33)):
        for cache in caches:
            cache.slots = slots[first:last]
        mask = attention_mask(slots[first:last], 40, none)
        pieces.append(model.hidden_states(ids[:, first:last], slots[first:last], mask, caches))
    assert torch.allclose(torch.cat(pieces, 1), model.hidden_states(ids, slots[:33]), atol=1e-5)


def test_prompts_of_different_lengths_are_continued_as_if_alone(model, ids):
    prompts = [ids[0, :3].tolist(), ids[1, :12].tolist(), ids[0, 5:6].tolist()]
    together = greedy(model, prompts, 20)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(greedy(model, [prompt], 20)[0], row)


def test_a_prompt_that_all_rows_share_is_read_once(model, ids):
    rows_read, hidden_states = [], model.hidden_states

    def watched(tokens, *args):
        rows_read.append(tuple(tokens.shape))
        return hidden_states(tokens, *args)

    model.hidden_states = watched
    prompt = ids[:1, :9]
    rows = greedy(model, prompt.repeat(3, 1), 12)
    assert rows_read[:2] == [(1, 9), (3, 1)]
    assert torch.equal(rows, greedy(model, prompt, 12).repeat(3, 1))
    drawn = torch.stack(list(model.generate([prompt[0].tolist()] * 3, 12)), 1)
    assert len(set(map(tuple, drawn.tolist()))) == 3


def test_joined_matrices_write_the_same_and_need_no_memory(model, ids, tmp_path):
    text, loss = greedy(model, ids[:, :5], 20), model(ids[:, :-1], ids[:, 1:])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    join(model)
    assert torch.equal(greedy(model, ids[:, :5], 20), text)
    assert torch.equal(model(ids[:, :-1], ids[:, 1:]), loss)
    block = model.model.layers[1].self_attn
    assert block.k_proj.weight.data_ptr() == block.joined[block.q_proj.out_features :].data_ptr()
    model.save_pretrained(tmp_path)
    again = SmolLM2.from_pretrained(tmp_path)
    assert before.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())


@pytest.mark.slow
def test_compiled_layers_write_the_same(model, ids):
    eager = greedy(model, ids[:, :5], 10)
    for layer in model.model.layers:
        layer.compile()
    assert torch.equal(greedy(model, ids[:, :5], 10), eager)
    assert torch.equal(greedy(model, ids[:, :9], 10)[:, :1], model(ids[:, :9])[:, -1:].argmax(-1))


def test_no_token_sees_a_later_one(model, ids):
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % model.config.vocab_size
    assert torch.equal(model(ids)[:, :20], model(other)[:, :20])
    assert not torch.equal(model(ids)[:, 20:], model(other)[:, 20:])


def test_generation_ends_at_the_end_token(model, ids):
    free = greedy(model, ids[:, :5], 30)
    end = free[0, 3].item()
    rows = torch.stack(list(model.generate(ids[:, :5], 30, temperature=0, eos_token_id=end)), 1)
    for row, unbounded in zip(rows, free, strict=True):
        stop = unbounded.tolist().index(end) + 1 if end in unbounded else len(row)
        assert row[:stop].tolist() == unbounded[:stop].tolist()
        assert (row[stop:] == end).all()
    assert len(list(model.generate(ids[:1, :5], 30, temperature=0, eos_token_id=end))) <= 4 + 7


def test_too_many_positions_are_refused(model, ids):
    with pytest.raises(ValueError, match="64"):
        list(model.generate(ids, 32))
    with pytest.raises(ValueError, match="empty"):
        list(model.generate([[1, 2], []], 5))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_choose():
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0]]).repeat(4000, 1)
    torch.manual_seed(0)
    assert choose(logits, 0, 0, 1.0).unique().tolist() == [1]
    assert choose(logits, 1.0, 1, 1.0).unique().tolist() == [1]
    assert choose(logits, 1.0, 2, 1.0).unique().tolist() == [1, 2]
    assert choose(logits, 1.0, 0, 0.7).unique().tolist() == [1, 2]  # 0.64 alone is less than 0.7
    drawn = choose(logits, 2.0, 0, 1.0).bincount(minlength=4) / 4000
    assert torch.allclose(drawn, (logits[0] / 2).softmax(0), atol=0.03)


def test_same_generator_same_text(model, ids):
    def text(seed):
        return [t.tolist() for t in model.generate(ids[:, :4], 20, generator=torch.Generator().manual_seed(seed))]

    assert text(5) == text(5) != text(6)


# ---- What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 4),
        ("num_attention_heads", 5),
        ("hidden_size", 0),
        ("rope_theta", -1.0),
        ("vocab_size", "many"),
        ("num_hidden_layers", 2.5),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", math.nan),
    ],
)
def test_bad_configurations_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        SmolLM2(replace(GROUPED, **{field: value}))


def test_unknown_field():
    with pytest.raises(TypeError, match="hidden_dim"):
        SmolLM2Config(hidden_dim=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_interleaved", True),
        ("head_dim", 16),
        ("sliding_window", 4096),
        ("hidden_size", "REMOVE"),
        ("vocab_size", None),
        ("rope_parameters", 7),
        ("num_attention_heads", 10**30),
    ],
)
def test_config_json_of_another_architecture_names_the_field(field, value, tmp_path):
    SmolLM2(GROUPED).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    with pytest.raises(ValueError, match=field):
        read_config(tmp_path, SmolLM2Config)


def test_weights_that_do_not_fit_name_the_tensor(tmp_path):
    SmolLM2(GROUPED).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file itself is written over
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors, problem in (
        ({k: v for k, v in whole.items() if k != name}, f"no tensor {name}"),
        (whole | {"model.layers.1.mlp.up_proj.bias": torch.zeros(3)}, "up_proj.bias"),
        (whole | {name: torch.zeros(3, 4)}, rf"{name} has the shape \(3, 4\)"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=problem):
            SmolLM2.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        SmolLM2.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        SmolLM2.from_pretrained(tmp_path)


def test_an_index_never_leads_out_of_its_folder(tmp_path):
    SmolLM2(GROUPED).save_pretrained(tmp_path / "a")
    SmolLM2(GROUPED).save_pretrained(tmp_path / "b")
    index = {"weight_map": {"model.norm.weight": "../b/model.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        SmolLM2.from_pretrained(tmp_path / "a")
