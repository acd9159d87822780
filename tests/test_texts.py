"""Texts of every kind: huge ones, whatever their script; folders of code; what is left out."""

import os
import pty
import random
import re
import subprocess
import termios

from plumbing import python_docs
from plumbing.pieces import pieces as pieces_of

import numpy as np
import pytest
from conftest import ROOT, command, environment, refused, run, sentences
from test_faults import start
from test_prepare import documents, record, write_jsonl, write_parquet
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

RANDOM = random.Random(0)
HAN = [chr(0x4E00 + number) for number in range(2000)]


def text_of(kind, length):
    if kind == "words":
        text = " ".join(sentences(length // 100))
    elif kind == "chinese":
        text = "".join(RANDOM.choices([*HAN * 10, *"\uff0c\u3002" * 200], k=length))
    elif kind == "table":
        text = "\n".join(",".join(str(RANDOM.randrange(10**6)) for _ in range(8)) for _ in range(length // 50))
    else:
        text = "".join(RANDOM.choices("ACGT", k=length))
    return (text * (length // len(text) + 1))[:length]


# ---- Huge documents


def trained_on(texts, pre_tokenizer, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def byte_level(*before, **options):
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(**options)])


def in_threes():
    """Digits in groups of three from the left, as in Llama 3: where a group begins depends on all before it."""
    return pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|[^\s\p{L}\p{N}]+|\s+"), "isolated")


TOKENIZERS = {
    "SmolLM2's": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), add_prefix_space=False),
    "with a space in front": lambda: byte_level(add_prefix_space=True),
    "digits in threes": lambda: byte_level(in_threes(), add_prefix_space=False, use_regex=False),
    "metaspace": lambda: pre_tokenizers.Metaspace(),
    "words": lambda: pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]),
}


@pytest.mark.parametrize("kind", ["words", "chinese", "table", "numbers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_cutting_a_huge_text_does_not_change_its_tokens(name, kind):
    text = "a " + "7" * 3000 + text_of("table", 7000).replace("\n", "") if kind == "numbers" else text_of(kind, 10_000)
    text += " I'll say: naïve\t\t\n\n  (3)..." * 30
    unknown = {} if name.startswith(("SmolLM2", "with", "digits")) else {"unk_token": "<|endoftext|>"}
    tokenizer = trained_on([text], TOKENIZERS[name](), **unknown)
    pieces = [piece for _, piece, _ in pieces_of([("train", text)], tokenizer, size=500)]
    assert "".join(pieces) == text
    if kind == "words" or name not in ("with a space in front", "metaspace"):  # these can be cut at spaces only
        assert len(pieces) > 3
    assert [id for piece in pieces for id in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_groups_of_digits_are_counted_from_their_beginning():
    """Where a group of four begins, in a long number, depends on all digits before it, not on those nearby."""
    in_fours = pre_tokenizers.Split(Regex(r"\p{N}{1,4}|[^\p{N}]+"), "isolated")
    text = f"a {'0123456789' * 3001} b {'77' * 5001}"
    tokenizer = trained_on([text], byte_level(in_fours, add_prefix_space=False, use_regex=False))
    pieces = [piece for _, piece, _ in pieces_of([("train", text)], tokenizer, size=2501)]
    assert len(pieces) > 10 and "".join(pieces) == text
    assert [id for piece in pieces for id in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_where_nothing_can_be_cut_nothing_is():
    genome = text_of("genome", 3000)
    tokenizer = trained_on([genome], TOKENIZERS["SmolLM2's"]())
    assert list(pieces_of([("train", genome)], tokenizer, size=100)) == [("train", genome, True)]
    whole = Tokenizer(models.BPE({"A": 0, "C": 1, "G": 2, "T": 3, " ": 4}, []))  # it has no words
    assert len(list(pieces_of([("train", f"{genome} {genome}")], whole, size=100))) == 1


def test_a_text_is_not_cut_inside_of_an_added_token_nor_of_a_letter_with_its_accent():
    tokenizer = trained_on(["red rose " * 9], byte_level(add_prefix_space=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("red rose", normalized=False)])
    text = "red rose; e\u0301" * 500
    pieces = [piece for _, piece, _ in pieces_of([("train", text)], tokenizer, size=100)]
    assert len(pieces) > 10
    assert [id for piece in pieces for id in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length"), [("words", 50_000_000), ("chinese", 15_000_000), ("table", 30_000_000)])
def test_a_huge_document_needs_little_memory(kind, length, data, tmp_path):
    text = text_of(kind, length // 10) * 10
    (tmp_path / "huge.txt").write_text(text)
    size = len(text.encode())
    del text
    to = f"--tokenizer={data / 'tokenizer.json'}", f"--data_dir={tmp_path / 'out'}", "--val_fraction=0"
    process = start(*command("prepare.py", f"--source={tmp_path}/huge.txt", *to))
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    assert usage.ru_maxrss < 1.5e6, "kilobytes"
    assert record(tmp_path / "out")["train"]["bytes"] == size


# ---- Files of text


def test_a_folder_of_code(tmp_path, data):
    code = tmp_path / "code"
    for path, content in {
        "main.py": b"print('hello')",
        "deep/er/notes.md": "# Naïve".encode(),
        "paper.tex": b"\\begin{document}",
        "Makefile": b"all:\n\ttrue",
        "logo.png": b"\x89PNG\r\n\x1a\n\x00",
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
        ".git/config": b"[core]",
    }.items():
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        (code / path).write_bytes(content)
    args = (f"--data_dir={tmp_path / 'out'}", f"--tokenizer={data / 'tokenizer.json'}", "--val_fraction=0")
    printed = run("prepare.py", f"--source={code}", *args)
    assert "left out: 2 of 7 files" in printed
    assert documents(tmp_path / "out", "train") == ["all:\n\ttrue", "# Naïve", "print('hello')", "\\begin{document}"]
    assert "byte 3 is not text" in refused(
        "prepare.py", f"--source={code / 'latin.txt'}", f"--data_dir={tmp_path / 'x'}", *args[1:]
    )
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "logo.png").write_bytes(b"\x00")
    assert "has no text" in refused("prepare.py", f"--source={tmp_path / 'none'}", *args)


def test_docstrings_of_a_library(tmp_path):
    """The longer ones, in the order of the file, of whatever has one; nothing is imported."""
    a, b, c = (f"{name} " + "x" * (length - 2) for name, length in (("a", 201), ("b", 200), ("c", 300)))
    source = f'"""{a}"""\nclass B:\n    """{b}"""\n    async def c(self):\n        """{c}"""\n'
    (tmp_path / "library.py").write_text(source + "raise SystemExit\n")
    assert python_docs.docstrings_of(tmp_path / "library.py") == [a, c]
    (tmp_path / "other.py").write_text("print 'Python 2'")
    assert python_docs.docstrings_of(tmp_path / "other.py") == []


def on_a_terminal(*args):
    """What a script shows to a person."""
    shown, inside = [], None
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(command(*args), cwd=ROOT, env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    while inside != b"":
        try:
            inside = os.read(controller, 4096)
        except OSError:  # it has ended
            break
        shown.append(inside)
    assert process.wait() == 0
    return b"".join(shown).decode()


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.parquet", "folder"])
def test_progress_knows_its_end(name, tmp_path):
    texts = sentences(300)
    path = tmp_path / name
    if name.endswith("jsonl"):
        write_jsonl(path, [{"text": text} for text in texts])
    elif name.endswith("parquet"):
        write_parquet(path, text=texts)
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(text)
    shown = on_a_terminal("prepare.py", f"--source={path}", f"--data_dir={tmp_path / 'out'}", "--tokenizer=train:300")
    assert "300/300" in shown
    assert re.search(r"Pre-processing sequences\D+300 +/ +300", shown)


# ---- What the corpus is counted by


def test_ids_of_a_vocabulary_with_gaps(tmp_path):
    """An embedding needs the largest id and one, not as many rows as there are tokens."""
    words = models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 70}, "a")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "gaps.json"))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b " * 40 + str(n)} for n in range(20)])
    run("prepare.py", f"--source={source}", f"--data_dir={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'gaps.json'}")
    assert record(tmp_path / "out")["vocab_size"] == 71


def test_baselines_of_a_full_vocabulary():
    from plumbing.baselines import baselines

    everything = np.arange(65_536).astype("<u2")
    losses = baselines(everything, everything[-5:])
    assert losses["unigram_loss"] == pytest.approx(np.log(65_536))


def test_baselines_stay_when_one_shard_has_no_document_to_evaluate_on(tmp_path, data):
    from plumbing.bins import open_corpus

    for number, fraction in enumerate((0.5, 0.0)):
        source = write_jsonl(tmp_path / "talk.jsonl", [{"text": text} for text in sentences(40, seed=number)])
        args = f"--source={source}", f"--data_dir={tmp_path / str(number)}", f"--tokenizer={data / 'tokenizer.json'}"
        run("prepare.py", *args, f"--val_fraction={fraction}")
    for path in (tmp_path / "1").glob("*-00000.*"):
        path.rename(tmp_path / "0" / path.name.replace("00000", "00001"))
    corpus = open_corpus(tmp_path / "0", 32, 0, 640)
    assert len(corpus.shards) == 2
    assert corpus.baselines["bigram_loss"] == record(tmp_path / "0")["val"]["bigram_loss"]


def test_the_bytes_of_tokens_that_are_no_bytes():
    """A tokenizer of whole words: what its decoder writes is counted."""
    from plumbing.bins import count_bytes

    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "na\u00efve": 1, "cat": 2}, "cat"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert count_bytes(tokenizer, np.array([[1, 2, 0]])) == len("naïve cat".encode())
    tokenizer.decoder = decoders.WordPiece()
    assert count_bytes(tokenizer, np.array([[1, 2, 0], [2, 2, 2]])) == len("naïve cat".encode()) + len("cat cat cat")
