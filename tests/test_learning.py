"""How to know that it learns: what the README says of losses that are too good, or do not fall, shown on purpose."""

import collections
import itertools
import json
import math

from plumbing.baselines import baselines

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics, run
from test_train import trainer, values, write_shard

from model import SmolLM2, SmolLM2Config

TINY = SmolLM2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def loss_on_noise(shift):
    """What a model reaches on tokens drawn at random, new ones at each step."""
    torch.manual_seed(0)
    model = SmolLM2(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        tokens = torch.randint(0, 64, (8, 33))
        loss = model(tokens[:, :-1], tokens[:, 1:] if shift else tokens[:, :-1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_unshifted_targets_give_a_loss_that_is_too_good_to_be_true():
    assert loss_on_noise(shift=False) < 0.01
    assert loss_on_noise(shift=True) > math.log(64) - 0.1


def test_on_shuffled_tokens_it_stops_at_the_frequencies(tmp_path, data):
    shard = json.loads((data / "shard-00000.json").read_text())
    shuffle = np.random.default_rng(0).permutation
    train, val = (shuffle(np.fromfile(data / f"{split}-00000.bin", "<u2")) for split in ("train", "val"))
    write_shard(tmp_path, 0, train, val, shard["vocab_size"], data / "tokenizer.json")
    trainer(tmp_path, tmp_path / "out", "--max_steps=150", "--eval_tokens=4000", "--decay_steps=50")
    unigram = baselines(train, val)["unigram_loss"]
    assert unigram == pytest.approx(values(tmp_path / "out", "val_loss")[150], abs=0.05)
    assert unigram < math.log(shard["vocab_size"]) - 1


def test_on_text_it_passes_the_frequencies_and_then_the_pairs(tmp_path, data):
    trainer(data, tmp_path, "--max_steps=150", "--eval_interval=10", "--decay_steps=50")
    baselines, losses = metrics(tmp_path)[0], values(tmp_path, "val_loss")
    shard = json.loads((data / "shard-00000.json").read_text())
    assert baselines["unigram_loss"] == pytest.approx(shard["val"]["unigram_loss"])
    assert baselines["bigram_loss"] == pytest.approx(shard["val"]["bigram_loss"])
    passed_unigram = min(step for step, loss in losses.items() if loss < baselines["unigram_loss"])
    passed_bigram = min(step for step, loss in losses.items() if loss < baselines["bigram_loss"])
    assert 0 < passed_unigram < passed_bigram < 150


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


def test_one_batch_again_and_again(tmp_path, data):
    run(
        "train.py",
        "config/overfit.py",
        *SMALL,
        f"--data_dir={data}",
        f"--out_dir={tmp_path}",
        "--max_steps=100",
        "--model.vocab_size=0",
    )
    assert values(tmp_path, "loss")[100] < 0.1
    assert values(tmp_path, "unique_tokens")[100] == 256
    assert values(tmp_path, "val_loss")[100] > 1


def test_a_run_and_its_second_part(tmp_path, data):
    """config/cosmo5k.py with fewer steps: the second part begins where the first has ended, at the same rate."""
    small = [arg for arg in SMALL if not arg.startswith(("--warmup", "--decay", "--learning", "--sample", "--save"))]
    arguments = (
        "config/cosmo5k.py",
        *small,
        f"--data_dir={data}",
        f"--out_dir={tmp_path}",
        "--learning_rate=0.01",
        "--warmup_steps=10",
        "--save_interval=50",
    )
    first = run("train.py", *arguments, "--max_steps=100", "--sample_interval=50")
    second = run("train.py", *arguments, "--max_steps=150", "--resume=True", "--sample_interval=10")
    assert first.count("Once upon a time") == 2 and second.count("Once upon a time") == 5
    losses, rates = values(tmp_path, "loss"), values(tmp_path, "learning_rate")
    before = [losses[step] for step in range(61, 101)]
    assert 0.9 * min(before) < losses[101] < 1.1 * max(before) < losses[20]
    assert rates[5] < rates[10] == rates[100] == rates[101] == rates[150] == 0.01
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-000050",
        "checkpoint-000100",
        "checkpoint-000150",
    ]
