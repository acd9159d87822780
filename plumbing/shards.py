"""What prepare.py writes and train.py reads: a shard.

A shard is one file of a corpus as tokens: train-NNNNN.bin and val-NNNNN.bin, token numbers and nothing else, and
shard-NNNNN.json, which says what they are.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from plumbing.files import write_whole

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
    """Exit if a shard that is there already was made otherwise than the settings ask for now."""
    made = read_shard_json(path)
    for name, value in origin.items():
        if name == "tokenizer" and not value.startswith("train:"):
            continue  # tokenizer_sha256 says more than a name
        if made.get(name) != value:
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
