"""How to know that it learns: what losses and counts look like when all is well, and after each usual mistake."""

import collections
import itertools
import json
import math
from dataclasses import replace

from plumbing.tokens import baselines

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, metrics
from runs import train_here, values, write_shard

from model import SmolLM2, SmolLM2Config

TINY = SmolLM2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
LN_V = math.log(64)

# ---- Mistakes, made on purpose


def noise():
    """New tokens at each step, drawn at random: nothing can be learned."""
    return torch.randint(0, 64, (8, 33))


def counting():
    """Each token is the one before it, and one."""
    return (torch.randint(0, 64, (8, 1)) + torch.arange(33)) % 64


def losses(batch, steps=150, config=TINY, learning_rate=0.01, shift=1):
    torch.manual_seed(0)
    model, losses = SmolLM2(config), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for tokens in (batch() for _ in range(steps)):
        loss = model(tokens[:, :-1], tokens[:, shift : shift + 32])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_without_a_mistake_the_loss_starts_at_ln_v_falls_on_a_pattern_and_stays_on_noise():
    learned = losses(counting)
    untied = losses(counting, steps=1, config=replace(TINY, tie_word_embeddings=False))
    assert learned[0] == pytest.approx(LN_V + 1 / 32, abs=0.05) == untied[0]
    assert learned[-1] < 0.1
    assert min(losses(noise)[-50:]) > LN_V - 0.1


def test_an_initialization_that_is_too_large_starts_well_above_ln_v():
    assert losses(counting, steps=1, config=replace(TINY, initializer_range=2.0))[0] > LN_V + 2


def test_a_learning_rate_that_is_too_small_leaves_the_loss_where_it_was():
    assert np.ptp(losses(counting, learning_rate=1e-7)) < 0.1


def test_unshifted_targets_give_a_loss_that_is_too_good_to_be_true():
    assert losses(noise, shift=0)[-1] < 0.1


def test_without_a_causal_mask_the_loss_is_too_good_to_be_true(monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, is_causal, **more: attend(*args, **more))
    assert losses(noise)[-1] < LN_V / 2


def test_one_batch_again_and_again_is_memorized_and_worsens_the_rest(tmp_path, data):
    """By config/overfit.py, whose vocabulary is larger than that of the data."""
    args = ROOT / "config" / "overfit.py", "--max_steps=100", "--model.vocab_size=512", "--eval_interval=10"
    train_here(data, tmp_path, *args)
    assert values(tmp_path, "loss")[100] < 0.1
    evaluations = values(tmp_path, "val_loss")
    assert evaluations[0] == pytest.approx(math.log(512), abs=0.1)
    assert evaluations[100] > min(evaluations.values()) + 0.5
    assert values(tmp_path, "unique_tokens")[100] == 256


# ---- Below the frequencies of tokens, and of pairs


def test_on_shuffled_tokens_it_stops_at_the_frequencies(tmp_path, data):
    shard = json.loads((data / "shard-00000.json").read_text())
    shuffle = np.random.default_rng(0).permutation
    train, val = (shuffle(np.fromfile(data / f"{split}-00000.bin", "<u2")) for split in ("train", "val"))
    write_shard(tmp_path, train, val, shard["vocab_size"], data / "tokenizer.json")
    train_here(tmp_path, tmp_path / "out", "--max_steps=150", "--eval_tokens=4000", "--decay_steps=50")
    unigram = baselines(train, val)["unigram_loss"]
    assert unigram == pytest.approx(values(tmp_path / "out", "val_loss")[150], abs=0.05)
    assert unigram < math.log(shard["vocab_size"]) - 1


def test_on_text_it_passes_the_frequencies_and_then_the_pairs(tmp_path, data):
    train_here(data, tmp_path, "--max_steps=150", "--eval_interval=10", "--decay_steps=50")
    first, evaluations = metrics(tmp_path)[0], values(tmp_path, "val_loss")
    shard = json.loads((data / "shard-00000.json").read_text())
    passed = []
    for name in ("unigram_loss", "bigram_loss"):
        assert first[name] == pytest.approx(shard["val"][name])
        passed.append(min(step for step, loss in evaluations.items() if loss < first[name]))
    assert 0 < passed[0] < passed[1] < 150


def test_baselines_by_hand():
    rng = np.random.default_rng(0)
    train, val = (rng.integers(0, 12, n).astype("<u2") for n in (500, 80))
    val[3] = 14  # never seen in training
    counts, pairs = collections.Counter(train.tolist()), collections.Counter(itertools.pairwise(train.tolist()))
    unigram = [(counts[token] + 1) / (500 + 15) for token in range(15)]
    bigram = [(pairs[a, b] + 10 * unigram[b]) / (counts[int(a)] + 10) for a, b in itertools.pairwise(val)]
    losses = baselines(train, val, prior=10)
    assert losses["unigram_loss"] == pytest.approx(-np.mean([math.log(unigram[token]) for token in val]))
    assert losses["bigram_loss"] == pytest.approx(-np.mean(np.log(bigram)))


def test_a_pair_between_two_blocks_is_counted():
    tokens = np.zeros(2**22 + 10, "<u2")
    tokens[2**22 - 1 : 2**22 + 1] = 7, 9  # counting goes block by block, and this pair stands across
    assert baselines(tokens, np.array([7, 9], "<u2"), prior=0.01)["bigram_loss"] < 0.02
