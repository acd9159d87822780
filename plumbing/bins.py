"""Tokens on disk as training data: the bins of a folder, and the windows made of them.

train.py maps the bins that prepare.py wrote into memory and cuts them into windows of seq_len + 1 tokens: the first
seq_len are inputs, the last seq_len targets, so that each token's target is the one after it.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.shards import SPLITS, read_shard_json, sha256

import numpy as np
import torch
from tokenizers import Tokenizer


@dataclass
class Corpus:
    """What a run trains and evaluates on."""

    shards: dict  # file name -> what the shard says of itself
    train: "Windows"
    val: torch.Tensor  # (n, seq_len + 1) int64, the windows of every evaluation
    val_bytes: int  # of the text that their targets stand for, UTF-8
    tokenizer_file: Path
    tokenizer: Tokenizer
    vocab_size: int
    baselines: dict  # unigram_loss and bigram_loss, in nats: see plumbing/baselines.py
    left_out: list  # shards that arrived after the run had begun

    @property
    def end_of_text(self):
        return self.tokenizer.token_to_id("<|endoftext|>")

    def check_tokenizer(self, folder):
        """Exit if a token of the data means something else to the model in a folder."""
        path = os.path.join(folder, "tokenizer.json")
        try:
            theirs = (Tokenizer.from_file(path) if os.path.exists(path) else self.tokenizer).get_vocab()
        except Exception as error:  # the library has no type of its own for this
            sys.exit(f"{path} cannot be read: {error}")
        if any(theirs.get(token) != id for token, id in self.tokenizer.get_vocab().items()):
            sys.exit(
                f"the data has other tokens than {folder}: prepare it with --tokenizer={path}, into another folder."
            )


def identity(shards):
    """What makes shards the same data, {name: value}: tokens and hashes, not where and when they were made."""
    bins = {f"{name}, {split}": shard[split] for name, shard in shards.items() for split in SPLITS}
    return {name: (bin["tokens"], bin["sha256"]) for name, bin in bins.items()}


def open_corpus(data_dir, seq_len, seed, eval_tokens, verify=False, listed=None):
    """The corpus in a folder; exits with one sentence if it is missing, damaged, mixed, or too small.

    listed are the shards of the run that is continued: they must be the same, and others are left out.
    """
    folder = Path(data_dir)
    shards = {path.name: read_shard_json(path) for path in sorted(folder.glob("shard-*.json"))}
    if not shards:
        sys.exit(f"{data_dir} holds no shard-NNNNN.json: run prepare.py with --data_dir={data_dir} first.")
    if listed:
        now = identity(shards)
        for name, value in identity(listed).items():
            if now.get(name) != value:
                sys.exit(
                    f"{data_dir}: {name} has (tokens, sha256) = {now.get(name)}, and {value} when the run began: bring "
                    "that shard back, or begin another run with --init_from."
                )
    left_out = sorted(shards.keys() - listed.keys()) if listed else []
    shards = {name: shard for name, shard in shards.items() if name not in left_out}
    vocab_size = max(shard["vocab_size"] for shard in shards.values())
    bins = open_bins(folder, shards, verify)
    train = Windows(bins["train"], seq_len, seed, vocab_size)
    val = validation_windows(bins["val"], seq_len, eval_tokens, vocab_size)
    for split, windows in (("train", train.bins), ("val", val)):
        if not len(windows):
            sys.exit(
                f"{data_dir}: no {split} bin has more than seq_len = {seq_len} tokens; lower --seq_len, or prepare "
                "more text or a larger --val_fraction."
            )
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists():
        sys.exit(f"{tokenizer_file} is missing, which prepare.py writes beside the bins.")
    if sha256(tokenizer_file) != shards[min(shards)]["tokenizer_sha256"]:
        sys.exit(
            f"{tokenizer_file} is not the one that the bins were made with; bring that back, or prepare them again."
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    counts = [shard["val"] for shard in shards.values() if "unigram_loss" in shard["val"]]
    tokens = [count["tokens"] for count in counts]
    baselines = {
        name: float(np.average([count[name] for count in counts], weights=tokens))
        for name in ("unigram_loss", "bigram_loss")
        if counts
    }
    val_bytes = count_bytes(tokenizer, val[:, 1:].numpy())
    return Corpus(shards, train, val, val_bytes, tokenizer_file, tokenizer, vocab_size, baselines, left_out)


def count_bytes(tokenizer, windows):
    """The bytes of UTF-8 text that windows (n, T) of tokens stand for. Special tokens are no text."""
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"]):  # a character for each byte
        lengths = {id: len(token) for token, id in tokenizer.get_vocab().items() if id not in special}
        ids, counts = np.unique(windows, return_counts=True)
        return sum(lengths.get(int(id), 0) * int(count) for id, count in zip(ids, counts, strict=True))
    return sum(len(text.encode()) for text in tokenizer.decode_batch(windows.tolist()))


def open_bins(folder, shards, verify):
    """{"train": [...], "val": [...]}, the bins mapped into memory. A bin without a json is unfinished, and left out."""
    bins, first = {split: [] for split in SPLITS}, min(shards)
    for name, shard in shards.items():
        if shard["tokenizer_sha256"] != shards[first]["tokenizer_sha256"]:
            sys.exit(f"{folder / name} and {first} were made with different tokenizers; prepare them into two folders.")
        for split in SPLITS:
            path = folder / name.replace("shard", split).replace(".json", ".bin")
            size, wanted = path.stat().st_size if path.exists() else 0, 2 * shard[split]["tokens"]
            if size != wanted:
                sys.exit(f"{path} has {size} bytes where {name} says {wanted}; remove {name} and prepare it again.")
            if verify and sha256(path) != shard[split]["sha256"]:
                sys.exit(f"{path} is not what {name} describes; remove {name} and prepare it again.")
            if size:
                bins[split].append(np.memmap(path, "<u2", "r"))
    return bins


class Windows:
    """The tokens of some bins as one endless sequence of windows, epoch after epoch.

    An epoch visits every window once, none across two bins, in an order drawn from (seed, epoch). Each epoch shifts the
    windows by a random offset, so that texts are not cut in the same places again. Window i is a pure function of
    (seed, i): the same on any number of devices and after any number of restarts.
    """

    def __init__(self, bins, seq_len, seed, vocab_size=2**16):
        self.bins = [bin for bin in bins if len(bin) > seq_len]
        self.counts = [max(1, len(bin) // seq_len - 1) for bin in self.bins]  # one less than fit: room for the offset
        self.per_epoch = sum(self.counts)
        self.seq_len, self.seed, self.vocab_size, self.epoch = seq_len, seed, vocab_size, None

    def __getitem__(self, i):  # -> (seq_len + 1,) uint16
        epoch, i = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            room = [len(bin) - count * self.seq_len for bin, count in zip(self.bins, self.counts, strict=True)]
            self.offsets = [int(rng.integers(spare)) for spare in room]
            self.order = rng.permutation(self.per_epoch)
            self.epoch = epoch
        i = int(self.order[i])
        for bin, count, offset in zip(self.bins, self.counts, self.offsets, strict=True):
            if i < count:
                start = offset + i * self.seq_len
                return bin[start : start + self.seq_len + 1]
            i -= count

    def batch(self, first, count):
        """Windows first to first + count - 1: (count, seq_len + 1) int64."""
        return as_tensor([self[i] for i in range(first, first + count)], self.vocab_size)


def validation_windows(bins, seq_len, tokens, vocab_size=2**16):
    """Windows that hold about this many tokens, spread evenly over the bins, always the same ones."""
    places = [(bin, start) for bin in bins for start in range(0, len(bin) - seq_len, seq_len)]
    count = min(len(places), max(1, tokens // seq_len))
    picked = [places[i] for i in np.linspace(0, len(places) - 1, count).astype(int)]
    return as_tensor([bin[start : start + seq_len + 1] for bin, start in picked], vocab_size)


def as_tensor(windows, vocab_size):
    windows = np.stack(windows).astype(np.int64) if windows else np.empty((0, 0), np.int64)
    if windows.size and windows.max() >= vocab_size:
        sys.exit(f"the data has a token {windows.max()} beyond the vocabulary of {vocab_size}: a bin is damaged.")
    return torch.from_numpy(windows)
