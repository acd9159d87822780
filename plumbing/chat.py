"""Conversations, in ChatML, the format of SmolLM2's Instruct models:

<|im_start|>user
What is 2 + 2?<|im_end|>
<|im_start|>assistant
4<|im_end|>

A conversation is a list of messages, {"role": "user", "content": "What is 2 + 2?"} and so on.
"""

import re
from pathlib import Path

from plumbing.pretrained import read_json

import numpy as np
from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")

# The template that a checkpoint carries for other tools, a program in Jinja's language. What it says between its two
# generation marks are the answers: TRL makes its mask of them.
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nWORDS<|im_end|>\\n' }}{% endif %}"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def template(system=""):
    """The chat template of a checkpoint whose conversations begin with this system message where they have none."""
    words = system.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r").replace("'", r"\'")
    return (SYSTEM.replace("WORDS", words) if system else "") + TEMPLATE


def system_of(template):
    """The message that a template, ours or another, puts first where a conversation has no system message; "" if there
    is none. The template itself, a program, is never run."""
    before, after = SYSTEM.split("WORDS")
    if template.startswith(before) and template.endswith(after + TEMPLATE):
        found = template[len(before) : -len(after + TEMPLATE)]
    else:
        match = re.search(r"<\|im_start\|>system(?:\\n|\n)([^{}]+?)<\|im_end\|>", template)
        found = match[1] if match and not re.search(r"['\"]\s*[+~]", match[1]) else ""  # a variable is no text
    return found.encode("ascii", "backslashreplace").decode("unicode-escape", "replace")  # as Jinja reads a string


def check_messages(messages):
    """Raise ValueError if this is not a conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of messages")
    for number, message in enumerate(messages):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"message {number} must have a role of {', '.join(ROLES)} and a string as content")
        if role == "system" and number > 0:
            raise ValueError(f"message {number} is a system message, which only the first can be")
    if messages[-1]["role"] == "system":
        raise ValueError("there is nothing but a system message")


class ChatML:
    """Conversations as ids. system is the message that comes first where a conversation has no system message.

    Raises ValueError for a tokenizer without ChatML's markers.
    """

    def __init__(self, tokenizer, system=""):
        self.start, self.end = (tokenizer.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
        if None in (self.start, self.end):
            raise ValueError("the tokenizer has no <|im_start|> and <|im_end|>, which mark the turns of a conversation")
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True  # despite its name: as ordinary text
        self.system = [{"role": "system", "content": system}] if system else []
        self.newline = self.text("\n")
        self.headers = {role: [self.start, *self.text(f"{role}\n")] for role in ROLES}

    @classmethod
    def of(cls, folder, tokenizer):
        """The chat format of a checkpoint folder; raises ValueError, in words for the user, if it has none or
        another."""
        separate, path = Path(folder, "chat_template.jinja"), Path(folder, "tokenizer_config.json")
        template = read_json(path).get("chat_template") if path.exists() else None
        template = separate.read_text(encoding="utf-8", errors="replace") if separate.exists() else template
        if template is None:
            raise ValueError(f"{folder} has no chat template: it was trained to continue texts")
        if "<|im_start|>" not in str(template):
            raise ValueError(
                f"{folder} has a chat template other than ChatML (<|im_start|>role ... <|im_end|>), the only one that "
                "is implemented here"
            )
        return cls(tokenizer, system_of(str(template)))

    def text(self, words):
        words = words.encode("utf-8", "replace").decode()  # a terminal may send half a character
        return self.tokenizer.encode(words, add_special_tokens=False).ids

    def with_system(self, messages):
        return messages if messages[0]["role"] == "system" else [*self.system, *messages]

    def join(self, messages, contents):
        """The ids of a conversation from those of its contents.

        The markers are put in as ids and the words encoded as text, so nothing that anybody writes can open or end a
        turn. Role and content are encoded apart: a content that begins with a newline would merge with the header's.
        """
        turns = zip(messages, contents, strict=True)
        parts = [[*self.headers[message["role"]], *content, self.end, *self.newline] for message, content in turns]
        return [id for part in parts for id in part]

    def ids(self, messages):
        """The ids of a conversation, up to where the next answer begins."""
        messages = self.with_system(messages)
        return self.join(messages, [self.text(message["content"]) for message in messages]) + self.headers["assistant"]


# ---- What is learned from a conversation ----------------------------------------------------------------------------


class Answers:
    """Where the answers are in a long row of tokens: what follows <|im_start|>assistant and a newline, up to and with
    <|im_end|>. It follows from the ids alone."""

    def __init__(self, tokenizer):
        chat = ChatML(tokenizer)
        self.start, self.end, self.header = chat.start, chat.end, np.array(chat.headers["assistant"])

    def mask(self, bin, first, count):
        """Which of the tokens first to first + count - 1 are of an answer: (count,) bool. It may have begun before
        them, so tokens are read from the last <|im_start|> on."""
        begin, reach = first, 1024
        while begin > 0 and (begin == first or bin[begin] != self.start):
            begin = max(0, first - reach)
            before = np.flatnonzero(bin[begin:first] == self.start)
            begin, reach = begin + (int(before[-1]) if len(before) else 0), 8 * reach
        tokens = np.asarray(bin[begin : first + count])
        opened, closed = np.zeros((2, len(tokens) + 1), int)  # at each token, where the last answer began, and ended
        began = self.begins(tokens)
        opened[began] = began
        ended = np.flatnonzero(tokens == self.end) + 1
        closed[ended] = ended
        inside = np.maximum.accumulate(opened) > np.maximum.accumulate(closed)
        return inside[first - begin : -1]

    def begins(self, tokens):
        """Where answers begin."""
        starts = np.flatnonzero(tokens == self.start)
        starts = starts[starts + len(self.header) <= len(tokens)]
        return starts[(tokens[starts[:, None] + np.arange(len(self.header))] == self.header).all(1)] + len(self.header)

    def questions(self, bin, end_of_text, count, longest):
        """The first conversations of a bin, each up to where its first answer begins: count lists of ids at most, none
        of them longer than longest."""
        tokens, found = np.asarray(bin[: 2**20]), {}
        conversations = np.append(0, np.flatnonzero(tokens == end_of_text) + 1)
        for begin in self.begins(tokens):
            first = conversations[np.searchsorted(conversations, begin) - 1]
            if begin - first <= longest:
                found.setdefault(first, tokens[first:begin].tolist())
        return list(found.values())[:count]
