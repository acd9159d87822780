"""The loop: it learns what can be learned, and stopping, splitting and resuming change nothing."""

import json
import math
import shlex
import shutil

from plumbing.corpus import Mix, Sequences, validation_sequences

import numpy as np
import pytest
import torch
from conftest import metrics, run
from runs import arguments, refused_here, train_here, values, weights, write_shard
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import SmolLM2, SmolLM2Config

# ---- Learning, and what is said of it


def test_it_learns_language_and_says_so(trained, data):
    losses, evaluations = values(trained, "loss"), values(trained, "val_loss")
    assert evaluations[0] == pytest.approx(math.log(300), rel=0.02)
    assert losses[40] < 2.5 and evaluations[40] < evaluations[20] < evaluations[0]
    last, shard = metrics(trained)[-1], json.loads((data / "shard-00000.json").read_text())
    sequences = shard["train"]["tokens"] // 32 - 1
    assert last["tokens"] == 40 * 256 and last["epoch"] == pytest.approx(40 * 8 / sequences)
    assert last["unique_tokens"] == min(last["tokens"], sequences * 32)
    assert last["tokens_per_second"] > 0 and (last["mfu"] is None or last["mfu"] > 0)  # None on a CPU
    assert last["learning_rate"] == 0.01 and last["grad_norm"] > 0


def test_every_step_is_in_the_file_and_few_on_the_screen(data, tmp_path):
    printed = train_here(data, tmp_path, "--max_steps=9", "--log_interval=4")
    assert list(values(tmp_path, "loss")) == list(range(1, 10))
    shown = [line.split("/")[0] for line in printed.splitlines() if line.startswith("step ")]
    assert shown == [f"step {step}" for step in (0, 1, 4, 8, 9)]
    assert "left" in printed


@pytest.mark.parametrize("eval_tokens", [64, 640])
def test_bits_per_byte_count_the_bytes_of_the_tokens_evaluated_on(eval_tokens, data, tmp_path):
    train_here(data, tmp_path, "--max_steps=1", f"--eval_tokens={eval_tokens}")
    tokens = np.fromfile(data / "val-00000.bin", "<u2")
    starts = range(0, len(tokens) - 32, 32)
    picked = [starts[int(i)] for i in np.linspace(0, len(starts) - 1, eval_tokens // 32)]
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    texts = [tokenizer.decode(tokens[start + 1 : start + 33].tolist()) for start in picked]  # ASCII, nothing special
    nats = values(tmp_path, "val_loss")[1] * eval_tokens
    assert values(tmp_path, "val_bpb")[1] == pytest.approx(nats / math.log(2) / sum(map(len, texts)))


# ---- Batches


def of_an_epoch(bins, epoch, seed=0):
    """The sequences of 10 tokens of an epoch."""
    sequences = Sequences(bins, 10, seed)
    return np.stack([sequences[epoch * sequences.per_epoch + i] for i in range(sequences.per_epoch)])


def test_an_epoch_visits_every_sequence_once():
    bins = [np.arange(1000, 1100), np.arange(2000, 2035), np.arange(3000, 3011), np.arange(5)]
    for epoch in range(5):
        sequences = of_an_epoch(bins, epoch)
        assert (np.diff(sequences) == 1).all()  # none across two bins
        assert np.unique(sequences[:, 1:]).size == sequences[:, 1:].size == 10 * (9 + 2 + 1)


def test_epochs_differ_in_order_and_offset_and_seeds_too():
    bins = [np.arange(2000)]
    epochs = [of_an_epoch(bins, epoch)[:, 0].tolist() for epoch in range(4)]
    offsets = [{start % 10 for start in starts} for starts in epochs]
    assert all(len(offset) == 1 for offset in offsets) and len(set.union(*offsets)) > 1
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != of_an_epoch(bins, 0, seed=1)[:, 0].tolist()
    last = max(of_an_epoch([np.arange(39)], epoch).max() for epoch in range(200))
    assert last == 38, "the last tokens of a bin are never seen"


def test_sequences_do_not_depend_on_who_asks():
    bins = [np.arange(500), np.arange(300)]
    forwards = Mix({"": Sequences(bins, 10, 3)}, [1]).batch(0, 200)[0]
    assert all((Sequences(bins, 10, 3)[i] == forwards[i]).all() for i in range(199, -1, -1))


def test_validation_sequences_are_spread_and_fixed():
    bins = [np.arange(1000), np.arange(5000, 5500)]
    sequences, _ = validation_sequences(bins, 10, 200)
    assert len(sequences) == 20 and sequences[0][0] == 0 and sequences[-1][-1] >= 5480
    assert len(validation_sequences(bins, 10, 10**9)[0]) == 99 + 49


# ---- Schedule and optimizer


def test_schedule():
    settings = train.Settings(max_steps=100, warmup_steps=10, decay_steps=20)
    factors = [train.schedule(step, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([0.05 * n for n in range(20, 0, -1)])


def test_a_group_with_its_own_learning_rate_keeps_the_ratio(data, tmp_path, monkeypatch):
    AdamW, rates = torch.optim.AdamW, []

    def with_a_slow_group(groups, **options):
        groups[1]["lr"] = options["lr"] / 10
        optimizer = AdamW(groups, **options)
        optimizer.register_step_pre_hook(lambda *args: rates.append([group["lr"] for group in optimizer.param_groups]))
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", with_a_slow_group)
    for steps in (3, 4):
        train_here(data, tmp_path, f"--max_steps={steps}", "--resume=True")
    assert np.allclose(rates, 0.01 * np.outer([0.5, 1, 1, 1], [1, 0.1]))  # warmup of two steps


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(optimizer, monkeypatch):
    """Also those that somebody adds to the model, of any number of dimensions."""
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model, settings = SmolLM2(SmolLM2Config(vocab_size=50, **shape)), train.Settings(optimizer=optimizer)
    for name, size in (("scale", ()), ("bias", (3,)), ("filter", (2, 3, 4))):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(size)))
        model.model.layers[0].mlp.register_parameter(name, torch.nn.Parameter(torch.ones(size)))
    groups = [group for one in train.make_optimizers(model, settings, torch.float32) for group in one.param_groups]
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == 2 * 9 + 2 + 2 * 3 and set(held) == set(model.parameters())
    assert all((group["weight_decay"] > 0) == (p.dim() >= 2) for group in groups for p in group["params"])
    forget = lambda groups, **options: torch.optim.SGD(groups[0]["params"], lr=0.1)  # noqa: E731
    monkeypatch.setattr(torch.optim, "AdamW", forget)
    with pytest.raises(AssertionError, match="each parameter must be in exactly one group"):
        train.make_optimizers(model, settings, torch.float32)


# ---- Stopping and going on


def test_a_run_is_not_overwritten(trained, data):
    before = weights(trained, 40)
    assert "--resume=True" in refused_here(data, trained)
    assert weights(trained, 40) == before


def test_the_last_line_is_a_command_and_a_run_that_is_done_says_so(data, tmp_path):
    out, done = tmp_path / "my run", "nothing is left to do: step 1 is done, and --max_steps is 1"
    printed = train_here(data, out, "--max_steps=1")
    assert shlex.split(printed.rsplit(" with ", 1)[1]) == ["python", "sample.py", f"--model={out}"]
    assert done not in printed and done in train_here(data, out, "--max_steps=1", "--resume=True")


def test_init_from_a_checkpoint(trained, data, tmp_path):
    args = "--max_steps=1", f"--init_from={trained}"
    sentence = refused_here(data, tmp_path, *args, "--model.num_hidden_layers=3")
    assert "--model.num_hidden_layers=3" in sentence and "it is 2" in sentence
    assert "no/where" in refused_here(data, tmp_path, "--init_from=no/where")
    train_here(data, tmp_path, *args, "--model.num_hidden_layers=2")
    assert values(tmp_path, "val_loss")[0] == values(trained, "val_loss")[40]


@pytest.fixture
def words(tmp_path):
    """Data of a tokenizer of words, which has <|endoftext|> last instead of first."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "words.json"))
    write_shard(tmp_path, [*range(64)] * 20, [*range(64)] * 2, 65, tmp_path / "words.json")
    return tmp_path


def test_init_from_a_model_of_another_tokenizer(trained, words):
    checkpoint = trained / "checkpoint-000040"
    sentence = refused_here(words, words / "out", f"--init_from={checkpoint}")
    assert f"--tokenizer={checkpoint}" in sentence
    damaged = shutil.copytree(checkpoint, words / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refused_here(words, words / "out", f"--init_from={damaged}")


def test_a_model_that_chatted_becomes_one_of_documents(instruct, data, tmp_path, monkeypatch):
    """It ends texts as its data do, here and in transformers; its card says what it began from, also when resumed."""
    text, out = "3 bees", tmp_path / "run"
    ids = Tokenizer.from_file(str(data / "tokenizer.json")).encode(text).ids
    write_shard(tmp_path, [*ids, 0] * 500, [*ids, 0] * 100, 300, data / "tokenizer.json")
    monkeypatch.chdir(instruct.parent.parent)
    there = f"{instruct.parent.name}/{instruct.name}"  # from here
    args = f"--init_from={there}", "--max_steps=30", "--sample_interval=30", f"--sample_prompt={text[0]}"
    assert f"\n{text}\n" in train_here(tmp_path, out, *args)
    folder = out / "checkpoint-000030"
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    for part in (tokenizer, theirs.config, theirs.generation_config):
        assert part.bos_token_id == part.eos_token_id == 0
    assert tokenizer.chat_template is None
    continued = theirs.generate(torch.tensor([ids[:1]]), max_new_tokens=20, do_sample=False)
    assert continued[0].tolist() == [*ids, 0]
    assert run("sample.py", f"--model={out}", f"--prompt={text[0]}", "--max_new_tokens=50") == f"{text}\n"
    monkeypatch.chdir(tmp_path)
    train_here(tmp_path, out, "--max_steps=31", "--resume=True")
    card = (out / "checkpoint-000031" / "README.md").read_text()
    assert f"from the weights of {instruct.name}. " in card and instruct.parent.name not in card
    assert "did not teach it to follow instructions" in card


def test_the_end_of_text_is_that_of_the_tokenizer(words):
    train_here(words, words / "out", "--max_steps=1")
    assert SmolLM2.from_pretrained(words / "out").config.eos_token_id == 64


def test_a_checkpoint_is_a_hugging_face_folder(trained):
    folder = trained / "checkpoint-000040"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names | {"README.md", "trainer_state.pt"}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("7: A cat sees a mouse.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "7: A cat sees a mouse." and tokenizer.eos_token_id == 0
    assert torch.allclose(SmolLM2.from_pretrained(folder)(ids), theirs(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_compiled_in_bfloat16_with_samples(tmp_path, data):
    args = "--max_steps=6", "--eval_tokens=320", "--sample_interval=3", "--sample_prompt=1: A cat"
    compiled = arguments(data, tmp_path / "compiled", *args, "--compile=True", "--dtype=bfloat16")
    assert run("train.py", *compiled).count("1: A cat") == 2
    train_here(data, tmp_path / "plain", *args)
    for name in ("loss", "val_loss"):
        assert values(tmp_path / "compiled", name) == pytest.approx(values(tmp_path / "plain", name), rel=0.02)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--batch_tokens=1000", "multiple"),
        ("--micro_batch=3", "multiple"),
        ("--seq_len=256 --micro_batch=1", "128 positions"),
        ("--data_dir=/nowhere", "prepare.py"),
        ("--model.vocab_size=200", "200 tokens"),
        ("--model.num_key_value_heads=3", "num_key_value_heads"),
        ("--device=abacus", "--device=abacus cannot be used here"),
        ("--timeout=-1", "--timeout=-1"),
        (f"--sample_interval=5 --sample_prompt={'7' * 128}", "128 tokens"),
    ],
)
def test_bad_settings(argument, answer, tmp_path, data):
    assert answer in refused_here(data, tmp_path / "out", *argument.replace(" --", "\n--").split("\n"))
    assert not (tmp_path / "out").exists()
