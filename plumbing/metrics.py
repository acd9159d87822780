"""The log of a run: a line on the screen, one in metrics.jsonl, and one in TensorBoard or wandb where asked for."""

import contextlib
import dataclasses
import datetime
import json
import math
import sys
import time
from pathlib import Path

from plumbing.checkpoint import claim
from plumbing.devices import peak_flops
from plumbing.files import write_whole
from plumbing.ranks import say


class Log:
    """log(step, ...) writes what is given, and what follows from it: tokens, epochs, tokens per second, MFU. Every step
    is in the file; the screen has one in log_interval, and those that were evaluated.

    MFU is the fraction of a device's peak that goes into the operations which training needs (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B).
    """

    def __init__(self, settings, ranks, windows, device, flops_per_token, step=None):
        """step is that of the checkpoint that the run continues: what was written after it will be written again."""
        self.settings, self.ranks, self.peak = settings, ranks, peak_flops(device)
        self.flops_per_token = flops_per_token
        self.epoch_tokens = windows.per_epoch * windows.seq_len  # tokens of one pass over all that the run sees
        if settings.repeat_steps:
            self.epoch_tokens = min(self.epoch_tokens, settings.repeat_steps * settings.batch_tokens)
        self.first_step, self.steps, self.seconds = step or 0, 0, 0.0  # the last two: since a line of the screen
        self.last, self.clock = None, None
        self.path = Path(settings.out_dir) / "metrics.jsonl"
        if ranks.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            claim(settings.out_dir)
            rewind(self.path, -1 if step is None else step)
            self.track = TRACKERS[settings.log_to](settings, step or 0)
        if self.peak:
            ranks.say(f"MFU is of {self.peak / 1e12:,.0f} Tflop/s, with causal attention counted by half")

    def timed(self, seconds):
        """Count a step into the speed."""
        self.steps, self.seconds, self.last = self.steps + 1, self.seconds + seconds, seconds

    def __call__(self, step, loss=None, learning_rate=None, grad_norm=None, **evaluation):
        """In metrics.jsonl, null is what was not measured or is not finite."""
        tokens, per_step = step * self.settings.batch_tokens, self.settings.batch_tokens
        metrics = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "epoch": tokens / self.epoch_tokens,
            "unique_tokens": min(tokens, self.epoch_tokens),
            "tokens_per_second": per_step / self.last if self.last else None,
            "mfu": self.mfu(per_step / self.last) if self.last else None,
        } | evaluation
        self.last = None
        if self.ranks.rank > 0:
            return
        shown = evaluation or step % self.settings.log_interval == 0 or step == self.settings.max_steps
        if shown or step == self.first_step + 1:
            say(" | ".join(self.words(metrics, evaluation)))
            self.steps, self.seconds = 0, 0.0
        if self.clock is None and loss is not None:  # the first step is done, and what it waited for
            self.clock = step, time.perf_counter()
        metrics = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            self.track({name: value for name, value in metrics.items() if value is not None})
        except OSError as error:  # a full disk costs a line, not the run
            say(f"{self.path} could not be written: {error.strerror}")

    def mfu(self, tokens_per_second):
        return tokens_per_second * self.flops_per_token / (self.peak * self.ranks.size) if self.peak else None

    def words(self, metrics, evaluation):
        step, last = metrics["step"], self.settings.max_steps
        yield f"step {step}/{last}"
        if metrics["loss"] is not None:
            yield f"loss {metrics['loss']:.4f}"
            yield f"lr {metrics['learning_rate']:.2e}"
            yield f"grad_norm {metrics['grad_norm']:.2f}"
        for name, value in evaluation.items():
            yield f"{name} {value:.4f}"
        if self.steps:
            speed = self.steps * self.settings.batch_tokens / self.seconds
            yield f"{speed:,.0f} tokens/s"
            if self.peak:
                yield f"{self.mfu(speed):.1%} MFU"
        if self.clock and self.clock[0] < step < last:  # by the clock, so with evaluations, samples and saves
            first, since = self.clock
            left = (time.perf_counter() - since) / (step - first) * (last - step)
            yield f"{datetime.timedelta(seconds=round(left))} left"


def rewind(path, step):
    """Drop the lines of metrics.jsonl that come after a step, and any half-written one."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept).encode())


# ---- Trackers: packages of their own, imported only when asked for --------------------------------------------------


@contextlib.contextmanager
def optional(package):
    try:
        yield
    except ImportError:
        sys.exit(f"--log_to={package} needs a package that is not here: pip install {package}")


def no_tracker(settings, step):
    return lambda metrics: None


def tensorboard(settings, step):
    with optional("tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(settings.out_dir, purge_step=step + 1)  # what was written later than this step is dropped

    def track(metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return track


def wandb(settings, step):
    with optional("wandb"):
        import wandb

    out_dir = Path(settings.out_dir)
    id_file = out_dir / "wandb_id.txt"  # by which the service knows this run
    options = {"id": id_file.read_text() if step and id_file.exists() else None, "resume": "allow"}
    options |= {"project": "smollm2", "name": out_dir.name, "dir": out_dir, "config": dataclasses.asdict(settings)}
    try:
        run = wandb.init(**options)
    except wandb.Error as error:
        sys.exit(f"--log_to=wandb: {error}; WANDB_MODE=offline needs no account.")
    id_file.write_text(run.id)
    run.define_metric("*", step_metric="step")  # not the number of calls, which a resumed run would begin again
    return run.log


TRACKERS = {"none": no_tracker, "tensorboard": tensorboard, "wandb": wandb}
