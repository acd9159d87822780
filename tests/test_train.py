"""The loop: it learns what can be learned and nothing else, and stopping, splitting and resuming change nothing."""

import hashlib
import json
import math
import shutil
from pathlib import Path

from plumbing.bins import Windows, validation_windows

import numpy as np
import pytest
import torch
from conftest import SMALL, metrics, refused, run
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import SmolLM2


def trainer(data, out, *args, **options):
    return run("train.py", *SMALL, f"--data_dir={data}", f"--out_dir={out}", *args, **options)


def values(out, name):
    """One metric by step."""
    return {line["step"]: line[name] for line in metrics(out) if line.get(name) is not None}


def weights(out, step):
    return (Path(out) / f"checkpoint-{step:06d}" / "model.safetensors").read_bytes()


def write_shard(folder, index, train, val, vocab_size, tokenizer, **changes):
    """A shard of given tokens, as prepare.py would leave it."""
    tokenizer_sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    record = {"tokenizer_sha256": tokenizer_sha256, "vocab_size": vocab_size}
    for split, tokens in (("train", train), ("val", val)):
        np.asarray(tokens, "<u2").tofile(folder / f"{split}-{index:05d}.bin")
        record[split] = {"documents": 1, "tokens": len(tokens), "bytes": 3 * len(tokens), "sha256": str(index)}
    (folder / f"shard-{index:05d}.json").write_text(json.dumps(record | changes))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())


# ---- Learning


def test_it_learns_language_and_says_so(trained):
    losses, evaluations = values(trained, "loss"), values(trained, "val_loss")
    assert losses[1] == pytest.approx(math.log(300), rel=0.03)
    assert evaluations[0] == pytest.approx(math.log(300), rel=0.02)
    assert losses[40] < 2.5
    assert evaluations[40] < evaluations[20] < evaluations[0]


@pytest.mark.parametrize("eval_tokens", [64, 640])
def test_bits_per_byte_count_the_bytes_of_the_tokens_evaluated_on(eval_tokens, data, tmp_path):
    trainer(data, tmp_path, "--max_steps=1", f"--eval_tokens={eval_tokens}")
    tokens = np.fromfile(data / "val-00000.bin", "<u2")
    starts = range(0, len(tokens) - 32, 32)
    picked = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, eval_tokens // 32)]
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    texts = [
        tokenizer.decode(tokens[start + 1 : start + 33].tolist()) for start in picked
    ]  # ASCII, and no special token
    nats = values(tmp_path, "val_loss")[1] * eval_tokens
    assert values(tmp_path, "val_bpb")[1] == pytest.approx(nats / math.log(2) / sum(map(len, texts)))


def test_metrics_have_every_name(trained, data):
    last = metrics(trained)[-1]
    shard = json.loads((data / "shard-00000.json").read_text())
    assert [line["step"] for line in metrics(trained)] == list(range(41))
    assert last["tokens"] == 40 * 256
    windows = shard["train"]["tokens"] // 32 - 1
    assert last["epoch"] == pytest.approx(40 * 8 / windows)
    assert last["unique_tokens"] == min(last["tokens"], windows * 32)
    assert last["mfu"] is None and last["tokens_per_second"] > 0
    assert last["learning_rate"] == 0.01 and last["grad_norm"] > 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_a_pattern_to_the_end(optimizer, tmp_path, data):
    pattern = np.tile(np.arange(20, 60), 200)
    write_shard(tmp_path, 0, pattern, pattern[:400], 64, data / "tokenizer.json")
    trainer(tmp_path, tmp_path / "out", "--max_steps=60", f"--optimizer={optimizer}", "--decay_steps=30")
    assert values(tmp_path / "out", "val_loss")[60] < 0.1


def test_on_noise_it_does_not_get_below_the_entropy(tmp_path, data):
    """Whoever sees the targets does: inputs and targets that are not shifted, or attention that is not causal."""
    noise = np.random.default_rng(0).integers(0, 64, 21_000)
    write_shard(tmp_path, 0, noise[:20_000], noise[20_000:], 64, data / "tokenizer.json")
    trainer(tmp_path, tmp_path / "out", "--max_steps=100")
    assert values(tmp_path / "out", "val_loss")[100] > math.log(64) - 0.01
    assert values(tmp_path / "out", "loss")[100] == pytest.approx(math.log(64), rel=0.03)


# ---- Batches


def windows_of_an_epoch(bins, seq_len, epoch, seed=0):
    windows = Windows(bins, seq_len, seed)
    return [windows[epoch * windows.per_epoch + i] for i in range(windows.per_epoch)]


def test_an_epoch_visits_every_window_once():
    bins = [np.arange(1000, 1100), np.arange(2000, 2035), np.arange(3000, 3011), np.arange(5)]
    for epoch in range(5):
        windows = windows_of_an_epoch(bins, 10, epoch)
        assert all(len(window) == 11 and (np.diff(window) == 1).all() for window in windows)  # none across two bins
        predicted = np.concatenate([window[1:] for window in windows])
        assert len(predicted) == len(set(predicted)) == 10 * (9 + 2 + 1)


def test_epochs_differ_in_order_and_offset_and_seeds_too():
    bins = [np.arange(2000)]
    epochs = [[window[0] for window in windows_of_an_epoch(bins, 10, epoch)] for epoch in range(4)]
    assert len({start % 10 for starts in epochs for start in starts}) > 1
    assert all(len({start % 10 for start in starts}) == 1 for starts in epochs)
    ends = {window[-1] for epoch in range(200) for window in windows_of_an_epoch([np.arange(39)], 10, epoch)}
    assert max(ends) == 38, "the last tokens of a bin are never seen"
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != [window[0] for window in windows_of_an_epoch(bins, 10, 0, seed=1)]


def test_windows_do_not_depend_on_who_asks():
    bins = [np.arange(500), np.arange(300)]
    asked = Windows(bins, 10, 3)
    forwards = [asked[i].tolist() for i in range(200)]
    assert [Windows(bins, 10, 3)[i].tolist() for i in range(199, -1, -1)] == forwards[::-1]


def test_validation_windows_are_spread_and_fixed():
    bins = [np.arange(1000), np.arange(5000, 5500)]
    windows = validation_windows(bins, 10, 200)
    assert len(windows) == 20 and windows[0][0] == 0 and windows[-1][-1] >= 5480
    assert len(validation_windows(bins, 10, 10**9)) == 99 + 49


@pytest.mark.slow
def test_micro_batches_and_processes_give_the_losses_of_one(tmp_path, data):
    runs = {"one": [], "accumulated": ["--micro_batch=2"], "two processes": ["--micro_batch=2"]}
    for name, args in runs.items():
        trainer(data, tmp_path / name, "--max_steps=8", "--eval_interval=4", *args, nproc=2 * (name == "two processes"))
    for name in ("accumulated", "two processes"):
        for metric in ("loss", "val_loss", "grad_norm"):
            assert values(tmp_path / name, metric) == pytest.approx(values(tmp_path / "one", metric), rel=2e-4)


# ---- Schedule and optimizer


def test_schedule():
    settings = train.Settings(max_steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0)
    rates = [train.learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([0.05 * n for n in range(20, 0, -1)])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(optimizer):
    settings = train.Settings(optimizer=optimizer, weight_decay=0.5)
    model = SmolLM2(
        train.SmolLM2Config(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
        )
    )
    groups = [group for one in train.make_optimizers(model, settings, torch.float32) for group in one.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()} and len(parameters) == 2 * 9 + 2
    assert all(p.dim() == (2 if group["weight_decay"] else 1) for group in groups for p in group["params"])


# ---- Stopping and going on


def test_a_run_is_not_overwritten(trained, data):
    before = weights(trained, 40)
    assert "--resume=True" in refused("train.py", *SMALL, f"--data_dir={data}", f"--out_dir={trained}")
    assert weights(trained, 40) == before


def test_a_finished_run_can_be_prolonged(tmp_path, data):
    trainer(data, tmp_path, "--max_steps=3", "--resume=True")
    trainer(data, tmp_path, "--max_steps=3", "--resume=True")
    assert max(values(tmp_path, "loss")) == 3
    trainer(data, tmp_path, "--max_steps=5", "--resume=True", "--learning_rate=0.001")
    assert values(tmp_path, "learning_rate")[5] == 0.001


def test_init_from_a_checkpoint(trained, data, tmp_path):
    trainer(data, tmp_path, f"--init_from={trained / 'checkpoint-000040'}", "--max_steps=1")
    assert values(tmp_path, "val_loss")[0] == values(trained, "val_loss")[40]
    assert "no/where" in refused(
        "train.py", *SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'x'}", "--init_from=no/where"
    )


def test_an_architecture_beside_init_from(trained, data, tmp_path):
    args = (f"--data_dir={data}", f"--out_dir={tmp_path}", f"--init_from={trained}", "--max_steps=1")
    sentence = refused("train.py", *SMALL, *args, "--model.num_hidden_layers=3")
    assert "--model.num_hidden_layers=3" in sentence and "it is 2" in sentence
    run("train.py", *SMALL, *args, "--model.num_hidden_layers=2")


def test_init_from_a_model_of_another_tokenizer(trained, corpus, tmp_path):
    checkpoint, backwards = trained / "checkpoint-000040", tmp_path / "backwards.jsonl"
    texts = [json.loads(line)["text"][::-1] for line in corpus.read_text().splitlines()]
    backwards.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("prepare.py", f"--source={backwards}", f"--data_dir={tmp_path}", "--tokenizer=train:300", "--val_fraction=0.1")
    arguments = (*SMALL, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", f"--init_from={checkpoint}")
    assert f"--tokenizer={checkpoint}" in refused("train.py", *arguments)
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused("train.py", *arguments, f"--init_from={damaged}")


# ---- Checkpoints


def test_a_checkpoint_is_a_hugging_face_folder(trained, tmp_path):
    folder = trained / "checkpoint-000040"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names | {"README.md", "trainer_state.pt"}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("7: A cat sees a mouse.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "7: A cat sees a mouse."
    assert tokenizer.eos_token_id == 0
    ours = SmolLM2.from_pretrained(folder)
    assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    greedy = torch.stack(list(ours.generate(ids, 20, temperature=0, eos_token_id=None)), 1)
    assert (
        theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.size(1) :].tolist()
        == greedy[0].tolist()
    )


def test_the_newest_checkpoints_stay(tmp_path, data):
    (tmp_path / "checkpoint-000099.tmp").mkdir()
    trainer(data, tmp_path, "--max_steps=5", "--save_interval=1", "--keep_checkpoints=2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint-000004",
        "checkpoint-000005",
        "metrics.jsonl",
    ]


# ---- Variants


@pytest.mark.slow
def test_compiled_in_bfloat16_with_samples(tmp_path, data):
    printed = trainer(
        data,
        tmp_path,
        "--max_steps=6",
        "--compile=True",
        "--dtype=bfloat16",
        "--sample_interval=3",
        "--sample_prompt=1: A cat",
        "--eval_tokens=320",
    )
    assert printed.count("1: A cat") == 2
    trainer(data, tmp_path / "plain", "--max_steps=6", "--eval_tokens=320")
    assert values(tmp_path, "loss") == pytest.approx(values(tmp_path / "plain", "loss"), rel=0.02)
    assert values(tmp_path, "val_loss") == pytest.approx(values(tmp_path / "plain", "val_loss"), rel=0.02)


# ---- What is refused


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--batch_tokens=1000", "multiple"),
        ("--micro_batch=3", "multiple"),
        ("--seq_len=256 --micro_batch=1", "128 positions"),
        ("--seq_len=0", "--seq_len=0"),
        ("--learning_rate=nan", "nan"),
        ("--data_dir=/nowhere", "prepare.py"),
        ("--model.vocab_size=200", "200 tokens"),
        ("--model.num_key_value_heads=3", "num_key_value_heads"),
        ("--device=abacus", "abacus"),
        ("--timeout=-1", "--timeout=-1"),
        ("--max_bad_steps=0", "--max_bad_steps=0"),
        ("--sample_interval=-3", "--sample_interval=-3"),
        ("--repeat_steps=0", "--repeat_steps=0"),
        (f"--sample_interval=5 --sample_prompt={'7' * 128}", "128 tokens"),
    ],
)
def test_bad_settings(argument, answer, tmp_path, data):
    args = [*SMALL, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}", *argument.split()]
    assert answer in refused("train.py", *args)
    assert not list(tmp_path.glob("out/*"))


def test_a_larger_vocabulary_is_allowed(tmp_path, data):
    trainer(data, tmp_path, "--model.vocab_size=512", "--max_steps=1")
    assert values(tmp_path, "val_loss")[0] == pytest.approx(math.log(512), rel=0.02)


def test_a_run_goes_on_in_another_type(tmp_path, data):
    for steps, dtype in ((2, "float32"), (4, "float16"), (6, "float32")):
        trainer(data, tmp_path, f"--max_steps={steps}", f"--dtype={dtype}", "--resume=True")
    assert max(values(tmp_path, "loss")) == 6


def test_the_end_of_text_is_that_of_the_tokenizer(tmp_path, data):
    """A tokenizer that has <|endoftext|> last instead of first."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json.new"))
    write_shard(tmp_path, 0, [*range(64)] * 20, [*range(64)] * 2, 65, tmp_path / "tokenizer.json.new")
    trainer(tmp_path, tmp_path / "out", "--max_steps=1")
    config = json.loads((tmp_path / "out" / "checkpoint-000001" / "generation_config.json").read_text())
    assert config["eos_token_id"] == 64
