"""A Space of the hub: the folder for it, uploaded, and the page that it serves."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_demo
import yaml
from conftest import ROOT, command, environment

from tools import space

browser = test_demo.browser  # the fixture


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(not test_demo.BROWSER, reason="needs chromium and chromedriver")
def test_a_space_is_uploaded_and_runs_alone(trained, hub, browser, tmp_path, monkeypatch):
    """Made in a project where the user has files of their own, uploaded by the printed command, started without it and
    without the packages that it does not ask for."""
    project = tmp_path / "project"
    for name in ("plumbing", "tools"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "LICENSE"]:
        shutil.copy(path, project)
    run = shutil.copytree(trained, project / "out" / "my run")
    for folder in (project, run, run / "checkpoint-000040"):
        for name in ("code/secret.py", "books/secret.txt", "secret.py", "secret.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("")
    (project / "tools" / "secret.py").write_text("")

    env = environment(HF_TOKEN="secret", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin", **hub.environment)
    everything = dict(cwd=project, env=env, check=True, capture_output=True, text=True)
    printed = subprocess.run(command("tools.space", "out/my run", "--to=space"), **everything).stdout
    uploads = [line for line in printed.splitlines() if line.startswith("hf ")]
    assert len(uploads) == 1
    for line in uploads:
        subprocess.run(["bash", "-c", line], **everything)
    received = hub.folder / "models" / "NAME" / "my-run"
    assert files(received) == files(project / "space")
    code = {name for name in files(received) if name.endswith(".py")}
    assert {name for name in code if "/" not in name} == {"app.py", "model.py", "sample.py"}
    assert {name for name in code if name.startswith("tools/")} == {"tools/__init__.py", "tools/demo.py"}
    assert all((ROOT / name).exists() for name in code - {"app.py"})
    weights = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model = {f"out/my run/checkpoint-000040/{name}" for name in weights | {"README.md"}}
    assert files(received) - code == model | {"README.md", "LICENSE", "requirements.txt"}

    _, front, words = (received / "README.md").read_text().split("---\n")
    front = yaml.safe_load(front)
    assert front["title"] == "my run" and words.strip()
    assert front["sdk"] == "gradio" and (received / front["app_file"]).exists()
    installed = subprocess.run([sys.executable, "-c", "import gradio; print(gradio.__version__)"], **everything).stdout
    assert front["sdk_version"] == installed.strip()
    assert front["python_version"] == "{}.{}".format(*sys.version_info)
    lines = (received / "requirements.txt").read_text().splitlines()
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert {line.split("=")[0].strip(">") for line in lines} >= {"torch", "numpy", "tokenizers", "safetensors", "tyro"}
    assert not any(line.startswith(("datasets", "tqdm")) for line in lines)  # for prepare.py and the log

    shutil.rmtree(project)
    (tmp_path / "missing").mkdir()
    for name in ("datasets", "transformers", "matplotlib", "lm_eval", "pytest"):
        (tmp_path / "missing" / f"{name}.py").write_text("raise ModuleNotFoundError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "missing"))
    with test_demo.served_by([sys.executable, "app.py"], received) as address:
        page = test_demo.Page(browser, address)
        assert page.all("//h1")[0].text == "my run"
        assert page.write("7: A cat").startswith("7: A cat")


def test_a_model_on_the_hub_is_named_not_copied(instruct, hub, tmp_path):
    shutil.copytree(instruct, hub.folder / "models" / "someone" / "chats")
    line = command("tools.space", "someone/chats", f"--to={tmp_path / 'space'}")
    done = subprocess.run(line, cwd=ROOT, env=environment(**hub.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hf upload NAME/chats " in done.stdout
    assert "Settings(model='someone/chats')" in (tmp_path / "space" / "app.py").read_text()
    assert not (tmp_path / "space" / "out").exists()
    assert not any(request.endswith(".safetensors") for request in hub.requests)


def test_what_becomes_no_space(trained, tmp_path, monkeypatch):
    """It is refused in one sentence, and what was there stays as it was."""

    def refused(model, to):
        before = files(tmp_path)
        with pytest.raises((SystemExit, OSError)) as refusal:
            space.main(space.Settings(str(model), str(tmp_path / to)))
        assert files(tmp_path) == before and not list(tmp_path.glob("*.tmp"))
        return str(refusal.value)

    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    assert "file is there already" in refused(trained, "file")
    assert "folder is there already" in refused(trained, "folder")
    assert "/nowhere is not a folder" in refused("/nowhere", "space")
    broken = shutil.copytree(trained / "checkpoint-000040", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is damaged" in refused(broken, "space")

    def no_room(source, target):
        if Path(source).suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", no_room)
    assert "No space left" in refused(trained, "space")
    (tmp_path / "empty").mkdir()
    refused(trained, "empty")
    monkeypatch.undo()
    space.main(space.Settings(str(trained / "checkpoint-000020"), str(tmp_path / "empty")))
    assert "model='out/run/checkpoint-000020'" in (tmp_path / "empty" / "app.py").read_text()
    assert "run, step 20" in (tmp_path / "empty" / "README.md").read_text()
