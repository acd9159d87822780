"""Where documents come from: the hub, local files, or the documentation that Python brings along.

`list_files` is all that prepare.py asks for: the files of a source, each with a way to its texts. What cannot be had or
read ends the program with one sentence.
"""

import glob
import hashlib
import itertools
import json
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from plumbing import python_docs
from plumbing.hub import hub_errors, list_parquet


@dataclass
class File:
    """One file of a source, or all of its text files together."""

    name: str
    revision: str  # what tells this content from another under the same name
    texts: Callable  # () -> iterator of str, None where a document has no text
    count: Callable = lambda: None  # () -> how many texts there are, None where only reading them tells


def list_files(source, revision=None):
    """The files of the source, in the order in which shards are numbered, and which of them are meant by default."""
    if source == "python-docs":
        return [File(source, python_docs.version(), python_docs.texts, lambda: len(python_docs.texts()))], "0"
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    found = [source] if os.path.isfile(source) else sorted(glob.glob(pattern, recursive=True))
    paths = [path for path in found if os.path.isfile(path)]
    jsonl, parquet = ([path for path in paths if path.endswith(end)] for end in (".jsonl", ".parquet"))
    files = [
        File(Path(path).as_posix(), fingerprint(path), partial(jsonl_texts, path), partial(jsonl_count, path))
        for path in jsonl
    ]
    files += [
        File(Path(path).as_posix(), fingerprint(path), partial(parquet_texts, path), partial(parquet_count, path))
        for path in parquet
    ]
    files.sort(key=lambda file: file.name)
    if others := [path for path in paths if not path.endswith((".jsonl", ".parquet"))]:
        texts = others if others == [source] else [path for path in others if text_of(path) is not None]
        if left_out := len(others) - len(texts):
            print(f"left out: {left_out} of {len(others)} files that are binary or not UTF-8", flush=True)
        if texts:
            read = partial(map, partial(text_of, refuse=True), texts)
            files.append(File(Path(source).as_posix(), fingerprint(*texts), read, lambda: len(texts)))
    if files:
        return files, f"0-{len(files) - 1}"
    if paths or not re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}", source):
        sys.exit(
            f"--source={source} is not here, or has no text; a source is a file, a folder or a pattern, "
            "OWNER/DATASET/FOLDER on the hub, or python-docs."
        )
    commit, files = list_parquet(source, revision)
    return [File(path, commit, partial(parquet_texts, address)) for path, address in files.items()], "0"


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


def parquet_texts(path):
    """The column `text` of a parquet file, here or on the hub; of the latter only that column travels."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        if path.startswith("hf://"):
            with hub_errors(path, but=(ValueError, KeyError, ArrowException)):
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


def parquet_count(path):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path).metadata.num_rows
    except ArrowException:  # said when it is read
        return None


def jsonl_texts(path):
    """The field `text` of each line of a jsonl file that is not blank."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                sys.exit(f"{path}, line {number}: not a JSON object with a field text ({error!r}).")


def jsonl_count(path):
    with open(path, "rb") as lines:
        return sum(not line.isspace() for line in lines)


def text_of(path, refuse=False):
    """The text in a file; None if it is none, or one sentence."""
    content = Path(path).read_bytes()
    try:
        if 0 not in content:
            return content.decode("utf-8-sig").replace("\r\n", "\n")
        place = content.index(0)
    except UnicodeDecodeError as error:
        place = error.start
    if refuse:
        sys.exit(f"{path}: byte {place} is not text in UTF-8; convert the file, for example with iconv.")
    return None


def ahead(iterable, by=2):
    """The same items, made in a thread while the caller is busy with earlier ones."""
    items, done = queue.Queue(by), object()

    def work():
        try:
            for item in iterable:
                items.put((item, None))
            items.put((done, None))
        except BaseException as error:  # also the sentence of a sys.exit
            items.put((done, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = items.get()
        if error:
            raise error
        if item is done:
            return
        yield item
