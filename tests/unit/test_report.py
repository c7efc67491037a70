"""Reports of runs and sweeps: what is on the page, what is drawn, and what bad input gets."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from caldpo_ray.cli import main
from caldpo_ray.errors import InputError
from caldpo_ray.report import report
from caldpo_ray.reporting import drawing
from caldpo_ray.reporting.report_page import Interval, show
from caldpo_ray.reporting.sweep_figures import BETA, SweepFacts, Trial, bootstrap_interval, draw_sweep
from caldpo_ray.storage import open_path
from tests.unit.report_folders import full_evaluation, write_run, write_sweep

VOID = {"meta", "link", "img", "wbr", "br"}


class Page(HTMLParser):
    """Tags that open and close properly, every address, and the text that a person reads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.addresses += [str(values[name]) for name in ("src", "href") if name in values]
        self.alternatives += [str(values["alt"])] if "alt" in values else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += " " + text


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels: most of the time goes into them."""
    monkeypatch.setattr(drawing, "DPI", 80)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Figure]]:
    """The figures by title, while they are still figures."""
    found: dict[str, Figure] = {}
    original = drawing.Sheet.png

    def png(sheet: drawing.Sheet, description: str) -> bytes:
        found[sheet.panels[0].get_title(loc="left")] = sheet.figure
        return original(sheet, description)

    monkeypatch.setattr(drawing.Sheet, "png", png)
    yield found


def names(folder: Path) -> set[str]:
    return {file.stem for file in (folder / "figures").glob("*.png")}


RUN_FIGURES = {"dynamics", "accuracy", "loss", "grad_norm", "lengths", "throughput", "waits"}
EVALUATION_FIGURES = {"length_bias", "calibration", "rewards_true", "world"}


# -- a run ---------------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_holds_all_it_needs(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluation=full_evaluation())
    found = Page(report(run))
    assert names(run) == RUN_FIGURES | EVALUATION_FIGURES
    inside = {base64.b64decode(each.split(",", 1)[1]) for each in found.addresses if each.startswith("data:image/png")}
    assert inside == {file.read_bytes() for file in (run / "figures").glob("*.png")}
    assert all(address.startswith("data:") for address in found.addresses), "nothing comes from outside"
    text = (run / "report.html").read_text()
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert 'name="viewport"' in text and "@media print" in text and "default-src 'none'" in text
    assert len(found.alternatives) == len(inside) and all(len(alt) > 30 for alt in found.alternatives)


def test_the_page_of_a_run_says_what_happened(tmp_path: Path) -> None:
    text = Page(report(write_run(tmp_path, evaluation=full_evaluation()))).text
    for fact in (
        "cal_dpo (beta = 0.1, calibration_weight = 1)", "60 steps, 1,920 rows", "torch 2.13.0", "d1ge57", "k3y", "1dent1ty",
        "r0ws (2,000 rows, 3 bad)", "10.0.0.1", "[0.643, 0.768]", "[−1.5, −1]", "−1.25", "[0.302, 0.498]",
        "Overlap was not checked",
    ):  # fmt: skip
        assert fact in text, fact
    assert re.search(r"Training steps\s+19 s", text), "60 steps of 0.32 s"
    assert re.search(r"Waited for the reference\s+5.0 s", text)
    assert re.search(r"Evaluations\s+6 s in 3", text)
    assert re.search(r"accuracy_\s*chosen_\s*longer\s+accuracy where.*?\s+0.8\s+\[0.72, 0.86\]\s+120", text)


def test_text_of_others_is_escaped(tmp_path: Path) -> None:
    html = report(write_run(tmp_path)).read_text()
    assert "<b>pairs" not in html and "&lt;b&gt;pairs &amp; co&lt;/b&gt;.jsonl" in html and "org/&lt;model&gt;" in html


def test_a_logged_step_stands_for_those_since_the_line_before(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] == "train" and line["step"] % 10 == 0]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert re.search(r"Training steps\s+19 s", Page(report(run)).text)
    for line in kept:
        del line["wall_seconds"]  # a run of an older version
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "Training steps" not in Page(report(run)).text


def test_without_eval_json_the_last_evaluation_is_shown_and_the_way_to_more(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    text = Page(report(run)).text
    assert names(run) == RUN_FIGURES
    assert f"caldpo evaluate {run}" in text and "5.7" in text  # the last margin, 2 · 3 · (1 − e⁻³)


def test_a_run_without_reference_or_held_out_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_lines=19, objective="sft")
    assert "held no rows out" in Page(report(run)).text
    assert names(run) == RUN_FIGURES - {"accuracy"}


def test_one_line_is_enough(tmp_path: Path) -> None:
    assert names(report(write_run(tmp_path, num_lines=1)).parent) == RUN_FIGURES


def test_values_that_are_not_finite_do_not_stop_a_report(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, evaluation={**full_evaluation(), "loss": float("nan"), "loss_interval": [-float("inf"), 1.0]}
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[5:9]:
        line |= {"grad_norm": float("inf"), "loss": float("nan")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "[−∞, 1]" in Page(report(run)).text


def test_every_axis_says_what_it_shows(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    report(write_run(tmp_path, evaluation=full_evaluation()))
    report(write_sweep(tmp_path / "sweep"))
    assert len(drawn) == len(RUN_FIGURES | EVALUATION_FIGURES) + 4
    for title, figure in drawn.items():
        assert (title and figure.axes[-1].get_xlabel()) or title == "Hyper-parameters in parallel", title
        for axes in figure.axes:
            named = axes.get_ylabel() or [label.get_text() for label in axes.get_yticklabels()]
            assert named or title == "Hyper-parameters in parallel", title


def test_the_dynamics_show_the_log_ratios_and_the_targets(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    report(write_run(tmp_path))
    axes = drawn["Training dynamics"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["chosen $h_w$"].get_ydata()[-1] == pytest.approx(3 * (1 - np.exp(-3)), rel=0.02)
    assert lines["rejected $h_l$"].get_ydata()[-1] < 0 < lines["margin $h_w − h_l$"].get_ydata()[-1]
    levels = {float(line.get_ydata()[0]) for line in axes.lines if line.get_linestyle() == ":"}
    assert levels == {5.0, -5.0}, "1 / (2 · 0.1) nats"
    assert axes.get_ylim()[0] < -5 and axes.get_ylim()[1] > 5


def test_a_target_far_away_is_named_and_does_not_flatten_the_curves(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    run = write_run(tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("beta: 0.1", "beta: 0.001"))
    report(run)
    axes = drawn["Training dynamics"].axes[0]
    assert axes.get_ylim()[1] < 10
    assert {"target of $h_w$: +500 ↑", "target of $h_l$: −500 ↓"} <= {text.get_text() for text in axes.texts}


def test_dpo_has_no_target(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    report(write_run(tmp_path, objective="dpo"))
    assert not drawn["Training dynamics"].axes[0].texts


def test_running_mean_is_over_fewer_values_at_the_ends_and_leaves_out_what_is_not_finite() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, np.inf, 6.0])
    assert drawing.running_mean(values, 3).tolist() == pytest.approx([2, 2, 4, 5, 5.5, 6])
    assert drawing.running_mean(values[:2], 1).tolist() == [1, 3]


def test_numbers_as_people_read_them() -> None:
    shown = [
        show(value)
        for value in (1234567, 0.123456, 1331.4, -23456.7, -5e-7, 2e13, None, float("nan"), float("-inf"), True)
    ]
    assert shown == ["1,234,567", "0.1235", "1,331", "−23,457", "−5e−7", "2e13", "–", "–", "−∞", "yes"]
    assert show(Interval((-1.5, 0.12345))) == "[−1.5, 0.123]"


# -- a sweep -------------------------------------------------------------------------------------------------------


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    found = Page(report(sweep))
    assert names(sweep) == {"leader_board", "metric_by_beta", "frontier", "parallel"}
    assert all(address.startswith("data:") for address in found.addresses)
    text = " ".join(found.text.split())
    for fact in (
        "which <loss>?", "cal_dpo leads, but its lead over dpo is within noise.", "within noise of DPO", "[−0.02, 0.04]",
        "The reference scored 4,500 rows, once for all trials; 319,500 were known before", "the loss is not finite",
        "searched: objective.beta, train.learning_rate; default: name = ipo, beta = 0.1",
        "cal_dpo 18 17 0 1 72,000 360", "all 72 68 0 4 288,000 1,440",
    ):  # fmt: skip
        assert fact in text, fact


def test_the_line_over_beta_is_the_mean_of_the_best_point(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    report(sweep)
    lines = {line.get_label(): line for line in drawn["Metric against beta"].axes[0].lines}
    board = {line["objective"]: line for line in json.loads((sweep / "sweep.json").read_text())["leader_board"]}
    assert lines["ipo"].get_xdata().tolist() == [0.1, 0.3, 1.0]
    for name, line in board.items():
        assert lines[name].get_ydata()[0] == pytest.approx(line["mean"])
    assert drawn["Metric against beta"].axes[0].get_xscale() == "log"


def test_the_frontier_takes_the_best_measures_there_are(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    report(sweep)
    assert "exact optimum" in {line.get_label() for line in drawn["True reward bought for drift"].axes[0].lines}
    shutil.rmtree(sweep / "trials")
    report(sweep)
    axes = drawn["Accuracy bought for drift"].axes[0]
    assert axes.get_ylabel() == "held-out accuracy" and "$h_w$" in axes.get_xlabel()
    assert "exact optimum" not in {line.get_label() for line in axes.lines}


def test_ticks_do_not_overlap_and_one_far_policy_does_not_hide_the_others(drawn: dict[str, Figure]) -> None:
    lines = [(0.014, 3.5, 0.67), (0.043, 1.6, 0.69), (0.14, 0.5, 0.68), (0.3, 49.0, 0.62)]
    trials = [
        Trial(
            f"dpo-{beta}", "dpo", f"beta-{beta}", 42, {BETA: beta}, "completed",
            {"rewards/accuracies": accuracy, "world/kl": kl, "world/true_reward": 1.0},
        )
        for beta, kl, accuracy in lines
    ]  # fmt: skip
    draw_sweep(SweepFacts("rewards/accuracies", "max", trials, []))
    for title in ("Metric against beta", "True reward bought for drift"):
        axes = drawn[title].axes[0]
        labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
        boxes = sorted((box.x0, box.x1) for each in labels if each.get_text() for box in [each.get_window_extent()])
        assert len(boxes) > 2 and all(one[1] < two[0] for one, two in pairwise(boxes)), title
    right, top = (
        drawn["True reward bought for drift"]
        .axes[0]
        .transAxes.inverted()
        .transform(drawn["True reward bought for drift"].axes[0].transData.transform((5, 2)))
    )
    assert 0.2 < right < 0.5 and top > 1, (
        "the lower tenth of the drifts has a third of the axis, the optimum none of the height"
    )


def test_a_sweep_of_one_trial(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", objectives=["dpo"], seeds=1)
    lines = pq.read_table(sweep / "trials.parquet").to_pylist()[:1]
    pq.write_table(pa.Table.from_pylist([{**lines[0], "parameters": "{}"}]), sweep / "trials.parquet")
    found = json.loads((sweep / "sweep.json").read_text())
    found["leader_board"] = [{**found["leader_board"][0], "interval": None, "standard_error": None}]
    (sweep / "sweep.json").write_text(json.dumps(found | {"differences_to_dpo": [], "reference": None}))
    report(sweep)
    assert names(sweep) == {"leader_board", "frontier"}, "no beta was searched, and one line is no comparison"


def test_interval_over_seeds() -> None:
    low, high = bootstrap_interval([0.7, 0.7, 0.7])
    assert low == high == pytest.approx(0.7)
    values = np.random.default_rng(1).normal(2.0, 0.5, 200).tolist()
    low, high = bootstrap_interval(values)
    half = 1.96 * np.std(values) / 200**0.5
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.01)


# -- where, and bad input ------------------------------------------------------------------------------------------


def test_a_run_on_object_storage(tmp_path: Path) -> None:
    run, remote = write_run(tmp_path, num_lines=25), open_path(f"memory://{tmp_path.name}/run")
    for file in run.iterdir():
        (remote / file.name).write_bytes(file.read_bytes())
    report(str(remote))
    assert (remote / "report.html").read_text() == report(run).read_text().replace(str(run), str(remote))
    assert {file.name for file in (remote / "figures").iterdir()} == {f"{name}.png" for name in RUN_FIGURES}


def broken(folder: Path, kind: str) -> Path:
    if kind == "neither":
        folder.mkdir()
        return folder
    if kind == "absent":
        return folder / "absent"
    if kind in ("no metrics", "damaged metrics", "damaged eval"):
        run = write_run(folder, num_lines=0)
        text = {"no metrics": "", "damaged metrics": "{\n"}.get(kind, '{"step": 1, "split": "train"}\n')
        (run / "metrics.jsonl").write_text(text)
        (run / "eval.json").write_text("[")
        return run
    sweep = write_sweep(folder, objectives=["dpo"])
    if kind == "damaged sweep":
        (sweep / "sweep.json").write_text("{}")
    elif kind == "unfinished":
        (sweep / "sweep.json").unlink()
        (sweep / "config.yaml").write_text("{}")
    elif kind == "no trials":
        pq.write_table(pq.read_table(sweep / "trials.parquet")[:0], sweep / "trials.parquet")
    elif kind == "no table":
        (sweep / "trials.parquet").unlink()
    elif kind == "damaged table":
        (sweep / "trials.parquet").write_bytes(b"PAR1")
    else:
        table = pq.read_table(sweep / "trials.parquet").drop_columns(["objective"])
        pq.write_table(table, sweep / "trials.parquet")
    return sweep


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("neither", r"neither a run \(config.yaml\) nor a sweep \(sweep.json\) is there"),
        ("absent", "neither a run"),
        ("no metrics", r"the run has no metrics yet \(state: complete\); ask again"),
        ("damaged metrics", r"metrics.jsonl: line 1 is no JSON object; delete that line"),
        ("damaged eval", r"eval.json: cannot be read .*; delete it; `caldpo evaluate` writes it again"),
        ("damaged sweep", r"sweep.json: cannot be read \(it lacks leader_board, metric, name\)"),
        ("unfinished", r"this sweep has no results yet \(sweep.json\)"),
        ("no trials", "the sweep has no finished trial yet"),
        ("no table", r"trials.parquet: cannot be read .*the same `caldpo sweep` command writes it again"),
        ("damaged table", r"trials.parquet: cannot be read"),
        ("no objective", r"trials.parquet: cannot be read \(it lacks objective\)"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path / "folder", kind)
    with pytest.raises(InputError, match=message):
        report(path)
    assert not list(path.glob("**/report.html"))
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(path)])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 2, "the message, and the exit code"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_lines=2)
    (run / "figures").write_text("a file in the way")
    with pytest.raises(InputError, match=r"run: cannot be written \(.+\); copy the folder"):
        report(run)


def test_the_command_says_where_the_report_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, num_lines=2)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run)])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"report in {run / 'report.html'}, 7 figures in {run / 'figures'}\n"


# -- a browser, where there is one ---------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "kind"), [(390, "run"), (390, "sweep"), (1280, "run")])
def test_in_a_browser_nothing_is_wider_than_the_screen_and_nothing_is_complained_of(
    tmp_path: Path, width: int, kind: str
) -> None:
    folder = write_run(tmp_path, evaluation=full_evaluation()) if kind == "run" else write_sweep(tmp_path / "sweep")
    text = report(folder).read_text()
    probe = tmp_path / "probe.html"  # the page with a script of ours, which the page itself would not let run
    measured = "document.title = [innerWidth, document.documentElement.scrollWidth, [...document.images].every(i => i.width > 300)]"
    text = re.sub(r"<meta http-equiv=.*?>", "", text)
    probe.write_text(
        text.replace("</body>", f"<script>addEventListener('load', () => {{ {measured} }})</script></body>")
    )
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},800", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, f"file://{probe}"], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    found: Any = re.search(r"<title>(\d+),(\d+),(\w+)</title>", done.stdout)
    inner, wide, images = found.groups()
    assert int(wide) <= int(inner) and images == "true"
    assert "CONSOLE" not in done.stderr
