"""Settings: a dataclass of defaults, changed by a recipe, changed by the command line.

    python train.py config/tiny.py --learning_rate=1e-3 --model.num_hidden_layers=4

A recipe is a Python file with a section for each script, such as train = dict(learning_rate=1e-3, model=dict(...)). Its
values become arguments as well, and what is parsed from them are the defaults of the command line. So both are typed
and refused by one parser, and --help shows the recipe's values.
"""

import math
import os
import runpy
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, get_args, get_type_hints

from plumbing.files import why

import tyro


@dataclass(frozen=True)
class Bound:
    """What a setting must be, beyond its type."""

    words: str
    holds: Callable


Count = Annotated[int, Bound("at least 1", lambda value: value >= 1)]
Natural = Annotated[int, Bound("0 or above", lambda value: 0 <= value < 2**63)]
Positive = Annotated[float, Bound("a number above 0", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Bound("a number of 0 or above", lambda value: 0 <= value < math.inf)]
Probability = Annotated[float, Bound("above 0 and at most 1", lambda value: 0 < value <= 1)]
Fraction = Annotated[float, Bound("at least 0 and below 1", lambda value: 0 <= value < 1)]


def run(main, section, cls, interrupted=""):
    """Run a script's main with its settings (section None: it takes no recipe). Ctrl-C, and a file that cannot be read
    or written, end it with one sentence, a closed pipe (`| head`) silently."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (where it is closed, progress bars need a place to go)
    for stream in (sys.stdout, sys.stderr):  # a console may lack characters that a model writes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main(load_settings(section, cls))
        for number in (signal.SIGINT, signal.SIGTERM):  # one that comes late, as a launcher may send it, stops nothing
            signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        sys.exit(interrupted or 130)  # as shells do
    except BrokenPipeError:
        pass
    except OSError as error:
        if error.errno is None:  # not the system's, but that of a library
            raise
        sys.exit(why(error))
    finally:
        if sys.stdout:
            try:
                sys.stdout.flush()
            except OSError:  # give up what cannot be printed; else Python tries again as it exits, with status 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_settings(section, cls, argv=None):
    """The dataclass cls, filled from a recipe's section and the command line; exits with a message for bad input."""
    args, hints = list(sys.argv[1:] if argv is None else argv), get_type_hints(cls, include_extras=True)
    about = sys.modules[cls.__module__].__doc__  # the script's own: what it is for, and commands to start from
    parse = partial(tyro.cli, cls, description=about, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    recipe = {}
    if section and (files := [arg for arg in args if not arg.startswith("-")]):
        args.remove(files[0])
        recipe["default"] = parse(args=recipe_arguments(files[0], section))
    for arg in args:
        if arg.startswith("--") and (hint := hints.get(arg[2:])):
            sys.exit(f"{arg} has no value; write {arg}={'True' if bool in (hint, *get_args(hint)) else 'VALUE'}.")
        try:
            arg.encode()
        except UnicodeEncodeError:  # bytes of a terminal or file name that are no UTF-8
            sys.exit(f"{arg!a} is not text in UTF-8.")
    settings = parse(args=args, **recipe)
    for name, hint in hints.items():
        value = getattr(settings, name)
        for part in (hint, *get_args(hint)):  # Count itself, or the Count of Count | None
            for bound in getattr(part, "__metadata__", ()):
                if value is not None and isinstance(bound, Bound) and not bound.holds(value):
                    sys.exit(f"--{name}={value} must be {bound.words}.")
    return settings


def recipe_arguments(path, section):
    """The section of a recipe as command-line arguments."""
    if not os.path.isfile(path):
        sys.exit(f"{path} is not a recipe, a file in config/. A setting is written --name=value, as in --model={path}.")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        sys.exit(f"{path} cannot be run as Python: {type(error).__name__}: {error}")
    if not isinstance(values.get(section), dict):
        sys.exit(f"{path} has no section for this script: {section} = dict(...)")
    return [f"--{name}={value}" for name, value in flatten(values[section])]


def flatten(values, prefix=""):
    """Names and values; those of a nested section or dataclass as section.name."""
    for name, value in values.items():
        inner = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if inner is None:
            yield prefix + name, value
        else:
            yield from flatten(inner, f"{prefix}{name}.")
