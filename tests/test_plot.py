"""Pictures of runs."""

import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, refused, run
from matplotlib import pyplot as plt

from tools import plot

REAL = ROOT / "assets" / "code-135m"


def overlapping(texts):
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [(a, b) for (a, at), (b, place) in itertools.combinations(boxes, 2) if at.overlaps(place)]


def curves_like(curves, **changed):
    """The curves of a run, with other values in some."""
    return curves | {name: (curves[name][0], list(values)) for name, values in changed.items()}


def legend(figure):
    (only,) = figure.legends
    assert not any(axis.get_legend() for axis in figure.axes)
    return [text.get_text() for text in only.get_texts()]


def test_one_run_two_compared_and_all_panels(trained, tmp_path):
    jupyter = "module://matplotlib_inline.backend_inline"  # which notebooks leave in the environment of what they start
    run("tools.plot", trained, f"--out={tmp_path / 'one.png'}", MPLBACKEND=jupyter)
    run("tools.plot", trained, REAL, f"--out={tmp_path / 'two.png'}")
    run("tools.plot", trained, "--all=True", f"--out={tmp_path / 'all.png'}")
    one, two, all_panels = (plt.imread(tmp_path / f"{name}.png") for name in ("one", "two", "all"))
    assert 1300 < one.shape[1] == two.shape[1] == all_panels.shape[1]
    assert one.shape[0] < two.shape[0] < all_panels.shape[0] / 2


@pytest.mark.parametrize("norms", [(0.1, 3.5), (0.5, 1.4), (1e-4, 1e3), (0.71, 0.74)])
def test_ticks_do_not_collide(norms):
    curves = plot.read_curves(REAL)
    curves = curves_like(curves, grad_norm=np.geomspace(*norms, len(curves["grad_norm"][1])))
    figure = plot.draw(["real"], [curves], everything=True)
    assert [axis.get_title() for axis in figure.axes] == list(plot.PANELS.values())[:6]
    second = [above for axis in figure.axes for above in axis.child_axes]
    for axis in figure.axes + second:
        for one in (axis.xaxis, axis.yaxis):
            low, high = one.get_view_interval()
            ticks = [tick for tick in one.get_major_ticks() + one.get_minor_ticks() if low <= tick.get_loc() <= high]
            labels = [label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible()]
            labels = [label for label in labels if label.get_text()]
            assert not overlapping(labels)
            assert len(labels) > 1 or (axis in second and one is axis.yaxis)


def test_the_smoothed_loss_begins_where_the_loss_does():
    losses = [11 - 0.1 * step for step in range(100)]
    assert plot.smooth(losses)[:90] == pytest.approx(losses[:90])
    assert plot.smooth([3.0, 1.0] * 50)[50] == pytest.approx(2, abs=0.2)


def test_runs_have_names_and_baselines_are_written_once():
    assert plot.names_of(["out/tiny/", "other/big"]) == ["tiny", "big"]
    assert plot.names_of(["a/one/run", "b/one/run"]) == ["a/one/run", "b/one/run"]
    assert plot.names_of(["a/run", "a/run"]) == ["run", "run"]
    curves = plot.read_curves(REAL)
    other = curves_like(curves, unigram_loss=[value + 0.05 for value in curves["unigram_loss"][1]])
    figure = plot.draw(["a", "b"], [curves, other])
    assert legend(figure) == [f"{run}: {kind}" for kind in ("training, smoothed", "validation") for run in "ab"]
    labels = figure.axes[0].texts
    assert sorted(text.get_text() for text in labels) == [
        "bigram baseline",
        "unigram baseline, a",
        "unigram baseline, b",
    ]
    assert not overlapping(labels)


def test_batches_of_different_sizes_are_compared_by_tokens():
    curves = plot.read_curves(REAL)
    larger = curves_like(curves, tokens=[2 * tokens for tokens in curves["tokens"][1]])
    for runs, unit, above, end in (
        ([curves, curves], "steps", 1, 450),
        ([curves, larger], "tokens", 0, 2 * 450 * 2**18),
    ):
        axis = plot.draw(["a", "b"], runs).axes[0]
        assert axis.get_xlabel() == unit and len(axis.child_axes) == above
        assert max(line.get_xdata()[-1] for line in axis.lines if len(line.get_xdata()) > 2) == end


def test_scores_of_checkpoints_of_conversations_and_of_each_folder_of_a_mix(trained, tmp_path):
    own = shutil.copytree(trained, tmp_path / "run")
    for step, accuracy in ((20, 0.25), (40, 0.5)):
        tasks = {task: {"accuracy": accuracy, "gold_bits_per_byte": 3.0} for task in ("piqa", "mine")}
        (own / f"checkpoint-{step:06d}" / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    lines = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"val_loss/web": 4.0, "val_bpb/web": 2.5, "val_bpb/code": 1.5, "answers_that_end": 0.5}
    (own / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves = plot.read_curves(own)
    assert curves["accuracy/piqa"] == ([20, 40], [25, 50]) and curves["val_bpb/web"] == ([40], [2.5])
    panels = {axis.get_title(): axis for axis in plot.draw(["run"], [curves], everything=True).axes}
    assert list(panels) == list(plot.PANELS.values())
    assert all(axis.get_shared_x_axes().joined(axis, panels[plot.PANELS["loss"]]) for axis in panels.values())
    for metric, words in (("val_bpb", {"all", "web", "code"}), ("accuracy", {"piqa", "mine", "chance, 50%"})):
        assert {text.get_text() for text in panels[plot.PANELS[metric]].texts} == words
    (own / "checkpoint-000040").rename(own / "checkpoint-1000000")
    shutil.copytree(own / "checkpoint-000020", own / "checkpoint-000030.tmp")  # what an interrupted removal leaves
    assert plot.read_curves(own)["accuracy/piqa"][0] == [20, 1_000_000]


def test_what_cannot_be_drawn(trained, tmp_path):
    assert "out/tiny" in refused("tools.plot")
    assert "metrics.jsonl" in refused("tools.plot", tmp_path)
    for broken in ("{broken", "5", "{}"):
        (tmp_path / "metrics.jsonl").write_text(broken)
        with pytest.raises(SystemExit, match=r"metrics\.jsonl cannot be read"):
            plot.read_curves(tmp_path)
    assert "--out" in refused("tools.plot", trained, f"--out={tmp_path / 'no' / 'where.png'}")
    assert "must end with .png" in refused("tools.plot", trained, f"--out={tmp_path}")
    own = shutil.copytree(trained, tmp_path / "run")
    (own / "checkpoint-000020" / "evaluation.json").write_text("{")
    assert "evaluation.json cannot be read" in refused("tools.plot", own)
