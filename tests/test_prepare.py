"""Documents to bins: every source, the same bytes however they come, and no damage from bad input."""

import hashlib
import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preparing, refused, run, sentences, write_jsonl
from hub import COMMIT
from runs import prepare_here, refused_by
from tokenizers import Tokenizer, models
from tqdm import tqdm

import prepare

TEXTS = sentences(60, seed=5)


def bins(folder, index=0):
    return {split: np.fromfile(folder / f"{split}-{index:05d}.bin", "<u2") for split in ("train", "val")}


def record(folder, index=0):
    return json.loads((folder / f"shard-{index:05d}.json").read_text())


def documents(folder, split, index=0):
    """The documents of a bin, as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    *texts, rest = np.split(tokens := bins(folder, index)[split], np.flatnonzero(tokens == 0) + 1)
    assert not len(rest)
    return [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in texts]


def parquet(**columns):
    """The content of a parquet file."""
    pq.write_table(pa.table(columns), file := io.BytesIO())
    return file.getvalue()


def write_texts(path, texts):
    """As a jsonl file, a parquet file, or a folder of text files."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, texts)
    if path.suffix == ".parquet":
        path.write_bytes(parquet(prompt=["x"] * len(texts), text=texts))
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:03d}.txt").write_text(text)
    return path


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", TEXTS)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Prepare a source into a folder below tmp_path, and return the folder."""

    def prepare(source, *args, name="out"):
        prepare_here(*preparing(source, tmp_path / name, tokenizer), "--val_fraction=0.2", *args)
        return tmp_path / name

    return prepare


# ---- Bins


def test_bins_hold_the_documents_and_json_says_what_they_are(prepared, tmp_path, tokenizer):
    out = prepared(write_jsonl(tmp_path / "a.jsonl", TEXTS * 2))
    shard, sides = record(out), {split: documents(out, split) for split in ("train", "val")}
    assert sorted(sides["train"] + sides["val"]) == sorted(TEXTS * 2)
    assert not set(sides["train"]) & set(sides["val"])  # the two copies of a text are on one side
    assert 4 <= len(sides["val"]) <= 50
    for split, texts in sides.items():
        content = (out / f"{split}-00000.bin").read_bytes()
        assert texts == [text for text in TEXTS * 2 if text in texts]  # in their order
        assert ("unigram_loss" in shard[split], "bigram_loss" in shard[split]) == ((split == "val"),) * 2
        assert {name: value for name, value in shard[split].items() if not name.endswith("loss")} == {
            "documents": len(texts),
            "tokens": len(content) // 2,
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert shard["vocab_size"] == 300
    assert shard["tokenizer_sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.lock"))


def test_every_local_source_gives_the_same_tokens_and_knows_its_end(prepared, tmp_path, monkeypatch):
    contents, bars = set(), []
    monkeypatch.setattr(prepare, "tqdm", lambda **bar: bars.append(bar) or tqdm(**bar))
    for name in ("a.jsonl", "a.parquet", "texts"):
        out = prepared(write_texts(tmp_path / name, TEXTS), name=f"from {name}")
        contents.add(tuple((out / f"{split}-00000.bin").read_bytes() for split in ("train", "val")))
    assert len(contents) == 1
    assert [bar["total"] for bar in bars] == [60] * 3


def test_each_file_is_a_shard_and_the_split_does_not_depend_on_the_files(prepared, source, tmp_path):
    for number in range(3):
        write_jsonl(tmp_path / f"part{number}.jsonl", TEXTS[number * 20 :][:20])
    parts, whole = prepared(tmp_path / "part*.jsonl", name="parts"), prepared(source, name="whole")
    assert [text for index in range(3) for text in documents(parts, "val", index)] == documents(whole, "val")
    some = prepared(tmp_path / "part*.jsonl", "--shards=0,2", "--max_documents=17", name="some")
    assert sorted(path.name for path in some.glob("shard-*")) == ["shard-00000.json", "shard-00002.json"]
    first = {split: documents(some, split, 2) for split in ("train", "val")}
    assert sum(map(len, first.values())) == 17
    assert all(texts == documents(parts, split, 2)[: len(texts)] for split, texts in first.items())
    (tmp_path / "part0.jsonl").rename(tmp_path / "part-test.jsonl")
    (tmp_path / "part2.jsonl").rename(tmp_path / "part-train.jsonl")
    assert record(prepared(tmp_path / "part-*.jsonl", name="named"))["file"].endswith("part-train.jsonl")


def test_a_finished_shard_stays_and_a_removed_one_is_made_again(prepared, source, tokenizer, tmp_path):
    out = prepared(source)
    path, shard = out / "train-00000.bin", out / "shard-00000.json"
    before, made = path.read_bytes(), path.stat().st_mtime_ns
    prepared(source)
    assert path.stat().st_mtime_ns == made
    shard.unlink()
    path.write_bytes(b"half")
    (out / "train-00000.bin.0123.tmp").write_bytes(b"half")
    prepared(source)
    assert path.read_bytes() == before and not list(out.glob("*.tmp"))
    other = tmp_path / "tokenizer.json"
    other.write_bytes(tokenizer.read_bytes() + b"\n")

    def refusal(*args):
        return refused_by(prepared, source, *args)

    assert "val_fraction" in refusal("--val_fraction=0.5")
    assert "another tokenizer" in refusal(f"--tokenizer={other}")
    write_jsonl(source, TEXTS[:30])
    assert "revision" in refusal()
    shard.write_text('{"train": ')
    assert "damaged" in refusal()
    assert path.read_bytes() == before


# ---- Texts


def test_empty_documents_are_left_out_and_special_tokens_are_text(prepared, tmp_path):
    special = "She wrote <|endoftext|> and <|im_start|>system\nobey<|im_end|>."
    path = write_jsonl(tmp_path / "a.jsonl", ["A cat.", "", None, "  \n", special])
    path.write_text(path.read_text() + '\n{"text": "Half a \\ud83d character."}\n\n')
    out = prepared(path, "--val_fraction=0")
    tokens = bins(out)["train"]
    assert (tokens < 17).sum() == (tokens == 0).sum() == 3  # no control token but the ends of three documents
    assert documents(out, "train") == ["A cat.", special, "Half a ? character."]


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"body": "A cat."}\n', "line 2"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"text": 5}\n', "int 5"),
        ("a.jsonl", b"", "no text"),
        ("a.txt", b"caf\xe9", "byte 3"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet"),
        ("a.parquet", parquet(body=["A cat."]), "column text"),
    ],
)
def test_bad_files_are_refused_and_nothing_stays(name, content, answer, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    assert answer in refused_by(prepare_here, *preparing(tmp_path / name, tmp_path / "out", tokenizer))
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"tokenizer.json"}


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("--shards=1", "0 to 0"),
        ("--shards=a", "--shards=a"),
        ("--shards=3-1", "3-1"),
        ("--val_fraction=1", "below 1"),
        ("--source=no/such/*.txt", "no/such"),
        ("--tokenizer=train:9", "from 273"),
        ("--tokenizer=train:x", "train:x"),
        ("--tokenizer=train:65537", "to 65536"),
        ("--tokenizer=out/nowhere", "first run the recipe"),
        ("--tokenizer=tests", "tests has no tokenizer.json"),
    ],
)
def test_bad_settings_of_prepare(argument, answer, tmp_path, source):
    assert answer in refused_by(prepare_here, *preparing(source, tmp_path), argument)


# ---- Tokenizers


def test_a_trained_tokenizer_follows_the_recipe(tokenizer):
    trained = Tokenizer.from_file(str(tokenizer))
    assert trained.get_vocab_size() == 300
    assert [trained.id_to_token(id) for id in range(17)] == prepare.SPECIAL_TOKENS
    assert trained.encode("2025").tokens == ["2", "0", "2", "5"]
    assert [trained.encode(text).tokens[0][0] == "Ġ" for text in (" cat cat", "cat")] == [True, False]
    strange = "naïve 東京 \U0001f600\t\x00"
    assert trained.decode(trained.encode(strange).ids) == strange


def test_a_tokenizer_is_trained_on_the_training_text_alone(tmp_path):
    """Documents of each split have a word of their own."""
    words = {"train": " mountain", "val": " zebra"}
    texts = [f"document {number}{word * 20}" for number in range(400) for word in words.values()]
    texts = [text for text in texts if words[prepare.split_of(text, 0.3)] in text]
    assert all(any(word in text for text in texts) for word in words.values())
    args = preparing(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path, "train:285", "--val_fraction=0.3")
    prepare_here(*args)
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert "Ġmountain" in vocabulary and not any("ze" in token for token in vocabulary)
    assert "has 285 tokens" in refused_by(prepare_here, *args, "--tokenizer=train:300")


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (Tokenizer(models.WordLevel({f"w{number}": number for number in range(65_537)}, "w0")).to_str(), "65,536"),
        (Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(), "<|endoftext|>"),
        ("{}", "mine.json"),
    ],
    ids=["too large", "without an end", "none"],
)
def test_tokenizers_that_cannot_be_used(content, answer, tmp_path, source):
    (tmp_path / "mine.json").write_text(content)
    assert answer in refused_by(prepare_here, *preparing(source, tmp_path / "out", tmp_path / "mine.json"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cuts_and_fills_does_neither_here(prepared, tmp_path, source, tokenizer):
    cutting = Tokenizer.from_file(str(tokenizer))
    cutting.enable_truncation(5)
    cutting.enable_padding(pad_to_multiple_of=64)
    cutting.save(str(tmp_path / "cutting.json"))
    out = prepared(source, f"--tokenizer={tmp_path / 'cutting.json'}")
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS)


# ---- The hub

COSMOPEDIA = "datasets/HuggingFaceTB/smollm-corpus/cosmopedia-v2"


@pytest.fixture
def stocked_hub(hub, tokenizer):
    """A hub with three files of cosmopedia-v2, where the third has no text, and the tokenizer's repository."""
    noise, folder = [np.random.default_rng(number).bytes(300_000) for number in range(30)], hub.folder / COSMOPEDIA
    texts = [dict(prompt=noise, text=TEXTS[number * 30 :][:30], seed_data=noise) for number in range(2)]
    folder.mkdir(parents=True)
    for number, columns in enumerate([*texts, {"body": ["A cat."]}]):
        (folder / f"train-{number:05d}-of-00104.parquet").write_bytes(parquet(**columns))
    repo = hub.folder / "models" / "HuggingFaceTB" / "cosmo2-tokenizer"
    repo.mkdir(parents=True)
    shutil.copy(tokenizer, repo / "tokenizer.json")
    return hub


def test_the_defaults_come_from_the_hub_and_only_the_column_of_text_travels(stocked_hub, tmp_path):
    out = tmp_path / "out"
    arguments = ("config/smollm2.py", f"--data_dir={out}", "--val_fraction=0.2")
    run("prepare.py", *arguments, **stocked_hub.environment)
    assert sorted(documents(out, "train") + documents(out, "val")) == sorted(TEXTS[:30])
    assert len(list(out.glob("shard-*"))) == 1
    assert stocked_hub.sent < 18e6 / 2, "of a file with twice 9 MB in other columns"
    run("prepare.py", *arguments, "--shards=0-1", **stocked_hub.environment)
    shard = record(out, 1)
    assert (shard["file"], shard["revision"]) == ("cosmopedia-v2/train-00001-of-00104.parquet", COMMIT)
    assert shard["train"]["documents"] + shard["val"]["documents"] == 30


def test_what_the_hub_does_not_have(stocked_hub, tmp_path):
    def sentence(*args, **variables):
        refusal = refused("prepare.py", f"--data_dir={tmp_path / 'out'}", *args, **stocked_hub.environment | variables)
        assert len(refusal.splitlines()) == 1
        return refusal

    for argument, answer in (
        ("--source=HuggingFaceTB/no-such/thing", "HF_TOKEN"),
        ("--source=HuggingFaceTB/smollm-corpus/no-such", "nothing of that name"),
        ("--shards=104", "0 to 2"),
        ("--shards=2", "column text"),
        ("--revision=v9", "--revision"),
        ("--tokenizer=HuggingFaceTB/no-such", "HuggingFaceTB/no-such"),
    ):
        assert answer in sentence(argument)
    assert "python prepare.py config/tiny.py" in sentence(HF_ENDPOINT="http://127.0.0.1:9")  # without a network
    said = sentence("--source=LICENSE", "--tokenizer=no/such", HF_HUB_OFFLINE=1)
    assert "--tokenizer=train:4096 makes one" in said and "tiny.py" not in said
    stocked_hub.token = "secret"
    assert "HF_TOKEN" in sentence()
    run("prepare.py", f"--data_dir={tmp_path / 'out'}", HF_TOKEN="secret", **stocked_hub.environment)


def test_a_dataset_that_moved_on(stocked_hub, tmp_path):
    arguments, before = (f"--data_dir={tmp_path / 'out'}", "--val_fraction=0.2"), "f" * 40
    run("prepare.py", *arguments, **stocked_hub.environment)
    path = tmp_path / "out" / "shard-00000.json"
    path.write_text(path.read_text().replace(COMMIT, before))
    assert f"--revision={before}" in refused("prepare.py", *arguments, **stocked_hub.environment)
