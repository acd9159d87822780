"""The log of a run: a line on the screen, one in metrics.jsonl, and one in TensorBoard or wandb where asked for."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from pathlib import Path

from plumbing.devices import peak_flops


class Log:
    """log(step, ...) writes what is given, and what follows from the step: tokens, epochs, tokens a second, MFU.

    MFU is the fraction of a device's peak that goes into the operations which training needs (Chowdhery et al. 2022,
    arXiv 2204.02311, appendix B); flops_per_token are those of one token.
    """

    def __init__(self, settings, ranks, windows, device, flops_per_token, step=None):
        """step is that of the checkpoint that the run continues: what was written after it will be written again."""
        self.settings, self.ranks, self.peak = settings, ranks, peak_flops(device)
        self.flops_per_token, self.epoch_tokens = flops_per_token, windows.per_epoch * windows.seq_len
        self.steps, self.seconds = 0, 0.0  # since the last line
        self.path = Path(settings.out_dir) / "metrics.jsonl"
        if ranks.rank == 0:
            rewind(self.path, -1 if step is None else step)
            self.track = TRACKERS[settings.log_to](settings, step or 0)

    def timed(self, seconds):
        """Count a step of so many seconds into the speed of the next line."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    def __call__(self, step, loss=None, learning_rate=None, grad_norm=None, **evaluation):
        """In metrics.jsonl, null is what was not measured or is not finite."""
        settings, tokens = self.settings, step * self.settings.batch_tokens
        speed = self.steps * settings.batch_tokens / self.seconds if self.steps else None
        peak = self.peak and self.peak * self.ranks.size
        metrics = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "epoch": tokens / self.epoch_tokens,
            "unique_tokens": min(tokens, self.epoch_tokens, (settings.repeat_steps or step) * settings.batch_tokens),
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / peak if speed and peak else None,
        } | evaluation
        self.steps, self.seconds = 0, 0.0
        if self.ranks.rank > 0:
            return
        print(" | ".join(self.words(metrics, evaluation)), flush=True)
        metrics = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")
            self.track({name: value for name, value in metrics.items() if value is not None})
        except OSError as error:  # a full disk costs a line, not the run
            print(f"{self.path} could not be written: {error.strerror}", flush=True)

    def words(self, metrics, evaluation):
        step, last, speed = metrics["step"], self.settings.max_steps, metrics["tokens_per_second"]
        yield f"step {step}/{last}"
        if metrics["loss"] is not None:
            yield f"loss {metrics['loss']:.4f}"
            yield f"lr {metrics['learning_rate']:.2e}"
            yield f"grad_norm {metrics['grad_norm']:.2f}"
        for name, value in evaluation.items():
            yield f"{name} {value:.4f}"
        if speed:
            yield f"{speed:,.0f} tokens/s"
        if metrics["mfu"]:
            yield f"{metrics['mfu']:.1%} MFU"
        if speed and step < last:
            yield f"{datetime.timedelta(seconds=round((last - step) * self.settings.batch_tokens / speed))} left"


def rewind(path, step):
    """Drop the lines of metrics.jsonl that come after a step, and any half-written one."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    temporary = Path(f"{path}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


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
