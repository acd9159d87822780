"""Texts and questions that every reader of this has on disk: the documentation of Python, numpy and torch.

Source files are parsed, never imported, and read in a stable order.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import re
import sys
import sysconfig
import textwrap
import warnings
from functools import cache
from pathlib import Path


def python_docs_version():
    """What the documentation depends on."""
    names = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch")]
    return ", ".join([f"python {sys.version.split()[0]}", *names])


@cache  # a tokenizer may be trained on it first
def python_docs(at_least=200):
    """Python's language reference, and the docstrings with at least so many characters; each text comes once."""
    reference, topics = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py"), {}
    if reference.exists():  # some systems leave it out
        topics = ast.literal_eval(ast.parse(reference.read_bytes()).body[-1].value)  # a literal dict
    texts = (text for _, path in source_files() for _, text in docstrings_of(path) if len(text) > at_least)
    return list(dict.fromkeys(itertools.chain(topics.values(), texts)))


@cache
def python_questions():
    """Conversations: what a public function or class does, in the first sentence of its docstring; and its first
    doctest, where it has one. The form of the question depends on the name."""
    conversations = {}
    for root, path in source_files():
        for inner, text in docstrings_of(path):
            name = public_name(root, path, inner)
            paragraph = " ".join(text.split("\n\n")[0].split())
            sentence = re.match(r"[A-Z`].{15,200}?\.(?= [A-Z`]|$)", paragraph)
            if not name or not sentence or name in conversations:
                continue
            number = hashlib.sha256(name.encode()).digest()[0] % 3
            question = (f"What does `{name}` do?", f"Explain `{name}`.", f"What is `{name}` for?")[number]
            turns = [question, sentence[0]]
            example = re.search(r"^ *>>> .+(\n *(>>>|\.\.\.).*)*(\n *(?!>>>)\S.*)+", text, re.MULTILINE)
            if example and len(example[0]) < 400 and "doctest:" not in example[0]:
                code = textwrap.dedent(example[0]).strip()
                turns += ["Show an example.", f"```python\n{code}\n```"]  # as chat models write code, in Markdown
            roles = itertools.cycle(("user", "assistant"))
            conversations[name] = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return list(conversations.values())


def source_files():
    """(folder to import from, path) of each source file of the standard library, numpy and torch."""
    library = Path(sysconfig.get_path("stdlib"))
    packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    skip = {"test", "tests", "site-packages", "dist-packages"}
    for folder, root in ((library, library), *((package, package.parent) for package in packages)):
        for path in sorted(folder.rglob("*.py")):
            if not skip & {*path.relative_to(folder).parts}:
                yield root, path


def public_name(root, path, inner):
    """The name by which people know what a source file defines as inner, or None. What a private module defines, such
    as one in numpy._core, is public where a package around it imports it."""
    module = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
    package = [*itertools.takewhile(lambda part: not part.startswith("_"), module)]
    if package != module:
        first = {inner.split(".")[0], f"{path.stem}.*"}
        while package and not first & imports(root.joinpath(*package, "__init__.py")):
            package.pop()
        if not package:
            return None
    name = ".".join([*package, inner]).replace("posixpath.", "os.path.")
    return None if re.search(r"\._|\.$|<locals>|\.idle_test\.", name) else name


@cache
def imports(path):
    """The names that a source file imports from others, and MODULE.* where it imports all of one."""
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)]
    names = ((f"{node.module}".split(".")[-1], alias) for node in nodes for alias in node.names)
    return {f"{module}.*" if alias.name == "*" else alias.asname or alias.name for module, alias in names}


def docstrings_of(path):
    """(qualified name, docstring) of a source file, its classes and its functions, in the order of the file."""
    with warnings.catch_warnings(action="ignore"):  # what Python thinks of the style of others
        try:
            nodes = [("", ast.parse(path.read_bytes()))]
        except (SyntaxError, ValueError):  # written for another version of Python
            return
    while nodes:
        prefix, node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = prefix + getattr(node, "name", "")
            yield name, ast.get_docstring(node) or ""
            inside = "." if isinstance(node, ast.ClassDef) else ".<locals>."  # as in Python's __qualname__
            prefix = f"{name}{inside}" if name else ""
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        nodes += [(prefix, child) for child in reversed(children)]
