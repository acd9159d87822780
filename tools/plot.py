"""Pictures of runs, one or several to compare.

    python -m tools.plot out/tiny
    python -m tools.plot out/first out/second --out=curves.png

Reads metrics.jsonl of each run, and what `tools.evaluate --all_checkpoints=True` found; needs `pip install matplotlib`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Settings:
    """Draw the curves of runs."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]  # out_dir of each
    out: str = "curves.png"  # picture to write: .png, .svg or .pdf


STYLES = "-", "--", ":", "-."  # runs differ by line, not by colour alone: a picture may be printed in black and white


def read_metrics(run):
    """{name: ([tokens], [values])} of a run, without what was not measured."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
    curves = {}
    for line in lines:
        for name, value in line.items():
            if value is not None:
                tokens, values = curves.setdefault(name, ([], []))
                tokens.append(line["tokens"])
                values.append(value)
    if "loss" not in curves:
        sys.exit(f"{path} has no step of training yet.")
    return curves


def read_scores(run, curves):
    """{task: ([tokens], [accuracy], [bits per byte of the right answers])} of a run's checkpoints, if evaluated."""
    scores, tokens = {}, curves["tokens"][0]
    per_step = tokens[-1] / curves["step"][1][-1]
    for path in sorted(Path(run).glob("checkpoint-*/evaluation.json")):
        try:
            results = json.loads(path.read_text())["tasks"]
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"{path} cannot be read: {error!r}")
        for task, result in results.items():
            for values, value in zip(
                scores.setdefault(task, ([], [], [])),
                (per_step * int(path.parent.name[-6:]), 100 * result["accuracy"], result["gold_bits_per_byte"]),
                strict=True,
            ):
                values.append(value)
    return scores


def smooth(values):
    """The mean of each value and its neighbours, a tenth of the run in all."""
    reach = len(values) // 20
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(values) / len(values) for values in near]


def main(settings):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.ticker import EngFormatter
    except ImportError:
        sys.exit("tools.plot needs matplotlib: pip install matplotlib")
    if not settings.runs:
        sys.exit("tools.plot draws the runs that it is given: python -m tools.plot out/tiny")
    curves_of = [read_metrics(run) for run in settings.runs]
    scores_of = [read_scores(run, curves) for run, curves in zip(settings.runs, curves_of, strict=True)]
    rows = 4 if any(scores_of) else 3
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), layout="constrained")
    loss, bits, rate, norm, speed, unique = axes.flat[:6]
    for number, (run, curves, scores) in enumerate(zip(settings.runs, curves_of, scores_of, strict=True)):
        color, style = f"C{number}", STYLES[number % len(STYLES)]

        def draw(axis, name, label=run, curves=curves, color=color, style=style, **options):
            if name in curves:
                axis.plot(*curves[name], style, color=color, label=label, **options)

        draw(loss, "loss", None, alpha=0.3, linewidth=1)
        tokens, losses = curves["loss"]
        loss.plot(tokens, smooth(losses), style, color=color, label=f"{run}: training, smoothed")
        draw(loss, "val_loss", f"{run}: validation", marker="o", markersize=4, linewidth=1)
        for name, words in (("unigram_loss", "baseline: unigram"), ("bigram_loss", "baseline: bigram")):
            if name in curves:
                baseline = curves[name][1][-1]
                loss.axhline(baseline, color="black", linestyle=(0, (1, 3)), linewidth=1)
                loss.annotate(
                    words, (1, baseline), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
                )
        draw(bits, "val_bpb", marker="o", markersize=4)
        draw(rate, "learning_rate")
        draw(norm, "grad_norm")
        draw(speed, "tokens_per_second")
        draw(unique, "unique_tokens")
        unique.plot(curves["tokens"][0], curves["tokens"][0], color="black", linestyle=(0, (1, 3)), linewidth=1)
        for task, (tokens, accuracy, of_answers) in scores.items():
            options = dict(marker="o", markersize=4, linestyle=style, label=f"{run}: {task}")
            axes[3][0].plot(tokens, accuracy, **options)
            axes[3][1].plot(tokens, of_answers, **options)
    titles = (
        "loss, nats per token",
        "validation, bits per byte",
        "learning rate",
        "gradient norm before clipping",
        "tokens per second",
        "different tokens seen (dotted: tokens seen)",
        "accuracy, percent",
        "right answers, bits per byte",
    )
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title)
        axis.set_xlabel("tokens trained on")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    for axis in (speed, unique):
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in (loss, norm):
        axis.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    norm.yaxis.set_major_formatter("{x:g}")
    norm.yaxis.set_minor_formatter("{x:g}")
    speed.set_ylim(0, 1.1 * speed.get_ylim()[1])
    for axis in (loss, bits, *axes.flat[6:]):
        axis.legend(fontsize=8)
    try:
        figure.savefig(settings.out, dpi=100)
    except (OSError, ValueError) as error:
        sys.exit(f"--out={settings.out} cannot be written: {error}")
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True))
