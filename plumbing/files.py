"""Files that are there whole or not at all, also after a power cut, and locks that end with their process."""

import contextlib
import os
import secrets
import sys

HELD = {}  # the open files of locks, by path: closing one would release it


def write_whole(path, content):
    """Write a file under another name, and rename it when all of it is on the disk."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with open(temporary, "xb") as file:
        file.write(content)
    rename_whole(temporary, path)


def rename_whole(temporary, path):
    """Give a file or folder its own name: first its content is on the disk, then the name."""
    inside = os.listdir(temporary) if os.path.isdir(temporary) else []
    for written in (*(os.path.join(temporary, name) for name in inside), temporary):
        sync(written)
    os.replace(temporary, path)
    sync(os.path.dirname(os.path.abspath(path)))


def sync(path):
    """Have a file, or the names in a folder, written from the system's memory to the disk."""
    if not os.path.isdir(path):
        with open(path, "r+b") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
    elif os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system that does this by itself
            os.fsync(descriptor)
        os.close(descriptor)


def lock(path, refusal):
    """Hold the lock of a file until this process ends, however it ends; exits with the refusal if another has it.

    Returns a function that releases it, and removes the file.
    """
    if os.path.abspath(path) in HELD:
        return None
    file = open(path, "ab")  # noqa: SIM115  it stays open
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        sys.exit(refusal)
    except OSError:
        pass  # a file system without locks
    HELD[os.path.abspath(path)] = file

    def release():
        HELD.pop(os.path.abspath(path)).close()
        with contextlib.suppress(OSError):
            os.remove(path)

    return release
