"""The README's commands, as a newcomer runs them, with fewer steps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, metrics, sentences
from transformers import AutoModelForCausalLM


def commands(heading):
    """The blocks of commands below a heading."""
    section = (ROOT / "README.md").read_text().split(f"\n{heading}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)\n```", section, re.DOTALL)


def as_typed(commands, folder, **variables):
    """Run them in a folder that has nothing but the project's code; returns what they print."""
    for path in [*ROOT.glob("*.py"), ROOT / "config", ROOT / "plumbing"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=environment(PATH=path, **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_command(tmp_path):
    first = re.search(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    install, rest = first.split("requirements.txt && ")
    assert install.endswith("pip install -r ")
    steps = rest.replace("train.py config/tiny.py", "train.py config/tiny.py --max_steps=3 --eval_tokens=4096")
    assert steps.count("--max_steps") == 1
    printed = as_typed(steps, tmp_path)
    shard = json.loads((tmp_path / "data" / "python-docs" / "shard-00000.json").read_text())
    assert shard["train"]["documents"] > 7000 and shard["train"]["bytes"] > 6e6
    assert 0.03 < shard["val"]["documents"] / shard["train"]["documents"] < 0.07
    assert printed.rsplit("--model=out/tiny\n", 1)[1].startswith("Parameters")
    assert (tmp_path / "out" / "tiny" / "checkpoint-000003" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipes_for_your_own_text(tmp_path, hub, trained):
    published = hub.folder / "models" / "HuggingFaceTB"
    theirs = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000040", dtype="bfloat16")
    theirs.save_pretrained(published / "SmolLM2-135M", max_shard_size="20KB")
    (published / "cosmo2-tokenizer").mkdir()
    shutil.copy(trained / "checkpoint-000040" / "tokenizer.json", published / "cosmo2-tokenizer")
    (tmp_path / "books").mkdir()
    for number, text in enumerate(sentences(100, seed=1)):
        (tmp_path / "books" / f"{number}.txt").write_text(text.replace("bird", "horse"))
    tuned, scratch = commands("## Your own text")
    fewer = "--max_steps=20 --seq_len=32 --eval_tokens=320 --compile=False --device=cpu --dtype=float32"
    tuned = tuned.replace("--max_steps=200", fewer).replace("--batch_tokens=65536", "--batch_tokens=256")
    scratch = scratch.replace("config/tiny.py", f"config/tiny.py {fewer} --batch_tokens=256")
    recipes = f"{tuned}\n{scratch}".replace("sample.py", "sample.py --max_new_tokens=60").replace("4096", "300")
    assert recipes.count(fewer) == recipes.count("--batch_tokens=256") == recipes.count("--max_new_tokens=60") == 2
    printed = as_typed(recipes, tmp_path, **hub.environment)  # one after the other
    for model in ("books", "books-tiny"):
        assert printed.split(f"--model=out/{model}\n", 1)[1].startswith("It was")
    lines = metrics(tmp_path / "out" / "books")
    assert lines[0]["val_loss"] < 3  # it began with what the published one knows
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    card = (tmp_path / "out" / "books" / "checkpoint-000020" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M\n" in card
