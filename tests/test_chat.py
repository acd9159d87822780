"""Chat templates: what transformers gives to them, and what they may not do."""

import datetime
import json
import time

from plumbing.chat import chat_template

import pytest
from transformers import PreTrainedTokenizerFast

MESSAGES = [
    {"role": "user", "content": "Is 1 < 2? \u00e9"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 3?"},
]


def template(folder, source):
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text(source)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return chat_template(folder, seconds=1)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{{ messages | tojson }}",
        "{{ messages[0] | tojson(indent=2) }}",
        "{% if tools is none %}none{% endif %}{% if add_generation_prompt %}go{% endif %}",
        "{{ strftime_now('%d %B %Y') }}",
    ],
)
def test_templates_render_as_in_transformers(source, data, tmp_path):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(data / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = source
    wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert template(tmp_path, source)(MESSAGES) == wanted
    assert datetime.date.today().strftime("%Y") in wanted or "strftime" not in source


def test_a_template_that_refuses(tmp_path):
    with pytest.raises(ValueError, match="roles must alternate"):
        template(tmp_path, "{{ raise_exception('roles must alternate') }}")(MESSAGES)


def test_a_template_that_never_ends_is_stopped(tmp_path):
    loops = "".join(f"{{% for {name} in range(9999) %}}" for name in "abcd") + "{% endfor %}" * 4
    render, before = template(tmp_path, loops), time.monotonic()
    with pytest.raises(ValueError, match="too long"):
        render(MESSAGES)
    assert time.monotonic() - before < 30
    assert template(tmp_path, "fine")(MESSAGES) == "fine"
