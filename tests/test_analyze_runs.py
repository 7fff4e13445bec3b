"""analyze_runs.py: every number against an independent computation, every table as it looks, every error."""

from __future__ import annotations

import itertools
import json
import math
import os
import pty
import re
import shutil
import statistics
import struct
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import TOOLS, clean_env, load_script, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

analyze = load_script("analyze_runs.py")
GOLDEN = Path(__file__).parent / "golden" / "analyze"
ARCHS = ("gnn_qk", "filter_bank", "multilayer_self_attention", "mlp")
NAN, INF = float("nan"), float("inf")


# ---------------------------------------------------------------- exports as the data contract has them


def run_row(i: int, **columns: object) -> dict[str, object]:
    """One row of a runs file: the contract's fixed columns, and what the test says."""
    fixed = {
        "id": f"run{i:04d}",
        "name": f"run-{i}",
        "entity": "lab",
        "project": "demo",
        "state": "finished",
        "url": f"https://wandb.ai/lab/demo/runs/run{i:04d}",
        "created_at": datetime(2025, 10, 1, tzinfo=UTC) + timedelta(minutes=i),
        "heartbeat_at": datetime(2025, 10, 2, tzinfo=UTC),
        "tags": ["paper"] if i % 2 else [],
        "user": "ada",
        "group": None,
        "last_step": 100,
        "runtime_seconds": 60.5 + i,
    }
    return fixed | columns | {"_config_json": "{}", "_summary_json": "{}"}


def write_runs(path: Path, rows: list[dict[str, object]], keys: dict[str, str] | None = None) -> Path:
    """Write a runs file and the metadata beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {column for row in rows for column in row if column.startswith("metric_")}
    overrides = dict.fromkeys(metrics, pl.Float64) | {"group": pl.String}
    pl.DataFrame(rows, schema_overrides=overrides, infer_schema_length=None).write_parquet(path)
    metadata = {"entity": "lab", "project": "demo", "total_runs": len(rows), "columns": keys or {}}
    path.with_name(path.name.removesuffix("_runs.parquet") + "_metadata.json").write_text(json.dumps(metadata))
    return path


def demo_rows(metrics: int = 0) -> list[dict[str, object]]:
    """144 runs: 4 archs x 3 datasets x 2 learning rates x 2 k x 3 seeds; some crashed, some diverged."""
    grid = itertools.product(ARCHS, ("sbm", "ego", "pyg_enzymes"), (0.001, 0.01), (8, 16), (1, 2, 3))
    rows = []
    for i, (arch, dataset, lr, k, seed) in enumerate(grid):
        wobble = 1 + 0.1 * math.sin(37.0 * i)
        mse = 0.01 * (1 + ARCHS.index(arch)) * (1 + len(dataset) / 9) * (1 + 40 * lr) * (1 + k / 99) * wobble
        rows.append(
            run_row(
                i,
                name=f"stage2_{arch}_{dataset}_default_lr{lr:g}_wd1e-4_k{k}_s{seed}",
                state="crashed" if i % 29 == 5 else "finished",
                config_model_k=k,
                config_model_lr=lr,
                config_seed=seed,
                config_out_dir=f"/scratch/outputs/{i}",
                config_data_dataset_name=dataset,
                metric_test_mse={17: NAN, 44: INF, 71: None}.get(i, mse),
                metric_val_loss=mse * (1 + 0.1 * math.cos(11.0 * i)),
                metric_test_acc=1 - mse,
                **{f"metric_probe_{j}": float(i * j) for j in range(metrics)},
            )
        )
    return rows


KEYS = {
    "config_model_k": "model.k",
    "config_model_lr": "model.lr",
    "config_seed": "seed",
    "metric_test_mse": "test/mse",
    "metric_val_loss": "val/loss",
    "metric_test_acc": "test/acc",
}


def write_history(path: Path, rows: list[dict[str, object]], curve: dict[str, list[tuple[float, object]]]) -> Path:
    """Write a history file; `curve` gives each run's (step, val/loss) pairs by run id."""
    lines = [
        {
            "run_id": row["id"],
            "run_name": row["name"],
            "entity": row["entity"],
            "project": row["project"],
            "_step": step,
            "_timestamp": 1.7e9 + step,
            "_runtime": 2.5 * step,
            "val/loss": value,
            "epoch": float(step // 10),
        }
        for row in rows
        for step, value in curve.get(str(row["id"]), [])
    ]
    pl.DataFrame(lines, infer_schema_length=None, strict=False).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `wandb_export/`: the demo runs, their metadata and their history."""
    folder = tmp_path_factory.mktemp("demo")
    rows = demo_rows()
    write_runs(folder / "wandb_export" / "lab_demo_runs.parquet", rows, KEYS)
    curve = {
        str(row["id"]): [(s, math.exp(-s / 60) + 0.02 * math.sin(i + s)) for s in range(0, 200, 10)]
        for i, row in enumerate(rows)
    }
    write_history(folder / "wandb_export" / "lab_demo_history.parquet", rows, curve)
    return folder


class Ran:
    """What one call of the script left: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the script in this process: `call(folder, *args, COLUMNS="160")`, 80 columns and piped by default."""

    def run(cwd: Path, *args: object, **env: str) -> Ran:
        monkeypatch.chdir(cwd)
        for name in ("FORCE_COLOR", "NO_COLOR", "LINES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"COLUMNS": "80"} | env).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["analyze_runs.py", *map(str, args)])
        capsys.readouterr()
        try:
            code = analyze.main()
        except analyze.Stop as stop:
            code = stop.code
            analyze.say(f"error: {stop}")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def result(call):
    """Call with --json; returns the rows. A call that fails shows its stderr."""

    def run(cwd: Path, *args: object) -> list[dict[str, object]]:
        ran = call(cwd, *args, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    return run


def close(a: object, b: object) -> bool:
    """Equal, for floats up to rounding; NaN stands for null."""
    if isinstance(a, float) or isinstance(b, float):
        if a is None or b is None or math.isnan(a) or math.isnan(b):
            return (a is None or math.isnan(a)) and (b is None or math.isnan(b))
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return a == b


# ---------------------------------------------------------------- numbers, against numpy and scipy

VALUE = st.one_of(st.none(), st.sampled_from([NAN, INF, -INF, 0.0]), st.floats(-1e3, 1e3, width=32))
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def runs_of(rows: list[dict[str, object]]) -> object:
    """Runs in memory, as `read` returns them."""
    metrics = {c: pl.Float64 for row in rows for c in row if c.startswith("metric_")}
    frame = pl.DataFrame(rows, schema_overrides=metrics, infer_schema_length=None)
    return analyze.Runs(frame.lazy(), dict(frame.schema), {}, [])


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), VALUE), min_size=1, max_size=30), st.booleans())
def test_group_statistics_are_numpys(pairs, descending):
    finite = [value for _, value in pairs if value is not None and math.isfinite(value)]
    runs = runs_of([{"arch": arch, "metric_m": value} for arch, value in pairs])
    if not finite:
        with pytest.raises(analyze.Stop, match="no finite value"):
            analyze.group(runs, ["arch"], ["metric_m"], [descending])
        return
    frame = analyze.group(runs, ["arch"], ["metric_m"], [descending]).frame
    assert sorted(frame["arch"], key=str) == sorted({arch for arch, _ in pairs}, key=str)
    for row in frame.iter_rows(named=True):
        values = np.array([v for a, v in pairs if a == row["arch"] and v is not None and math.isfinite(v)], float)
        assert row["n"] == len(values)
        assert row["runs"] == sum(a == row["arch"] for a, _ in pairs)
        expected = {
            "mean": values.mean() if len(values) else None,
            "std": values.std(ddof=1) if len(values) > 1 else None,
            "min": values.min(initial=INF) if len(values) else None,
            "median": float(np.median(values)) if len(values) else None,
            "max": values.max(initial=-INF) if len(values) else None,
        }
        for name, value in expected.items():
            assert value is None if row[name] is None else math.isclose(row[name], value, rel_tol=1e-6, abs_tol=1e-6)
    means = frame["mean"].drop_nulls().to_list()
    assert means == sorted(means, reverse=descending), "best first"
    assert frame["mean"].to_list()[: len(means)] == means, "groups without a value come last"


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["x", "y", None]), VALUE), min_size=1, max_size=30))
def test_pivot_cells_are_those_of_the_groups(triples):
    if not any(v is not None and math.isfinite(v) for *_, v in triples):
        return
    runs = runs_of([{"arch": a, "dataset": d, "metric_m": v} for a, d, v in triples])
    frame = analyze.pivot(runs, ["arch"], ["dataset"], "metric_m", False).frame
    for arch, dataset in itertools.product(sorted({a for a, *_ in triples}), {d for _, d, _ in triples}):
        mine = [v for a, d, v in triples if (a, d) == (arch, dataset)]
        values = [v for v in mine if v is not None and math.isfinite(v)]
        row = frame.row(by_predicate=pl.col("arch") == arch, named=True)
        name = dataset or "-"
        assert row[f"{name}_n"] == (len(values) if mine else None)
        assert close(row[f"{name}_mean"], float(np.mean(values)) if values else None)
        assert close(row[f"{name}_std"], float(np.std(values, ddof=1)) if len(values) > 1 else None)


@PROPERTY
@given(st.lists(VALUE, min_size=1, max_size=40), st.booleans())
def test_nothing_that_is_no_number_is_ever_among_the_top(values, descending):
    runs = runs_of([{"name": str(i), "metric_m": v} for i, v in enumerate(values)])
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if finite:
        frame = analyze.top(runs, ["metric_m"], 5, descending).frame
        assert frame["metric_m"].to_list() == sorted(finite, reverse=descending)[:5]


def honest(rows: list[dict], descending: bool) -> dict[tuple, dict]:
    """The honest comparison in plain Python: per (arch, dataset), the (lr, k) with the lowest mean val loss."""
    by_config = defaultdict(list)
    for row in rows:
        by_config[row["arch"], row["dataset"], row["config_lr"], row["config_k"]].append(row)

    def finite(row_list, metric):
        return [r[metric] for r in row_list if r[metric] is not None and math.isfinite(r[metric])]

    cells = defaultdict(list)
    for (arch, dataset, lr, k), members in by_config.items():
        val, test = finite(members, "metric_val"), finite(members, "metric_test")
        diverged = any(r["metric_val"] is not None and not math.isfinite(r["metric_val"]) for r in members)
        cells[arch, dataset].append(
            {"lr": lr, "k": k, "val": statistics.fmean(val) if val else None, "test": test, "runs": len(members)}
            | {"diverged": diverged}
        )
    found = {}
    for cell, configs in cells.items():
        means = [statistics.fmean(c["test"]) for c in configs if c["test"]]
        able = [c for c in configs if c["val"] is not None]
        if able:
            best = min(able, key=lambda c: (c["diverged"], c["val"]))
            found[cell] = best | {
                "configurations": len(means),
                "median": statistics.median(means) if means else None,
                "min": min(means, default=None),
                "max": max(means, default=None),
            }
    return found


@pytest.mark.parametrize("seed", range(6))
def test_best_by_chooses_and_reports_what_plain_python_does(seed):
    rng = np.random.default_rng(seed)

    def value():
        return [None, NAN, INF][rng.integers(3)] if rng.random() < 0.15 else float(rng.normal(1))

    grid = itertools.product("ab", "xy", (0.1, 0.01, None), (4, 8), range(4))
    rows = [
        {"arch": a, "dataset": d, "config_lr": lr, "config_k": k, "config_seed": s, "config_fixed": "same"}
        | {"metric_val": value(), "metric_test": value(), "config_where": f"/tmp/{a}{d}{lr}{k}{s}"}
        for a, d, lr, k, s in grid
        if rng.random() < 0.8
    ]
    answer = analyze.best_by(
        runs_of(rows), ["arch", "dataset"], ["dataset"], "metric_val", False, "metric_test", False, None
    )
    expected = honest(rows, False)
    assert answer.frame.height == len(expected)
    for row in answer.frame.iter_rows(named=True):
        want = expected[row["arch"], row["dataset"]]
        assert (row["config_lr"], row["config_k"]) == (want["lr"], want["k"])
        assert (row["runs"], row["n"]) == (want["runs"], len(want["test"]))
        assert close(row["selection"], want["val"])
        assert close(row["mean"], statistics.fmean(want["test"]) if want["test"] else None)
        assert close(row["std"], statistics.stdev(want["test"]) if len(want["test"]) > 1 else None)
        assert all(close(row[c], want[c]) for c in ("configurations", "median", "min", "max"))


def wandb_ema(values: list[float], weight: float) -> list[float]:
    """W&B's smoothing as its documentation gives it: an exponential moving average, debiased."""
    last, smoothed = 0.0, []
    for i, value in enumerate(values):
        last = last * weight + (1 - weight) * value
        smoothed.append(last / (1 - weight ** (i + 1)))
    return smoothed


# ---------------------------------------------------------------- learning curves


@pytest.fixture
def two_groups(tmp_path: Path) -> tuple[Path, list[dict], dict]:
    """Five runs in two groups with curves of different lengths; one run has no curve, one diverges."""
    rows = [run_row(i, config_opt="adam" if i < 3 else "sgd") for i in range(5)]
    rng = np.random.default_rng(0)
    curve = {
        "run0000": [(s, float(v)) for s, v in enumerate(rng.normal(size=30))],
        "run0001": [(s, float(v)) for s, v in enumerate(rng.normal(size=30))],
        "run0002": [(s, float(v)) for s, v in enumerate(rng.normal(size=12))],
        "run0003": [(s, float(v)) for s, v in enumerate([*rng.normal(size=5), NAN, INF, *rng.normal(size=3)])],
    }
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, curve)
    return path, rows, curve


@pytest.mark.parametrize("weight", [0.0, 0.9])
def test_curves_are_means_over_runs_of_each_smoothed_run(result, two_groups, weight):
    path, rows, curve = two_groups
    points = defaultdict(list)
    for row in rows:
        finite = [(s, v) for s, v in curve.get(row["id"], []) if math.isfinite(v)]
        for (step, _), value in zip(finite, wandb_ema([v for _, v in finite], weight), strict=True):
            points[row["config_opt"], step].append(value)
    found = result(path.parent, path, "--curves", "val/loss", "--group-by", "opt", "--smooth", weight)
    assert [row["_step"] for row in found] == list(range(30))
    for row in found:
        for opt in ("adam", "sgd"):
            values = points[opt, row["_step"]]
            assert row[f"{opt}_n"] == (len(values) or None)
            assert close(row[f"{opt}_mean"], statistics.fmean(values) if values else None)
            assert close(row[f"{opt}_std"], statistics.stdev(values) if len(values) > 1 else None)


def test_curves_say_what_is_left_out_and_follow_another_x(call, two_groups):
    path, _, _ = two_groups
    ran = call(path.parent, path, "--curves", "val_loss", "--x", "epoch")
    assert "val/loss: 2 of 82 points are no finite numbers; left out" in ran.err
    assert "1 of 5 runs have no val/loss in the history" in ran.err
    assert ran.out.splitlines()[1].split() == ["epoch", "all"]
    assert len([line for line in ran.out.splitlines() if "(n=" in line]) == 3, "steps 0 to 29 are epochs 0, 1, 2"


def test_long_curves_are_binned_and_lose_no_run(result, tmp_path):
    rows = [run_row(i) for i in range(3)]
    curve = {row["id"]: [(s + i, float(s + i)) for s in range(0, 3000, 2)] for i, row in enumerate(rows)}
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, curve)
    found = result(tmp_path, path, "--curves", "val/loss")
    assert len(found) == analyze.GRID
    assert {row["all_n"] for row in found} == {3}, "runs that logged at other steps meet in a bin"
    width = 3000 / analyze.GRID
    assert all(0 <= row["all_mean"] - row["_step"] <= width for row in found)


def test_a_key_that_is_text_in_some_runs_keeps_its_numbers(result, tmp_path):
    rows = [run_row(0), run_row(1)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    history = tmp_path / "lab_demo_history.parquet"
    write_history(history, rows, {"run0000": [(0, "0.5"), (1, "diverged")], "run0001": [(0, "1.5")]})
    found = result(tmp_path, path, "--curves", "val/loss")
    assert [(row["_step"], row["all_mean"], row["all_n"]) for row in found] == [(0, 1.0, 2)]


def test_curves_without_history_say_how_to_get_it(call, tmp_path):
    path = write_runs(tmp_path / "lab_demo_runs.parquet", [run_row(0)])
    ran = call(tmp_path, path, "--curves", "val/loss")
    assert ran.code == 2
    assert "lab_demo_history.parquet" in ran.err
    assert "--include-history" in ran.err


# ---------------------------------------------------------------- the honest comparison: what it must not hide


def comparison(tmp_path: Path, **changes: object) -> Path:
    """2 archs x 2 learning rates x 3 seeds; `changes` overrides columns, a callable gets the row's number."""
    rows = []
    for i, (arch, lr, seed) in enumerate(itertools.product(("mlp", "gnn_qk"), (0.1, 0.01), (1, 2, 3))):
        row = {"name": f"{arch}_sbm_s{seed}", "config_lr": lr, "config_seed": seed, "config_host": f"node{i}"}
        row |= {"metric_val_loss": lr + seed / 100, "metric_test_mse": lr + seed / 1000}
        row |= {column: value(i) if callable(value) else value for column, value in changes.items()}
        rows.append(run_row(i, **row))
    return write_runs(tmp_path / "lab_demo_runs.parquet", rows)


def test_seeds_are_averaged_and_what_is_unique_per_run_is_left_out_aloud(call, tmp_path):
    path = comparison(tmp_path)
    ran = call(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse")
    assert "Averaged over config_seed, seed_parsed" in ran.err
    assert "Labels of runs, no hyperparameters: config_host\n" in ran.err
    assert "warning" not in ran.err
    assert "lr=0.01" in ran.out
    assert "0.0120 ± 0.0010 (n=3)" in ran.out
    assert "[0.009516, 0.01448]" in ran.out
    assert "of 2: median 0.057, range 0.012 to 0.102" in " ".join(ran.out.split())


def test_over_says_otherwise(call, result, tmp_path):
    path = comparison(tmp_path)
    found = result(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse", "--over", "lr,host,seed")
    assert {row["n"] for row in found} == {6}
    over = call(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse", "--over", "seed")
    assert over.out == call(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse").out, "labels stay labels"


@pytest.mark.parametrize(
    ("changes", "options", "warning"),
    [
        ({}, ["--best-by", "test/mse"], "chosen and reported by the same test metric, metric_test_mse"),
        ({}, ["--best-by", "val/loss", "--metric", "val/loss"], "chosen and reported by the same metric"),
        ({"metric_test_loss": 1.0}, ["--best-by", "test/loss"], "metric_test_loss looks like a test metric"),
        ({"config_seed": 7, "name": "mlp_sbm"}, ["--best-by", "val/loss"], "No seed varies"),
        (
            {"config_seed": 7, "config_host": "one", "name": "mlp_sbm"},
            ["--best-by", "val/loss", "--over", "config_seed"],
            "hold a seed twice",
        ),
        ({"config_seed": lambda i: i % 2, "name": "mlp_sbm"}, ["--best-by", "val/loss"], "hold a seed twice"),
        ({"metric_test_mse": lambda i: NAN if i == 3 else i}, ["--best-by", "val/loss"], "some of whose runs have no"),
        (
            {"metric_test_mse": lambda i: NAN if i in (3, 4, 5) else i},
            ["--best-by", "val/loss"],
            "have no finite metric_t",
        ),
        (
            {"metric_val_loss": lambda i: NAN if i < 6 else 1},
            ["--best-by", "val/loss"],
            "1 of 2 cells have no run with",
        ),
        (
            {"config_lr": lambda i: 0.1 if i < 6 else i % 2},
            ["--best-by", "val/loss"],
            "cells that are compared offered 1 to 2 configurations",
        ),
        (
            {"name": lambda i: f"mlp_{['sbm', 'ego'][i % 2]}"},
            ["--best-by", "val/loss", "--group-by", "arch"],
            "dataset varies within cells, and the easiest is chosen",
        ),
        ({"metric_val_loss": 1.0}, ["--best-by", "val/loss"], "several configurations with the best metric_val_loss"),
        ({"state": lambda i: "failed" if i == 4 else "finished"}, ["--best-by", "val/loss"], "have fewer seeds than"),
    ],
)
def test_what_weakens_the_claim_is_said(call, tmp_path, changes, options, warning):
    path = comparison(tmp_path, **changes)
    ran = (
        call(tmp_path, path, "--metric", "test/mse", *options)
        if "--metric" not in options
        else call(tmp_path, path, *options)
    )
    assert ran.code == 0, ran.err
    assert warning in ran.err


def test_a_run_that_ran_twice_is_no_further_seed(call, tmp_path):
    path = comparison(
        tmp_path, config_seed=lambda i: (1, 1, 3)[i % 3], state=lambda i: "failed" if i == 4 else "finished"
    )
    ran = call(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse")
    assert "(n=2)" in ran.out
    assert "fewer seeds" not in ran.err  # than the other learning rate, of which a seed ran twice


def test_of_equally_good_configurations_the_one_with_most_seeds_stands(result, tmp_path):
    path = comparison(
        tmp_path, metric_val_loss=1.0, config_lr=lambda i: 0.1 if i % 6 < 2 else 0.01, config_seed=lambda i: i
    )
    found = result(tmp_path, path, "--best-by", "val/loss", "--metric", "test/mse", "--group-by", "arch")
    assert {(row["n"], row["config_lr"]) for row in found} == {(4, 0.01)}


@pytest.mark.parametrize(
    ("select", "options", "lr"),
    [
        ("val/loss", [], 0.01),
        ("val/loss", ["--descending"], 0.01),
        ("val/acc", [], 0.1),
        ("val/acc", ["--descending"], 0.1),
        ("val/acc:min", ["--descending"], 0.01),
        ("val/loss:max", [], 0.1),
        ("val/quality", [], 0.01),
        ("val/quality", ["--descending"], 0.1),
    ],
)
def test_the_direction_of_the_choice(result, tmp_path, select, options, lr):
    extra = {f"metric_val_{name}": lambda i: 0.9 - i % 6 // 3 / 10 for name in ("acc", "quality")}
    path = comparison(tmp_path, **extra)
    found = result(tmp_path, path, "--best-by", select, "--metric", "test/mse", "--group-by", "arch", *options)
    assert {row["config_lr"] for row in found} == {lr}


# ---------------------------------------------------------------- tables as they look

QUESTIONS = {
    "top": [],
    "group": ["--group-by", "arch,k", "--metric", "test/mse"],
    "metrics": ["--group-by", "arch", "--metrics", "test/mse,val/loss,test/acc"],
    "pivot": ["--pivot", "--metric", "test/mse"],
    "best-by": ["--best-by", "val/loss", "--metric", "test/acc", "--descending"],
    "importance": ["--importance", "--metric", "val/loss"],
    "sql": ["--sql", "SELECT architecture, count(*) AS runs, min(metric_val_loss) FROM runs GROUP BY 1 ORDER BY 1"],
    "schema": ["--schema", "--match", "lr|seed|dataset|test"],
    "curves": ["--curves", "val/loss", "--group-by", "arch", "--smooth", "0.5"],
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_tables_look_as_they_did(call, demo, question):
    """Golden outputs at 80 and 160 columns, piped and in colour. UPDATE_GOLDEN=1 writes them anew: read the diff."""
    shown = ""
    for columns, colour in itertools.product(("80", "160"), ({}, {"FORCE_COLOR": "1"})):
        ran = call(demo, *QUESTIONS[question], COLUMNS=columns, **colour)
        assert ran.code == 0, ran.err
        shown += f"$ {columns} columns, {'in colour' if colour else 'piped'}\n{ran.out}$ stderr\n{ran.err}\n"
        plain = re.sub(r"\x1b\[[\d;]*m", "", ran.out)
        assert max(map(len, plain.splitlines())) <= int(columns), "nothing wraps"
        assert (plain != ran.out) == bool(colour)
    golden = GOLDEN / f"{question}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(shown, encoding="utf-8")
    assert shown == golden.read_text(encoding="utf-8")


def test_three_hundred_metrics_do_not_change_the_look_of_groups(call, demo, tmp_path):
    write_runs(tmp_path / "wandb_export" / "lab_demo_runs.parquet", demo_rows(metrics=300), KEYS)
    args = ["--group-by", "arch,k", "--metric", "test/mse"]
    assert call(tmp_path, *args).out == call(demo, *args).out


def test_what_does_not_fit_is_named_and_counted(call, demo):
    ran = call(demo, "--pivot", "--cols", "dataset,k", "--metric", "test/mse")
    hidden = re.search(r"(\d+) more columns do not fit in 80 characters: ([^.]*)\.", ran.out.replace("\n", " "))
    shown = ran.out.splitlines()[2]
    assert shown.count(" / ") + int(hidden[1]) == 6
    assert hidden[2].count(" / ") == int(hidden[1])
    ran = call(demo, "--top", "3", COLUMNS="50")
    assert "Long texts in 'name' are cut where … stands" in ran.out
    assert ran.out.count("…") == 4
    assert max(map(len, ran.out.splitlines())) <= 50


def test_names_that_hold_control_characters_or_markup_stay_one_line(call, tmp_path):
    rows = [
        run_row(0, name="[bold]a\nb\x1b[31m\tc|d_e&<f>", metric_test_mse=1.0),
        run_row(1, name="日本語", metric_test_mse=2.0),
    ]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    ran = call(tmp_path, path, *(a for f in ("t.md", "t.tex", "t.html") for a in ("-o", f)))
    assert "[bold]a b\ufffd[31m c|d_e&<f>" in ran.out
    assert "\x1b" not in ran.out
    for name, text in {
        "t.md": "\\[bold\\]a b\ufffd\\[31m c\\|d\\_e\\&\\<f\\>",
        "t.tex": "a b\ufffd[31m c|d\\_e\\&<f>",
        "t.html": "c|d_e&amp;&lt;f&gt;",
    }.items():
        call(tmp_path, path, "-o", name)
        assert text in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "-"), (8, "8"), (10**20, str(10**20)), (True, "true"), ("a\x00\nb", "a\ufffd b")),
        *((0.1, "0.1"), (1 / 3, "0.3333"), (123456.7, "123457"), (1.5e7, "1.5e+07"), (1.234567e-7, "1.235e-07")),
        *((NAN, "nan"), (-0.00012345, "-0.0001234")),
    ],
)
def test_numbers_have_four_significant_digits(value, text):
    assert analyze.number(value) == text


def test_a_terminal_gets_colour_and_its_own_width(demo):
    """On a pseudo-terminal of 100 columns: colour, and no line beyond column 100."""
    main, terminal = pty.openpty()
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = clean_env(demo, TERM="xterm-256color")
    command = [sys.executable, str(TOOLS / "analyze_runs.py"), "--pivot", "--metric", "test/mse"]
    process = subprocess.Popen(command, cwd=demo, env=env, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    text = b""
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # Linux says EIO when the other end has gone
            break
        if not chunk:
            break
        text += chunk
    os.close(main)
    assert process.wait(30) == 0
    lines = text.decode().replace("\r", "").splitlines()
    assert any("\x1b[1;32m* " in line for line in lines)
    widths = [len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines]
    assert 80 < max(widths) <= 100


# ---------------------------------------------------------------- which files, which runs


def exported(path: Path, when: str, rows: list[dict[str, object]]) -> Path:
    """A runs file whose footer says when it was exported, as export_runs.py writes it."""
    write_runs(path, rows)
    about = {"entity": "lab", "project": path.name, "exported_at": when}
    pl.read_parquet(path).write_parquet(path, metadata={"wandb_tools": json.dumps(about)})
    return path


def test_without_a_file_the_export_made_last_is_read_and_the_others_are_named(call, tmp_path):
    folder = tmp_path / "wandb_export"
    old = exported(folder / "lab_old_runs.parquet", "2025-10-01T00:00:00+00:00", [run_row(0, metric_loss=1.0)])
    new = exported(folder / "lab_new_runs.parquet", "2025-10-02T00:00:00", [run_row(1, metric_loss=2.0)])
    os.utime(new, (1, 1))  # copied from elsewhere: the time of the file says nothing
    os.utime(old, (2, 2))
    (folder / "lab_a_runs.parquet").mkdir()
    os.mkfifo(folder / "lab_b_runs.parquet")
    ran = call(tmp_path)
    assert f"Reading {new.relative_to(tmp_path)}, the newest of 2; not read:\n  {old.relative_to(tmp_path)}" in ran.err
    assert "run-1" in ran.out
    assert "run-0" not in ran.out


def test_whatever_lies_in_the_folder_it_is_left_out_with_a_word(call, result, demo, tmp_path):
    folder = tmp_path / "wandb_export"
    shutil.copytree(demo / "wandb_export", folder)
    aggregate = pl.read_parquet(folder / "lab_demo_runs.parquet").with_columns(_source_file=pl.lit("x"))
    aggregate.write_parquet(folder / "aggregated.parquet")
    pl.DataFrame({"a": [1]}).write_parquet(folder / "mine.parquet")
    (folder / "empty_runs.parquet").mkdir()
    os.mkfifo(folder / "fifo_runs.parquet")
    (folder / "notes.txt").write_text("mine")
    everything = [str(path.relative_to(tmp_path)) for path in sorted(folder.iterdir())]  # as a shell spells the glob
    expected = result(tmp_path, folder / "lab_demo_runs.parquet", "-g", "arch", "-m", "val/loss")
    for inputs, left in ((["wandb_export/*"], 7), (["wandb_export/*.parquet"], 5), (everything, 7)):
        ran = call(tmp_path, *inputs, "-g", "arch", "-m", "val/loss", "--json")
        assert ran.code == 0
        assert json.loads(ran.out) == expected
        assert f"{left} of {left + 1} files left out, no exports of runs: aggregated.parquet, " in ran.err
    assert call(tmp_path, "wandb_export/agg*", "-g", "state", "-m", "val/loss").code == 0
    (folder / "lab_bad_runs.parquet").write_bytes(b"PAR1 and no more")
    ran = call(tmp_path, "wandb_export/*", "-g", "arch", "-m", "val/loss", "--json")
    assert json.loads(ran.out) == expected
    assert ran.code == 1, "a part failed"
    assert "warning: left out: wandb_export/lab_bad_runs.parquet is no Parquet file that can be read" in ran.err
    for name, why in (("fifo_runs.parquet", "no regular file"), ("empty_runs.parquet", "a folder without")):
        ran = call(tmp_path, folder / name)
        assert ran.code == 2
        assert f"is {why}" in ran.err


def test_a_path_that_exists_is_no_glob(result, tmp_path):
    for number, name in enumerate(("exp1", "exp[1]")):
        write_runs(tmp_path / name / "lab_demo_runs.parquet", [run_row(number, name=name, metric_loss=1.0)])
    for path in ("exp[1]", "exp[1]/*.parquet", "exp[1]/lab_demo_runs.parquet", tmp_path / "exp[1]/*_runs.parquet"):
        assert [row["name"] for row in result(tmp_path, path)] == ["exp[1]"]


def test_single_graph_runs_among_others_are_told(call, tmp_path):
    rows = [run_row(i, config_data_same_graph_all_splits=i < 2, metric_loss=1.0) for i in range(6)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    assert "warning: 2 of 6 runs are single_graph, the others distribution" in call(tmp_path, path).err
    for protocol in ("all", "single_graph", "distribution"):
        assert "warning" not in call(tmp_path, path, "--protocol", protocol).err


@pytest.mark.parametrize("columns", ["null", "[]", '{"metric_test_mse": null}', '"text"', "[" * 10_000])
def test_metadata_of_any_form_costs_no_more_than_the_keys(call, tmp_path, columns):
    path = write_runs(tmp_path / "lab_demo_runs.parquet", [run_row(0, metric_test_mse=1.0)])
    (tmp_path / "lab_demo_metadata.json").write_text(f'{{"columns": {columns}}}')
    ran = call(tmp_path, path)
    assert ran.code == 0, ran.err
    assert "run-0" in ran.out


def test_files_folders_and_globs_are_one_table(result, tmp_path):
    folder = tmp_path / "exports"
    first = run_row(0, project="a", metric_test_mse=1, config_lr=1, config_x=True, metric_only_a=1.0)
    second = run_row(0, project="b", metric_test_mse=0.5, config_lr=0.1, config_x="yes", config_only_b="b")
    one = write_runs(folder / "lab_a_runs.parquet", [first], {"metric_test_mse": "test/mse"})
    two = write_runs(folder / "lab_b_runs.parquet", [second])
    write_history(folder / "lab_a_history.parquet", [first], {"run0000": [(0, 1.0)]})
    query = "SELECT project, config_lr, config_x, metric_only_a, config_only_b FROM runs ORDER BY project"
    expected = [
        {"project": "a", "config_lr": 1.0, "config_x": "true", "metric_only_a": 1.0, "config_only_b": None},
        {"project": "b", "config_lr": 0.1, "config_x": "yes", "metric_only_a": None, "config_only_b": "b"},
    ]
    for inputs in (
        [one, two],
        [two, one],
        [folder],
        [folder / "*.parquet"],
        ["exports/lab_?_runs.parquet"],
        [folder, one],
    ):
        assert result(tmp_path, *inputs, "--sql", query) == expected


def test_a_run_in_several_files_counts_once_from_the_newest(call, result, tmp_path):
    old = write_runs(tmp_path / "a_runs.parquet", [run_row(0, metric_test_mse=1.0), run_row(1, metric_test_mse=5.0)])
    new = write_runs(tmp_path / "b_runs.parquet", [run_row(0, metric_test_mse=2.0)])
    os.utime(old, (1, 1))
    for inputs in ([old, new], [new, old]):
        found = result(tmp_path, *inputs)
        assert [(row["id"], row["metric_test_mse"]) for row in found] == [("run0000", 2.0), ("run0001", 5.0)]
    assert "1 of 3 runs stand in several files" in call(tmp_path, old, new).err


def test_raw_exports_get_columns_from_names_and_aggregated_ones_keep_theirs(result, tmp_path):
    row = run_row(0, name="stage2_gnn_qk_sbm_lr1e-3_k8_s4", metric_test_mse=1.0)
    raw = write_runs(tmp_path / "lab_demo_runs.parquet", [row])
    own = write_runs(tmp_path / "aggregated.parquet", [row | {"arch": "mine", "_source_file": raw.name}])
    query = ["--sql", "SELECT * FROM runs"]
    found = result(tmp_path, raw, *query)[0]
    names = ("stage", "arch", "dataset", "k", "lr_parsed", "seed_parsed", "protocol")
    assert [found[c] for c in names] == ["stage2", "gnn_qk", "sbm", 8, 0.001, 4, "distribution"]
    found = result(tmp_path, own, *query)[0]
    assert found["arch"] == "mine"
    assert "stage" not in found


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], 6),
        (["--state", "all"], 8),
        (["--state", "crashed"], 1),
        (["--state", "Crashed,running"], 2),
        (["--state", "crashed", "--state", "running"], 2),
        (["--tag", "paper", "--state", "all"], 4),
        (["--tag", "paper", "--tag", "none", "--state", "all"], 4),
        (["--protocol", "all"], 6),
        (["--where", "created_at >= '2025-10-01T00:04:00' AND created_at < '2025-10-02'"], 3),
        (["--filter", "MLP"], 3),
        (["--filter", "mlp_.*s[12]$"], 1),
        (["--project", "^b$"], 2),
        (["--protocol", "single_graph"], 1),
        (["--protocol", "distribution"], 5),
        (["--where", "k = 8 AND metric_test_mse < 4"], 1),
        (["--where", "architecture = 'mlp' OR config_lr IS NULL"], 4),
        (["--where", "name LIKE '%s3'", "--project", "a"], 1),
        (["--filter", "mlp", "--where", "k >= 8", "--state", "all"], 4),
    ],
)
def test_filters_leave_the_right_runs(result, tmp_path, options, left):
    rows = [
        run_row(
            i,
            name=f"{'mlp' if i < 4 else 'spectral'}_k{8 if i % 2 else 16}_s{i}",
            project="b" if i > 5 else "a",
            state={1: "crashed", 5: "running"}.get(i, "finished"),
            config_lr=None if i == 7 else 0.1,
            config_data__target_="data.SingleGraphData" if i == 3 else "data.Other",
            metric_test_mse=float(i),
        )
        for i in range(8)
    ]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    assert result(tmp_path, path, "--sql", "SELECT count(*) AS n FROM runs", *options) == [{"n": left}]


def test_what_the_state_removes_is_said(call, demo):
    assert "5 of 144 runs left out: 5 crashed (--state all keeps them)" in call(demo).err
    assert "left out: 5" not in call(demo, "--state", "all").err
    assert "metric_test_mse: of 139 runs 1 without a value, 1 NaN, 1 infinite; left out" in call(demo, "-g", "arch").err


# ---------------------------------------------------------------- which columns


@pytest.mark.parametrize("word", ["metric_val_loss", "val_loss", "val/loss"])
def test_a_metric_goes_by_any_of_its_names(call, demo, word):
    assert "runs by metric_val_loss (lowest first)" in call(demo, "--metric", word).out


def test_keys_that_share_a_spelling_are_told_apart(call, tmp_path):
    keys = {"metric_test_mse": "test_mse", "metric_test_mse__2": "test/mse"}
    path = write_runs(
        tmp_path / "lab_demo_runs.parquet", [run_row(0, metric_test_mse=1.0, metric_test_mse__2=2.0)], keys
    )
    assert "by metric_test_mse__2 " in call(tmp_path, path, "--metric", "test/mse").out
    assert "by metric_test_mse " in call(tmp_path, path, "--metric", "test_mse").out


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["-g", "architecture"], ["-g", "arch"]),
        (["--pivot", "--rows", "architecture"], ["--pivot", "--rows", "arch"]),
        (["-g", "arch,model.k"], ["-g", "arch,config_model_k"]),
        (["-g", "model_k"], ["-g", "model.k"]),
        (["-g", "lr"], ["-g", "lr_parsed"]),
        (["--where", "architecture = 'mlp'"], ["--where", "arch = 'mlp'"]),
        (["--rows", "arch"], ["--pivot"]),
    ],
)
def test_two_ways_to_say_the_same(call, demo, first, second):
    assert call(demo, "-m", "val/loss", *first).out == call(demo, "-m", "val/loss", *second).out


def test_the_default_metric_is_the_first_that_has_values(call, tmp_path):
    def chosen(**metrics: object) -> Ran:
        return call(tmp_path, write_runs(tmp_path / "x_runs.parquet", [run_row(0, **metrics)]))

    assert "Metric: metric_test_mse " in chosen(metric_test_acc=1.0, metric_test_mse=1.0, metric_loss=1.0).err
    assert "Metric: metric_val_loss " in chosen(metric_test_mse=None, metric_val_loss=1.0, metric_test_loss=NAN).err
    ran = chosen(metric_strange=1.0)
    assert ran.code == 2
    assert "Name one with --metric" in ran.err


def test_a_hint_when_more_is_better(call, demo):
    assert "hint: metric_test_acc looks like a score" in call(demo, "--metric", "test/acc").err
    assert "hint" not in call(demo, "--metric", "test/acc", "--descending").err
    assert "hint" not in call(demo, "--metric", "val/loss").err


def test_lists_can_be_grouped_and_saved(result, demo):
    assert {row["tags"] for row in result(demo, "-g", "tags")} == {"", "paper"}


def test_schema_tells_kind_type_nulls_values_and_key(result, demo):
    found = {row["column"]: row for row in result(demo, "--schema", "--state", "all")}
    assert found["metric_test_mse"]["key"] == "test/mse"
    assert found["metric_test_mse"]["null_share"] == pytest.approx(1 / 144)
    assert found["config_model_k"] | {"key": None} == {
        "column": "config_model_k", "kind": "config", "type": "Int64", "null_share": 0.0, "distinct": 2,
        "values": "8 to 16", "key": None,
    }  # fmt: skip
    assert found["dataset"]["values"] == "ego, pyg_enzymes, sbm"
    assert found["group"]["values"] is None
    assert [found[c]["kind"] for c in ("id", "arch", "_config_json")] == ["run", "name", "json"]
    matched = result(demo, "--schema", "--match", "MODEL.LR|val")
    assert [row["column"] for row in matched] == ["config_model_lr", "metric_val_loss"]


def test_sql_joins_history(result, demo):
    query = (
        "SELECT arch, max(h._step) AS last FROM runs JOIN history h ON h.run_id = runs.id GROUP BY arch ORDER BY arch"
    )
    assert result(demo, "--sql", query) == [{"arch": arch, "last": 190} for arch in sorted(ARCHS)]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--metric", "test/msee"], 2, ["no metric 'test/msee'", "Did you mean metric_test_mse"]),
        (["--metric", "name"], 2, ["name holds String, not numbers"]),
        (["--group-by", "archi"], 2, ["no column 'archi'", "Did you mean arch"]),
        (["--group-by", "out"], 2, ["Did you mean config_out_dir?"]),
        (["--pivot", "--rows", "dataste"], 2, ["no column 'dataste'", "dataset"]),
        (["--pivot", "--rows", "arch", "--cols", "arch"], 2, ["arch stands in the rows and in the columns"]),
        (["--where", "k >"], 2, ["--where 'k >' is no SQL condition"]),
        (["--where", "kk > 1"], 2, ["no column 'kk'", "Did you mean k"]),
        (["--where", "k > 'a'"], 2, ["--where \"k > 'a'\" cannot be evaluated"]),
        (["--filter", "("], 2, ["--filter '(' is no regular expression", "unclosed group"]),
        (["--project", "["], 2, ["--project '[' is no regular expression"]),
        (["--match", "*"], 2, ["--match '*' is no regular expression"]),
        (["--match", "zzz"], 1, ["no column matches --match 'zzz'"]),
        (["--filter", "zzz"], 1, ["no run matches these filters"]),
        (["--state", "finnished"], 2, ["'finnished' is no state. Name any of running, finished"]),
        (["--state", "failed,running"], 1, ["no run is failed or running: 139 finished, 5 crashed"]),
        (["--where", "created_at >= 'soon'"], 2, ["--where \"created_at >= 'soon'\" "]),
        (["--where", "metric_test_mse IS NULL", "-m", "test/mse"], 1, ["no finite value in these 1 runs"]),
        (["--where", "k = 8 AND arch = 'mlp'", "--importance", "-m", "probe"], 2, ["no metric 'probe'"]),
        (["--sql", "SELECT arhc FROM runs"], 2, ["no column 'arhc'", "Did you mean arch"]),
        (["--sql", "SELEC arch FROM runs"], 2, ["--sql:"]),
        (["--sql", "SELECT arch FROM run"], 2, ["--sql:", "Tables are runs and history"]),
        (["--curves", "val/los"], 2, ["no 'val/los' in the history", "Did you mean val/loss?"]),
        (["--curves", "val/loss", "--x", "epcoh"], 2, ["Did you mean epoch?"]),
        (["--smooth", "1", "--curves", "val/loss"], 2, ["'1' is no number from 0 up to, but not, 1"]),
        (["--smooth", "0.5"], 2, ["--smooth goes with --curves"]),
        (["--top", "0"], 2, ["'0' is no whole number above 0"]),
        (["--top", "5", "--pivot"], 2, ["--top goes with --group-by, --best-by"]),
        (["--pivot", "--importance"], 2, ["--importance and --pivot are separate questions"]),
        (["--over", "seed"], 2, ["--over goes with --best-by"]),
        (["--plot", "x.png", "--schema"], 2, ["--plot goes with"]),
        (["-o", "table.doc"], 2, ["'table.doc' does not end in one of .csv .parquet .json .md .tex .html"]),
        (["--plot", "x.jpg"], 2, ["does not end in one of .html .png .svg .pdf"]),
        (["-o", "x.html", "--plot", "x.html"], 2, ["name the same file"]),
        (["-o", "wandb_export/lab_demo_runs.parquet"], 2, ["is read from, and would be overwritten"]),
        (["nothing.parquet"], 2, ["no file of runs at nothing.parquet"]),
        (["~no_such_user/*.parquet"], 2, ["no file of runs at ~no_such_user/*.parquet"]),
        (["wandb_export/a**b"], 2, ["no file of runs at wandb_export/a**b"]),
        (["wandb_export/lab_dmo_runs.parquet"], 2, ["Did you mean", "lab_demo_runs.parquet"]),
        (["wandb_export/lab_demo_history.parquet"], 2, ["is a history file"]),
        (["wandb_export/*_history.parquet"], 2, ["is a history file"]),
        (["wandb_export/lab_demo_metadata.json"], 2, ["is no Parquet file that can be read"]),
    ],
)  # fmt: skip
def test_errors_say_what_and_what_to_do(call, demo, options, code, words):
    before = sorted(path.name for path in demo.rglob("*"))
    ran = call(demo, *options)
    assert ran.code == code
    assert ran.out == ""
    for word in words:
        assert word in ran.err
    assert sorted(path.name for path in demo.rglob("*")) == before, "no file is left"


def test_an_aggregated_file_may_be_narrow_and_lie_elsewhere(call, result, demo, tmp_path):
    frame = analyze.read([demo / "wandb_export" / "lab_demo_runs.parquet"]).frame.collect()
    narrow = tmp_path / "narrow.parquet"
    frame.with_columns(_source_file=pl.lit("x")).select(
        "id", "entity", "project", "name", "arch", "metric_val_loss", "_source_file"
    ).write_parquet(narrow)
    assert result(demo, narrow, "-g", "arch")[0]["n"] == 36, "without a state every run counts"
    ran = call(demo, narrow, "--pivot")
    assert ran.code == 2
    assert "no column 'dataset'" in ran.err
    assert len(result(demo, narrow, "--curves", "val/loss")) == 20, "the history is found in wandb_export/"


def test_a_file_that_is_damaged_inside(call, demo, tmp_path):
    data = bytearray((demo / "wandb_export" / "lab_demo_runs.parquet").read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    (tmp_path / "lab_bad_runs.parquet").write_bytes(data)
    ran = call(tmp_path, "lab_bad_runs.parquet")
    assert ran.code == 2
    assert "cannot be evaluated" in ran.err


def test_files_that_are_none_of_ours(call, tmp_path):
    ran = call(tmp_path)
    assert ran.code == 2
    assert "no *_runs.parquet in wandb_export/" in ran.err
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "x.parquet")
    assert "has no column `name`" in call(tmp_path, "x.parquet").err
    whole = write_runs(tmp_path / "lab_demo_runs.parquet", [run_row(0, metric_test_mse=1.0)])
    (tmp_path / "cut_runs.parquet").write_bytes(whole.read_bytes()[:-20])
    ran = call(tmp_path, "cut_runs.parquet")
    assert ran.code == 2
    assert "cut_runs.parquet is no Parquet file that can be read" in ran.err
    (tmp_path / "lab_demo_metadata.json").write_text("{")
    ran = call(tmp_path, whole)
    assert ran.code == 0
    assert "lab_demo_metadata.json cannot be read" in ran.err


# ---------------------------------------------------------------- files out


@pytest.mark.parametrize("question", QUESTIONS)
def test_saved_data_is_what_json_prints_at_full_precision(call, result, demo, tmp_path, question):
    shown = result(demo, *QUESTIONS[question])
    frames = {}

    def read_json(path: Path) -> pl.DataFrame:  # Polars' own orders many columns as it likes
        return pl.DataFrame(json.loads(path.read_text()), infer_schema_length=None)

    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet), (".json", read_json)):
        path = tmp_path / f"table{suffix}"
        ran = call(demo, *QUESTIONS[question], "-o", path)
        assert ran.code == 0
        assert f"Saved {path}" in ran.err
        frames[suffix] = read(path).rows(named=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "table.csv", "table.json", "table.parquet"]
    for rows in frames.values():
        assert len(rows) == len(shown) > 0
        for found, row in zip(rows, shown, strict=True):
            assert list(found) == list(row)
            columns = [c for c in row if c not in ("tags", "created_at", "heartbeat_at")]  # which each format spells
            assert all(close(None if found[c] == INF else found[c], row[c]) for c in columns), (found, row)


def test_typeset_tables_hold_every_column_and_the_best_in_bold(call, demo, tmp_path):
    texts = {}
    for suffix in (".md", ".tex", ".html"):
        assert call(demo, "--pivot", "-m", "test/mse", "-o", tmp_path / f"t{suffix}").code == 0
        texts[suffix] = (tmp_path / f"t{suffix}").read_text(encoding="utf-8")
    rows = [line.strip("|\n ").split(" | ") for line in texts[".md"].splitlines()]
    assert rows[0] == ["arch", "ego", r"pyg\_enzymes", "sbm"]
    assert rows[1] == [":--", "--:", "--:", "--:"]
    assert [r[0] for r in rows[2:]] == sorted(arch.replace("_", r"\_") for arch in ARCHS)
    bold = [cell for row in rows[2:] for cell in row if cell.startswith("**")]
    assert bold == [cell for row in rows if row[0] == r"gnn\_qk" for cell in row[1:]]
    tex = texts[".tex"]
    assert re.search(r"\\begin\{tabular\}\{lrrr\}\n\\toprule\n.* \\\\\n\\midrule\n", tex)
    assert tex.count(r"\textbf{") == 3
    assert tex.count(r"$\pm$") == 12
    assert "gnn\\_qk & \\textbf{" in tex
    assert not re.search(r"(?<!\\)[_%#]", tex.split("\n", 1)[1]), "every special character is escaped"
    assert texts[".html"].count("<b>") == 3
    assert texts[".html"].count("±") == 12 + 2, "the title has one, twice"


def test_latex_escapes_and_writes_powers_of_ten():
    frame = pl.DataFrame(
        {
            "a_b": ["50% & {x} $1 #2 ~^\\", None, "[b]", "*"],
            "v": [1.5e-7, 2e9, 3.2e-6, 1.0],
            "s": [None, None, 1.5e-7, 0.25],
        }
    )
    answer = analyze.Answer("t", frame, [analyze.Column("a_b", "a_b"), analyze.Column("v", "v", std="s")])
    tex = analyze.as_latex(answer)
    assert r"50\% \& \{x\} \$1 \#2 \textasciitilde{}\textasciicircum{}\textbackslash{} & $1.5 \times 10^{-7}$ \\" in tex
    assert r"-- & $2 \times 10^{9}$ \\" in tex
    assert "\n{}[b] & $(3.20 \\pm 0.15) \\times 10^{-6}$ \\\\\n" in tex, "no argument of the line break before it"
    assert "\n{}* & 1.00 $\\pm$ 0.25 \\\\\n" in tex


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        *((0.01557, 0.001485, "0.0156 ± 0.0015"), (0.5, 0.1, "0.50 ± 0.10"), (0.12345, 0.0996, "0.12 ± 0.10")),
        *((4567.8, 123.4, "4570 ± 120"), (-0.001, 0.5, "0.00 ± 0.50"), (98.765, 1.0, "98.8 ± 1.0")),
        *((3.2e-6, 1.5e-7, "(3.20 ± 0.15)e-06"), (1.234e7, 5.6e5, "(1.234 ± 0.056)e+07"), (2.5, 0.0, "2.5 ± 0")),
        *((0.3, 5e-17, "0.3 ± 0"), (1.0, INF, "1 ± inf"), (0.0, 0.0, "0 ± 0"), (0.0, 2.0, "0.0 ± 2.0")),
    ],
)
def test_mean_and_std_are_rounded_to_two_digits_of_the_std(mean, std, text):
    assert analyze.with_error(mean, std) == text


def test_every_format_rounds_alike_and_data_keep_every_digit(call, demo, tmp_path):
    ran = call(demo, "--pivot", "-m", "test/mse", COLUMNS="160")
    shown = set(re.findall(r"0\.\d+ ± 0\.\d+", ran.out))
    assert len(shown) == 12
    for suffix, plus in ((".md", "±"), (".tex", r"$\pm$"), (".html", "±")):
        assert call(demo, "--pivot", "-m", "test/mse", "-o", tmp_path / f"t{suffix}").code == 0
        text = (tmp_path / f"t{suffix}").read_text(encoding="utf-8").replace(plus, "±")
        assert set(re.findall(r"0\.\d+ ± 0\.\d+", text)) == shown
    call(demo, "--pivot", "-m", "test/mse", "-o", tmp_path / "t.csv")
    saved = pl.read_csv(tmp_path / "t.csv")
    assert saved.columns == ["arch", *(f"{d}_{s}" for d in ("ego", "pyg_enzymes", "sbm") for s in ("mean", "std", "n"))]
    digits = [len(repr(value)) for value in saved["ego_mean"]]
    assert min(digits) > 12


def test_a_saved_list_holds_all_matching_runs_and_all_their_columns(call, demo, tmp_path):
    options = ["--filter", "gnn_qk", "-m", "test/mse", "--state", "all"]
    ran = call(demo, *options, "-o", tmp_path / "all.parquet")
    assert ran.out.count("stage2_gnn_qk") == 10
    assert "10 of 36 rows shown; -o FILE has all." in ran.out
    every = pl.read_parquet(demo / "wandb_export" / "lab_demo_runs.parquet").filter(pl.col("name").str.contains("gnn"))
    saved = pl.read_parquet(tmp_path / "all.parquet")
    assert saved.height == every.height == 36
    assert set(every.columns) < set(saved.columns)
    assert saved["tags"].dtype == pl.List(pl.String)
    assert saved["#"].to_list() == [*range(1, 36), None], "a run that diverged has no rank"
    assert saved["metric_test_mse"][:35].is_sorted()
    assert saved["metric_test_mse"][35] != saved["metric_test_mse"][35]
    assert call(demo, *options, "-n", 12, "-o", tmp_path / "some.csv").out.count("stage2_gnn_qk") == 12
    assert pl.read_csv(tmp_path / "some.csv").height == 12


def test_files_are_written_before_anything_is_printed(demo, tmp_path):
    """`... -o FILE --plot FILE | head`: nobody reads what is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(TOOLS / "analyze_runs.py"), "--group-by", "name", "-m", "val/loss"]
    command += ["-o", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "p.svg")]
    env = clean_env(demo)
    done = subprocess.run(command, cwd=demo, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert pl.read_csv(tmp_path / "t.csv").height > 100
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_a_pipe_gets_every_column_at_full_width(demo):
    done = run_script("analyze_runs.py", "--top", "3", cwd=demo)
    head, _, first, *_ = done.stdout.splitlines()[1:]
    assert head.split() == ["#", "name", "test_mse", "arch", "dataset", "k", "lr", "wd", "seed"]
    assert "stage2_gnn_qk_sbm_default_lr0.001_wd1e-4_k8_s3" in first
    assert "…" not in done.stdout


@pytest.mark.parametrize("width", [46, 50, 60, 72])
def test_on_a_narrow_terminal_metric_star_and_interval_go_last(call, demo, width):
    lines = call(demo, *QUESTIONS["best-by"], COLUMNS=str(width)).out.splitlines()
    assert max(map(len, lines)) <= width
    assert sum("* 0.9" in line and "±" in line and "(n=3)" in line for line in lines) == 3
    assert any("95 % interval" in line for line in lines) or width < 60
    lines = call(demo, "--pivot", "-m", "test/mse", COLUMNS=str(width)).out.splitlines()
    assert max(map(len, lines)) <= width
    assert any("* 0.0" in line and "±" in line for line in lines)


def test_a_long_result_shows_the_first_rows_and_counts_the_rest(call, demo, tmp_path):
    rows = 200_000
    frame = pl.DataFrame({"name": [f"run-{i}" for i in range(rows)], "metric_loss": [1.0] * rows})
    frame.with_columns(_source_file=pl.lit("x")).write_parquet(tmp_path / "many.parquet")
    ran = call(tmp_path, tmp_path / "many.parquet", "--sql", "SELECT * FROM runs")
    assert ran.out.count("run-") == analyze.ROWS
    assert f"{analyze.ROWS} of 200000 rows shown; -o FILE has all." in ran.out
    ran = call(tmp_path, tmp_path / "many.parquet", "--sql", "SELECT * FROM runs", "-n", "300", "-o", "t.parquet")
    assert ran.out.count("run-") == pl.read_parquet(tmp_path / "t.parquet").height == 300
    assert "The first 300 of 200000." in ran.out


def test_dates_compare_with_text_in_sql(result, demo):
    query = "SELECT count(*) AS n FROM runs WHERE created_at >= '2025-10-01 00:10:00' AND created_at < '2025-10-02'"
    assert result(demo, "--sql", query, "--state", "all") == [{"n": 134}]


def test_markdown_holds_no_link_no_image_and_no_markup(call, tmp_path):
    names = [
        "[a](http://x.example)",
        "![i](y.png)",
        "https://z.example/p",
        "www.w.example",
        "<b>b</b>",
        "$x$ `c` ~~d~~",
    ]
    path = write_runs(
        tmp_path / "lab_demo_runs.parquet", [run_row(i, name=n, metric_m=1.0) for i, n in enumerate(names)]
    )
    assert call(tmp_path, path, "-m", "m", "-o", "t.md").code == 0
    text = (tmp_path / "t.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[\[\]<>`~$]|[^\\]://|www\.", text)
    assert re.sub(r"\\(.)", r"\1", text).count("[a](http://x.example)") == 1, "and each is a backslash away"


def test_a_saved_page_runs_and_loads_nothing(call, tmp_path):
    path = write_runs(tmp_path / "lab_demo_runs.parquet", [run_row(0, name="<script>alert(1)</script>", metric_m=1.0)])
    assert call(tmp_path, path, "-m", "m", "-o", "t.html").code == 0
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    assert "<script" not in text


def test_a_full_disk_is_said(demo, tmp_path):
    """No file may grow beyond 1 kB here, as on a disk that is full; Python would cut its bytecode off as well."""
    for options in (["-o", "t.parquet"], ["-o", "t.csv"], ["-o", "t.html"], ["--plot", "t.svg"]):
        command = [
            "bash",
            "-c",
            'export PYTHONDONTWRITEBYTECODE=1; ulimit -f 1; exec "$0" "$@"',
            sys.executable,
            str(TOOLS / "analyze_runs.py"),
            "-g",
            "name",
        ]
        command += ["-m", "val/loss", str(demo / "wandb_export" / "lab_demo_runs.parquet"), *options]
        done = subprocess.run(command, cwd=tmp_path, env=clean_env(demo), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        assert re.search(r"^error: .*File too large", done.stderr, re.M), done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == [], "nothing half-written stays"


def test_an_output_that_fails_leaves_the_old_file(demo, tmp_path):
    target = tmp_path / "table.csv"
    target.mkdir()
    ran = run_script("analyze_runs.py", "-o", target, cwd=demo)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["table.csv"], (
        "nothing half-written stays"
    )


def test_json_is_json_alone_and_help_imports_nothing_heavy(demo):
    ran = run_script("analyze_runs.py", "--top", "3", "--json", cwd=demo)
    assert len(json.loads(ran.stdout)) == 3
    for args in (["--help"], ["--top", "none"], ["--pivot", "--importance"]):
        command = [sys.executable, "-X", "importtime", str(TOOLS / "analyze_runs.py"), *args]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_env(demo), cwd=demo, timeout=60)
        assert done.returncode == (0 if args == ["--help"] else 2)
        assert not re.search(r"\| +(polars|altair|rich|pyarrow|numpy)$", done.stderr, re.M)
