"""Pictures of runs."""

import json
import shutil

from conftest import refused, run
from matplotlib import pyplot as plt

from tools import plot


def test_one_run_and_two_compared(trained, tmp_path):
    run("tools.plot", trained, f"--out={tmp_path / 'one.png'}")
    run("tools.plot", trained, trained, f"--out={tmp_path / 'two.png'}")
    one, two = plt.imread(tmp_path / "one.png"), plt.imread(tmp_path / "two.png")
    assert one.shape == two.shape and one.shape[0] > 800
    assert (one != two).any()
    drawn = run("tools.plot", trained, f"--out={tmp_path / 'one.svg'}") and (tmp_path / "one.svg").read_text()
    assert drawn.count("<!-- baseline: ") == 2


def test_scores_of_checkpoints_are_drawn_over_steps(trained, tmp_path):
    own = shutil.copytree(trained, tmp_path / "run")
    for step, accuracy in ((20, 0.25), (40, 0.5)):
        tasks = {"piqa": {"accuracy": accuracy, "gold_bits_per_byte": 3.0}}
        (own / f"checkpoint-{step:06d}" / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    assert plot.read_scores(own, plot.read_metrics(own)) == {"piqa": ([20 * 256, 40 * 256], [25, 50], [3, 3])}
    run("tools.plot", own, f"--out={tmp_path / 'scores.svg'}")
    drawn = (tmp_path / "scores.svg").read_text()
    assert "accuracy, percent" in drawn and "run: piqa" in drawn
    run("tools.plot", trained, f"--out={tmp_path / 'none.svg'}")
    assert "accuracy, percent" not in (tmp_path / "none.svg").read_text()
    (own / "checkpoint-000020" / "evaluation.json").write_text("{")
    assert "evaluation.json cannot be read" in refused("tools.plot", own)


def test_what_cannot_be_drawn(trained, tmp_path):
    assert "out/tiny" in refused("tools.plot")
    assert "metrics.jsonl" in refused("tools.plot", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{broken")
    assert "metrics.jsonl" in refused("tools.plot", tmp_path)
    assert "--out" in refused("tools.plot", trained, f"--out={tmp_path / 'no' / 'where.png'}")
