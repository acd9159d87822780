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
from plumbing.corpus import Mix
from plumbing.devices import device_name, peak_flops
from plumbing.files import say, write_whole
from plumbing.pretrained import newest_checkpoint


class Log:
    """log(step, ...) writes what is given, and what follows from it: tokens, epochs, tokens per second, MFU. Every step
    goes to the file; the screen shows one in log_interval, and those that were evaluated.

    MFU, model FLOPs utilization, is the fraction of a device's peak that goes into the operations which training needs
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """

    def __init__(self, settings, ranks, mix, device, flops_per_token, step=None):
        """step is that of the checkpoint being resumed: what was written after it will be written again."""
        self.settings, self.ranks, self.flops_per_token = settings, ranks, flops_per_token
        self.peak = peak_flops(device_name(device)) if device.type == "cuda" else None
        self.mix, self.sizes = mix, {name: part.per_epoch for name, part in mix.parts.items()}  # of all that it sees
        if settings.repeat_steps:
            repeated = mix.seen(settings.repeat_steps * settings.batch_tokens // settings.seq_len)
            self.sizes = {name: max(1, min(size, repeated[name])) for name, size in self.sizes.items()}
        self.first_step, self.steps, self.seconds = step or 0, 0, 0.0  # the last two: since a line of the screen
        self.clock = None
        self.path = Path(settings.out_dir) / "metrics.jsonl"
        if ranks.rank == 0:
            claim(settings.out_dir)
            rewind(self.path, -1 if step is None else step)
            self.track = TRACKERS[settings.log_to](settings, step or 0)
        if self.peak:
            ranks.say(f"MFU: of {self.peak / 1e12:,.0f} Tflop/s, counting only the causal half of attention")

    def __call__(self, step, loss=None, learning_rate=None, grad_norm=None, seconds=None, **evaluation):
        """seconds are those of the step, without its evaluation. In metrics.jsonl, null is what was not measured or is
        not finite."""
        if step <= self.first_step + 1:  # the first step may have waited for the compiler
            seconds = None
        self.steps, self.seconds = self.steps + bool(seconds), self.seconds + (seconds or 0.0)
        tokens, per_step = step * self.settings.batch_tokens, self.settings.batch_tokens
        metrics = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            **self.passes(tokens),
            "tokens_per_second": per_step / seconds if seconds else None,
            "mfu": self.mfu(per_step / seconds) if seconds else None,
        } | evaluation
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

    def passes(self, tokens):
        """epoch, the passes over all that the run sees, and unique_tokens, how many of them it has seen; in a mix also
        for each folder."""
        length, sizes = self.settings.seq_len, self.sizes
        seen = self.mix.seen(tokens // length)
        unique = {name: length * min(count, sizes[name]) for name, count in seen.items()}
        values = {"epoch": sum(seen.values()) / sum(sizes.values()), "unique_tokens": sum(unique.values())}
        for name in seen if len(seen) > 1 else ():
            values |= {f"epoch/{name}": seen[name] / sizes[name], f"unique_tokens/{name}": unique[name]}
        return values

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


def announce(ranks, settings, model, dtype, corpus, checkpoint):
    """What the run is about to do, in a few lines on the screen."""
    parameters, device = sum(parameter.numel() for parameter in model.parameters()), model.lm_head.weight.device
    sequences = settings.batch_tokens // settings.seq_len
    ranks.say(f"{parameters:,} parameters, {dtype} on {ranks.size} x {device.type}")
    parts = corpus.train.parts
    per_epoch = sum(part.per_epoch for part in parts.values())
    ranks.say(f"{sequences} sequences of {settings.seq_len} tokens per step, {per_epoch:,} per epoch")
    if len(parts) > 1:
        of_all = zip(parts.items(), map(float, corpus.train.shares), strict=True)
        mix = [f"{share:.1%} from {name}, which has {part.per_epoch:,}" for (name, part), share in of_all]
        ranks.say(f"sequences of the mix: {'; '.join(mix)}")
    for part in (part for part in parts.values() if part.answers):
        tokens, learned = Mix({"": part}, [1]).batch(0, min(500, part.per_epoch))
        begun = max(1, (learned[:, 1:] & ~learned[:, :-1]).sum())
        cut = (learned[:, -1] & ~learned.all(1) & (tokens[:, -1] != corpus.ends["eos_token_id"])).sum()
        ranks.say(f"learned: the answers, {learned.mean():.1%} of the tokens; sequences cut {cut / begun:.1%} of them")
    if checkpoint:
        ranks.say(f"resumed from {checkpoint}; new shards, which are left out: {', '.join(corpus.left_out) or 'none'}")
    if settings.warmup_steps + settings.decay_steps > settings.max_steps:
        ranks.say("warmup_steps and decay_steps are more than max_steps: the learning rate does not reach its peak")


def rewind(path, step):
    """Drop the lines of metrics.jsonl that come after a step, and any that were half written."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    write_whole(path, b"".join(kept))


class BadSteps:
    """Steps whose loss or gradient is NaN or infinite, which would stay in the weights for ever. They are skipped;
    max_bad_steps of them in a row end the run."""

    def __init__(self, settings, ranks, save):
        self.settings, self.ranks, self.save, self.in_a_row = settings, ranks, save, 0

    def includes(self, step, loss, grad_norm):
        """Whether this step is one of them; exits if there were too many."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.ranks.say(f"step {step} is skipped: its loss is {loss}, its grad_norm {grad_norm}")
        if self.in_a_row == self.settings.max_bad_steps:
            self.save.finish()
            sys.exit(
                f"{self.in_a_row} steps in a row were NaN or infinite; the last good checkpoint is "
                f"{newest_checkpoint(self.settings.out_dir) or 'none yet'}: continue from it with a lower "
                "--learning_rate, or with --dtype=float32."
            )
        return True


# ---- Trackers: optional packages, imported only when asked for -------------------------------------------------------


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
