"""Pictures of runs."""

from conftest import refused, run
from matplotlib import pyplot as plt


def test_one_run_and_two_compared(trained, tmp_path):
    run("tools.plot", trained, f"--out={tmp_path / 'one.png'}")
    run("tools.plot", trained, trained, f"--out={tmp_path / 'two.png'}")
    one, two = plt.imread(tmp_path / "one.png"), plt.imread(tmp_path / "two.png")
    assert one.shape == two.shape and one.shape[0] > 800
    assert (one != two).any()
    drawn = run("tools.plot", trained, f"--out={tmp_path / 'one.svg'}") and (tmp_path / "one.svg").read_text()
    assert drawn.count("<!-- baseline: ") == 2


def test_what_cannot_be_drawn(trained, tmp_path):
    assert "out/tiny" in refused("tools.plot")
    assert "metrics.jsonl" in refused("tools.plot", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{broken")
    assert "metrics.jsonl" in refused("tools.plot", tmp_path)
    assert "--out" in refused("tools.plot", trained, f"--out={tmp_path / 'no' / 'where.png'}")
