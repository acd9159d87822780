"""Documents to tokens: read a corpus, tokenize it, and write it as train.py reads it.

    python prepare.py config/smollm2.py                                the first file of cosmopedia-v2, from the hub
    python prepare.py config/tiny.py                                   Python's own documentation, without a network
    python prepare.py --source=books --data_dir=data/books --val_fraction=0.05      your own text

Each parquet or jsonl file of the corpus becomes a shard; text files, or the documentation, make one together:

    tokenizer.json                       the tokenizer of all shards
    train-00000.bin   val-00000.bin      the tokens, little-endian uint16, and nothing else
    shard-00000.json                     where they come from and how many they are; written last

Each document is followed by <|endoftext|>, so that a model learns where texts begin and end. Files are written under
another name and renamed when whole, and a shard counts once its json is there. So preparing can be interrupted and
repeated, and several machines can prepare different shards into one folder.
"""

import hashlib
import os
import re
import secrets
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plumbing.baselines import baselines
from plumbing.files import lock, rename_whole, write_whole
from plumbing.hub import hub_errors
from plumbing.pieces import pieces
from plumbing.settings import Count, Fraction, run
from plumbing.shards import SPLITS, check_made_alike, shard_path, write_shard_json
from plumbing.sources import ahead, documents, list_files

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm


@dataclass
class Settings:
    """Turn documents into files of tokens for train.py."""

    data_dir: str = "data/cosmopedia-v2"  # folder to write
    source: str = "HuggingFaceTB/smollm-corpus/cosmopedia-v2"  # dataset/folder on the hub, python-docs, path or glob
    shards: str | None = None  # the source's files: 0 or 0-3 or 0,7; unset: the first of a hub dataset, all local ones
    revision: str | None = None  # branch, tag or commit of the dataset on the hub
    max_documents: Count | None = None  # stop after this many documents of each file
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"  # SmolLM2's; or another hub id, a tokenizer.json, or train:4096
    val_fraction: Fraction = 0.005  # share of the documents kept for evaluation
    num_proc: Count = os.cpu_count() or 1  # cores to tokenize on


END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()  # SmolLM2's, in its order: <|endoftext|> is 0

# ---- The tokenizer --------------------------------------------------------------------------------------------------
#
# A model reads tokens, numbers below V, not text. Byte-pair encoding (Sennrich et al. 2015, arXiv 1508.07909; on bytes
# since GPT-2) cuts a text into words, digits and punctuation, and starts with a token for each byte. Training makes the
# most frequent pair of neighbouring tokens a new token, and repeats this until there are V of them. So a frequent word
# becomes one token, a rare one a few, and there is no text that cannot be expressed.


def get_tokenizer(settings, files):
    """The tokenizer and the sha256 of its tokenizer.json, which is left in data_dir. A folder's shards share one."""
    here = Path(settings.data_dir) / "tokenizer.json"
    if to_train := settings.tokenizer.startswith("train:"):
        if not here.exists():
            release = lock(f"{here}.lock", f"another process trains {here} now; start again when it is there.")
            try:
                if not here.exists():  # it may have been finished just before the lock was free
                    write_whole(here, train_tokenizer(settings, files).to_str(pretty=True).encode())
            finally:
                release()
        wanted = here.read_bytes()
    elif os.path.isfile(settings.tokenizer):
        wanted = Path(settings.tokenizer).read_bytes()
    else:
        with hub_errors(settings.tokenizer):
            from huggingface_hub import hf_hub_download

            wanted = Path(hf_hub_download(settings.tokenizer, "tokenizer.json")).read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(wanted)
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"--tokenizer={settings.tokenizer} is not a tokenizer.json: {error}")
    size = vocabulary_size(tokenizer)
    if to_train and settings.tokenizer != f"train:{size}":
        sys.exit(f"{here} has {size} tokens, and --tokenizer={settings.tokenizer} is another; take another --data_dir.")
    if size > 65_536:
        sys.exit(f"--tokenizer={settings.tokenizer} has {size:,} tokens; bins hold 16-bit numbers, so 65,536 at most.")
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        sys.exit(f"--tokenizer={settings.tokenizer} has no {END_OF_TEXT} to set between documents.")
    if not here.exists():
        write_whole(here, wanted)
    if here.read_bytes() != wanted:
        sys.exit(f"{here} is another tokenizer than --tokenizer={settings.tokenizer}; take another --data_dir.")
    # Text cannot be trusted: a document that says <|endoftext|> gets those letters, not the token, so that no web page
    # can end a document or open a turn of a chat.
    tokenizer.encode_special_tokens = True  # the library's name for: as ordinary text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.sha256(wanted).hexdigest()


def vocabulary_size(tokenizer):
    """The rows that an embedding needs: the largest id plus one. Some tokenizers leave numbers out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def train_tokenizer(settings, files):
    """A byte-level BPE by SmolLM2's recipe: single digits, no space added in front, special tokens first."""
    size = settings.tokenizer.removeprefix("train:")
    least = len(SPECIAL_TOKENS) + 256
    if not size.isdecimal() or not least <= int(size) <= 65_536:
        sys.exit(f"--tokenizer={settings.tokenizer}: the size must be a number from {least} to 65536.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    counts = [file.count() for file in files]
    known = None not in counts and settings.max_documents is None
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=known and sys.stderr.isatty(),
    )
    texts = (text for file in files for text in documents(file, settings.max_documents))
    texts = (text for text in texts if split_of(text, settings.val_fraction) == "train")
    print(f"training a tokenizer of {int(size):,} tokens", flush=True)
    tokenizer.train_from_iterator(texts, trainer, length=sum(counts) if known else None)
    if tokenizer.get_vocab_size() < int(size):
        found = tokenizer.get_vocab_size()
        sys.exit(f"--tokenizer={settings.tokenizer}: the text has no more than {found} tokens; ask for train:{found}.")
    return tokenizer


# ---- From texts to tokens -------------------------------------------------------------------------------------------
#
# Documents come as pieces, (split, text, last): nearly all in one piece, huge ones in several, cut only where that does
# not change the tokens. last is true for the final piece of a document, the one that <|endoftext|> follows.


def split_of(text, val_fraction):
    """Whether a document is for "train" or for "val", evaluation: a function of its text alone, so that no choice of
    files, machine or order changes it, and duplicates are on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def batches(stream, size=1_000_000):
    """Lists of pieces that have about size bytes together."""
    batch, length = [], 0
    for piece in stream:
        batch.append(piece)
        length += len(piece[1].encode())
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def tokenize(tokenizer, stream, at_once=3):
    """Yield each batch with the tokens of its pieces, as uint16. The library spreads a batch over the cores; several
    batches at once keep them busy while the last pieces of one are done."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    def work(batch):
        encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        ids = [encoding.ids + [end_of_text] * last for encoding, (_, _, last) in zip(encodings, batch, strict=True)]
        return batch, [np.array(tokens, "<u2") for tokens in ids]

    with ThreadPoolExecutor(at_once) as pool:
        pending = deque()
        for batch in stream:
            pending.append(pool.submit(work, batch))
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---- Shards ---------------------------------------------------------------------------------------------------------


def write_shard(index, file, tokenizer, origin, settings):
    """Tokenize one file into the bins of a shard, then write its json: origin, which is source and settings, and what
    was counted."""
    folder = Path(settings.data_dir)
    for leftover in folder.glob(f"*-{index:05d}.bin.*.tmp"):
        leftover.unlink()
    temporary = {split: folder / f"{split}-{index:05d}.bin.{secrets.token_hex(4)}.tmp" for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    texts, start = documents(file, settings.max_documents), time.monotonic()
    texts = ((split_of(text, settings.val_fraction), text) for text in texts)
    total = min(filter(None, (file.count(), settings.max_documents)), default=None)
    bar = tqdm(desc=f"shard {index:05d}", total=total, unit=" documents", disable=None)  # only on a terminal
    try:
        with bar, open(temporary["train"], "xb") as train, open(temporary["val"], "xb") as val:
            bins = {"train": train, "val": val}
            stream = ahead(batches(pieces(texts, tokenizer)))  # read in a thread, ahead of what is tokenized
            for batch, ids in tokenize(tokenizer, stream):
                for (split, text, last), tokens in zip(batch, ids, strict=True):
                    bins[split].write(tokens)
                    hashes[split].update(tokens)
                    counts[split]["documents"] += last
                    counts[split]["tokens"] += len(tokens)
                    counts[split]["bytes"] += len(text.encode())
                    bar.update(last)
                tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
                bar.set_postfix_str(f"{tokens:,} tokens, {tokens / (time.monotonic() - start):,.0f} tokens/s")
        if not counts["train"]["tokens"]:
            sys.exit(f"{file.name} has no text to train on.")
        if counts["val"]["tokens"]:
            counts["val"] |= baselines(*(np.memmap(temporary[split], "<u2", "r") for split in SPLITS))
        for split in SPLITS:
            rename_whole(temporary[split], folder / f"{split}-{index:05d}.bin")
            counts[split]["sha256"] = hashes[split].hexdigest()
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    write_shard_json(shard_path(folder, index), origin | counts)
    for split, count in counts.items():
        print(f"shard {index:05d} {split}: {count['documents']:,} documents, {count['tokens']:,} tokens", flush=True)
    if "bigram_loss" in counts["val"]:
        unigram, bigram = counts["val"]["unigram_loss"], counts["val"]["bigram_loss"]
        print(f"baselines, in nats per token: {unigram:.2f} by frequency, {bigram:.2f} by the token before", flush=True)
    if not counts["val"]["tokens"]:
        again = f"remove {shard_path(folder, index)} and repeat with a larger --val_fraction"
        print(f"no document was kept to evaluate on, and train.py needs some: {again}", flush=True)


def chosen(shards, number_of_files):
    """The numbers in a choice such as 0-3,7."""
    numbers = set()
    for part in shards.split(","):
        if not (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())):
            sys.exit(f"--shards={shards}: write numbers and ranges, as 0 or 0-3 or 0,7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < number_of_files:
            sys.exit(f"--shards={shards}: the source has files 0 to {number_of_files - 1}.")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def main(settings):
    os.environ |= {"RAYON_NUM_THREADS": str(settings.num_proc), "TOKENIZERS_PARALLELISM": "true"}
    files, default = list_files(settings.source, settings.revision)  # each with name, revision, texts() and count()
    shards = chosen(settings.shards or default, len(files))
    os.makedirs(settings.data_dir, exist_ok=True)
    tokenizer, tokenizer_sha256 = get_tokenizer(settings, [files[index] for index in shards])
    for index in shards:
        origin = {
            "source": settings.source,
            "file": files[index].name,
            "revision": files[index].revision,
            "max_documents": settings.max_documents,
            "val_fraction": settings.val_fraction,
            "tokenizer": settings.tokenizer,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocabulary_size(tokenizer),
        }
        path = shard_path(settings.data_dir, index)
        release = lock(f"{path}.lock", f"another process prepares {path} now; choose other --shards, or wait for it.")
        try:
            if path.exists():
                check_made_alike(path, origin)
                print(f"shard {index:05d} is there already", flush=True)
            else:
                write_shard(index, files[index], tokenizer, origin, settings)
        except OSError as error:
            reason = error.strerror or error
            sys.exit(f"shard {index:05d} could not be written: {reason}; what was begun is removed.")
        finally:
            release()


if __name__ == "__main__":
    run(main, "prepare", Settings, "stopped; the same command continues with the shards that are missing")
