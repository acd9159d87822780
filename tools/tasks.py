"""The tasks that the SmolLM2 family was published with: where their questions are, and how they are asked.

A task makes (context, choices, number of the right one) of a row of its dataset. Prompts, splits and revisions are
those of the published evaluation: text/evaluation/tasks.py of https://github.com/huggingface/smollm at c552527, with
LightEval at ea46419.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from plumbing.sources import hub_errors

# ---- Prompts --------------------------------------------------------------------------------------------------------


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


# ---- Datasets -------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """Where the questions of a task are, the accuracy of random guessing, and the published accuracy of the 135M, 360M
    and 1.7B, in percent."""

    ask: Callable
    dataset: str
    config: str
    splits: tuple
    chance: float
    published: tuple = ()

    @property
    def revision(self):
        return REVISIONS[self.dataset]

    def for_card(self, name, result):
        """The accuracy as an entry of a model card."""
        where = dict(dataset_type=self.dataset, dataset_config=self.config, dataset_revision=self.revision)
        where |= dict(dataset_name=name, dataset_split="+".join(self.splits))
        what = f"accuracy by characters, {result['questions']:,} questions"
        score = dict(metric_type="acc_norm", metric_name=what, metric_value=result["accuracy"])
        return dict(task_type="multiple-choice", task_name="zero-shot, cloze form") | where | score


REVISIONS = {
    "Rowan/hellaswag": "6002345709e0801764318f06bf06ce1e7d1a1fe3",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "ybisk/piqa": "2e8ac2dffd59bac8c3c6714948f4c551a0848bb0",
    "allenai/winogrande": "85ac5b5a3b7a930e22d590176e39460400d19e41",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
    "tau/commonsense_qa": "94630fe30dad47192a8546eb75f094926d47e155",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
}

VALIDATION, TEST = ("validation",), ("test",)
TASKS = {
    "hellaswag": Task(hellaswag, "Rowan/hellaswag", "default", VALIDATION, 25, (42.1, 54.5, 68.7)),
    "arc_easy": Task(arc, "allenai/ai2_arc", "ARC-Easy", TEST, 25),  # the mean of both is published: 43.9, 53.0, 60.5
    "arc_challenge": Task(arc, "allenai/ai2_arc", "ARC-Challenge", TEST, 25),
    "piqa": Task(piqa, "ybisk/piqa", "plain_text", VALIDATION, 50, (68.4, 71.7, 77.6)),
    "winogrande": Task(winogrande, "allenai/winogrande", "winogrande_xl", VALIDATION, 50, (51.3, 52.5, 59.4)),
    "openbookqa": Task(openbookqa, "allenai/openbookqa", "main", TEST, 25, (34.6, 37.4, 42.2)),
    "commonsense_qa": Task(commonsense_qa, "tau/commonsense_qa", "default", VALIDATION, 20, (33.9, 38.0, 43.6)),
    "mmlu": Task(mmlu, "cais/mmlu", "all", TEST, 25, (31.5, 35.8)),
}


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
