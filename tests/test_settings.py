"""Settings: defaults, then the file, then the command line; and one sentence for what does not fit."""

import dataclasses
import inspect
import math
import subprocess
import sys

from plumbing import settings as bounds
from plumbing.settings import load_settings

import pytest
from conftest import ROOT, refused

import prepare
import sample
import train
from model import SmolLM2, count_parameters

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("[a-z]*.py"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("width = 64\ntrain = dict(max_steps=7, compile=False, model=dict(hidden_size=width))\n")
    return str(path)


def test_precedence(file):
    settings = load_settings("train", train.Settings, [file, "--max_steps=9", "--model.num_hidden_layers=2"])
    assert settings.seq_len == 2048  # default
    assert settings.compile is False  # file
    assert settings.model.hidden_size == 64
    assert settings.max_steps == 9  # command line over file
    assert settings.model.num_hidden_layers == 2


def test_without_arguments_settings_are_the_defaults():
    assert load_settings("train", train.Settings, []) == train.Settings()
    for script in (prepare, train, sample):
        of_file = load_settings(script.__name__, script.Settings, [f"{ROOT}/config/smollm2.py"])
        assert of_file == script.Settings()
    assert prepare.Settings().source == "HuggingFaceTB/smollm-corpus/cosmopedia-v2"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("script", [prepare, train, sample])
def test_every_configuration_fits_every_script(name, script):
    settings = load_settings(script.__name__, script.Settings, [str(ROOT / "config" / name)])
    if script is train:
        assert settings.batch_tokens % (settings.seq_len * (settings.micro_batch or 1)) == 0


def test_the_two_small_runs():
    overfit, cosmo = (
        load_settings("train", train.Settings, [f"{ROOT}/config/{name}.py"]) for name in ("overfit", "cosmo5k")
    )
    assert overfit.repeat_steps == 1 and overfit.model.vocab_size == 49_152
    assert (cosmo.batch_tokens, cosmo.seq_len, cosmo.max_steps) == (32 * 512, 512, 5000)
    assert (cosmo.optimizer, cosmo.learning_rate, cosmo.grad_clip) == ("adamw", 3e-4, 1.0)
    assert train.learning_rate(99, cosmo) == train.learning_rate(4999, cosmo) == 3e-4
    assert train.learning_rate(49, cosmo) == 1.5e-4


def test_configurations_have_the_published_shapes_and_recipes():
    count = {"smollm2": 134_515_008, "smollm2_360m": 361_821_120, "smollm2_1_7b": 1_711_376_384}
    for name, parameters in count.items():
        settings = load_settings("train", train.Settings, [f"{ROOT}/config/{name}.py"])
        config = dataclasses.replace(settings.model, vocab_size=49152)
        config.check()
        assert count_parameters(config) == parameters
        assert (config.rope_theta, settings.seq_len) == (10_000, 2048)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--learning_rte=1", "--learning_rate"),
        ("--model.hidden=3", "--model.hidden_size"),
        ("--max_steps=many", "many"),
        ("--compile=perhaps", "perhaps"),
        ("--optimizer=sgd", "sgd"),
        ("max_steps=3", "max_steps=3"),
        ("config/tinny.py", "config/tinny.py"),
    ],
)
def test_what_does_not_fit_is_named(argument, answer):
    sentence = refused("train.py", argument)
    assert answer in sentence and len(sentence.strip()) < 900


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (bounds.Count, (1, 2**40), (0, -1)),
        (bounds.Natural, (0, 1, 2**63 - 1), (-1, 2**63)),
        (bounds.Positive, (1e-9, 5.0), (0.0, -1.0, math.inf, math.nan)),
        (bounds.NotNegative, (0.0, 1e9), (-1e-9, math.inf, math.nan)),
        (bounds.Probability, (1e-9, 0.5, 1.0), (0.0, 1.01, math.nan)),
        (bounds.Fraction, (0.0, 0.99), (-0.01, 1.0, math.nan)),
    ],
)
def test_bounds(kind, inside, outside):
    (bound,) = kind.__metadata__
    assert all(map(bound.holds, inside)) and not any(map(bound.holds, outside))


def test_the_defaults_are_what_the_recipe_says_of_itself():
    text = " ".join((ROOT / "config" / "smollm2.py").read_text().split())
    settings = train.Settings()
    assert f"so {settings.max_steps} steps, {settings.warmup_steps} of them warmup" in text
    assert f"the last {settings.decay_steps} the decay" in text and f"{settings.batch_tokens:,} (64 GPUs" in text


def test_one_text_is_chosen_as_another_by_default():
    defaults = inspect.signature(SmolLM2.generate).parameters
    for name in ("temperature", "top_k", "top_p"):
        assert getattr(sample.Settings(), name) == defaults[name].default


def test_wrong_name_in_a_file(tmp_path):
    (tmp_path / "bad.py").write_text("train = dict(learning_rat=1e-3)")
    assert "--learning_rate" in refused("train.py", tmp_path / "bad.py")
    (tmp_path / "broken.py").write_text("train = dict(")
    assert "SyntaxError" in refused("train.py", tmp_path / "broken.py")


@pytest.mark.parametrize("script", [prepare, train, sample])
def test_help_lists_every_setting_with_its_comment(script):
    done = subprocess.run([sys.executable, f"{script.__name__}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for field in dataclasses.fields(script.Settings):
        assert f"--{field.name}" in done.stdout
    assert "(default:" in done.stdout
