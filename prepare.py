"""Documents to tokens: read a corpus, tokenize it, and write it as train.py reads it.

    python prepare.py config/smollm2.py                                the first file of cosmopedia-v2, from the hub
    python prepare.py config/tiny.py                                   the documentation of Python, without a network
    python prepare.py --source=input.txt --data_dir=data/mine          your own text, or a folder of texts
    python prepare.py config/chat.py                                   conversations

A file of rows (parquet, jsonl, json) becomes a shard; all text files together, or the documentation, become one:

    tokenizer.json                       the tokenizer of all shards
    train-00000.bin   val-00000.bin      the tokens, little-endian uint16, and nothing else
    shard-00000.json                     where they come from and how many there are; written last

Files are written under a temporary name and renamed when complete, and a shard is complete only when its json exists.
So preparing can be interrupted and repeated, and several machines can prepare different shards into one folder.
"""

import hashlib
import itertools
import os
import re
import secrets
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from plumbing.chat import ChatML
from plumbing.files import locked, new_folder, rename_whole, say, why
from plumbing.settings import Count, Fraction, run
from plumbing.shards import SPLITS, check_made_alike, shard_path, write_shard_json
from plumbing.sources import ahead, documents, holds_conversations, list_files
from plumbing.tokens import END_OF_TEXT, baselines, batches, encode, get_tokenizer, pieces, vocabulary_size

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
    tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"  # SmolLM2's; or another hub id, a file or folder, or train:4096
    val_fraction: Fraction | None = None  # kept for evaluation; unset: 0.005, or 0.1 if there are fewer than 2000
    system: str = ""  # system message for conversations without one
    num_proc: Count = os.cpu_count() or 1  # cores to tokenize on


# ---- The tokenizer --------------------------------------------------------------------------------------------------
#
# A model reads tokens, integers below V, not text. Byte-pair encoding (Sennrich et al. 2015, arXiv 1508.07909; on bytes
# since GPT-2) splits a text into words, digits and punctuation. At first every byte is a token. Training makes the most
# frequent pair of neighbouring tokens a new token, and repeats this until there are V of them. So a frequent word
# becomes one token, a rare one a few, and any text can be expressed. With SmolLM2's tokenizer (V = 49,152):
#
#     "The capital of France is"  ->  The| capital| of| France| is  ->  504 3575 282 4649 314
#     "def fibonacci(n):"         ->  def| fib|onacci|(|n|):        ->  1604 3987 46477 24 94 727
#
# A space belongs to the word after it: " capital" is one token. <|endoftext|> is 0; it ends every document, so that a
# model learns where texts begin and end.

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> "
    "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> "
    "<empty_output>"
).split()  # SmolLM2's, in its order


def train_tokenizer(name, documents):
    """A byte-level BPE by SmolLM2's recipe: single digits, no space added in front, special tokens first. name is
    train:SIZE."""
    size = name.removeprefix("train:")
    least = len(SPECIAL_TOKENS) + 256
    if not size.isdecimal() or not least <= int(size) <= 65_536:
        sys.exit(f"--tokenizer={name}: the size must be a number from {least} to 65536.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    say(f"training a tokenizer of {int(size):,} tokens")
    documents = tqdm(documents, "reading", unit=" documents", leave=False, delay=1, disable=None)
    copy = Tokenizer.from_str(tokenizer.to_str())  # says where huge texts can be cut; the original is locked meanwhile
    texts = (text for document in documents for text in contents(document))
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(copy, text)), trainer)
    if (found := tokenizer.get_vocab_size()) < int(size):
        sys.exit(f"--tokenizer={name}: the text yields only {found} tokens; ask for train:{found}.")
    return tokenizer


# ---- Two sides ------------------------------------------------------------------------------------------------------
#
# How well a model predicts has to be measured on texts that it was not trained on. So every document is on one of two
# sides, "train" or "val" (for evaluation). A source of few texts, such as a single book, is split within each text.


def how_to_split(settings, files, conversations):
    """The fraction kept for evaluation, and whether to cut it from the end of each text: where it would be fewer than
    10 whole documents."""
    fraction, count = settings.val_fraction, 0
    enough = 10 / (fraction or 0.005)  # documents, to keep 10 of them
    for file in files:
        number = file.count() or 0  # None: the file cannot be read, which is reported when its turn comes
        count += min(number, settings.max_documents or number)
        if count >= enough:
            break
    if fraction is None:
        fraction = 0.005 if count >= enough else 0.1
    within = 0 < fraction * count < 10 and not conversations
    if within:
        say(f"too few documents, {count}, to keep whole ones for evaluation: the last {fraction:.3g} of each is kept")
    return fraction, within


def split_of(document, val_fraction):
    """Which side a document is on, by a hash of its text, or of a conversation's first question.

    No choice of files, machine or order changes it, and a duplicate is never on both sides.
    """
    text = document if isinstance(document, str) else next(m["content"] for m in document if m["role"] != "system")
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def cut_of(text, val_fraction):
    """Where to cut a text, to keep its end for evaluation: after a paragraph, else after a line, else after a word."""
    least = int(val_fraction * len(text))  # characters of the end; it may be twice as long, for a better cut
    for mark in ("\n\n", "\n", " ", ""):
        if (place := text.rfind(mark, max(0, len(text) - 2 * least), len(text) - least)) >= 0:
            return place + len(mark)


def parts_of(file, max_documents, conversations, val_fraction, within):
    """Yield (side, document) for the documents of a file: whole ones, or the two parts of each text."""
    for document in documents(file, max_documents):
        if isinstance(document, list) != conversations:
            sys.exit(f"{file.name}: the source has both texts and conversations; prepare them into two folders.")
        if not within:
            yield split_of(document, val_fraction), document
            continue
        cut = cut_of(document, val_fraction)
        for side, part in (("train", document[:cut]), ("val", document[cut:])):
            if part.strip():
                yield side, part


# ---- From documents to bins -----------------------------------------------------------------------------------------
#
# A document is a text, or a conversation: a list of messages. A message becomes <|im_start|>, its role, a newline, its
# content, <|im_end|> and another newline. Roles and contents are encoded as text, and the markers put in as ids: no
# web page can end a document, and nobody's words can open a turn, even if they spell a marker.


def contents(document):
    """The texts in a document: its own, or those of a conversation's messages."""
    return [document] if isinstance(document, str) else [message["content"] for message in document]


def tokenize(tokenizer, parts, chat=None, at_once=3):
    """Yield (side, document, ids) for each (side, document); ids are uint16. The library spreads a batch over the
    cores; several batches run at once, so that cores that are done with one go on to the next."""
    tokenizer.encode_special_tokens = True  # despite its name: those in a text become ordinary text
    pending = deque()

    def oldest():
        batch, encoded = pending.popleft()
        for (side, document), ids in zip(batch, encoded.result(), strict=True):
            yield side, document, ids

    with ThreadPoolExecutor(at_once) as pool:
        # Read in a thread, ahead of what is tokenized.
        for batch in ahead(batches(parts, length=lambda part: sum(map(len, contents(part[1]))))):
            encoded = pool.submit(encode, tokenizer, [document for _, document in batch], chat)
            pending.append((batch, encoded))
            if len(pending) == at_once:
                yield from oldest()
        while pending:
            yield from oldest()


def write_shard(index, file, tokenizer, chat, origin, settings, parts):
    """Tokenize one file into the two bins of a shard, then write its json: origin, and what was counted."""
    folder = Path(settings.data_dir)
    for leftover in folder.glob(f"*-{index:05d}.bin.*.tmp"):
        leftover.unlink()
    temporary = {split: folder / f"{split}-{index:05d}.bin.{secrets.token_hex(4)}.tmp" for split in SPLITS}
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    end_of_text = np.array([tokenizer.token_to_id(END_OF_TEXT)], "<u2")
    total = min(filter(None, (file.count(), settings.max_documents)), default=None)  # the smaller one that is known
    bar = tqdm(desc=f"shard {index:05d}", total=total, unit=" documents", disable=None)  # only on a terminal
    start = time.monotonic()
    try:
        with bar, open(temporary["train"], "xb") as train, open(temporary["val"], "xb") as val:
            for split, document, ids in tokenize(tokenizer, parts(file), chat):
                {"train": train, "val": val}[split].write(np.append(ids, end_of_text))
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids) + 1
                counts[split]["bytes"] += sum(len(text.encode()) for text in contents(document))
                tokens = counts["train"]["tokens"] + counts["val"]["tokens"]
                bar.set_postfix_str(f"{tokens / (time.monotonic() - start):,.0f} tokens/s", refresh=False)
                bar.update()
        if not counts["train"]["tokens"]:
            sys.exit(f"{file.name} has no text to train on.")
        if counts["val"]["tokens"] and not chat:  # baselines count all tokens; in conversations only answers matter
            counts["val"] |= baselines(*(np.memmap(temporary[split], "<u2", "r") for split in SPLITS))
        for split in SPLITS:
            with open(temporary[split], "rb") as bin:
                counts[split]["sha256"] = hashlib.file_digest(bin, "sha256").hexdigest()
            rename_whole(temporary[split], folder / f"{split}-{index:05d}.bin")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    write_shard_json(shard_path(folder, index), origin | counts)
    for split, count in counts.items():
        say(f"shard {index:05d} {split}: {count['documents']:,} documents, {count['tokens']:,} tokens")
    if "bigram_loss" in counts["val"]:
        unigram, bigram = counts["val"]["unigram_loss"], counts["val"]["bigram_loss"]
        say(f"baselines, in nats per token: {unigram:.2f} by frequency, {bigram:.2f} by the token before")
    if not counts["val"]["tokens"]:
        again = f"remove {shard_path(folder, index)} and repeat with a larger --val_fraction"
        say(f"no document was kept to evaluate on, and train.py needs some: {again}")


# ---- The command ----------------------------------------------------------------------------------------------------


def chosen(shards, number_of_files):
    """The numbers in a choice such as 0-3,7."""
    numbers = set()
    for part in shards.split(","):
        if not (match := re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())):
            sys.exit(f"--shards={shards}: write numbers and ranges, such as 0, 0-3 or 0,7.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < number_of_files:
            sys.exit(f"--shards={shards}: the source has files 0 to {number_of_files - 1}.")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def main(settings):
    os.environ |= {"RAYON_NUM_THREADS": str(settings.num_proc), "TOKENIZERS_PARALLELISM": "true"}
    files, default = list_files(settings.source, settings.revision)  # each with name, revision, rows() and count()
    shards = chosen(settings.shards or default, len(files))
    conversations = holds_conversations(files[shards[0]])
    if settings.system and not conversations:
        sys.exit(f"--system={settings.system} is for conversations, and {settings.source} has texts.")
    val_fraction, within = how_to_split(settings, files, conversations)
    how = dict(conversations=conversations, val_fraction=val_fraction, within=within)
    parts = partial(parts_of, max_documents=settings.max_documents, **how)

    def new_tokenizer():  # called for train:SIZE; it reads the training side only
        sides = itertools.chain.from_iterable(parts(files[index]) for index in shards)
        return train_tokenizer(settings.tokenizer, (part for side, part in sides if side == "train"))

    with new_folder(settings.data_dir, "data_dir"):
        markers = SPECIAL_TOKENS[: 3 if conversations else 1]  # which the tokenizer must have
        tokenizer, tokenizer_sha256 = get_tokenizer(settings.data_dir, settings.tokenizer, new_tokenizer, markers)
    chat = ChatML(tokenizer, settings.system) if conversations else None
    for index in shards:
        origin = {
            "source": settings.source,
            "file": files[index].name,
            "revision": files[index].revision,
            "max_documents": settings.max_documents,
            "val_fraction": val_fraction,
            "split": "within documents" if within else "by document",
            "tokenizer": settings.tokenizer,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocabulary_size(tokenizer),
        } | ({"format": "chatml", "system": settings.system} if chat else {})
        path = shard_path(settings.data_dir, index)
        with locked(f"{path}.lock", f"another process prepares {path} now; choose other --shards, or wait for it."):
            try:
                if path.exists():
                    check_made_alike(path, origin)
                    say(f"shard {index:05d} is there already")
                else:
                    write_shard(index, files[index], tokenizer, chat, origin, settings, parts)
            except OSError as error:
                sys.exit(f"shard {index:05d} could not be written: {why(error)}; what was begun is removed.")


if __name__ == "__main__":
    run(main, "prepare", Settings, "stopped; the same command continues with the shards that are missing")
