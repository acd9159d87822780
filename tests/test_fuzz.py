"""Thousands of generated inputs: each is accepted, or refused with the documented error, and nothing else happens."""

import contextlib
import dataclasses
import json

from plumbing import sources
from plumbing.pretrained import read_config
from plumbing.settings import load_settings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
import train
from model import SmolLM2Config

many = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
names = [field.name for field in dataclasses.fields(train.Settings)] + ["model.vocab_size", "x", "", "h"]
words = st.text(max_size=20) | st.sampled_from(["1", "-1", "1e-3", "True", "None", "nan", "adamw", "{}", "[]", "a b"])
arguments = st.builds("--{}={}".format, st.sampled_from(names), words) | st.text(max_size=20)
halves = st.sampled_from(["\ud83d", "a\udc00b"])  # of a character, which JSON can spell
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | halves
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
keys = [field.name for field in dataclasses.fields(SmolLM2Config)]
keys += ["head_dim", "rope_parameters", "rope_scaling", "hidden_act", "model_type", "torch_dtype"]
lines = st.binary(max_size=60) | st.builds(lambda value: json.dumps({"text": value}).encode(), values)


@many
@given(st.lists(arguments, max_size=4), st.sampled_from([train, sample]))
def test_settings(args, script):
    args = [arg for arg in args if not arg.startswith("-h") and arg != "--help" and not arg.endswith(".py")]
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(None):
        assert isinstance(load_settings(script.__name__, script.Settings, args), script.Settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@many
@given(
    changes=st.dictionaries(st.sampled_from(keys) | st.text(max_size=9), values, max_size=3),
    rope=st.none() | st.fixed_dictionaries({"rope_type": values | st.just("default"), "rope_theta": values}),
)
def test_config_json(folder, changes, rope):
    config = dataclasses.asdict(SmolLM2Config()) | {"initializer_range": 0.04, "rope_parameters": {"rope_theta": 10}}
    config |= {"rope_parameters": rope} if rope is not None else {}
    (folder / "config.json").write_text(json.dumps(config | changes))
    with contextlib.suppress(ValueError):
        read_config(folder, SmolLM2Config)


@many
@given(lines=st.lists(lines, max_size=4))
def test_jsonl(folder, lines):
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    with contextlib.suppress(SystemExit):
        for text in sources.documents(sources.File("a.jsonl", "", lambda: sources.jsonl_rows(path))):
            assert text.encode().decode() == text
