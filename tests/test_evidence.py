"""The README's curves and table are those of the committed CSV files."""

import pandas as pd
import pytest

from dreamer.config import ConfigError
from stages import evidence


def test_the_readme_says_what_the_files_say():
    for name, content in evidence.blocks(evidence.read()).items():
        found = evidence.block(name).search(evidence.README.read_text())
        assert found and found[0] == content


def test_the_table_counts_from_the_files(tmp_path):
    run = tmp_path / "2-1-seed3"
    run.mkdir()
    clear = [0] * 60 + [1] * 40
    columns = {"frames": [400 * k for k in range(100)], "decisions": [100 * k for k in range(100)]}
    columns |= {"hours": [k / 100 for k in range(100)], "best_x": [3161 if won else 700 for won in clear]}
    columns |= {"return": [4000.0 if won else 600.0 for won in clear], "clear": clear, "replayed": [0] * 100}
    played = pd.DataFrame(columns)
    begun_later = played.head(50).assign(replayed=200, clear=1, best_x=3200, **{"return": 1500.0})
    pd.concat([played, begun_later]).sort_values("decisions").to_csv(run / "episodes.csv", index=False)
    evaluations = pd.DataFrame({"decisions": [3000, 6500, 9000], "eval_clear_rate": [0.0, 0.85, 0.6]})
    evaluations.to_csv(run / "evaluations.csv", index=False)
    *_, row = evidence.table(evidence.read(tmp_path)).strip().splitlines()
    assert (
        row
        == "| 2-1-seed3 | 2-1 | 9,900 | 0.99 | 3,161 | after 6,000 decisions, 36 minutes | 85% at 6,500 | 80% | 3,320 |"
    )


def test_a_run_without_a_clear_and_no_run_at_all_say_so(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \*/episodes.csv"):
        evidence.read(tmp_path)
    (tmp_path / "run").mkdir()
    columns = {"frames": [400], "decisions": [100], "hours": [0.1], "best_x": [700], "return": [600.0], "clear": [0]}
    pd.DataFrame(columns | {"replayed": [0]}).to_csv(tmp_path / "run/episodes.csv", index=False)
    pd.DataFrame(columns=["decisions", "eval_clear_rate"]).to_csv(tmp_path / "run/evaluations.csv", index=False)
    assert "| none | none | 0% | 600 |" in evidence.table(evidence.read(tmp_path))


def test_the_figure_has_a_line_a_run_in_each_of_six_charts():
    runs = evidence.figures(evidence.read())[evidence.FIRST]
    drawn = evidence.figure(runs)
    lines = [[line for line in ax.lines if len(line.get_xdata()) > 2] for ax in drawn.axes]
    assert [len(of) for of in lines] == [len(runs)] * 6
    first = next(iter(runs.values()))
    assert list(lines[0][0].get_xdata()) == list(first.episodes.decisions)
    flag = [line.get_ydata()[0] for line in drawn.axes[2].lines if len(line.get_xdata()) == 2]
    assert flag == [3161]
    last = first.episodes["return"].tail(evidence.WINDOW).mean()
    assert lines[4][0].get_ydata()[-1] == pytest.approx(last)


def test_other_levels_have_a_figure_of_their_own():
    runs = evidence.read()
    figures = evidence.figures({**runs, "1-3-cpu-seed0": runs["champion-seed0"]})
    assert "1-3-cpu-seed0" in figures[evidence.OTHERS] and "1-3-cpu-seed0" not in figures[evidence.FIRST]
    assert set(runs) <= set(figures[evidence.FIRST]) | set(figures[evidence.OTHERS])
