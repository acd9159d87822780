"""Measuring: races of tools.bench, and what tools.measure keeps when it is stopped."""

import importlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import command, refused, run
from runs import start, wait_for

from tools import bench, measure

CONTESTANTS = """
import os
from pathlib import Path

def contestant(name, settings, folder, log):
    found = log.read_text().splitlines() if log.exists() else []
    assert not any(Path("/proc", line.split()[1]).exists() for line in found), "another one is in memory"
    log.write_text("\\n".join([*found, f"{name} {os.getpid()}"]))
    if name == "cuBLAS":
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    if name == "killed":
        os._exit(9)
    return 10, lambda: 2.0
"""


def test_contestants_are_in_memory_one_at_a_time_and_one_that_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "contestants.py").write_text(CONTESTANTS)
    monkeypatch.syspath_prepend(tmp_path)
    make, log = importlib.import_module("contestants").contestant, tmp_path / "log"
    settings = bench.Settings("train", rounds=2)
    (row,) = bench.race(settings, "work", "units/s", ["ours", "cuBLAS", "killed", "theirs"], make, log)
    assert (row["against"], row["ours"], row["theirs"], row["ratio"]) == ("theirs", 5, 5, 1)
    turns = [line.split()[0] for line in log.read_text().splitlines()]
    assert turns == ["ours", "cuBLAS", "killed", "theirs", "ours", "theirs"]
    printed = capsys.readouterr().out
    assert "work, cuBLAS: left out: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED" in printed
    assert "work, killed: left out: BrokenProcessPool" in printed


@pytest.mark.slow
def test_speed_is_measured_also_where_nothing_else_is_installed(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('No module named transformers')")
    toy = "--size=toy", "--rounds=1", "--seq_len=16", "--micro_batches", 2, "--device=cpu", f"--out={tmp_path}"
    printed = run("tools.bench", "train", *toy, PYTHONPATH=tmp_path, TORCH_COMPILE_DISABLE=1)
    assert printed.count("left out: ImportError: No module named transformers") == 2
    speed, memory = json.loads(next(tmp_path.glob("cpu-*-cores.json")).read_text())
    assert speed["what"] == "training, toy, 2 x 16" and speed["ours"] > 0
    assert (memory["what"], memory["against"]) == ("peak memory, toy, 2 x 16", "the formula")
    assert f"| {speed['what']} |  |  |  | " in printed
    refusal = refused("tools.bench", "sample", *toy, "--gguf=nowhere", "--rounds=0")
    assert refusal == "nothing was measured: sample\n"


def only_child(process_id):
    while not (children := Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()):
        time.sleep(0.1)
    return int(*children)


def runs(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def sections(path):
    """The measurements in the file, and what they found."""
    parts = re.split(r"^## (.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


@pytest.mark.slow
def test_what_a_gpu_is_to_measure_is_rehearsed_killed_and_continued(data, tmp_path):
    out = tmp_path / "measured.md"
    prepared = shutil.copytree(data, tmp_path / "data of mine")
    rehearsal = "tools.measure", "--rehearse=True", f"--data_dir={prepared}", f"--out={out}"
    run(*rehearsal, "--minutes=0.01")
    assert list(sections(out)) == ["training-135m"] and "failed: not done after" in out.read_text()
    process = start(*command(*rehearsal))
    wait_for(process, "training-360m, at most")
    child = only_child(process.pid)
    os.kill(only_child(child), signal.SIGSTOP)  # the benchmark would never end by itself
    process.kill()
    begun = sections(out)
    assert list(begun) == ["training-135m"] and "training, toy, 1 x 64" in begun["training-135m"]
    assert any(not runs(child) or time.sleep(0.1) for _ in range(600)), "what it had started goes on"
    said = run(*rehearsal)
    found = sections(out)
    assert found["training-135m"] == begun["training-135m"] and "training-135m, at most" not in said
    assert list(found) == list(measure.MEASUREMENTS)
    assert said.endswith("but for flash-attention-3, evaluation: the same command tries again\n")
    assert "failed: --flash_attention_3=True cannot be used here" in found.pop("flash-attention-3")
    assert found.pop("evaluation").startswith("left out: HuggingFaceTB/SmolLM2-135M")
    assert "1 passed" in found.pop("tests")
    assert all("|---|---|" in table.replace(" ", "") and "left out" not in table for table in found.values()), found
    (tmp_path / "measured.md").write_text(out.read_text().replace("PyTorch", "PyTorch 1"))
    assert "take another --out" in refused(*rehearsal)
