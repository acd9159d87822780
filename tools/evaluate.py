"""How good is a model? The tasks that the SmolLM2 family was published with, in their cloze form.

    python -m tools.evaluate --model=out/smollm2                                      a run, a checkpoint, or a hub id
    python -m tools.evaluate --model=HuggingFaceTB/SmolLM2-135M --tasks=all
    python -m tools.evaluate --model=out/smollm2 --all_checkpoints=True --limit=200

Each choice is read as the continuation of its question, and the likeliest for its length is the answer: the sum of the
log-probabilities of its tokens over the number of its characters. There are no letters to choose and no examples before
the question. Accuracy moves late; the bits per byte of the right answers move from the first step on.

The result is printed, and kept in evaluation.json beside the model (of a hub id, in this folder).
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plumbing.devices import set_up_device, training_dtype
from plumbing.files import write_whole
from plumbing.hub import hub_errors
from plumbing.pretrained import find_model, list_checkpoints, read_json
from plumbing.settings import Count, run

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model import SmolLM2


@dataclass
class Settings:
    """Measure accuracy on multiple-choice questions."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    tasks: str = "hellaswag,arc_easy,arc_challenge,piqa"  # names between commas, or all
    limit: Count | None = None  # only the first questions of each task
    all_checkpoints: bool = False  # evaluate every checkpoint of a run, not only the newest
    batch_tokens: Count = 1024  # tokens that go through the model at once
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here


# ---- Tasks ----------------------------------------------------------------------------------------------------------
#
# A task makes (context, choices, number of the right one) of a row. Prompts, splits and revisions are those of the
# published evaluation: text/evaluation/smollm2 of the smollm repository, with LightEval at ea46419.


def hellaswag(row):
    def clean(text):
        return re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} ")
    return context, [f" {clean(ending)}" for ending in row["endings"]], int(row["label"])


def arc(row):
    return f"Question: {row['question']}\nAnswer:", *labelled(row)


def labelled(row):
    """Choices with labels, "A" to "E" or "1" to "4", and the number of the right one."""
    return [f" {text}" for text in row["choices"]["text"]], list(row["choices"]["label"]).index(row["answerKey"])


def piqa(row):
    return f"Question: {row['goal']}\nAnswer:", [f" {row['sol1']}", f" {row['sol2']}"], int(row["label"])


def winogrande(row):
    context, rest = row["sentence"].split("_")
    return context, [f"{row[option]} {rest.strip()}" for option in ("option1", "option2")], int(row["answer"]) - 1


def openbookqa(row):
    return row["question_stem"], *labelled(row)


def commonsense_qa(row):
    return row["question"], *labelled(row)


def mmlu(row):
    about = f"The following are questions about {row['subject'].replace('_', ' ')}.\n"
    choices = [f" {choice}" for choice in row["choices"]]
    return f"{about}Question: {row['question']}\nAnswer:", choices, int(row["answer"])


@dataclass
class Task:
    """Where its questions are, the accuracy of a guess, and that of the published 135M, 360M and 1.7B, in percent."""

    ask: Callable
    dataset: str
    config: str
    splits: list
    revision: str
    chance: float
    published: list


# ARC is published as the mean of both parts: 43.9, 53.0 and 60.5.
TABLE = """
    hellaswag      hellaswag       Rowan/hellaswag     default        validation
        6002345709e0801764318f06bf06ce1e7d1a1fe3       25   42.1  54.5  68.7
    arc_easy       arc             allenai/ai2_arc     ARC-Easy       test
        210d026faf9955653af8916fad021475a3f00453       25
    arc_challenge  arc             allenai/ai2_arc     ARC-Challenge  test
        210d026faf9955653af8916fad021475a3f00453       25
    piqa           piqa            ybisk/piqa          plain_text     validation
        2e8ac2dffd59bac8c3c6714948f4c551a0848bb0       50   68.4  71.7  77.6
    winogrande     winogrande      allenai/winogrande  winogrande_xl  validation
        85ac5b5a3b7a930e22d590176e39460400d19e41       50   51.3  52.5  59.4
    openbookqa     openbookqa      allenai/openbookqa  main           validation+test
        388097ea7776314e93a529163e0fea805b8a6454       25   34.6  37.4  42.2
    commonsense_qa commonsense_qa  tau/commonsense_qa  default        validation
        94630fe30dad47192a8546eb75f094926d47e155       20   33.9  38.0  43.6
    mmlu           mmlu            cais/mmlu           all            test
        c30699e8356da336a370243923dbaf21066bb9fe       25   31.5  35.8
"""  # name, function, dataset, configuration, splits, revision, chance, published


def read_table():
    tasks = {}
    for entry in re.split(r"\n {4}(?=\w)", TABLE.rstrip())[1:]:
        name, ask, dataset, config, splits, revision, chance, *published = entry.split()
        published = [float(score) for score in published]
        tasks[name] = Task(globals()[ask], dataset, config, splits.split("+"), revision, float(chance), published)
    return tasks


TASKS = read_table()


def questions(name, task, limit):
    """The questions of a task, [(context, choices, number of the right one)]; exits with one sentence for a row that is
    not as the task expects."""
    from datasets import load_dataset

    asked = []
    for split in task.splits:
        with hub_errors(f"{name}, which is {task.dataset} on the hub"):
            try:
                rows = load_dataset(task.dataset, task.config, split=split, revision=task.revision)
            except RuntimeError as error:
                if "script" not in str(error):
                    raise
                # The revision is a program, which datasets no longer runs. The hub keeps what it makes, as parquet.
                print(f"{name}: read from the hub's parquet branch of {task.dataset}", file=sys.stderr)
                branch = f"hf://datasets/{task.dataset}@refs%2Fconvert%2Fparquet/{task.config}/{split}/*.parquet"
                rows = load_dataset("parquet", data_files={split: branch}, split=split)
        for number, row in enumerate(rows):
            if len(asked) == limit:
                return asked
            try:
                context, choices, gold = task.ask(row)
                if not 0 <= gold < len(choices):
                    raise ValueError(f"its right answer is number {gold}")
                asked.append((context, choices, gold))
            except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
                sys.exit(f"{name}: row {number} of {split} is not as this task expects: {error!r}")
    return asked


# ---- Scores ---------------------------------------------------------------------------------------------------------


def encode(tokenizer, context, choice):
    """The tokens of a context and of a choice after it. Both are encoded as one text, and the choice has the tokens
    after as many as the context has alone. Spaces at the end of the context go to the front of the choice."""
    alone = tokenizer.encode(context.rstrip(), add_special_tokens=False).ids
    together = tokenizer.encode(context + choice, add_special_tokens=False).ids
    return (alone, together[len(alone) :]) if len(together) > len(alone) else (together[:-1], together[-1:])


def pack(model, encoded, budget):
    """Lists of (number of the question, context, choices), as many as have about budget tokens together. The context of
    all choices is there once, unless that would be too long."""
    budget, packed, length = min(budget, model.config.max_position_embeddings), [], 0
    for number, pairs in enumerate(encoded):
        shared = all(pair[0] == pairs[0][0] for pair in pairs)
        together = len(pairs[0][0]) + sum(len(choice) for _, choice in pairs)
        groups = [pairs] if shared and together <= budget else [[pair] for pair in pairs]
        for group in groups:
            choices = [choice for _, choice in group]
            room = max(1, budget - sum(map(len, choices)))
            context = (group[0][0] or [model.config.bos_token_id])[-room:]  # the end of it, where it is too long
            needed = len(context) + sum(map(len, choices))
            if packed and length + needed > budget:
                yield packed
                packed, length = [], 0
            packed.append((number, context, choices))
            length += needed
    if packed:
        yield packed


@torch.inference_mode()
def log_probabilities(model, packed):
    """The sum of the log-probabilities of each choice's tokens, in the order of the pack: one sequence for all of it.

    A token sees what stands before it in its own choice and in its context, and has the position that it would have
    alone. So the choices of a question share the work for the context, and nothing is padded.
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
    """Yield (choices, number of the right one, scores of all) for each question, as soon as it is answered."""
    encoded = [[encode(tokenizer, context, choice) for choice in choices] for context, choices, _ in asked]
    scores = [[] for _ in asked]
    print(f"{name}: {len(asked):,} questions", file=sys.stderr, flush=True)
    with tqdm(total=len(asked), desc=name, unit=" questions", disable=None) as bar:
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
    n, accuracy = len(answers), right / len(answers)
    return {
        "questions": n,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / n),
        "accuracy_by_sum": right_by_sum / n,
        "gold_bits_per_byte": nats / math.log(2) / size,
    }


# ---- The command ----------------------------------------------------------------------------------------------------


def table(results):
    lines = ["task            questions   accuracy    error    by sum   chance     135M   360M   1.7B   bits per byte"]
    for name, result in results.items():
        published = "".join(f"{score:7.1f}" for score in TASKS[name].published).ljust(21)
        percent = [100 * result[key] for key in ("accuracy", "standard_error", "accuracy_by_sum")]
        numbers = f"{percent[0]:8.1f} %  +- {percent[1]:4.1f}  {percent[2]:6.1f} %   {TASKS[name].chance:4.0f} %"
        lines.append(f"{name:<15}{result['questions']:10,}  {numbers} {published} {result['gold_bits_per_byte']:12.3f}")
    return "\n".join(lines)


def main(settings):
    names = list(TASKS) if settings.tasks == "all" else settings.tasks.split(",")
    for name in names:
        if name not in TASKS:
            sys.exit(f"--tasks={settings.tasks}: {name} is none of {', '.join(TASKS)}.")
    device = set_up_device(settings.device)
    dtype = training_dtype(settings.dtype, device)
    try:
        folders = [find_model(settings.model)]
        if settings.all_checkpoints:
            folders = (os.path.isdir(settings.model) and list_checkpoints(settings.model)) or folders
        tokenizer = Tokenizer.from_file(os.path.join(folders[-1], "tokenizer.json"))
    except ValueError as error:
        sys.exit(str(error))
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"{folders[-1]} has no readable tokenizer.json: {error}")
    asked = {name: questions(name, TASKS[name], settings.limit) for name in names}
    for folder in folders:
        path = (Path(folder) if os.path.isdir(settings.model) else Path()) / "evaluation.json"
        try:
            model = SmolLM2.from_pretrained(folder, dtype, device)
            before = read_json(path).get("tasks", {}) if path.exists() else {}
        except ValueError as error:
            sys.exit(str(error))
        answers, stopped = {name: [] for name in names}, False
        try:
            for name in names:
                for answer in evaluate(model, tokenizer, asked[name], settings.batch_tokens, name):
                    answers[name].append(answer)
        except KeyboardInterrupt:  # what is answered counts
            stopped = True
        results = {name: result for name in names if (result := summary(answers[name]))}
        content = {"model": Path(settings.model).as_posix(), "dtype": str(dtype), "tasks": before | results}
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
        print(f"{folder if settings.all_checkpoints else settings.model}\n{table(results)}\n", flush=True)
        if stopped:
            sys.exit("stopped: the table has the questions answered so far")


if __name__ == "__main__":
    run(main, "evaluate", Settings)
