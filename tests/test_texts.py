"""Texts of every kind: huge ones, folders of files, docstrings; and what a corpus is counted by."""

import itertools
import json
import random
import re

from plumbing.corpus import count_bytes, open_corpus
from plumbing.python_docs import docstrings_of
from plumbing.tokens import HUGE, baselines, pieces

import numpy as np
import pytest
from conftest import preparing, run, sentences, write_jsonl
from runs import prepare_here, refused_by, second_shard, train_here
from test_prepare import bins, documents, record
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prepare import train_tokenizer

RANDOM = random.Random(0)
HAN = [chr(0x4E00 + number) for number in range(2000)]
TEXTS = {
    "words": lambda length: " ".join(sentences(length // 100)),
    "chinese": lambda length: "".join(RANDOM.choices([*HAN * 10, *"\uff0c\u3002" * 200], k=length)),
    "table": lambda length: "\n".join(",".join(random_numbers(8)) for _ in range(length // 50)),
    "numbers": lambda length: f"a {'0123456789' * 300} b " + ",".join(random_numbers(length // 6)),
    "genome": lambda length: "".join(RANDOM.choices("ACGT", k=length)),
}


def random_numbers(count):
    return [str(RANDOM.randrange(10**6)) for _ in range(count)]


def text_of(kind, length):
    text = TEXTS[kind](length)
    return (text * (length // len(text) + 1))[:length]


# ---- Huge documents


def trained_on(text, pre_tokenizer):
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def byte_level(*before, **options):
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, **options)])


SMOLLM2 = byte_level(pre_tokenizers.Digits(individual_digits=True))


def digits_in(group):
    """Digits in groups from the left, as Llama 3 has them in threes: where one begins depends on all before it."""
    words = Regex(rf"\p{{N}}{{1,{group}}}| ?\p{{L}}+|\s+(?!\S)|[^\s\p{{L}}\p{{N}}]+|\s+")
    return byte_level(pre_tokenizers.Split(words, "isolated"), use_regex=False)


TOKENIZERS = {
    "SmolLM2's": SMOLLM2,
    "with a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits in threes": digits_in(3),
    "digits in fours": digits_in(4),
    "metaspace": pre_tokenizers.Metaspace(),
    "words": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]),
}


def assert_cutting_changes_nothing(tokenizer, text, size, least):
    parts = list(pieces(tokenizer, text, size))
    assert "".join(parts) == text and len(parts) >= least
    assert [id for part in parts for id in tokenizer.encode(part).ids] == tokenizer.encode(text).ids


@pytest.mark.parametrize("kind", ["words", "chinese", "table", "numbers"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_cutting_a_huge_text_does_not_change_its_tokens(name, kind):
    text = text_of(kind, 15_000) + " I'll say: naïve\t\t\n\n  (3)..." * 30
    only_at_spaces = name in ("with a space in front", "metaspace") and kind != "words"
    tokenizer = trained_on(text, TOKENIZERS[name])
    assert_cutting_changes_nothing(tokenizer, text, 2501, 1 if only_at_spaces else 4)


def test_where_nothing_can_be_cut_nothing_is():
    genome = text_of("genome", 3000)
    assert list(pieces(trained_on(genome, SMOLLM2), genome, size=100)) == [genome]
    without_words = Tokenizer(models.BPE({"A": 0, "C": 1, "G": 2, "T": 3, " ": 4}, []))
    assert len(list(pieces(without_words, f"{genome} {genome}", size=100))) == 1
    joining = trained_on(text := "e\u0301 and " * 500, byte_level())
    joining.normalizer = normalizers.NFC()  # a letter and its accent, across any cut
    assert list(pieces(joining, text, size=100)) == [text]


def test_a_text_is_not_cut_inside_of_an_added_token():
    tokenizer = trained_on("red rose " * 9, byte_level())
    tokenizer.add_tokens([AddedToken("red rose", normalized=False)])
    assert_cutting_changes_nothing(tokenizer, "red rose; " * 500, 100, 10)


def test_a_huge_document_has_the_tokens_that_it_has_in_one_piece(tmp_path, tokenizer):
    text = text_of("words", 2 * HUGE) + text_of("table", 2 * HUGE)
    source = write_jsonl(tmp_path / "a.jsonl", ["A cat.", text, "A dog."])
    prepare_here(*preparing(source, tmp_path, tokenizer, "--val_fraction=0"))
    whole = Tokenizer.from_file(str(tokenizer)).encode_batch(["A cat.", text, "A dog."])
    assert bins(tmp_path)["train"].tolist() == [id for encoding in whole for id in (*encoding.ids, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "length", "trained"),
    [
        ("words", 50_000_000, ""),
        ("chinese", 15_000_000, ""),
        ("table", 30_000_000, ""),
        ("words", 30_000_000, "train:300"),
    ],
)
def test_a_huge_document_needs_little_memory(kind, length, trained, tokenizer, tmp_path):
    path = tmp_path / "huge.txt"
    path.write_text(text_of(kind, length // 10) * 10)
    args = preparing(path, tmp_path / "out", trained or tokenizer, "--val_fraction=0")
    # The peak that a process tells of itself: the one its parent is told begins with the parent's own.
    peak = "import atexit; atexit.register(lambda: print(open('/proc/self/status').read()))"
    printed = run("tests/patched.py", peak, "prepare.py", *args)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", printed)[1]) < 1.5e6
    assert record(tmp_path / "out")["train"]["bytes"] == path.stat().st_size


# ---- Files of text


def test_a_folder_of_code(tmp_path, tokenizer):
    code = tmp_path / "code"
    for path, content in {
        "main.py": b"print('hello')",
        "deep/er/notes.md": "# Naïve".encode(),
        "paper.tex": b"\xef\xbb\xbf\\begin{document}\r\n",  # with the marks that Windows makes
        "Makefile": b"all:\n\ttrue",
        "logo.png": b"\x89PNG\r\n\x1a\n\x00",
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
        ".git/config": b"[core]",
    }.items():
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        (code / path).write_bytes(content)
    args = preparing(code, tmp_path / "out", tokenizer, "--val_fraction=0")
    printed = prepare_here(*args)
    assert f"left out, not plain text in UTF-8: {code}/latin.txt, {code}/logo.png\n" in printed
    assert "each file is a document: 1 without an ending, 1 .md, 1 .txt, 1 .py, 1 .tex\n" in printed
    texts = ["all:\n\ttrue", "# Naïve", "print('hello')", "\\begin{document}\n"]
    assert documents(tmp_path / "out", "train") == texts
    assert "has no text" in refused_by(prepare_here, *args, f"--source={code / 'logo.*g'}")


def test_one_text_is_split_within_itself(tmp_path):
    """What a student brings: a single file, and no flag but the size of a tokenizer."""
    text = "\n\n".join(f"{number}. {sentence} Naïve?" for number, sentence in enumerate(sentences(200)))
    (tmp_path / "input.txt").write_text(text)
    printed = prepare_here(*preparing(tmp_path / "input.txt", tmp_path / "out"))
    assert "too few documents, 1, to keep whole ones" in printed
    (train,), (val,) = (documents(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n\n") and 0.1 * len(text) <= len(val) < 0.12 * len(text)
    shard = record(tmp_path / "out")
    assert shard["split"] == "within documents" and shard["val_fraction"] == 0.1
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    alone = train_tokenizer("train:300", [train]).get_vocab()
    assert vocabulary == alone, "the tokenizer has seen what is for evaluation"
    train_here(tmp_path / "out", tmp_path / "run", "--max_steps=2", "--seq_len=64")


def test_a_few_books_are_split_within_each_and_many_between_them(tmp_path, tokenizer):
    """No part of a text is on both sides, also where a text is there twice."""
    books = ["A cat. " * 200, "Her bird\n" * 300, "The sun. " * 90]
    source = write_jsonl(tmp_path / "few.jsonl", [*books, books[0]])
    prepare_here(*preparing(source, tmp_path / "few", tokenizer))
    sides = [documents(tmp_path / "few", split) for split in ("train", "val")]
    assert [first + last for first, last in zip(*sides, strict=True)] == [*books, books[0]]
    assert [last.count(" ") and last[0] for last in sides[1]] == ["A", "H", "T", "A"], "cut inside of a word"
    letter = "Dear Anna,\n\n" + "the cat sees the sun. " * 99
    source = write_jsonl(tmp_path / "letters.jsonl", [letter, "Hi"])  # the one too short to be cut
    prepare_here(*preparing(source, tmp_path / "letters", tokenizer))
    (first, hi), (last,) = (documents(tmp_path / "letters", split) for split in ("train", "val"))
    assert (first + last, hi) == (letter, "Hi") and len(last) < 0.2 * len(letter), "too much, for a better cut"
    source = write_jsonl(tmp_path / "many.jsonl", sentences(60))
    assert "too few documents, 3" in prepare_here(*preparing(source, tmp_path / "3", tokenizer, "--max_documents=3"))
    prepare_here(*preparing(source, tmp_path / "many", tokenizer, "--val_fraction=0.5"))
    sides = [documents(tmp_path / "many", split) for split in ("train", "val")]
    assert sorted(itertools.chain(*sides)) == sorted(sentences(60)) and min(map(len, sides)) > 15


def test_what_was_read_as_what_is_said(tmp_path, tokenizer):
    """A .json that is a list of objects with a text is read as .jsonl is; a PDF is no text even where its bytes are."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps([{"text": "A cat."}, {"text": "A dog."}]))
    (folder / "settings.json").write_text('{"a": 1}')
    (folder / "table.csv").write_text("a,b")
    (folder / "paper.pdf").write_text("%PDF-1.4")
    (folder / "letter.docx").write_bytes(b"PK\0")
    args = preparing(folder, tmp_path / "out", tokenizer, "--val_fraction=0")
    printed = prepare_here(*args)
    assert "rows are documents: 1 .json\n" in printed and "each file is a document: 1 .json, 1 .csv\n" in printed
    left_out = f"{folder}/letter.docx, {folder}/paper.pdf; pandoc and pdftotext can make"
    assert f"left out, not plain text in UTF-8: {left_out}" in printed
    assert [documents(tmp_path / "out", "train", index) for index in (0, 1)] == [
        ["A cat.", "A dog."],
        ['{"a": 1}', "a,b"],
    ]
    assert "pdftotext" in refused_by(prepare_here, *args, f"--source={folder / 'paper.pdf'}")


def test_docstrings_of_a_library(tmp_path):
    """The longer ones, in the order of the file, of whatever has one; nothing is imported."""
    a, b, c = (f"{name} " + "x" * (length - 2) for name, length in (("a", 201), ("b", 200), ("c", 300)))
    source = f'"""{a}"""\nclass B:\n    """{b}"""\n    async def c(self):\n        """{c}"""\n'
    (tmp_path / "library.py").write_text(source + "raise SystemExit\n")
    assert list(docstrings_of(tmp_path / "library.py")) == [("", a), ("B", b), ("B.c", c)]
    (tmp_path / "other.py").write_text("print 'Python 2'")
    assert list(docstrings_of(tmp_path / "other.py")) == []


# ---- What the corpus is counted by


def test_ids_of_a_vocabulary_with_gaps(tmp_path):
    """An embedding needs the largest id and one, not as many rows as there are tokens."""
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 70}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "gaps.json"))
    prepare_here(*preparing(write_jsonl(tmp_path / "a.jsonl", ["a b"]), tmp_path, tmp_path / "gaps.json"))
    assert record(tmp_path)["vocab_size"] == 71


def test_baselines_of_a_full_vocabulary():
    everything = np.arange(65_536).astype("<u2")
    assert baselines(everything, everything[-5:])["unigram_loss"] == pytest.approx(np.log(65_536))


def test_baselines_stay_when_one_shard_has_no_document_to_evaluate_on(tmp_path, tokenizer):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, fraction in ((one, 0.5), (other, 0.0)):
        source = write_jsonl(tmp_path / "talk.jsonl", sentences(40))
        prepare_here(*preparing(source, folder, tokenizer, f"--val_fraction={fraction}"))
    second_shard(one, other)
    corpus = open_corpus(one, 32, 0, 640)
    assert len(corpus.shards) == 2
    assert corpus.baselines["bigram_loss"] == record(one)["val"]["bigram_loss"]


def test_the_bytes_of_tokens_that_are_no_bytes():
    """A tokenizer of whole words: what its decoder writes is counted."""
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "na\u00efve": 1, "cat": 2}, "cat"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokens, learned = np.array([[1, 2, 0], [2, 2, 2]]), np.array([[True, True, True], [True, False, True]])
    assert count_bytes(tokenizer, tokens[:1], learned[:1]) == len("naïve cat".encode())
    tokenizer.decoder = decoders.WordPiece()
    assert count_bytes(tokenizer, tokens, learned) == len("naïve cat".encode()) + len("cat cat")
