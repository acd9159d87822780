"""Text from a checkpoint, through the command line."""

import shutil

import pytest
import torch
from conftest import refused, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import sample
from model import SmolLM2Config

PROMPT = "--prompt=7: A cat"


def test_it_writes_what_it_learned(trained):
    text = run("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=60", "--temperature=0")
    assert text.startswith("7: A cat")
    assert "<|endoftext|>" not in text
    assert any(words in text for words in ("sees", "hears", "follows"))


def test_the_seed_decides_the_text(trained):
    def text(*args):
        return run("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=30", *args)

    assert text() == text("--seed=0") != text("--seed=1")


def test_several_samples_from_a_prompt_in_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("7: A cat")
    prompt = f"--prompt=FILE:{tmp_path / 'prompt.txt'}"
    text = run("sample.py", f"--model={trained}", prompt, "--num_samples=3", "--max_new_tokens=8")
    samples = text.split("\n" + "-" * 80 + "\n")
    assert len(samples) == 3 and all(sample.startswith("7: A cat") for sample in samples)
    assert len(set(samples)) > 1


def test_an_empty_prompt_begins_a_document(trained):
    assert run("sample.py", f"--model={trained}", "--prompt=", "--max_new_tokens=20").strip()


def test_model_by_run_by_checkpoint_and_from_the_hub(trained, hub):
    arguments = (PROMPT, "--max_new_tokens=20")
    by_run = run("sample.py", f"--model={trained}", *arguments)
    assert run("sample.py", f"--model={trained / 'checkpoint-000040'}", *arguments) == by_run
    assert run("sample.py", f"--model={trained / 'checkpoint-000020'}", *arguments) != by_run
    shutil.copytree(trained / "checkpoint-000040", hub.folder / "models" / "somebody" / "talk")
    assert run("sample.py", "--model=somebody/talk", *arguments, **hub.environment) == by_run
    assert not any("trainer_state" in request for request in hub.requests)


class Spells:
    """A model that writes given tokens."""

    config = SmolLM2Config()

    def __init__(self, ids):
        self.ids = ids

    def generate(self, *args):
        return (torch.tensor([id]) for id in self.ids)


def test_only_whole_characters_are_printed_and_no_special_tokens():
    alphabet = {letter: id + 1 for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0} | alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    text = "né \U0001f600!"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    generator = torch.Generator()
    pieces = list(sample.stream(Spells([*ids[:3], 0, *ids[3:]]), tokenizer, "a", sample.Settings(), generator))
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [("--temperature=-1", "--temperature"), ("--top_p=0", "--top_p"), ("--top_k=-1", "--top_k"),
     ("--max_new_tokens=200", "128"), ("--prompt=FILE:nowhere.txt", "nowhere.txt"), ("--model=no/such", "no/such"),
     ("--model=/nowhere", "/nowhere"), ("--device=abacus", "abacus")],
)  # fmt: skip
def test_bad_settings(argument, answer, trained):
    assert answer in refused("sample.py", f"--model={trained}", argument)


def test_a_folder_that_is_no_model(tmp_path, trained):
    assert "config.json" in refused("sample.py", f"--model={tmp_path}")
    shutil.copytree(trained / "checkpoint-000040", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("sample.py", f"--model={tmp_path / 'model'}")
