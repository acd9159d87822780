"""The notebook for Colab and Kaggle: all its cells, as a student runs them, on a CPU at toy sizes."""

import re
import shutil
import sys
from pathlib import Path

from plumbing.settings import load_settings

import nbformat
import pytest
from conftest import ROOT, environment
from nbclient import NotebookClient
from test_chat import conversation, write_conversations

import prepare
import train

NOTEBOOK = ROOT / "tools" / "notebook.ipynb"


def test_both_recipes_have_settings_that_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    notebook = nbformat.read(NOTEBOOK, 4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for recipe in ("tiny", "smollm2"):
        exec(first.replace('RECIPE = "tiny"', f'RECIPE = "{recipe}"'), chosen := {})
        assert chosen["RECIPE"] == recipe
        for script, settings in (("prepare", prepare.Settings), ("train", train.Settings)):
            load_settings(script, settings, [f"config/{recipe}.py", *chosen[script.upper()].split()])
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_all_cells(corpus, tmp_path):
    """On another corpus. git copies the project, and pip says what it was asked for."""
    source = write_conversations(tmp_path / "a.jsonl", [conversation(f"{n} cats?", "A cat. " * 9) for n in range(30)])
    source.write_text(source.read_text() * 3000)  # long enough for a progress bar to move
    shorter = {
        "prepare.py config/tiny_chat.py": f"--source={source}",
        "train.py config/tiny_chat.py": "--max_steps=2 --batch_tokens=256",
        "--num_samples=2": "--max_new_tokens=20",
    }
    bin, project = tmp_path / "bin", tmp_path / "project"
    left_out = shutil.ignore_patterns(".*", "data", "out", "tests", "assets")
    shutil.copytree(ROOT, project, ignore=left_out)
    bin.mkdir()
    for name, script in (("git", f'cp -r {project} "$4"'), ("pip", 'echo "$@" && cat')):
        (bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin / name).chmod(0o755)
    notebook = nbformat.read(NOTEBOOK, 4)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    codes[0].source = (
        codes[0].source.replace("NAME", "someone")
        + f"""
PREPARE, MINUTES = "--source={corpus} --tokenizer=train:300 --val_fraction=0.1", 1e-6
TRAIN = "--max_steps=6 --batch_tokens=256 --eval_tokens=512 --decay_steps=0 --device=cpu"
"""
    )
    for command, arguments in shorter.items():
        assert sum(command in cell.source for cell in codes) == 1
        for cell in codes:
            cell.source = cell.source.replace(command, f"{command} {arguments}")
    (tmp_path / "content").mkdir()
    path = f"{bin}:{Path(sys.executable).parent}:/usr/bin:/bin"
    options = dict(timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "content"}})
    NotebookClient(notebook, **options).execute(env=environment(PATH=path))

    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in codes]
    install, prepared, trained, resumed, compared, _, sampled, chatted = printed[1:]
    assert "install -q -r /dev/stdin matplotlib" in install and "numpy" in install and "torch" not in install
    assert "baselines, in nats per token" in prepared
    assert "Pre-processing" not in prepared and chatted.count("documents/s") == 2, "more than a line of progress"
    assert "stopped after step 1 of 6" in trained and "step 2/6" not in trained
    assert "resumed from out/tiny/checkpoint-000001" in resumed and "step 6/6" in resumed
    (first, loss, rate), (second, next_loss, next_rate) = re.findall(r"step (\d): loss (\S+), .* (\S+)\n", compared)
    assert (first, second) == ("1", "2") and float(rate) < float(next_rate)
    assert float(loss) == pytest.approx(float(next_loss), abs=0.5)
    assert any("image/png" in output.get("data", ()) for output in codes[6].outputs)
    assert sampled.count("Parameters") >= 2 and sampled.count("-" * 80) == 1
    assert chatted.rsplit("talk to it with", 1)[1].count("\n") >= 2  # the answer follows
