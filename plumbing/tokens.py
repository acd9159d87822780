"""Around prepare.py: getting hold of a tokenizer, cutting huge texts, baselines for the loss."""

import hashlib
import itertools
import os
import sys
from pathlib import Path

from plumbing.files import locked, write_whole
from plumbing.pretrained import newest_checkpoint
from plumbing.sources import hub_errors

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"

# ---- The tokenizer --------------------------------------------------------------------------------------------------


def get_tokenizer(data_dir, name, train, markers=(END_OF_TEXT,)):
    """The tokenizer of that name and the sha256 of its tokenizer.json, which is left in data_dir for all its shards.

    For train:SIZE, train() makes one if none is there yet. Exits with one sentence for one that cannot be used, such as
    one without the markers of texts, or of messages.
    """
    here = Path(data_dir) / "tokenizer.json"
    if name.startswith("train:"):
        if not here.exists():
            with locked(f"{here}.lock", f"another process trains {here} now; start again when it is there."):
                if not here.exists():  # it may have been finished just before the lock was free
                    write_whole(here, train().to_str(pretty=True).encode())
        wanted = here.read_bytes()
    elif os.path.isdir(name):
        path = Path(newest_checkpoint(name) or name, "tokenizer.json")
        if not path.exists():
            sys.exit(f"--tokenizer={name} has no tokenizer.json.")
        wanted = path.read_bytes()
    elif os.path.isfile(name):
        wanted = Path(name).read_bytes()
    elif name.startswith(("data/", "out/")):  # where recipes keep theirs; never a name on the hub
        sys.exit(f"--tokenizer={name} is not here yet: first run the recipe that makes it.")
    else:
        with hub_errors(name, instead="; without a network, --tokenizer=train:4096 makes one from your text"):
            from huggingface_hub import hf_hub_download

            wanted = Path(hf_hub_download(name, "tokenizer.json")).read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(wanted)
    except Exception as error:  # the library has no type of its own for this
        sys.exit(f"--tokenizer={name} is not a tokenizer.json: {error}")
    size = vocabulary_size(tokenizer)
    if name.startswith("train:") and name != f"train:{size}":
        sys.exit(f"{here} has {size} tokens, and --tokenizer={name} is another; take another --data_dir.")
    if size > 65_536:
        sys.exit(f"--tokenizer={name} has {size:,} tokens; bins hold 16-bit numbers, so 65,536 at most.")
    for marker in markers:
        if tokenizer.token_to_id(marker) is None:
            sys.exit(f"--tokenizer={name} has no {marker}, which marks where texts, or messages, end.")
    if not here.exists():
        write_whole(here, wanted)
    if here.read_bytes() != wanted:
        sys.exit(f"{here} is another tokenizer than --tokenizer={name}; take another --data_dir.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.sha256(wanted).hexdigest()


def vocabulary_size(tokenizer):
    """The rows that an embedding needs: the largest id plus one. Some tokenizers leave ids out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


# ---- Huge texts -----------------------------------------------------------------------------------------------------

HUGE = 250_000  # characters; the library takes some 100 bytes for each while it encodes a text


def batches(items, size=1_000_000, length=len):
    """Lists of items that have about this length together."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += length(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def encode(tokenizer, documents, chat=None):
    """The token ids of each document, uint16: of texts, or with a chat format of conversations."""
    if not chat:
        return encode_texts(tokenizer, documents)
    documents = [chat.with_system(messages) for messages in documents]
    ids = iter(encode_texts(tokenizer, [message["content"] for messages in documents for message in messages]))
    return [np.array(chat.join(messages, list(itertools.islice(ids, len(messages)))), "<u2") for messages in documents]


def encode_texts(tokenizer, texts):
    """The token ids of each text, uint16, on all cores. Huge texts go through the tokenizer in pieces."""
    cut = [list(pieces(tokenizer, text)) for text in texts]
    encodings = (
        encoding
        for batch in batches(itertools.chain.from_iterable(cut))
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    )
    ids = (np.array(encoding.ids, "<u2") for encoding in encodings)
    return [np.concatenate(list(itertools.islice(ids, len(parts)))) for parts in cut]


def pieces(tokenizer, text, size=HUGE):
    """A text in pieces of about size characters, cut only where the tokenizer cuts it too, so the tokens are the same.

    A single word, such as a genome, is never cut, and takes about 120 bytes of memory for each character. Nor is any
    text where the tokenizer has a normalizer, which may join characters across a cut.
    """
    start, reach = 0, size if not tokenizer.normalizer else len(text)
    while len(text) - start > reach:
        if cut := last_cut(tokenizer, text[start : start + reach]):
            yield text[start : start + cut]
            start, reach = start + cut, size
        else:
            reach *= 2
    yield text[start:]


def last_cut(tokenizer, text, around=1000):
    """The last place where a text can be cut without changing its tokens; None if there is none.

    Tokens never cross the words of the pre-tokenizer, which goes through a text from left to right. To see where it
    cuts, it is started at eight places in a row near the end. Runs that once cut at the same place do so ever after, so
    what all agree on is taken for the cuts of the whole text. (Not so where a word may be as long as a text, such as
    all between two quotation marks.) Its last two words may be longer in what follows. Some tokenizers treat the
    beginning of a text as something else, which shows when the two sides of a cut are encoded.
    """
    start = max(0, len(text) - around)
    agreed = set(range(len(text)))
    for first in range(start, start + 8) if start else [0]:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text[first:]) if tokenizer.pre_tokenizer else []
        agreed &= {first + begin for _, (begin, _) in words[1:-2]}
    for cut in sorted(agreed, reverse=True)[:100]:
        sides = text[max(0, cut - 100) : cut], text[cut : cut + 100]
        whole, left, right = (encoding.ids for encoding in tokenizer.encode_batch(["".join(sides), *sides]))
        if whole == left + right:
            return cut
    return last_cut(tokenizer, text, 8 * around) if start > 0 else None


# ---- Baselines ------------------------------------------------------------------------------------------------------


def baselines(train, val, prior=100):
    """The loss, in nats per token, of two predictors that know only the counts of train, on the first 4M tokens of val.

    unigram_loss predicts each token by its frequency (plus one, for those never seen). bigram_loss predicts it from the
    token before. Most pairs are rare, so their counts are mixed with the frequencies, as if each token had been
    followed by `prior` more tokens drawn by frequency (MacKay & Peto 1995, "A hierarchical Dirichlet language model").
    A model that learns gets below the first, then below the second.
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
    vocabulary = int(max(train.max(), val.max())) + 1
    unigram = (counts + 1) / (counts.sum() + vocabulary)
    bigram = (pair_counts + prior * unigram[pairs & 0xFFFF]) / (counts[pairs >> 16] + prior)
    return {"unigram_loss": -float(np.log(unigram[val]).mean()), "bigram_loss": -float(np.log(bigram[place]).mean())}


def as_pairs(tokens):
    """Each token but the last with the one after it, as one number: (n,) uint16 -> (n - 1,) uint32."""
    return tokens[:-1].astype(np.uint32) << 16 | tokens[1:]
