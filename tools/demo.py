"""A page to talk to a model, in the browser.

    python -m tools.demo --model=out/tiny                                 it continues what one types
    python -m tools.demo --model=HuggingFaceTB/SmolLM2-135M-Instruct      it has a conversation

Everything but the page is sample.py's. Needs `pip install gradio`.
"""

import sys
from dataclasses import dataclass
from typing import Literal

from plumbing.settings import Count, run

import torch

import sample

try:
    import gradio as gr
except ImportError:
    sys.exit("tools.demo needs gradio: pip install gradio")


@dataclass
class Settings:
    """Serve a page to talk to a model."""

    model: str = "out/smollm2"  # out_dir of a run, a checkpoint folder, or a hub id
    prompt: str = "Once upon a time"  # what stands in the page at first
    max_prompt: Count = 4000  # longest prompt or message, in characters
    max_new_tokens: Count = 512  # longest continuation or answer that may be asked for
    host: str | None = None  # address to serve on; unset: 127.0.0.1, where only this machine sees the page
    port: int | None = None  # unset: the first free one from 7860 on
    device: str = "auto"  # cuda, mps or cpu; auto: the first of these there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the fastest here


def build_page(settings):
    """The page, as a gradio app; exits with one sentence if there is no such model."""
    model, tokenizer, folder = sample.load(
        sample.Settings(model=settings.model, device=settings.device, dtype=settings.dtype)
    )
    template = sample.chat_template(folder)
    longest = min(settings.max_new_tokens, model.config.max_position_embeddings - 1)
    sliders = [
        gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
        gr.Slider(0, 200, 40, step=1, label="Top-k", info="choose among the k likeliest tokens; 0: among all"),
        gr.Slider(1, longest, min(256, longest), step=1, label="Length", info="tokens to write at most"),
    ]

    def how(temperature, top_k, length):
        """The options of one text, and random numbers of its own: people share nothing but the weights."""
        generator = torch.Generator(model.lm_head.weight.device)
        generator.seed()
        return sample.Settings(temperature=temperature, top_k=int(top_k), max_new_tokens=int(length)), generator

    def grow(text, pieces):
        """Yield the text as the pieces come."""
        yield text
        try:
            for piece in pieces:
                text += piece
                yield text
        except ValueError as error:  # prompt and continuation are longer than the model's positions
            raise refusal(str(error)) from error

    def check(text):
        if len(text) > settings.max_prompt:
            raise refusal(f"{len(text):,} characters are too many; this page takes {settings.max_prompt:,}.")

    def complete(prompt, temperature, top_k, length):
        check(prompt)
        ids = tokenizer.encode(prompt).ids
        length = max(1, min(length, model.config.max_position_embeddings - len(ids)))
        yield from grow(prompt, sample.stream(model, tokenizer, ids, *how(temperature, top_k, length)))

    def reply(message, history, *choices):
        check(message)
        messages = [{"role": turn["role"], "content": as_text(turn["content"])} for turn in history[-20:]]
        messages.append({"role": "user", "content": message})
        yield from grow("", sample.answer(model, tokenizer, template, messages, *how(*choices)))

    title = f"SmolLM2: {settings.model}"
    if template:
        message = gr.Textbox(
            placeholder="Type a message",
            show_label=False,
            max_length=settings.max_prompt,
            submit_btn=True,
            stop_btn=True,
        )
        return gr.ChatInterface(
            reply,
            chatbot=gr.Chatbot(show_label=False, buttons=["copy"]),
            textbox=message,
            additional_inputs=sliders,
            title=title,
            additional_inputs_accordion=gr.Accordion("Choices", open=False),
            flagging_mode="never",
            analytics_enabled=False,
            api_visibility="private",
        )
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}\nIt continues what you type.")
        prompt = gr.Textbox(settings.prompt, label="Prompt", lines=3, max_length=settings.max_prompt)
        with gr.Row():
            start, stop = gr.Button("Write", variant="primary", min_width=80), gr.Button("Stop", min_width=80)
        text = gr.Textbox(label="Text", lines=12)
        with gr.Accordion("Choices", open=False):
            for slider in sliders:
                slider.render()
        writing = start.click(complete, [prompt, *sliders], text, api_visibility="private")
        stop.click(None, cancels=[writing])
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
