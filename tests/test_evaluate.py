"""Accuracy on multiple-choice tasks: every number against transformers and lm-eval, every task from a hub."""

import json
import math
import random
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, command, environment, refused, run
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from model import SmolLM2
from tools import evaluate
from tools.tasks import TASKS

CHECKPOINT = "checkpoint-000040"

# A row of each task in its dataset's own schema, the context that it makes, its choices, and the right one.
ROWS = {
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof. [header] Tools [title] He",
            "ctx_b": "he",
            "ctx": "unused",
            "endings": ["is using  wrap.", "[step] rips tiles.", "holds a cube.", "starts pulling."],
            "split": "val",
            "label": "3",
        },
        "Roof shingle removal: A man is sitting on a roof. Tools. He He ",
        [" is using wrap.", "  rips tiles.", " holds a cube.", " starts pulling."],
        3,
    ),
    "arc_easy": (
        {
            "id": "x",
            "question": "Which rises?",
            "choices": {"text": ["smoke", "stone", "lead"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        "Question: Which rises?\nAnswer:",
        [" smoke", " stone", " lead"],
        0,
    ),
    "arc_challenge": (
        {
            "id": "y",
            "question": "Which falls?",
            "choices": {"text": ["smoke", "stone", "gas", "steam"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
        "Question: Which falls?\nAnswer:",
        [" smoke", " stone", " gas", " steam"],
        1,
    ),
    "piqa": (
        {"goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Eat it.", "label": 0},
        "Question: Open a jar.\nAnswer:",
        [" Turn it.", " Eat it."],
        0,
    ),
    "winogrande": (
        {"sentence": "The cat saw the mouse, so the _ ran.", "option1": "cat", "option2": "mouse", "answer": "2"},
        "The cat saw the mouse, so the ",
        ["cat ran.", "mouse ran."],
        1,
    ),
    "openbookqa": (
        {
            "id": "z",
            "question_stem": "The sun is",
            "choices": {"text": ["cold", "hot", "wet", "green"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        "The sun is",
        [" cold", " hot", " wet", " green"],
        1,
    ),
    "commonsense_qa": (
        {
            "id": "q",
            "question": "Where do bees live?",
            "question_concept": "bees",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["sea", "ice", "hive", "sand", "moon"]},
            "answerKey": "C",
        },
        "Where do bees live?",
        [" sea", " ice", " hive", " sand", " moon"],
        2,
    ),
    "mmlu": (
        {"question": "2 + 2?", "subject": "abstract_algebra", "choices": ["3", "4", "5", "6"], "answer": 1},
        "The following are questions about abstract algebra.\nQuestion: 2 + 2?\nAnswer:",
        [" 3", " 4", " 5", " 6"],
        1,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_published_ones(name):
    row, *wanted = ROWS[name]
    assert list(TASKS[name].ask(row)) == wanted


def test_the_published_scores_and_chance():
    """A table of its own, so that none of the numbers changes by chance."""
    published = {name: (task.chance, *task.published) for name, task in TASKS.items() if task.published}
    assert published == {
        "hellaswag": (25, 42.1, 54.5, 68.7),
        "piqa": (50, 68.4, 71.7, 77.6),
        "winogrande": (50, 51.3, 52.5, 59.4),
        "openbookqa": (25, 34.6, 37.4, 42.2),
        "commonsense_qa": (20, 33.9, 38.0, 43.6),
        "mmlu": (25, 31.5, 35.8),
    }
    assert TASKS["arc_easy"].chance == TASKS["arc_challenge"].chance == 25


def stock(hub, task, rows, broken=False):
    """Put a task's rows into its dataset, as parquet with a README that names it, or as what a script would make."""
    repo = hub.folder / "datasets" / task.dataset
    if broken:
        repo.mkdir(parents=True, exist_ok=True)
        (repo / f"{repo.name}.py").write_text("a loading script")
    folder = repo.with_name(f"{repo.name}@refs-convert-parquet") if broken else repo
    header = []
    for split in task.splits:
        path = folder / task.config / split / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        header.append(f"  - {{split: {split}, path: {task.config}/{split}/*.parquet}}")
    readme = repo / "README.md"
    before = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
    lines = f"- config_name: {task.config}\n  data_files:\n" + "\n".join(header) + "\n---\n"
    if not broken:
        readme.write_text(before + lines)
    hub.revisions.add(task.revision)


@pytest.fixture
def tasks(hub):
    for name, task in TASKS.items():
        stock(hub, task, [ROWS[name][0]] * 3, broken=name in ("piqa", "winogrande"))
    return hub


@pytest.mark.slow
def test_all_tasks_from_the_hub(tasks, trained, tmp_path):
    trained = shutil.copytree(trained, tmp_path / "run")
    printed = run("tools.evaluate", f"--model={trained}", "--tasks=all", "--dtype=float32", **tasks.environment)
    written = json.loads((trained / CHECKPOINT / "evaluation.json").read_text())["tasks"]
    assert list(written) == list(TASKS)
    model, tokenizer = (
        SmolLM2.from_pretrained(trained),
        Tokenizer.from_file(str(trained / CHECKPOINT / "tokenizer.json")),
    )
    theirs = AutoModelForCausalLM.from_pretrained(trained / CHECKPOINT)
    for name, (_, context, choices, gold) in ROWS.items():
        scores = [score_by_transformers(theirs, *evaluate.encode(tokenizer, context, choice)) for choice in choices]
        lengths = [len(choice) - choice.startswith(" ") for choice in choices]
        best = max(range(len(choices)), key=lambda i: scores[i] / lengths[i])
        assert written[name]["questions"] == (6 if name == "openbookqa" else 3)
        assert written[name]["accuracy"] == (best == gold), name
        assert written[name]["accuracy_by_sum"] == (scores.index(max(scores)) == gold), name
        bits = -scores[gold] / math.log(2) / len(choices[gold].encode())
        assert written[name]["gold_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
        assert f"\n{name} " in printed
    assert model.config.vocab_size == 300


# ---- Scores


def score_by_transformers(theirs, context, choice):
    with torch.no_grad():
        logits = theirs(torch.tensor([context + choice])).logits[0].log_softmax(-1)
    return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(choice))


QUESTIONS = [
    ("7: A cat sees ", ["a mouse. The", " the sun", "3 bees"]),  # the space goes to the choice
    ("Her bird hea", ["rs the sun.", "rt"]),  # the choice's first letters belong to the context's last token
    ("", [" A cat", " The old dog follows"]),
    ("12: " + "The old dog follows 3 bees. " * 9, [" A", " Her bird sees a mouse. A cat hears the sun."]),
    ("A", ["n owl", " cat", " dog", " bird"]),
]


def test_scores_are_those_of_transformers_however_they_are_packed(trained):
    folder = trained / CHECKPOINT
    model, theirs = SmolLM2.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = [[evaluate.encode(tokenizer, context, choice) for choice in choices] for context, choices in QUESTIONS]
    room = model.config.max_position_embeddings
    wanted = [
        [score_by_transformers(theirs, (context or [0])[-(room - len(choice)) :], choice) for context, choice in pairs]
        for pairs in encoded
    ]
    for budget in (1024, 128):
        scores = [[] for _ in QUESTIONS]
        for packed in evaluate.pack(model, encoded, budget):
            found = iter(evaluate.log_probabilities(model, packed))
            for number, _, choices in packed:
                scores[number] += [next(found) for _ in choices]
        for ours, those in zip(scores, wanted, strict=True):
            assert ours == pytest.approx(those, abs=1e-4)


@pytest.mark.slow
def test_scores_are_those_of_lm_eval(trained):
    from lm_eval.models.huggingface import HFLM

    folder = str(trained / CHECKPOINT)
    harness = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    pairs = [(context, choice) for context, choices in QUESTIONS[:2] + QUESTIONS[4:] for choice in choices]
    theirs = [score for score, _ in harness.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])]
    model, tokenizer = SmolLM2.from_pretrained(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    encoded = [[evaluate.encode(tokenizer, *pair)] for pair in pairs]
    ours = [
        score for packed in evaluate.pack(model, encoded, 64) for score in evaluate.log_probabilities(model, packed)
    ]
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_who_knows_the_answers_has_all_and_who_guesses_has_chance(trained, monkeypatch):
    rng = random.Random(0)
    asked = [("Which?", [f" {rng.randrange(1000, 9999)}" for _ in range(4)], rng.randrange(4)) for _ in range(400)]
    model, tokenizer = (
        SmolLM2.from_pretrained(trained),
        Tokenizer.from_file(str(trained / CHECKPOINT / "tokenizer.json")),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    uniform = evaluate.summary(list(evaluate.evaluate(model, tokenizer, asked, 1024, "")))
    assert abs(uniform["accuracy"] - 0.25) < 3 * uniform["standard_error"]
    assert uniform["standard_error"] == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert uniform["gold_bits_per_byte"] == pytest.approx(math.log2(300))  # a token for each character
    golds = iter([number == gold for _, choices, gold in asked for number in range(4)])
    monkeypatch.setattr(
        evaluate,
        "log_probabilities",
        lambda model, packed: [0.0 if next(golds) else -9.0 for p in packed for _ in p[2]],
    )
    assert evaluate.summary(list(evaluate.evaluate(model, tokenizer, asked, 1024, "")))["accuracy"] == 1


def test_accuracy_is_by_the_characters_of_a_choice():
    answers = [([" a long answer", " no"], 0, [-6.0, -4.0])]
    assert evaluate.summary(answers)["accuracy"] == 1
    assert evaluate.summary(answers)["accuracy_by_sum"] == 0


# ---- The command


def test_what_cannot_be_evaluated(hub, trained, tmp_path):
    few = f"--model={trained}", "--tasks=piqa"
    assert "is none of hellaswag" in refused("tools.evaluate", f"--model={trained}", "--tasks=poetry")
    assert "not a folder" in refused("tools.evaluate", "--model=/nowhere", "--tasks=piqa")
    sentence = refused("tools.evaluate", *few, HF_HUB_OFFLINE=1, HF_HOME=tmp_path / "cache").splitlines()[
        -1
    ]  # after the client's retries
    assert sentence.startswith("piqa, which is ybisk/piqa on the hub: the hub cannot be reached")
    good = ROWS["piqa"][0]
    stock(hub, TASKS["piqa"], [good, good | {"label": -1}])
    assert "row 1 of validation" in refused("tools.evaluate", *few, **hub.environment)


@pytest.mark.slow
def test_every_checkpoint_and_a_limit_and_the_card(tasks, trained, tmp_path):
    own = shutil.copytree(trained, tmp_path / "mine")
    args = f"--model={own}", "--limit=2", "--all_checkpoints=True"
    run("tools.evaluate", *args, "--tasks=arc_easy", **tasks.environment)
    run("tools.evaluate", *args, "--tasks=piqa", **tasks.environment)  # what was found before stays
    for name in ("checkpoint-000020", CHECKPOINT):
        found = json.loads((own / name / "evaluation.json").read_text())["tasks"]
        assert [found[task]["questions"] for task in ("arc_easy", "piqa")] == [2, 2]
        card = ModelCard.load(own / name / "README.md")
        assert card.data.model_name == "mine" and "| data | talk.jsonl |" in card.content
        first, second = card.data.eval_results
        assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
            "allenai/ai2_arc",
            "ARC-Easy",
            "test",
        )
        assert first.dataset_revision == TASKS["arc_easy"].revision and "2 questions" in first.metric_name
        assert [first.metric_value, second.metric_value] == [found[task]["accuracy"] for task in ("arc_easy", "piqa")]
    path = own / CHECKPOINT / "evaluation.json"
    path.write_text(path.read_text().replace(CHECKPOINT, "another"))
    run("tools.evaluate", f"--model={own / CHECKPOINT}", "--limit=1", "--tasks=piqa", **tasks.environment)
    assert list(json.loads(path.read_text())["tasks"]) == ["piqa"]  # not what was found of another model


@pytest.mark.slow
def test_what_is_answered_stays_when_it_is_interrupted(hub, trained, tmp_path):
    trained = shutil.copytree(trained, tmp_path / "run")
    stock(hub, TASKS["arc_easy"], [ROWS["arc_easy"][0]] * 20_000)
    args = f"--model={trained}", "--tasks=arc_easy", "--batch_tokens=64"
    process = subprocess.Popen(
        command("tools.evaluate", *args),
        cwd=ROOT,
        env=environment(**hub.environment, PYTHONFAULTHANDLER=1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "20,000 questions" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert "answered so far" in errors, errors
    path = trained / CHECKPOINT / "evaluation.json"
    answered = json.loads(path.read_text())["tasks"]["arc_easy"]["questions"]
    assert 0 < answered < 20_000 and f"{answered:,}" in printed
