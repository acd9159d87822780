"""The commands of the documentation, as a newcomer runs them, with fewer steps; and the tests that it names."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from plumbing.settings import load_settings

import pytest
from conftest import ROOT, environment, metrics, sentences
from transformers import AutoModelForCausalLM

DOCUMENTS = [ROOT / folder / "README.md" for folder in ("", "data", "tests", "tools")]


def blocks(path=ROOT / "README.md", language="sh"):
    """The blocks of commands in a document."""
    return re.findall(rf"```{language}\n(.*?)\n```", path.read_text(), re.DOTALL)


def test_options_in_the_documentation_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    script = r"(?:^ *|`|&& )(?:python|torchrun [^\n`]*?) (-m tools\.|)([a-z]+)(?:\.py)?((?: [^\s`&]+)*)"
    commands = [found for found in re.findall(script, text, re.MULTILINE) if found[1] != "model"]
    assert len(commands) > 30 and len({script for tool, script, _ in commands if tool}) == 6
    for tool, script, arguments in commands:
        module = importlib.import_module(f"tools.{script}" if tool else script)
        load_settings(None if tool else script, module.Settings, shlex.split(arguments))


def test_tests_in_the_documentation_exist():
    code = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+(?:\.py)?)`", "".join(path.read_text() for path in DOCUMENTS))):
        assert (ROOT / "tests" / name).exists() or f"def {name}(" in code, name


def as_typed(commands, folder, before="", **variables):
    """Run them in a folder that has nothing but the project's code; returns what they print."""
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "config", ROOT / "plumbing"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    env = environment(PATH=f"{before}{Path(sys.executable).parent}:/usr/bin:/bin", **variables)
    line = ["bash", "-e", "-c", commands]
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pytorch_that_is_there_stays(tmp_path):
    """The command in the comment gives pip all requirements but torch."""
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@" && cat "$3"\n')
    (tmp_path / "pip").chmod(0o755)
    (line,) = re.findall(r"^# where PyTorch .*: (.*)", blocks()[0], re.MULTILINE)
    printed = as_typed(line, tmp_path, before=f"{tmp_path}:")
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("torch==")]
    assert printed.splitlines() == ["install -r /dev/stdin", *wanted]


@pytest.mark.slow
def test_the_first_commands(tmp_path):
    _, steps = blocks()[0].split("pip install -r requirements.txt\n")
    short = steps.lstrip(" &\n").replace("train.py config/tiny.py", "train.py config/tiny.py --max_steps=3")
    assert short.count("--max_steps") == 1
    printed = as_typed(short, tmp_path)
    shard = json.loads((tmp_path / "data" / "python-docs" / "shard-00000.json").read_text())
    assert shard["train"]["documents"] > 7000 and shard["train"]["bytes"] > 6e6
    assert 0.03 < shard["val"]["documents"] / shard["train"]["documents"] < 0.07
    assert (tmp_path / "out" / "tiny" / "checkpoint-000003" / "model.safetensors").exists()
    assert printed.rsplit("--model=out/tiny\n", 1)[1].startswith("Parameters")


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
    (tmp_path / "input.txt").write_text("\n\n".join(sentences(200, seed=2)))
    scratch, tuned = (block for block in blocks() if "--source=input.txt" in block or "--source=books" in block)
    fewer = "--max_steps=20 --seq_len=32 --eval_tokens=320 --compile=False --device=cpu --dtype=float32"
    tuned = tuned.replace("--max_steps=200", fewer).replace("--batch_tokens=65536", "--batch_tokens=256")
    scratch = scratch.replace("config/tiny.py", f"config/tiny.py {fewer} --batch_tokens=256")
    recipes = f"{tuned}\n{scratch}".replace("sample.py", "sample.py --max_new_tokens=60").replace("1024", "300")
    assert recipes.count(fewer) == recipes.count("--batch_tokens=256") == recipes.count("--max_new_tokens=60") == 2
    printed = as_typed(recipes, tmp_path, **hub.environment)  # one after the other
    for model in ("books", "mine"):
        assert printed.split(f"--model=out/{model}\n", 1)[1].startswith("It was")
    lines = metrics(tmp_path / "out" / "books")
    assert lines[0]["val_loss"] < 3  # it began with what the published one knows
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    card = (tmp_path / "out" / "books" / "checkpoint-000020" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M\n" in card and "the weights of HuggingFaceTB/SmolLM2-135M." in card


def test_the_lines_of_python(tmp_path, data, trained):
    """On a smaller corpus; twice, as in a notebook, where the second time has to resume."""
    (lines,) = blocks(ROOT / "tools" / "README.md", language="python")
    smaller = {
        "data/python-docs": data,
        "out/tiny": trained,
        "out/more": tmp_path / "out",
        "seq_len=256": "seq_len=32",
        "2048, 20, 65_536": "256, 20, 640",
        "sample.Settings()": "sample.Settings(max_new_tokens=9)",
    }
    for there, here in smaller.items():
        assert there in lines
        lines = lines.replace(there, str(here))
    again = lines.replace("256, 20", "256, 21").replace("train.Settings(", "train.Settings(resume=True, ")
    (tmp_path / "mine.py").write_text(f"{lines}\n{again}")
    printed = as_typed("python mine.py", tmp_path)
    assert printed.count("is the last checkpoint") == 2 and "step 21/21" in printed
    assert [line["step"] for line in metrics(tmp_path / "out") if "val_loss" in line] == [0, 20, 21]
