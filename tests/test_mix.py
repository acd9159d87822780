"""A mix of several folders: its shares, its order, and what is measured of each part."""

import shutil
from fractions import Fraction
from types import SimpleNamespace

from plumbing.corpus import Mix, open_corpus

import pytest
from conftest import metrics, preparing, run, write_jsonl
from runs import arguments, assert_same_run, prepare_here, refused_here, train_here, values

THREE = Fraction("0.5"), Fraction("0.3"), Fraction("0.2")


def test_the_shares_hold_within_any_stretch():
    """Every sequence is there, each part in its own order."""
    mix = Mix(dict.fromkeys("abc", SimpleNamespace(seq_len=32)), THREE)
    drawn = [mix.find(i) for i in range(1000)]
    for name, share in zip("abc", THREE, strict=True):
        assert [number for of, number in drawn if of == name] == list(range(int(1000 * share)))
        for first in range(0, 900, 7):
            count = sum(one[0] == name for one in drawn[first : first + 50])
            assert abs(count - 50 * share) < 2, "a share does not hold"


def test_a_run_on_a_mix(data, other_data, tmp_path):
    """It resumes bit for bit, in any order of the folders and wherever they are; epochs, losses and bits per byte are
    those of each."""
    mix, turned = f"{data}:3,{other_data}:1", f"{other_data}:0.25,{data}:0.75"
    printed = train_here(mix, tmp_path / "whole", "--max_steps=4", "--eval_interval=4")
    assert "75.0% from " in printed and "25.0% from sums" in printed
    train_here(mix, tmp_path / "parts", "--max_steps=2")
    train_here(turned, tmp_path / "parts", "--max_steps=3", "--resume=True")
    moved = [shutil.copytree(other_data, tmp_path / "a" / "sums"), shutil.copytree(data, tmp_path / "b" / data.name)]
    train_here(f"{moved[0]}:1,{moved[1]}:3", tmp_path / "parts", "--max_steps=4", "--resume=True")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    last, sequences = metrics(tmp_path / "whole")[-1], open_corpus(mix, 32, 0, 64).train.parts
    for name, share in ((data.name, 0.75), ("sums", 0.25)):
        seen = share * 4 * 256
        assert last[f"epoch/{name}"] == pytest.approx(seen / (32 * sequences[name].per_epoch))
        assert last[f"unique_tokens/{name}"] == seen
    val = open_corpus(mix, 32, 0, 640).val
    assert {name: len(tokens) for name, (tokens, _) in val.items()} == {data.name: 15, "sums": 5}
    losses = {name: last[f"val_loss/{name}"] for name in (data.name, "sums")}
    assert last["val_loss"] == pytest.approx(0.75 * losses[data.name] + 0.25 * losses["sums"], rel=0.02)
    corpus = open_corpus(mix, 32, 0, 10**6)  # all that there is, which is more of one than its share
    totals = [[2.0 * tokens.size, tokens.size] for tokens, _ in corpus.val.values()]
    totals[1][0] *= 2
    assert corpus.scores(totals)["val_loss"] == pytest.approx(0.75 * 2 + 0.25 * 4)
    assert {"val_bpb", f"val_bpb/{data.name}", "val_bpb/sums", "unigram_loss"} <= last.keys()
    for folder in (data, other_data):  # each loss is that of the folder alone
        model = f"--init_from={tmp_path / 'whole' / 'checkpoint-000004'}"
        train_here(folder, tmp_path / folder.name, model, "--max_steps=1", "--learning_rate=1e-9")
        assert values(tmp_path / folder.name, "val_loss")[0] == pytest.approx(losses[folder.name], rel=0.05)


def test_two_ranks_train_on_a_mix_as_one_does(data, other_data, tmp_path):
    mix = f"{data}:0.6,{other_data}:0.4"
    run("train.py", *arguments(mix, tmp_path / "two", "--max_steps=2"), nproc=2)
    train_here(mix, tmp_path / "one", "--max_steps=2")
    one, two = values(tmp_path / "one", "loss"), values(tmp_path / "two", "loss")
    assert list(one.values()) == pytest.approx(list(two.values()), rel=1e-5)


def test_a_mix_that_cannot_be(data, other_data, tmp_path):
    def refusal(data_dir):
        return refused_here(data_dir, tmp_path / "out")

    assert "different names" in refusal(f"{data}:1,{data}:2")
    assert "shares above 0" in refusal(f"{data}:1,{other_data}:0")
    assert "holds no shard" in refusal(f"{data}:1,{tmp_path / 'nowhere'}:1")
    for written in (f"{data},{other_data}", f"{data}:0.8,{other_data}", f"{data}:80%,{other_data}:20%"):
        assert "a mix is written FOLDER:SHARE" in refusal(written)
    source = write_jsonl(tmp_path / "a.jsonl", [f"A cat sees {number} mice." for number in range(99)])
    prepare_here(*preparing(source, tmp_path / "mice", "train:280"))
    assert "different tokenizers" in refusal(f"{data}:1,{tmp_path / 'mice'}:1")
    train_here(f"{data}:1,{other_data}:1", tmp_path / "out", "--max_steps=1")
    assert "share" in refused_here(f"{data}:1,{other_data}:2", tmp_path / "out", "--resume=True")
