"""Settings: a dataclass of defaults, changed by a recipe, changed by the command line.

    python train.py config/tiny.py --learning_rate=1e-3 --model.num_hidden_layers=4

A recipe is a Python file with a section for each script, such as train = dict(learning_rate=1e-3, model=dict(...)). Its
values are put before the arguments of the command line, and the last one counts. So both are parsed, typed and refused
by one parser.
"""

import contextlib
import difflib
import math
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, get_args, get_type_hints

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
    """Run the main of a script with its settings. Ctrl-C ends it with a sentence, and a closed pipe, as of `| head`,
    with nothing."""
    for stream in (sys.stdout, sys.stderr):  # a console need not have every character that a model writes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main(load_settings(section, cls))
    except KeyboardInterrupt:
        sys.exit(interrupted or 130)  # as shells do
    except BrokenPipeError:
        pass
    finally:
        with contextlib.suppress(OSError):  # what cannot be printed is given up; else Python calls that an error
            sys.stdout.flush()


def load_settings(section, cls, argv=None):
    """The dataclass cls from the section of a recipe and the command line; exits with one sentence for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if files := [arg for arg in args if not arg.startswith("-")]:
        args.remove(files[0])
        args = recipe_arguments(files[0], section) + args
    known = [f"--{name}" for name, _ in flatten(vars(cls()))]
    for arg in args:
        name = arg.split("=")[0]
        if name not in known and name not in ("-h", "--help"):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings."
            sys.exit(f"{arg!r} is not a setting of {section}, as --name=value; {hint}")
    about = sys.modules[cls.__module__].__doc__  # the script's own: what it is for, and commands to start from
    settings = tyro.cli(cls, args=args, description=about, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_bounds(settings)
    return settings


def recipe_arguments(path, section):
    """The section of a recipe as command-line arguments."""
    if not os.path.isfile(path):
        sys.exit(f"{path} is not a file; the recipes are in config/, and settings are written --name=value.")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        sys.exit(f"{path} cannot be run as Python: {type(error).__name__}: {error}")
    if not isinstance(values.get(section), dict):
        sys.exit(f"{path} has no section for this script: {section} = dict(...)")
    return [f"--{name}={value}" for name, value in flatten(values[section])]


def check_bounds(settings):
    """Exit with one sentence if a value is outside of the bound that its annotation declares."""
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for part in (hint, *get_args(hint)):  # Count itself, or the Count of Count | None
            for bound in getattr(part, "__metadata__", ()):
                if value is not None and isinstance(bound, Bound) and not bound.holds(value):
                    sys.exit(f"--{name}={value} must be {bound.words}.")


def flatten(values, prefix=""):
    """Names and values, those of a nested section or dataclass as section.name."""
    for name, value in values.items():
        inner = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if inner is None:
            yield prefix + name, value
        else:
            yield from flatten(inner, f"{prefix}{name}.")
