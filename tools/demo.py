"""A page to talk to a model, in the browser.

    python -m tools.demo --model=out/tiny                                 it continues what you type
    python -m tools.demo --model=HuggingFaceTB/SmolLM2-135M-Instruct      it has a conversation

Everything but the page is sample.py's. Needs `pip install gradio`.
"""

import contextlib
import math
import re
import socket
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from plumbing.card import short_name
from plumbing.settings import Count, run

import torch
import torch.nn.functional as F
from tokenizers.decoders import DecodeStream

import sample
from model import count_parameters

try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    sys.exit("the page needs gradio: pip install gradio")


@dataclass
class Settings:
    """Serve a page to talk to a model."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    compare: str | None = None  # a second model, which answers beside the first
    prompt: str | None = None  # what stands in the page at first; unset: the sample_prompt of the run
    max_prompt: Count = 4000  # longest prompt or message, in characters
    max_new_tokens: Count = 512  # longest continuation or answer that may be asked for
    host: str | None = None  # address to serve on; unset: 127.0.0.1, where only this machine sees the page
    port: int | None = None  # unset: the first free one from 7860 on
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here


# Examples to click on.
OPENINGS = "Once upon a time", "The capital of France is", "def "
QUESTIONS = "What is the capital of France?", "Why is the sky blue?", "Write a short poem about the sea."
SENTENCES = "The Eiffel Tower is in Paris. A purple elephant ate it.", "Roses are red. Roses are red."

MOST = 12  # bits of the darkest colour
STYLE = """
.hide-container { overflow: visible !important }
.tokens { max-height: 55vh }
.tokens div.textfield { display: block; line-height: 1.9 }
.tokens .token-container, .tokens .token { display: inline; margin: 0; padding: 0; font-size: 0; white-space: nowrap }
.tokens .text { margin-right: 1px; padding: 4px 0; border-radius: 3px; background: inherit; font-size: 15px;
                white-space: pre-wrap; word-break: normal; overflow-wrap: normal }
.tokens .token:focus .text { outline: 2px solid currentColor }
.scale { display: inline-block; width: 8em; height: 1em; vertical-align: -2px; border-radius: 3px;
         background: linear-gradient(to right, transparent, rgb(239, 68, 60)) }
"""  # tokens stand side by side, as in the text; the colour is that of gr.HighlightedText


# ---- Looking at tokens ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def predictions(model, ids):
    """For each of the ids, what the model expected there: [(bits, [(probability, token) of the five likeliest])].

    The bits that a token cost are -log2 of its probability. Raises ValueError for more ids than positions.
    """
    device, found = model.lm_head.weight.device, []
    tokens = torch.tensor([[model.config.bos_token_id, *ids]], device=device)  # what stands before the first one
    hidden = model.hidden_states(tokens[:, :-1], torch.arange(len(ids), device=device))[0]  # (T, C)
    head = model.lm_head.weight.float()  # faster than 16 bits on a CPU, and exact
    for part, actual in zip(hidden.split(256), tokens[0, 1:].split(256), strict=True):
        logs = F.linear(part.float(), head).log_softmax(-1)  # (256, V)
        bits = -logs.gather(1, actual[:, None]).squeeze(1) / math.log(2)
        best = [values.tolist() for values in logs.exp().topk(min(5, logs.size(1)))]
        likeliest = [list(zip(*both, strict=True)) for both in zip(*best, strict=True)]
        found += zip(bits.tolist(), likeliest, strict=True)
    return found


def visible(text):
    """A text with its spaces and line breaks to be seen."""
    return repr(text)[1:-1].replace(" ", "\u2423")


def spell(tokenizer, id):
    """A token as text, or as the tokenizer has it if it is no whole character."""
    text = tokenizer.decode([id], skip_special_tokens=False)
    return tokenizer.id_to_token(id) if "\ufffd" in text else visible(text)


def pieces(tokenizer, ids, found):
    """[(text, bits, sentence, {token: probability})]: the predictions, one for each piece of whole characters. A
    character of several tokens costs the sum of them, and shows what was expected of its first."""
    decoder, result, waiting = DecodeStream([], skip_special_tokens=False), [], []
    for id, prediction in zip(ids, found, strict=True):
        waiting.append(prediction)
        if text := decoder.step(tokenizer, id):
            bits, likeliest = sum(bits for bits, _ in waiting), waiting[0][1]
            candidates = {spell(tokenizer, token): probability for probability, token in likeliest}
            result.append((text, bits, f"`{visible(text)}` cost {bits:.1f} bits. The likeliest were:", candidates))
            waiting = []
    return result


class TokenView:
    """A text whose tokens are coloured by the bits that they cost, and below it what else was expected of a token."""

    def __init__(self, label):
        looks = dict(show_legend=False, interactive=False, elem_classes="tokens")
        self.text = gr.HighlightedText(label=label, visible=False, **looks)
        self.sentence = gr.Markdown()
        looks = dict(show_label=False, show_heading=False, elem_id=f"of-{id(self)}")
        self.candidates = gr.Label(num_top_classes=5, visible="hidden", **looks)
        self.pieces = gr.State([])
        self.outputs = [self.text, self.pieces, self.sentence, self.candidates]
        chosen = self.text.select(self.choose, self.pieces, self.outputs[2:], api_visibility="private")
        into_view = "scrollIntoView({block: 'nearest', behavior: 'smooth'})"
        chosen.then(None, js=f"() => setTimeout(() => document.getElementById('of-{id(self)}').{into_view}, 100)")

    @staticmethod
    def choose(pieces, event: gr.SelectData):
        sentence, candidates = pieces[event.index][2:]
        return sentence, gr.Label(candidates, visible=True)

    @staticmethod
    def show(found):
        """The values of outputs that display these pieces; without any, nothing is there to see."""
        shown = [(text.replace("\n", "\u21b5\n"), min(1.0, bits / MOST)) for text, bits, *_ in found]
        hint = "Click on a token: what did the model expect there?" if found else ""
        return gr.HighlightedText(shown, visible=bool(found)), found, hint, gr.Label(None, visible="hidden")


# ---- The page -------------------------------------------------------------------------------------------------------


def build_page(settings):
    """The page, as a gradio app; exits with one sentence if there is no such model."""
    models = [model for model in (settings.model, settings.compare) if model]
    names = [short_name(model) for model in models]
    loaded = [sample.load(sample.Settings(model=each, device=settings.device, dtype=settings.dtype)) for each in models]
    first_writer, first_tokenizer, folder = loaded[0]
    chat_format = sample.chat_format_of(first_writer, first_tokenizer, folder, sample.Settings())
    if chat_format and settings.compare:
        sys.exit(f"--compare is for models that continue texts, and {settings.model} has conversations.")
    longest = min(settings.max_new_tokens, *(writer.config.max_position_embeddings - 1 for writer, *_ in loaded))
    prompts = settings.prompt, sample_prompt(folder), *(QUESTIONS if chat_format else OPENINGS)
    prompts = list(dict.fromkeys(filter(None, prompts)))  # each once
    temperature = 0.2 if chat_format else 0.8
    sliders = [
        gr.Slider(0, 2, temperature, step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(0, 200, 40, step=1, label="Top-k", info="choose among the k likeliest tokens; 0: among all"),
        gr.Slider(1, longest, min(256, longest), step=1, label="Length", info="tokens to write at most"),
    ]

    def how(writer, temperature, top_k, length):
        """The options of one text, and random numbers of its own: people share nothing but the weights."""
        generator = torch.Generator(writer.device)
        generator.seed()
        return sample.Settings(temperature=temperature, top_k=int(top_k), max_new_tokens=int(length)), generator

    def check(text):
        if len(text) > settings.max_prompt:
            raise refusal(f"{len(text):,} characters are too many; this page takes {settings.max_prompt:,}.")

    def complete(writer, tokenizer, prompt, temperature, top_k, length):
        """Yield the text as it grows, how fast, and its ids."""
        check(prompt)
        ids, text, trace = tokenizer.encode(prompt).ids, prompt, sample.Trace()
        length = max(1, min(length, writer.config.max_position_embeddings - len(ids)))
        choices, generator = how(writer, temperature, top_k, length)
        yield text, "", ids
        try:
            for (piece,) in sample.stream(writer, tokenizer, ids, choices, generator, trace):
                text += piece
                yield text, str(trace), ids + trace.ids
        except ValueError as error:  # prompt and continuation are longer than the model's positions
            raise refusal(str(error)) from error

    def look(model, tokenizer, ids):
        """The tokens of a text, once after it was written: its ids are forgotten then."""
        if not ids:
            return gr.skip()
        ends = model.config.eos_token_id, model.config.bos_token_id
        ids = [id for id in ids if id not in ends][: model.config.max_position_embeddings]
        return [], *TokenView.show(pieces(tokenizer, ids, predictions(model, ids)) if ids else [])

    def surprise(model, tokenizer, text):
        """The tokens of a text that was typed, and what they cost together."""
        check(text)
        if not (ids := tokenizer.encode(text, add_special_tokens=False).ids):
            return "", *TokenView.show([])
        try:
            found = pieces(tokenizer, ids, predictions(model, ids))
        except ValueError as error:
            raise refusal(str(error)) from error
        total = sum(bits for _, bits, *_ in found)
        words = f"**{total / len(text.encode()):.2f} bits per byte**: {total:,.0f} bits for {len(ids):,} tokens"
        return words, *TokenView.show(found)

    def reply(message, history, *choices):
        check(message)
        messages = [{"role": turn["role"], "content": as_text(turn["content"])} for turn in history[-20:]]
        messages.append({"role": "user", "content": message})
        text = ""
        try:
            for piece in sample.answer(
                first_writer, first_tokenizer, chat_format, messages, *how(first_writer, *choices)
            ):
                text += piece
                yield text
        except ValueError as error:
            raise refusal(str(error)) from error

    def chat_tab():
        looks = dict(placeholder="Type a message", show_label=False, submit_btn=True, stop_btn=True)
        gr.ChatInterface(
            reply,
            chatbot=gr.Chatbot(show_label=False, buttons=["copy"]),
            textbox=gr.Textbox(max_length=settings.max_prompt, **looks),
            examples=[[question] for question in prompts],
            cache_examples=False,  # else a Space answers them all when it starts
            additional_inputs=sliders,
            additional_inputs_accordion=gr.Accordion("Choices", open=False, render=False),
            flagging_mode="never",
            analytics_enabled=False,
            api_visibility="private",
        )

    def write_tab():
        prompt = gr.Textbox(prompts[0], label="Prompt", lines=3, max_length=settings.max_prompt)
        gr.Examples(prompts, prompt, api_visibility="private")
        with gr.Row():
            start, stop = gr.Button("Start", variant="primary", min_width=80), gr.Button("Stop", min_width=80)
        writing, looks = [], []
        with gr.Row():
            for name, (writer, tokenizer, _) in zip(names, loaded, strict=True):
                with gr.Column(min_width=300):
                    text = gr.Textbox(label=f"Text: {name}" if settings.compare else "Text", lines=8)
                    speed, ids, view = gr.Markdown(), gr.State([]), TokenView("The same text, token by token")
                write = partial(complete, writer, tokenizer)
                writing.append(start.click(write, [prompt, *sliders], [text, speed, ids], **private))
                looks.append((partial(look, writer.model, tokenizer), ids, [ids, *view.outputs]))
        with gr.Accordion("Choices", open=False):
            for slider in sliders:
                slider.render()
        stopped = stop.click(None, cancels=writing)
        for event, (function, ids, outputs) in zip(writing, looks, strict=True):
            for end in (event, stopped):
                end.then(function, ids, outputs, show_progress="hidden", **private)

    def surprise_tab():
        words = "The darker a token, the less the model expected it: its bits are -log2 of its probability."
        gr.Markdown(f'{words}<br>0 bits <span class="scale"></span> {MOST} bits or more')
        texts = [*([] if chat_format else prompts[:1]), *SENTENCES]
        text = gr.Textbox(texts[0], label="A text", lines=3, max_length=settings.max_prompt)
        gr.Examples(texts, text, api_visibility="private")
        button = gr.Button("Look", variant="primary")
        with gr.Row():
            for name, (writer, tokenizer, _) in zip(names, loaded, strict=True):
                with gr.Column(min_width=300):
                    sum_of_bits, view = gr.Markdown(), TokenView(name)
                function = partial(surprise, writer.model, tokenizer)
                button.click(function, text, [sum_of_bits, *view.outputs], **private)

    private = dict(api_visibility="private", concurrency_id="models")  # one text at a time, of all models
    title = " and ".join(names)
    with gr.Blocks(title=f"SmolLM2: {title}", analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        for name, (writer, _, folder) in zip(names, loaded, strict=True):
            gr.Markdown((f"{name}: " if settings.compare else "") + describe(writer.config, folder, chat_format))
        with gr.Tab("Chat" if chat_format else "Write"):
            chat_tab() if chat_format else write_tab()
        with gr.Tab("Surprise"):
            surprise_tab()
    return page


def read_card(folder):
    """The metadata and the text of a model's card; both empty where it has none."""
    from huggingface_hub import ModelCard

    with contextlib.suppress(Exception):  # no card, or a damaged one
        card = ModelCard(Path(folder, "README.md").read_text(encoding="utf-8"))
        return card.data.to_dict(), card.text
    return {}, ""


def sample_prompt(folder):
    """The text or question with which the card of a model suggests to try it, or None."""
    with contextlib.suppress(LookupError, TypeError):
        example = read_card(folder)[0]["widget"][0]
        return example["text"] if "text" in example else example["messages"][-1]["content"]


def describe(config, folder, chats):
    """One line: how large a model is, what it was trained on, and what it does."""
    metadata, text = read_card(folder)
    patterns = r", from the weights of (.+)\. It ", r"^\| data \| (.+) \|$", r"^\| tokens trained on \| (.+), in"
    base, data, tokens = ("".join(re.findall(pattern, text, re.MULTILINE)[:1]) for pattern in patterns)
    published = metadata.get("base_model") or ""  # of one that was not made here
    base = base or (published if isinstance(published, str) else ", ".join(map(str, published)))
    sources = data.split("<br>") if data else metadata.get("datasets") or []
    sources = [sources] if isinstance(sources, str) else sources
    data = ", ".join(dict.fromkeys(source.split(",")[0] for source in sources))  # not which files, and how much of each
    line = f"{count_parameters(config):,} parameters"
    line += f", from the weights of {base}" if base else ""
    line += f", trained on {tokens} tokens of {data}" if tokens else f", trained on {data}" if data else ""
    return f"{line}. {'It answers; what it says need not be true.' if chats else 'It continues what you type.'}"


def refusal(sentence):
    """What the page shows when it will not do as asked."""
    return gr.Error(sentence, print_exception=False)


def as_text(content):
    """The text of a message in gradio's history, where it may be in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main(settings):
    host, port = settings.host or "127.0.0.1", settings.port or 0  # 0: any
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError):
        where = f"--host={host} --port={port or 'any'}"
        sys.exit(f"{where} cannot be served: the port is taken or is none, or the host is another machine.")
    page = build_page(settings)
    # One text at a time: the next one waits its turn, and sees its place. More than 20 are turned away.
    page.queue(max_size=20, default_concurrency_limit=1)
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # its 600, the default, has no Latin letters
    theme = gr.themes.Default(font=[font, "system-ui", "sans-serif"])
    page.launch(server_name=settings.host, server_port=settings.port, footer_links=[], css=STYLE, theme=theme)


if __name__ == "__main__":
    run(main, "demo", Settings)
