"""A page to talk to a model, in the browser.

    python -m tools.demo --model=out/tiny                                 it continues what you type
    python -m tools.demo --model=HuggingFaceTB/SmolLM2-135M-Instruct      it has a conversation

Everything but the page is sample.py's. Needs `pip install gradio`.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

from plumbing.card import sample_prompt
from plumbing.settings import Count, run

import torch
from tokenizers.decoders import DecodeStream

import sample

try:
    import gradio as gr
except ImportError:
    sys.exit("tools.demo needs gradio: pip install gradio")


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


# ---- Looking at tokens ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def predictions(model, ids):
    """For each of the ids, what the model expected there: [(bits, [(probability, token) of the five likeliest])].

    The bits that a token cost are -log2 of its probability. Raises ValueError for more ids than positions.
    """
    device, found = model.lm_head.weight.device, []
    tokens = torch.tensor([[model.config.bos_token_id, *ids]], device=device)  # what stands before the first one
    hidden = model.hidden_states(tokens[:, :-1], torch.arange(len(ids), device=device))[0]  # (T, C)
    for part, actual in zip(hidden.split(256), tokens[0, 1:].split(256), strict=True):
        logs = model.lm_head(part).float().log_softmax(-1)  # (256, V)
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
            result.append((text, bits, f"`{visible(text)}` cost {bits:.1f} bits. The likeliest were", candidates))
            waiting = []
    return result


class TokenView:
    """A text whose tokens are coloured by the bits that they cost, and below it what else was expected of a token."""

    def __init__(self, label):
        self.text = gr.HighlightedText(label=label, show_legend=False, interactive=False, elem_classes="tokens")
        self.sentence = gr.Markdown("Click on a token: what did the model expect there?")
        self.candidates = gr.Label(num_top_classes=5, show_label=False, show_heading=False)
        self.pieces = gr.State([])
        self.outputs = [self.text, self.pieces, self.sentence, self.candidates]
        self.text.select(self.choose, self.pieces, [self.sentence, self.candidates], api_visibility="private")

    @staticmethod
    def choose(pieces, event: gr.SelectData):
        return pieces[event.index][2:]

    @staticmethod
    def show(found):
        """The values of outputs that display these pieces."""
        most = 12  # bits of the darkest colour
        shown = [(text.replace("\n", "\u21b5"), min(1.0, bits / most)) for text, bits, *_ in found]
        return shown, found, "Click on a token: what did the model expect there?", None


# ---- The page -------------------------------------------------------------------------------------------------------


def build_page(settings):
    """The page, as a gradio app; exits with one sentence if there is no such model."""
    names = [name for name in (settings.model, settings.compare) if name]
    loaded = [sample.load(sample.Settings(model=name, device=settings.device, dtype=settings.dtype)) for name in names]
    model, tokenizer, folder = loaded[0]
    template = sample.chat_template(folder)
    longest = min(settings.max_new_tokens, *(model.config.max_position_embeddings - 1 for model, *_ in loaded))
    first_prompt = settings.prompt or sample_prompt(folder) or "Once upon a time"
    sliders = [
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(0, 200, 40, step=1, label="Top-k", info="choose among the k likeliest tokens; 0: among all"),
        gr.Slider(1, longest, min(256, longest), step=1, label="Length", info="tokens to write at most"),
    ]

    def how(model, temperature, top_k, length):
        """The options of one text, and random numbers of its own: people share nothing but the weights."""
        generator = torch.Generator(model.lm_head.weight.device)
        generator.seed()
        return sample.Settings(temperature=temperature, top_k=int(top_k), max_new_tokens=int(length)), generator

    def check(text):
        if len(text) > settings.max_prompt:
            raise refusal(f"{len(text):,} characters are too many; this page takes {settings.max_prompt:,}.")

    def complete(model, tokenizer, prompt, temperature, top_k, length):
        """Yield the text as it grows, how fast, and its ids."""
        check(prompt)
        ids, text, trace = tokenizer.encode(prompt).ids, prompt, sample.Trace()
        length = max(1, min(length, model.config.max_position_embeddings - len(ids)))
        choices, generator = how(model, temperature, top_k, length)
        yield text, "", []
        try:
            for piece in sample.stream(model, tokenizer, ids, choices, generator, trace):
                text += piece
                yield text, str(trace), ids + trace.ids
        except ValueError as error:  # prompt and continuation are longer than the model's positions
            raise refusal(str(error)) from error

    def look(model, tokenizer, ids):
        """The tokens of a text that was written."""
        ids = [id for id in ids if id != model.config.eos_token_id][: model.config.max_position_embeddings]
        return TokenView.show(pieces(tokenizer, ids, predictions(model, ids)) if ids else [])

    def surprise(model, tokenizer, text):
        """The tokens of a text that was typed, and what they cost together."""
        check(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        try:
            found = pieces(tokenizer, ids, predictions(model, ids)) if ids else []
        except ValueError as error:
            raise refusal(str(error)) from error
        total = sum(bits for _, bits, *_ in found)
        words = f"**{total / len(text.encode()):.2f} bits per byte**: {total:,.0f} bits for {len(ids):,} tokens"
        return words if found else "", *TokenView.show(found)

    def reply(message, history, *choices):
        check(message)
        messages = [{"role": turn["role"], "content": as_text(turn["content"])} for turn in history[-20:]]
        messages.append({"role": "user", "content": message})
        text = ""
        try:
            for piece in sample.answer(model, tokenizer, template, messages, *how(model, *choices)):
                text += piece
                yield text
        except ValueError as error:
            raise refusal(str(error)) from error

    def chat_tab():
        message = gr.Textbox(
            placeholder="Type a message",
            show_label=False,
            max_length=settings.max_prompt,
            submit_btn=True,
            stop_btn=True,
        )
        gr.ChatInterface(
            reply,
            chatbot=gr.Chatbot(show_label=False, buttons=["copy"]),
            textbox=message,
            additional_inputs=sliders,
            additional_inputs_accordion=gr.Accordion("Choices", open=False),
            flagging_mode="never",
            analytics_enabled=False,
            api_visibility="private",
        )

    def write_tab():
        prompt = gr.Textbox(first_prompt, label="Prompt", lines=3, max_length=settings.max_prompt)
        with gr.Row():
            start, stop = gr.Button("Start", variant="primary", min_width=80), gr.Button("Stop", min_width=80)
        writing, looks = [], []
        with gr.Row():
            for name, (model, tokenizer, _) in zip(names, loaded, strict=True):
                with gr.Column(min_width=300):
                    text = gr.Textbox(label=f"Text: {name}" if settings.compare else "Text", lines=8)
                    speed, ids, view = gr.Markdown(), gr.State([]), TokenView("The same text, token by token")
                write = partial(complete, model, tokenizer)
                writing.append(start.click(write, [prompt, *sliders], [text, speed, ids], **private))
                looks.append((partial(look, model, tokenizer), ids, view.outputs))
        with gr.Accordion("Choices", open=False):
            for slider in sliders:
                slider.render()
        stopped = stop.click(None, cancels=writing)
        for event, (function, ids, outputs) in zip(writing, looks, strict=True):
            event.then(function, ids, outputs, **private)
            stopped.then(function, ids, outputs, **private)

    def surprise_tab():
        gr.Markdown("The darker a token, the less the model expected it: its bits are -log2 of its probability.")
        text = gr.Textbox(first_prompt, label="A text", lines=5, max_length=settings.max_prompt)
        button = gr.Button("Look", variant="primary")
        with gr.Row():
            for name, (model, tokenizer, _) in zip(names, loaded, strict=True):
                with gr.Column(min_width=300):
                    sum_of_bits, view = gr.Markdown(), TokenView(name)
                function = partial(surprise, model, tokenizer)
                button.click(function, text, [sum_of_bits, *view.outputs], **private)

    private = dict(api_visibility="private", concurrency_id="models")  # one text at a time, of all models
    title = f"SmolLM2: {' and '.join(names)}"
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        with gr.Tab("Chat" if template else "Write"):
            chat_tab() if template else write_tab()
        with gr.Tab("Surprise"):
            surprise_tab()
    return page


def refusal(sentence):
    """What the page shows when it will not do as asked."""
    return gr.Error(sentence, print_exception=False)


def as_text(content):
    """The text of a message in gradio's history, where it may be in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main(settings):
    page = build_page(settings)
    # One text at a time: the next one waits its turn, and sees its place. More than 20 are turned away.
    page.queue(max_size=20, default_concurrency_limit=1)
    try:
        page.launch(server_name=settings.host, server_port=settings.port, footer_links=[])
    except OSError:
        sys.exit(f"--port={settings.port} is taken, or --host={settings.host} is none of this machine; choose another.")


if __name__ == "__main__":
    run(main, "demo", Settings)
