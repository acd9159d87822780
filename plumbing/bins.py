"""Bins as training data: what prepare.py wrote, mapped into memory and cut into windows.

A window is seq_len + 1 consecutive tokens: the first seq_len are the input, the last seq_len the targets, so that each
token's target is the one that follows it.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch


def open_bins(data_dir, verify=False):
    """The bins of all shards, {"train": [...], "val": [...]}, and what the shards say of themselves, by file name.

    Exits with one sentence if a bin is missing, has not the size that its json says (or, to verify, the sha256), or
    belongs to another tokenizer than the others. A bin without a json is not finished, and left out.
    """
    folder = Path(data_dir)
    shards = {path.name: read_shard(path) for path in sorted(folder.glob("shard-*.json"))}
    if not shards:
        sys.exit(f"{data_dir} holds no shard-NNNNN.json: run prepare.py with --data_dir={data_dir} first.")
    bins, first = {"train": [], "val": []}, min(shards)
    for name, shard in shards.items():
        if shard["tokenizer_sha256"] != shards[first]["tokenizer_sha256"]:
            sys.exit(f"{folder / name} and {first} were made with different tokenizers; prepare them into two folders.")
        for split in bins:
            path = folder / name.replace("shard", split).replace(".json", ".bin")
            size, wanted = path.stat().st_size if path.exists() else 0, 2 * shard[split]["tokens"]
            if size != wanted:
                sys.exit(f"{path} has {size} bytes where {name} says {wanted}; remove {name} and prepare it again.")
            if verify and sha256(path) != shard[split]["sha256"]:
                sys.exit(f"{path} is not what {name} describes; remove {name} and prepare it again.")
            if size:
                bins[split].append(np.memmap(path, "<u2", "r"))
    return bins, shards


def read_shard(path):
    """What a shard says of itself; exits if it is not what prepare.py writes."""
    try:
        shard = json.loads(path.read_bytes())
        whole = shard.keys() >= {"tokenizer_sha256", "vocab_size", "train", "val"}
        whole = whole and all(shard[split].keys() >= {"tokens", "bytes", "sha256"} for split in ("train", "val"))
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        sys.exit(f"{path} is damaged; remove it and prepare the shard again.")
    return shard


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Windows:
    """The tokens of some bins as one endless sequence of windows, epoch after epoch.

    An epoch visits every window once, none across two bins, in an order drawn from (seed, epoch). Each epoch shifts the
    windows by a random offset, so that texts are not cut at the same places again. Window i is a pure function of
    (seed, i): whoever asks, on however many devices and after however many restarts, gets the same tokens."""

    def __init__(self, bins, seq_len, seed):
        self.bins = [bin for bin in bins if len(bin) > seq_len]
        self.counts = [max(1, len(bin) // seq_len - 1) for bin in self.bins]  # one less than fit: room for the offset
        self.per_epoch = sum(self.counts)
        self.seq_len, self.seed, self.epoch = seq_len, seed, None

    def __getitem__(self, i):  # -> (seq_len + 1,) int64
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
                return bin[start : start + self.seq_len + 1].astype(np.int64)
            i -= count


def validation_windows(bins, seq_len, tokens):
    """As many windows as hold about so many tokens, spread evenly over the bins: the same at every evaluation."""
    places = [(bin, start) for bin in bins for start in range(0, len(bin) - seq_len, seq_len)]
    count = min(len(places), max(1, tokens // seq_len))
    picked = [places[i] for i in np.linspace(0, len(places) - 1, count).astype(int)]
    return [bin[start : start + seq_len + 1].astype(np.int64) for bin, start in picked]


def to_device(windows, device, vocab_size):
    """Windows as inputs and targets, two tensors (b, seq_len) int64 on the device."""
    tokens = np.stack(windows)
    if tokens.max() >= vocab_size:
        sys.exit(f"the data has a token {tokens.max()} beyond the vocabulary of {vocab_size}: a bin is damaged.")
    tokens = torch.from_numpy(tokens)
    if device.type == "cuda":  # from pinned memory, the copy goes on while the device computes
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
