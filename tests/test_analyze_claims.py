"""analyze_runs.py: what it claims. Labs with a known truth, intervals and differences against scipy and statsmodels."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats
from conftest import load_script
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW
from test_analyze_runs import INF, NAN, close, run_row, runs_of, write_history, write_runs
from test_analyze_runs import call as call  # fixtures
from test_analyze_runs import result as result

analyze = load_script("analyze_runs.py")
BEST_BY = ("--best-by", "val/loss", "-m", "test/mse")

# ---------------------------------------------------------------- the numbers, against scipy and statsmodels


@settings(max_examples=200, deadline=None)
@given(st.floats(1, 1e4), st.floats(1e-3, 1e3), st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_students_t_is_scipys(df, t, level):
    tail = 2 * scipy.stats.t.sf(t, df)
    assert math.isclose(analyze.student_tail(t, df), tail, rel_tol=1e-10, abs_tol=1e-290)
    assert math.isclose(analyze.student_quantile(df, level), scipy.stats.t.ppf((1 + level) / 2, df), rel_tol=1e-10)


def test_students_t_at_its_ends():
    assert analyze.student_tail(0.0, 3) == 1
    assert analyze.student_tail(INF, 3) == 0
    assert analyze.student_tail(1.0, 1) == pytest.approx(0.5, rel=1e-14), "Cauchy's quartile"
    assert analyze.student_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-13)
    assert analyze.student_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-13)


SAMPLE = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8)


@settings(max_examples=100, deadline=None)
@given(SAMPLE, SAMPLE)
def test_intervals_and_differences_are_those_of_scipy_and_statsmodels(a, b):
    low, high = analyze.mean_interval(a)
    if len(set(a)) > 1:
        theirs = DescrStatsW(a).tconfint_mean()
        assert np.allclose((low, high), theirs, rtol=1e-9, atol=1e-9)
    if len(set(a)) > 1 and len(set(b)) > 1:
        gap, low, high, p = analyze.difference(a, b, range(len(a)), range(50, 50 + len(b)))
        compare = CompareMeans(DescrStatsW(a), DescrStatsW(b))
        assert gap == pytest.approx(np.mean(a) - np.mean(b), rel=1e-9, abs=1e-9)
        assert np.allclose((low, high), compare.tconfint_diff(usevar="unequal"), rtol=1e-8, atol=1e-8)
        assert p == pytest.approx(scipy.stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-8)
    n = min(len(a), len(b))
    gaps = np.subtract(a[:n], b[:n])
    if gaps.std() > 1e-6:
        shuffled = np.random.default_rng(n).permutation(n)  # the seeds pair them, not their order
        found = analyze.difference(a[:n], [b[i] for i in shuffled], range(n), list(shuffled))
        theirs = scipy.stats.ttest_rel(a[:n], b[:n])
        assert np.allclose(found[1:3], theirs.confidence_interval(0.95), rtol=1e-7, atol=1e-7)
        assert found[3] == pytest.approx(theirs.pvalue, rel=1e-7)


@pytest.mark.parametrize(
    ("seeds", "others", "paired"),
    [
        ([1, 2, 3], [3, 1, 2], True),
        ([1, 2, 3], [1, 2, 4], False),
        ([1, 1, 2], [1, 2, 1], False),
        ([1, None, 2], [1, None, 2], False),
    ],
)
def test_only_seeds_that_match_are_paired(seeds, others, paired):
    a, b = [1.0, 2.0, 3.5], [2.0, 2.5, 4.5]
    welch = analyze.difference(a, b, [0, 1, 2], [7, 8, 9])
    assert (analyze.difference(a, b, seeds, others) != welch) == paired


def test_too_few_values_have_no_interval_and_equal_ones_one_of_no_width():
    assert analyze.mean_interval([1.0]) == (None, None)
    assert analyze.mean_interval([2.0, 2.0]) == (2.0, 2.0)
    assert analyze.difference([1.0], [2.0, 3.0], [1], [1, 2]) == (-1.5, None, None, None)
    assert analyze.difference([2.0, 2.0], [2.0, 2.0], [1, 2], [3, 4]) == (0.0, 0.0, 0.0, 1.0)
    assert analyze.difference([3.0, 3.0], [2.0, 2.0], [1, 2], [1, 2]) == (1.0, 1.0, 1.0, 0.0)


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=9))
def test_holms_adjustment_is_statsmodels(ps):
    there = [p for p in ps if p is not None]
    theirs = iter(multipletests(there, method="holm")[1] if there else [])
    assert analyze.holm(ps) == pytest.approx([None if p is None else next(theirs) for p in ps])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_better_is_mann_and_whitneys_u(a, b):
    share = scipy.stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert analyze.better(a, b, True) == pytest.approx(share)
    assert analyze.better(a, b, False) == pytest.approx(1 - share)


# ---------------------------------------------------------------- a lab whose truth is known

METHODS = {"gnn_qk": 1.0, "mlp": 1.4, "spectral": 1.05}
SETS = {"sbm": 1.0, "ego": 2.0, "tree": 3.0}


def lab(
    folder: Path,
    seeds: int = 4,
    drop: Callable[[int], bool] = lambda i: False,
    again: int | None = None,
    **more: object,
) -> tuple[Path, dict[tuple[str, str], list[float]]]:
    """3 methods x 3 data sets x 2 learning rates x seeds; lr 0.01 is the best by validation and by test.

    `more` adds columns, a callable gets the run's number, its seed and the row so far. One run, `again`, ran twice.
    Returns the file, and the test errors of the best configurations, by seed, as (method, data set) has them.
    """
    rng = np.random.default_rng(5)
    rows, truth = [], {}
    grid = itertools.product(METHODS, SETS, (0.01, 0.1), range(1, seeds + 1))
    for i, (method, data, lr, seed) in enumerate(grid):
        error = METHODS[method] * SETS[data] + 10 * (lr > 0.05) + float(rng.normal(0, 0.1))
        row = {"name": f"{method}_{data}", "config_lr": lr, "config_seed": seed}
        row |= {"metric_val_loss": error + 0.01, "metric_test_mse": error}
        row |= {column: value(i, seed, row) if callable(value) else value for column, value in more.items()}
        if not drop(i):
            rows.append(run_row(i, **row))
            if lr < 0.05:
                truth.setdefault((method, data), []).append(error)
    if again is not None:
        rows.append(rows[again] | {"id": "again"})
    return write_runs(folder / "lab_demo_runs.parquet", rows), truth


LABELS = {  # what labs log beside their hyperparameters -> the value in run i of seed s
    "config_host": lambda i, s, row: f"node{i % 7}",
    "config_start_date": lambda i, s, row: f"2025-10-{1 + i % 9:02d}",
    "config_git_commit": lambda i, s, row: f"{i % 5:07x}",
    "config_paths_output_dir": lambda i, s, row: f"outputs/{i}",
    "config_run_id": lambda i, s, row: f"{row['name']}_s{s}",
    "config_slurm_job_id": lambda i, s, row: 88_000 + i,
    "config_logger_logger": lambda i, s, row: json.dumps([{"wandb": {"name": row["name"], "version": i % 4}}]),
    "config_notes": lambda i, s, row: f"rerun of {row['name']} with {s}",
    "config_exp_name": lambda i, s, row: f"brave-frog-{i}",
    "config_saved_in": lambda i, s, row: f"gs://bucket/{i}",
    "config_started": lambda i, s, row: f"2025-10-01T10:{i}",
}


@pytest.mark.parametrize("column", LABELS)
@pytest.mark.parametrize("again", [None, 17])
@pytest.mark.parametrize("over", [[], ["--over", "seed"]])
def test_seeds_are_averaged_whatever_labels_the_configs_hold(call, result, tmp_path, column, again, over):
    path, truth = lab(tmp_path, again=again, **{column: LABELS[column]})
    for row in result(tmp_path, path, *BEST_BY, *over):
        values = truth[row["arch"], row["dataset"]]
        assert row["config_lr"] == 0.01
        assert row["n"] in (4, 5 if again is not None else 4)
        assert row["configurations"] == 2
        if row["n"] == 4:
            assert close(row["mean"], float(np.mean(values)))
            assert close(row["std"], float(np.std(values, ddof=1)))
    assert f"Labels of runs, no hyperparameters: {column}\n" in call(tmp_path, path, *BEST_BY, *over).err


def test_one_repeated_run_shows_that_a_column_names_runs(result, tmp_path):
    path, _ = lab(tmp_path, again=17, config_memo=lambda i, s, row: f"memo {i}")
    assert sorted(row["n"] for row in result(tmp_path, path, *BEST_BY)) == [4] * 8 + [5]


def test_all_labels_at_once_and_hyperparameters_that_look_like_them(call, result, tmp_path):
    kept = {  # columns that look like labels and are none
        "config_model_name": lambda i, s, row: "big" if row["config_lr"] < 0.05 else "small",
        "config_model_path": lambda i, s, row: "org/base" if row["config_lr"] < 0.05 else "org/large",
        "config_grid": lambda i, s, row: 4 if row["config_lr"] < 0.05 else 8,
        "config_logged": lambda i, s, row: i % 2 == 0 and row["config_lr"] < 0.05,
    }
    path, _ = lab(tmp_path, **LABELS, **kept)
    ran = call(tmp_path, path, *BEST_BY)
    labels = re.search(r"no hyperparameters: (.*)", ran.err)[1].split(", ")
    assert sorted(labels) == sorted(LABELS)
    assert {row["n"] for row in result(tmp_path, path, *BEST_BY)} == {2}, "config_logged parts the seeds"
    assert {row["n"] for row in result(tmp_path, path, *BEST_BY, "--ignore", "log?ed")} == {4}


def test_a_search_with_one_seed_makes_no_label_of_what_it_searched(call, result, tmp_path):
    """20 rates, 5 of each run with more weight decays; the best one then with seeds 1 to 4."""
    rows = [
        {"config_lr": lr / 10, "config_wd": wd / 10, "config_seed": seed, "metric_val_loss": lr + wd + seed / 100}
        for lr, wd, seed in [*itertools.product(range(20), range(5), [0]), *((0, 0, seed) for seed in range(1, 5))]
    ]
    rows = [run_row(i, name=f"mlp_sbm_{i}", **row) for i, row in enumerate(rows)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    [row] = result(tmp_path, path, "--best-by", "val/loss", "-m", "val/loss")
    assert (row["n"], row["config_lr"], row["config_wd"], row["configurations"]) == (5, 0, 0, 100)
    assert "Labels" not in call(tmp_path, path, "--best-by", "val/loss", "-m", "val/loss").err


@pytest.mark.parametrize(
    ("more", "words", "ignore"),
    [
        ({"config_draw": lambda i, s, row: (i * 0.618) % 1}, "config_draw (72 values), config_lr (2 values)", "draw"),
        (
            {"config_draw": lambda i, s, row: (i * 0.618) % 1, "config_shade": lambda i, s, row: i % 35},
            "config_draw (72 values), config_shade (35 values), config_lr (2 values)",
            "draw,shade",
        ),
        ({"config_lr": lambda i, s, row: 0.01 + i / 1e5, "config_wd": lambda i, s, row: s % 2}, "config_lr (72", "lr"),
    ],
)
def test_where_no_configuration_has_two_seeds_it_stops_and_names_what_parts_them(
    call, result, tmp_path, more, words, ignore
):
    path, truth = lab(tmp_path, **more)
    ran = call(tmp_path, path, *BEST_BY)
    assert ran.code == 2
    assert f"no configuration has two of them. What keeps the runs apart: {words}" in ran.err
    assert re.search(r"--ignore ([\w,]+)", ran.err)[1] == ignore
    found = result(tmp_path, path, *BEST_BY, "--ignore", ignore)
    assert max(row["n"] for row in found) > 1
    if "config_wd" not in more:
        assert {row["n"] for row in found} == {4}
        assert all(close(row["mean"], float(np.mean(truth[row["arch"], row["dataset"]]))) for row in found)
    alone = result(tmp_path, path, *BEST_BY, "--config", "*")
    assert {row["n"] for row in alone} == {1}, "the user decides"


def test_seeds_that_are_the_cells_do_not_stop_it(result, tmp_path):
    path, _ = lab(tmp_path)
    found = result(tmp_path, path, *BEST_BY, "--group-by", "arch,dataset,config_seed")
    assert len(found) == 9 * 4


@pytest.mark.parametrize(
    ("options", "n"),
    [
        (["--config", "lr"], 4),
        (["--config", "config_l*"], 4),
        (["--config", "lr", "--over", "seed,host"], 4),
        (["--config", "host,lr"], 1),
        (["--ignore", "lr"], 8),
        (["--ignore", "CONFIG_L*,nothing*"], None),
        (["--over", "config_*"], 8),
    ],
)
def test_over_ignore_and_config_take_globs_and_short_words(call, result, tmp_path, options, n):
    path, _ = lab(tmp_path, config_host=lambda i, s, row: f"node{i}")
    ran = call(tmp_path, path, *BEST_BY, *options)
    if n is None:
        assert ran.code == 2
        assert "no column 'nothing*'" in ran.err
    else:
        assert {row["n"] for row in result(tmp_path, path, *BEST_BY, *options)} == {n}


def test_names_that_contradict_configs_do_not_part_seeds(call, result, tmp_path):
    name = {"name": lambda i, s, row: f"{row['name']}_lr{1e-3 if i % 3 else 1e-4:g}_k{8 * (1 + i % 2)}_s{1 + i % 2}"}
    path, truth = lab(tmp_path, **name, config_model_k=8)
    ran = call(tmp_path, path, *BEST_BY)
    assert "lr_parsed (from names) and config_lr disagree in 72 of 72 runs; config_lr is used" in ran.err
    for row in result(tmp_path, path, *BEST_BY):
        assert (row["n"], row["config_lr"]) == (4, 0.01)
        assert close(row["mean"], float(np.mean(truth[row["arch"], row["dataset"]])))


def test_a_configuration_of_which_a_seed_diverged_stands_last_and_the_choice_says_so(call, result, tmp_path):
    path, _ = lab(tmp_path, metric_val_loss=lambda i, s, row: NAN if i % 8 == 2 else row["metric_val_loss"])
    found = result(tmp_path, path, *BEST_BY)
    assert {row["config_lr"] for row in found} == {0.1}, "better in the mean of those that did not diverge: 0.01"
    assert call(tmp_path, path, *BEST_BY, COLUMNS="200").out.count("1 of which a seed diverged stood last") == 9
    path, _ = lab(tmp_path, metric_val_loss=lambda i, s, row: -INF if s == 2 else row["metric_val_loss"])
    ran = call(tmp_path, path, *BEST_BY)
    assert "warning: 9 of 9 cells have no configuration without a seed that diverged in metric_val_loss" in ran.err


# ---------------------------------------------------------------- how sure


def test_the_lab_with_known_truth_against_scipy_and_statsmodels(result, tmp_path):
    path, truth = lab(tmp_path)
    found = {(row["arch"], row["dataset"]): row for row in result(tmp_path, path, *BEST_BY)}
    assert found.keys() == truth.keys()
    for data in SETS:
        best = min(METHODS, key=lambda method: np.mean(truth[method, data]))
        others = [method for method in METHODS if method != best]
        tests = [scipy.stats.ttest_rel(truth[method, data], truth[best, data]) for method in others]
        adjusted = multipletests([test.pvalue for test in tests], method="holm")[1]
        for method, test, p in zip(others, tests, adjusted, strict=True):
            row, (low, high) = found[method, data], test.confidence_interval(0.95)
            expected = {
                "difference_low": low,
                "difference_high": high,
                "p": p,
                "not_told_apart": bool(low <= 0 <= high),
            }
            expected["difference"] = np.mean(truth[method, data]) - np.mean(truth[best, data])
            assert {name: row[name] for name in expected} == pytest.approx(expected)
        row = found[best, data]
        assert (row["difference"], row["p"], row["not_told_apart"]) == (None, None, False)
    for cell, row in found.items():
        ends = scipy.stats.t.interval(0.95, 3, np.mean(truth[cell]), scipy.stats.sem(truth[cell]))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(ends)
    ranks = {data: scipy.stats.rankdata([np.mean(truth[m, data]) for m in METHODS]) for data in SETS}
    mean_ranks = dict(zip(METHODS, np.mean(list(ranks.values()), axis=0), strict=True))
    best = min(mean_ranks, key=mean_ranks.get)
    for (method, _), row in found.items():
        wins = [scipy.stats.mannwhitneyu(truth[method, d], truth[best, d]).statistic / 16 for d in SETS]
        assert row["mean_rank"] == pytest.approx(mean_ranks[method])
        assert row["p_best_better"] == (None if method == best else pytest.approx(np.mean(wins)))


def test_other_seeds_are_compared_by_welch(result, tmp_path):
    path, truth = lab(tmp_path, config_seed=lambda i, s, row: s + 10 * [*METHODS].index(row["name"].rsplit("_", 1)[0]))
    found = {(row["arch"], row["dataset"]): row for row in result(tmp_path, path, *BEST_BY)}
    for data in SETS:
        best = min(METHODS, key=lambda method: np.mean(truth[method, data]))
        for method in set(METHODS) - {best}:
            welch = scipy.stats.ttest_ind(truth[method, data], truth[best, data], equal_var=False)
            ends = found[method, data]["difference_low"], found[method, data]["difference_high"]
            assert ends == pytest.approx(tuple(welch.confidence_interval(0.95)))


def test_what_is_not_told_apart_is_marked_everywhere(call, result, tmp_path):
    path, _ = lab(tmp_path)
    marked = [row for row in result(tmp_path, path, *BEST_BY) if row["not_told_apart"]]
    assert 0 < len(marked) < 6, "the lab holds both"
    for options in ([], ["--pivot"]):
        ran = call(tmp_path, path, *BEST_BY, *options, COLUMNS="200")
        assert ran.out.count("≈") == len(marked) + 1, "and what it means"
        assert "≈ is not told apart from the best of its dataset: the 95 % interval" in ran.out
        for suffix, mark in ((".md", "≈"), (".tex", r"$\approx$"), (".html", "<td class=number>≈")):
            call(tmp_path, path, *BEST_BY, *options, "-o", f"t{suffix}")
            assert (tmp_path / f"t{suffix}").read_text(encoding="utf-8").count(mark) == len(marked)
        for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet), (".json", pl.read_json)):
            call(tmp_path, path, *BEST_BY, *options, "-o", f"t{suffix}")
            columns = read(tmp_path / f"t{suffix}").select(r"^.*not_told_apart$")
            assert columns.sum().sum_horizontal().item() == len(marked)
        call(tmp_path, path, *BEST_BY, *options, "--plot", "p.svg")
        assert (tmp_path / "p.svg").read_text(encoding="utf-8").count("≈") >= len(marked)


def test_the_papers_table(call, result, tmp_path):
    path, _ = lab(tmp_path)
    cells = {(row["arch"], row["dataset"]): row for row in result(tmp_path, path, *BEST_BY)}
    table = result(tmp_path, path, *BEST_BY, "--pivot")
    assert [row["arch"] for row in table] == sorted(METHODS)
    for row, data in itertools.product(table, SETS):
        cell = cells[row["arch"], data]
        for name in ("mean", "std", "n", "not_told_apart"):
            assert row[f"{data}_{name}"] == cell[name]
        assert row["mean_rank"] == cell["mean_rank"]
    swapped = result(tmp_path, path, *BEST_BY, "--pivot", "--rows", "dataset", "--cols", "arch")
    assert [row["dataset"] for row in swapped] == sorted(SETS)
    ran = call(tmp_path, path, *BEST_BY, "--pivot", "--group-by", "arch")
    assert ran.code == 2
    assert "--rows and --cols go with --pivot" in ran.err


def test_ranks_need_data_sets_that_every_method_has(call, result, tmp_path):
    path, _ = lab(tmp_path, drop=lambda i: i < 16)  # gnn_qk has sbm and ego no more
    ran = call(tmp_path, path, *BEST_BY)
    assert ran.code == 0, ran.err
    assert "No mean ranks: fewer than two dataset have a value of every arch." in ran.out
    assert "mean_rank" not in result(tmp_path, path, *BEST_BY)[0]


def test_an_interval_without_zero_beside_a_p_that_is_adjusted_is_said():
    values = {"best": [1.0, 1.1, 1.2, 1.3], "a": [1.2, 1.34, 1.41, 1.46], "b": [1.25, 1.30, 1.44, 1.62]}
    rows = [
        {"m": m, "values": v, "seeds": list(range(4)), "n": 4, "mean": float(np.mean(v))} for m, v in values.items()
    ]
    rows += [{"m": f"c{i}", "values": [9.0, 9.5], "seeds": [0, 1], "n": 2, "mean": 9.25} for i in range(6)]
    found = {row["m"]: row for row in analyze.sure(pl.DataFrame(rows), [], False).iter_rows(named=True)}
    for m in ("a", "b"):
        assert found[m]["difference_low"] > 0, "alone it is told apart"
        assert not found[m]["not_told_apart"]
    assert found["a"]["p"] > scipy.stats.ttest_rel(values["a"], values["best"]).pvalue


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize(
    ("metric", "highest"),
    [
        *(
            (f"metric_test_{name}", True)
            for name in ("acc", "validity", "uniqueness", "ndcg", "mrr", "hits_10", "ndcg_5")
        ),
        *((f"metric_val_{name}", False) for name in ("loss", "mse", "rmse", "nll", "acc_loss", "f1_error", "bce_loss")),
        *((name, False) for name in ("metric_missed", "metric_maps", "metric_time", "metric_scoreboard")),
        *(
            (name, True)
            for name in ("metric_loss_accuracy", "metric_mAP", "metric_map50", "metric_hits10", "metric_r2")
        ),
    ],
)
def test_names_say_the_direction(metric, highest):
    assert analyze.highest_wins(metric, None, False) == highest
    assert analyze.highest_wins(metric, "max", False)
    assert not analyze.highest_wins(metric, "min", True)
    assert analyze.highest_wins(metric, None, True), "of the reported metric --descending has the say"


@pytest.mark.parametrize(
    ("options", "first", "said"),
    [
        (["-m", "test/mse"], 0, None),
        (["-m", "test/mse", "--descending"], 3, "looks like an error, less is better; but --descending"),
        (["-m", "test/mse:max"], 3, "looks like an error, less is better; but :max"),
        (["-m", "test/acc"], 3, "hint: metric_test_acc looks like a score, more is better: the highest is the best"),
        (["-m", "test/acc", "--descending"], 3, None),
        (["-m", "test/acc:min"], 0, "looks like a score, more is better; but :min"),
        (["-m", "test/odd"], 0, None),
        (["-m", "test/odd", "--descending"], 3, None),
        (
            ["--metrics", "test/mse:min,test/acc:max"],
            0,
            "opposite directions: the best is the lowest metric_test_mse, the highest metric_test_acc",
        ),
    ],
)
def test_one_rule_and_every_contradiction_is_said(call, result, tmp_path, options, first, said):
    rows = [run_row(i, **{f"metric_test_{m}": float(i) for m in ("mse", "acc", "odd")}) for i in range(4)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    assert result(tmp_path, path, *options)[0]["id"] == f"run{first:04d}"
    err = call(tmp_path, path, *options).err
    assert said in err if said else "hint" not in err


def test_chosen_and_reported_metrics_follow_the_same_rule(call, result, tmp_path):
    acc = {f"metric_{split}_acc": lambda i, s, row: 1 / row["metric_test_mse"] for split in ("val", "test")}
    path, _ = lab(tmp_path, **acc)
    by_error = result(tmp_path, path, *BEST_BY)
    by_score = result(tmp_path, path, "--best-by", "val/acc", "-m", "test/acc")
    order = [[(row["dataset"], row["arch"]) for row in rows] for rows in (by_error, by_score)]
    assert order[0] == order[1]
    assert {row["config_lr"] for row in by_score} == {0.01}
    ran = call(tmp_path, path, "--best-by", "val/loss", "-m", "test/acc")
    assert "opposite directions: the best is the highest metric_test_acc, the lowest metric_val_loss" in ran.err


# ---------------------------------------------------------------- words and names


def test_a_short_word_without_values_from_names_means_the_config(call, result, tmp_path):
    rows = [run_row(i, name=f"x{i}", config_model_k=i % 2, config_learning_rate=0.1, metric_m=1.0) for i in range(4)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    assert {row["config_model_k"] for row in result(tmp_path, path, "-g", "k", "-m", "m")} == {0, 1}
    assert [row["config_learning_rate"] for row in result(tmp_path, path, "-g", "lr", "-m", "m")] == [0.1]
    rows = [run_row(i, name=f"x_k{i}_lr0.1", config_model_k=i % 2, config_lr=0.1, metric_m=1.0) for i in range(4)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    ran = call(tmp_path, path, "-g", "k", "-m", "m")
    assert "k (from names) and config_model_k disagree in 2 of 4 runs; k is used" in ran.err
    assert "disagree" not in call(tmp_path, path, "-g", "lr", "-m", "m").err


def test_names_that_no_pattern_knows_are_counted(call, tmp_path):
    rows = [run_row(i, name=["mlp_sbm", "strange"][i > 2], metric_m=1.0) for i in range(5)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    for options in (["-g", "arch"], ["--pivot"], ["--best-by", "m"]):
        err = call(tmp_path, path, "-m", "m", *options).err
        assert "arch: 2 of 5 runs have none, for no pattern knows their names; they stand as -" in err
    assert "no pattern" not in call(tmp_path, path, "-m", "m", "-g", "user").err


# ---------------------------------------------------------------- what matters


@pytest.mark.parametrize("seed", range(4))
def test_importance_is_scipys_spearman_and_epsilon_squared(seed):
    rng = np.random.default_rng(seed)
    lr = rng.choice([0.1, 0.01, 0.001, NAN], 80)
    rows = [
        {
            "config_lr": None if i % 11 == 0 else float(lr[i]),
            "config_depth": int(rng.integers(1, 6)),
            "config_width": int(rng.integers(1, 40)),
            "config_opt": [None, "adam", "sgd", "lion"][rng.integers(4)],
            "config_flag": bool(rng.integers(2)),
            "config_constant": 7,
            "config_path": f"/out/{i}",
            "metric_m": [None, NAN, INF][rng.integers(3)] if rng.random() < 0.1 else float(rng.normal()),
        }
        for i in range(80)
    ]
    frame = analyze.importance(runs_of(rows), "metric_m", False).frame
    assert set(frame["column"]) == {f"config_{name}" for name in ("lr", "depth", "width", "opt", "flag")}
    good = [row for row in rows if row["metric_m"] is not None and math.isfinite(row["metric_m"])]
    for found in frame.iter_rows(named=True):
        column = found["column"]
        pairs = [(r[column], r["metric_m"]) for r in good if r[column] is not None and r[column] == r[column]]
        groups = {x: [y for other, y in pairs if other == x] for x, _ in pairs}
        assert (found["n"], found["distinct"]) == (len(pairs), len(groups))
        if column in ("config_lr", "config_depth", "config_width"):
            rho = scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic
            assert found["spearman"] == pytest.approx(rho)
        if column == "config_width":
            assert (found["measure"], found["p"]) == ("Spearman", None)
            assert (found["value"], found["explained"]) == pytest.approx((rho, rho**2))
        else:
            one_way = scipy.stats.f_oneway(*groups.values())
            k, n = len(groups), len(pairs)
            eta = one_way.statistic * (k - 1) / (one_way.statistic * (k - 1) + n - k)
            assert found["measure"] == "epsilon²"
            assert found["value"] == found["explained"] == pytest.approx(1 - (1 - eta) * (n - 1) / (n - k))
            assert found["p"] == pytest.approx(one_way.pvalue, abs=0.06), "of 999 permutations"
        best = min(groups, key=lambda x: np.mean(groups[x]))
        assert found["best_value"] == analyze.number(best)
        assert found["mean_there"] == pytest.approx(np.mean(groups[best]))
        assert found["n_there"] == len(groups[best])
    assert frame["explained"].to_list() == sorted(frame["explained"], reverse=True)


def test_a_u_shaped_rate_is_seen_and_a_random_tag_is_not_first():
    rng = np.random.default_rng(0)
    rates = (1e-4, 1e-3, 1e-2, 1e-1, 1)
    rows = [
        {
            "config_lr": rates[i % 5],
            "config_tag": f"t{rng.integers(54)}",
            "metric_m": (i % 5 - 2) ** 2 + float(rng.normal(0, 0.2)),
        }
        for i in range(120)
    ]
    runs = runs_of(rows)
    frame = analyze.importance(runs, "metric_m", False).frame
    assert frame["column"].to_list() == ["config_lr", "config_tag"]
    assert frame["explained"][0] > 0.9
    assert abs(frame["spearman"][0]) < 0.2
    assert frame["p"].to_list() == [0.001, pytest.approx(0.5, abs=0.49)]
    assert frame["explained"][1] < 0.3
    assert frame.equals(analyze.importance(runs, "metric_m", False).frame), "the same every time"


def test_importance_survives_a_metric_that_is_constant_where_a_column_is_set():
    rows = [{"config_k": i % 2 if i < 4 else None, "config_lr": i % 3, "metric_m": max(i, 4) / 1} for i in range(9)]
    assert analyze.importance(runs_of(rows), "metric_m", False).frame["column"].to_list() == ["config_lr"]


# ---------------------------------------------------------------- rows stay rows


def test_null_and_a_dash_are_two_rows_and_two_columns(result, tmp_path):
    rows = [run_row(i, config_a=a, config_b=b, metric_m=float(i)) for i, (a, b) in enumerate(
        itertools.product([None, "-", "x"], repeat=2))]  # fmt: skip
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    table = result(tmp_path, path, "--pivot", "--rows", "config_a", "--cols", "config_b", "-m", "m")
    assert [(row["config_a"], row["-_mean"], row["x_mean"], row["-__2_mean"]) for row in table] == [
        ("-", 4.0, 5.0, 3.0),
        ("x", 7.0, 8.0, 6.0),
        (None, 1.0, 2.0, 0.0),
    ]


def test_curves_by_wandbs_own_group_are_drawn(call, tmp_path):
    rows = [run_row(i, group="ab"[i]) for i in range(2)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, {row["id"]: [(0, 1.0), (1, 2.0)] for row in rows})
    assert call(tmp_path, path, "--curves", "val/loss", "-g", "group", "--plot", "p.svg").code == 0


def test_curves_by_null_and_a_dash(result, tmp_path):
    rows = [run_row(i, config_a=a) for i, a in enumerate([None, "-"])]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, {row["id"]: [(0, float(row["id"][-1]))] for row in rows})
    assert result(tmp_path, path, "--curves", "val/loss", "-g", "config_a") == [
        {"_step": 0, "-_mean": 1.0, "-_std": None, "-_n": 1, "-__2_mean": 0.0, "-__2_std": None, "-__2_n": 1}
    ]


def test_smoothed_curves_along_epochs_are_the_same_every_time(call, tmp_path):
    rng = np.random.default_rng(0)
    rows = [run_row(i, config_opt="ab"[i % 2]) for i in range(12)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    curve = {row["id"]: [(s, float(v)) for s, v in enumerate(rng.normal(size=500))] for row in rows}
    write_history(tmp_path / "lab_demo_history.parquet", rows, curve)
    options = ("--curves", "val/loss", "--x", "epoch", "--smooth", "0.9", "-g", "config_opt", "--json")
    assert len({call(tmp_path, path, *options).out for _ in range(12)}) == 1


def test_history_holds_the_filtered_runs_only(result, tmp_path):
    rows = [run_row(i, config_k=i, state="failed" if i == 3 else "finished") for i in range(4)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, {row["id"]: [(0, 1.0), (1, 2.0)] for row in rows})
    query = ["--sql", "SELECT DISTINCT run_id FROM history ORDER BY run_id"]
    assert [row["run_id"] for row in result(tmp_path, path, *query)] == ["run0000", "run0001", "run0002"]
    assert [row["run_id"] for row in result(tmp_path, path, *query, "--where", "config_k = 2")] == ["run0002"]


def test_sql_says_what_is_no_number(call, tmp_path):
    rows = [run_row(i, metric_m=[1.0, NAN, INF, 3.0][i], metric_n=1.0) for i in range(4)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, {row["id"]: [(0, NAN), (1, 2.0)] for row in rows})
    ran = call(tmp_path, path, "--sql", "SELECT avg(metric_m), avg(metric_n) FROM runs")
    assert "metric_m: 2 rows of runs hold NaN or infinity" in ran.err
    assert "metric_n" not in ran.err
    where = re.search(r"WHERE .*1e308", ran.err)[0]
    cleaned = call(tmp_path, path, "--json", "--sql", f"SELECT avg(metric_m) AS m FROM runs {where}")
    assert json.loads(cleaned.out) == [{"m": 2.0}]
    ran = call(tmp_path, path, "--sql", 'SELECT avg("val/loss") FROM history')
    assert "val/loss: 4 rows of history hold NaN or infinity" in ran.err
