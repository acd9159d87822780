"""Train SmolLM2: one flat loop, from one CPU to many GPUs.

    python train.py config/smollm2.py                           one device, chosen by itself
    torchrun --nproc_per_node=8 train.py config/smollm2.py      eight: the same batches, the same losses, sooner
    python train.py config/smollm2.py --resume=True             go on after whatever happened

Reads what prepare.py wrote; writes out_dir/metrics.jsonl, and checkpoints out_dir/checkpoint-NNNNNN/ that sample.py and
every tool of the Hugging Face world can load.
"""

import dataclasses
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.nn.parallel import DistributedDataParallel

from config import load_settings
from model import SmolLM2, SmolLM2Config, newest_checkpoint, training_flops, write_json


@dataclass
class Settings:
    """Train SmolLM2 on the tokens of a data folder."""

    data_dir: str = "data/cosmopedia-v2"  # folder that prepare.py wrote
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # of the matrix products; auto: fastest that works
    )
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    compile: bool = True  # let torch.compile fuse the layers: a minute at the start, far faster afterwards
    seed: int = 0  # of the initial weights and the order of the data
    init_from: str = "scratch"  # or a checkpoint folder or hub id, whose weights and architecture to start from
    resume: bool = False  # go on from the newest checkpoint of out_dir, if there is one
    log_interval: int = 10  # steps between lines of the log
    eval_interval: int = 100  # steps between evaluations
    eval_tokens: int = 1_048_576  # tokens of the validation data to evaluate on, the same each time
    save_interval: int = 100  # steps between checkpoints
    keep_checkpoints: int = 2  # how many of the newest stay
    max_bad_steps: int = 10  # stop after so many steps in a row whose loss or gradient is no number
    sample_interval: int = 100  # steps between samples of text
    sample_prompt: str = "Once upon a time"  # what the samples continue
    model: SmolLM2Config = field(default_factory=lambda: SmolLM2Config(vocab_size=0))  # vocab_size 0: as the data has


# ---- Data -----------------------------------------------------------------------------------------------------------


class Windows:
    """The tokens of some bins as one sequence of training windows of seq_len + 1 tokens, none across two bins.

    An epoch visits each window once, in an order drawn from (seed, epoch), and shifts the windows by a random offset, so
    that texts are not cut at the same places each time. Window i of the endless sequence of epochs is a pure function of
    (seed, i): whoever asks, on however many devices, after however many restarts, gets the same tokens.
    """

    def __init__(self, bins, seq_len, seed):
        self.bins = [bin for bin in bins if len(bin) > seq_len]
        self.counts = [max(1, len(bin) // seq_len - 1) for bin in self.bins]  # the rest leaves room for the offset
        self.total, self.seq_len, self.seed, self.epoch = sum(self.counts), seq_len, seed, None

    def __getitem__(self, i):  # -> (seq_len + 1,) int64
        epoch, i = divmod(i, self.total)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(self.total)
            self.offsets = [
                int(rng.integers(min(self.seq_len, len(bin) - count * self.seq_len)))
                for bin, count in zip(self.bins, self.counts, strict=True)
            ]
        i = int(self.order[i])
        for bin, count, offset in zip(self.bins, self.counts, self.offsets, strict=True):
            if i < count:
                start = offset + i * self.seq_len
                return bin[start : start + self.seq_len + 1].astype(np.int64)
            i -= count


def open_data(data_dir):
    """The bins of a data folder by split and what its shards say of themselves; exits if they do not fit together."""
    folder = Path(data_dir)
    shards = {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("shard-*.json"))}
    if not shards:
        sys.exit(f"{data_dir} holds no shard-NNNNN.json: run prepare.py with --data_dir={data_dir} first.")
    if len({shard["tokenizer_sha256"] for shard in shards.values()}) > 1:
        sys.exit(f"{data_dir}: its shards were made with different tokenizers; prepare them into different folders.")
    bins = {"train": [], "val": []}
    for name, shard in shards.items():
        for split in bins:
            path = folder / name.replace("shard", split).replace(".json", ".bin")
            size = path.stat().st_size if path.exists() else 0
            if size != 2 * shard[split]["tokens"]:
                sys.exit(
                    f"{path} has {size} bytes, but {name} says {shard[split]['tokens']} tokens of 2 bytes: the file "
                    f"is damaged; remove {name} and prepare it again."
                )
            if size:
                bins[split].append(np.memmap(path, "<u2", "r"))
    return bins, list(shards.values())


def validation_windows(bins, seq_len, tokens):
    """About so many validation tokens as windows (N, seq_len + 1) int64, evenly spread over the bins."""
    starts = [(bin, start) for bin in bins for start in range(0, len(bin) - seq_len, seq_len)]
    picked = np.linspace(0, len(starts) - 1, min(len(starts), max(1, tokens // seq_len))).astype(int)
    return [starts[i][0][starts[i][1] : starts[i][1] + seq_len + 1].astype(np.int64) for i in picked]


def to_device(windows, device, vocab_size):
    """Windows of seq_len + 1 tokens as inputs and targets (b, seq_len): the target is the token that comes next."""
    tokens = np.stack(windows)
    if tokens.max() >= vocab_size:
        sys.exit(
            f"the data has a token {tokens.max()}, but the model's vocabulary ends at {vocab_size - 1}: a bin is damaged."
        )
    tokens = torch.from_numpy(tokens)
    if device.type == "cuda":  # from pinned memory the copy goes on while the device computes
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ---- Devices --------------------------------------------------------------------------------------------------------

# Dense 16-bit matrix products, in operations a second, from the makers' data sheets: what MFU is a fraction of.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12,
    "L4": 121e12, "V100": 125e12, "T4": 65e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def choose_device(name, local_rank=0):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device={name} cannot be used here: {str(error).splitlines()[0]}")
    return device


def choose_dtype(name, device):
    """bfloat16 where the hardware multiplies it, float16 on older GPUs, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


# ---- Optimizer ------------------------------------------------------------------------------------------------------


def make_optimizers(model, settings):
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the rest.

    AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) scales each number of the gradient by its own recent size. Weight
    decay pulls matrices towards 0; a norm's weight belongs near 1.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) sees a matrix as a matrix: of the momentum U S V^T it
    keeps U V^T, by a few products in place of a singular value decomposition, so that every direction is learned at one
    speed and not only those in which the gradient is large. Scaled by 0.2 sqrt(max(rows, columns)), its steps are as long
    as AdamW's, and both share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
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
        options = dict(lr=settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(torch.optim.Muon(layers, **options))
    return optimizers


def learning_rate(step, settings):
    """The rate of update number step, from 0: up, level, down ("warmup-stable-decay", Hu et al. 2024, arXiv 2404.06395).

    The level part has no end built in: a run can be prolonged, and decayed from any of its checkpoints.
    """
    warmup = (step + 1) / max(1, settings.warmup_steps)
    decay = (settings.max_steps - step) / max(1, settings.decay_steps)
    return settings.learning_rate * min(1.0, warmup, decay)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder, model, state, tokenizer_file):
    """Write a checkpoint beside its final name, and rename it when it is whole and on the disk: under that name there is
    never a broken one. If that fails, the run goes on with the checkpoint before. Returns whether it failed."""
    temporary = Path(f"{folder}.tmp")
    try:
        write_checkpoint(temporary, model, state, tokenizer_file)
        os.rename(temporary, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # of the disk; the last two from the libraries' writers
        print(f"{folder} could not be saved: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return True
    return False


def write_checkpoint(temporary, model, state, tokenizer_file):
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    length = {"model_max_length": model.config.max_position_embeddings}
    write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special | length)
    torch.save(state, temporary / "trainer_state.pt")
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def remove_old_checkpoints(out_dir, keep):
    """Remove all but the newest checkpoints, and what interrupted saves and removals left."""
    names = sorted(path.name for path in out_dir.glob("checkpoint-*") if path.suffix != ".tmp")
    for name in names[:-keep]:
        os.rename(out_dir / name, out_dir / f"{name}.tmp")  # at once no checkpoint any more, however long removal takes
    for leftover in out_dir.glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def rewind_metrics(path, step):
    """Drop the lines of metrics.jsonl that come after a step: they will be written again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    Path(f"{path}.tmp").write_text("".join(kept))
    os.replace(f"{path}.tmp", path)


def load_state(checkpoint, settings, data):
    """The trainer's state of a checkpoint. What decides the order of the data, or the meaning of the state, must be as it
    was; everything else (steps, rates, intervals, the number of devices) may be another now."""
    path = os.path.join(checkpoint, "trainer_state.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
    except Exception as error:  # whatever a damaged file sets off inside of the library
        sys.exit(f"{path} cannot be read ({type(error).__name__}); to go on from the checkpoint before it, remove "
                 f"{checkpoint}.")  # fmt: skip
    for name in ("seed", "seq_len", "batch_tokens", "optimizer", "model"):
        then, now = state["settings"][name], dataclasses.asdict(settings)[name]
        if then != now:
            sys.exit(f"{checkpoint} was trained with {name} = {then}, and now it is {now}: a run is resumed with the same "
                     "one; for another, start with --init_from.")  # fmt: skip
    if state["data"] != data:
        sys.exit(f"{checkpoint} was trained on other data than {settings.data_dir} holds now: a run is resumed on the same; "
                 "for another, start with --init_from.")  # fmt: skip
    return state


# ---- The run --------------------------------------------------------------------------------------------------------


def main(settings):
    # Devices. torchrun starts this file once for each device and tells each process its rank; alone, it is rank 0 of 1.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *args, **options: None
    device = choose_device(settings.device, local_rank)
    dtype = choose_dtype(settings.dtype, device)
    peak_flops = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    if world_size > 1:  # whoever waits longer than this for the others takes them for dead and ends the job
        timeout = datetime.timedelta(minutes=10)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)

    # Data. A step takes `sequences` windows; each rank has its share of them, and goes through it in micro-batches.
    sequences = check_settings(settings, world_size)
    share = sequences // world_size
    accumulation = share // settings.micro_batch
    bins, shards = open_data(settings.data_dir)
    train_windows = Windows(bins["train"], settings.seq_len, settings.seed)
    val_windows = validation_windows(bins["val"], settings.seq_len, settings.eval_tokens)
    for split, windows in (("train", train_windows.bins), ("val", val_windows)):
        if not windows:
            sys.exit(f"{settings.data_dir}: no {split} bin has more than seq_len = {settings.seq_len} tokens; lower "
                     "--seq_len, or prepare more text or a larger --val_fraction.")  # fmt: skip
    bytes_per_token = sum(s["val"]["bytes"] for s in shards) / sum(s["val"]["tokens"] for s in shards)
    data_vocab = max(shard["vocab_size"] for shard in shards)
    tokenizer_file = os.path.join(settings.data_dir, "tokenizer.json")
    tokenizer = Tokenizer.from_file(tokenizer_file)

    # Model: of the run's newest checkpoint, of another checkpoint, or new.
    out_dir = Path(settings.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    metrics_file, checkpoint, state = out_dir / "metrics.jsonl", newest_checkpoint(out_dir), None
    if not settings.resume and (checkpoint or metrics_file.exists()):
        sys.exit(f"{out_dir} already holds a run: go on with --resume=True, or take another --out_dir.")
    torch.manual_seed(settings.seed)
    try:
        if checkpoint:
            state = load_state(checkpoint, settings, shards)
            model = SmolLM2.from_pretrained(checkpoint)
        elif settings.init_from != "scratch":
            model = SmolLM2.from_pretrained(settings.init_from)
        else:
            model = SmolLM2(dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or data_vocab))
    except ValueError as error:
        sys.exit(str(error))
    config = model.config
    if config.vocab_size < data_vocab or config.max_position_embeddings < settings.seq_len:
        sys.exit(f"the model has {config.vocab_size} tokens and {config.max_position_embeddings} positions, too few for "
                 f"the {data_vocab} tokens of the data or for seq_len = {settings.seq_len}.")  # fmt: skip
    model.to(device)
    if settings.compile:
        for layer in model.model.layers:  # compiled once, for all layers are the same function of their weights
            layer.compile(dynamic=False)
        model.loss = torch.compile(model.loss, dynamic=False)
    replica = model
    if world_size > 1:  # averages the gradients over the ranks while the backward pass still runs
        replica = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None)

    # Optimizer.
    optimizers = make_optimizers(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # keeps float16 gradients away from 0
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step = 0
    if state:
        step = state["step"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
    if rank == 0:
        remove_old_checkpoints(out_dir, settings.keep_checkpoints)
        rewind_metrics(metrics_file, step)

    def evaluate():
        """Loss over the validation windows: in nats a token, and in bits a byte, which can be compared between tokenizers.

        The model runs as in training, and no backward pass follows: so the compiled functions serve here as well.
        """
        total = torch.zeros(2, device=device)  # nats, windows
        for first in range(rank * settings.micro_batch, len(val_windows), world_size * settings.micro_batch):
            windows = val_windows[first : first + settings.micro_batch]
            count, filler = len(windows), settings.micro_batch - len(windows)
            inputs, targets = to_device(
                windows + windows[:1] * filler, device, config.vocab_size
            )  # always of the same shape
            targets[count:] = -100  # the filler does not count
            with autocast:
                loss = model(inputs, targets).detach()
            total += torch.stack([loss * count, torch.full_like(loss, count)])
        if world_size > 1:
            dist.all_reduce(total)
        val_loss = (total[0] / total[1]).item()
        return dict(val_loss=val_loss, val_bpb=val_loss / math.log(2) / bytes_per_token)

    def sample():
        """The prompt and what the model makes of it, always with the same random numbers: only the model changes."""
        prompt = torch.tensor([tokenizer.encode(settings.sample_prompt).ids or [config.bos_token_id]], device=device)
        generator = torch.Generator(device).manual_seed(settings.seed)
        length = min(64, config.max_position_embeddings - prompt.size(1))
        with autocast, torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            new = model.generate(prompt, length, eos_token_id=config.eos_token_id, generator=generator)
            return tokenizer.decode(prompt[0].tolist() + [token.item() for token in new])

    def log(evaluation, loss=None, rate=None, grad_norm=None):
        """One line on the screen, and one object in metrics.jsonl: null is what was not measured or is no number."""
        speed = timed * settings.batch_tokens / seconds if timed else None
        mfu = (
            speed * training_flops(config, settings.seq_len) / peak_flops / world_size if speed and peak_flops else None
        )
        tokens, epoch_tokens = step * settings.batch_tokens, train_windows.total * settings.seq_len
        metrics = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "tokens": tokens,
                   "epoch": tokens / epoch_tokens, "unique_tokens": min(tokens, epoch_tokens),
                   "tokens_per_second": speed, "mfu": mfu} | evaluation  # fmt: skip
        line = f"step {step}/{settings.max_steps}"
        line += f" | loss {loss:.4f} | lr {rate:.2e} | grad_norm {grad_norm:.2f}" if loss is not None else ""
        line += f" | {speed:,.0f} tokens/s" if speed else ""
        line += f" | {mfu:.1%} MFU" if mfu else ""
        line += "".join(f" | {name} {value:.4f}" for name, value in evaluation.items())
        if timed:
            line += f" | {datetime.timedelta(seconds=round((settings.max_steps - step) * seconds / timed))} left"
        say(line, flush=True)
        if rank == 0:
            finite = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
            with open(metrics_file, "a") as file:
                file.write(json.dumps(finite) + "\n")

    # Ctrl-C, and SIGTERM of a scheduler, ask to stop after the step that is being computed. The second one stops at once.
    asked_to_stop = False

    def ask_to_stop(number, frame):
        nonlocal asked_to_stop
        asked_to_stop = True
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    # The loop.
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{count:,} parameters, {dtype} on {world_size} x {device.type}, {'from ' + checkpoint if state else 'step 0'}; "
        f"{sequences} windows of {settings.seq_len} tokens a step, {train_windows.total:,} in an epoch", flush=True)  # fmt: skip
    bad_steps, timed, seconds, first_step, stopping, save_failed = 0, 0, 0.0, step, False, None
    if step == 0:
        log(evaluate())
    while step < settings.max_steps and not stopping:
        start = time.perf_counter()

        # Schedule.
        rate = learning_rate(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

        # Forward and backward, a micro-batch at a time: gradients add up until the step is taken.
        loss = torch.zeros((), device=device)
        for micro in range(accumulation):
            first = step * sequences + rank * share + micro * settings.micro_batch
            windows = [train_windows[i] for i in range(first, first + settings.micro_batch)]
            inputs, targets = to_device(windows, device, config.vocab_size)
            replica.require_backward_grad_sync = micro == accumulation - 1  # the ranks exchange gradients once a step
            with autocast:
                micro_loss = replica(inputs, targets) / accumulation
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # Step. One look at the device: the ranks share loss and wish to stop, and all decide alike.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        report = torch.stack([loss, grad_norm, torch.full_like(loss, asked_to_stop)]) / world_size
        if world_size > 1:
            dist.all_reduce(report)
        loss, grad_norm, stopping = report.tolist()
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_steps = 0
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:  # a NaN would stay in the weights for ever: better to lose a step
            bad_steps += 1
            say(f"step {step + 1} skipped: loss {loss}, grad_norm {grad_norm}", flush=True)
            if bad_steps == settings.max_bad_steps:
                sys.exit(f"{bad_steps} steps in a row gave no numbers; the newest good checkpoint is "
                         f"{newest_checkpoint(out_dir)}. Lower --learning_rate, or try --dtype=float32.")  # fmt: skip
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step > first_step + 1:  # the first one waits for the compiler
            timed, seconds = timed + 1, seconds + time.perf_counter() - start

        # Log, evaluate, sample, save.
        finished = step == settings.max_steps
        evaluation = evaluate() if (finished or step % settings.eval_interval == 0) and not stopping else {}
        if evaluation or finished or stopping or step % settings.log_interval == 0 or step == first_step + 1:
            log(evaluation, loss, rate, grad_norm)
            timed, seconds = 0, 0.0
        if rank == 0 and settings.sample_interval and step % settings.sample_interval == 0 and not stopping:
            say(f"\n{sample()}\n", flush=True)
        if rank == 0 and (finished or stopping or step % settings.save_interval == 0):
            state = {
                "step": step,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "settings": dataclasses.asdict(settings),
                "data": shards,
            }
            save_failed = save_checkpoint(out_dir / f"checkpoint-{step:06d}", model, state, tokenizer_file)
            remove_old_checkpoints(out_dir, settings.keep_checkpoints)

    if world_size > 1:
        dist.destroy_process_group()
    if save_failed:
        sys.exit(1)
    say(f"{newest_checkpoint(out_dir)} is the last checkpoint; python sample.py --model={out_dir} lets it write")


def check_settings(settings, world_size):
    """The number of windows in a step; exits if the settings do not fit together."""
    for name in ("seq_len", "micro_batch", "batch_tokens", "max_steps", "eval_tokens", "keep_checkpoints"):
        if getattr(settings, name) < 1:
            sys.exit(f"--{name}={getattr(settings, name)} must be at least 1.")
    unit = settings.seq_len * settings.micro_batch * world_size
    if settings.batch_tokens % unit:
        fit = max(1, round(settings.batch_tokens / unit)) * unit
        sys.exit(f"--batch_tokens={settings.batch_tokens} must be a multiple of seq_len x micro_batch x devices = "
                 f"{settings.seq_len} x {settings.micro_batch} x {world_size} = {unit}, as {fit} is.")  # fmt: skip
    return settings.batch_tokens // settings.seq_len


if __name__ == "__main__":
    main(load_settings("train", Settings))
