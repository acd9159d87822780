"""The model card: the README.md of a checkpoint, which the hub shows, and which tells whoever finds the folder what it
is."""

import dataclasses
import json
import re
from pathlib import Path

CARD = """---
{front}
---

# {name}

A language model of {parameters:,} parameters, of the architecture of SmolLM2, trained with the code of the project
*SmolLM2 from scratch*. It continues texts of the kind that it has read; nobody has taught it to answer, to be right, or
to be kind.

| | |
|---|---|
{rows}

```python
from transformers import pipeline

model = "."  # this folder, or its name on the hub
print(pipeline("text-generation", model)({prompt})[0]["generated_text"])
```

Trained with these settings:

```json
{settings}
```
"""


def model_card(model, settings, shards, step, metrics):
    """The card as Markdown: what was read, how far the training came, how to use the model.

    shards are the records of the data, metrics those that were measured at this step. What would tell of the machine,
    its paths, is left out.
    """
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    datasets = sorted({"/".join(shard["source"].split("/")[:2]) for shard in shards.values() if from_hub(shard)})
    if datasets:
        front += ["datasets:", *(f"- {dataset}" for dataset in datasets)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.init_from) and not Path(settings.init_from).exists():
        front.append(f"base_model: {settings.init_from}")
    train = [shard["train"] for shard in shards.values()]
    rows = {
        "data": "<br>".join(description(shard) for shard in shards.values()),
        "tokens of the data": f"{sum(split['tokens'] for split in train):,}",
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


def from_hub(shard):
    """Whether a shard is made of a file on the hub: then its revision is a commit."""
    return re.fullmatch("[0-9a-f]{40}", str(shard.get("revision")))


def description(shard):
    """A shard's file: on the hub with repository and commit, here without the folders it lies in."""
    if from_hub(shard):
        return f"{'/'.join(shard['source'].split('/')[:2])}, {shard['file']} at {shard['revision'][:7]}"
    return Path(str(shard.get("file"))).name
