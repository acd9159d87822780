"""How a model wants conversations written: its chat template."""

import datetime
import json
import sys
import time
from pathlib import Path

from plumbing.pretrained import read_json


def chat_template(folder, seconds=10):
    """The template of a checkpoint as a function: [{"role": "user", "content": "Hello"}, ...] -> prompt.

    It is a Jinja program that can come from anyone, so it runs in a sandbox, with what transformers gives to templates,
    and for a limited time. None where there is none; exits with one sentence for one that is damaged.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    separate, path = Path(folder, "chat_template.jinja"), Path(folder, "tokenizer_config.json")
    try:
        config = read_json(path) if path.exists() else {}
        source = separate.read_text(encoding="utf-8") if separate.exists() else config.get("chat_template")
        if source is None:
            return None
        extensions = ["jinja2.ext.loopcontrols", generation_block()]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime.now().strftime}
        template = environment.from_string(source)
    except (TemplateError, TypeError, ValueError) as error:
        sys.exit(f"{folder}: its chat template is damaged: {error}")
    tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}

    def render(messages):
        try:
            with at_most(seconds):
                return template.render(
                    messages=messages, add_generation_prompt=True, tools=None, documents=None, **tokens
                )
        except Exception as error:  # a program can fail in any way
            raise ValueError(f"the model's chat template refuses this: {error}") from error

    return render


def refuse(message):
    from jinja2 import TemplateError

    raise TemplateError(message)


def generation_block():
    """{% generation %} marks what the model wrote, for training; the text is the same without."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    return Generation


class at_most:
    """Ends the Python code inside of a with statement after a number of seconds, also in a thread."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        end, self.before = time.monotonic() + self.seconds, sys.gettrace()

        def watch(frame, event, argument):
            if time.monotonic() > end:
                raise TimeoutError("it takes too long")
            return watch

        sys.settrace(watch)

    def __exit__(self, *error):
        sys.settrace(self.before)
