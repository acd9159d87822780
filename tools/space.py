"""A folder to upload as a Space of the Hugging Face hub, where everyone sees the page of tools.demo.

    python -m tools.space out/tiny --to=space
    python -m tools.space HuggingFaceTB/SmolLM2-135M-Instruct --to=space

The folder has the page, the code it imports, and the newest checkpoint without the trainer's state. A model on the hub
is not copied: the Space downloads it. Nothing is uploaded: the two commands for that are printed.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

from plumbing.card import short_name
from plumbing.pretrained import find_model, read_config, read_tokenizer, weight_files
from plumbing.settings import run

import tyro

from model import SmolLM2, SmolLM2Config


@dataclass
class Settings:
    """Make a folder for a Space of the hub."""

    model: tyro.conf.Positional[str] = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    to: str = "space"  # folder to make


ROOT = Path(__file__).parent.parent
MODEL_FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja README.md"
APP = '''"""A page to talk to a model, as a Space of the Hugging Face hub."""

from tools import demo

demo.main(demo.Settings(model={model!r}))
'''
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
---

A page to talk to a model with the architecture of SmolLM2, made with the code of *SmolLM2 from scratch*.
"""  # the hub's own python_version, 3.10, is too old for this code


def model_in_space(name):
    """The model as the Space names it, and the files to copy as {path in the Space: path here}.

    Raises ValueError for a model that cannot be loaded; of one on the hub the weights are not tried.
    """
    folder = find_model(name, weights=False)
    read_tokenizer(folder, read_config(folder, SmolLM2Config))
    if not os.path.isdir(name):
        return name, {}
    SmolLM2.from_pretrained(folder)
    given, folder = Path(os.path.abspath(name)), Path(os.path.abspath(folder))
    above = given.parent.parent if re.fullmatch(r"checkpoint-\d+", given.name) else given.parent
    files = [folder / file for file in (*MODEL_FILES.split(), "model.safetensors.index.json", *weight_files(folder))]
    copied = {"out" / file.relative_to(above): file for file in files if file.exists()}
    return ("out" / given.relative_to(above)).as_posix(), copied


def code_of(module):
    """The files of this project that a module imports, also inside of functions, and the lines of requirements.txt for
    the rest. A Space has a CPU, so its PyTorch comes without CUDA."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.import_hook(module)
    files = [Path(found.__file__) for found in finder.modules.values() if found.__file__]
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needed = [line for line in lines if re.match(r"\w*", line)[0] in finder.badmodules]  # not found in this project
    needed.insert(0, "--extra-index-url https://download.pytorch.org/whl/cpu")
    return {file.relative_to(ROOT): file for file in (*files, ROOT / "LICENSE")}, "\n".join(needed) + "\n"


def main(settings):
    to, name = Path(os.path.abspath(settings.to)), short_name(settings.model)
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        sys.exit(f"--to={settings.to} is there already: remove it, or take another.")
    try:
        model, copied = model_in_space(settings.model)
    except ValueError as error:
        sys.exit(str(error))
    code, requirements = code_of("tools.demo")
    title, python = json.dumps(name, ensure_ascii=False), f"{sys.version_info.major}.{sys.version_info.minor}"
    readme = README.format(title=title, gradio=version("gradio"), python=python)
    written = {"app.py": APP.format(model=model), "README.md": readme, "requirements.txt": requirements}
    temporary = Path(f"{to}.{secrets.token_hex(4)}.tmp")
    try:
        for path, file in (code | copied).items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, temporary / path)
        for path, text in written.items():
            (temporary / path).write_text(text, encoding="utf-8")
        if to.exists():
            to.rmdir()
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", name.split("/")[-1]).strip("-") or "smollm2"
    print(f"made {settings.to}. This uploads it, as NAME on the hub:\n")
    print(f"hf upload NAME/{name} {shlex.quote(settings.to)} . --repo-type=space")


if __name__ == "__main__":
    run(main, None, Settings)
