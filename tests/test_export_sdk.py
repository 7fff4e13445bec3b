"""Twenty runs of odd shapes, logged by W&B's own client to the server, exported, and compared value by value."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from conftest import TEAM, assert_contract, clean_env, export, good, read
from test_export_history import assert_complete, history
from wandb_server import KEY

NAN, INF = math.nan, math.inf

SHAPES: list[dict[str, Any]] = [
    {"config": {"lr": 0.001, "epochs": 10, "amp": True, "opt": "adam", "none": None}, "rows": [{"loss": 0.5}]},
    {"config": {"lr": 1, "epochs": 2.5, "amp": "yes", "opt": 3}, "rows": [{"loss": 1}, {"loss": 0}]},
    {"config": {"model": {"_target_": "lab.Net", "k": 8, "deep": {"er": [1, 2]}}}, "rows": [{"a": {"b": {"c": 1.5}}}]},
    {"config": {"model_k": 9, "model": {"k": 1}, "model.k": 2}, "rows": [{"test/mse": 1.0, "test_mse": 2.0}]},
    {"config": {}, "rows": []},
    {"config": {"y": INF, "z": -INF}, "rows": [{"nan": NAN, "inf": INF, "down": -INF}]},
    {"config": {"big": 2**62, "neg": -(2**62)}, "rows": [{"n": 2**52}]},
    {"config": {"ünï/cödé ☃": "日本語", "emoji": "😀", "line": "a\nb\tc"}, "rows": [{"ключ/значение": 1.25}]},
    {"config": {"list": [1, "two", None, {"three": 3}], "empty": [], "tuple": (1, 2)}, "rows": [{"flag": True}]},
    {"config": {"text": ""}, "rows": [{"word": "hello"}, {"word": "bye", "n": 3}]},
    {
        "config": {"seed": 1},
        "define": {"name": "loss", "summary": "min,max,last"},
        "rows": [{"loss": v} for v in (3, 1, 2)],
    },
    {
        "config": {"seed": 2},
        "define": {"name": "val/*", "summary": "min"},
        "rows": [{"val/x": 2.0}],
    },
    {"config": {"seed": 3}, "rows": [{"a": 1}, {"b": 2}, {"a": None, "b": 3}]},
    {"config": {"seed": 4}, "histogram": [1, 2, 2, 3], "rows": [{"loss": 1}]},
    {"config": {"seed": 5}, "table": [[1, "x"], [2, "y"]], "rows": [{"loss": 2}]},
    {"config": {"seed": 6}, "init": {"tags": ["b", "a", "ä/ö"], "group": "g/1", "job_type": "eval", "notes": "n\nm"}},
    {
        "config": {"seed": 7},
        "init": {"name": "stage2, a/b\nc"},
        "rows": [{"_private": 1, "loss": 2}],
        "steps": [5, 900],
    },
    {
        "config": {"seed": 8},
        "summary": {"best": 0.25, "why": "early stop", "nested": {"x": {"y": 1}}},
        "rows": [{"l": 1}],
    },
    {"config": {"seed": 9}, "rows": [{"l": n} for n in range(300)], "exit": 1},
    {"config": {"seed": 10, "a b": 1, "a-b": 2, "a@b": 3}, "rows": [{"x": 1e-300, "y": 1.7e308, "z": 0.1 + 0.2}]},
]


def log_all() -> None:
    """Log the shapes as runs r00, r01, ...; then print what `wandb.Api()` reads of each. Runs in its own process."""
    import wandb

    os.chdir(os.environ["HOME"])

    def begin(number: int, shape: dict[str, Any]) -> Any:
        quiet = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, reinit="create_new")
        return wandb.init(
            entity=TEAM,
            project="odd",
            id=f"r{number:02}",
            config=shape["config"],
            settings=quiet,
            **shape.get("init", {}),
        )

    def log(run: Any, shape: dict[str, Any]) -> None:
        if "define" in shape:
            run.define_metric(**shape["define"])
        extra: dict[str, Any] = {}
        if "histogram" in shape:
            extra["h"] = wandb.Histogram(shape["histogram"])
        if "table" in shape:
            extra["t"] = wandb.Table(columns=["n", "s"], data=shape["table"])
        for number, row in enumerate(shape.get("rows", [])):
            run.log(row | extra, step=shape["steps"][number] if "steps" in shape else None)
        for key, value in shape.get("summary", {}).items():
            run.summary[key] = value
        run.finish(exit_code=shape.get("exit", 0))

    with ThreadPoolExecutor(len(SHAPES)) as pool:
        runs = list(pool.map(begin, range(len(SHAPES)), SHAPES))
        list(pool.map(log, runs, SHAPES))
    read = [
        {"id": run.id, "url": run.url, "config": run.config, "summary": run.summary._json_dict, "name": run.name}
        for run in wandb.Api().runs(f"{TEAM}/odd", lazy=False, per_page=100)
    ]
    print(json.dumps(read))


def as_read(value: Any) -> Any:
    """A logged value as W&B keeps it: NaN and the infinities by name, tuples as lists, whole floats maybe as ints."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: as_read(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_read(item) for item in value]
    return value


def test_twenty_runs_of_odd_shapes_logged_by_the_real_client(server, folder, tmp_path):
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_SILENT="true")
    env |= {"WANDB_CACHE_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_export_sdk as t; t.log_all()"
    logged = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert logged.returncode == 0, logged.stderr
    seen = {run["id"]: run for run in json.loads(logged.stdout.splitlines()[-1])}
    for run in server.runs(TEAM, "odd")[::2]:  # of every other run W&B has exported what was logged
        server.update_run(TEAM, "odd", run.id, exported_steps=len(run.history or []))
    good(export(server, folder, "-p", "odd", "--include-history"))
    table = read(folder, "odd")
    runs = sorted(server.runs(TEAM, "odd"), key=lambda run: (run.created, run.id))
    assert_contract(table, runs)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == len(SHAPES) == 20
    for number, shape in enumerate(SHAPES):
        row, api = rows[f"r{number:02}"], seen[f"r{number:02}"]
        config, summary = json.loads(row["_config_json"]), json.loads(row["_summary_json"])
        own = {key: value for key, value in config.items() if key != "_wandb"}
        assert repr(own) == repr(api["config"])
        assert own == json.loads(json.dumps(shape["config"]))
        assert {key: repr(value) for key, value in summary.items()} == {k: repr(v) for k, v in api["summary"].items()}
        assert (row["url"], row["name"]) == (api["url"], api["name"])
        for key, value in shape.get("summary", {}).items():
            assert summary[key] == value
        last: dict[str, Any] = {}
        for logged_row in shape.get("rows", []):
            last |= {key: value for key, value in logged_row.items() if value is not None}  # None is not logged
        for key, value in last.items():
            if "define" not in shape:
                assert summary[key] == as_read(value), key
    assert rows["r10"]["metric_loss_min"] == 1.0
    assert rows["r10"]["metric_loss_max"] == 3.0
    assert "metric_h" not in table.schema.names
    assert json.loads(rows["r13"]["_summary_json"])["h"]["_type"] == "histogram"
    assert json.loads(rows["r14"]["_summary_json"])["t"]["_type"] == "table-file"
    assert rows["r15"]["tags"] == ["b", "a", "ä/ö"]
    assert (rows["r15"]["group"], rows["r15"]["job_type"], rows["r15"]["notes"]) == ("g/1", "eval", "n\nm")
    assert rows["r18"]["state"] == "failed"
    assert rows["r18"]["last_step"] == 299
    assert rows["r18"]["history_rows"] == 300
    types = {
        name: str(table.schema.field(name).type) for name in ("config_lr", "config_amp", "config_seed", "config_y")
    }
    assert types == {"config_lr": "double", "config_amp": "string", "config_seed": "int64", "config_y": "double"}
    assert_complete(history(folder, "odd"), server, "odd")
    assert pq.read_metadata(folder / f"{TEAM}_odd_history.parquet").num_rows == sum(
        len(s.get("rows", [])) for s in SHAPES
    )
