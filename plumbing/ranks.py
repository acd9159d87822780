"""Ranks, signals and what is printed.

A rank is one of several processes that train together, each on a device of its own.
"""

import contextlib
import datetime
import functools
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm


def say(text, file=None):
    """Print a line. What cannot be printed, because the disk is full or nobody reads, is lost; the run is not."""
    with contextlib.suppress(OSError):
        print(f"{text}\n", end="", file=file, flush=True)  # as one piece, for another thread may print too


class Ranks:
    """The processes that train together. torchrun starts them and tells each its rank; alone, one is rank 0 of 1.

    Whoever waits for another for more than timeout seconds takes it for dead, and ends the job.
    """

    def __init__(self, timeout):
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
        """A block that may exit with a sentence: if it does on one rank, all exit, and the sentence is printed once."""
        refusal = None
        try:
            yield
        except SystemExit as error:
            refusal = str(error.code)
        refusals = self.gather(refusal)
        reasons = {refusal: refusals.index(refusal) for refusal in refusals if refusal is not None}
        if reasons:
            said_by_all = len(reasons) == 1 and None not in refusals
            lines = [reason if said_by_all else f"rank {rank}: {reason}" for reason, rank in reasons.items()]
            self.refuse("\n".join(lines))

    def agree(self, facts):
        """Exit if the values of a dict are not the same on all ranks."""
        everyone = self.gather(facts)
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
            self.sum(torch.zeros(1))  # a rank that left in haste could trip over its own threads
            dist.destroy_process_group()

    def say(self, text):
        """Print once, not once a rank."""
        if self.rank == 0:
            say(text)

    def progress(self, items, doing):
        """The items, with a bar where they take more than a second and a person watches a terminal."""
        return tqdm(items, doing, leave=False, delay=1, disable=None if self.rank == 0 else True)


def reports_lost_ranks(main):
    """A main that ends with one sentence if its connection to another rank breaks, or memory runs out."""

    @functools.wraps(main)
    def wrapper(settings):
        try:
            main(settings)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            sys.exit(
                f"{reason}, with --micro_batch={settings.micro_batch}: a smaller one needs less, and so does "
                "--recompute_activations=True."
            )
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            sys.exit(
                f"a rank died, or the others waited for it more than --timeout={settings.timeout} seconds: {error}"
            )

    return wrapper


class StopSignal:
    """Ctrl-C, and a scheduler's SIGTERM, let a step end and be saved: asked becomes True.

    The same signal can come from a terminal and from torchrun, within a second or so, and counts once. A person's
    second Ctrl-C, later than that, stops at once.
    """

    def __init__(self, rank):
        self.asked, self.since, self.rank = False, 0.0, rank
        signal.signal(signal.SIGINT, self.ask)
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, number, frame):
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
            if self.rank == 0:
                with contextlib.suppress(OSError):  # not print, which a signal may have interrupted
                    os.write(1, b"stopping after this step, to save it; Ctrl-C once more stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
