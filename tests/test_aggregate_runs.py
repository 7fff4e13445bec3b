"""aggregate_runs.py: merging exports by the data contract, what names say, filters, outputs, rules, mistakes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import TOOLS, clean_env, load_script, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

aggregate_runs = load_script("aggregate_runs.py")

START = datetime(2025, 10, 1, tzinfo=UTC)
BASE = {
    **dict.fromkeys(["id", "name", "entity", "project", "state", "url"], pl.String),
    **dict.fromkeys(["created_at", "heartbeat_at"], pl.Datetime("us", "UTC")),
    "tags": pl.List(pl.String),
    **dict.fromkeys(["user", "group", "job_type", "sweep", "notes", "commit"], pl.String),
    **{"last_step": pl.Int64, "runtime_seconds": pl.Float64, "history_rows": pl.Int64},
}


# ---- Exports by the contract, written without the exporter ------------------------------------------------------


def flat(value: dict, prefix: str) -> dict[str, object]:
    """Leaves of a nested dict under the contract's column names (these tests use keys that do not collide)."""
    found: dict[str, object] = {}
    for key, inner in value.items():
        column = prefix + "_" + re.sub(r"\W", "_", key)
        found |= flat(inner, column) if isinstance(inner, dict) else {column: inner}
    return found


def config_series(name: str, values: list) -> pl.Series:
    """A config column of one type, as the contract has it."""
    kinds = {type(value) for value in values} - {type(None)}
    wide = any(type(value) is int and not -(2**63) <= value < 2**63 for value in values)
    if kinds == {bool}:
        return pl.Series(name, values, pl.Boolean)
    if kinds == {int} and not wide:
        return pl.Series(name, values, pl.Int64)
    if kinds and kinds <= {int, float}:
        return pl.Series(name, [None if value is None else float(value) for value in values], pl.Float64)
    return pl.Series(name, [v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pl.String)


def run(name: str | None = "run", config: dict | None = None, summary: dict | None = None, **base: object) -> dict:
    """One run as W&B holds it, with the export's base columns."""
    return {"name": name, "config": config or {}, "summary": summary or {}, **base}


def export_frame(project: str, runs: list[dict], entity: str = "team") -> pl.DataFrame:
    """The frame that an export of these runs holds."""
    rows: list[dict] = []
    for number, one in enumerate(runs):
        one = {
            **{"id": f"{project}-{number}", "entity": entity, "project": project, "state": "finished"},
            **{"created_at": START + timedelta(hours=number), "tags": [], "user": "ann", "url": None},
            **one,
        }
        rows.append(one)
    columns = [pl.Series(column, [row.get(column) for row in rows], dtype) for column, dtype in BASE.items()]
    configs = [flat(row["config"], "config") for row in rows]
    metrics = [flat(row["summary"], "metric") for row in rows]
    for column in sorted({column for config in configs for column in config}):
        columns.append(config_series(column, [config.get(column) for config in configs]))
    for column in sorted({column for metric in metrics for column in metric}):
        columns.append(pl.Series(column, [metric.get(column) for metric in metrics], pl.Float64))
    for column in ("config", "summary"):
        columns.append(pl.Series(f"_{column}_json", [json.dumps(row[column], ensure_ascii=False) for row in rows]))
    return pl.DataFrame(columns)


def write_export(
    folder: Path,
    project: str,
    runs: list[dict],
    *,
    exported_at: str | None = "2025-11-01T00:00:00+00:00",
    entity="team",
) -> Path:
    """Write the runs file of a project and, unless `exported_at` is None, its metadata; returns the runs file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{entity}_{project}_runs.parquet"
    export_frame(project, runs, entity).write_parquet(path)
    if exported_at:
        about = {"entity": entity, "project": project, "exported_at": exported_at, "total_runs": len(runs)}
        path.with_name(f"{entity}_{project}_metadata.json").write_text(json.dumps(about))
    return path


class Result:
    """What a run of the script left: exit code, both streams, and the output file as a frame."""

    def __init__(self, code: int, out: str, err: str, output: Path) -> None:
        self.code, self.out, self.err, self.output = code, out, err, output

    @property
    def frame(self) -> pl.DataFrame:
        assert self.code == 0, self.err
        return pl.read_parquet(self.output)


@pytest.fixture
def aggregate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Result]:
    """Run the script's `main` in `tmp_path`; writes `out.parquet` unless the arguments say otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: object, output: str = "out.parquet") -> Result:
        monkeypatch.setattr(sys, "argv", ["aggregate_runs.py", *map(str, args), "-o", output])
        try:
            code = aggregate_runs.main()
        except aggregate_runs.Stop as stop:
            aggregate_runs.say(f"error: {stop}")
            code = stop.code
        except SystemExit as exit_:
            code = exit_.code
        return Result(code, *capsys.readouterr(), tmp_path / output)

    return call


# ---- What names say ---------------------------------------------------------------------------------------------

# name -> stage, arch, model_type, dataset, k, lr, wd, seed, eps, asymmetric, pearl; what is left out is null or False.
NAMES: dict[str | None, dict[str, object]] = {
    "stage2_filter_bank_sbm_default_lr1e-3_wd1e-4_k8_s1": {
        "stage": "stage2",
        "arch": "filter_bank",
        "model_type": "spectral",
        "dataset": "sbm",
        "k": 8,
        "lr": 1e-3,
        "wd": 1e-4,
        "seed": 1,
    },
    "stage1c_digress_transformer_gnn_qk_lr1e-3_wd1e-4_k8_s1": {
        "stage": "stage1c",
        "arch": "gnn_qk",
        "model_type": "digress",
        "k": 8,
        "lr": 1e-3,
        "wd": 1e-4,
        "seed": 1,
    },
    "stage3_pyg_dist_self_attention_pyg_enzymes_k16_s2": {
        "stage": "stage3",
        "arch": "self_attention",
        "model_type": "attention",
        "dataset": "pyg_enzymes",
        "k": 16,
        "seed": 2,
    },
    # every architecture
    "gnn_all_k4": {"arch": "gnn_all", "model_type": "gnn", "k": 4},
    "gnn_qk": {"arch": "gnn_qk", "model_type": "gnn"},
    "x_gnn_v_s3": {"arch": "gnn_v", "model_type": "gnn", "seed": 3},
    "linear_pe_tree": {"arch": "linear_pe", "dataset": "tree"},
    "a_linear_pe_b": {"arch": "linear_pe", "model_type": "spectral"},
    "self_attention_mlp": {"arch": "self_attention_mlp", "model_type": "attention"},
    "multilayer_self_attention_grid": {
        "arch": "multilayer_self_attention",
        "model_type": "attention",
        "dataset": "grid",
    },
    "digress_transformer": {"arch": "digress_transformer", "model_type": "digress"},
    "digress_default_ego": {"arch": "digress_default", "model_type": "digress", "dataset": "ego"},
    "asymmetric_s1": {"arch": "asymmetric", "model_type": "spectral", "seed": 1, "asymmetric": True},
    "spectral_linear": {"arch": "spectral_linear", "model_type": "spectral"},
    "spectral_regular": {"arch": "spectral", "model_type": "spectral", "dataset": "regular"},
    "mlp_community": {"arch": "mlp", "dataset": "community"},
    "linear_baseline": {"arch": "linear"},
    "digress_x": {"arch": "digress", "model_type": "digress"},
    # two architectures in one name: the more specific one
    "self_attention_filter_bank": {"arch": "filter_bank", "model_type": "attention"},
    "mlp_self_attention": {"arch": "self_attention", "model_type": "attention"},
    "digress_default_gnn_v": {"arch": "gnn_v", "model_type": "digress"},
    "linear_spectral_linear": {"arch": "spectral_linear", "model_type": "spectral"},
    "asymmetric_self_attention_pearl": {
        "arch": "self_attention",
        "model_type": "attention",
        "asymmetric": True,
        "pearl": True,
    },
    "gnn_v_gnn_all": {"arch": "gnn_all", "model_type": "gnn"},
    "hybrid_spectral_gnn_qk": {"arch": "gnn_qk", "model_type": "hybrid"},
    # words inside other words are none
    "nonlinear_lego_streets": {},
    "irregular_gridded_egos": {},
    "supermlpx": {},
    "mygnn_values": {"model_type": "gnn"},
    # other separators
    "stage2-filter-bank-sbm-small": {
        "stage": "stage2",
        "arch": "filter_bank",
        "model_type": "spectral",
        "dataset": "sbm_small",
    },
    "stage2 filter bank / ring.of.cliques": {
        "stage": "stage2",
        "arch": "filter_bank",
        "model_type": "spectral",
        "dataset": "ring_of_cliques",
    },
    # every dataset
    "pyg_proteins_x": {"dataset": "pyg_proteins"},
    "ring_of_cliques": {"dataset": "ring_of_cliques"},
    "community_sbm": {"dataset": "community"},
    "sbm_small_sbm": {"dataset": "sbm_small"},
    "x_sbm": {"dataset": "sbm"},
    "tree_regular": {"dataset": "tree"},
    # stages
    "STAGE4B_x": {"stage": "stage4b"},
    "rerun_stage10": {"stage": "stage10"},
    "stage_2_x": {},
    "backstage": {},
    "a/stage5d/b": {"stage": "stage5d"},
    # numbers
    "x_s1": {"seed": 1},
    "x_s1_y": {"seed": 1},
    "x_s42_s43": {"seed": 42},
    "x_k8_k50": {"k": 8},
    "x_k50_k8": {"k": 50},
    "X_K16_LR1E-3_WD0_S7_EPS0.1": {"k": 16, "lr": 1e-3, "wd": 0.0, "seed": 7, "eps": 0.1},
    "x_k8bit": {},
    "x_k0.5": {},
    "k8_first": {},
    "s1": {},
    "x_s1.": {"seed": 1},
    "x_k8.yaml": {"k": 8},
    "x_lr3e-04_wd.01": {"lr": 3e-4, "wd": 0.01},
    "x_lr0.001-wd": {"lr": 1e-3},
    "x_lr1e3_eps1": {"lr": 1000.0, "eps": 1.0},
    "x_lr1e-3abc": {},
    "x_lr_wd_k_s": {},
    "x_eps0.1_eps0.2": {"eps": 0.1},
    "x_s00012": {"seed": 12},
    "x_s99999999999999999999": {},
    "x_sbm_s3": {"dataset": "sbm", "seed": 3},
    "x_steps_k2_swa": {"k": 2},
    # flags
    "PEARL_Asymmetric": {"arch": "asymmetric", "model_type": "spectral", "pearl": True, "asymmetric": True},
    "pearls": {"pearl": True},
    # no name, no text, other alphabets, control characters
    None: {},
    "": {},
    "dashing-sun-42": {},
    "größe_ego_k3": {"dataset": "ego", "k": 3},
    "étagère_sbm": {"dataset": "sbm"},
    "光_grid_光_s5": {"dataset": "grid", "seed": 5},
    "égo_légo": {},
    "a\nstage7\n_k9\tmlp": {"stage": "stage7", "arch": "mlp", "k": 9},
    "🙂_s1_🙂": {"seed": 1},
}
NAMES["linear_pe_tree"]["model_type"] = "spectral"
PARSED = {
    **{"protocol": pl.String, "stage": pl.String, "arch": pl.String, "model_type": pl.String, "dataset": pl.String},
    **{"k": pl.Int64, "lr_parsed": pl.Float64, "wd_parsed": pl.Float64, "seed_parsed": pl.Int64},
    **{"eps_parsed": pl.Float64, "asymmetric_flag": pl.Boolean, "pearl_flag": pl.Boolean},
}


def enriched(**columns: object) -> pl.DataFrame:
    return aggregate_runs.enrich(pl.LazyFrame(columns)).collect()


def test_the_table_of_names():
    assert len(NAMES) >= 60
    short = {"lr_parsed": "lr", "wd_parsed": "wd", "seed_parsed": "seed", "eps_parsed": "eps"}
    short |= {"asymmetric_flag": "asymmetric", "pearl_flag": "pearl"}
    got = enriched(name=list(NAMES)).drop("protocol")
    for row, (name, want) in zip(got.iter_rows(named=True), NAMES.items(), strict=True):
        full = {column: want.get(short.get(column, column)) for column in row if column != "name"}
        full |= {flag: bool(full[flag]) for flag in ("asymmetric_flag", "pearl_flag")}
        assert row == {"name": name, **full}, name


def test_the_added_columns_have_the_contracts_types_whatever_is_there():
    for columns in ({"name": ["x"]}, {"other": [1]}, {"name": pl.Series([None], dtype=pl.Null)}, {"name": [5]}):
        schema = aggregate_runs.enrich(pl.LazyFrame(columns)).collect().schema
        assert {column: dtype for column, dtype in schema.items() if column not in columns} == PARSED


@pytest.mark.parametrize(
    ("columns", "protocol"),
    [
        ({"config_data_same_graph_all_splits": [True]}, "single_graph"),
        ({"config_data_same_graph_all_splits": [False]}, "distribution"),
        ({"config_data_same_graph_all_splits": ["true"]}, "single_graph"),
        ({"config_data_same_graph_all_splits": ["True"]}, "single_graph"),
        ({"config_data_same_graph_all_splits": ["false"]}, "distribution"),
        ({"config_data_same_graph_all_splits": [None]}, "distribution"),
        ({"config_data__target_": ["lab.data.SingleGraphDataModule"]}, "single_graph"),
        ({"config_data__target_": ["lab.data.GraphDataModule"]}, "distribution"),
        ({"config_data__target_": [None], "config_data_same_graph_all_splits": ["true"]}, "single_graph"),
        ({"config_data__target_": ["a.SingleGraph"], "config_data_same_graph_all_splits": [None]}, "single_graph"),
        ({"config_data__target_": ["a.SingleGraph"], "config_data_same_graph_all_splits": [False]}, "single_graph"),
        ({}, "distribution"),
    ],
)
def test_protocol(columns, protocol):
    assert enriched(name=["x"], **columns)["protocol"].to_list() == [protocol]


def test_config_comes_before_or_after_the_name_as_the_contract_says():
    got = enriched(
        name=["x_gnn_qk_sbm", "x_sbm", "x_sbm", "plain", "digress_x"],
        config_model_type=["mlp", "custom", "", "filter_bank", None],
        config_model__target_=["lab.models.SpectralNet", None, "lab.Thing", None, "lab.models.HybridNet"],
        config_model_target=[None, "lab.AttentionNet", None, None, None],
        config_data_dataset_name=["enzymes", None, None, None, None],
        config_graph_type=["grid", "tree", "", None, None],
    )
    assert got["arch"].to_list() == ["gnn_qk", "custom", None, "filter_bank", "digress"]
    assert got["model_type"].to_list() == ["spectral", "attention", None, "spectral", "hybrid"]
    assert got["dataset"].to_list() == ["enzymes", "tree", "sbm", None, None]


def test_enriching_is_lazy_and_twice_is_once():
    frame = pl.LazyFrame({"name": ["x_k8"], "arch": ["mine"], **{f"metric_{i}": [0.5] for i in range(50)}})
    once = aggregate_runs.enrich(frame)
    assert once.collect()["arch"].to_list() == ["mine"]
    assert_frame_equal(aggregate_runs.enrich(once), once)
    assert "PROJECT" in once.select("k").explain()
    assert "metric_7" not in once.select("k").explain()


# ---- Merging ----------------------------------------------------------------------------------------------------


def test_files_with_different_columns_line_up_by_name(aggregate, tmp_path):
    write_export(tmp_path / "in", "a", [run("a0", {"model": {"k": 8}}, {"test/mse": 0.5})])
    write_export(tmp_path / "in", "b", [run("b0", {"lr": 0.1}, {"test/mse": 1, "acc": True})])
    got = aggregate("in")
    frame = got.frame
    assert frame.columns == [
        *BASE,
        *("config_lr", "config_model_k", "metric_acc", "metric_test_mse", "_config_json", "_summary_json"),
        *PARSED,
        "_source_file",
    ]
    assert frame["config_model_k"].to_list() == [8, None]
    assert frame["metric_test_mse"].to_list() == [0.5, 1.0]
    assert frame.select(pl.col("^metric_.*$")).dtypes == [pl.Float64] * 2
    assert frame["_source_file"].to_list() == ["in/team_a_runs.parquet", "in/team_b_runs.parquet"]
    assert "3 columns in only some files: config_lr, config_model_k, metric_acc" in got.out
    assert "Saved 2 runs (37 columns) to out.parquet" in got.err


@pytest.mark.parametrize(
    ("first", "second", "dtype", "values"),
    [
        ([8, None], [0.5], pl.Float64, [8.0, None, 0.5]),
        ([8, True], [0.5], pl.String, ["8", "true", "0.5"]),
        ([True], [False], pl.Boolean, [True, False]),
        ([True, None], [3], pl.String, ["true", None, "3"]),
        ([8], ["auto"], pl.String, ["8", "auto"]),
        (
            [1e-05, 0.001, 3, 2.0, 1e22, 1e-300],
            ["x"],
            pl.String,
            ["1e-05", "0.001", "3", "2.0", "1e+22", "1e-300", "x"],
        ),
        ([2**70, 0.5], ["x"], pl.String, [str(2**70), "0.5", "x"]),
        ([float("nan"), float("-inf")], ["x"], pl.String, ["NaN", "-Infinity", "x"]),
        ([[1, 2]], [5], pl.String, ["[1, 2]", "5"]),
        ([None, None], [5], pl.Int64, [None, None, 5]),
        ([None], [0.5], pl.Float64, [None, 0.5]),
        ([None], [True], pl.Boolean, [None, True]),
        ([None], [None], pl.String, [None, None]),
        ([2**53 + 1], [0.5], pl.String, [str(2**53 + 1), "0.5"]),
        ([-(2**63)], [0.5], pl.String, [str(-(2**63)), "0.5"]),
        ([2**53], [0.5], pl.Float64, [float(2**53), 0.5]),
    ],
    ids=str,
)
def test_config_types_that_differ(aggregate, tmp_path, first, second, dtype, values):
    write_export(tmp_path / "in", "a", [run(config={"x": {"y": value}}) for value in first])
    write_export(tmp_path / "in", "b", [run(config={"x": {"y": value}}) for value in second])
    column = aggregate("in").frame["config_x_y"]
    assert column.dtype == dtype
    assert column.to_list() == values


def test_a_file_without_a_value_has_no_say_even_among_three(aggregate, tmp_path):
    for project, value in (("a", 8), ("b", None), ("c", 0.5)):
        write_export(tmp_path / "in", project, [run(config={"k": value})])
    got = aggregate("in")
    assert got.frame["config_k"].to_list() == [8.0, None, 0.5]
    assert "1 column of another type in some files, now of one:\n" in got.out
    assert "  config_k: Float64, for it is Float64 in 1 file and Int64 in 1 file\n" in got.out


def test_columns_narrower_than_the_contract_are_widened(aggregate, tmp_path):
    frame = export_frame("a", [run(config={"k": 8, "lr": 0.5}, summary={"loss": 1})])
    narrow = frame.with_columns(pl.col("config_k").cast(pl.Int16), pl.col("metric_loss").cast(pl.Float32))
    narrow.drop("user", "tags").write_parquet(tmp_path / "x_runs.parquet")
    write_export(tmp_path, "b", [run(config={"k": 9}, tags=["t"], user="bob")])
    got = aggregate(".").frame.sort("project")
    assert got.schema["config_k"] == pl.Int64
    assert got["metric_loss"].to_list() == [1.0, None]
    assert got["user"].to_list() == [None, "bob"]
    assert got["tags"].to_list() == [None, ["t"]]


json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
configs = st.fixed_dictionaries(
    {},
    optional={
        "a": json_value,
        "b": st.integers(-(2**70), 2**70) | st.floats(),
        "c": st.integers(),
        "d/e": st.booleans() | st.none(),
        "nest": st.fixed_dictionaries({}, optional={"lr": st.floats() | st.integers(-5, 5), "x.y": json_value}),
    },
)
summaries = st.fixed_dictionaries({}, optional={"mse": st.floats(), "n": st.integers(-(2**60), 2**60)})


def same(value: object, origin: object) -> bool:
    """Whether a cell of the aggregate holds what the export's cell held: as it was, as a float, or as JSON text."""
    if value is None or origin is None:
        return value is origin
    if isinstance(value, str) and not isinstance(origin, str):
        if isinstance(origin, float):
            return math.isnan(origin) if value == "NaN" else float(json.loads(value)) == origin
        return value == json.dumps(origin)
    return value == origin or (value != value and origin != origin)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(configs, summaries), min_size=1, max_size=3), min_size=1, max_size=4), st.randoms())
def test_every_run_keeps_its_values_in_any_order_of_files(tmp_path_factory, projects, chance):
    folder = tmp_path_factory.mktemp("exports")
    origins = {}
    paths = []
    for number, runs in enumerate(projects):
        paths.append(write_export(folder, f"p{number}", [run(f"r{number}", c, s) for c, s in runs]))
        for row in pl.read_parquet(paths[-1]).iter_rows(named=True):
            origins[row["id"]] = row
    frames = []
    for order in (paths, chance.sample(paths, len(paths))):
        exports, problems = aggregate_runs.read_exports([str(path) for path in order], {})
        assert problems == {}
        target = folder / "out.parquet"
        args = aggregate_runs.argparse.Namespace(
            **dict.fromkeys(("state", "filter", "project", "entity", "tag", "since", "until", "where", "columns")),
            **{"partition_by": None, "protocol": "all", "no_enrich": False, "output": str(target)},
        )
        aggregate_runs.aggregate(args, exports, aggregate_runs.RULES)
        frames.append(pl.read_parquet(target))
    assert_frame_equal(frames[0], frames[1])
    assert set(frames[0]["id"]) == set(origins)
    for row in frames[0].iter_rows(named=True):
        origin = origins[row["id"]]
        assert row["_config_json"].encode() == origin["_config_json"].encode()
        assert row["_summary_json"].encode() == origin["_summary_json"].encode()
        config = flat(json.loads(origin["_config_json"]), "config")
        for column, value in origin.items():
            assert same(row[column], value), column
            if column in config and isinstance(row[column], str) and not isinstance(config[column], str):
                assert row[column] == json.dumps(config[column]), column


@settings(max_examples=300, deadline=None)
@given(st.floats() | st.integers(-(2**80), 2**80))
def test_the_text_of_a_number_is_that_of_its_config(number):
    config = {"a": True, "b": {"c.d": number, "c": "x"}, "b_c": None}
    for column, text in (("config_b_c_d", json.dumps(number)), ("config_gone", json.dumps(float(number)))):
        rows = pl.DataFrame({"_config_json": [json.dumps(config), None], column: [float(number), None]})
        assert aggregate_runs.number_texts(rows, [column])[0].to_list() == [text, None]


def test_keys_that_collide_give_each_column_its_own_text():
    config = {"a": {"b": 3}, "a_b": 2.0, "a.b": 4}  # the exporter: config_a_b, config_a_b__2, config_a_b__3
    row = {"_config_json": json.dumps(config), "config_a_b": 2.0, "config_a_b__2": 4.0, "config_a_b__3": 3.0}
    texts = aggregate_runs.number_texts(pl.DataFrame([row]), list(row)[1:])
    assert [text.to_list() for text in texts] == [["2.0"], ["4"], ["3"]]


def test_any_order_of_files_and_any_way_to_say_them_gives_the_same(aggregate, tmp_path):
    for number, project in enumerate("cab"):
        runs = [run(f"{project}{i}", {"k": [1, 0.5, "x"][number], project: i}) for i in range(3)]
        write_export(tmp_path / "in", project, runs)
    files = ["in/team_a_runs.parquet", "in/team_b_runs.parquet", "in/team_c_runs.parquet"]
    first = aggregate("in").frame
    assert first["project"].to_list() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    for order in permutations(files):
        assert_frame_equal(aggregate(*order).frame, first)
    assert_frame_equal(aggregate("in/*.parquet", "in", "./in/team_a_runs.parquet").frame, first)
    assert_frame_equal(aggregate(tmp_path / "in").frame.drop("_source_file"), first.drop("_source_file"))


# ---- A run in several files -------------------------------------------------------------------------------------


def test_a_run_counts_once_from_the_newest_export(aggregate, tmp_path):
    write_export(tmp_path / "new", "p", [run("a", summary={"x": 2}, id="1")], exported_at="2025-11-02T00:00:00+00:00")
    old = [run("a", summary={"x": 1}, id="1"), run("b", summary={"x": 1}, id="2")]
    write_export(tmp_path / "old", "p", old, exported_at="2025-11-01T23:59:59Z")
    write_export(tmp_path / "other", "p", [run("c", id="1")], entity="someone-else")
    for order in (("new", "old", "other"), ("old", "other", "new")):
        got = aggregate(*order)
        rows = got.frame.sort("name").select("name", "metric_x", "_source_file").rows()
        assert rows == [
            ("a", 2.0, "new/team_p_runs.parquet"),
            ("b", 1.0, "old/team_p_runs.parquet"),
            ("c", None, "other/someone-else_p_runs.parquet"),
        ]
        assert re.search(r"older copies of runs that a newer export holds +-1\n", got.out)


def test_the_newest_export_is_known_by_metadata_then_footer_then_file_time(aggregate, tmp_path):
    def footer(path: Path, exported_at: str) -> None:
        pl.read_parquet(path).write_parquet(path, metadata={"wandb_tools": json.dumps({"exported_at": exported_at})})

    a = write_export(tmp_path / "a", "p", [run("a", id="1")], exported_at="2025-11-05T00:00:00")
    b = write_export(tmp_path / "b", "p", [run("b", id="1")], exported_at=None)
    c = write_export(tmp_path / "c", "p", [run("c", id="1")], exported_at=None)
    os.utime(c, (START.timestamp(), START.timestamp()))
    footer(a, "2030-01-01T00:00:00Z")
    footer(b, "2025-11-04T00:00:00Z")
    assert aggregate("c", "b", "a").frame["name"].to_list() == ["a"]
    assert aggregate("c", "b").frame["name"].to_list() == ["b"]
    footer(b, "2025-09-04T00:00:00Z")
    assert aggregate("b", "c").frame["name"].to_list() == ["c"]


def test_a_newer_copy_that_a_filter_removes_does_not_bring_the_older_one_back(aggregate, tmp_path):
    write_export(tmp_path / "old", "p", [run(id="1", state="running")], exported_at="2025-11-01T00:00:00Z")
    write_export(tmp_path / "new", "p", [run(id="1", state="crashed")], exported_at="2025-11-02T00:00:00Z")
    assert aggregate("old", "new", "--state", "running").code == 1


def test_one_file_with_a_run_twice(aggregate, tmp_path):
    write_export(tmp_path / "in", "p", [run("a", id="1"), run("b", id="2"), run("c", id="1")])
    assert aggregate("in").frame["name"].to_list() == ["b", "c"]


# ---- Filters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Two projects of four runs each, with everything that filters look at."""
    states = ["finished", "crashed", "running", "finished"]
    for project in ("alpha", "beta"):
        runs = [
            run(
                f"stage{i}_{'GNN_QK' if i % 2 else 'filter_bank'}_k{4 * i}_s{i}",
                {"model": {"k": 4 * i}, "data": {"same_graph_all_splits": i == 3}},
                {"test/mse": i / 10 if i else float("nan")},
                state=states[i],
                tags=["paper", f"t{i}"] if i < 2 else None,
            )
            for i in range(4)
        ]
        write_export(tmp_path / "lab", project, runs, entity="Team" if project == "alpha" else "other")
    return tmp_path / "lab"


@pytest.mark.parametrize(
    ("options", "alpha", "beta"),
    [
        ([], [0, 1, 2], [0, 1, 2]),
        (["--protocol", "all"], [0, 1, 2, 3], [0, 1, 2, 3]),
        (["--protocol", "single_graph"], [3], [3]),
        (["--protocol", "distribution", "--no-enrich"], [0, 1, 2], [0, 1, 2]),
        (["--protocol", "single_graph", "--no-enrich"], [3], [3]),
        (["--state", "finished"], [0], [0]),
        (["--state", "finished", "--protocol", "all"], [0, 3], [0, 3]),
        (["--state", "finished", "--state", "running"], [0, 2], [0, 2]),
        (["--state", "finished,running"], [0, 2], [0, 2]),
        (["--state", "Crashed, running", "--state", "finished"], [0, 1, 2], [0, 1, 2]),
        (["--state", "all"], [0, 1, 2], [0, 1, 2]),
        (["--where", "created_at >= '2025-10-01T01:00:00' AND created_at < '2025-10-01T02:00:00'"], [1], [1]),
        (["--filter", "gnn_qk"], [1], [1]),
        (["--filter", "^stage[02]"], [0, 2], [0, 2]),
        (["--filter", "bank|QK", "--project", "ALPHA"], [0, 1, 2], []),
        (["--project", "a$", "--entity", "^other$"], [], [0, 1, 2]),
        (["--entity", "team"], [0, 1, 2], []),
        (["--tag", "paper"], [0, 1], [0, 1]),
        (["--tag", "t0", "--tag", "t1"], [0, 1], [0, 1]),
        (["--tag", "pap", "--tag", "t1"], [1], [1]),
        (["--since", "2025-10-01T01:00:00"], [1, 2], [1, 2]),
        (["--until", "2025-10-01T01:00:00"], [0], [0]),
        (["--since", "2025-10-01T01:00", "--until", "2025-10-01T02:00Z"], [1], [1]),
        (["--where", "config_model_k >= 4 AND metric_test_mse < 0.2"], [1], [1]),
        (["--where", "arch = 'gnn_qk' OR k = 8"], [1, 2], [1, 2]),
        (["--where", "metric_test_mse IS NOT NULL AND project LIKE 'al%'"], [0, 1, 2], []),
        (["--where", "config_model_k > 0", "--no-enrich"], [1, 2], [1, 2]),
        (["--where", "_source_file LIKE '%beta%'"], [], [0, 1, 2]),
        (["--state", "crashed", "--filter", "qk", "--tag", "paper", "--where", "k = 4", "--project", "be"], [], [1]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_filters_and_their_compositions(aggregate, lab, options, alpha, beta):
    got = aggregate("lab", *options)
    want = [f"alpha-{i}" for i in alpha] + [f"beta-{i}" for i in beta]
    frame = got.frame
    assert sorted(frame["id"]) == want
    dropped = [int(count) for count in re.findall(r" -(\d+)\n", got.out)]
    assert 8 - sum(dropped) == len(want)
    assert ("protocol" in frame.columns) == ("--no-enrich" not in options)
    if "all" not in options:
        assert re.search(r"--protocol \w+ +(-\d+|0)\n", got.out)


def test_each_filter_counts_what_it_removes_in_turn(aggregate, lab):
    got = aggregate("lab", "--state", "finished", "--project", "alpha", "--where", "k < 100")
    counts = [line.rsplit(maxsplit=1) for line in got.out.splitlines()[:6]]
    assert [(label.strip(), count) for label, count in counts] == [
        ("runs in 2 files", "8"),
        ("older copies of runs that a newer export holds", "0"),
        ("--state finished", "-4"),
        ("--project alpha", "-2"),
        ("--where k < 100", "0"),
        ("--protocol distribution", "-1"),
    ]


def test_columns_of_files_that_the_filters_empty_are_left_out(aggregate, tmp_path):
    write_export(tmp_path / "in", "a", [run(config={"only_a": 1, "both": 1})])
    write_export(tmp_path / "in", "b", [run(config={"only_b": 1, "both": 0.5})])
    frame = aggregate("in", "--project", "a").frame
    assert [column for column in frame.columns if column.startswith("config_")] == ["config_both", "config_only_a"]
    assert frame.schema["config_both"] == pl.Float64  # one type for a column, whatever part of the runs is asked for


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("config_modl_k > 3", "there is no column config_modl_k. Did you mean config_model_k"),
        ("arhc = 'mlp'", "there is no column arhc. Did you mean arch"),
        ("k >", "is no SQL condition: unable to parse 'k >' as Expr"),
        ("k > 3; DROP TABLE x", "is no SQL condition: invalid expression (found unexpected token ';')"),
        ("name > 3", "cannot compare"),
        ("k + 1", "is no condition, but Int64"),
        ("frobnicate(k) > 1", "frobnicate"),
    ],
)
def test_where_with_an_error(aggregate, lab, where, message):
    got = aggregate("lab", "--where", where)
    assert got.code == 2
    assert message in got.err
    assert "--where" in got.err
    assert len(got.err.splitlines()) == 1
    assert not got.output.exists()


@pytest.mark.parametrize("option", ["--filter", "--project", "--entity"])
def test_a_bad_regular_expression_is_told_before_any_work(aggregate, option):
    got = aggregate("nothing-there", option, "([")
    assert (got.code, got.out) == (2, "")
    assert got.err.startswith(f"error: {option}: '([' is no regular expression: unclosed character class.")


def test_nothing_left_leaves_the_older_output_alone(aggregate, lab, tmp_path):
    got = aggregate("lab", "--filter", "no such run")
    assert got.code == 1
    assert "no run is left, so out.parquet was not written" in got.err
    assert re.search(r"--filter no such run +-8\n", got.out)
    assert not got.output.exists()
    before = aggregate("lab").output.read_bytes()
    assert aggregate("lab", "--filter", "no such run").code == 1
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "lab", "out.parquet"]


def test_bad_arguments_end_with_2(aggregate, lab):
    for options, message in (
        (["--state", "done"], "'done' is no state. Name any of running, finished"),
        (["--since", "someday"], "is no time"),
        (["--protocol", "x"], "invalid choice"),
        (["--no-enrich", "--rule", "a=b"], "--no-enrich turns off"),
        (["--columns", "id,metric_tst_mse"], "no column matches 'metric_tst_mse'. Did you mean metric_test_mse?"),
        (["--partition-by", "projct"], "no such column. Did you mean project"),
    ):
        got = aggregate("lab", *options)
        assert (got.code, got.output.exists()) == (2, False), options
        assert message in got.err


# ---- Inputs -----------------------------------------------------------------------------------------------------


def test_a_glob_brings_history_along_and_it_is_left_out_with_a_word(aggregate, lab):
    pl.DataFrame({"run_id": ["x"], "_step": [1]}).write_parquet(lab / "Team_alpha_history.parquet")
    got = aggregate("lab/*")
    assert len(got.frame) == 6
    left_out = "Team_alpha_history.parquet, Team_alpha_metadata.json, other_beta_metadata.json"
    assert f"left out 3 files without runs of an export: {left_out}\n" in got.err
    assert "left out" not in aggregate("lab").err


def test_an_aggregate_is_no_export(aggregate, lab, tmp_path):
    assert aggregate("lab", output="lab/all_runs.parquet").code == 0
    got = aggregate("lab")
    assert len(got.frame) == 6
    assert "left out 1 file without runs of an export: all_runs.parquet" in got.err
    alone = aggregate("lab/all_runs.parquet")
    assert alone.code == 2
    assert "skipped lab/all_runs.parquet: an aggregate already" in alone.err


def test_what_is_no_export_is_named_and_skipped(aggregate, lab):
    good = (lab / "Team_alpha_runs.parquet").read_bytes()
    (lab / "text_runs.parquet").write_text("hello")
    (lab / "cut_runs.parquet").write_bytes(good[: len(good) // 2])
    (lab / "empty_runs.parquet").write_bytes(b"")
    pl.DataFrame({"x": [1]}).write_parquet(lab / "foreign_runs.parquet")
    pl.DataFrame({"id": ["1"]}).write_parquet(lab / "noname_runs.parquet")
    pl.DataFrame({"id": [1], "name": ["x"]}).write_parquet(lab / "number_runs.parquet")
    pl.DataFrame({"id": ["1"], "name": ["x"], "metric_a": ["text"]}).write_parquet(lab / "metric_runs.parquet")
    got = aggregate("lab", "no/such/*.parquet", "nowhere")
    assert got.code == 1
    assert len(pl.read_parquet(got.output)) == 6
    for line in (
        "skipped lab/text_runs.parquet: no readable Parquet file",
        "skipped lab/cut_runs.parquet: no readable Parquet file",
        "skipped lab/empty_runs.parquet: no readable Parquet file",
        "skipped lab/foreign_runs.parquet: no export of runs: it has no column id and no column name",
        "skipped lab/noname_runs.parquet: no export of runs: it has no column name",
        "skipped lab/number_runs.parquet: no export of runs: its column id is Int64",
        "skipped lab/metric_runs.parquet: no export of runs: its column metric_a is String",
        "skipped no/such/*.parquet: no such file",
        "skipped nowhere: no such file",
    ):
        assert line in got.err
    alone = aggregate("lab/text_runs.parquet", output="other.parquet")
    assert (alone.code, alone.output.exists()) == (2, False)
    assert "no export is left to read" in alone.err


def test_a_file_whose_rows_are_damaged_is_named_and_the_rest_is_written(aggregate, lab):
    path = lab / "other_beta_runs.parquet"
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 3] = bytes(len(data) // 3 - 4)
    path.write_bytes(data)
    got = aggregate("lab")
    assert got.code == 1
    assert "skipped lab/other_beta_runs.parquet: its rows cannot be read" in got.err
    assert pl.read_parquet(got.output)["project"].unique().to_list() == ["alpha"]


def test_the_smallest_export_has_two_columns(aggregate, tmp_path):
    pl.DataFrame({"id": ["1", None, None], "name": ["x_k8", None, "y"]}).write_parquet(tmp_path / "x_runs.parquet")
    frame = aggregate("x_runs.parquet", "--where", "state IS NULL").frame
    assert frame["k"].to_list() == [8, None, None]
    assert set(BASE) < set(frame.columns)


def test_an_export_without_runs_is_no_fault(aggregate, lab):
    write_export(lab, "empty", [])
    assert len(aggregate("lab").frame) == 6


def test_default_input_and_output(tmp_path):
    write_export(tmp_path / "wandb_export", "a", [run("x_k8")])
    for _ in range(2):  # the output of the first run stands in the input folder of the second
        done = run_script("aggregate_runs.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "Saved 1 run (33 columns) to wandb_export/aggregated.parquet\n"
    assert pl.read_parquet(tmp_path / "wandb_export" / "aggregated.parquet")["k"].to_list() == [8]
    nothing = run_script("aggregate_runs.py", cwd=tmp_path / "wandb_export")
    assert nothing.returncode == 2
    assert "skipped wandb_export: no such file" in nothing.stderr
    assert "Traceback" not in nothing.stderr


# ---- Outputs ----------------------------------------------------------------------------------------------------


def test_every_format_holds_the_same_values(aggregate, tmp_path):
    config = {"name": 'a,"b"\nc', "lr": 1e-05, "flag": True, "empty": ""}
    write_export(tmp_path / "in", "p", [run("ü", config, {"x": 0.1 + 0.2, "y": 1e-300}, tags=['a"b', "c\\d"])])
    want = aggregate("in").frame
    arrow = aggregate("in", output="out.arrow")
    assert_frame_equal(pl.read_ipc(arrow.output), want)
    rows = [json.loads(line) for line in aggregate("in", output="out.ndjson").output.read_text().splitlines()]
    assert list(rows[0]) == want.columns
    assert rows[0]["tags"] == ['a"b', "c\\d"]
    assert rows[0]["created_at"].startswith("2025-10-01T00:00:00")
    csv = pl.read_csv(aggregate("in", output="out.csv").output)
    assert csv.columns == want.columns
    assert json.loads(csv["tags"][0]) == ['a"b', "c\\d"]
    for column in ("config_name", "config_lr", "config_flag", "metric_x", "metric_y", "_config_json"):
        assert csv[column].to_list() == [rows[0][column]] == want[column].to_list(), column


def test_columns_are_chosen_by_globs_in_their_order(aggregate, lab):
    frame = aggregate("lab", "--columns", "name, id,config_model_*,metric_test_*,name").frame
    assert frame.columns == ["name", "id", "config_model_k", "metric_test_mse"]


def test_partitions(aggregate, lab, tmp_path):
    whole = aggregate("lab").frame
    got = aggregate("lab", "--partition-by", "project", output="by")
    assert got.code == 0
    assert sorted(path.name for path in (tmp_path / "by").iterdir()) == ["project=alpha", "project=beta"]
    read = pl.read_parquet(tmp_path / "by" / "**" / "*.parquet", hive_partitioning=True)
    assert_frame_equal(read.select(whole.columns).sort("project", "id"), whole.sort("project", "id"))
    # a second one replaces the first as a whole
    assert aggregate("lab", "--partition-by", "project", "--project", "beta", output="by").code == 0
    assert sorted(path.name for path in (tmp_path / "by").iterdir()) == ["project=beta"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by", "home", "lab", "out.parquet"]
    narrow = aggregate("lab", "--partition-by", "stage", "--columns", "id", output="stages")
    assert narrow.code == 0
    assert sorted(path.name for path in narrow.output.iterdir()) == ["stage=stage0", "stage=stage1", "stage=stage2"]


def test_a_partition_keeps_any_value(aggregate, tmp_path):
    values = [(1e-5, "a/b"), (math.nan, "ü%="), (1e20, None), (-math.inf, ".."), (-0.0, "."), (0.1 + 0.2, "a b")] * 3
    write_export(tmp_path / "in", "p", [run(f"x{i}", {"f": f, "s": s}) for i, (f, s) in enumerate(values)])
    whole = aggregate("in").frame.sort("id")
    for column in ("config_f", "config_s", "created_at", "pearl_flag"):
        assert aggregate("in", "--partition-by", column, output=column).code == 0
        read = pl.read_parquet(tmp_path / column / "**" / "*.parquet", hive_partitioning=True)
        assert_frame_equal(read.select(whole.columns).sort("id"), whole)
    assert aggregate("in", "--partition-by", "id", output="by_id").code == 0
    assert len(list((tmp_path / "by_id").iterdir())) == len(values)
    assert "a run has several" in aggregate("in", "--partition-by", "tags", output="tags").err


def test_an_output_that_would_destroy_something_is_refused(aggregate, lab, tmp_path):
    before = {path: path.read_bytes() for path in lab.iterdir()}
    for options, output, message in (
        ([], "lab/Team_alpha_runs.parquet", "is one of the inputs"),
        ([], "lab", "no suffix is no format"),
        ([], "out.xlsx", ".xlsx is no format. Use .parquet, .csv, .ndjson or .arrow"),
        (["--partition-by", "project"], "lab", "Give a new folder, or one that an earlier --partition-by wrote"),
        (["--partition-by", "project"], "out.csv", "--partition-by writes a folder of Parquet files"),
        (["--partition-by", "project"], "lab/Team_alpha_runs.parquet", "is one of the inputs"),
    ):
        got = aggregate("lab", *options, output=output)
        assert got.code == 2
        assert message in got.err
    assert {path: path.read_bytes() for path in lab.iterdir()} == before


def test_an_interrupted_write_leaves_the_older_output(aggregate, lab, tmp_path, monkeypatch):
    before = aggregate("lab").output.read_bytes()

    def half(frame: pl.LazyFrame, path: str, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(aggregate_runs, "sink", half)
    with pytest.raises(KeyboardInterrupt):
        aggregate("lab")
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "lab", "out.parquet"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(tmp_path, sent):
    many = pl.DataFrame({f"metric_{i}": pl.Series([random.random() for _ in range(1000)]) for i in range(40)})
    many = pl.concat([many] * 250).with_row_index("id").with_columns(pl.col("id").cast(pl.String), name=pl.lit("x"))
    many.write_parquet(tmp_path / "x_runs.parquet", compression="uncompressed")
    (tmp_path / "out.parquet").write_text("old")
    command = [sys.executable, str(TOOLS / "aggregate_runs.py"), ".", "-o", "out.parquet"]
    process = subprocess.Popen(command, cwd=tmp_path, env=clean_env(tmp_path), stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / ".out.parquet.tmp" / "new").exists():
        time.sleep(0.005)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -9), err
    assert (tmp_path / "out.parquet").read_text() == "old"
    if sent == signal.SIGINT:
        assert err == b"interrupted\n"
        assert not (tmp_path / ".out.parquet.tmp" / "new").exists()


# ---- Nothing false, nothing stuck -------------------------------------------------------------------------------


def test_what_exists_is_a_path_whatever_characters_it_holds(aggregate, tmp_path):
    write_export(tmp_path / "exp1", "p", [run("one", id="1")])
    write_export(tmp_path / "exp[1]", "p", [run("bracket", id="2")])
    write_export(tmp_path / "exp[1]", "[x]*?", [run("odd", id="3")])
    got = aggregate("exp1", "exp[1]").frame.sort("id")
    assert got["name"].to_list() == ["one", "bracket", "odd"]
    assert [source.split("/")[0] for source in got["_source_file"]] == ["exp1", "exp[1]", "exp[1]"]
    for source, names in (
        ("exp[1]/*", ["bracket", "odd"]),
        ("exp[1]/team_[[]x]*.parquet", ["odd"]),
        ("exp[1]/team_[x]*?_runs.parquet", ["odd"]),
        ("exp[12]", ["one"]),
        ("e*/team_p_runs.parquet", ["one", "bracket"]),
        (tmp_path / "**" / "*_runs.parquet", ["one", "bracket", "odd"]),
    ):
        assert sorted(aggregate(source).frame["name"]) == sorted(names), source


def test_whatever_lies_in_an_export_folder_is_left_out_with_a_word(aggregate, lab, tmp_path):
    first = aggregate("lab").frame
    aggregate("lab", output="lab/aggregated.parquet")
    aggregate("lab", "--partition-by", "project", output="lab/by_project")
    pl.DataFrame({"run_id": ["x"], "_step": [1]}).write_parquet(lab / "Team_alpha_history.parquet")
    pl.DataFrame({"x": [1]}).write_parquet(lab / "thoughts.parquet")
    (lab / "pivot.html").write_text("<html>")
    os.mkfifo(lab / "pipe")
    left_out = "Team_alpha_history.parquet, Team_alpha_metadata.json, aggregated.parquet"
    for sources in (sorted(Path("lab").iterdir()), ["lab/*"]):
        got = aggregate(*sources)
        assert_frame_equal(got.frame, first)
        assert got.err.startswith(f"left out 8 files without runs of an export: {left_out} and 5 more\n")
    got = aggregate("lab/*.parquet")
    assert_frame_equal(got.frame, first)
    assert got.err.startswith("left out 3 files without runs of an export: ")
    alone = aggregate("lab/by_project", "lab/thoughts.parquet")
    assert alone.code == 2
    assert "skipped lab/thoughts.parquet: no export of runs: it has no column id and no column name" in alone.err


def test_a_fifo_or_a_folder_in_the_place_of_an_export_is_named(aggregate, lab):
    os.mkfifo(lab / "x_runs.parquet")
    (lab / "y_runs.parquet").mkdir()
    got = aggregate("lab")
    assert (got.code, len(pl.read_parquet(got.output))) == (1, 6)
    assert "skipped lab/x_runs.parquet: no regular file\n" in got.err
    assert "skipped lab/y_runs.parquet: no regular file\n" in got.err


def test_a_flipped_bit_in_a_page_is_found_and_our_own_files_let_it_be_found(aggregate, tmp_path):
    runs = [run(f"r{i}", {"lr": i / 7}, {"x": i / 3}) for i in range(200)]
    for project in ("a", "b"):
        path = write_export(tmp_path / "in", project, runs)
        pq.write_table(pq.read_table(path), path, write_page_checksum=True)
    by_project = aggregate("in", "--partition-by", "project", output="by").output
    whole = aggregate("in").output
    chance = random.Random(1)
    for path in (whole, next((by_project / "project=b").iterdir()), tmp_path / "in" / "team_b_runs.parquet"):
        good = path.read_bytes()
        chunks = pq.read_metadata(path).row_group(0)
        for column in (chunks.column(chance.randrange(chunks.num_columns)) for _ in range(8)):
            data = bytearray(good)
            start = column.dictionary_page_offset or column.data_page_offset
            data[start + column.total_compressed_size - 3] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            with pytest.raises(OSError, match=r"checksum|decompress|corrupt"):
                pq.ParquetFile(path, page_checksum_verification=True).read()
        if path.parent.name != "in":
            path.write_bytes(good)
    got = aggregate("in")  # a damaged input remains
    assert got.code == 1
    assert re.search(
        r"skipped in/team_b_runs.parquet: its rows cannot be read \(.*(checksum|decompress|orrupt)", got.err
    )
    assert pl.read_parquet(got.output)["project"].to_list() == ["a"] * 200


def test_files_that_are_replaced_meanwhile_give_rows_of_one_version_each(aggregate, tmp_path):
    folder = tmp_path / "in"
    versions = {}
    for number in range(6):  # each with its rows in another order, and with more of them
        order = random.Random(number).sample(range(300 + 40 * number), 300 + 40 * number)
        runs = [run(f"r{i}", {"i": i}, {"version": number, "i": i}, id=f"r{i}") for i in order]
        versions[number] = write_export(tmp_path / f"v{number}", "p", runs, exported_at=None).read_bytes()
    path = folder / "team_p_runs.parquet"
    folder.mkdir()
    path.write_bytes(versions[0])
    stop = threading.Event()

    def replace() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % len(versions)
            (tmp_path / "new").write_bytes(versions[number])
            os.replace(tmp_path / "new", path)
            stop.wait(random.uniform(0.02, 0.3))

    thread = threading.Thread(target=replace)
    thread.start()
    seen = set()
    try:
        for _ in range(25):
            got = aggregate("in", "--where", "config_i >= 0")
            if got.code == 1:
                assert "the exports change faster than they can be read" in got.err
                continue
            frame = got.frame
            number = int(frame["metric_version"][0])
            seen.add(number)
            assert frame["metric_version"].to_list() == [number] * (300 + 40 * number)
            assert frame["metric_i"].to_list() == frame["config_i"].to_list()
            assert frame["name"].to_list() == [f"r{i}" for i in frame["config_i"]]
            assert frame["id"].n_unique() == len(frame)
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1


def test_a_file_that_changes_between_two_looks_is_read_again(aggregate, tmp_path, monkeypatch):
    path = write_export(tmp_path / "in", "p", [run("old", {"k": 1}, id=f"{i}") for i in range(3)])
    newer = write_export(tmp_path / "newer", "p", [run("new", {"other": "x"}, id=f"{i}") for i in range(5)])
    pick = aggregate_runs.pick

    def replace_then(*args: object) -> pl.LazyFrame:
        if newer.exists():
            newer.replace(path)
        return pick(*args)

    monkeypatch.setattr(aggregate_runs, "pick", replace_then)
    assert aggregate("in").frame["name"].to_list() == ["new"] * 5


def test_configs_and_metadata_that_json_alone_would_not_bear(aggregate, tmp_path):
    path = write_export(tmp_path / "in", "a", [run("x", {"x": 3}), run("y", {"x": 0.5}), run("z", {"x": 2.0})])
    texts = ['{"big": ' + "7" * 5000 + ', "x": 3}', '{"deep": ' + "[" * 1500 + "]" * 1500 + ', "x": 0.5}', "[no JSON"]
    pl.read_parquet(path).with_columns(_config_json=pl.Series(texts)).write_parquet(path)
    path.with_name("team_a_metadata.json").write_bytes(b'{"exported_at": "\xff\xfe"}')
    write_export(tmp_path / "in", "b", [run("t", {"x": "text"})])
    nested = "[" * 100_000
    (tmp_path / "in" / "team_b_metadata.json").write_text(nested)
    frame = aggregate("in").frame
    assert frame["config_x"].to_list() == ["3", "0.5", "2.0", "text"]
    assert frame["_config_json"].to_list()[:3] == texts


@pytest.mark.parametrize(
    "around", ["{} >&-", "{} 2>&-", "{} <&- >&- 2>&-", "{} 2>&1 | true", "{} 2>&1 >/dev/null | true", "{} 2>/dev/full"]
)
def test_a_reader_that_goes_away_ends_nothing_early(tmp_path, around):
    write_export(tmp_path / "in", "p", [run(f"x_k{i}") for i in range(300)])
    (tmp_path / "in" / "bad_runs.parquet").write_text("no Parquet")
    done = run_script(
        "aggregate_runs.py", "in", "-o", "out.parquet", cwd=tmp_path, around=around + "; echo ${PIPESTATUS[0]}"
    )
    assert done.stdout.splitlines()[-1] == "1"  # one file could not be read, whoever looks
    assert "Traceback" not in done.stdout + done.stderr
    assert len(pl.read_parquet(tmp_path / "out.parquet")) == 300


@pytest.mark.parametrize("output", ["out.parquet", "out.csv", "out.ndjson", "out.arrow", "--partition-by project"])
def test_a_full_disk_is_said_and_leaves_what_was_there(lab, tmp_path, output):
    noise = [random.random() for _ in range(30_000)]
    pl.DataFrame({"id": [f"{x}" for x in noise], "name": "x", "metric_x": noise}).write_parquet(
        lab / "big_runs.parquet"
    )
    args = output.split() if " " in output else ["-o", output]
    before = sorted(path.name for path in tmp_path.iterdir())
    # No file may grow beyond 100 blocks: the nearest thing to a full disk. Python would cut its bytecode off as well.
    full = "export PYTHONDONTWRITEBYTECODE=1; ulimit -f 100; {}"
    done = run_script("aggregate_runs.py", "lab", *args, cwd=tmp_path, around=full)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S+ was not written: .*too large.*\n", done.stderr, re.I), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "wandb_export") == before


def test_without_home_passwd_entry_or_memory(tmp_path):
    write_export(tmp_path / "in", "p", [run("x")])
    nobody = "import pwd, runpy, sys; pwd.getpwuid = pwd.getpwnam = {}.__getitem__; sys.argv[:] = sys.argv[1:]; "
    nobody += "runpy.run_path(sys.argv[0], run_name='__main__')"
    for source, code in (("in", 0), ("~/in", 2), ("~nobody/in", 2)):
        command = [sys.executable, "-c", nobody, str(TOOLS / "aggregate_runs.py"), source, "-o", "o.csv"]
        env = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    done = run_script("aggregate_runs.py", "in", "-o", "o.parquet", cwd=tmp_path, around="ulimit -v 1000000; {}")
    assert "Traceback" not in done.stderr
    # Polars, Arrow and OpenBLAS may end the process themselves, with their own words
    assert done.returncode == 0 or re.search("not enough memory|memory allocation|ulimit", done.stderr, re.I)


def test_text_of_a_file_is_shown_plainly_and_markup_is_text(aggregate, tmp_path):
    evil = "\x1b]0;title\x07[bold red]x[/] \u202eevil\nline"
    write_export(tmp_path / "in", "p", [run(evil, {"k\x1b[2J": 1, "dataset_name": evil}, project=evil)])
    pl.DataFrame({"id": ["1"], "name": ["x"], "a\x1b[31m": [[1]]}).write_parquet(
        tmp_path / "in" / "\x1b[1m_runs.parquet"
    )
    got = aggregate("in")
    assert got.code == 1
    shown = got.out + got.err
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", shown)
    assert "\ufffd]0;title\ufffd[bold red]x[/] \ufffdevil line (1)" in shown
    assert "in/\ufffd[1m_runs.parquet: no export of runs: its column a\ufffd[31m is List(Int64)" in got.err


def test_what_a_killed_run_left_is_tidied_and_its_output_kept(aggregate, lab, tmp_path):
    for output in ("out.parquet", "by"):
        left = tmp_path / f".{output}.tmp"
        (left / "new" / "project=x").mkdir(parents=True)
        (left / "lock").touch()
        (left / "link").symlink_to(lab)
    (tmp_path / ".by.tmp" / "old" / "project=kept").mkdir(parents=True)  # killed between two renames
    assert aggregate("lab").code == 0
    nothing = aggregate("lab", "--partition-by", "project", "--columns", "nothing", output="by")
    assert nothing.code == 2
    assert aggregate("lab", "--partition-by", "project", output="by").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by", "home", "lab", "out.parquet"]
    assert len(list(lab.iterdir())) == 4
    with aggregate_runs.workspace(tmp_path / "out.parquet"):
        busy = aggregate("lab")
    assert (busy.code, "another run is writing it" in busy.err) == (2, True)
    (tmp_path / ".out.parquet.tmp").symlink_to(lab)
    assert aggregate("lab").code == 2
    assert len(list(lab.iterdir())) == 4


def test_a_partitioned_output_is_at_every_moment_the_old_or_the_new_one(lab, tmp_path):
    command = [sys.executable, str(TOOLS / "aggregate_runs.py"), "lab", "--partition-by", "project", "-o", "by"]
    subprocess.run(command, cwd=tmp_path, env=clean_env(tmp_path), check=True, capture_output=True)
    looks = set()
    process = subprocess.Popen([*command, "--project", "beta"], cwd=tmp_path, env=clean_env(tmp_path))
    while process.poll() is None:
        listed = (tmp_path / "by").stat().st_ino
        names = tuple(sorted(path.name for path in (tmp_path / "by").iterdir()))
        if (tmp_path / "by").stat().st_ino == listed:  # otherwise it was exchanged meanwhile, and the old one tidied
            looks.add(names)
    assert process.returncode == 0
    assert looks | {("project=beta",)} == {("project=alpha", "project=beta"), ("project=beta",)}
    # where the system cannot exchange two folders, two renames do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate_runs, "exchange", lambda one, other: False)
        frame = pl.LazyFrame({"project": ["x"], "n": [1]})
        aggregate_runs.write(frame, str(tmp_path / "by"), "project", lambda: None)
        other = frame.with_columns(project=pl.lit("y"))
        with pytest.raises(ZeroDivisionError):
            aggregate_runs.write(other, str(tmp_path / "by"), "project", lambda: 1 // 0)
    assert [path.name for path in (tmp_path / "by").iterdir()] == ["project=x"]


# ---- Rules ------------------------------------------------------------------------------------------------------


def test_rules_add_columns_and_numbers_become_numbers(aggregate, tmp_path):
    names = ["net_w64_do0.1_v007", "NET_W128_do5e-2_v1", "other", None]
    write_export(tmp_path / "in", "p", [run(name) for name in names])
    rules = [r"width=_w(\d+)", r"dropout=_do([0-9.e-]+)", "net=^net", "version=v[0-9]+", "none=zzz"]
    frame = aggregate("in", *(part for rule in rules for part in ("--rule", rule)), "--where", "width < 100").frame
    assert frame.select("width", "dropout", "net", "version", "none").rows() == [(64, 0.1, "net", "v007", None)]
    assert frame.select("width", "dropout", "none").dtypes == [pl.Int64, pl.Float64, pl.String]
    assert frame.columns[-6:-1] == ["dropout", "net", "none", "version", "width"]


def test_a_rule_may_replace_a_built_in_one(aggregate, tmp_path):
    write_export(tmp_path / "in", "p", [run("net-K8-mlp")])
    assert aggregate("in", "--rule", "k=-k([0-9]+)", "--rule", "arch=net").frame.select("k", "arch").rows() == [
        (8, "net")
    ]


LAB_RULES = """
stage = "(phase[0-9]+)"
arch = ["resnet50", "resnet", "vit-b"]
k = "-heads([0-9]+)"
lr_parsed = "-lr([0-9.e-]+)"
augmentation = "aug=([a-z]+)"

[dataset]
imagenet = "in1k|imagenet"
cifar10 = "c10"
"""


def test_the_patterns_of_another_lab(aggregate, tmp_path):
    (tmp_path / "rules.toml").write_text(LAB_RULES)
    names = ["Phase2/ViT-B-heads12-lr3e-4 in1k aug=mix", "resnet50 c10", "resnet-tiny stage3_k8_s1"]
    write_export(tmp_path / "in", "p", [run(name) for name in names])
    got = aggregate("in", "--rules", "rules.toml")
    columns = ["stage", "arch", "dataset", "k", "lr_parsed", "augmentation", "seed_parsed", "asymmetric_flag"]
    assert got.frame.select(columns).rows() == [
        ("phase2", "vit-b", "imagenet", 12, 3e-4, "mix", None, False),
        (None, "resnet50", "cifar10", None, None, None, None, False),
        (None, "resnet", None, None, None, None, None, False),
    ]
    assert set(PARSED) < set(got.frame.columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "width"], "--rule 'width': write NAME=REGEX"),
        (["--rule", "width=(["], "rule width: '([' is no regular expression: unclosed character class"),
        (["--rule", "my width=x"], "'my width' is no column name"),
        (["--rule", "name=x"], "exports have a column name of their own"),
        (["--rule", "config_x=y"], "exports have a column config_x of their own"),
        (["--rules", "none.toml"], "--rules none.toml: there is no such file"),
        (["--rules", "bad.toml"], "--rules bad.toml: no TOML"),
        (["--rules", "number.toml"], "rule k: 5 is no regular expression"),
        (["--rules", "table.toml"], "rule arch, mlp: '(' is no regular expression: unclosed group"),
    ],
)
def test_rules_with_a_mistake(aggregate, lab, tmp_path, options, message):
    (tmp_path / "bad.toml").write_text("k = (")
    (tmp_path / "number.toml").write_text("k = 5")
    (tmp_path / "table.toml").write_text("[arch]\nmlp = '('")
    got = aggregate("lab", *options)
    assert (got.code, got.output.exists()) == (2, False)
    assert message in got.err


# ---- What it says -----------------------------------------------------------------------------------------------


def test_names_that_contradict_the_config_are_counted(aggregate, tmp_path):
    configs = [{"model": {"k": 8}, "optimizer": {"lr": 1e-3}}] * 2 + [
        {"model": {"k": 16}, "optimizer": {"lr": 0.001}},
        {},
    ]
    write_export(tmp_path / "in", "p", [run(f"x_lr1e-3_k8_s{i}", config) for i, config in enumerate(configs)])
    got = aggregate("in")
    assert "k: config_model_k says otherwise in 1 of 4 runs; k is used\n" in got.out
    assert "lr_parsed:" not in got.out
    assert got.frame["k"].to_list() == [8] * 4
    assert "otherwise" not in aggregate("in", "--no-enrich").out


def test_the_summary_at_80_columns(aggregate, lab):
    write_export(lab, "gamma", [run(f"dashing-sun-{i}", {"model": {"k": "auto"}, "w": i}) for i in range(7)])
    got = aggregate("lab", "--state", "finished", "--state", "crashed")
    shown = "\n".join(line.rstrip() for line in got.out.split("\n"))
    assert (
        shown
        == """\
runs in 3 files                                   15
  older copies of runs that a newer export holds   0
  --state finished or crashed                     -2
  --protocol distribution                         -2
runs out                                          11
project  gamma (7), alpha (2), beta (2)
stage    - (7), stage0 (2), stage1 (2)
arch     - (7), filter_bank (2), gnn_qk (2)
dataset  - (11)
3 columns in only some files: config_data_same_graph_all_splits, config_w,
metric_test_mse
1 column of another type in some files, now of one:
  config_model_k: String, for it is Int64 in 2 files and String in 1 file
7 runs whose name matched no pattern: dashing-sun-0, dashing-sun-1,
dashing-sun-2, dashing-sun-3, dashing-sun-4 and 2 more
"""
    )
