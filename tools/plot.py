"""Pictures of runs, one or several to compare.

    python -m tools.plot out/tiny
    python -m tools.plot out/first out/second --all=True --out=curves.png

Reads metrics.jsonl of each run, and what `tools.evaluate --all_checkpoints=True` found; needs `pip install matplotlib`.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from plumbing.files import say
from plumbing.pretrained import list_checkpoints
from plumbing.settings import run

import tyro


@dataclass
class Settings:
    """Draw the curves of runs."""

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]] = ()  # their out_dir
    out: str = "curves.png"  # picture to write: .png, .svg or .pdf
    all: bool = False  # all that was measured, not only loss and bits per byte


# A panel shows a metric and its parts: val_bpb/web of a mix of folders, accuracy/piqa of several tasks.
PANELS = {
    "loss": "loss, nats per token",
    "val_bpb": "validation, bits per byte",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "unique_tokens": "different tokens seen (dotted: tokens seen)",
    "answers_that_end": "share of answers that end",
    "accuracy": "accuracy, percent",
    "gold_bits_per_byte": "right answers, bits per byte",
}
STYLES = "-", "--", ":", "-."  # runs differ by line, not by color alone: a picture may be printed in black and white
SHORT = "loss", "val_bpb"
DOTTED = dict(color="black", linestyle=(0, (1, 3)), linewidth=1)


def read_curves(run):
    """{name: ([steps], [values])} of a run, without what was not measured."""
    curves, path = {}, Path(run) / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        evaluations = (Path(checkpoint, "evaluation.json") for checkpoint in list_checkpoints(run))
        for path in filter(Path.exists, evaluations):
            rows.append({"step": int(path.parent.name[11:])})
            for task, result in json.loads(path.read_text())["tasks"].items():
                rows[-1][f"accuracy/{task}"] = 100 * result["accuracy"]
                rows[-1][f"gold_bits_per_byte/{task}"] = result["gold_bits_per_byte"]
        for row in sorted(rows, key=lambda row: row["step"]):
            for name, value in row.items():
                if value is not None:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"{path} cannot be read: {getattr(error, 'strerror', None) or f'{type(error).__name__}, {error}'}")
    if not curves.keys() >= {"loss", "tokens"}:
        sys.exit(f"{Path(run) / 'metrics.jsonl'} has no step of training yet.")
    return curves


def names_of(runs):
    """The last part of each path, and as many before it as tell the runs apart."""
    paths = [Path(run).resolve().parts for run in runs]
    candidates = (["/".join(path[-length:]) for path in paths] for length in range(1, 1 + max(map(len, paths))))
    return next(names for names in candidates if len(set(names)) == len(set(paths)))


def smooth(values):
    """The mean of each value and its neighbours, a tenth of the run in all. Near the start, where the loss falls fast,
    there are as few after a value as before it: more would make it begin too low."""
    reaches = [min(i, len(values) // 20) for i in range(len(values))]
    near = [values[i - reach : i + reach + 1] for i, reach in enumerate(reaches)]
    return [sum(values) / len(values) for values in near]


def baselines(names, curves_of):
    """{words: loss} of simple predictions; once where it is the same for several runs."""
    runs_at = defaultdict(list)
    for name, curves in zip(names, curves_of, strict=True):
        for kind in ("unigram", "bigram"):
            if f"{kind}_loss" in curves:
                runs_at[f"{kind} baseline", round(curves[f"{kind}_loss"][1][-1], 3)].append(name)
    whose = ("" if len(runs) == len(names) else f", {', '.join(runs)}" for runs in runs_at.values())
    return {words + of: loss for (words, loss), of in zip(runs_at, whose, strict=True)}


def write_labels(axis, labels, size=8):
    """Write {words: value} at the right edge, each above its value, or above the label below it."""
    free = -math.inf
    for words, value in sorted(labels.items(), key=lambda label: label[::-1]):
        place = axis.transData.transform((0, value))[1] * 72 / axis.figure.dpi  # in points, as size is
        bottom = max(place + 1, free)
        free = bottom + 1.3 * size
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom")
        above = axis.annotate(words, (1, value), (-2, bottom - place), fontsize=size, **where)
        above.set_bbox(dict(color="white", alpha=0.6, pad=0))


def draw_run(axes, name, curves, scale, **style):
    """Draw a run into {metric: panel}. scale: how long a step is on the horizontal axis."""
    trained, losses = curves["loss"]

    def line(metric, steps, values, **options):
        points = dict(marker="o", markersize=3) if 2 * len(steps) < len(trained) else {}  # evaluations are few
        axes[metric].plot([scale * step for step in steps], values, **dict(linewidth=1) | style | points | options)

    line("loss", trained, losses, alpha=0.3)
    line("loss", trained, smooth(losses), linewidth=1.8, label=f"{name}: training, smoothed")
    if "val_loss" in curves:
        line("loss", *curves["val_loss"], label=f"{name}: validation")
    if "unique_tokens" in axes:
        line("unique_tokens", *curves["tokens"], **DOTTED)
    for part, curve in curves.items():
        if part != "loss" and part.split("/")[0] in axes:
            line(part.split("/")[0], *curve)


def set_axes(axis, metric, per_step):
    """Title, ticks and scales of a panel. per_step: tokens, where all runs have the same number, else None."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

    thousands = EngFormatter(sep="")  # 20k, 20M
    axis.set_title(PANELS[metric], fontsize=11)
    axis.grid(alpha=0.3)
    axis.margins(y=0.12)  # room for labels
    axis.set_xlabel("steps" if per_step else "tokens")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter("{x:,.0f}" if per_step else thousands)
    if per_step and metric in SHORT:
        above = axis.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
        above.xaxis.set_major_formatter(thousands)
        above.tick_params(labelsize=8)
        above.set_xlabel("tokens", fontsize=8)
    if metric in ("loss", "grad_norm"):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        digits = (1, 2, 3, 4, 5, 7) if high < 20 * low else (1, 2, 5) if high < 1e4 * low else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=digits))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    elif metric in ("tokens_per_second", "unique_tokens"):
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.yaxis.set_major_formatter(thousands)


def draw(names, curves_of, everything=False):
    """A matplotlib figure of the curves of runs: loss and bits per byte, or all panels that have something to show."""
    from matplotlib.figure import Figure

    parts, levels = defaultdict(dict), {"loss": baselines(names, curves_of)}
    for part in {part for curves in curves_of for part in curves}:
        metric, _, of = part.partition("/")
        parts[metric][of or "all"] = max(curves[part][1][-1] for curves in curves_of if part in curves)
    if everything and "accuracy" in parts:
        from tools.tasks import TASKS

        guessed = {TASKS[task].chance for task in parts["accuracy"] if task in TASKS}
        levels["accuracy"] = {f"chance, {percent}%": percent for percent in guessed}
    shown = [metric for metric in (PANELS if everything else SHORT) if metric in parts]
    rows, columns = math.ceil(len(shown) / 2), min(2, len(shown))
    figure = Figure(figsize=(9, 3.3 * rows + 0.2 * len(names)), dpi=150, layout="constrained")
    axes = {}
    for place, metric in enumerate(shown, 1):
        axes[metric] = figure.add_subplot(rows, columns, place, sharex=axes.get("loss"))
    for metric, labels in levels.items():
        for value in labels.values():
            axes[metric].axhline(value, **DOTTED)
    per_step = [curves["tokens"][1][-1] / curves["tokens"][0][-1] for curves in curves_of]
    in_steps = len(set(per_step)) == 1  # runs with batches of different sizes are compared by tokens
    for number, (name, curves, tokens) in enumerate(zip(names, curves_of, per_step, strict=True)):
        style = dict(color=f"C{number}", linestyle=STYLES[number % len(STYLES)])
        draw_run(axes, name, curves, 1 if in_steps else tokens, **style)
    for metric, axis in axes.items():
        set_axes(axis, metric, per_step[0] if in_steps else None)
    lines = axes["loss"].get_legend_handles_labels()[0]
    lines.sort(key=lambda line: line.get_label().endswith("validation"))  # a column for each kind, a row for each run
    figure.legend(handles=lines, loc="outside upper center", ncols=2, fontsize=9)
    figure.draw_without_rendering()  # labels are placed where the layout has put the panels
    for metric, axis in axes.items():
        write_labels(axis, levels.get(metric, {}) | (parts[metric] if parts[metric].keys() != {"all"} else {}))
    return figure


def main(settings):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit("tools.plot needs matplotlib: pip install matplotlib")
    if not settings.runs:
        sys.exit("tools.plot draws the runs that it is given: python -m tools.plot out/tiny")
    if Path(settings.out).suffix not in (".png", ".svg", ".pdf"):
        sys.exit(f"--out={settings.out} must end with .png, .svg or .pdf.")
    figure = draw(names_of(settings.runs), list(map(read_curves, settings.runs)), settings.all)
    try:
        figure.savefig(settings.out)
    except (OSError, ValueError) as error:
        sys.exit(f"--out={settings.out} cannot be written: {error}")
    say(f"wrote {settings.out}")


if __name__ == "__main__":
    run(main, None, Settings)
