"""Documents to tokens: read a corpus, tokenize it, and write it as train.py reads it.

    python prepare.py config/smollm2.py                                the first file of cosmopedia-v2, from the hub
    python prepare.py config/tiny.py                                   Python's own documentation, without a network
    python prepare.py --source='books/*.txt' --data_dir=data/books     your own text

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
import queue
import re
import secrets
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plumbing.bins import SPLITS, check_made_alike, shard_path, write_shard_json, write_whole
from plumbing.settings import Count, Fraction, load_settings
from plumbing.sources import documents, hub_errors, list_files

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm


@dataclass
class Settings:
    """Turn documents into files of tokens for train.py."""

    data_dir: str = "data/cosmopedia-v2"  # folder to write
    source: str = "HuggingFaceTB/smollm-corpus/cosmopedia-v2"  # dataset/folder on the hub, python-docs, path or glob
    shards: str | None = None  # which of the source's files: 0 or 0-3 or 0,7; unset: 0 of the hub's, all local ones
    revision: str | None = None  # branch, tag or commit of the dataset on the hub
    max_documents: Count | None = None  # stop after so many documents of each file
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"  # hub id, path of a tokenizer.json, or train:4096 to train one
    val_fraction: Fraction = 0.005  # share of the documents kept for evaluation
    num_proc: Count = os.cpu_count() or 1  # cores to tokenize on


END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()  # SmolLM2's, in its order: <|endoftext|> is 0

# ---- The tokenizer --------------------------------------------------------------------------------------------------


def get_tokenizer(settings, files):
    """The tokenizer and the sha256 of its tokenizer.json, which is left in data_dir. A folder's shards share one."""
    here = Path(settings.data_dir) / "tokenizer.json"
    if settings.tokenizer.startswith("train:"):
        if not here.exists():
            write_whole(here, train_tokenizer(settings, files).to_str(pretty=True).encode())
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
    if tokenizer.get_vocab_size() > 65_536:
        sys.exit(
            f"--tokenizer={settings.tokenizer} has {tokenizer.get_vocab_size():,} tokens; bins hold 16-bit numbers, so "
            "65,536 at most."
        )
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        sys.exit(f"--tokenizer={settings.tokenizer} has no {END_OF_TEXT} to set between documents.")
    if not here.exists():
        write_whole(here, wanted)
    if here.read_bytes() != wanted:
        sys.exit(f"{here} is another tokenizer than --tokenizer={settings.tokenizer}; take another --data_dir.")
    # Text cannot be trusted: a document that says <|endoftext|> gets those letters, not the token, so that no web page
    # can end a document or open a turn of a chat.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.sha256(wanted).hexdigest()


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
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    texts = (text for file in files for text in documents(file, settings.max_documents))
    texts = (text for text in texts if not for_evaluation(text, settings.val_fraction))
    print(f"training a tokenizer of {int(size):,} tokens", flush=True)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---- From texts to tokens -------------------------------------------------------------------------------------------


def for_evaluation(text, val_fraction):
    """Whether a document is kept for evaluation: a function of its text alone, so that no choice of files, machine or
    order changes it, and duplicates are on the same side."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


WORD_BREAK = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")  # a space between two letters, of any script


def pieces(texts, val_fraction, size=500_000):
    """(split, piece of a text, whether the text ends with it). A huge text is cut, so that memory does not depend on
    its length, and only between two words, where the tokenizer separates it too: the tokens are the same."""
    for text in texts:
        split, start = "val" if for_evaluation(text, val_fraction) else "train", 0
        while space := WORD_BREAK.search(text, start + size):
            yield split, text[start : space.start()], False
            start = space.start()
        yield split, text[start:], True


def batches(pieces, size=2_000_000):
    """Lists of pieces that have about so many characters together."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenize(tokenizer, batches, at_once=3):
    """Yield each batch with the tokens of its pieces, as uint16. The library spreads a batch over the cores; several
    batches at once keep them busy while the last pieces of one are done."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    def work(batch):
        encodings = tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        ids = [encoding.ids + [end_of_text] * last for encoding, (_, _, last) in zip(encodings, batch, strict=True)]
        return batch, [np.array(tokens, "<u2") for tokens in ids]

    with ThreadPoolExecutor(at_once) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(work, batch))
            if len(pending) == at_once:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def ahead(iterable, by=2):
    """The same items, made in a thread while the caller is busy with earlier ones."""
    items, done = queue.Queue(by), object()

    def work():
        try:
            for item in iterable:
                items.put((item, None))
            items.put((done, None))
        except BaseException as error:  # also the sentence of a sys.exit
            items.put((done, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = items.get()
        if error:
            raise error
        if item is done:
            return
        yield item


# ---- Baselines ------------------------------------------------------------------------------------------------------


def baselines(train, val, prior=100):
    """The cross-entropy, in nats a token, of two models that only count: what val, or its first four million tokens,
    costs who knows the counts of train.

    unigram_loss predicts each token by its frequency (plus one, for those that never came). bigram_loss predicts it
    from the token before. Most pairs are rare, so their counts are mixed with the frequencies, as if each token had
    been followed by `prior` more tokens drawn by frequency (MacKay & Peto 1995, "A hierarchical Dirichlet language
    model"). A model that learns passes the first, then the second.
    """
    val = val[: 2**22]
    if len(val) < 2:
        return {}
    counts = np.zeros(2**16)
    pairs, place = np.unique(as_pairs(val), return_inverse=True)
    pair_counts = np.zeros(len(pairs))
    for start in tqdm(range(0, len(train), 2**22), "counting pairs", leave=False, delay=1, disable=None):
        counts += np.bincount(train[start : start + 2**22], minlength=2**16)
        block = np.sort(as_pairs(train[start : start + 2**22 + 1]))
        pair_counts += np.searchsorted(block, pairs, "right") - np.searchsorted(block, pairs, "left")
    vocabulary = max(train.max(), val.max()) + 1
    unigram = (counts + 1) / (counts.sum() + vocabulary)
    bigram = (pair_counts + prior * unigram[pairs & 0xFFFF]) / (counts[pairs >> 16] + prior)
    return {"unigram_loss": -float(np.log(unigram[val]).mean()), "bigram_loss": -float(np.log(bigram[place]).mean())}


def as_pairs(tokens):
    """Each token but the last with the one after it, as one number: (n,) uint16 -> (n - 1,) uint32."""
    return tokens[:-1].astype(np.uint32) << 16 | tokens[1:]


# ---- Shards ---------------------------------------------------------------------------------------------------------


def write_shard(index, file, tokenizer, origin, settings):
    """Tokenize one file into the bins of a shard, and then say in its json what it is. origin is what made it."""
    folder = Path(settings.data_dir)
    for leftover in folder.glob(f"*-{index:05d}.bin.*.tmp"):
        leftover.unlink()
    temporary = {split: folder / f"{split}-{index:05d}.bin.{secrets.token_hex(4)}.tmp" for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    texts, start = documents(file, settings.max_documents), time.monotonic()
    bar = tqdm(desc=f"shard {index:05d}", unit=" documents", disable=None)  # silent when no terminal shows it
    try:
        with bar, open(temporary["train"], "xb") as train, open(temporary["val"], "xb") as val:
            bins = {"train": train, "val": val}
            for batch in tokenize(tokenizer, ahead(batches(pieces(texts, settings.val_fraction)))):
                for (split, text, last), tokens in zip(*batch, strict=True):
                    bins[split].write(tokens)
                    hashes[split].update(tokens)
                    counts[split]["documents"] += last
                    counts[split]["tokens"] += len(tokens)
                    counts[split]["bytes"] += len(text.encode())
                    bar.update(last)
                total = counts["train"]["tokens"] + counts["val"]["tokens"]
                bar.set_postfix_str(f"{total:,} tokens, {total / (time.monotonic() - start):,.0f} tokens/s")
        if not counts["train"]["tokens"]:
            sys.exit(f"{file.name} has no text to train on.")
        if counts["val"]["tokens"]:
            counts["val"] |= baselines(*(np.memmap(temporary[split], "<u2", "r") for split in SPLITS))
        for split in SPLITS:
            os.replace(temporary[split], folder / f"{split}-{index:05d}.bin")
            counts[split]["sha256"] = hashes[split].hexdigest()
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    write_shard_json(shard_path(folder, index), origin | counts)
    for split, count in counts.items():
        print(f"shard {index:05d} {split}: {count['documents']:,} documents, {count['tokens']:,} tokens", flush=True)
    if "bigram_loss" in counts["val"]:
        unigram, bigram = counts["val"]["unigram_loss"], counts["val"]["bigram_loss"]
        print(f"baselines, in nats a token: {unigram:.2f} by frequency, {bigram:.2f} by the token before", flush=True)
    if not counts["val"]["tokens"]:
        print("no document was kept to evaluate on, and train.py needs some: raise --val_fraction", flush=True)


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
    files, default = list_files(settings.source, settings.revision)
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
            "vocab_size": tokenizer.get_vocab_size(),
        }
        path = shard_path(settings.data_dir, index)
        if path.exists():
            check_made_alike(path, origin)
            print(f"shard {index:05d} is there already", flush=True)
            continue
        try:
            write_shard(index, files[index], tokenizer, origin, settings)
        except OSError as error:
            reason = error.strerror or error
            sys.exit(f"shard {index:05d} could not be written: {reason}; what was begun is removed.")


if __name__ == "__main__":
    try:
        main(load_settings("prepare", Settings))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues with the shards that are missing")
