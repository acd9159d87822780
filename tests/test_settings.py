"""Settings: defaults, then the recipe, then the command line; and a short answer for what does not fit."""

import dataclasses
import inspect
import re

from plumbing.pretrained import check_config
from plumbing.settings import load_settings

import pytest
from conftest import ROOT

import prepare
import sample
import train
from model import SmolLM2, count_parameters

RECIPES = sorted(path.name for path in (ROOT / "config").glob("[a-z]*.py"))
SCRIPTS = pytest.mark.parametrize("script", [prepare, train, sample])


def load(script, *args):
    return load_settings(script.__name__, script.Settings, list(args))


def recipe(name, script=train):
    return load(script, f"{ROOT}/config/{name}")


def test_precedence(tmp_path):
    assert load(train) == train.Settings()
    path = tmp_path / "mine.py"
    path.write_text("width = 64\ntrain = dict(max_steps=7, compile=False, model=dict(hidden_size=width))\n")
    settings = load(train, str(path), "--max_steps=9", "--model.num_hidden_layers=2")
    assert settings.seq_len == 2048  # default
    assert (settings.compile, settings.model.hidden_size) == (False, 64)  # recipe
    assert (settings.max_steps, settings.model.num_hidden_layers) == (9, 2)  # command line over recipe


# ---- Recipes


@SCRIPTS
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_every_script(name, script):
    settings = recipe(name, script)
    if script is train:
        assert settings.batch_tokens % (settings.seq_len * (settings.micro_batch or 1)) == 0
    if name == "smollm2.py":
        assert settings == script.Settings()


def test_the_defaults_are_what_the_recipe_says_of_itself():
    text = " ".join((ROOT / "config" / "smollm2.py").read_text().split())
    settings = train.Settings()
    assert f"so {settings.max_steps} steps, {settings.warmup_steps} of them warmup" in text
    assert f"the last {settings.decay_steps} the decay" in text and f"{settings.batch_tokens:,} (64 GPUs" in text
    assert prepare.Settings().source == "HuggingFaceTB/smollm-corpus/cosmopedia-v2"
    usual = sample.filled(sample.Settings(), **sample.CONTINUING)
    for generate in (SmolLM2.generate, sample.Writer.generate):
        for name in ("temperature", "top_k", "top_p"):
            assert getattr(usual, name) == inspect.signature(generate).parameters[name].default


def test_recipes_have_the_published_shapes():
    count = {"smollm2.py": 134_515_008, "smollm2_360m.py": 361_821_120, "smollm2_1_7b.py": 1_711_376_384}
    for name, parameters in count.items():
        settings = recipe(name)
        config = dataclasses.replace(settings.model, vocab_size=49152)
        check_config(config)
        assert count_parameters(config) == parameters
        assert (config.rope_theta, settings.seq_len) == (10_000, 2048)


# ---- What does not fit


@pytest.mark.parametrize(
    ("argument", "answers"),
    [
        ("--model.hidden=3", ["--model.hidden=3", "--model.hidden_size"]),
        ("--max_steps=many", ["--max_steps", "many"]),
        ("--resume", ["--resume has no value; write --resume=True."]),
        ("--out_dir=\udcff", ["'--out_dir=\\udcff' is not text in UTF-8."]),
        ("--max_steps", ["--max_steps=VALUE"]),
        ("--max_steps=0", ["--max_steps=0 must be at least 1"]),
        ("--warmup_steps=-1", ["--warmup_steps=-1 must be 0 or above"]),
        ("--learning_rate=nan", ["--learning_rate=nan must be a number above 0"]),
        ("--weight_decay=-0.1", ["--weight_decay=-0.1 must be a number of 0 or above"]),
        ("max_steps=3", ["max_steps=3", "--name=value"]),
        ("config/tinny.py", ["config/tinny.py"]),
        ("train = dict(learning_rat=1e-3)", ["--learning_rat=", "--learning_rate"]),
        ("train = dict(", ["mine.py", "SyntaxError"]),
        ("prepare = dict()", ["mine.py", "train = dict(...)"]),
    ],
)
def test_what_does_not_fit_is_named(argument, answers, tmp_path, capsys, monkeypatch):
    if "dict(" in argument:  # the content of a recipe
        (tmp_path / "mine.py").write_text(argument)
        argument = str(tmp_path / "mine.py")
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        load(train, argument)
    said = f"{capsys.readouterr().err}{exit.value.code}"
    assert exit.value.code and all(answer in said for answer in answers)
    assert len(said) < 1500


@SCRIPTS
def test_help_lists_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(script, "--help")
    shown = capsys.readouterr().out
    assert all(f"--{field.name}" in shown for field in dataclasses.fields(script.Settings))
    assert "(default:" in shown


def test_help_beside_a_recipe_shows_its_values(capsys):
    for args, steps in ((["--help"], 1000), ([f"{ROOT}/config/cosmo5k.py", "--help"], 5000)):
        with pytest.raises(SystemExit):
            load(train, *args)
        assert re.search(rf"--max_steps INT[^(]+\(default: {steps}\)", capsys.readouterr().out)
