"""Huge texts, cut so that their tokens do not change."""


def pieces(texts, tokenizer, size=500_000):
    """(split, text), ... -> (split, piece of it, whether the text ends with it), ...

    A huge text is cut after about size characters, so that memory does not depend on its length, and only where the
    tokenizer cuts it too, so the tokens are the same. One word, such as a genome, is never cut, and takes about 120
    bytes of memory for each character.
    """
    for split, text in texts:
        start, reach = 0, size
        while len(text) - start > reach:
            if cut := last_cut(tokenizer, text[start : start + reach]):
                yield split, text[start : start + cut], False
                start, reach = start + cut, size
            else:
                reach *= 2
        yield split, text[start:], True


def last_cut(tokenizer, text, around=1000):
    """The last place where a text can be cut without changing its tokens; None if there is none.

    Tokens never cross the words of the pre-tokenizer, which goes through a text from left to right. To see where it
    cuts, it is started at eight places in a row near the end. Runs that once cut at the same place do so ever after, so
    what all agree on is taken for the cuts of the whole text. Its last two words may be longer in what follows. Some
    tokenizers treat the beginning of a text as something else, which shows when the two sides of a cut are encoded.
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
