"""What a run trains and evaluates on: the shards of a folder, or of the folders of a mix, cut into sequences.

train.py maps the bins into memory. A sequence is seq_len + 1 tokens of a bin, so that each of seq_len tokens has the
next one as its target.
"""

import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from plumbing.chat import Answers, ChatML
from plumbing.shards import identity, open_bins, read_shard_json, sha256

import numpy as np
from tokenizers import Tokenizer

# ---- Sequences ------------------------------------------------------------------------------------------------------


class Sequences:
    """The tokens of some bins as one endless list of training sequences, epoch after epoch.

    An epoch visits every sequence once, in an order drawn from (seed, epoch); none crosses from one bin into another.
    Each epoch starts at a random offset, so that texts are not cut in the same places again. Sequence i is a pure
    function of (seed, i): the same on any number of devices and after any number of restarts.
    """

    def __init__(self, bins, seq_len, seed, answers=None):
        """answers: of conversations, where they are, if they alone are to be learned."""
        self.answers = answers
        self.bins = [bin for bin in bins if len(bin) > seq_len]
        self.counts = [max(1, len(bin) // seq_len - 1) for bin in self.bins]  # one less than fit: room for the offset
        self.per_epoch = sum(self.counts)
        self.seq_len, self.seed, self.epoch = seq_len, seed, None

    def __getitem__(self, i):  # -> (seq_len + 1,) uint16
        bin, start = self.place(i)
        return bin[start : start + self.seq_len + 1]

    def place(self, i):
        """Where sequence i is: its bin, and its first token."""
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
                return bin, offset + i * self.seq_len
            i -= count


class Mix:
    """The sequences of several folders as one list, in fixed shares.

    Of the first n sequences, floor(n x share) are of the first folder. Those of the others are numbered again, and
    shared out in the same way. So the shares hold within any stretch, and sequence i is still a function of (seed, i).
    """

    def __init__(self, parts, shares, vocab_size=2**16):
        """parts are {name: Sequences}; shares, exact fractions, add up to 1."""
        self.parts, self.shares, self.vocab_size = parts, shares, vocab_size
        self.seq_len = next(iter(parts.values())).seq_len

    def seen(self, n):
        """How many of the first n sequences are of each part: {name: count}."""
        counts, rest = {}, Fraction(1)
        for name, share in zip(self.parts, self.shares, strict=True):
            counts[name] = math.floor(n * share / rest)
            n, rest = n - counts[name], rest - share
        return counts

    def find(self, i):
        """The part that sequence i is of, and its number there."""
        before, after = self.seen(i), self.seen(i + 1)
        name = next(name for name in self.parts if after[name] > before[name])
        return name, before[name]

    def batch(self, first, count):
        """Sequences first to first + count - 1: their tokens, (count, seq_len + 1) int64, and which of them are to be
        learned, bool."""
        places = []
        for name, number in map(self.find, range(first, first + count)):
            places.append((*self.parts[name].place(number), self.parts[name].answers))
        return stacked(places, self.seq_len, self.vocab_size)


def validation_sequences(bins, seq_len, tokens, vocab_size=2**16, answers=None):
    """Sequences that hold about this many tokens, spread evenly over the bins, the same ones every time."""
    places = [(bin, start, answers) for bin in bins for start in range(0, len(bin) - seq_len, seq_len)]
    count = min(len(places), max(1, tokens // seq_len))
    picked = [places[i] for i in np.linspace(0, len(places) - 1, count).astype(int)]
    return stacked(picked, seq_len, vocab_size)


def stacked(places, seq_len, vocab_size):
    """The tokens at some places (bin, start, answers), (n, seq_len + 1) int64, and which are to be learned, bool."""
    tokens, learned = np.empty((len(places), seq_len + 1), np.int64), np.ones((len(places), seq_len + 1), bool)
    for row, (bin, start, answers) in enumerate(places):
        tokens[row] = bin[start : start + seq_len + 1]
        if answers:
            learned[row] = answers.mask(bin, start, seq_len + 1)
    if tokens.size and tokens.max() >= vocab_size:
        sys.exit(f"the data has a token {tokens.max()} beyond the vocabulary of {vocab_size}: a bin is damaged.")
    return tokens, learned


# ---- The folders of a run as training data --------------------------------------------------------------------------


@dataclass
class Corpus:
    """What a run trains and evaluates on."""

    shards: dict  # file name -> what the shard says of itself
    train: Mix
    val: dict  # folder name -> the sequences of every evaluation: tokens, and which are to be learned
    val_bytes: dict  # folder name -> of the text that their targets stand for, UTF-8
    questions: list  # of conversations, the ids of some up to where an answer begins, on the validation side
    tokenizer_file: Path
    tokenizer: Tokenizer
    vocab_size: int
    baselines: dict  # unigram_loss and bigram_loss
    left_out: list  # shards that arrived after the run had begun

    def scores(self, totals):
        """val_loss and val_bpb from the nats and tokens of each folder: of all, weighted by the shares of a mix, and
        then also of each."""
        rows = [(*total, size) for total, size in zip(totals, self.val_bytes.values(), strict=True)]
        weights = [share / len(tokens) for share, (tokens, _) in zip(self.train.shares, self.val.values(), strict=True)]
        weighted = [[float(weight) * number for number in row] for weight, row in zip(weights, rows, strict=True)]
        sums = {"": tuple(map(sum, zip(*weighted, strict=True)))}
        if len(rows) > 1:
            sums |= {f"/{name}": row for name, row in zip(self.val, rows, strict=True)}
        values = {f"val_loss{name}": nats / tokens for name, (nats, tokens, _) in sums.items()}
        values |= {f"val_bpb{name}": nats / math.log(2) / size for name, (nats, _, size) in sums.items()}
        return values | self.baselines

    @property
    def system(self):
        """The system message of conversations that have none; None if there are no conversations."""
        return next((shard["system"] for shard in self.shards.values() if "system" in shard), None)

    @property
    def chats(self):
        """Whether there are conversations, so that a model learns to answer."""
        return self.system is not None

    @property
    def ends(self):
        """The tokens that begin and end what a model of this corpus writes: an answer, or a text."""
        start, end = ("<|im_start|>", "<|im_end|>") if self.chats else ("<|endoftext|>",) * 2
        return {"bos_token_id": self.tokenizer.token_to_id(start), "eos_token_id": self.tokenizer.token_to_id(end)}

    def prompt(self, words):
        """The ids that ask for what comes after some words: a text, or an answer."""
        if not self.chats:
            return self.tokenizer.encode(words).ids or [self.ends["bos_token_id"]]
        return ChatML(self.tokenizer, self.system).ids([{"role": "user", "content": words}])

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

    def check_model(self, config, settings, defaults):
        """Exit if the data or the settings ask for more than a model has."""
        for name, value in vars(settings.model).items():  # with --init_from, the architecture is the checkpoint's
            has = getattr(config, name)
            if settings.init_from != "scratch" and value not in (getattr(defaults, name), has):
                sys.exit(
                    f"--model.{name}={value} cannot change the model of --init_from={settings.init_from}, it is {has}."
                )
        if config.vocab_size < self.vocab_size or config.max_position_embeddings < settings.seq_len:
            sys.exit(
                f"the model has {config.vocab_size} tokens and {config.max_position_embeddings} positions, too few for "
                f"the {self.vocab_size} tokens of the data, or for seq_len = {settings.seq_len}."
            )
        prompt = len(self.prompt(settings.sample_prompt))
        if settings.sample_interval and prompt >= config.max_position_embeddings:
            sys.exit(f"--sample_prompt has {prompt} tokens, and leaves none of the model's positions for a sample.")


def folders_of(data_dir):
    """{folder: share} of a folder, or of a mix such as data/web:0.8,data/code:0.2, whose shares are made to add up to
    1; exits if it is neither."""
    parts = [re.fullmatch(r"(.+):(\d*\.?\d+)", part) for part in str(data_dir).split(",")]
    if None in parts and (len(parts) == 1 or Path(data_dir).exists()):
        return {Path(data_dir): Fraction(1)}
    if None in parts:
        sys.exit(f"--data_dir={data_dir}: a mix is written FOLDER:SHARE,FOLDER:SHARE; shares are numbers such as 0.8.")
    weights = {Path(part[1].strip()): Fraction(part[2]) for part in parts}
    weights = dict(sorted(weights.items(), key=lambda item: item[0].name))  # in any order, anywhere, the same mix
    if len({folder.name for folder in weights}) < len(parts) or not all(weights.values()):
        sys.exit(f"--data_dir={data_dir}: folders of a mix need different names, and shares above 0.")
    return {folder: weight / sum(weights.values()) for folder, weight in weights.items()}


def open_corpus(data_dir, seq_len, seed, eval_tokens, train_on=None, verify=False, listed=None):
    """The corpus in a folder, or in the folders of a mix; exits with one sentence if it is missing, damaged, mixed by
    mistake, or too small.

    listed are the shards of a run that is resumed: they must be unchanged, and others are left out.
    """
    folders, shards = folders_of(data_dir), {}
    for folder, share in folders.items():
        found = {path.name: read_shard_json(path) for path in sorted(folder.glob("shard-*.json"))}
        if not found:
            sys.exit(f"{folder} holds no shard-NNNNN.json: first run prepare.py with the same recipe or --data_dir.")
        if len(folders) > 1:
            found = {f"{folder.name}/{name}": shard | {"share": str(share)} for name, shard in found.items()}
        shards |= found
    left_out = sorted(shards.keys() - listed.keys()) if listed else []
    now = identity(shards)
    for name, value in identity(listed or {}).items():
        if now.get(name) != value:
            sys.exit(
                f"{data_dir}: {name} has (tokens, sha256, share) = {now.get(name)}, and {value} when the run began: "
                "bring that back, or begin another run with --init_from."
            )
    shards = {name: shard for name, shard in shards.items() if name not in left_out}
    vocab_size = max(shard["vocab_size"] for shard in shards.values())
    tokenizer_file, tokenizer = read_tokenizer(folders, shards)
    train, val, averages, questions = {}, {}, Counter(), []
    for folder, share in folders.items():
        own = {name: shard for name, shard in shards.items() if len(folders) == 1 or name.startswith(f"{folder.name}/")}
        bins = open_bins(folder, own, verify)
        if len(formats := {shard.get("format") for shard in own.values()}) > 1:
            sys.exit(f"{folder} holds texts and conversations: prepare them into two folders, and train on a mix.")
        answers = Answers(tokenizer) if formats == {"chatml"} else None
        for bin in bins["val"] if answers else ():
            questions += answers.questions(bin, tokenizer.token_to_id("<|endoftext|>"), 8, seq_len)
        train[folder.name] = Sequences(bins["train"], seq_len, seed, None if train_on == "all" else answers)
        val[folder.name] = validation_sequences(bins["val"], seq_len, int(eval_tokens * share), vocab_size, answers)
        for split, sequences in (("train", train[folder.name].bins), ("val", val[folder.name][0])):
            if not len(sequences):
                sys.exit(
                    f"{folder}: no {split} bin has more than seq_len = {seq_len} tokens; lower --seq_len, or prepare "
                    "more text or a larger --val_fraction."
                )
        for name, value in average_baselines(own).items():
            averages[name] += float(share) * value
    if len(systems := {shard["system"] for shard in shards.values() if "system" in shard}) > 1:
        several = " and ".join(map(repr, sorted(systems)))
        sys.exit(f"{data_dir} has conversations prepared with --system {several}: prepare them with the same.")
    averages = {} if systems else averages  # they count all tokens, and in conversations only answers matter
    mix = Mix(train, list(folders.values()), vocab_size)
    if train_on == "answers" and not any(part.answers for part in train.values()):
        sys.exit(f"--train_on=answers needs conversations, and {data_dir} has texts.")
    val_bytes = {name: count_bytes(tokenizer, tokens[:, 1:], learned[:, 1:]) for name, (tokens, learned) in val.items()}
    if 0 in val_bytes.values():
        sys.exit(
            f"{data_dir}: the validation side has no answer to evaluate on; raise --eval_tokens, or prepare it again "
            "with a larger --val_fraction, or with conversations in which the assistant answers."
        )
    of_all = shards, mix, val, val_bytes, questions[:8]
    return Corpus(*of_all, tokenizer_file, tokenizer, vocab_size, averages, left_out)


def read_tokenizer(folders, shards):
    """The tokenizer of all shards, and its file; exits if it is missing, or if they were made with several."""
    first, *others = shards
    for name in others:
        if shards[name]["tokenizer_sha256"] != shards[first]["tokenizer_sha256"]:
            sys.exit(f"{name} and {first} were made with different tokenizers; prepare them with the same.")
    path = min(folders) / "tokenizer.json"
    if not path.exists():
        sys.exit(f"{path} is missing, which prepare.py writes beside the bins.")
    if sha256(path) != shards[first]["tokenizer_sha256"]:
        sys.exit(f"{path} is not the one that the bins were made with; bring that back, or prepare them again.")
    return path, Tokenizer.from_file(str(path))


def average_baselines(shards):
    """unigram_loss and bigram_loss over some shards, by the tokens that they were counted on."""
    counts = [shard["val"] for shard in shards.values() if "unigram_loss" in shard["val"]]
    weights = [count["tokens"] for count in counts]
    return {
        name: float(np.average([count[name] for count in counts], weights=weights))
        for name in ("unigram_loss", "bigram_loss")
        if counts
    }


def count_bytes(tokenizer, tokens, learned):
    """The bytes of UTF-8 text that those of the tokens (n, T) stand for that are learned (n, T). Special tokens are no
    text."""
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"]):  # a character for each byte
        lengths = {id: len(token) for token, id in tokenizer.get_vocab().items() if id not in special}
        ids, counts = np.unique(tokens[learned], return_counts=True)
        return sum(lengths.get(int(id), 0) * int(count) for id, count in zip(ids, counts, strict=True))
    rows = [row[of_row].tolist() for row, of_row in zip(tokens, learned, strict=True)]
    return sum(len(text.encode()) for text in tokenizer.decode_batch(rows))
