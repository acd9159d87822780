"""Train SmolLM2: one flat loop, from one CPU to many GPUs.

    python train.py config/smollm2.py                           one device, the best there is
    torchrun --nproc_per_node=8 train.py config/smollm2.py      eight: the same batches and losses, sooner
    python train.py config/smollm2.py --resume=True             continue after whatever happened

Reads the bins that prepare.py wrote. Writes out_dir/metrics.jsonl and the checkpoints out_dir/checkpoint-NNNNNN/, which
are Hugging Face model folders.
"""

import dataclasses
import gc
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from plumbing.checkpoint import Saver, micro_batch_before, must_agree, restore, resume
from plumbing.corpus import open_corpus
from plumbing.devices import can_compile, choose_micro_batch, set_up_device, share_of_step, to_device, training_dtype
from plumbing.metrics import BadSteps, Log, announce
from plumbing.muon import Muon
from plumbing.pretrained import check_config, find_model, newest_checkpoint
from plumbing.ranks import Ranks, StopSignal, ends_well
from plumbing.settings import Count, Natural, NotNegative, Positive, run

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from model import SmolLM2, SmolLM2Config, training_flops

# A run from scratch follows the pretraining of SmolLM2-135M; 8192 positions and a larger rope_theta came later. A
# vocab_size of 0 stands for that of the data.
FROM_SCRATCH = SmolLM2Config(vocab_size=0, max_position_embeddings=2048, rope_theta=10_000.0)


@dataclass
class Settings:
    """Train SmolLM2 on the tokens of a data folder."""

    data_dir: str = "data/cosmopedia-v2"  # folder that prepare.py wrote, or a mix: data/web:0.8,data/code:0.2
    verify_data: bool = False  # first read all of it, and compare it with the sha256 that prepare.py noted
    out_dir: str = "out/smollm2"  # folder for metrics and checkpoints
    seq_len: Count = 2048  # tokens of a training sequence
    micro_batch: Count | None = None  # sequences on one device at once; unset: as many as its memory holds
    batch_tokens: Count = 1_048_576  # tokens of one optimizer step, over all devices and micro-batches
    max_steps: Count = 1000  # optimizer steps
    # Minutes after which a run stops, as Ctrl-C would stop it; unset: no limit. The schedule counts steps, so the
    # learning rate may not have decayed yet: --resume=True continues to the end of max_steps.
    max_minutes: Positive | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the layers, AdamW for the rest
    learning_rate: Positive = 3e-3  # at its peak
    warmup_steps: Natural = 100  # steps of the linear rise from 0 to the peak
    decay_steps: Natural = 200  # steps of the linear fall to 0 at the end
    weight_decay: NotNegative = 0.01  # of matrices; the weights of norms do not decay
    grad_clip: Positive = 1.0  # clip the gradient to this norm
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest here
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is available
    compile: bool = True  # torch.compile the layers: a minute at the start, much faster steps
    recompute_activations: bool = False  # recompute layers in the backward pass: less memory, slower
    deterministic: bool = False  # on a GPU, the same bits from run to run where PyTorch can: slower
    flash_attention_3: bool = False  # FlashAttention 3, on a Hopper GPU with its package flash_attn_interface
    seed: Natural = 0  # of the initial weights and the order of the data
    init_from: str = "scratch"  # scratch, or a checkpoint folder or hub id: weights and architecture to begin with
    resume: bool = False  # continue from the newest checkpoint of out_dir, if there is one
    log_interval: Count = 10  # steps between lines on the screen; metrics.jsonl has every step
    log_to: Literal["none", "tensorboard", "wandb"] = "none"  # also send the metrics there; pip install either first
    eval_interval: Count = 100  # steps between evaluations
    eval_tokens: Count = 1_048_576  # tokens of the validation data to evaluate on, the same each time
    save_interval: Count = 100  # steps between checkpoints
    keep_checkpoints: Count = 2  # checkpoints to keep
    repeat_steps: Count | None = None  # train on the batches of the first N steps only, again and again
    max_bad_steps: Count = 10  # stop after this many steps in a row whose loss or gradient is NaN or infinite
    timeout: Count = 600  # seconds that the processes of a run wait for each other before they give up
    sample_interval: Natural = 100  # steps between samples of text; 0: none
    sample_prompt: str = "Once upon a time"  # what the samples continue, or answer
    # Of conversations: only the answers, or all. Unset: the answers, as these are what the model is to write.
    train_on: Literal["answers", "all"] | None = None
    model: SmolLM2Config = field(default_factory=lambda: FROM_SCRATCH)  # architecture; vocab_size 0: that of the data


# ---- Optimizer ------------------------------------------------------------------------------------------------------
#
# AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) keeps two moving averages for each parameter: m of its gradient,
# over the last 10 steps or so, and v of the gradient's square, over the last 20. It subtracts learning_rate x m /
# sqrt(v). Dividing by sqrt(v) gives every parameter steps of about the same size, however large its gradient is. m is
# smoother than a single gradient, and small where gradients keep changing sign. Separately, weight decay shrinks each
# matrix by the fraction learning_rate x weight_decay. (Added to the loss, as L2 regularization, it would be divided by
# sqrt(v) as well.) Norms do not decay: their weights belong near 1.
#
# Muon (plumbing/muon.py) replaces the averaged gradient of a matrix by the nearest orthogonal matrix, which a few
# matrix products find. So all directions are learned equally fast, not only the few in which the gradient is large.


def make_optimizers(model, settings, dtype):
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the rest."""
    parameters = list(model.parameters())
    muon = {p for p in model.model.layers.parameters() if p.dim() == 2} if settings.optimizer == "muon" else set()
    matrices = [p for p in parameters if p.dim() >= 2 and p not in muon]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if muon:
        dtype = torch.float32 if dtype == torch.float16 else dtype  # Muon's products would overflow in float16
        in_order = [p for p in parameters if p in muon]
        optimizers.append(Muon(in_order, settings.learning_rate, settings.weight_decay, dtype=dtype))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(parameters) and set(held) == set(parameters), "each parameter must be in exactly one group"
    for group in groups:
        group["initial_lr"] = group["lr"]  # at its peak; a group may have a rate of its own
    return optimizers


def schedule(step, settings):
    """The learning rate after `step` steps, as a fraction of its peak: it rises to 1, stays there, and falls to 0 (Hu
    et al. 2024, arXiv 2404.06395, section 4).

    The level part has no end built in: a run that has not begun to decay can be resumed with a larger max_steps.
    """
    warmup = (step + 1) / max(1, settings.warmup_steps)
    decay = (settings.max_steps - step) / max(1, settings.decay_steps)
    return min(1.0, warmup, decay)


# ---- Model, evaluation, samples -------------------------------------------------------------------------------------


def make_model(settings, corpus, checkpoint):
    """The model of a checkpoint, of --init_from, or a new one; exits with one sentence if it does not suit the data."""
    try:
        if checkpoint or settings.init_from != "scratch":
            folder = checkpoint or find_model(settings.init_from)
            model = SmolLM2.from_pretrained(folder)
            corpus.check_tokenizer(folder)
        else:
            config = dataclasses.replace(settings.model, vocab_size=settings.model.vocab_size or corpus.vocab_size)
            check_config(config)
            model = SmolLM2(config)
    except ValueError as error:
        sys.exit(str(error))
    corpus.check_model(model.config, settings, FROM_SCRATCH)
    # bos_token_id and eos_token_id follow from the data: the model will end a text, or an answer, as its data do.
    model.config = dataclasses.replace(model.config, **corpus.ends)
    return model


def compile_parts(model):
    """torch.compile the loss, and each layer. All layers share one piece of code, as only their weights differ."""
    # Training calls the layers inside DDP (in main), evaluation without it: both should run the same compiled code.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)


def recompute_layers(model):
    """Keep only the inputs of the layers for the backward pass, which runs each layer once more when it arrives there
    (Chen et al. 2016, arXiv 1604.06174): less memory, and, as measured, a quarter more time."""
    for layer in model.model.layers:
        layer.forward = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)


def shifted(tokens, learned):
    """Inputs and targets (n, T) of sequences (n, T + 1), in numpy: a token's target is the next token, or -100 where
    that is not to be learned, as in the questions of a conversation."""
    return np.ascontiguousarray(tokens[:, :-1]), np.where(learned[:, 1:], tokens[:, 1:], -100)


def evaluate(model, corpus, settings, micro_batch, ranks, device, autocast):
    """The mean loss over the validation sequences, in nats per token and in bits per byte, and the baselines; for a mix
    also the loss on each folder.

    Bits per byte do not depend on the tokenizer: the same sum of losses, divided by the bytes of the text.
    """
    totals = torch.zeros(len(corpus.val), 2, device=device)  # nats and tokens of each folder
    for folder, val in enumerate(corpus.val.values()):
        of_all = shifted(*val)
        starts = range(ranks.rank * micro_batch, len(of_all[0]), ranks.size * micro_batch)
        for first in ranks.progress(starts, "evaluation"):
            inputs, targets = (to_device(array[first : first + micro_batch], device) for array in of_all)
            fill = (0, 0, 0, micro_batch - len(inputs))  # fill up the last batch: another shape would be compiled anew
            inputs, targets = F.pad(inputs, fill), F.pad(targets, fill, value=-100)
            with autocast:  # no torch.no_grad() here: it would trigger a second compile
                loss = model(inputs, targets).detach()
            number = (targets != -100).sum()
            totals[folder] += torch.stack([loss * number, number])
    scores = corpus.scores(ranks.sum(totals).tolist())
    if corpus.questions and ranks.rank == 0:  # a model that chats has to stop: does it, within 128 tokens?
        answers = [write(model, question, 128, 0.0, settings, device, autocast) for question in corpus.questions]
        scores["answers_that_end"] = sum(model.config.eos_token_id in answer for answer in answers) / len(answers)
    return scores


def write(model, prompt, length, temperature, settings, device, autocast):
    """Continue the ids of a prompt, with the same random numbers each time, so that only the model changes."""
    length = min(length, model.config.max_position_embeddings - len(prompt))
    generator = torch.Generator(device).manual_seed(settings.seed)
    with autocast, torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        new = model.generate(torch.tensor([prompt]), length, temperature, generator=generator)
        return [token.item() for token in new]


# ---- The run --------------------------------------------------------------------------------------------------------


@ends_well  # if a rank is lost, or memory runs out, with one message
def main(settings):
    # torchrun starts this file once for each device. Each process is a rank; alone, this is rank 0 of 1.
    ranks = Ranks(settings.timeout)
    # If any rank exits inside this block, all do, and the message is printed once. At its end the ranks compare their
    # facts (step, data, settings), which must be equal.
    with ranks.together() as facts:
        share = share_of_step(settings, ranks)  # sequences of a step on this rank
        device = set_up_device(settings.device, ranks.local_rank, settings.deterministic, settings.flash_attention_3)
        dtype = training_dtype(settings.dtype, device)

        # Data and model. A resumed run takes the model from its newest checkpoint, and the data must be as it was then.
        checkpoint, state = resume(settings, device, ranks)
        of_data = settings.data_dir, settings.seq_len, settings.seed, settings.eval_tokens, settings.train_on
        corpus = open_corpus(*of_data, settings.verify_data, state["data"] if state else None)
        torch.manual_seed(settings.seed)
        model = make_model(settings, corpus, checkpoint)
        step = first_step = state["step"] if state else 0
        facts |= must_agree(step, corpus, settings)
    with ranks.together():  # all have looked at out_dir; now the first may write there
        flops = training_flops(model.config, settings.seq_len)
        log = Log(settings, ranks, corpus.train, device, flops, step if state else None)

    model.to(device)
    if compiled := can_compile(settings.compile, device, ranks.say):
        ranks.say("compiling: the first evaluation or step waits for it")
        compile_parts(model)
    if settings.recompute_activations:
        recompute_layers(model)
    # Mixed precision. Weights, their gradients, the optimizer, the residual stream, norms and the loss are float32.
    # Inside autocast, matrix products and attention convert their inputs to dtype, and return dtype. float16 has so
    # small a range that gradients would become 0 or infinite: the scaler multiplies the loss, and so the gradients, by
    # a factor that keeps them in range, and divides them by it before they are clipped.
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    previous = micro_batch_before(state, device)  # of the run that is resumed, if any
    origin = state["settings"]["init_from"] if state else settings.init_from  # for the model card
    micro_batch = choose_micro_batch(model, share, settings, dtype, autocast, compiled, previous, ranks)
    accumulation = share // micro_batch  # micro-batches of a step on this rank
    replica = model
    if ranks.size > 1:  # averages gradients over the ranks while the backward pass still runs, in its own buffers
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizers = make_optimizers(model, settings, dtype)
    # A new run begins with an evaluation; a resumed one only if it was stopped just before one.
    evaluation_due = restore(state, optimizers, scaler) if state else True
    announce(ranks, settings, model, dtype, corpus, checkpoint)

    save = Saver(settings, micro_batch, origin, ranks, corpus, model, optimizers, scaler)  # in a thread, from a copy
    bad_steps = BadSteps(settings, ranks, save)  # with a loss or gradient that is NaN or infinite
    stop, stopping = StopSignal(ranks, settings.max_minutes), False  # also Ctrl-C and SIGTERM
    sequences = share * ranks.size  # of a step, on all ranks
    if evaluation_due:
        log(step, **evaluate(model, corpus, settings, micro_batch, ranks, device, autocast))
    while step < settings.max_steps and not stopping:
        start = time.perf_counter()

        # Schedule.
        factor = schedule(step, settings)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * factor

        # Batch. The data are one long row of documents, each followed by <|endoftext|>. A sequence is seq_len + 1
        # tokens of it, which may belong to several documents, and an epoch visits all sequences in random order.
        # Sequence i is a function of (seed, i) alone. Each step trains on the next ones, as many as `sequences`. So its
        # batch is the same on any number of devices, for any micro-batch, and after any stop.
        batch = step % settings.repeat_steps if settings.repeat_steps else step
        inputs, targets = shifted(*corpus.train.batch(batch * sequences + ranks.rank * share, share))  # (share, T) each
        # The step's loss is the mean over its targets, those of all ranks. In conversations some micro-batches have
        # more of them than others.
        counts = (targets != -100).sum(1)  # (share,), targets of each sequence
        count_of_all = max(1, ranks.sum(torch.tensor(counts.sum())).item())

        # Forward and backward, one micro-batch after the other: their gradients add up.
        loss_sum = torch.zeros((), device=device)
        for micro in ranks.progress(range(accumulation), f"step {step + 1}"):
            rows = slice(micro * micro_batch, (micro + 1) * micro_batch)
            replica.require_backward_grad_sync = micro == accumulation - 1  # ranks exchange gradients once a step
            with autocast:
                loss = replica(to_device(inputs[rows], device), to_device(targets[rows], device))
            loss = loss * (counts[rows].sum() / count_of_all * ranks.size)  # DDP divides by the number of ranks
            scaler.scale(loss).backward()
            loss_sum += loss.detach()

        # Clip. Then average the loss, the norm and any request to stop over the ranks, which have to decide alike.
        # Reading the three as Python numbers waits for the device, so it is done once a step.
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        numbers = torch.stack([loss_sum, norm, torch.full_like(norm, stop.asked())])
        mean_loss, grad_norm, asked = (ranks.sum(numbers) / ranks.size).tolist()
        stopping = asked > 0

        # Step.
        step += 1
        if not bad_steps.includes(step, mean_loss, grad_norm):  # with too many in a row, the run exits here
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=ranks.size == 1)  # DDP's own buffers are set to zero instead
        seconds = time.perf_counter() - start
        if step == first_step + 1:
            gc.freeze()  # what is there now stays; Python's garbage collector need not look at it again and again

        # Evaluate, log, sample, save. A run that is asked to stop leaves a due evaluation to its continuation.
        finished = step == settings.max_steps
        evaluation = {}
        if finished or (step % settings.eval_interval == 0 and not stopping):
            evaluation = evaluate(model, corpus, settings, micro_batch, ranks, device, autocast)
        log(step, mean_loss, settings.learning_rate * factor, grad_norm, seconds, **evaluation)
        if ranks.rank == 0 and settings.sample_interval and step % settings.sample_interval == 0:
            prompt = corpus.prompt(settings.sample_prompt)
            temperature = 0.2 if corpus.chats else 0.8  # as in sample.py
            text = prompt + write(model, prompt, 64, temperature, settings, device, autocast)
            ranks.say(f"\n{corpus.tokenizer.decode(text, skip_special_tokens=not corpus.chats)}\n")
        if step % settings.save_interval == 0 and not (bad_steps.in_a_row or finished or stopping):
            save(step, {"loss": mean_loss} | evaluation)

    ranks.leave()  # from here on no rank waits for another: rank 0 alone writes the last checkpoint
    if step > first_step:
        save.finish()  # wait for the one before it, however long that takes
        save(step, {"loss": mean_loss} | evaluation)
    else:
        ranks.say(f"nothing is left to do: step {step} is done, and --max_steps is {settings.max_steps}")
    if not save.finish():  # it could not be written
        sys.exit(1)
    newest, option = newest_checkpoint(settings.out_dir), shlex.quote(f"--model={settings.out_dir}")
    if step < settings.max_steps:
        ranks.say(f"stopped after step {step} of {settings.max_steps}; --resume=True continues the run")
    to_do = "talk to it" if corpus.chats else "continue a text"
    ranks.say(f"{newest} is the last checkpoint; {to_do} with python sample.py {option}")


if __name__ == "__main__":
    run(main, "train", Settings, "stopped; --resume=True continues from the newest checkpoint")
