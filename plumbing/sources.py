"""Where documents come from: the hub, local files, or the documentation that Python brings along.

`list_files` gives the files of a source, `documents` the documents of a file: texts, or conversations, which are lists
of messages (plumbing/chat.py). Anything that cannot be fetched or read ends the program with one sentence.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import queue
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from plumbing.chat import check_messages
from plumbing.files import say
from plumbing.python_docs import python_docs, python_docs_version, python_questions

# Documents that are no text, even where their bytes are, and what makes text of them.
CONVERTERS = {".pdf": "pdftotext"} | dict.fromkeys((".docx", ".odt", ".rtf", ".epub"), "pandoc")


@dataclass
class File:
    """One file of a source, or all of its text files together."""

    name: str
    revision: str  # what tells this content from another under the same name
    rows: Callable  # () -> iterator of texts, None for an empty one, or of lists of messages
    count: Callable = lambda: None  # () -> how many there are, None where only reading them tells
    columns: Callable = lambda: ()  # () -> the names of its columns, if it has any


def list_files(source, revision=None):
    """The files of the source, in the order in which shards are numbered, and which of them are meant by default."""
    if made := {"python-docs": python_docs, "python-questions": python_questions}.get(source):
        return [File(source, python_docs_version(), made, lambda: len(made()))], "0"
    pattern = os.path.join(glob.escape(source), "**") if os.path.isdir(source) else source
    found = [source] if os.path.isfile(source) else sorted(glob.glob(pattern, recursive=True))
    paths = [Path(path).as_posix() for path in found if os.path.isfile(path)]
    files, texts, left_out = [], [], []
    for path in paths:
        kind = Path(path).suffix.lower()
        if kind == ".jsonl":
            files.append(File(path, fingerprint(path), partial(jsonl_rows, path), partial(jsonl_count, path)))
        elif kind == ".parquet":
            files.append(parquet_file(path, fingerprint(path), partial(open, path, "rb")))
        elif kind == ".json" and (count := len(json_rows(path))):
            files.append(File(path, fingerprint(path), partial(json_rows, path), lambda count=count: count))
        elif text_of(path) is not None:
            texts.append(path)
        else:
            left_out.append(path)
    files.sort(key=lambda file: train_first(file.name))
    say_what_is_read([file.name for file in files], texts, left_out)
    if texts:
        read = partial(map, partial(text_of, refuse=True), texts)
        files.append(File(Path(source).as_posix(), fingerprint(*texts), read, lambda: len(texts)))
    if files:
        return files, f"0-{len(files) - 1}"
    if paths or not re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}", source):
        if os.path.isfile(source):
            text_of(source, refuse=True)
        sys.exit(
            f"--source={source} is not here, or has no text; a source is a file, a folder or a pattern, "
            "OWNER/DATASET/FOLDER on the hub, python-docs or python-questions."
        )
    return hub_files(source, revision), "0"


def say_what_is_read(tables, texts, left_out):
    """What was taken for what, so that nobody trains on a file by mistake."""

    def kinds(paths):
        counts = Counter(Path(path).suffix or "without an ending" for path in paths)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common(5)) + (
            "" if len(counts) < 6 else " ..."
        )

    if tables:
        say(f"rows are documents: {kinds(tables)}")
    if texts:
        say(f"each file is a document: {kinds(texts)}")
    if left_out:
        names = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        tools = sorted({CONVERTERS[kind] for path in left_out if (kind := Path(path).suffix.lower()) in CONVERTERS})
        how = f"; {' and '.join(tools)} can make text of some" if tools else ""
        say(f"left out, not plain text in UTF-8: {names}{how}")


def train_first(name):
    """The order of files: by name, those to train on before those to test on."""
    return "train" not in Path(name).name, name


def documents(file, at_most=None):
    """The texts or conversations of a file, without empty texts."""
    for row in itertools.islice(file.rows(), at_most):
        if isinstance(row, list):
            yield [{"role": message["role"], "content": whole_characters(message["content"])} for message in row]
        elif row and not row.isspace():  # an empty document would only teach that texts end at once
            yield whole_characters(row)


def holds_conversations(file):
    """Whether the documents of a file are conversations; a file on the hub is not read for that."""
    if columns := file.columns():
        return "messages" in columns and "text" not in columns
    return isinstance(next(documents(file), None), list)


def whole_characters(text):
    """JSON can spell half a character: that becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def is_row(value):
    """Whether this is a row of a table of documents."""
    return isinstance(value, dict) and bool(value.keys() & {"text", "messages"})


def document_of(row):
    """The text of a row, or its messages; raises ValueError if it has neither."""
    if not is_row(row):
        raise ValueError("it has neither a text nor messages")
    text, messages = row.get("text"), row.get("messages")
    if not isinstance(text, str | None):
        raise ValueError(f"a text must be a string, not the {type(text).__name__} {str(text)[:40]}")
    if text is None and "messages" in row:
        check_messages(messages)
        return messages
    return text


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


# ---- Files ----------------------------------------------------------------------------------------------------------


def fingerprint(*paths):
    """Changes when a local file does."""
    stats = [(Path(path).as_posix(), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return f"{sum(size for _, size, _ in stats)} bytes, {hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"


def parquet_file(name, revision, open_it):
    reading = (partial(function, open_it) for function in (parquet_count, parquet_columns))
    return File(name, revision, partial(parquet_rows, name, open_it), *reading)


def parquet_rows(name, open_it):
    """The column `text` of a parquet file, or `messages`; from the hub, only that column travels."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with hub_errors(name, but=(ValueError, KeyError, ArrowException)), open_it() as file:
            table = ParquetFile(file)
            columns = [column for column in ("text", "messages") if column in table.schema_arrow.names][:1]
            if not columns:
                raise ValueError(f"its columns are {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield document_of(row)
    except (ValueError, KeyError, ArrowException) as error:
        reason = (str(error).splitlines() or [""])[0]
        if number:
            sys.exit(f"{name}, row {number} is not a document: {reason}.")
        sys.exit(f"{name} is not a parquet file with a column text or messages: {reason}.")


def parquet_count(open_it):
    from pyarrow.parquet import ParquetFile

    with contextlib.suppress(Exception), open_it() as file:  # whatever is wrong is said when it is read
        return ParquetFile(file).metadata.num_rows


def parquet_columns(open_it):
    from pyarrow.parquet import ParquetFile

    with contextlib.suppress(Exception), open_it() as file:
        return ParquetFile(file).schema_arrow.names
    return ()


def jsonl_rows(path):
    """The field `text` of each line of a jsonl file that is not blank, or `messages`."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield document_of(json.loads(line))
            except (ValueError, RecursionError) as error:
                sys.exit(f"{path}, line {number} is not a document: {error}.")


def jsonl_count(path):
    with open(path, "rb") as lines:
        return sum(not line.isspace() for line in lines)


def json_rows(path):
    """The same of the objects in a JSON file that is a list of them; [] if it is anything else."""
    try:
        values = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        return []
    if not (isinstance(values, list) and values and is_row(values[0])):
        return []
    rows = []
    for value in values:
        try:
            rows.append(document_of(value))
        except ValueError as error:
            sys.exit(f"{path}, row {len(rows) + 1} is not a document: {error}.")
    return rows


def text_of(path, refuse=False):
    """The text in a file; None, or one sentence, if it has none."""
    if tool := CONVERTERS.get(Path(path).suffix.lower()):
        problem = f"not plain text; make a .txt of it, for example with {tool}"
    else:
        content = Path(path).read_bytes()
        try:
            if 0 not in content:
                return content.decode("utf-8-sig").replace("\r\n", "\n")
            place = content.index(0)
        except UnicodeDecodeError as error:
            place = error.start
        problem = f"byte {place} is not text in UTF-8; convert the file, for example with iconv"
    if refuse:
        sys.exit(f"{path}: {problem}.")
    return None


# ---- The Hugging Face hub -------------------------------------------------------------------------------------------


def hub_files(source, revision):
    """The parquet files in OWNER/DATASET/FOLDER, at the commit that revision stands for now."""
    owner, name, folder = source.split("/", 2)
    with hub_errors(source, instead="; without a network, `python prepare.py config/tiny.py` needs nothing from it"):
        from huggingface_hub import HfApi, HfFileSystem

        api, repo = HfApi(), f"{owner}/{name}"
        commit = api.dataset_info(repo, revision=revision).sha
        entries = api.list_repo_tree(repo, folder, repo_type="dataset", revision=commit)
        paths = [entry.path for entry in entries if entry.path.endswith(".parquet")]
    paths.sort(key=train_first)
    if not paths:
        sys.exit(f"--source={source}: that folder of the hub holds no .parquet file.")
    files = []
    for path in paths:
        open_it = partial(HfFileSystem().open, f"datasets/{repo}@{commit}/{path}")
        files.append(parquet_file(path, commit, open_it))
    return files


@contextlib.contextmanager
def hub_errors(what, but=(), instead=""):
    """Whatever goes wrong between here and the hub, except for some kinds of errors, as one sentence; where the hub
    cannot be reached, with what to do instead."""
    try:
        yield
    except but:
        raise
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
        sys.exit(f"{what}: the hub cannot be reached ({type(error).__name__}){instead}.")
