"""Train SmolLM2: one flat loop, from one CPU to many GPUs.

    python train.py config/smollm2.py                           one device, chosen by itself
    torchrun --nproc_per_node=8 train.py config/smollm2.py      eight: the same batches, the same losses, sooner
    python train.py config/smollm2.py --resume=True             go on after whatever happened

Reads what prepare.py wrote. Writes out_dir/metrics.jsonl, and checkpoints that sample.py and every tool of the Hugging
Face world can load, out_dir/checkpoint-NNNNNN/.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from plumbing.bins import Windows, open_bins, to_device, validation_windows
from plumbing.card import model_card
from plumbing.checkpoint import find_checkpoint, load_state, newest_checkpoint, remove_old_checkpoints, save_checkpoint
from plumbing.devices import choose_device, choose_dtype, keep_freed_memory, lacks_compiler, peak_flops
from plumbing.metrics import open_tracker
from plumbing.settings import flatten, load_settings

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from tokenizers import Tokenizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import SmolLM2, SmolLM2Config, training_flops

# SmolLM2-135M as it was pretrained: the published context of 8192 came from a second, short stage.
PRETRAINED = SmolLM2Config(vocab_size=0, max_position_embeddings=2048, rope_theta=10_000.0)


@dataclass
class Settings:
    """Train SmolLM2 on the tokens of a data folder."""

    data_dir: str = "data/cosmopedia-v2"  # folder that prepare.py wrote
    verify_data: bool = False  # read all of it first, and compare it with the sha256 that prepare.py noted
    out_dir: str = "out/smollm2"  # folder for metrics and checkpoints
    seq_len: int = 2048  # tokens of a training window
    micro_batch: int = 8  # windows on one device at once: what its memory holds
    batch_tokens: int = 1_048_576  # tokens of one optimizer step, over all devices and micro-batches
    max_steps: int = 1000  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, AdamW for the rest
    learning_rate: float = 3e-3  # at its peak
    warmup_steps: int = 100  # steps of the linear rise from 0 to the peak
    decay_steps: int = 200  # steps of the linear fall to 0 at the end
    weight_decay: float = 0.01  # of matrices; the weights of norms are left alone
    grad_clip: float = 1.0  # longest gradient, as a norm over all parameters
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest to work
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    compile: bool = True  # let torch.compile fuse the layers: a minute at the start, far faster afterwards
    checkpoint_activations: bool = False  # keep less for the backward pass and compute it again: less memory, slower
    seed: int = 0  # of the initial weights and the order of the data
    init_from: str = "scratch"  # scratch, or a checkpoint folder or hub id: weights and architecture to begin with
    resume: bool = False  # go on from the newest checkpoint of out_dir, if there is one
    log_interval: int = 10  # steps between lines of the log
    log_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to write it; each needs pip install
    eval_interval: int = 100  # steps between evaluations
    eval_tokens: int = 1_048_576  # tokens of the validation data to evaluate on, the same each time
    save_interval: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # how many of the newest stay
    repeat_steps: int | None = None  # train on the batches of the first so many steps again and again, to overfit
    max_bad_steps: int = 10  # stop after so many steps in a row whose loss or gradient is NaN or infinite
    timeout: int = 600  # seconds that devices wait for each other before they give up
    sample_interval: int = 100  # steps between samples of text
    sample_prompt: str = "Once upon a time"  # what the samples continue
    model: SmolLM2Config = field(default_factory=lambda: PRETRAINED)  # architecture; vocab_size 0: that of the data


# ---- The model in memory and in the compiler -------------------------------------------------------------------------


def compile_parts(model):
    """Let torch.compile fuse a layer, once for all since they are the same function of their weights, and the loss."""
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.nats = torch.compile(model.nats, dynamic=False)


def checkpoint_activations(model):
    """Keep no more for the backward pass than the input of each layer and of the loss, run them again when it comes to
    them (Chen et al. 2016, arXiv 1604.06174), and score one window at a time: a third more to compute, for a fifth of
    the memory. What is to be compiled has to be so before: the compiler would see through it."""
    again = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for layer in model.model.layers:
        layer.forward = partial(again, layer.forward)
    nats = model.nats
    model.nats = lambda hidden, targets: sum(map(partial(again, nats), hidden.split(1), targets.split(1)))


# ---- Optimizer ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    AdamW treats a matrix as a list of numbers. Muon treats it as a map: of the momentum's singular value decomposition
    U S V^T it keeps U V^T, so that the weights move equally far in every direction and not only in the few in which the
    gradient is large. Multiplied by 0.2 sqrt(max(rows, columns)), the update has the root mean square of AdamW's, and
    both can share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    For matrices only. The products are computed in dtype, whatever the type of the weights.
    """

    def __init__(self, matrices, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = defaultdict(list)  # one large product for many matrices instead of many small ones
            for matrix in group["params"]:
                same_shape[matrix.shape].append(matrix)
            for shape, matrices in same_shape.items():
                directions = []
                for matrix in matrices:
                    if matrix not in self.state:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                    momentum = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(momentum, group["momentum"]))  # Nesterov: one step ahead
                updates = orthogonalize(torch.stack(directions).to(self.dtype))  # (n, rows, columns)
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonalize(X):
    """U V^T of each matrix U S V^T, approximately: (n, rows, columns) -> the same shape.

    Newton-Schulz needs matrix products only. An odd polynomial of a matrix, a X + b (X X^T) X + c (X X^T)^2 X, is the
    same polynomial of its singular values. With these coefficients (from the post cited above) five rounds bring those
    between 0.01 and 1 close to 1, between 0.7 and 1.2, which serves an optimizer as well as 1 would.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if tall := X.size(1) > X.size(2):
        X = X.mT  # so that X X^T is the smaller of the two possible products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def make_optimizers(model, settings, dtype):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) for all parameters, or Muon for the matrices of the layers and
    AdamW for the rest.

    Weight decay pulls matrices towards 0; a norm's weight belongs near 1. Muon multiplies in the dtype of training,
    except that float16 would need a scaler of its own.
    """
    muon = settings.optimizer == "muon"
    layers = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2] if muon else []
    taken = {id(parameter) for parameter in layers}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if muon:
        dtype = torch.float32 if dtype == torch.float16 else dtype
        optimizers.append(Muon(layers, settings.learning_rate, settings.weight_decay, dtype=dtype))
    return optimizers


def learning_rate(step, settings):
    """The rate of the update after so many steps: up, level, down (Hu et al. 2024, arXiv 2404.06395, section 4).

    The level part has no end built in: a run can be prolonged, and decayed from any of its checkpoints.
    """
    warmup = (step + 1) / max(1, settings.warmup_steps)
    decay = (settings.max_steps - step) / max(1, settings.decay_steps)
    return settings.learning_rate * min(1.0, warmup, decay)


# ---- The run --------------------------------------------------------------------------------------------------------


def check_settings(settings, world_size):
    """Exit with one sentence if the settings do not fit together."""
    if settings.repeat_steps is not None and settings.repeat_steps < 1:
        sys.exit(f"--repeat_steps={settings.repeat_steps} must be at least 1, or left unset.")
    for name in ("seq_len", "micro_batch", "batch_tokens", "max_steps", "log_interval", "eval_interval", "eval_tokens",
                 "save_interval", "keep_checkpoints"):  # fmt: skip
        if getattr(settings, name) < 1:
            sys.exit(f"--{name}={getattr(settings, name)} must be at least 1.")
    for name in ("seed", "weight_decay", "warmup_steps", "decay_steps"):
        if not 0 <= getattr(settings, name) < 2**63:
            sys.exit(f"--{name}={getattr(settings, name)} must be 0 or above.")
    for name in ("learning_rate", "grad_clip"):
        if not 0 < getattr(settings, name) < math.inf:
            sys.exit(f"--{name}={getattr(settings, name)} must be a number above 0.")
    unit = settings.seq_len * settings.micro_batch * world_size
    if settings.batch_tokens % unit:
        fits = max(1, round(settings.batch_tokens / unit)) * unit
        sys.exit(f"--batch_tokens={settings.batch_tokens} must be a multiple of seq_len x micro_batch x devices, "
                 f"{settings.seq_len} x {settings.micro_batch} x {world_size}: {fits} is one.")  # fmt: skip


def check_resumed(checkpoint, state, settings, shards):
    """Exit if a resumed run would go on with other data, or in another order, or with another model. Everything else
    may change: steps, rates, intervals, the micro-batch, the number of devices."""
    names = ("seed", "seq_len", "batch_tokens", "optimizer", "model")
    then, now = state["settings"], dataclasses.asdict(settings)
    then = dict(flatten({name: then[name] for name in names} | {"data": state["data"]}))
    now = dict(flatten({name: now[name] for name in names} | {"data": shards}))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            sys.exit(f"{checkpoint} was trained with {name} = {then.get(name)}, now it is {now.get(name)}: resume a "
                     "run with the same, or begin another with --init_from.")  # fmt: skip


def check_tokenizer(folder, tokenizer):
    """Exit if a token of the data means something else to the model that the run starts from."""
    path = os.path.join(folder, "tokenizer.json")
    try:
        known = Tokenizer.from_file(path).get_vocab() if os.path.exists(path) else tokenizer.get_vocab()
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"{path} cannot be read: {error}")
    if any(known.get(token) != id for token, id in tokenizer.get_vocab().items()):
        sys.exit(f"the data has other tokens than {folder}: prepare it with --tokenizer={path}, into another folder.")


def rewind_metrics(path, step):
    """Drop the lines of metrics.jsonl that come after a step, for they will be written again, and any half-written."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)


def main(settings):
    # Devices. torchrun starts this file once for each device and tells each process its rank; alone, it is rank 0 of 1.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    check_settings(settings, world_size)
    device = choose_device(settings.device, local_rank)
    dtype, peak = choose_dtype(settings.dtype, device), peak_flops(device)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if world_size > 1:  # a rank that waits this long for the others takes them for dead, and ends the job
        timeout = datetime.timedelta(seconds=settings.timeout)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)

    def say(text):
        if rank == 0:
            print(text, flush=True)

    def progress(items, doing):
        """The items, with a bar where they take more than a second and somebody watches a terminal."""
        return tqdm(items, doing, leave=False, delay=1, disable=None if rank == 0 else True)

    # Data. A step takes `sequences` windows; each rank goes through its share of them in micro-batches.
    sequences = settings.batch_tokens // settings.seq_len
    share = sequences // world_size
    accumulation = share // settings.micro_batch
    bins, shards = open_bins(settings.data_dir, settings.verify_data)
    train_windows = Windows(bins["train"], settings.seq_len, settings.seed)
    val_windows = validation_windows(bins["val"], settings.seq_len, settings.eval_tokens)
    for split, windows in (("train", train_windows.bins), ("val", val_windows)):
        if not windows:
            sys.exit(f"{settings.data_dir}: no {split} bin has more than seq_len = {settings.seq_len} tokens; lower "
                     "--seq_len, or prepare more text or a larger --val_fraction.")  # fmt: skip
    val = [shard["val"] for shard in shards.values()]
    bytes_per_token = sum(split["bytes"] for split in val) / sum(split["tokens"] for split in val)
    guessing = {name: sum(split[name] * split["tokens"] for split in val) / sum(split["tokens"] for split in val)
                for name in ("unigram_loss", "bigram_loss") if all(name in split for split in val)}  # fmt: skip
    data_vocab = max(shard["vocab_size"] for shard in shards.values())
    tokenizer_file = os.path.join(settings.data_dir, "tokenizer.json")
    if not os.path.exists(tokenizer_file):
        sys.exit(f"{tokenizer_file} is missing, which prepare.py writes beside the bins.")
    tokenizer = Tokenizer.from_file(tokenizer_file)
    end_of_text = tokenizer.token_to_id("<|endoftext|>")

    # Model: of the run's newest checkpoint, of another checkpoint, or new.
    out_dir = Path(settings.out_dir)
    metrics_file = out_dir / "metrics.jsonl"
    checkpoint = newest_checkpoint(out_dir) if out_dir.is_dir() else None
    if (checkpoint or metrics_file.exists()) and not settings.resume:
        sys.exit(f"{out_dir} already holds a run: go on with --resume=True, or take another --out_dir.")
    step, state = 0, None
    torch.manual_seed(settings.seed)
    try:
        if checkpoint:
            state = load_state(checkpoint)
            check_resumed(checkpoint, state, settings, shards)
            step = state["step"]
        if checkpoint or settings.init_from != "scratch":
            folder = checkpoint or find_checkpoint(settings.init_from)
            model = SmolLM2.from_pretrained(folder)
            check_tokenizer(folder, tokenizer)
        else:
            config = dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or data_vocab)
            model = SmolLM2(dataclasses.replace(config, bos_token_id=end_of_text, eos_token_id=end_of_text))
    except ValueError as error:
        sys.exit(str(error))
    config = model.config
    if config.vocab_size < data_vocab or config.max_position_embeddings < settings.seq_len:
        sys.exit(f"the model has {config.vocab_size} tokens and {config.max_position_embeddings} positions, too few "
                 f"for the {data_vocab} tokens of the data, or for seq_len = {settings.seq_len}.")  # fmt: skip
    model.to(device)
    if settings.compile and (reason := lacks_compiler(device)):
        say(f"training without torch.compile: {reason}")
    elif settings.compile:
        say("compiling: the first step waits for it")
        compile_parts(model)
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    replica = model
    if world_size > 1:  # averages gradients over the ranks while the backward pass still runs
        replica = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None)

    # Optimizer.
    optimizers = make_optimizers(model, settings, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # keeps float16 gradients away from 0
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty, unless the run was in float16
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        remove_old_checkpoints(out_dir, settings.keep_checkpoints)
        rewind_metrics(metrics_file, step if state else -1)
        track = open_tracker(settings, step)

    # What the loop calls now and then.
    def evaluate():
        """The mean loss over the validation windows, in nats a token, and in bits a byte, which does not depend on the
        tokenizer; beside them the marks that guessing by counts sets. The model runs as in training, but no backward
        pass follows: so what was compiled serves here too."""
        total = torch.zeros(2, device=device)  # nats, windows
        firsts = range(rank * settings.micro_batch, len(val_windows), world_size * settings.micro_batch)
        for first in progress(firsts, "evaluation"):
            windows = val_windows[first : first + settings.micro_batch]
            count, missing = len(windows), settings.micro_batch - len(windows)
            inputs, targets = to_device(windows + windows[:1] * missing, device, config.vocab_size)
            targets[count:] = -100  # what fills the last batch up to the compiled shape does not count
            with autocast:
                loss = model(inputs, targets).detach()
            total += torch.stack([loss * count, torch.full_like(loss, count)])
        if world_size > 1:
            dist.all_reduce(total)
        val_loss = (total[0] / total[1]).item()
        return {"val_loss": val_loss, "val_bpb": val_loss / math.log(2) / bytes_per_token} | guessing

    def sample():
        """What the model makes of the prompt, with the same random numbers each time: only the model changes."""
        prompt = torch.tensor([tokenizer.encode(settings.sample_prompt).ids or [config.bos_token_id]], device=device)
        generator = torch.Generator(device).manual_seed(settings.seed)
        room = config.max_position_embeddings - prompt.size(1)
        with autocast, torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            new = model.generate(prompt, min(64, room), eos_token_id=config.eos_token_id, generator=generator)
            return tokenizer.decode(prompt[0].tolist() + [token.item() for token in new])

    def log(loss=None, rate=None, grad_norm=None, **evaluation):
        """A line on the screen, and one in metrics.jsonl, where null is what was not measured or not finite."""
        speed = timed_steps * settings.batch_tokens / seconds if timed_steps else None
        mfu = speed * training_flops(config, settings.seq_len) / (peak * world_size) if speed and peak else None
        tokens, epoch = step * settings.batch_tokens, train_windows.per_epoch * settings.seq_len
        unique = min(tokens, epoch, (settings.repeat_steps or step) * settings.batch_tokens)
        metrics = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "tokens": tokens,
                   "epoch": tokens / epoch, "unique_tokens": unique, "tokens_per_second": speed,
                   "mfu": mfu} | evaluation  # fmt: skip
        parts = [f"step {step}/{settings.max_steps}"]
        parts += [f"loss {loss:.4f}", f"lr {rate:.2e}", f"grad_norm {grad_norm:.2f}"] if loss is not None else []
        parts += [f"{name} {value:.4f}" for name, value in evaluation.items()]
        parts += [f"{speed:,.0f} tokens/s"] if speed else []
        parts += [f"{mfu:.1%} MFU"] if mfu else []
        left = (settings.max_steps - step) * settings.batch_tokens / speed if speed else 0
        parts += [f"{datetime.timedelta(seconds=round(left))} left"] if left else []
        say(" | ".join(parts))
        if rank == 0:
            finite = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
            try:
                with open(metrics_file, "a") as file:
                    file.write(json.dumps(finite) + "\n")
                track({name: value for name, value in finite.items() if value is not None})
            except OSError as error:  # a full disk costs a line, not the run
                say(f"{metrics_file} could not be written: {error.strerror}")

    asked_to_stop = False

    def ask_to_stop(number, frame):
        """Ctrl-C, and a scheduler's SIGTERM, let the step end and be saved; the second one stops at once."""
        nonlocal asked_to_stop
        asked_to_stop = True
        say("stopping after this step, to save it; ask again to stop at once")
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    # The loop.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{parameters:,} parameters, {dtype} on {world_size} x {device.type}")
    say(f"{sequences} windows of {settings.seq_len} tokens a step, {train_windows.per_epoch:,} in an epoch")
    if checkpoint:
        say(f"resumed from {checkpoint}")
    if settings.warmup_steps + settings.decay_steps > settings.max_steps:
        say(f"{settings.warmup_steps} steps of warmup and {settings.decay_steps} of decay are more than "
            f"{settings.max_steps}: the learning rate does not reach its peak")  # fmt: skip
    first_step, bad_steps, timed_steps, seconds, stopping, saved = step, 0, 0, 0.0, False, True
    if step == 0:
        log(**evaluate())
    while step < settings.max_steps and not stopping:
        start = time.perf_counter()

        # Schedule.
        rate = learning_rate(step, settings)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate

        # Forward and backward, one micro-batch after the other: their gradients add up.
        loss = torch.zeros((), device=device)
        for micro in progress(range(accumulation), f"step {step + 1}"):
            batch = step % settings.repeat_steps if settings.repeat_steps else step
            first = batch * sequences + rank * share + micro * settings.micro_batch
            windows = [train_windows[i] for i in range(first, first + settings.micro_batch)]
            inputs, targets = to_device(windows, device, config.vocab_size)
            replica.require_backward_grad_sync = micro == accumulation - 1  # the ranks exchange gradients once a step
            with autocast:
                micro_loss = replica(inputs, targets) / accumulation
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # Clip. Then one look at the numbers, which the ranks share so that all decide alike.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        report = torch.stack([loss, grad_norm, torch.full_like(loss, asked_to_stop)]) / world_size
        if world_size > 1:
            dist.all_reduce(report)
        loss, grad_norm, stopping = report.tolist()

        # Step, unless loss or gradient is NaN or infinite, which would stay in the weights for ever.
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_steps = 0
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:
            bad_steps += 1
            say(f"step {step + 1} is skipped: its loss is {loss}, its grad_norm {grad_norm}")
            if bad_steps == settings.max_bad_steps:
                good = newest_checkpoint(out_dir) or "none yet"
                sys.exit(f"{bad_steps} steps in a row were NaN or infinite; the last good checkpoint is {good}: go on "
                         "from it with a lower --learning_rate, or with --dtype=float32.")  # fmt: skip
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step > first_step + 1:  # the first one waits for the compiler
            timed_steps, seconds = timed_steps + 1, seconds + time.perf_counter() - start

        # Log, evaluate, sample, save.
        finished = step == settings.max_steps
        evaluation = evaluate() if (finished or step % settings.eval_interval == 0) and not stopping else {}
        if evaluation or stopping or step % settings.log_interval == 0 or step == first_step + 1:
            log(loss, rate, grad_norm, **evaluation)
            timed_steps, seconds = 0, 0.0
        if rank == 0 and settings.sample_interval and step % settings.sample_interval == 0 and not stopping:
            say(f"\n{sample()}\n")
        due = step % settings.save_interval == 0 and not bad_steps  # what led to a bad step may be bad already
        if rank == 0 and (finished or stopping or due):
            state = {"step": step, "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                     "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
                     "settings": dataclasses.asdict(settings), "data": shards}  # fmt: skip
            card = model_card(model, settings, shards, step, {"loss": loss} | evaluation)
            saved = save_checkpoint(out_dir, step, model, tokenizer_file, card, state, settings.keep_checkpoints)

    if world_size > 1:
        dist.barrier()  # rank 0 may still be saving; and a rank that left in haste could trip over its own threads
        dist.destroy_process_group()
    if not saved:
        sys.exit(1)
    say(f"{newest_checkpoint(out_dir)} is the last checkpoint; python sample.py --model={out_dir} lets it write")


if __name__ == "__main__":
    settings = load_settings("train", Settings)
    try:
        main(settings)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        sys.exit(f"a rank died, or let the others wait for more than --timeout={settings.timeout} seconds: {error}")
