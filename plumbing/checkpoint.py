"""The checkpoints of a run: resuming, saving, and the model card.

out_dir/checkpoint-NNNNNN/ is a model folder (plumbing/pretrained.py) with a model card, README.md, and with
trainer_state.pt, which holds what it takes to continue as if the run had never stopped. That file is read with
weights_only=True, so no pickle is ever executed.
"""

import dataclasses
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from plumbing.card import model_card
from plumbing.chat import template
from plumbing.devices import device_name
from plumbing.files import AFTERWARDS, hold, make_folder, release, rename_whole, say, why
from plumbing.pretrained import list_checkpoints, newest_checkpoint, write_json, write_model
from plumbing.settings import flatten
from plumbing.shards import identity

import torch
from safetensors import SafetensorError

# What a resumed run must keep. Everything else may change: steps, rates, intervals, the micro-batch, the devices.
KEPT = ("seed", "seq_len", "batch_tokens", "optimizer", "repeat_steps", "train_on", "model")

# ---- Resuming -------------------------------------------------------------------------------------------------------


def claim(out_dir):
    """Make the folder, and keep other runs out of it until this one ends."""
    make_folder(out_dir, "out_dir")
    lock = Path(out_dir, ".lock")
    hold(lock, f"{out_dir} is in use by another run; take another --out_dir.")
    AFTERWARDS.callback(release, lock)


def resume(settings, device, ranks):
    """The newest checkpoint of out_dir and the trainer's state in it, or (None, None) for a new run.

    Exits with one sentence where two runs would mix, or a run would continue as another. The first rank claims the
    folder.
    """
    out_dir = Path(settings.out_dir)
    checkpoint = newest_checkpoint(out_dir) if out_dir.is_dir() else None
    if (checkpoint or (out_dir / "metrics.jsonl").exists()) and not settings.resume:
        sys.exit(f"{out_dir} already holds a run: continue it with --resume=True, or take another --out_dir.")
    if not checkpoint:
        return None, None
    if ranks.rank == 0:
        claim(out_dir)
        checkpoint = newest_checkpoint(out_dir)  # another run may have continued until the claim
    state = load_state(checkpoint, device)
    then, now = (
        dict(flatten({name: values.get(name) for name in KEPT})) for values in (state["settings"], vars(settings))
    )
    for values in (then, now):
        values["train_on"] = values["train_on"] or "answers"  # the default, written out
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            sys.exit(
                f"{checkpoint} was trained with {name} = {then.get(name)}, now it is {now.get(name)}: resume a run "
                "with the same, or begin another with --init_from."
            )
    return checkpoint, state


def load_state(checkpoint, device="cpu"):
    """The trainer's state; exits if the file has none. For a GPU the file is mapped, not read: ranks on one machine
    share that memory, and it is free again when everything is on the devices."""
    path = os.path.join(checkpoint, "trainer_state.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=str(device) != "cpu")
    except PermissionError as error:
        sys.exit(why(error))
    except Exception as error:  # whatever a damaged or foreign file sets off inside of the library
        sys.exit(
            f"{path} cannot be read ({type(error).__name__}); to continue from the checkpoint before it, remove "
            f"{checkpoint}"
        )
    if not isinstance(state, dict) or not state.keys() >= {"step", "optimizers", "scaler", "rng", "settings", "data"}:
        sys.exit(f"{path} is not the state of a trainer; to start from the weights alone, use --init_from")
    return state


def must_agree(step, corpus, settings):
    """What must be the same on all ranks: checkpoint, data and settings, except for paths."""
    shared = {name: value for name, value in flatten(vars(settings)) if not name.endswith("_dir")}
    return {"step": step} | identity(corpus.shards) | shared


def micro_batch_before(state, device):
    """The micro-batch of the run that a state is from, if it had such a device; else None."""
    return state["settings"]["micro_batch"] if state and state.get("device") == device_name(device) else None


def restore(state, optimizers, scaler):
    """Continue optimizers and scaler from a state, with the current settings. Returns whether its step is still to be
    evaluated. The state is emptied, so that neither its memory nor its file is held for the rest of the run."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved | {"param_groups": optimizer.state_dict()["param_groups"]})
    if state["scaler"]:  # empty, unless the run was in float16
        scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    evaluation_due = state.get("evaluation_due", False)
    state.clear()
    return evaluation_due


# ---- Saving ---------------------------------------------------------------------------------------------------------


class Saver:
    """Saves checkpoints on the first rank, from a copy in memory, in a thread, while training goes on. The copy takes
    as much as weights and optimizer, 12 bytes per parameter."""

    def __init__(self, settings, micro_batch, origin, ranks, corpus, model, optimizers, scaler):
        # What a resumed run is to know: its micro-batch, and the weights that it began from, wherever it is resumed.
        origin = os.path.abspath(origin) if os.path.isdir(origin) else origin
        self.settings = dataclasses.replace(settings, micro_batch=micro_batch, init_from=origin)
        self.model, self.optimizers, self.scaler, self.corpus = model, optimizers, scaler, corpus
        self.first, self.thread, self.last = ranks.rank == 0, ThreadPoolExecutor(1), None
        AFTERWARDS.callback(self.thread.shutdown)  # waits for what is being written
        if self.first and os.path.isdir(settings.out_dir):
            remove_old_checkpoints(settings)

    def __call__(self, step, metrics):
        """metrics, of this step, are for the card. A save that is still being written is waited for, but not so long
        that the other ranks assume this one died: then this checkpoint is left out."""
        if not self.first:
            return
        start = time.perf_counter()
        try:
            self.finish(self.settings.timeout / 2)
        except TimeoutError:
            return say(f"checkpoint-{step:06d} is left out: the one before it is still being written")
        tensors = copied(dict(self.model.named_parameters()))
        state = dict(step=step, data=self.corpus.shards, device=device_name(self.model.lm_head.weight.device))
        state |= dict(evaluation_due=step % self.settings.eval_interval == 0 and "val_loss" not in metrics)
        state |= dict(settings=dataclasses.asdict(self.settings), rng=torch.get_rng_state())
        state |= dict(optimizers=copied([optimizer.state_dict() for optimizer in self.optimizers]))
        state |= dict(scaler=self.scaler.state_dict())
        args = self.settings, step, self.model.config, tensors, self.corpus, state, metrics
        self.last = self.thread.submit(save_checkpoint, *args, start, time.perf_counter() - start)

    def finish(self, timeout=None):
        """Wait for the last save, for at most timeout seconds; returns whether it went well."""
        return self.last is None or self.last.result(timeout)


def copied(values):
    """Tensors inside of dicts and lists, copied to the memory of the CPU."""
    if isinstance(values, dict):
        return {name: copied(value) for name, value in values.items()}
    if isinstance(values, list):
        return [copied(value) for value in values]
    return values.detach().to("cpu", copy=True) if isinstance(values, torch.Tensor) else values


def save_checkpoint(settings, step, config, tensors, corpus, state, metrics, start, waited):
    """Save checkpoint-NNNNNN under a temporary name, and rename it once all of it is on the disk: there is never a
    broken one. Then remove all but the newest. Returns whether that went well: a full disk costs the run one
    checkpoint, not its life."""
    final = Path(settings.out_dir, f"checkpoint-{step:06d}")
    temporary = Path(f"{final}.tmp")
    bos, eos = map(corpus.tokenizer.id_to_token, (config.bos_token_id, config.eos_token_id))
    special = {"bos_token": bos, "eos_token": eos, "unk_token": "<|endoftext|>"}
    special |= {"pad_token": eos} if corpus.chats else {}
    length = {"model_max_length": config.max_position_embeddings}
    try:
        write_model(temporary, config, tensors)
        shutil.copyfile(corpus.tokenizer_file, temporary / "tokenizer.json")
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"} | special | length
        write_json(temporary / "tokenizer_config.json", tokenizer_config)
        if corpus.chats:
            (temporary / "chat_template.jinja").write_text(template(corpus.system), encoding="utf-8")
        card = model_card(config, tensors, settings, corpus, step, metrics)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        with open(temporary / "trainer_state.pt", "wb") as file:  # Python's file says what is wrong with the disk
            torch.save(state, file)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        rename_whole(temporary, final)
        remove_old_checkpoints(settings)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers have types of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        say(f"{final} could not be saved: {reason}; the checkpoint before it is whole", sys.stderr)
        return False
    took = time.perf_counter() - start
    say(f"saved {final}: {size / 1e6:,.1f} MB in {took:.2f} s, of which training waited {waited:.2f} s")
    return True


def remove_old_checkpoints(settings):
    """Remove all but the newest checkpoints, and what interrupted saves and removals left behind."""
    for checkpoint in list_checkpoints(settings.out_dir)[: -settings.keep_checkpoints]:
        os.rename(checkpoint, f"{checkpoint}.tmp")  # at once no checkpoint any more, however long its removal takes
    for leftover in Path(settings.out_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
