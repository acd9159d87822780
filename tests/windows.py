"""A script under Windows' rules for files: python tests/windows.py train.py [settings]

Only a descriptor that is open for writing can be flushed; what is open or mapped into memory cannot be renamed or
removed; a rename replaces nothing.
"""

import fcntl
import os
import runpy
import sys

fsync, rename = os.fsync, os.rename


def fsync_if_writable(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    fsync(descriptor)


def rename_to_a_new_name(source, target):
    if os.path.exists(target):
        raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(target))
    rename(source, target)


def in_use():
    with open("/proc/self/maps") as maps:
        yield from (line.split(maxsplit=5)[5].strip() for line in maps if "/" in line)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # it was the one that listed them
            continue


def watch(event, arguments):
    if event in ("os.rename", "os.remove", "shutil.rmtree") and isinstance(arguments[0], str | os.PathLike):
        for path in arguments[: 2 if event == "os.rename" else 1]:
            path = os.path.abspath(path)
            if any(used == path or used.startswith(path + os.sep) for used in in_use()):
                raise PermissionError(13, "The process cannot access the file because it is being used", path)


os.fsync, os.rename = fsync_if_writable, rename_to_a_new_name
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
