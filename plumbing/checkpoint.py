"""The checkpoints of a run: saved whole, described, resumed.

out_dir/checkpoint-NNNNNN/ is a model folder (plumbing/pretrained.py) with a model card, README.md, and with
trainer_state.pt, which has what it takes to continue as if the run had never stopped. It is read with
weights_only=True, so no pickle is ever executed.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

from plumbing.pretrained import list_checkpoints, newest_checkpoint, write_json
from plumbing.settings import flatten

import torch
from safetensors import SafetensorError

# What a resumed run must keep. Everything else may change: steps, rates, intervals, the micro-batch, the devices.
KEPT = ("seed", "seq_len", "batch_tokens", "optimizer", "model")

# ---- Resuming -------------------------------------------------------------------------------------------------------


def resume(settings, shards):
    """The newest checkpoint of out_dir and the trainer's state in it, or (None, None) for a new run. Exits with one
    sentence where the two would mix, or where the run would continue with other data or another model."""
    out_dir = Path(settings.out_dir)
    checkpoint = newest_checkpoint(out_dir) if out_dir.is_dir() else None
    if (checkpoint or (out_dir / "metrics.jsonl").exists()) and not settings.resume:
        sys.exit(f"{out_dir} already holds a run: continue it with --resume=True, or take another --out_dir.")
    if not checkpoint:
        return None, None
    state = load_state(checkpoint)
    then = {name: state["settings"][name] for name in KEPT} | {"data": state["data"]}
    now = {name: value for name, value in dataclasses.asdict(settings).items() if name in KEPT} | {"data": shards}
    then, now = dict(flatten(then)), dict(flatten(now))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            sys.exit(
                f"{checkpoint} was trained with {name} = {then.get(name)}, now it is {now.get(name)}: resume a run "
                "with the same, or begin another with --init_from."
            )
    return checkpoint, state


def load_state(checkpoint):
    """The trainer's state; exits if the file has none."""
    path = os.path.join(checkpoint, "trainer_state.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file sets off inside of the library
        sys.exit(
            f"{path} cannot be read ({type(error).__name__}); to continue from the checkpoint before it, remove "
            f"{checkpoint}"
        )
    if not isinstance(state, dict) or not state.keys() >= {"step", "optimizers", "scaler", "rng", "settings", "data"}:
        sys.exit(f"{path} is not the state of a trainer; to start from the weights alone, use --init_from")
    return state


# ---- Saving ---------------------------------------------------------------------------------------------------------


def save_checkpoint(settings, step, model, corpus, state, metrics):
    """Save checkpoint-NNNNNN beside its final name, and rename it once all of it is on the disk: under that name there
    is never a broken one. Then remove all but the newest. Returns whether that went well: a full disk costs the run one
    checkpoint, not its life."""
    final = Path(settings.out_dir, f"checkpoint-{step:06d}")
    temporary = Path(f"{final}.tmp")
    state |= {"step": step, "settings": dataclasses.asdict(settings), "data": corpus.shards}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    length = {"model_max_length": model.config.max_position_embeddings}
    try:
        model.save_pretrained(temporary)
        shutil.copyfile(corpus.tokenizer_file, temporary / "tokenizer.json")
        tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"} | special | length
        write_json(temporary / "tokenizer_config.json", tokenizer_config)
        card = model_card(model, settings, corpus.shards, step, metrics)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        with open(temporary / "trainer_state.pt", "wb") as file:  # Python's file says what is wrong with the disk
            torch.save(state, file)
        for path in temporary.iterdir():
            with open(path, "r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
        os.rename(temporary, final)
        remove_old_checkpoints(settings)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers have types of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        print(f"{final} could not be saved: {reason}; the checkpoint before it is whole", file=sys.stderr, flush=True)
        return False
    return True


def remove_old_checkpoints(settings):
    """Remove all but the newest checkpoints, and what interrupted saves and removals left."""
    for checkpoint in list_checkpoints(settings.out_dir)[: -settings.keep_checkpoints]:
        os.rename(checkpoint, f"{checkpoint}.tmp")  # at once no checkpoint any more, however long its removal takes
    for leftover in Path(settings.out_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


# ---- The model card -------------------------------------------------------------------------------------------------

CARD = """---
{front}
---

# {name}

A language model of {parameters:,} parameters with the architecture of SmolLM2, trained with the code of *SmolLM2 from
scratch*. It continues texts of the kind that it was trained on; it was not trained to follow instructions.

| | |
|---|---|
{rows}

```python
from transformers import pipeline

model = "."  # this folder, or its name on the hub
print(pipeline("text-generation", model)({prompt})[0]["generated_text"])
```

The settings of the run:

```json
{settings}
```
"""


def model_card(model, settings, shards, step, metrics):
    """The card as Markdown: what the model was trained on, how far, how to use it. No paths of the machine."""
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    datasets = sorted({repository(shard) for shard in shards.values() if repository(shard)})
    front += ["datasets:", *(f"- {dataset}" for dataset in datasets)] if datasets else []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.init_from) and not Path(settings.init_from).exists():
        front.append(f"base_model: {settings.init_from}")
    rows = {
        "data": "<br>".join(map(origin, shards.values())),
        "tokens of the data": f"{sum(shard['train']['tokens'] for shard in shards.values()):,}",
        "tokens trained on": f"{step * settings.batch_tokens:,}, in {step:,} steps",
        "training loss, nats a token": metrics.get("loss"),
        "validation loss, nats a token": metrics.get("val_loss"),
        "validation, bits a byte": metrics.get("val_bpb"),
    }
    rows = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in rows.items() if value}
    used = dataclasses.asdict(settings) | {"model": dataclasses.asdict(model.config)}
    for name in ("data_dir", "out_dir", "device", "init_from", "resume", "log_to"):
        del used[name]
    return CARD.format(
        front="\n".join(front),
        name=Path(settings.out_dir).resolve().name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        prompt=json.dumps(settings.sample_prompt),
        settings=json.dumps(used, indent=2),
    )


def repository(shard):
    """The dataset on the hub that a shard was made from, or None: only there is a revision a commit."""
    from_hub = re.fullmatch("[0-9a-f]{40}", str(shard.get("revision")))
    return "/".join(shard["source"].split("/")[:2]) if from_hub else None


def origin(shard):
    """A shard's file: on the hub with repository and commit, here without the folders it lies in."""
    if repository(shard):
        return f"{repository(shard)}, {shard['file']} at {shard['revision'][:7]}"
    return Path(str(shard.get("file"))).name
