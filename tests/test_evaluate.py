"""Accuracy on multiple-choice tasks: every number against transformers and lm-eval, every task from the mock hub."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, command, environment, metrics, preparing, refused, run, sentences, write_jsonl
from huggingface_hub import ModelCard
from runs import prepare_here
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from model import SmolLM2
from tools import evaluate
from tools.tasks import TASKS

CHECKPOINT = "checkpoint-000040"


def test_how_well_a_model_predicts_a_text(trained, data, other_data, tmp_path):
    """As training measures it, without training; a text that it was not trained on is harder."""
    last = metrics(trained)[-1]
    alike = "--seq_len=32", "--eval_tokens=640", "--dtype=float32"
    printed = run("tools.evaluate", f"--model={trained}", f"--data_dir={data}", *alike)
    assert float(re.search(r"val_bpb ([\d.]+)", printed)[1]) == pytest.approx(last["val_bpb"], rel=1e-3)
    mixed = run("tools.evaluate", f"--model={trained}", f"--data_dir={data}:1,{other_data}:1")
    easy, hard = (float(re.search(rf"val_bpb/{name} ([\d.]+)", mixed)[1]) for name in (data.name, "sums"))
    assert easy < hard
    prepare_here(*preparing(write_jsonl(tmp_path / "a.jsonl", sentences(3)), tmp_path / "few", data))
    assert "val_bpb" in run("tools.evaluate", f"--model={trained}", f"--data_dir={tmp_path / 'few'}")  # 128 positions


def labelled(*texts, labels="ABCDE", **row):
    """A row of one of the datasets that give their choices labels."""
    return row | {"id": "x", "choices": {"text": list(texts), "label": list(labels[: len(texts)])}}


# A row of each task in its dataset's own schema, the context that it makes, its choices, and the right one.
HEADER = dict(ind=4, activity_label="Roof shingle removal", ctx="unused", split="val", label="3")
START = dict(ctx_a="A man is sitting on a roof. [header] Tools [title] He", ctx_b="he")
ENDINGS = ["is using  wrap.", "[step] rips tiles.", "holds a cube.", "starts pulling."]
ROWS = {
    "hellaswag": (
        HEADER | START | dict(endings=ENDINGS),
        "Roof shingle removal: A man is sitting on a roof. Tools. He He ",
        [" is using wrap.", "  rips tiles.", " holds a cube.", " starts pulling."],
        3,
    ),
    "arc_easy": (
        labelled("smoke", "stone", "lead", question="Which rises?", answerKey="A"),
        "Question: Which rises?\nAnswer:",
        [" smoke", " stone", " lead"],
        0,
    ),
    "arc_challenge": (
        labelled("smoke", "stone", "gas", "steam", labels="1234", question="Which falls?", answerKey="2"),
        "Question: Which falls?\nAnswer:",
        [" smoke", " stone", " gas", " steam"],
        1,
    ),
    "piqa": (
        dict(goal="Open a jar.", sol1="Turn it.", sol2="Eat it.", label=0),
        "Question: Open a jar.\nAnswer:",
        [" Turn it.", " Eat it."],
        0,
    ),
    "winogrande": (
        dict(sentence="The cat saw the mouse, so the _ ran.", option1="cat", option2="mouse", answer="2"),
        "The cat saw the mouse, so the ",
        ["cat ran.", "mouse ran."],
        1,
    ),
    "openbookqa": (
        labelled("cold", "hot", "wet", "green", question_stem="The sun is", answerKey="B"),
        "The sun is",
        [" cold", " hot", " wet", " green"],
        1,
    ),
    "commonsense_qa": (
        labelled("sea", "ice", "hive", question="Where do bees live?", question_concept="bees", answerKey="C"),
        "Where do bees live?",
        [" sea", " ice", " hive"],
        2,
    ),
    "mmlu": (
        dict(question="2 + 2?", subject="abstract_algebra", choices=["3", "4", "5", "6"], answer=1),
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
    assert {name: (task.chance, *task.published) for name, task in TASKS.items()} == {
        "hellaswag": (25, 42.1, 54.5, 68.7),
        "arc_easy": (25,),
        "arc_challenge": (25,),
        "piqa": (50, 68.4, 71.7, 77.6),
        "winogrande": (50, 51.3, 52.5, 59.4),
        "openbookqa": (25, 34.6, 37.4, 42.2),
        "commonsense_qa": (20, 33.9, 38.0, 43.6),
        "mmlu": (25, 31.5, 35.8),
    }


# ---- Scores


@pytest.fixture(scope="module")
def loaded(trained):
    """Model and tokenizer, and the same model by transformers."""
    folder = trained / CHECKPOINT
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return SmolLM2.from_pretrained(folder), tokenizer, AutoModelForCausalLM.from_pretrained(folder)


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


def score(model, tokenizer, questions, budget):
    """The scores of all choices, one after the other."""
    encoded = [[evaluate.encode(tokenizer, context, choice) for choice in choices] for context, choices in questions]
    packs = evaluate.pack(model, encoded, budget)
    return [score for packed in packs for score in evaluate.log_probabilities(model, packed)]


@pytest.mark.parametrize("budget", [1024, 128, 16])
def test_scores_are_those_of_transformers_however_they_are_packed(budget, loaded):
    model, tokenizer, theirs = loaded
    room, wanted = model.config.max_position_embeddings, []
    for context, choice in (evaluate.encode(tokenizer, text, choice) for text, them in QUESTIONS for choice in them):
        wanted.append(score_by_transformers(theirs, (context or [0])[-(room - len(choice)) :], choice))
    assert score(model, tokenizer, QUESTIONS, budget) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
def test_scores_are_those_of_lm_eval(trained, loaded):
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(trained / CHECKPOINT), device="cpu", dtype="float32", batch_size=1)
    questions = QUESTIONS[:2] + QUESTIONS[4:]
    pairs = [SimpleNamespace(args=(context, choice)) for context, choices in questions for choice in choices]
    theirs = [score for score, _ in harness.loglikelihood(pairs)]
    assert score(*loaded[:2], questions, 64) == pytest.approx(theirs, abs=1e-4)


def test_who_knows_the_answers_has_all_and_who_guesses_has_chance(loaded, monkeypatch):
    rng = random.Random(0)
    asked = [("Which?", [f" {rng.randrange(1000, 9999)}" for _ in range(4)], rng.randrange(4)) for _ in range(400)]
    model = SmolLM2(loaded[0].config)
    torch.nn.init.zeros_(model.lm_head.weight)
    uniform = evaluate.summary(list(evaluate.evaluate(model, loaded[1], asked, 1024, "")))
    low, high = uniform["interval"]
    assert low < 0.25 < high and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert uniform["gold_bits_per_byte"] == pytest.approx(math.log2(300))  # a token for each character
    golds = iter([number == gold for _, choices, gold in asked for number in range(4)])

    def knowing(model, packed):
        return [0.0 if next(golds) else -9.0 for _, _, choices in packed for _ in choices]

    monkeypatch.setattr(evaluate, "log_probabilities", knowing)
    assert evaluate.summary(list(evaluate.evaluate(model, loaded[1], asked, 1024, "")))["accuracy"] == 1

    by_characters = evaluate.summary([([" a long answer", " no"], 0, [-6.0, -4.0])])
    assert (by_characters["accuracy"], by_characters["accuracy_by_sum"]) == (1, 0)


def test_all_right_of_a_few_is_not_certain():
    assert evaluate.interval(50, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)  # as in a table of Wilson's
    assert evaluate.interval(0, 8) == pytest.approx([0, 0.3244], abs=1e-4)
    eight = evaluate.summary([([" yes", " no"], 0, [-1.0, -9.0])] * 8)
    above, header, row = evaluate.table({"hellaswag": eight}).splitlines()
    assert " 100.0%     67.6 to 100.0 " in row
    start, end = above.index("published, base models"), len(above)
    assert header[start:end].split() == ["135M", "360M", "1.7B"] and row[start:end].split() == ["42.1", "54.5", "68.7"]


# ---- The command


def stock(hub, task, rows, by_a_script=False):
    """Put a task's rows into its dataset: as parquet with a README that names it; or with a loading script, where the
    hub has on another branch what it makes."""
    repo = hub.folder / "datasets" / task.dataset
    folder = repo.with_name(f"{repo.name}@refs-convert-parquet") if by_a_script else repo
    header = [f"- config_name: {task.config}", "  data_files:"]
    for split in task.splits:
        path = folder / task.config / split / "0000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        header.append(f"  - {{split: {split}, path: {task.config}/{split}/*.parquet}}")
    repo.mkdir(parents=True, exist_ok=True)
    if by_a_script:
        (repo / f"{repo.name}.py").write_text("a loading script")
    else:
        readme = repo / "README.md"
        before = readme.read_text().removesuffix("---\n") if readme.exists() else "---\nconfigs:\n"
        readme.write_text(before + "\n".join([*header, "---\n"]))
    hub.revisions.add(task.revision)


@pytest.fixture
def tasks(hub):
    for name, task in TASKS.items():
        stock(hub, task, [ROWS[name][0]] * 3, by_a_script=name in ("piqa", "winogrande"))
    return hub


@pytest.fixture
def mine(trained, tmp_path):
    """A copy of the run, to write into."""
    return shutil.copytree(trained, tmp_path / "mine")


def read(folder, name="tasks"):
    return json.loads((folder / "evaluation.json").read_text())[name]


@pytest.mark.slow
def test_all_tasks_from_the_hub(tasks, mine, loaded):
    printed = run("tools.evaluate", f"--model={mine}", "--tasks=all", "--dtype=float32", **tasks.environment)
    written, (_, tokenizer, theirs) = read(mine / CHECKPOINT), loaded
    assert list(written) == list(TASKS)
    for name, (_, context, choices, gold) in ROWS.items():
        scores = [score_by_transformers(theirs, *evaluate.encode(tokenizer, context, choice)) for choice in choices]
        by_length = [score / len(choice.removeprefix(" ")) for score, choice in zip(scores, choices, strict=True)]
        assert written[name]["questions"] == 3
        assert written[name]["accuracy"] == (by_length.index(max(by_length)) == gold), name
        assert written[name]["accuracy_by_sum"] == (scores.index(max(scores)) == gold), name
        bits = -scores[gold] / math.log(2) / len(choices[gold].encode())
        assert written[name]["gold_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
        assert f"\n{name} " in printed


@pytest.mark.slow
def test_every_checkpoint_and_a_limit_and_the_card(tasks, mine):
    arguments = f"--model={mine}", "--limit=2", "--all_checkpoints=True"
    run("tools.evaluate", *arguments, "--tasks=arc_easy", **tasks.environment)
    run("tools.evaluate", *arguments, "--tasks=piqa", **tasks.environment)  # what was found before stays
    for name in ("checkpoint-000020", CHECKPOINT):
        found = read(mine / name)
        assert [found[task]["questions"] for task in ("arc_easy", "piqa")] == [2, 2]
        card = ModelCard.load(mine / name / "README.md")
        assert card.data.model_name == "mine" and "| data | talk.jsonl |" in card.content
        first, second = card.data.eval_results
        where = first.dataset_type, first.dataset_config, first.dataset_split, first.dataset_revision
        assert where == ("allenai/ai2_arc", "ARC-Easy", "test", TASKS["arc_easy"].revision)
        assert "2 questions" in first.metric_name
        assert [first.metric_value, second.metric_value] == [found[task]["accuracy"] for task in ("arc_easy", "piqa")]
    path = mine / CHECKPOINT / "evaluation.json"
    path.write_text(path.read_text().replace(CHECKPOINT, "another"))
    run("tools.evaluate", f"--model={mine / CHECKPOINT}", "--limit=1", "--tasks=piqa, piqa", **tasks.environment)
    (result,) = read(mine / CHECKPOINT).values()  # not what was found of another model, and nothing twice
    assert result["questions"] == 1


@pytest.mark.slow
def test_what_is_answered_stays_when_it_is_interrupted(hub, mine):
    stock(hub, TASKS["arc_easy"], [ROWS["arc_easy"][0]] * 20_000)
    line = command("tools.evaluate", f"--model={mine}", "--tasks=arc_easy", "--batch_tokens=64")
    pipes, env = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), environment(**hub.environment)
    process = subprocess.Popen(line, cwd=ROOT, env=env, **pipes)
    while "20,000 questions" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert "answered so far" in errors, errors
    answered = read(mine / CHECKPOINT)["arc_easy"]["questions"]
    assert 0 < answered < 20_000 and f"{answered:,}" in printed


def test_a_choice_longer_than_the_model_is_left_out_and_counted(loaded, capsys):
    model, tokenizer, _ = loaded
    asked = [("7: A", [" cat", " dog"], 0), ("8: A", [" cat", " 9" * 200], 1)]
    assert [right for _, right, _ in evaluate.evaluate(model, tokenizer, asked, 64, "two")] == [0]
    assert "1 questions, 1 left out: longer than the model" in capsys.readouterr().err


def test_scores_are_printed_where_the_card_is_damaged(mine, monkeypatch, capsys):
    (mine / CHECKPOINT / "README.md").write_text("---\n{: [\n---\n")
    before = {"model": CHECKPOINT, "dtype": "torch.float32", "tasks": {"no longer known": {}}}
    (mine / CHECKPOINT / "evaluation.json").write_text(json.dumps(before))
    monkeypatch.setattr(evaluate, "questions", lambda *args: [("7: A", [" cat", " dog"], 0)])
    evaluate.main(evaluate.Settings(model=str(mine), tasks="piqa", dtype="float32", device="cpu"))
    printed = capsys.readouterr()
    assert "piqa" in printed.out and "README.md is damaged" in printed.err
    assert read(mine / CHECKPOINT).keys() == {"no longer known", "piqa"}


def test_what_cannot_be_evaluated(hub, trained, tmp_path):
    few = f"--model={trained}", "--tasks=piqa"
    assert "is none of hellaswag" in refused("tools.evaluate", f"--model={trained}", "--tasks=poetry")
    assert "not a folder" in refused("tools.evaluate", "--model=/nowhere", "--tasks=piqa")
    sentence = refused("tools.evaluate", *few, HF_HUB_OFFLINE=1, HF_HOME=tmp_path / "cache").splitlines()[-1]
    assert re.fullmatch(r"piqa, which is ybisk/piqa on the hub: the hub cannot be reached \(\w+\)\.", sentence)
    good = ROWS["piqa"][0]
    stock(hub, TASKS["piqa"], [good, good | {"label": -1}])
    assert "row 1 of validation" in refused("tools.evaluate", *few, **hub.environment)
