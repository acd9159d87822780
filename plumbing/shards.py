"""Shards: tokens on disk, as prepare.py writes them and train.py reads them.

A shard is one file of a corpus as tokens: train-NNNNN.bin and val-NNNNN.bin, which are little-endian uint16 token ids
and nothing else, and shard-NNNNN.json, which says what they are.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from plumbing.files import write_whole

import numpy as np

SPLITS = ("train", "val")


def shard_path(folder, index):
    return Path(folder, f"shard-{index:05d}.json")


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
    """Exit if an existing shard was made with other settings than those asked for now."""
    made = read_shard_json(path)
    for name, value in origin.items():
        if name == "tokenizer" and not value.startswith("train:"):
            continue  # tokenizer_sha256 says more than a name
        if made.get(name, value) != value:
            stay = f"stay with --revision={made[name]}, " if name == "revision" and from_hub(made) else ""
            sys.exit(
                f"{path} was made with {name} = {made.get(name)}, now it is {value}; {stay}take another --data_dir, "
                "or remove that file to make the shard again."
            )


def from_hub(shard):
    """Whether a shard was made from a file on the hub: only there is a revision a commit."""
    return re.fullmatch("[0-9a-f]{40}", str(shard.get("revision"))) is not None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(shards):
    """What makes shards the same data, {name: value}: tokens and hashes, not where and when they were made."""
    return {
        f"{name}, {split}": (shard[split]["tokens"], shard[split]["sha256"], shard.get("share", "1"))
        for name, shard in shards.items()
        for split in SPLITS
    }


def open_bins(folder, shards, verify):
    """{"train": [...], "val": [...]}: the bins mapped into memory. A bin without a json is unfinished, and left out."""
    bins = {split: [] for split in SPLITS}
    for name, shard in shards.items():
        name = Path(name).name
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
