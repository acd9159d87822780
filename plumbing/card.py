"""The model card of a checkpoint: its README.md, with the metadata that the hub reads."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

from plumbing.files import write_whole
from plumbing.shards import from_hub

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


def model_card(config, tensors, settings, shards, step, metrics):
    """The card as Markdown: what the model was trained on, how far, how to use it. No paths of the machine."""
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    front += ["widget:", f"- text: {json.dumps(settings.sample_prompt)}"]
    datasets = sorted({repository(shard) for shard in shards.values() if repository(shard)})
    front += ["datasets:", *(f"- {dataset}" for dataset in datasets)] if datasets else []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.init_from) and not Path(settings.init_from).exists():
        front.append(f"base_model: {settings.init_from}")
    rows = {
        "data": "<br>".join(map(origin, shards.values())),
        "tokens of the data": f"{sum(shard['train']['tokens'] for shard in shards.values()):,}",
        "tokens trained on": f"{step * settings.batch_tokens:,}, in {step:,} steps",
        "training loss, nats per token": metrics.get("loss"),
        "validation loss, nats per token": metrics.get("val_loss"),
        "validation, bits per byte": metrics.get("val_bpb"),
    }
    rows = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in rows.items() if value}
    used = dataclasses.asdict(settings) | {"model": dataclasses.asdict(config)}
    for name in ("data_dir", "out_dir", "device", "init_from", "resume", "log_to"):
        del used[name]
    return CARD.format(
        front="\n".join(front),
        name=Path(settings.out_dir).resolve().name,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        prompt=json.dumps(settings.sample_prompt),
        settings=json.dumps(used, indent=2),
    )


def repository(shard):
    """The dataset on the hub that a shard was made from, or None."""
    return "/".join(shard["source"].split("/")[:2]) if from_hub(shard) else None


def origin(shard):
    """A shard's file: on the hub with repository and commit, here without the folders it lies in."""
    if repository(shard):
        return f"{repository(shard)}, {shard['file']} at {shard['revision'][:7]}"
    return Path(str(shard.get("file"))).name


def sample_prompt(folder):
    """The text with which the card of a model suggests to try it, or None."""
    from huggingface_hub import ModelCard

    with contextlib.suppress(Exception):  # no card, or one without
        return ModelCard.load(Path(folder, "README.md")).data.widget[0]["text"]


def add_scores(folder, scores):
    """Put scores, dicts of the fields of an EvalResult, into the card of a model, if it has one, where the hub shows
    them: its model-index."""
    from huggingface_hub import EvalResult, ModelCard

    folder = Path(folder).resolve()
    if not (folder / "README.md").exists():
        return
    card = ModelCard.load(folder / "README.md")
    name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [EvalResult(**score) for score in scores]
    write_whole(folder / "README.md", str(card).encode())
