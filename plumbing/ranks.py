"""Ranks and signals.

A rank is one of several processes that train together, each on a device of its own.
"""

import contextlib
import datetime
import functools
import gc
import math
import os
import signal
import sys
import time

from plumbing.files import AFTERWARDS, say, why

import torch
import torch.distributed as dist
from tqdm import tqdm


class Ranks:
    """The processes that train together. torchrun starts them and tells each its rank; alone, one is rank 0 of 1.

    A rank that waits for another for more than timeout seconds assumes that it died, and ends the job.
    """

    def __init__(self, timeout):
        self.began = time.monotonic()
        self.rank, self.local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))

    def gather(self, value):
        """The values of all ranks, in their order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self):
        """A block of set-up. If it exits with a sentence on one rank, all exit, and the sentence is printed once.

        Yields a dict for facts that must be the same on all ranks; if they differ, all exit and say where.
        """
        facts, refusal = {}, None
        try:
            yield facts
        except SystemExit as error:
            refusal = str(error.code)
        except OSError as error:  # a file that cannot be read
            refusal = why(error)
        refusals, everyone = zip(*self.gather((refusal, facts)), strict=True)
        reasons = {refusal: refusals.index(refusal) for refusal in refusals if refusal is not None}
        if reasons:
            said_by_all = len(reasons) == 1 and None not in refusals
            lines = [reason if said_by_all else f"rank {rank}: {reason}" for reason, rank in reasons.items()]
            self.refuse("\n".join(lines))
        for rank, theirs in enumerate(everyone):
            for name in everyone[0] | theirs:
                here, there = everyone[0].get(name), theirs.get(name)
                if here != there:
                    differ = f"the ranks differ: {name} is {here} on rank 0, and {there} on rank {rank}"
                    self.refuse(f"{differ}. They need the same command, data and checkpoints.")

    def refuse(self, sentence):
        """All ranks exit, and the first of them says why."""
        self.leave()
        sys.exit(sentence if self.rank == 0 else 1)

    def sum(self, tensor):
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self):
        if self.size > 1:
            self.sum(torch.zeros(1))  # leave only after all ranks are done
            dist.destroy_process_group()

    def say(self, text):
        """Print once, not once per rank."""
        if self.rank == 0:
            say(text)

    def progress(self, items, doing):
        """The items, with a progress bar where they take more than a second and a person watches a terminal."""
        return tqdm(items, doing, leave=False, delay=1, disable=None if self.rank == 0 else True)


def ends_well(main):
    """A main that ends with one sentence if another rank is lost, or memory runs out. However it ends, Ctrl-C, the
    folder and the memory of the run are free again, so a notebook can go on and call it once more."""

    @functools.wraps(main)
    def wrapper(settings):
        try:
            main(settings)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            sys.exit(f"{reason}: lower --micro_batch, or train with --recompute_activations=True.")
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            if "connectFullMesh" in str(error):  # a host name that resolves to 127.0.1.1, as Debian and Ubuntu set it
                sys.exit(
                    "the ranks found each other but cannot connect. Where they are on several machines, set "
                    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each to the network interface between them, for "
                    f"example eth0: {error}"
                )
            sys.exit(
                f"a rank died, or the others waited for it more than --timeout={settings.timeout} seconds: {error}"
            )
        finally:
            AFTERWARDS.close()
            gc.unfreeze()

    return wrapper


class StopSignal:
    """Ctrl-C, a scheduler's SIGTERM, and the end of max_minutes end the run after the current step: asked() is True.

    The same signal can come from a terminal and from torchrun, within a second or so, and counts once. A person's
    second Ctrl-C, later than that, stops at once.
    """

    def __init__(self, ranks, max_minutes):
        self.signaled, self.since, self.rank = False, 0.0, ranks.rank
        self.end = ranks.began + 60 * (max_minutes or math.inf)
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self.ask)
            AFTERWARDS.callback(signal.signal, number, before or signal.SIG_DFL)

    def asked(self):
        return self.signaled or time.monotonic() > self.end

    def ask(self, number, frame):
        if not self.signaled:
            self.signaled, self.since = True, time.monotonic()
            if self.rank == 0 and sys.stdout:
                with contextlib.suppress(OSError):  # not print, which a signal may have interrupted
                    os.write(1, b"stopping after this step, to save it; Ctrl-C once more stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
