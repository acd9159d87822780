"""Train SmolLM2: one flat loop, from one CPU to many GPUs.

    python train.py config/smollm2.py                           one device, the best there is
    torchrun --nproc_per_node=8 train.py config/smollm2.py      eight: the same batches and losses, sooner
    python train.py config/smollm2.py --resume=True             continue after whatever happened

Reads the bins that prepare.py wrote. Writes out_dir/metrics.jsonl and the checkpoints out_dir/checkpoint-NNNNNN/, which
sample.py and the tools of the Hugging Face world load.
"""

import dataclasses
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from plumbing.bins import identity, open_corpus
from plumbing.checkpoint import Saver, restore, resume
from plumbing.devices import lacks_compiler, set_up_device, to_device, training_dtype
from plumbing.memory import choose_micro_batch
from plumbing.metrics import Log
from plumbing.pretrained import find_model, newest_checkpoint
from plumbing.ranks import Ranks, StopSignal, reports_lost_ranks
from plumbing.settings import Count, Natural, NotNegative, Positive, flatten, run

import torch
from torch.nn.parallel import DistributedDataParallel

from model import SmolLM2, SmolLM2Config, training_flops

# A run from scratch follows the pretraining of SmolLM2-135M. 8192 positions and a larger rope_theta came later.
FROM_SCRATCH = SmolLM2Config(vocab_size=0, max_position_embeddings=2048, rope_theta=10_000.0)


@dataclass
class Settings:
    """Train SmolLM2 on the tokens of a data folder."""

    data_dir: str = "data/cosmopedia-v2"  # folder that prepare.py wrote
    verify_data: bool = False  # read all of it first, and compare it with the sha256 that prepare.py noted
    out_dir: str = "out/smollm2"  # folder for metrics and checkpoints
    seq_len: Count = 2048  # tokens of a training window
    micro_batch: Count | None = None  # windows on one device at once; unset: as many as its memory holds
    batch_tokens: Count = 1_048_576  # tokens of one optimizer step, over all devices and micro-batches
    max_steps: Count = 1000  # optimizer steps
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, AdamW for the rest
    learning_rate: Positive = 3e-3  # at its peak
    warmup_steps: Natural = 100  # steps of the linear rise from 0 to the peak
    decay_steps: Natural = 200  # steps of the linear fall to 0 at the end
    weight_decay: NotNegative = 0.01  # of matrices; the weights of norms do not decay
    grad_clip: Positive = 1.0  # longest gradient, as a norm over all parameters
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest here
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    compile: bool = True  # torch.compile the layers: a minute at the start, much faster steps
    recompute_activations: bool = False  # keep only the inputs of layers for the backward pass: less memory, slower
    seed: Natural = 0  # of the initial weights and the order of the data
    init_from: str = "scratch"  # scratch, or a checkpoint folder or hub id: weights and architecture to begin with
    resume: bool = False  # continue from the newest checkpoint of out_dir, if there is one
    log_interval: Count = 10  # steps between lines on the screen; metrics.jsonl has every step
    log_to: Literal["none", "tensorboard", "wandb"] = "none"  # where else to write it; each needs pip install
    eval_interval: Count = 100  # steps between evaluations
    eval_tokens: Count = 1_048_576  # tokens of the validation data to evaluate on, the same each time
    save_interval: Count = 100  # steps between checkpoints
    keep_checkpoints: Count = 2  # how many of the newest stay
    repeat_steps: Count | None = None  # train on the batches of the first N steps only, again and again
    max_bad_steps: Count = 10  # stop after this many steps in a row whose loss or gradient is NaN or infinite
    timeout: Count = 600  # seconds that ranks wait for each other before they give up
    sample_interval: Natural = 100  # steps between samples of text; 0: none
    sample_prompt: str = "Once upon a time"  # what the samples continue
    model: SmolLM2Config = field(default_factory=lambda: FROM_SCRATCH)  # architecture; vocab_size 0: that of the data


# ---- Optimizer ------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """MomentUm Orthogonalized by Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    AdamW treats a matrix as a list of numbers. Muon treats it as a linear map: of the momentum's singular value
    decomposition U S V^T it keeps U V^T, so the weights move equally far in every direction, not only in the few in
    which the gradient is large. Scaled by 0.2 sqrt(max(rows, columns)), the update has the root mean square of AdamW's,
    and both can share one learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    For matrices only. The products are computed in dtype, whatever the dtype of the weights.
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

    Weight decay pulls matrices towards 0; the weights of norms belong near 1. Muon computes in the dtype of training,
    but in float32 where that is float16, which would need a scaler of its own.
    """
    muon = settings.optimizer == "muon"
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    for_muon = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2] if muon else []
    for_adamw = [matrix for matrix in matrices if all(matrix is not other for other in for_muon)]
    groups = [{"params": for_adamw, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if muon:
        dtype = torch.float32 if dtype == torch.float16 else dtype
        optimizers.append(Muon(for_muon, settings.learning_rate, settings.weight_decay, dtype=dtype))
    return optimizers


def learning_rate(step, settings):
    """The rate of the next update after step updates: up, level, down (Hu et al. 2024, arXiv 2404.06395, section 4).

    The level part has no end built in: a run that has not begun to decay can be resumed with a larger max_steps.
    """
    warmup = (step + 1) / max(1, settings.warmup_steps)
    decay = (settings.max_steps - step) / max(1, settings.decay_steps)
    return settings.learning_rate * min(1.0, warmup, decay)


# ---- Building, evaluating, sampling ---------------------------------------------------------------------------------


def make_model(settings, corpus, checkpoint):
    """The model of a checkpoint, of --init_from, or a new one; exits with one sentence if it does not suit the data."""
    try:
        if checkpoint or settings.init_from != "scratch":
            folder = checkpoint or find_model(settings.init_from)
            model = SmolLM2.from_pretrained(folder)
            corpus.check_tokenizer(folder)
        else:
            tokens = dict(bos_token_id=corpus.end_of_text, eos_token_id=corpus.end_of_text)
            vocab_size = settings.model.vocab_size or corpus.vocab_size
            model = SmolLM2(dataclasses.replace(settings.model, vocab_size=vocab_size, **tokens))
    except ValueError as error:
        sys.exit(str(error))
    for name, value in vars(settings.model).items():  # with --init_from, the architecture is that of the checkpoint
        if settings.init_from != "scratch" and value not in (getattr(FROM_SCRATCH, name), getattr(model.config, name)):
            has = getattr(model.config, name)
            sys.exit(
                f"--model.{name}={value} cannot change the model of --init_from={settings.init_from}, it is {has}."
            )
    if model.config.vocab_size < corpus.vocab_size or model.config.max_position_embeddings < settings.seq_len:
        sys.exit(
            f"the model has {model.config.vocab_size} tokens and {model.config.max_position_embeddings} positions, too "
            f"few for the {corpus.vocab_size} tokens of the data, or for seq_len = {settings.seq_len}."
        )
    return model


def compile_parts(model):
    """torch.compile the loss, and each layer. All layers share one piece of code, as only their weights differ."""
    # A new run compiles in its evaluation of step 0, outside DDP; a resumed one inside, where optimize_ddp would cut
    # the code at the ends of gradient buckets and so round differently. Without it, both run the same code.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)


def evaluate(model, corpus, settings, ranks, device, autocast):
    """The mean loss over the validation windows, in nats per token, and in bits per byte, which do not depend on the
    tokenizer; and the baselines. It runs without torch.no_grad(), with which the layers would be compiled once more."""
    total = torch.zeros(2, device=device)  # nats, tokens
    micro_batch = settings.micro_batch
    starts = range(ranks.rank * micro_batch, len(corpus.val), ranks.size * micro_batch)
    for first in ranks.progress(starts, "evaluation"):
        windows = corpus.val[first : first + micro_batch]
        count = len(windows)
        filled = torch.cat((windows, windows[:1].expand(micro_batch - count, -1)))  # the shape that was compiled
        inputs, targets = filled[:, :-1], filled[:, 1:].clone()
        targets[count:] = -100  # the filling does not count
        with autocast:
            loss = model(to_device(inputs, device), to_device(targets, device)).detach()
        tokens = torch.full_like(loss, count * settings.seq_len)
        total += torch.stack([loss * tokens, tokens])
    nats, tokens = ranks.sum(total).tolist()
    val_bpb = nats / math.log(2) / corpus.val_bytes  # of the text of these windows
    return {"val_loss": nats / tokens, "val_bpb": val_bpb} | corpus.baselines


def sample(model, tokenizer, prompt, settings, device, autocast):
    """A continuation of the prompt, a list of ids, with the same random numbers each time, so that only the model
    changes."""
    config = model.config
    room = config.max_position_embeddings - len(prompt)
    generator = torch.Generator(device).manual_seed(settings.seed)
    with autocast, torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        new = model.generate([prompt], min(64, room), eos_token_id=config.eos_token_id, generator=generator)
        return tokenizer.decode(prompt + [token.item() for token in new])


# ---- The run --------------------------------------------------------------------------------------------------------


@reports_lost_ranks
def main(settings):
    # Ranks. torchrun starts this file once for each device; alone, it is rank 0 of 1.
    ranks = Ranks(settings.timeout)
    windows_per_step = settings.batch_tokens // settings.seq_len
    share = windows_per_step // ranks.size  # windows of a step on this rank

    with ranks.together():  # a sys.exit in here, on any of them, ends all; its sentence is printed once
        unit = settings.seq_len * (settings.micro_batch or 1) * ranks.size
        if settings.batch_tokens % unit:
            sys.exit(
                f"--batch_tokens={settings.batch_tokens} must be a multiple of seq_len x micro_batch x devices, "
                f"{settings.seq_len} x {settings.micro_batch or 1} x {ranks.size}: "
                f"{max(1, round(settings.batch_tokens / unit)) * unit} is one."
            )
        device = set_up_device(settings.device, ranks.local_rank)
        dtype = training_dtype(settings.dtype, device)

        # Data, and the checkpoint to continue from: (None, None) for a new run.
        checkpoint, state = resume(settings, device, ranks)
        step = state["step"] if state else 0
        of_data = settings.data_dir, settings.seq_len, settings.seed, settings.eval_tokens, settings.verify_data
        corpus = open_corpus(*of_data, state["data"] if state else None)

        # Model: from the run's newest checkpoint, from another checkpoint, or new.
        torch.manual_seed(settings.seed)
        model = make_model(settings, corpus, checkpoint)
        prompt = corpus.tokenizer.encode(settings.sample_prompt).ids or [model.config.bos_token_id]
        if settings.sample_interval and len(prompt) >= model.config.max_position_embeddings:
            sys.exit(
                f"--sample_prompt has {len(prompt)} tokens, and leaves none of the model's positions for a sample."
            )
    shared = {name: value for name, value in flatten(vars(settings)) if not name.endswith("_dir")}
    ranks.agree({"step": step} | identity(corpus.shards) | shared)  # exits where they differ
    flops = training_flops(model.config, settings.seq_len)
    with ranks.together():  # all have looked at out_dir; now the first may write there
        log = Log(settings, ranks, corpus.train, device, flops, step if state else None)

    # Move the model to its device, compile it, and wrap it where there are several ranks.
    model.to(device)
    model.recompute = settings.recompute_activations
    reason = lacks_compiler(device)
    if settings.compile and reason:
        ranks.say(f"training without torch.compile: {reason}")
    elif settings.compile:
        ranks.say("compiling: the first evaluation or step waits for it")
        compile_parts(model)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if not settings.micro_batch:
        compiled = settings.compile and not reason
        settings.micro_batch = choose_micro_batch(model, share, settings.seq_len, dtype, autocast, compiled, ranks)
    accumulation = share // settings.micro_batch  # micro-batches of a step on this rank
    replica = model
    if ranks.size > 1:  # averages gradients over the ranks while the backward pass still runs, in its own buffers
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # Optimizer.
    optimizers = make_optimizers(model, settings, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # keeps float16 gradients away from 0
    # A new run evaluates step 0. restore loads optimizers and scaler, and returns whether an evaluation was due where
    # the run was stopped, and is still to be made.
    evaluation_due = restore(state, optimizers, scaler) if state else True

    parameters = sum(parameter.numel() for parameter in model.parameters())
    ranks.say(f"{parameters:,} parameters, {dtype} on {ranks.size} x {device.type}")
    ranks.say(f"{windows_per_step} windows of {settings.seq_len} tokens a step, {corpus.train.per_epoch:,} in an epoch")
    if checkpoint:
        ranks.say(f"resumed from {checkpoint}; new shards, which are left out: {', '.join(corpus.left_out) or 'none'}")
    if settings.warmup_steps + settings.decay_steps > settings.max_steps:
        ranks.say("warmup_steps and decay_steps are more than max_steps: the learning rate does not reach its peak")

    # The loop.
    stop = StopSignal(ranks.rank)
    save = Saver(settings, corpus, model, optimizers, scaler)  # copies, and writes the copy in a thread
    first_step, bad_steps, stopping = step, 0, False
    if evaluation_due:
        log(step, **evaluate(model, corpus, settings, ranks, device, autocast))
    while step < settings.max_steps and not stopping:
        start = time.perf_counter()

        # Schedule.
        rate = learning_rate(step, settings)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate

        # Forward and backward, one micro-batch after the other: their gradients add up.
        loss = torch.zeros((), device=device)
        for micro in ranks.progress(range(accumulation), f"step {step + 1}"):
            batch = step % settings.repeat_steps if settings.repeat_steps else step
            first = batch * windows_per_step + ranks.rank * share + micro * settings.micro_batch
            windows = to_device(corpus.train.batch(first, settings.micro_batch), device)  # (b, T + 1)
            # (b, T) each: a token's target is the one after it. Contiguous as in an evaluation, to be compiled once.
            inputs, targets = windows[:, :-1], windows[:, 1:].contiguous()
            replica.require_backward_grad_sync = micro == accumulation - 1  # the ranks exchange gradients once a step
            with autocast:
                micro_loss = replica(inputs, targets) / accumulation
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        # Clip. Then one transfer from the device: means over the ranks, so that all decide alike.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        numbers = torch.stack([loss, grad_norm, torch.full_like(loss, stop.asked)])
        loss, grad_norm, stopping = (ranks.sum(numbers) / ranks.size).tolist()

        # Step, unless loss or gradient is NaN or infinite, which would stay in the weights for ever.
        if math.isfinite(loss) and math.isfinite(grad_norm):
            bad_steps = 0
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:
            bad_steps += 1
            ranks.say(f"step {step + 1} is skipped: its loss is {loss}, its grad_norm {grad_norm}")
            if bad_steps == settings.max_bad_steps:
                save.finish()
                sys.exit(
                    f"{bad_steps} steps in a row were NaN or infinite; the last good checkpoint is "
                    f"{newest_checkpoint(settings.out_dir) or 'none yet'}: continue from it with a lower "
                    "--learning_rate, or with --dtype=float32."
                )
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=ranks.size == 1)  # with DDP they live in its buffers, which stay
        step += 1
        if step > first_step + 1:  # the first one may wait for the compiler
            log.timed(time.perf_counter() - start)

        # Evaluate, log, save, sample. A run that is asked to stop leaves the evaluation to its continuation.
        finished, evaluation = step == settings.max_steps, {}
        evaluation_due = finished or step % settings.eval_interval == 0
        if evaluation_due and (finished or not stopping):
            evaluation = evaluate(model, corpus, settings, ranks, device, autocast)
            evaluation_due = False
        log(step, loss, rate, grad_norm, **evaluation)
        metrics = {"loss": loss} | evaluation
        due = step % settings.save_interval == 0 and not bad_steps  # what led to a bad step may not be worth keeping
        if ranks.rank == 0 and due and not (finished or stopping):
            save(step, evaluation_due, metrics, patience=settings.timeout / 2)
        if ranks.rank == 0 and settings.sample_interval and step % settings.sample_interval == 0:
            ranks.say(f"\n{sample(model, corpus.tokenizer, prompt, settings, device, autocast)}\n")

    ranks.leave()  # the others need not wait for the last save, which is made in any case
    if ranks.rank == 0 and step > first_step:
        save(step, evaluation_due, metrics)
    if not save.finish():
        sys.exit(1)
    newest = newest_checkpoint(settings.out_dir)
    ranks.say(f"{newest} is the last checkpoint; continue a text with python sample.py --model={settings.out_dir}")


if __name__ == "__main__":
    run(main, "train", Settings, "stopped; --resume=True continues from the newest checkpoint")
