"""Where documents come from: the hub, local files, or the documentation that Python brings along.

`list_files` is all that prepare.py asks for: the files of a source, each with a way to its texts. What cannot be had or
read ends the program with one sentence.
"""

import ast
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path


@dataclass
class File:
    """One file of a source."""

    name: str
    revision: str  # what tells this content from another under the same name
    texts: Callable  # () -> iterator of str, None where a document has no text


def list_files(source, revision=None):
    """The files of the source, in the order in which shards are numbered, and which of them are meant by default."""
    if source == "python-docs":
        versions = [f"python {sys.version.split()[0]}"]
        versions += [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "torch")]
        return [File(source, ", ".join(versions), python_docs)], "0"
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    paths = [source] if os.path.isfile(source) else sorted(glob.glob(pattern, recursive=True))
    readers = {".jsonl": jsonl_texts, ".parquet": parquet_texts}
    files = [
        File(Path(path).as_posix(), fingerprint(path), partial(read, path))
        for path in paths
        if (read := readers.get(Path(path).suffix))
    ]
    if text_files := [path for path in paths if path.endswith(".txt")]:
        files.append(File(Path(source).as_posix(), fingerprint(*text_files), lambda: map(text_of, text_files)))
    if files:
        return files, f"0-{len(files) - 1}"
    if paths or not re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}", source):
        sys.exit(
            f"--source={source} is not here, or has no .txt, .jsonl or .parquet file; a source is a path or a "
            "pattern of such, OWNER/DATASET/FOLDER on the hub, or python-docs."
        )
    return hub_files(source, revision)


def documents(file, at_most=None):
    """The texts of a file that have any text."""
    for text in itertools.islice(file.texts(), at_most):
        if not isinstance(text, str | None):
            sys.exit(f"{file.name}: a text must be a string, not the {type(text).__name__} {str(text)[:40]}.")
        if text and not text.isspace():  # an empty document would only teach that texts end at once
            yield text.encode("utf-8", "replace").decode()  # JSON can spell half a character: that becomes a ?


def fingerprint(*paths):
    """Changes when a local file does."""
    stats = [(Path(path).as_posix(), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return f"{sum(size for _, size, _ in stats)} bytes, {hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


def hub_files(source, revision):
    """The parquet files in a folder of a dataset on the hub, at the commit that revision stands for now."""
    owner, name, folder = source.split("/", 2)
    with hub_errors(source):
        from huggingface_hub import HfApi

        api, repo = HfApi(), f"{owner}/{name}"
        commit = api.dataset_info(repo, revision=revision).sha
        entries = api.list_repo_tree(repo, folder, repo_type="dataset", revision=commit)
        paths = sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))
    if not paths:
        sys.exit(f"--source={source}: that folder of the hub holds no .parquet file.")
    return [File(path, commit, partial(parquet_texts, f"hf://datasets/{repo}@{commit}/{path}")) for path in paths], "0"


@contextmanager
def hub_errors(what):
    """Whatever goes wrong between here and the hub, as one sentence."""
    try:
        yield
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "HFValidationError" in kinds:
            sys.exit(f"{what} is no path here, and cannot be the name of anything on the hub.")
        if "RevisionNotFoundError" in kinds:
            sys.exit(f"{what}: the hub knows no such --revision.")
        if "RepositoryNotFoundError" in kinds:  # the hub does not tell the two apart, so that names stay private
            sys.exit(f"{what}: the hub does not know it, or keeps it for members: then set HF_TOKEN to your token.")
        if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            sys.exit(f"{what}: the hub knows the repository, but nothing of that name in it.")
        sys.exit(
            f"{what}: the hub cannot be reached ({type(error).__name__}); without a network, "
            "`python prepare.py config/tiny.py` needs nothing from it."
        )


def parquet_texts(path):
    """The column `text` of a parquet file, here or on the hub; of the latter only that column travels."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        if path.startswith("hf://"):
            with hub_errors(path):
                from datasets import load_dataset

                logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it is said below, once
                rows = load_dataset("parquet", data_files=[path], split="train", streaming=True, columns=["text"])
                for batch in rows.iter(batch_size=1000):
                    yield from batch["text"]
        else:
            for batch in ParquetFile(path).iter_batches(1000, columns=["text"]):
                yield from batch["text"].to_pylist()
    except (ValueError, KeyError, ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        sys.exit(f"{path}: not a parquet file with a column text ({reason}).")


def jsonl_texts(path):
    """The field `text` of each line of a jsonl file that is not blank."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                sys.exit(f"{path}, line {number}: not a JSON object with a field text ({error!r}).")


def text_of(path):
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        sys.exit(f"{path}: byte {error.start} is not UTF-8; convert the file, for example with iconv.")


@cache  # a tokenizer may be trained on it first
def python_docs():
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
    """The docstrings of a source file that are longer than so many characters, in the order of the file."""
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
