"""Tokens on disk, and the windows made of them.

prepare.py writes each file of a corpus as a shard: train-NNNNN.bin and val-NNNNN.bin, token numbers and nothing else,
and shard-NNNNN.json, which says what they are. train.py maps the bins into memory and cuts them into windows of seq_len
+ 1 tokens: the first seq_len are inputs, the last seq_len targets, so that each token's target is the one after it.
"""

import hashlib
import json
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

SPLITS = ("train", "val")

# ---- A shard: written, read, judged ---------------------------------------------------------------------------------


def shard_path(folder, index):
    return Path(folder, f"shard-{index:05d}.json")


def write_whole(path, content):
    """Write a file so that it is there whole or not at all."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    with open(temporary, "xb") as file:
        file.write(content)
    os.replace(temporary, path)


def write_shard_json(path, shard):
    write_whole(path, (json.dumps(shard, indent=2) + "\n").encode())


def read_shard_json(path):
    """What a shard says of itself; exits if it is not what prepare.py writes."""
    try:
        shard = json.loads(path.read_bytes())
        whole = shard.keys() >= {"tokenizer_sha256", "vocab_size", *SPLITS}
        whole = whole and all(shard[split].keys() >= {"tokens", "bytes", "sha256"} for split in SPLITS)
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        sys.exit(f"{path} is damaged; remove it and prepare the shard again.")
    return shard


def check_made_alike(path, origin):
    """Exit if a shard that is there already was made otherwise than the settings ask for now."""
    made = read_shard_json(path)
    for name, value in origin.items():
        if name == "tokenizer" and not value.startswith("train:"):
            continue  # tokenizer_sha256 says more than a name
        if made.get(name) != value:
            sys.exit(
                f"{path} was made with {name} = {made.get(name)}, and now it is {value}; take another --data_dir, or "
                "remove that file to make the shard again."
            )


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- A corpus: all shards of a folder --------------------------------------------------------------------------------


@dataclass
class Corpus:
    """What a run trains and evaluates on."""

    shards: dict  # file name -> what the shard says of itself
    train: "Windows"
    val: torch.Tensor  # (n, seq_len + 1) int64, the windows of every evaluation
    tokenizer_file: Path
    tokenizer: Tokenizer
    vocab_size: int
    bytes_per_token: float  # of the validation text, UTF-8
    baselines: dict  # unigram_loss and bigram_loss, in nats: see baselines in prepare.py

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


def open_corpus(data_dir, seq_len, seed, eval_tokens, verify=False):
    """The corpus in a folder; exits with one sentence if it is missing, damaged, mixed, or too small."""
    folder = Path(data_dir)
    shards = {path.name: read_shard_json(path) for path in sorted(folder.glob("shard-*.json"))}
    if not shards:
        sys.exit(f"{data_dir} holds no shard-NNNNN.json: run prepare.py with --data_dir={data_dir} first.")
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
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    counts = [shard["val"] for shard in shards.values()]
    tokens = sum(count["tokens"] for count in counts)
    bytes_per_token = sum(count["bytes"] for count in counts) / tokens
    baselines = {
        name: sum(count[name] * count["tokens"] for count in counts) / tokens
        for name in ("unigram_loss", "bigram_loss")
        if all(name in count for count in counts)
    }
    return Corpus(shards, train, val, tokenizer_file, tokenizer, vocab_size, bytes_per_token, baselines)


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
    """As many windows as hold about so many tokens, spread evenly over the bins, always the same ones."""
    places = [(bin, start) for bin in bins for start in range(0, len(bin) - seq_len, seq_len)]
    count = min(len(places), max(1, tokens // seq_len))
    picked = [places[i] for i in np.linspace(0, len(places) - 1, count).astype(int)]
    return as_tensor([bin[start : start + seq_len + 1] for bin, start in picked], vocab_size)


def as_tensor(windows, vocab_size):
    windows = np.stack(windows).astype(np.int64) if windows else np.empty((0, 0), np.int64)
    if windows.size and windows.max() >= vocab_size:
        sys.exit(f"the data has a token {windows.max()} beyond the vocabulary of {vocab_size}: a bin is damaged.")
    return torch.from_numpy(windows)
