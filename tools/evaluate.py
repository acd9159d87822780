"""How good is a model? The tasks that the SmolLM2 family was published with, in their cloze form.

    python -m tools.evaluate --model=out/smollm2                                      a run, a checkpoint, or a hub id
    python -m tools.evaluate --model=HuggingFaceTB/SmolLM2-135M --tasks=all
    python -m tools.evaluate --model=out/smollm2 --all_checkpoints=True --limit=200
    python -m tools.evaluate --model=HuggingFaceTB/SmolLM2-135M --data_dir=data/books     how well it predicts a text

Each choice is read as the continuation of its question, and the one with the highest log-probability per character is
taken as the answer. There are no letters to choose and no examples before the question. Accuracy rises late in
training; the bits per byte of the right answers fall from the first step on.

The result is printed, and kept in evaluation.json beside the model (of a hub id, in this folder) and in its card.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from plumbing.corpus import folders_of, open_corpus
from plumbing.devices import set_up_device, training_dtype
from plumbing.files import write_whole
from plumbing.pretrained import find_model, list_checkpoints, read_json, read_tokenizer
from plumbing.ranks import Ranks
from plumbing.settings import Count, run
from plumbing.shards import read_shard_json

import torch
from tqdm import tqdm

import train
from model import SmolLM2
from tools.tasks import TASKS, questions


@dataclass
class Settings:
    """Measure accuracy on multiple-choice questions."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    tasks: str = "hellaswag,arc_easy,arc_challenge,piqa"  # names between commas, or all
    data_dir: str | None = None  # instead of tasks, the validation side of a folder that prepare.py wrote
    eval_tokens: Count = 131_072  # tokens of it
    seq_len: Count = 2048  # tokens of a sequence of it, or the model's positions where they are fewer
    limit: Count | None = None  # only the first questions of each task
    all_checkpoints: bool = False  # evaluate every checkpoint of a run, not only the newest
    batch_tokens: Count | None = None  # tokens that go through the model at once; unset: 256 on a CPU, else 4096
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here


# ---- Scores ---------------------------------------------------------------------------------------------------------


def encode(tokenizer, context, choice):
    """The tokens of a context and of a choice after it. Both are encoded as one text, and the choice has the tokens
    after as many as the context has alone. Spaces at the end of the context go to the front of the choice."""
    alone = tokenizer.encode(context.rstrip(), add_special_tokens=False).ids
    together = tokenizer.encode(context + choice, add_special_tokens=False).ids
    return (alone, together[len(alone) :]) if len(together) > len(alone) else (together[:-1], together[-1:])


def pack(model, encoded, budget):
    """Lists of (number of the question, context, choices), as many as have about budget tokens together. The context of
    all choices is there once, unless that would be too long for the model."""
    room, packed, length = model.config.max_position_embeddings, [], 0
    for number, pairs in enumerate(encoded):
        if not fits(model, pairs):
            continue
        shared = all(pair[0] == pairs[0][0] for pair in pairs)
        together = len(pairs[0][0]) + sum(len(choice) for _, choice in pairs)
        groups = [pairs] if shared and together <= room else [[pair] for pair in pairs]
        for group in groups:
            choices = [choice for _, choice in group]
            left = max(1, room - sum(map(len, choices)))
            context = (group[0][0] or [model.config.bos_token_id])[-left:]  # the end of it, where it is too long
            needed = len(context) + sum(map(len, choices))
            if packed and length + needed > min(budget, room):
                yield packed
                packed, length = [], 0
            packed.append((number, context, choices))
            length += needed
    if packed:
        yield packed


def fits(model, pairs):
    """Whether the model has as many positions as the longest choice has tokens."""
    return max(len(choice) for _, choice in pairs) <= model.config.max_position_embeddings


@torch.inference_mode()
def log_probabilities(model, packed):
    """The sum of the log-probabilities of each choice's tokens, in the order of the pack: one sequence for all of it.

    A token sees what stands before it in its own choice and in its context, and has the position that it would have
    alone. So the choices of a question share the work for the context.
    """
    tokens, positions, question, branch, rows, wanted = [], [], [], [], [], []

    def place(ids, first_position, number, of_branch):
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        question.extend([number] * len(ids))
        branch.extend([of_branch] * len(ids))

    for number, (_, context, choices) in enumerate(packed):
        place(context, 0, number, 0)
        last = len(tokens) - 1
        for of_branch, choice in enumerate(choices, 1):
            rows += [last, *range(len(tokens), len(tokens) + len(choice) - 1)]  # each predicts the token after it
            place(choice[:-1], len(context), number, of_branch)
            wanted += choice
    device = model.lm_head.weight.device
    if device.type == "cuda":  # few different lengths, as a GPU's attention prepares itself for each
        room = model.config.max_position_embeddings - len(tokens)
        place([0] * min(-len(tokens) % 256, room), 0, -1, 0)
    tokens, positions, question, branch, wanted = (
        torch.tensor(values, device=device) for values in (tokens, positions, question, branch, wanted)
    )
    order = torch.arange(len(tokens), device=device)
    mask = (order[:, None] >= order) & (question[:, None] == question)  # (T, T)
    mask &= (branch == 0) | (branch[:, None] == branch)
    hidden = model.hidden_states(tokens[None], positions, mask[None, None])[0, rows]  # (tokens of choices, C)
    scores = model.lm_head(hidden).float().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)
    lengths = [len(choice) for _, _, choices in packed for choice in choices]
    return [part.sum().item() for part in scores.split(lengths)]


def evaluate(model, tokenizer, asked, budget, name):
    """Yield (choices, number of the right one, scores of all) for each question, as soon as it is answered. Questions
    with a choice longer than the model are left out."""
    encoded = [[encode(tokenizer, context, choice) for choice in choices] for context, choices, _ in asked]
    scores, count = [[] for _ in asked], sum(fits(model, pairs) for pairs in encoded)
    left_out = f", {len(asked) - count:,} left out: longer than the model" if count < len(asked) else ""
    print(f"{name}: {count:,} questions{left_out}", file=sys.stderr, flush=True)
    with tqdm(total=count, desc=name, unit=" questions", disable=None) as bar:
        for packed in pack(model, encoded, budget):
            found = iter(log_probabilities(model, packed))
            for number, _, choices in packed:
                scores[number] += [next(found) for _ in choices]
                if len(scores[number]) == len(encoded[number]):
                    yield *asked[number][1:], scores[number]
                    bar.update()


def summary(answers):
    """What answers (choices, number of the right one, scores of all) are worth; None if there is none."""
    if not answers:
        return None
    right, right_by_sum, nats, size = 0, 0, 0.0, 0
    for choices, gold, scores in answers:
        lengths = [max(1, len(choice.removeprefix(" "))) for choice in choices]
        by_length = [score / length for score, length in zip(scores, lengths, strict=True)]
        right += by_length.index(max(by_length)) == gold
        right_by_sum += scores.index(max(scores)) == gold
        nats, size = nats - scores[gold], size + len(choices[gold].encode())
    n = len(answers)
    return {
        "questions": n,
        "accuracy": right / n,
        "interval": interval(right, n),
        "accuracy_by_sum": right_by_sum / n,
        "gold_bits_per_byte": nats / math.log(2) / size,
    }


def interval(right, n, z=1.96):
    """The accuracies of which n questions with so many right answers are not unlikely, at 95%: from the lowest to the
    highest (Wilson 1927). Where all n are right, it is from n / (n + z * z) to 1, not a single point."""
    middle, reach = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return [(middle - reach) / (n + z * z), (middle + reach) / (n + z * z)]


def add_scores(folder, scores):
    """Put scores, dicts of the fields of an EvalResult, into the card of a model, if it has one, where the hub shows
    them: its model-index."""
    from huggingface_hub import EvalResult, ModelCard

    folder = Path(folder).resolve()
    if not (folder / "README.md").exists():
        return
    try:
        card = ModelCard.load(folder / "README.md")
    except Exception as error:  # YAML that is none
        return print(f"{folder / 'README.md'} is damaged, so the scores are not put into it: {error}", file=sys.stderr)
    name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [EvalResult(**score) for score in scores]
    write_whole(folder / "README.md", str(card).encode())


# ---- A text of one's own --------------------------------------------------------------------------------------------


def predict(model, folder, settings, dtype):
    """The loss and bits per byte of the validation side of a data folder, or of each folder of a mix, in words."""
    seq_len = min(settings.seq_len, model.config.max_position_embeddings, longest_sequence(settings.data_dir))
    of_data = SimpleNamespace(seq_len=seq_len, seed=0)
    corpus = open_corpus(settings.data_dir, of_data.seq_len, 0, settings.eval_tokens)
    corpus.check_tokenizer(folder)
    device = model.lm_head.weight.device
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.inference_mode():
        scores = train.evaluate(model, corpus, of_data, 1, Ranks(timeout=600), device, autocast)
    return " | ".join(f"{name} {value:.4f}" for name, value in scores.items())


def longest_sequence(data_dir):
    """The longest sequence that the validation sides of all folders allow."""
    shards = [[read_shard_json(path) for path in folder.glob("shard-*.json")] for folder in folders_of(data_dir)]
    longest = (max((shard["val"]["tokens"] for shard in of_folder), default=0) for of_folder in shards)
    return max(1, min(longest) - 1)


# ---- The command ----------------------------------------------------------------------------------------------------


def table(results):
    published = f"{'135M':>9}{'360M':>7}{'1.7B':>7}"
    header = f"{'task':<15}{'questions':>10}{'accuracy':>11}{'95% interval':>18}{'by sum':>9}{'chance':>9}{published}"
    lines = [f"{'published, base models':>{len(header)}}", f"{header}{'bits per byte':>16}"]
    for name, result in results.items():
        low, high = (100 * bound for bound in result["interval"])
        accuracy, by_sum = 100 * result["accuracy"], 100 * result["accuracy_by_sum"]
        numbers = f"{accuracy:10.1f}%{low:9.1f} to {high:5.1f}{by_sum:8.1f}%{TASKS[name].chance:8.0f}%  "
        published = "".join(f"{score:7.1f}" for score in TASKS[name].published).ljust(21)
        lines.append(f"{name:<15}{result['questions']:10,}{numbers}{published}{result['gold_bits_per_byte']:16.3f}")
    return "\n".join(lines)


def main(settings):
    names = list(TASKS) if settings.tasks == "all" else [name.strip() for name in settings.tasks.split(",")]
    names = list(dict.fromkeys(names))  # each once
    for name in names:
        if name not in TASKS:
            sys.exit(f"--tasks={settings.tasks}: {name} is none of {', '.join(TASKS)}.")
    device = set_up_device(settings.device)
    dtype, budget = training_dtype(settings.dtype, device), settings.batch_tokens
    budget = budget or (256 if device.type == "cpu" else 4096)
    try:
        folders = [find_model(settings.model)]
        if settings.all_checkpoints:
            folders = (os.path.isdir(settings.model) and list_checkpoints(settings.model)) or folders
    except ValueError as error:
        sys.exit(str(error))
    asked = {} if settings.data_dir else {name: questions(name, TASKS[name], settings.limit) for name in names}
    for folder in folders:
        local = os.path.isdir(settings.model)
        path = (Path(folder) if local else Path()) / "evaluation.json"
        try:
            model = SmolLM2.from_pretrained(folder, dtype, device)
            tokenizer = read_tokenizer(folder, model.config)
            before = read_json(path) if path.exists() else {}
        except ValueError as error:
            sys.exit(str(error))
        if settings.data_dir:
            print(f"{folder if local else settings.model}: {predict(model, folder, settings, dtype)}")
            continue
        answers, stopped = {name: [] for name in names}, False
        try:
            for name in names:
                for answer in evaluate(model, tokenizer, asked[name], budget, name):
                    answers[name].append(answer)
        except KeyboardInterrupt:  # what is answered counts
            stopped = True
        results = {name: result for name in names if (result := summary(answers[name]))}
        of = {"model": Path(folder).resolve().name if local else settings.model, "dtype": str(dtype)}
        same = all(before.get(name) == value for name, value in of.items())  # what was found before stays
        kept = before.get("tasks") if same else None
        content = of | {"tasks": (kept if isinstance(kept, dict) else {}) | results}
        print(f"{folder if settings.all_checkpoints else settings.model}\n{table(results)}\n", flush=True)
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
        if local:
            known = {name: result for name, result in content["tasks"].items() if name in TASKS}
            add_scores(folder, [TASKS[name].for_card(name, result) for name, result in known.items()])
        if stopped:
            sys.exit("stopped: the table has the questions answered so far")


if __name__ == "__main__":
    run(main, "evaluate", Settings)
