"""Text from a checkpoint, through the command line."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, environment, refused, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from model import SmolLM2, SmolLM2Config

PROMPT = "--prompt=7: A cat"


def test_it_writes_what_it_learned(trained):
    text = run("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=60", "--temperature=0")
    assert text.startswith("7: A cat")
    assert "<|endoftext|>" not in text
    assert any(words in text for words in ("sees", "hears", "follows"))


def test_the_seed_decides_the_text(trained):
    def text(*args):
        return run("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=30", *args)

    assert text() == text("--seed=0") != text("--seed=1")


def test_several_samples_from_a_prompt_in_a_file(trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("7: A cat")
    prompt = f"--prompt=FILE:{tmp_path / 'prompt.txt'}"
    text = run("sample.py", f"--model={trained}", prompt, "--num_samples=3", "--max_new_tokens=8")
    samples = text.split("\n" + "-" * 80 + "\n")
    assert len(samples) == 3 and all(sample.startswith("7: A cat") for sample in samples)
    assert len(set(samples)) > 1


def test_how_fast_it_was(trained):
    done = subprocess.run(
        command("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=20", "--stats=True"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"[\d,]+\.\d tokens per second, the first after \d+\.\d\d s", said)
    assert "tokens per second" not in done.stdout


def test_speed_counts_what_comes_after_the_first_token(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    trace = sample.Trace()
    for tokens in (3, 3, 1):
        trace.add(7, tokens)
    assert trace.ids == [7, 7, 7]
    assert str(trace) == "4.0 tokens per second, the first after 2.00 s"


def test_a_text_that_has_ended_stays_as_it_is(trained):
    """Rows end at different tokens; what comes after the end of one is not shown, and not counted."""
    _, tokenizer, _ = sample.load(sample.Settings(model=str(trained)))
    letters = [tokenizer.token_to_id(letter) for letter in "abc"]
    assert None not in letters
    rows = [[letters[0], 0, letters[1]], [letters[1], letters[2], 0]]

    class Rows(Spells):
        def generate(self, *args, **options):
            return (torch.tensor(step) for step in zip(*self.ids, strict=True))

    trace, two = sample.Trace(), sample.Settings(num_samples=2)
    pieces = list(sample.streams(Rows([[*row, letters[0]] for row in rows]), tokenizer, [1], two, None, trace))
    assert ["".join(row) for row in zip(*pieces, strict=True)] == ["a", "bc"]
    assert trace.counted == 1


def test_an_empty_prompt_begins_a_document(trained):
    assert run("sample.py", f"--model={trained}", "--prompt=", "--max_new_tokens=20").strip()


def test_model_by_run_by_checkpoint_and_from_the_hub(trained, hub):
    arguments = (PROMPT, "--max_new_tokens=20")
    by_run = run("sample.py", f"--model={trained}", *arguments)
    assert run("sample.py", f"--model={trained / 'checkpoint-000040'}", *arguments) == by_run
    assert run("sample.py", f"--model={trained / 'checkpoint-000020'}", *arguments) != by_run
    shutil.copytree(trained / "checkpoint-000040", hub.folder / "models" / "somebody" / "talk")
    assert run("sample.py", "--model=somebody/talk", *arguments, **hub.environment) == by_run
    assert not any("trainer_state" in request for request in hub.requests)


# ---- Conversations


def converse(questions, *args, errors="", **variables):
    done = subprocess.run(
        command("sample.py", "--chat=True", "--temperature=0", "--dtype=float32", *args),
        cwd=ROOT,
        text=True,
        env=environment(**variables),
        input="".join(f"{question}\n" for question in questions),
        capture_output=True,
    )
    assert done.returncode == 0 and errors in done.stderr, done.stderr
    return done.stdout.split("\n\n")[:-1]


def test_a_conversation_is_that_of_transformers(instruct, hub):
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    shutil.copytree(instruct, hub.folder / "models" / name)
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    theirs = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    questions, messages, forgot = [f"{number}?" for number in range(6)], [], False
    answers = converse(questions, f"--model={name}", "--max_new_tokens=12", **hub.environment)
    assert len(answers) == len(questions) and len(set(answers)) > 1
    for question, answer in zip(questions, answers, strict=True):
        messages.append({"role": "user", "content": question})
        while (ids := encode(tokenizer, messages)).size(1) > 128 - 12:  # what does not fit is forgotten
            messages, forgot = messages[2:], True
        new = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.size(1) :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    assert forgot


def encode(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)


def test_a_question_that_is_too_long_is_said_to_be(instruct):
    args = f"--model={instruct}", "--max_new_tokens=12"
    assert converse(["?" * 200, "7?"], *args, errors="more than the model's 128") == converse(["7?"], *args)


@pytest.mark.slow
def test_where_chat_templates_stand(instruct, trained, tmp_path):
    folder = shutil.copytree(instruct, tmp_path / "instruct")
    template, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    in_config = json.dumps(json.loads(path.read_text()) | {"chat_template": template.read_text()})
    template.unlink()
    assert "chat template" in refused("sample.py", f"--model={folder}", "--chat=True")
    path.write_text(in_config)  # as the published ones have it
    assert converse(["7?"], f"--model={folder}") == converse(["7?"], f"--model={instruct}")
    template.write_text("{% for %}")
    assert "chat template" in refused("sample.py", f"--model={folder}", "--chat=True")
    run("sample.py", f"--model={folder}", "--max_new_tokens=4")  # who does not chat does not mind
    assert "SmolLM2-135M-Instruct" in refused("sample.py", f"--model={trained}", "--chat=True")


def test_a_chat_template_runs_in_a_sandbox(instruct, tmp_path):
    folder = shutil.copytree(instruct, tmp_path / "instruct")
    reach = "{{ ().__class__.__base__.__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(reach)
    done = subprocess.run(
        command("sample.py", "--chat=True", f"--model={folder}"),
        cwd=ROOT,
        text=True,
        env=environment(),
        input="7?\n",
        capture_output=True,
    )
    assert "unsafe" in done.stdout + done.stderr and "Traceback" not in done.stderr


# ---- Pieces


class Spells:
    """A model that writes given tokens."""

    config = SmolLM2Config()

    def __init__(self, ids):
        self.ids = ids

    def generate(self, *args, **options):
        return (torch.tensor([id]) for id in self.ids)


def test_only_whole_characters_are_printed_and_no_special_tokens():
    alphabet = {letter: id + 1 for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0} | alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    text = "né \U0001f600!"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    generator = torch.Generator()
    model, prompt = Spells([*ids[:3], 257, *ids[3:], 0, 1]), tokenizer.encode("a").ids
    pieces = list(sample.stream(model, tokenizer, prompt, sample.Settings(), generator))
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--temperature=-1", "--temperature"),
        ("--top_p=0", "--top_p"),
        ("--top_k=-1", "--top_k"),
        ("--max_new_tokens=200", "128"),
        ("--prompt=FILE:nowhere.txt", "nowhere.txt"),
        ("--model=no/such", "no/such"),
        ("--model=/nowhere", "/nowhere"),
        ("--device=abacus", "abacus"),
    ],
)
def test_bad_settings(argument, answer, trained):
    assert answer in refused("sample.py", f"--model={trained}", argument)


def test_logits_that_are_no_numbers(trained, tmp_path):
    model = SmolLM2.from_pretrained(trained)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    folder = shutil.copytree(trained / "checkpoint-000040", tmp_path / "model")
    model.save_pretrained(folder)
    for temperature in (0, 1):
        sentence = refused("sample.py", f"--model={folder}", f"--temperature={temperature}", "--max_new_tokens=5")
        assert "NaN" in sentence and len(sentence.splitlines()) == 1


def test_every_way_of_choosing_arrives(trained):
    def text(*args):
        return run("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=30", "--temperature=1.5", *args)

    likeliest = text("--temperature=0")
    assert text("--top_k=1") == text("--top_p=1e-9") == likeliest
    assert text("--top_k=0") != text("--top_k=3") != likeliest
    assert len(text("--max_new_tokens=3")) < len(likeliest)


def test_almost_no_temperature_is_none(trained):
    arguments = ("sample.py", f"--model={trained}", PROMPT, "--max_new_tokens=20")
    assert run(*arguments, "--temperature=1e-42") == run(*arguments, "--temperature=0")


def test_an_interrupt_while_it_loads(trained):
    code = "import runpy, sys, time, model\nmodel.SmolLM2.from_pretrained = lambda *args: (print(1), time.sleep(60))\n"
    code += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, "sample.py", f"--model={trained}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].strip() == ""
    assert process.returncode == 130


def test_a_folder_that_is_no_model(tmp_path, trained):
    assert "config.json" in refused("sample.py", f"--model={tmp_path}")
    shutil.copytree(trained / "checkpoint-000040", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused("sample.py", f"--model={tmp_path / 'model'}")
