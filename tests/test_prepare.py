"""Documents to bins: every source, the same bytes however they come, and no damage from bad input."""

import hashlib
import json
import shutil

from plumbing import sources

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, refused, run, sentences
from tokenizers import Tokenizer, models

import prepare

TEXTS = sentences(60, seed=5)
REAL_TOKENIZER = ROOT.parent / "shared" / "tokenizer" / "tokenizer.json"


def bins(folder, index=0):
    return {split: np.fromfile(folder / f"{split}-{index:05d}.bin", "<u2") for split in ("train", "val")}


def record(folder, index=0):
    return json.loads((folder / f"shard-{index:05d}.json").read_text())


def documents(folder, split, index=0):
    """The documents of a bin, as text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = bins(folder, index)[split]
    ends = np.flatnonzero(tokens == 0)
    assert not len(tokens) or ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [
        tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in zip(starts, ends, strict=False)
    ]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(data):
    return data / "tokenizer.json"


def small(folder, source, tokenizer, *args, **variables):
    arguments = (f"--source={source}", f"--data_dir={folder}", f"--tokenizer={tokenizer}", "--val_fraction=0.2")
    return run("prepare.py", *arguments, *args, **variables)


# ---- Bins


def test_bins_hold_the_documents_and_json_says_what_they_are(tmp_path, tokenizer):
    small(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]), tokenizer)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]  # in their order
    assert 2 <= len(val) <= 25
    shard = record(tmp_path / "out")
    for split, texts in (("train", train), ("val", val)):
        content = (tmp_path / "out" / f"{split}-00000.bin").read_bytes()
        baselines = {"unigram_loss", "bigram_loss"} if split == "val" else set()
        assert shard[split].keys() == {"documents", "tokens", "bytes", "sha256"} | baselines
        assert {name: shard[split][name] for name in shard[split].keys() - baselines} == {
            "documents": len(texts),
            "tokens": len(content) // 2,
            "bytes": sum(len(text.encode()) for text in texts),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert shard["vocab_size"] == 300
    assert shard["tokenizer_sha256"] == hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_every_local_source_gives_the_same_tokens(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "other": 1} for text in TEXTS])
    write_parquet(tmp_path / "a.parquet", prompt=["x"] * len(TEXTS), text=TEXTS)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    sources = {"jsonl": "a.jsonl", "parquet": "a.parquet", "folder": "texts", "pattern": "texts/*.txt"}
    contents = set()
    for name, source in sources.items():
        small(tmp_path / name, tmp_path / source, tokenizer)
        contents.add(tuple((tmp_path / name / f"{split}-00000.bin").read_bytes() for split in ("train", "val")))
    assert len(contents) == 1


def test_each_file_is_a_shard_and_the_split_does_not_depend_on_the_files(tmp_path, tokenizer):
    for number in range(3):
        write_jsonl(tmp_path / f"part{number}.jsonl", [{"text": text} for text in TEXTS[number * 20 :][:20]])
    write_jsonl(tmp_path / "all.jsonl", [{"text": text} for text in TEXTS])
    small(tmp_path / "parts", tmp_path / "part*.jsonl", tokenizer)
    small(tmp_path / "all", tmp_path / "all.jsonl", tokenizer)
    together = [document for index in range(3) for document in documents(tmp_path / "parts", "val", index)]
    assert together == documents(tmp_path / "all", "val")
    small(tmp_path / "some", tmp_path / "part*.jsonl", tokenizer, "--shards=0,2")
    assert sorted(path.name for path in (tmp_path / "some").glob("shard-*")) == ["shard-00000.json", "shard-00002.json"]
    assert bins(tmp_path / "some", 2)["train"].tolist() == bins(tmp_path / "parts", 2)["train"].tolist()


def test_duplicates_stand_on_one_side(tmp_path, tokenizer):
    small(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS * 3]), tokenizer)
    assert not set(documents(tmp_path / "out", "train")) & set(documents(tmp_path / "out", "val"))


def test_max_documents(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    small(tmp_path / "out", source, tokenizer, "--max_documents=10")
    shard = record(tmp_path / "out")
    assert shard["train"]["documents"] + shard["val"]["documents"] == 10


def test_finished_shards_are_skipped_and_a_removed_one_is_made_again(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    small(tmp_path / "out", source, tokenizer)
    path = tmp_path / "out" / "train-00000.bin"
    before, made = path.read_bytes(), path.stat().st_mtime_ns
    assert "there already" in small(tmp_path / "out", source, tokenizer)
    assert path.stat().st_mtime_ns == made
    (tmp_path / "out" / "shard-00000.json").unlink()
    path.write_bytes(b"half")
    (tmp_path / "out" / "train-00000.bin.0123.tmp").write_bytes(b"half")
    small(tmp_path / "out", source, tokenizer)
    assert path.read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_shard_made_otherwise_is_not_overwritten(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    small(tmp_path / "out", source, tokenizer)
    arguments = (f"--source={source}", f"--data_dir={tmp_path / 'out'}", f"--tokenizer={tokenizer}")
    assert "val_fraction" in refused("prepare.py", *arguments, "--val_fraction=0.5")
    write_jsonl(source, [{"text": text} for text in TEXTS[:30]])
    assert "revision" in refused("prepare.py", *arguments, "--val_fraction=0.2")
    other = tmp_path / "tokenizer.json"
    other.write_bytes(tokenizer.read_bytes() + b"\n")
    assert "another tokenizer" in refused("prepare.py", *arguments[:2], f"--tokenizer={other}")
    (tmp_path / "out" / "shard-00000.json").write_text('{"train": ')
    assert "damaged" in refused("prepare.py", *arguments, "--val_fraction=0.2")


def test_a_tokenizer_of_another_size_is_not_the_one_that_is_there(tmp_path, corpus):
    arguments = (f"--source={corpus}", f"--data_dir={tmp_path}")
    run("prepare.py", *arguments, "--tokenizer=train:290")
    assert "there already" in run("prepare.py", *arguments, "--tokenizer=train:290")
    assert "has 290 tokens" in refused("prepare.py", *arguments, "--tokenizer=train:300")


# ---- Texts


def test_empty_documents_are_left_out_and_special_tokens_are_text(tmp_path, tokenizer):
    texts = ["A cat.", "", None, "  \n", "She wrote <|endoftext|> and <|im_start|>system\nobey<|im_end|>.", "A dog."]
    small(
        tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), tokenizer, "--val_fraction=0"
    )
    tokens = bins(tmp_path / "out")["train"]
    assert (tokens < 17).sum() == (tokens == 0).sum() == 3  # no control token but the ends of three documents
    assert documents(tmp_path / "out", "train") == [texts[0], texts[4], texts[5]]


def test_line_ends_and_byte_order_marks_of_text_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfA cat.\r\nA dog.\r\n")
    small(tmp_path / "out", tmp_path / "a.txt", tokenizer, "--val_fraction=0")
    assert documents(tmp_path / "out", "train") == ["A cat.\nA dog.\n"]


def test_half_a_character_becomes_a_question_mark(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('\n{"text": "A cat \\ud83d sees."}\n\n')
    small(tmp_path / "out", tmp_path / "a.jsonl", tokenizer, "--val_fraction=0")
    assert documents(tmp_path / "out", "train") == ["A cat ? sees."]


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"body": "A cat."}\n', "line 2"),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', "line 2"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', "line 1"),
        ("a.jsonl", b'{"text": 5}\n', "int 5"),
        ("a.jsonl", b"[1]\n", "line 1"),
        ("a.jsonl", b"", "no text"),
        ("a.txt", b"caf\xe9", "byte 3"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet"),
    ],
)
def test_bad_files_are_refused_and_nothing_stays(name, content, answer, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    arguments = (f"--source={tmp_path / name}", f"--data_dir={tmp_path / 'out'}", f"--tokenizer={tokenizer}")
    assert answer in refused("prepare.py", *arguments)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


def test_parquet_without_a_column_of_text(tmp_path, tokenizer):
    arguments = (f"--data_dir={tmp_path / 'out'}", f"--tokenizer={tokenizer}")
    path = write_parquet(tmp_path / "a.parquet", body=["A cat."])
    assert "column text" in refused("prepare.py", f"--source={path}", *arguments)
    path = write_parquet(tmp_path / "b.parquet", text=[1, 2])
    assert "int 1" in refused("prepare.py", f"--source={path}", *arguments)


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
    ],
)
def test_bad_settings(argument, answer, tmp_path, corpus):
    assert answer in refused(
        "prepare.py", f"--source={corpus}", f"--data_dir={tmp_path}", "--tokenizer=train:300", argument
    )


# ---- Tokenizers


def test_a_trained_tokenizer_follows_the_recipe(data):
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert [tokenizer.id_to_token(id) for id in range(17)] == prepare.SPECIAL_TOKENS
    assert tokenizer.encode("2025").tokens == ["2", "0", "2", "5"]
    assert tokenizer.encode(" cat cat").tokens[0].startswith("Ġ") and not tokenizer.encode("cat").tokens[0].startswith(
        "Ġ"
    )
    strange = "naïve 東京 \U0001f600\t\x00"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


def test_a_tokenizer_is_trained_on_the_training_text_alone(tmp_path):
    """Documents of each split have a word of their own."""
    words = {"train": " mountain", "val": " zebra"}
    texts = [f"document {number}{word * 20}" for number in range(400) for word in words.values()]
    texts = [text for text in texts if words[prepare.split_of(text, 0.3)] in text]
    assert all(any(word in text for text in texts) for word in words.values())
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    run("prepare.py", f"--source={source}", f"--data_dir={tmp_path}", "--tokenizer=train:285", "--val_fraction=0.3")
    vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab()
    assert "Ġmountain" in vocabulary and not any("ze" in token for token in vocabulary)


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="the published tokenizer is not here")
def test_the_published_tokenizer():
    real = json.loads(REAL_TOKENIZER.read_text())
    tokenizer = Tokenizer.from_file(str(REAL_TOKENIZER))
    assert [tokenizer.id_to_token(id) for id in range(17)] == prepare.SPECIAL_TOKENS
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    settings = prepare.Settings(tokenizer="train:300", val_fraction=0)
    file = sources.File("talk", "", lambda: iter(TEXTS))
    ours = json.loads(prepare.train_tokenizer(settings, [file]).to_str())
    for part in ("pre_tokenizer", "decoder", "normalizer", "post_processor"):
        assert ours[part] == real[part], part
    assert {key: ours["model"][key] for key in ours["model"] if key not in ("vocab", "merges")} == {
        key: real["model"][key] for key in ours["model"] if key not in ("vocab", "merges")
    }
    assert ours["added_tokens"] == real["added_tokens"]


def test_tokenizers_that_cannot_be_used(tmp_path, corpus):
    arguments = (f"--source={corpus}", f"--data_dir={tmp_path / 'out'}")
    many = Tokenizer(models.WordLevel({f"w{number}": number for number in range(65_537)}, "w0"))
    many.save(str(tmp_path / "many.json"))
    assert "65,536" in refused("prepare.py", *arguments, f"--tokenizer={tmp_path / 'many.json'}")
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "endless.json"))
    assert "<|endoftext|>" in refused("prepare.py", *arguments, f"--tokenizer={tmp_path / 'endless.json'}")
    Tokenizer(models.BPE()).save(str(tmp_path / "empty.json"))
    assert "<|endoftext|>" in refused("prepare.py", *arguments, f"--tokenizer={tmp_path / 'empty.json'}")
    (tmp_path / "broken.json").write_text("{}")
    assert "broken.json" in refused("prepare.py", *arguments, f"--tokenizer={tmp_path / 'broken.json'}")


def test_a_tokenizer_that_cuts_and_fills_does_neither_here(tmp_path, tokenizer):
    cutting = Tokenizer.from_file(str(tokenizer))
    cutting.enable_truncation(5)
    cutting.enable_padding(pad_to_multiple_of=64)
    cutting.save(str(tmp_path / "cutting.json"))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    printed = small(tmp_path / "out", source, tmp_path / "cutting.json")
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == sorted(TEXTS)
    train = record(tmp_path / "out")["train"]
    assert f"shard 00000 train: {train['documents']} documents, {train['tokens']:,} tokens" in printed


# ---- The hub


@pytest.fixture
def stocked_hub(hub, tmp_path, tokenizer):
    """A hub with two files of cosmopedia-v2 and the tokenizer's repository."""
    folder = hub.folder / "datasets" / "HuggingFaceTB" / "smollm-corpus" / "cosmopedia-v2"
    for number in range(2):
        texts = TEXTS[number * 30 :][:30]
        write_parquet(
            folder / f"train-{number:05d}-of-00104.parquet", prompt=["x"] * 30, text=texts, token_length=[9] * 30
        )
    repo = hub.folder / "models" / "HuggingFaceTB" / "cosmo2-tokenizer"
    repo.mkdir(parents=True)
    shutil.copy(tokenizer, repo / "tokenizer.json")
    return hub


def test_the_defaults_come_from_the_hub(stocked_hub, tmp_path):
    arguments = ("config/smollm2.py", f"--data_dir={tmp_path / 'out'}", "--val_fraction=0.2")
    run("prepare.py", *arguments, **stocked_hub.environment)
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == sorted(TEXTS[:30])
    assert len(list((tmp_path / "out").glob("shard-*"))) == 1
    run("prepare.py", *arguments, "--shards=0-1", **stocked_hub.environment)
    assert record(tmp_path / "out", 1)["file"] == "cosmopedia-v2/train-00001-of-00104.parquet"
    assert record(tmp_path / "out", 1)["revision"] == "0123456789abcdef0123456789abcdef01234567"
    assert sum(record(tmp_path / "out", 1)[split]["documents"] for split in ("train", "val")) == 30


def test_what_the_hub_does_not_have(stocked_hub, tmp_path):
    hub, data_dir = stocked_hub, f"--data_dir={tmp_path / 'out'}"
    for arguments, answer in (
        (("--source=HuggingFaceTB/no-such/thing",), "HF_TOKEN"),
        (("--source=HuggingFaceTB/smollm-corpus/no-such",), "nothing of that name"),
        (("--shards=104",), "0 to 1"),
        (("--revision=v9",), "--revision"),
        (("--tokenizer=HuggingFaceTB/no-such",), "HuggingFaceTB/no-such"),
    ):
        assert answer in refused("prepare.py", data_dir, *arguments, **hub.environment)
    hub.token = "secret"
    assert "HF_TOKEN" in refused("prepare.py", data_dir, **hub.environment)
    run("prepare.py", data_dir, "--val_fraction=0.2", HF_TOKEN="secret", **hub.environment)


def test_a_parquet_file_of_the_hub_without_text(stocked_hub, tmp_path):
    folder = stocked_hub.folder / "datasets" / "HuggingFaceTB" / "smollm-corpus" / "cosmopedia-v2"
    write_parquet(folder / "train-00000-of-00104.parquet", body=["A cat."])
    sentence = refused("prepare.py", f"--data_dir={tmp_path / 'out'}", **stocked_hub.environment)
    assert "column text" in sentence and "cannot be reached" not in sentence
    assert len(sentence.splitlines()) == 1


def test_a_dataset_that_moved_on(stocked_hub, tmp_path, monkeypatch):
    arguments = (f"--data_dir={tmp_path / 'out'}", "--val_fraction=0.2")
    run("prepare.py", *arguments, **stocked_hub.environment)
    path = tmp_path / "out" / "shard-00000.json"
    before = "f" * 40
    path.write_text(path.read_text().replace("0123456789abcdef0123456789abcdef01234567", before))
    assert f"--revision={before}" in refused("prepare.py", *arguments, **stocked_hub.environment)


def test_without_a_network_the_offline_command_is_named(tmp_path):
    sentence = refused("prepare.py", f"--data_dir={tmp_path / 'out'}", HF_HOME=tmp_path / "cache")
    assert "python prepare.py config/tiny.py" in sentence
    assert len(sentence.strip().splitlines()) == 1
