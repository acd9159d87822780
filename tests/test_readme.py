"""The README's first command, as a newcomer runs it, with fewer steps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, environment


def test_the_first_command(tmp_path):
    for path in [*ROOT.glob("*.py"), ROOT / "config"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    first = re.search(r"```sh\n(.*)\n```", (ROOT / "README.md").read_text())[1]
    install, rest = first.split("requirements.txt && ")
    assert install.endswith("pip install -r ")
    steps = rest.replace("train.py config/tiny.py", "train.py config/tiny.py --max_steps=3 --eval_tokens=4096")
    assert steps.count("--max_steps") == 1
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", "-c", steps], cwd=tmp_path, env=environment(PATH=path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shard = json.loads((tmp_path / "data" / "python-docs" / "shard-00000.json").read_text())
    assert shard["train"]["documents"] > 7000 and shard["train"]["bytes"] > 6e6
    assert 0.03 < shard["val"]["documents"] / shard["train"]["documents"] < 0.07
    assert done.stdout.rsplit("lets it write\n", 1)[1].startswith("Parameters")
    assert (tmp_path / "out" / "tiny" / "checkpoint-000003" / "model.safetensors").exists()
