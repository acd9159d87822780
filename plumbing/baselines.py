"""What prediction costs without a model: baselines for the loss."""

import numpy as np
from tqdm import tqdm


def baselines(train, val, prior=100):
    """The loss on val, or on its first four million tokens, of two predictors that know only the counts of train: the
    cross-entropy, in nats per token.

    unigram_loss predicts each token by its frequency (plus one, for those that never came). bigram_loss predicts it
    from the token before. Most pairs are rare, so their counts are mixed with the frequencies, as if each token had
    been followed by `prior` more tokens drawn by frequency (MacKay & Peto 1995, "A hierarchical Dirichlet language
    model"). A model that learns gets below the first, then below the second.
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
