"""Python scripts without the seconds that PyTorch takes to import: a process that has it forks one for each script.

tests/mutate.py runs the tests with it; otherwise every script is started as a user does.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


class Forks:
    """The process, for as long as this one lives."""

    def __init__(self):
        self.address = os.path.join(tempfile.mkdtemp(), "forks")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.address], env=environment, stdin=subprocess.PIPE
        )
        while not os.path.exists(self.address):
            if self.process.poll() is not None:
                sys.exit("it did not start")
            threading.Event().wait(0.05)

    def run(self, command, cwd, env, timeout=600):
        """As subprocess.run with its output captured."""
        with (
            socket.socket(socket.AF_UNIX) as connection,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            connection.connect(self.address)
            connection.settimeout(timeout)
            order = json.dumps([command[1:], str(cwd), env]).encode() + b"\n"
            socket.send_fds(connection, [b"x"], [out.fileno(), err.fileno()])
            connection.sendall(order)
            code = int(connection.recv(100))
            out.seek(0), err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())


def become(arguments, cwd, environment):
    """Be the script of a command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(cwd)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(cwd, arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def serve(connection):
    _, descriptors, *_ = socket.recv_fds(connection, 1, 2)
    with connection.makefile() as lines:
        order = json.loads(lines.readline())
    child = os.fork()
    if child == 0:
        os.setsid()
        for place, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, place)
        code = 0
        try:
            become(*order)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    connection.close()


def main(address):
    import pyarrow.parquet  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch.distributed
    import torch.utils.checkpoint  # noqa: F401
    import tyro  # noqa: F401

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # the one that asks has ended
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{address}.tmp")
        server.listen()
        os.rename(f"{address}.tmp", address)
        while True:
            serve(server.accept()[0])  # one at a time: no other thread is in the middle of something when it forks


if __name__ == "__main__":
    main(sys.argv[1])
