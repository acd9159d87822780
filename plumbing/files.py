"""Atomic writes, which survive a power cut, locks, and lines on the screen."""

import contextlib
import os
import secrets
import sys
import tempfile

from filelock import FileLock, Timeout

HELD = {}  # locks, by path
AFTERWARDS = contextlib.ExitStack()  # what a run gives back when it ends, the last first: signals, its thread, its lock


def write_whole(path, content):
    """Write bytes under a temporary name, then rename: the file is there whole or not at all."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        rename_whole(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def rename_whole(temporary, path):
    """Give a file or folder its final name once its content is on the disk."""
    inside = os.listdir(temporary) if os.path.isdir(temporary) else []
    for written in (*(os.path.join(temporary, name) for name in inside), temporary):
        sync(written)
    os.replace(temporary, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync(path):
    """Flush a file, or the names in a folder, from the system's memory to the disk."""
    if not os.path.isdir(path):
        with open(path, "r+b") as file:  # Windows flushes only files that are open for writing
            os.fsync(file.fileno())
    elif os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems do this by themselves
            os.fsync(descriptor)
        os.close(descriptor)


def make_folder(path, setting):
    """Make a folder, unless it is there; exits with one sentence, naming the setting, if it cannot be written."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        sys.exit(f"--{setting}={path} is not a folder that can be written: {error.strerror}.")


@contextlib.contextmanager
def new_folder(path, setting):
    """make_folder for a with statement that fills it: if it fails, a folder that was not there before, and is still
    empty, is removed."""
    is_new = not os.path.exists(path)
    make_folder(path, setting)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            if is_new:
                os.rmdir(path)
        raise


def why(error):
    """An OSError in words: the file, and what the system says."""
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


@contextlib.contextmanager
def locked(path, refusal):
    """Hold the lock file at path inside a with statement; exits with the refusal if another process holds it."""
    hold(path, refusal)
    try:
        yield
    finally:
        release(path)
        with contextlib.suppress(OSError):
            os.remove(path)


def hold(path, refusal):
    """Hold the lock file at path until it is released, or this process ends; exits with the refusal if another does."""
    path = os.path.abspath(path)
    if path in HELD:
        return
    lock = FileLock(path)
    with contextlib.suppress(NotImplementedError):  # a file system without locks
        try:
            lock.acquire(timeout=0)
        except Timeout:
            sys.exit(refusal)
    HELD[path] = lock


def release(path):
    if lock := HELD.pop(os.path.abspath(path), None):
        lock.release()


def say(text, file=None):
    """Print a line. If it cannot be printed, because the disk is full or nobody reads, the run goes on."""
    with contextlib.suppress(OSError):
        print(f"{text}\n", end="", file=file, flush=True)  # in one piece, because another thread may print too
