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
    for module, path in source_files():
        for name, text in docstrings_of(path) if module else ():
            name = f"{module}.{name}"
            paragraph = " ".join(text.split("\n\n")[0].split())
            sentence = re.match(r"[A-Z`].{15,200}?\.(?= [A-Z`]|$)", paragraph)
            if not sentence or re.search(r"\._|\.$", name) or name in conversations:
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
    """(public module, path) of each source file of the standard library, numpy and torch. What a private module of the
    latter two defines, such as numpy._core, is public in the package around it; one of the library is not."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = [library, *(Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch"))]
    skip = {"test", "tests", "site-packages", "dist-packages"}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not skip & {*path.relative_to(root).parts}:
                package = [] if root == library else [root.name]
                public = [*itertools.takewhile(lambda part: not part.startswith("_"), parts)]
                private = root == library and public != [part for part in parts if part != "__init__"]
                yield "" if private else ".".join(package + public), path


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
            prefix = f"{name}." if name else ""
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        nodes += [(prefix, child) for child in reversed(children)]
