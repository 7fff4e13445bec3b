"""analyze_runs.py --at-best: the value at the best step against a plain loop; and the step metric that runs declare."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pytest
from conftest import clean_env, load_script, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_analyze_runs import INF, NAN, close, run_row, write_runs
from test_analyze_runs import call as call  # fixtures
from test_analyze_runs import result as result
from wandb_server import KEY, WandbServer

analyze = load_script("analyze_runs.py")

History = dict[str, list[dict[str, object]]]  # run id -> its logged rows


def write_lab(folder: Path, history: History, rows: list[dict[str, object]], project: str = "demo") -> Path:
    """Write runs, metadata and history of a project into `folder`; returns the file of runs."""
    columns = {
        f"metric_{analyze.column_name(key)}": key for logged in history.values() for row in logged for key in row
    }
    keys = {column: key for column, key in columns.items() if not key.startswith("_")}
    path = write_runs(folder / f"lab_{project}_runs.parquet", rows, keys)
    ids = {"run_name": "x", "entity": "lab", "project": project}
    lines = [{"run_id": run} | ids | row for run, logged in history.items() for row in logged]
    types = {"run_id": pl.String, "_step": pl.Int64} | dict.fromkeys(keys.values(), pl.Float64)
    frame = pl.DataFrame(lines, schema_overrides=types, infer_schema_length=None)
    if frame.is_empty():
        frame = pl.DataFrame(schema=dict.fromkeys(["run_id", "entity", "project"], pl.String) | {"_step": pl.Int64})
    frame.sort("run_id", "_step").write_parquet(folder / f"lab_{project}_history.parquet", row_group_size=7)
    return path


def plain_loop(rows: list[dict[str, object]], chosen: str, highest: bool) -> tuple[int, dict[str, object]] | None:
    """The best step of one run and its metrics there, as a reader of the README would write it."""
    best = None
    for row in sorted(rows, key=lambda row: row["_step"]):
        value = row.get(chosen)
        if value is not None and math.isfinite(value):
            if best is None or (value > best[1] if highest else value < best[1]):
                best = row["_step"], value
            last = row["_step"]
    if best is None:
        return None
    found: dict[str, object] = {}
    for key in {key for row in rows for key in row if not key.startswith("_")}:
        logged = sorted((row["_step"], row[key]) for row in rows if row.get(key) is not None)
        usable = [v for s, v in logged if s == best[0] or (s < best[0] and math.isfinite(v))]
        found[key] = usable[-1] if usable else None
        if not usable and len(logged) == 1 and logged[0][0] >= last:
            found[key] = logged[0][1]
    return best[0], found


VALUE = st.one_of(st.none(), st.sampled_from([NAN, INF, -INF, 0.0, 1.0]), st.floats(-4, 4, width=16))
ROW = st.fixed_dictionaries({}, optional={"val/loss": VALUE, "test/mse": VALUE, "b": VALUE})
RUN = st.dictionaries(st.integers(0, 40), ROW, max_size=14)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RUN, min_size=1, max_size=5), st.booleans())
def test_every_metric_is_what_a_plain_loop_finds(lab, highest):
    history = {f"run{i:04d}": [{"_step": s} | row for s, row in steps.items()] for i, steps in enumerate(lab)}
    logged = {key for rows in history.values() for row in rows for key in row}
    wanted = {run: found for run, rows in history.items() if (found := plain_loop(rows, "val/loss", highest))}
    with tempfile.TemporaryDirectory() as name:
        rows = [run_row(i, tags=["x"], metric_val_loss=9.0, metric_only=float(i)) for i in range(len(lab))]
        runs = analyze.read([write_lab(Path(name), history, rows)])
        if not wanted:
            with pytest.raises(analyze.Stop, match="history"):
                analyze.at_best(runs, "val/loss", highest)
            return
        runs = analyze.at_best(runs, "val/loss", highest)
        table = analyze.take(runs, runs.schema).rows(named=True)
    assert [row["id"] for row in table] == sorted(wanted)
    for row in table:
        step, values = wanted[row["id"]]
        assert row["best_step"] == step
        assert row["metric_only"] == float(row["id"][3:]), "a metric of the summary only stays"
        for key in logged - {"_step"}:
            assert close(row[f"metric_{analyze.column_name(key)}"], values.get(key)), key


def two_projects(folder: Path) -> list[Path]:
    """Two projects in which one key has two spellings as a column, a run without history, one without the key."""
    steps = [{"_step": s, "val/loss": abs(s - 3.0), "test/mse": 10.0 * s, "val_acc": s / 10} for s in range(6)]
    one = {"run0000": steps, "run0001": [row | {"val/loss": NAN} for row in steps]}
    first = write_lab(
        folder, one, [run_row(i, project="one", metric_test_mse=50.0, metric_late=i + 0.5) for i in range(3)], "one"
    )
    other = {"run0000": [{"_step": 0, "val/loss": 2.0, "test/mse": 7.0, "test_mse": -1.0}, {"_step": 1, "late": 0.25}]}
    rows = [run_row(0, project="two", metric_test_mse=-1.0, metric_test_mse__2=7.0, metric_late=0.25)]
    second = write_lab(folder, other, rows, "two")
    columns = {"metric_test_mse": "test_mse", "metric_test_mse__2": "test/mse", "config_late": "late"}
    (folder / "lab_two_metadata.json").write_text(json.dumps({"columns": columns}))
    return [first, second]


def test_projects_each_by_their_own_spelling_and_what_lacks_is_counted(call, tmp_path):
    files = two_projects(tmp_path)
    ran = call(tmp_path, *files, "--at-best", "val/loss", "-m", "metric_test_mse", "--json")
    assert ran.code == 0, ran.err
    found = {row["project"]: row for row in json.loads(ran.out)}
    assert (
        "Metrics at the step of each run's lowest val/loss; 2 of 4 runs have none in the history: left out" in ran.err
    )
    assert (found["one"]["best_step"], found["one"]["metric_test_mse"], found["one"]["metric_val_loss"]) == (
        3,
        30.0,
        0.0,
    )
    assert (found["two"]["best_step"], found["two"]["metric_test_mse"], found["two"]["metric_val_loss"]) == (
        0,
        -1.0,
        2.0,
    )
    query = "SELECT project, metric_test_mse__2, metric_late, metric_val_acc FROM runs ORDER BY project"
    ran = call(tmp_path, *files, "--at-best", "val/loss", "--sql", query, "--json")
    assert [list(row.values()) for row in json.loads(ran.out)] == [["one", None, 0.5, 0.3], ["two", 7.0, 0.25, None]]
    ran = call(tmp_path, *files, "--at-best", "val/loss", "-m", "late")
    assert "metric_late: logged after training only, or in no history, in 2 of 2 runs" in ran.err
    assert "best_step" in ran.out
    assert "val_loss" in ran.out


@pytest.mark.parametrize(
    ("word", "step"),
    [
        ("val/loss", 3),
        ("metric_val_loss", 3),
        ("val_loss:max", 0),
        ("val/loss:min", 3),
        ("val_acc", 5),
        ("val_acc:min", 0),
    ],
)
def test_the_key_goes_by_any_of_its_names_and_its_direction(result, tmp_path, word, step):
    one, _ = two_projects(tmp_path)
    rows = result(tmp_path, one, "--at-best", word, "-m", "test/mse")
    assert {row["id"]: row["best_step"] for row in rows}["run0000"] == step


def test_every_question_sees_the_values_of_the_best_step(result, call, tmp_path):
    """Test error falls, then rises; validation is best in the middle, where the faster run overfits less."""
    history, rows = {}, []
    for i in range(6):
        lr = (0.1, 0.01)[i // 3]
        bend = 4 + i // 3
        steps = [
            {"_step": s, "val/loss": (s - bend) ** 2 + i / 9, "test/mse": 1 + abs(s - bend) + i} for s in range(10)
        ]
        history[f"run{i:04d}"] = steps
        rows.append(run_row(i, config_lr=lr, config_seed=i % 3, arch="mlp", dataset="sbm", metric_test_mse=99.0))
    path = write_lab(tmp_path, history, rows)
    at = [path, "--at-best", "val/loss", "-m", "test/mse"]
    assert [row["metric_test_mse"] for row in result(tmp_path, *at)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [(row["config_lr"], row["mean"]) for row in result(tmp_path, *at, "-g", "lr")] == [(0.1, 2.0), (0.01, 5.0)]
    assert result(tmp_path, *at, "--pivot")[0]["sbm_mean"] == 3.5
    best = result(tmp_path, *at, "--best-by", "val/loss")[0]
    assert (best["mean"], best["n"]) == (2.0, 3)
    importance = {row["column"]: row for row in result(tmp_path, *at, "--importance")}
    assert "best_step" not in importance, "no hyperparameter"
    assert importance["config_lr"]["n"] == 6
    where = result(tmp_path, *at, "--where", "best_step > 4 AND metric_test_mse < 6")
    assert [row["metric_test_mse"] for row in where] == [4.0, 5.0], "conditions see the values at the best step"
    ran = call(tmp_path, *at, "-o", "at.parquet")
    assert ran.code == 0, ran.err
    saved = pl.read_parquet(tmp_path / "at.parquet")
    assert saved["best_step"].to_list() == [4, 4, 4, 5, 5, 5]
    assert saved["metric_val_loss"].to_list() == [i / 9 for i in range(6)]
    assert saved["metric_test_mse"].to_list() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--at-best", "val/los"], ["val/los", "val/loss"]),
        (["--at-best", "val/loss", "--curves", "val/loss"], ["--at-best", "--curves", "every step"]),
        (["--at-best", "nan"], ["no run has a finite nan"]),
    ],
)
def test_errors_of_at_best(call, tmp_path, options, words):
    history = {"run0000": [{"_step": 0, "val/loss": 1.0, "nan": NAN}]}
    ran = call(tmp_path, write_lab(tmp_path, history, [run_row(0, metric_test_mse=1.0)]), *options)
    assert ran.code in (1, 2)
    assert all(word in ran.err for word in ["error", *words]), ran.err


def test_a_step_chosen_on_test_data_is_said_and_history_must_be_there(call, tmp_path):
    history = {"run0000": [{"_step": 0, "test/mse": 1.0}]}
    path = write_lab(tmp_path, history, [run_row(0, metric_test_mse=1.0)])
    ran = call(tmp_path, path, "--at-best", "test/mse")
    assert "test/mse looks like a test metric: a step chosen by it makes what is reported optimistic" in ran.err
    (tmp_path / "lab_demo_history.parquet").unlink()
    ran = call(tmp_path, path, "--at-best", "val/loss")
    assert ran.code == 2
    assert "lab_demo_history.parquet. Export it with export_runs.py --include-history" in ran.err


def test_only_the_history_that_is_asked_for_is_read(tmp_path):
    steps = [{"_step": s, "val/loss": 1.0, **{f"m{j}": 1.0 for j in range(30)}} for s in range(3)]
    runs = analyze.read([write_lab(tmp_path, {"run0000": steps}, [run_row(0, metric_m1=1.0)])])
    plan = analyze.at_best(runs, "val/loss", False).frame.select("name", "metric_m7").explain(engine="streaming")
    assert "history.parquet]\n" in plan
    assert "PROJECT 3/" in plan.partition("history.parquet]")[2], plan


# ---------------------------------------------------------------- runs of the real client


TRAIN = """
import wandb
quiet = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, silent=True, reinit="create_new")
for seed in (1, 2):
    run = wandb.init(entity="tester", project="early", id=f"r{seed}", config={"seed": seed}, settings=quiet)
    run.define_metric("epoch", hidden=True)
    run.define_metric("val/*", step_metric="epoch")
    run.define_metric("a.b", step_metric="train/step", summary="min")
    for step in range(8):
        run.log({"train/loss": 1 / (step + 1), "train/step": 10 * step, "a": {"b": step}})
        if step % 2:
            run.log({"epoch": step // 2, "val/loss": abs(step - 3) + seed, "val/acc": 1 / (1 + abs(step - 3))})
    run.log({"test/mse": 0.5 * seed})
    run.summary["by_hand"] = 7 * seed
    run.finish()
"""


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the real client, exported with their history."""
    folder = tmp_path_factory.mktemp("early")
    with WandbServer() as server:
        env = clean_env(folder, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_DIR=str(folder))
        done = subprocess.run(
            [sys.executable, "-c", TRAIN], env=env, cwd=folder, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        done = run_script("export_runs.py", "-e", "tester", "-p", "early", "--include-history", cwd=folder, env=env)
        assert done.returncode == 0, done.stderr
    return folder


def test_real_runs_at_their_best_step(result, call, early):
    rows = result(early, "--at-best", "val/loss", "-m", "train/loss", "--metrics", "val/acc,test/mse,by_hand,a.b")
    steps = pl.read_parquet(early / "wandb_export" / "tester_early_history.parquet").filter(
        pl.col("val/loss").is_not_null()
    )
    for seed, row in enumerate(sorted(rows, key=lambda row: row["id"]), 1):
        best = steps.filter(run_id=row["id"]).sort("val/loss", "_step").row(0, named=True)
        assert (row["best_step"], row["metric_val_loss"]) == (best["_step"], seed)
        assert (row["metric_val_acc"], row["metric_train_loss"], row["metric_a_b"]) == (1.0, 0.25, 3.0)
        assert (row["metric_test_mse"], row["metric_by_hand"]) == (0.5 * seed, 7 * seed), "logged after training"
    ran = call(early, "--at-best", "val/loss", "-m", "test/mse")
    assert "metric_test_mse: logged after training only, or in no history, in 2 of 2 runs" in ran.err


@pytest.mark.parametrize(
    ("key", "options", "along"),
    [
        ("val/loss", [], "epoch"),
        ("a.b", [], "train/step"),
        ("train/loss", [], "_step"),
        ("val/loss", ["--x", "_step"], "_step"),
    ],
)
def test_curves_are_along_the_step_metric_that_the_runs_declared(call, early, key, options, along):
    ran = call(early, "--curves", key, *options)
    assert ran.code == 0, ran.err
    assert f"{key} along {along}" in ran.out
    assert (f"Along {along}, the step metric that the runs declared for {key}" in ran.err) == (along != "_step")


@pytest.mark.parametrize(
    ("configs", "found"),
    [
        (['{"_wandb": {"m": [{"1": "e"}, {"1": "loss", "5": 1}]}}'] * 2 + ['{"_wandb": {"m": []}}'], "e"),
        (['{"_wandb": {"m": [{"2": "*", "5": 2}, {"1": "s"}, {"1": "loss", "5": 4}, {"1": "e"}]}}'], "e"),
        (['{"_wandb": {"m": [{"1": "loss", "5": 1}]}}'], None),
        (['{"_wandb": {"m": {"odd": 1}}}', "{}", '{"_wandb": {"m": [{"2": "val/*", "5": 2}, {"1": "s"}]}}'], None),
        (['{"_wandb": {"m": [{"1": "loss", "5": 9}, {"1": "loss", "5": "x"}, 3]}}'], None),
        (["not json", '{"x": "NaN", "_wandb": {"m": [{"1": "e"}, {"1": "loss", "5": 1}]}}'], "e"),
    ],
)
def test_definitions_of_every_form(tmp_path, configs, found):
    rows = [run_row(i, metric_loss=1.0) | {"_config_json": config} for i, config in enumerate(configs)]
    runs = analyze.read([write_runs(tmp_path / "lab_demo_runs.parquet", rows)])
    assert analyze.declared_step(runs, "loss") == found
