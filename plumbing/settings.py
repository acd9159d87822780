"""Settings of a script: its dataclass, changed by a file of config/, changed by the command line.

    python train.py config/tiny.py --learning_rate=1e-3 --model.num_hidden_layers=4

A recipe is a Python file in config/. It holds a section for each script, as `train = dict(learning_rate=1e-3, ...)`.
Its values become arguments in front of those of the command line, and of two the later holds: so both are read, typed
and refused by the same parser, and nothing else decides what wins.
"""

import difflib
import os
import runpy
import sys

import tyro


def load_settings(section, cls, argv=None):
    """The dataclass cls from the section of a file and the command line; exits with one sentence if they do not fit."""
    for stream in (sys.stdout, sys.stderr):  # a console need not have every character that a model writes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    args = list(sys.argv[1:] if argv is None else argv)
    if files := [arg for arg in args if not arg.startswith("-")]:
        args.remove(files[0])
        args = file_arguments(files[0], section) + args
    known = argument_names(cls())
    for arg in args:
        name = arg.split("=")[0]
        if name not in known and name not in ("-h", "--help"):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "--help lists the settings."
            sys.exit(f"{arg!r} is not a setting of {section}.py, as --name=value; {hint}")
    about = sys.modules[cls.__module__].__doc__  # the script's own: what it is for, and commands to start from
    return tyro.cli(cls, args=args, description=about, config=(tyro.conf.FlagConversionOff,), use_underscores=True)


def file_arguments(path, section):
    """The section of a configuration file as command-line arguments."""
    if not os.path.isfile(path):
        sys.exit(f"{path} is no file; the configurations are in config/, and settings are written --name=value.")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        sys.exit(f"{path} cannot be run as Python: {type(error).__name__}: {error}")
    if not isinstance(values.get(section), dict):
        sys.exit(f"{path} has no section for this script: {section} = dict(...)")
    return [f"--{name}={value}" for name, value in flatten(values[section])]


def argument_names(settings):
    return [f"--{name}" for name, _ in flatten(vars(settings))]


def flatten(values, prefix=""):
    """Names and values, those of a nested section or dataclass as section.name."""
    for name, value in values.items():
        inner = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if inner is None:
            yield prefix + name, value
        else:
            yield from flatten(inner, f"{prefix}{name}.")
