"""The model card, README.md of a checkpoint: what the model is, what it was trained on, and how to use it."""

import dataclasses
import json
import os
import re
from fractions import Fraction
from pathlib import Path

from plumbing.shards import from_hub

CARD = """---
{front}
---

# {name}

A language model of {parameters:,} parameters with the architecture of SmolLM2, trained with the code of *SmolLM2 from
scratch*{origin}. {purpose}

| | |
|---|---|
{rows}

```python
from transformers import pipeline

model = "."  # this folder, or its name on the hub
print(pipeline("text-generation", model)({call})[0]{written})
```

The settings of the run:

```json
{settings}
```
"""

CONTINUES = """It continues texts of the kind it was trained on last. They did not teach it to follow instructions,
and it has no chat template."""
ANSWERS = """It answers: it was trained last on conversations, of the kind named below. What it says need not be
true."""


def short_name(model):
    """What people call a model: its run, or folder, with the step of a checkpoint; or its hub id."""
    if not os.path.isdir(model) and not os.path.isabs(model):
        return model
    path = Path(os.path.abspath(model))
    step = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return f"{path.parent.name}, step {int(step[1]):,}" if step else path.name


def model_card(config, tensors, settings, corpus, step, metrics):
    """Markdown, with the metadata that the hub reads: what the model was trained on, how far, how to use it. It
    holds no paths of the machine."""
    shards = corpus.shards
    prompt = json.dumps(settings.sample_prompt, ensure_ascii=False)
    no_yaml = "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"  # characters that JSON takes and YAML does not
    prompt = re.sub(no_yaml, lambda found: f"\\u{ord(found[0]):04x}", prompt)
    front = ["library_name: transformers", "pipeline_tag: text-generation", "widget:", f"- text: {prompt}"]
    repositories = {
        shard["file"]: "/".join(shard["source"].split("/")[:2]) for shard in shards.values() if from_hub(shard)
    }
    front += ["datasets:", *(f"- {name}" for name in sorted(set(repositories.values())))] if repositories else []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", settings.init_from) and not os.path.exists(settings.init_from):
        front.append(f"base_model: {settings.init_from}")
    sources = []
    for shard in shards.values():
        of_mix = f", {float(Fraction(shard['share'])):.1%} of the mix" if "share" in shard else ""
        at = f"{repositories[shard['file']]}, {shard['file']} at {shard['revision'][:7]}" if from_hub(shard) else None
        sources.append((at or Path(str(shard.get("file"))).name) + of_mix)
    rows = {
        "data": "<br>".join(sources),
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
    used["train_on"] = (settings.train_on or "answers") if corpus.chats else "all"
    return CARD.format(
        front="\n".join(front),
        name=Path(settings.out_dir).resolve().name,
        purpose=ANSWERS if corpus.chats else CONTINUES,
        call=f'[{{"role": "user", "content": {prompt}}}]' if corpus.chats else prompt,
        written='["generated_text"][-1]["content"]' if corpus.chats else '["generated_text"]',
        origin="" if settings.init_from == "scratch" else f", from the weights of {short_name(settings.init_from)}",
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        settings=json.dumps(used, indent=2, ensure_ascii=False),
    )
