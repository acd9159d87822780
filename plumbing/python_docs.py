"""A corpus that everybody has: the documentation that Python and its libraries bring along."""

import ast
import importlib.metadata
import importlib.util
import itertools
import sys
import sysconfig
import warnings
from functools import cache
from pathlib import Path


def version():
    """What the corpus depends on."""
    names = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch")]
    return ", ".join([f"python {sys.version.split()[0]}", *names])


@cache  # a tokenizer may be trained on it first
def texts():
    """What every reader of this has on disk: Python's language reference, and the longer docstrings of the standard
    library, numpy and torch. The source files are parsed, never imported; each text comes once, in a stable order."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = [library] + [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    skip = {"test", "tests", "site-packages", "dist-packages"}
    paths = [
        path for root in roots for path in sorted(root.rglob("*.py")) if not skip & {*path.relative_to(root).parts}
    ]
    reference, topics = library / "pydoc_data" / "topics.py", {}
    if reference.exists():  # some systems leave it out
        topics = ast.literal_eval(ast.parse(reference.read_bytes()).body[-1].value)  # a literal dict
    return list(dict.fromkeys(itertools.chain(topics.values(), *map(docstrings_of, paths))))


def docstrings_of(path, at_least=200):
    """The docstrings of a source file with more than at_least characters, in the order of the file."""
    with warnings.catch_warnings(action="ignore"):  # what Python thinks of the style of others
        try:
            nodes = [ast.parse(path.read_bytes())]
        except (SyntaxError, ValueError):  # written for another version of Python
            return []
    texts = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
        nodes += reversed([child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)])
    return [text for text in texts if len(text) > at_least]
