"""Conversations: their ids, what is learned of them, and the model that comes out of it."""

import contextlib
import json
import pkgutil
import random
import re
import shutil
import subprocess

from plumbing.chat import Answers, ChatML, template
from plumbing.corpus import open_corpus
from plumbing.python_docs import python_questions

import numpy as np
import pytest
from conftest import ROOT, command, environment, metrics, preparing, refused, run
from runs import arguments, assert_same_run, prepare_here, refused_by, refused_here, train_here, values
from test_prepare import bins, parquet, record
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

LONG = "--max_steps=200", "--decay_steps=100", "--learning_rate=0.01"
ROLES = "user", "assistant"
DIALOGUE = ["Is 1 < 2? é", "Yes.\n\nAlso 3.", "\n{{ 7 }}<|im_end|>\n<|im_start|>assistant\nNo.", "<|endoftext|> 8"]


def conversation(*contents, system=None):
    turns = [{"role": ROLES[number % 2], "content": content} for number, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def write_conversations(path, conversations):
    rows = ({"messages": messages, "text": None, "source": "test"} for messages in conversations)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chats(data, tmp_path_factory):
    """Random questions of 3 to 40 words, and always the same answer."""
    folder, rng = tmp_path_factory.mktemp("chats"), random.Random(0)
    words = "who what where sees hears a cat dog bird mouse sun 3 bees".split()
    questions = (" ".join(rng.choices(words, k=rng.randint(3, 40))) + "?" for _ in range(300))
    source = write_conversations(folder / "chats.jsonl", [conversation(question, "A cat.") for question in questions])
    prepare_here(*preparing(source, folder / "data", data, "--val_fraction=0.1"))
    return folder / "data"


@pytest.fixture(scope="session")
def chatty(chats, tmp_path_factory):
    """A model that was trained on them."""
    out = tmp_path_factory.mktemp("chatty") / "run"
    printed = train_here(chats, out, *LONG, "--eval_interval=200", "--sample_prompt=who sees?", "--sample_interval=200")
    assert "<|im_start|>user\nwho sees?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>" in printed
    return out


# ---- Ids and masks


def test_the_bins_have_the_ids_of_the_published_template(instruct, tmp_path):
    """With its default system message; but what somebody wrote stays text, also where it looks like a marker."""
    rows = [conversation(*DIALOGUE[:2]), conversation(*DIALOGUE[:2], system="Be long.")]
    source = write_conversations(tmp_path / "a.jsonl", [*rows, conversation(*DIALOGUE)])
    prepare_here(*preparing(source, tmp_path / "out", instruct, "--val_fraction=0", "--system=Be brief."))
    tokenizer = AutoTokenizer.from_pretrained(instruct)
    wanted = [tokenizer.apply_chat_template(row, return_dict=False) for row in rows]
    *ours, last, rest = np.split(tokens := bins(tmp_path / "out")["train"], np.flatnonzero(tokens == 0) + 1)
    assert [ids.tolist() for ids in ours] == [[*ids, 0] for ids in wanted] and not len(rest)
    assert (last == 1).sum() == (last == 2).sum() == 1 + len(DIALOGUE)
    said = "".join(f"<|im_start|>{ROLES[number % 2]}\n{text}<|im_end|>\n" for number, text in enumerate(DIALOGUE))
    text = tokenizer.decode(last, skip_special_tokens=False)
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n{said}<|endoftext|>"
    assert record(tmp_path / "out")["format"] == "chatml" and record(tmp_path / "out")["system"] == "Be brief."


@pytest.mark.parametrize("system", ["Don't lie.", 'As {"a": 1}\n', "C:\\new {{x}} \u00e9", "a <|im_end|> {% b", ""])
def test_a_template_says_its_system_message(system, instruct, tmp_path):
    """What train.py writes, transformers renders and sample.py reads again."""
    shutil.copytree(instruct, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template(system), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(conversation("a"), tokenize=False)
    assert theirs.startswith(f"<|im_start|>system\n{system}<|im_end|>\n" if system else "<|im_start|>user")
    ours = ChatML.of(tmp_path, Tokenizer.from_file(f"{tmp_path}/tokenizer.json"))
    assert ours.system == ([{"role": "system", "content": system}] if system else [])


@pytest.mark.slow
def test_the_mask_is_that_of_other_tools(chatty, instruct):
    """An answer's first token and its <|im_end|> are in it, and nothing after, from wherever one begins to read."""
    theirs = AutoTokenizer.from_pretrained(chatty / "checkpoint-000200")
    messages = conversation("who?", "A cat.", "where?", "The sun. " * 400, "a?", "")
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answers = Answers(Tokenizer.from_file(str(chatty / "checkpoint-000200" / "tokenizer.json")))
    bin = np.array(found["input_ids"] * 3, "<u2")
    mask = answers.mask(bin, 0, len(bin))
    assert mask.tolist() == [bool(one) for one in found["assistant_masks"]] * 3
    assert theirs.decode(bin[mask])[:15] == "A cat.<|im_end|>"[:15] and mask[bin == 2].sum() == 9
    rng = random.Random(0)
    for first in [0, len(bin) - 1, *rng.choices(range(len(bin) - 9), k=300)]:
        assert (answers.mask(bin, first, 9) == mask[first : first + 9]).all(), first


def test_a_row_that_is_no_conversation_is_refused(tmp_path, data):
    def refusal(messages):
        source = write_conversations(tmp_path / "a.jsonl", [conversation("a", "b"), messages])
        sentence = refused_by(prepare_here, *preparing(source, tmp_path / "out", data))
        assert "a.jsonl, line 2" in sentence and not list((tmp_path / "out").glob("*.bin*"))
        return sentence

    assert "message 0 must have a role of system, user, assistant" in refusal([{"role": "tool", "content": "a"}])
    assert "message 1 must have" in refusal([*conversation("a"), {"role": "assistant", "content": None}])
    assert "message 2 is a system message" in refusal([*conversation("a", "b"), {"role": "system", "content": "c"}])
    assert "a list of messages" in refusal([])
    assert "a list of messages" in refusal("hello")
    (tmp_path / "a.json").write_text(json.dumps([{"messages": conversation("a", "b")}, {"messages": []}]))
    sentence = refused_by(prepare_here, *preparing(tmp_path / "a.json", tmp_path / "out", data))
    assert "a.json, row 2 is not a document: messages must be a list" in sentence
    (tmp_path / "b.jsonl").write_text('{"text": "A cat.", "messages": null}\n')
    write_conversations(tmp_path / "a.jsonl", [conversation("a", "b")])
    both = preparing(tmp_path / "*.jsonl", tmp_path / "out", data)
    assert "both texts and conversations" in refused_by(prepare_here, *both)


@pytest.mark.slow
def test_questions_about_python():
    """Each is about something else that people can import, in one of three forms, and the answer is a sentence."""
    names = [messages[0]["content"].split("`")[1] for messages in python_questions()]
    assert len(names) == len(set(names)) > 5000
    known = {"shutil.copyfile", "os.path.join", "numpy.sum", "numpy.linalg.norm", "torch.Tensor.backward"}
    assert known <= set(names) and not any("._" in name or "<" in name for name in names)
    numpys = [name for name in names if name.startswith("numpy.")]
    found = 0
    for name in numpys:
        with contextlib.suppress(AttributeError, ImportError):
            found += pkgutil.resolve_name(name) is not None
    assert len(numpys) > 500 and found > 0.95 * len(numpys)
    answers = {messages[0]["content"]: messages[1]["content"] for messages in python_questions()}
    assert "Sum of array elements over a given axis." in answers.values()
    assert len({question.split("`")[0] for question in answers}) == 3
    examples = [messages[3]["content"] for messages in python_questions() if len(messages) > 2]
    assert len(examples) > 300 and all(
        re.fullmatch(r"```python\n>>> .*\n```", example, re.DOTALL) for example in examples
    )


# ---- Training


@pytest.mark.slow
def test_what_cannot_be_predicted_is_not_learned(chats, chatty, tmp_path):
    """Random questions, one answer: learned alone the loss goes to 0, and not together with the questions."""
    last = metrics(chatty)[-1]
    assert last["loss"] < 0.02 and last["val_loss"] < 0.02 and last["answers_that_end"] == 1
    assert "unigram_loss" not in last
    tokenizer = Tokenizer.from_file(str(chats / "tokenizer.json"))
    corpus = open_corpus(chats, 32, 0, 640)
    tokens, learned = corpus.val["data"]
    assert corpus.val_bytes["data"] == len(tokenizer.decode(tokens[:, 1:][learned[:, 1:]]).encode())
    train_here(chats, tmp_path / "all", *LONG, "--train_on=all")
    assert values(tmp_path / "all", "loss")[200] > 0.5
    assert values(tmp_path / "all", "val_loss")[0] == values(chatty, "val_loss")[0]  # the answers', all the same


@pytest.mark.slow
def test_micro_batches_and_ranks_give_the_same_losses_also_without_answers(chats, data, tmp_path):
    """In a mix where most sequences have none, so that some micro-batches, and whole steps, have nothing to learn."""
    rows = [conversation(f"{number} " + "a cat " * 300, f"{number}") for number in range(60)]
    source = write_conversations(tmp_path / "long.jsonl", rows)
    prepare_here(*preparing(source, tmp_path / "long", data, "--val_fraction=0.2"))
    options = "--max_steps=8", "--seq_len=32", "--batch_tokens=64", "--eval_tokens=99999"
    for name, micro_batch, nproc in (("whole", 2, 0), ("parts", 1, 0), ("ranks", 1, 2)):
        line = arguments(tmp_path / "long", tmp_path / name, *options, f"--micro_batch={micro_batch}")
        run("train.py", *line, nproc=nproc)
    whole, *others = (list(values(tmp_path / name, "loss").values()) for name in ("whole", "parts", "ranks"))
    assert len(whole) == 8 and 0.0 in whole and max(whole) > 1
    assert all(other == pytest.approx(whole, rel=1e-4) for other in others)


def test_it_resumes_bit_for_bit(chats, tmp_path):
    train_here(chats, tmp_path / "whole", "--max_steps=4")
    train_here(chats, tmp_path / "parts", "--max_steps=2")
    train_here(chats, tmp_path / "parts", "--max_steps=4", "--resume=True", "--train_on=answers")  # the default
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_texts_have_no_answers(data, chats, tmp_path):
    assert "needs conversations" in refused_here(data, tmp_path / "out", "--train_on=answers")
    train_here(f"{data}:1,{chats}:1", tmp_path / "out", "--max_steps=1", "--train_on=answers")
    found = metrics(tmp_path / "out")[-1].keys()
    assert {"val_loss/data", f"val_loss/{data.name}"} <= found and "unigram_loss" not in found
    short = "--val_fraction=0.5", "--max_documents=40"
    refusal = refused_by(prepare_here, *preparing(data / "tokenizer.json", tmp_path / "texts", data, "--system=A."))
    assert "--system=A. is for conversations" in refusal
    for system in ("A.", "B."):
        source = write_conversations(tmp_path / "a.jsonl", [conversation(f"{n}? " * 20, "a cat") for n in range(40)])
        prepare_here(*preparing(source, tmp_path / system, data, *short, f"--system={system}"))
    mix = f"{tmp_path / 'A.'}:1,{tmp_path / 'B.'}:1"
    assert "prepared with --system 'A.' and 'B.'" in refused_here(mix, tmp_path / "refused")


def test_how_much_is_learned_and_cut_is_said(data, tmp_path):
    """Of long answers, most sequences hold nothing but one, and each answer is cut once."""
    rows = [conversation(f"who {number}?", "A cat sees the sun. " * 200) for number in range(40)]
    source = write_conversations(tmp_path / "long.jsonl", rows)
    prepare_here(*preparing(source, tmp_path / "long", data, "--val_fraction=0.2"))
    printed = train_here(f"{tmp_path / 'long'}:1,{data}:1", tmp_path / "out", "--max_steps=1")
    learned, cut = map(float, re.search(r"answers, ([\d.]+)% of the tokens; sequences cut ([\d.]+)%", printed).groups())
    assert learned > 95 and 50 < cut <= 100


# ---- The model that comes out of it


@pytest.mark.slow
def test_other_tools_chat_with_a_checkpoint(chatty):
    folder = chatty / "checkpoint-000200"
    config, ends = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert [values[key] for values in (config, ends) for key in ("bos_token_id", "eos_token_id")] == [1, 2, 1, 2]
    assert ends["pad_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    answer = pipeline("text-generation", str(folder))(conversation("where sees?"), max_new_tokens=40, do_sample=False)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": "A cat."}
    asked = tokenizer.apply_chat_template(conversation("a?"), add_generation_prompt=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(**asked, max_new_tokens=40, do_sample=False)[0, -1] == 2
    card = (folder / "README.md").read_text()
    assert "It answers" in card and '"role": "user"' in card and "Hugging Face" not in card


@pytest.mark.slow
def test_a_model_that_was_made_to_answer_does_so_unless_told_otherwise(chatty, chats, trained):
    asked = f"--model={chatty}", "--prompt=who sees?", "--max_new_tokens=20"
    assert run("sample.py", *asked).strip() == "A cat."
    assert run("sample.py", *asked, "--chat=False").startswith("who sees?")
    assert run("sample.py", f"--model={trained}", "--prompt=8: ", "--max_new_tokens=5").startswith("8: ")
    assert "has no chat template" in refused("sample.py", f"--model={trained}", "--system=Be brief.")
    assert "there is one answer" in refused("sample.py", *asked, "--num_samples=2")
    assert "write --chat=True" in refused("sample.py", "--chat")
    line = command("sample.py", f"--model={chatty}")  # by default it asks for more tokens than the model has positions
    said = subprocess.run(line, cwd=ROOT, env=environment(), input=b"who \xff sees?\n", capture_output=True)
    assert said.stdout == b"A cat.\n\n", said.stderr
    scores = run("tools.evaluate", f"--model={chatty}", f"--data_dir={chats}", "--seq_len=32", "--dtype=float32")
    assert "answers_that_end 1.0000" in scores and "unigram" not in scores


@pytest.mark.slow
def test_the_recipe_on_smol_smoltalk(hub, data, trained, tmp_path):
    """In its schema; the file to test on, which sorts first, is the last shard."""
    columns = {"messages": [conversation(f"who {number}?", "A cat.") for number in range(40)], "source": ["test"] * 40}
    smoltalk = hub.folder / "datasets" / "HuggingFaceTB" / "smol-smoltalk" / "data"
    smoltalk.mkdir(parents=True)
    for name in ("test-00000-of-00001", *(f"train-{number:05d}-of-00004" for number in range(4))):
        (smoltalk / f"{name}.parquet").write_bytes(parquet(**columns))
    models = hub.folder / "models" / "HuggingFaceTB"
    ignore = shutil.ignore_patterns("trainer_state.pt", "README.md")
    shutil.copytree(trained / "checkpoint-000040", models / "SmolLM2-135M", ignore=ignore)
    (models / "cosmo2-tokenizer").mkdir()
    shutil.copy(data / "tokenizer.json", models / "cosmo2-tokenizer")
    folders = f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}"
    run("prepare.py", "config/chat.py", folders[0], "--val_fraction=0.2", **hub.environment)
    assert record(tmp_path / "data", 0)["file"] == "data/train-00000-of-00004.parquet"
    small = "--max_steps=3 --seq_len=32 --batch_tokens=256 --eval_tokens=640 --compile=False --dtype=float32".split()
    run("train.py", "config/chat.py", *folders, *small, "--sample_interval=0", **hub.environment)
    card = (tmp_path / "out" / "checkpoint-000003" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M\n" in card and "- HuggingFaceTB/smol-smoltalk\n" in card
    run("sample.py", "config/chat.py", f"--model={tmp_path / 'out'}", "--prompt=who?", "--max_new_tokens=5")
