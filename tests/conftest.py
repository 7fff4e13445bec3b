"""What every test file shares: a clean environment, and a way to run a script as a user does."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wandb_server import KEY, StoredRun, WandbServer, iso

REPO = Path(__file__).resolve().parent.parent
TOOLS = REPO / "wandb-tools"
HOME = Path.home()  # before a test moves it


def clean_env(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: no W&B settings, an empty home, no terminal, 80 columns; `extra` on top."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "GRAPH_DENOISE", "AWS_", "NETRC"))}
    # Where a container forbids bytecode, each start compiles the client of W&B anew, which takes half a second.
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TERM", "PYTHONDONTWRITEBYTECODE"):
        kept.pop(name, None)
    # uv keeps its package cache although HOME moves, so that a `uv run` in a test downloads nothing twice.
    cache = os.environ.get("UV_CACHE_DIR") or str(HOME / ".cache" / "uv")
    return kept | {"HOME": str(home), "UV_CACHE_DIR": cache, "PYTHONUTF8": "1"} | extra


def run_script(
    script: str, *args: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 60, around: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `wandb-tools/SCRIPT ARGS` in `cwd` with the test environment's Python; stdout and stderr as text.

    `around` is what a shell does with it: `{} 2>&1 | head -1`.
    """
    command = [sys.executable, str(TOOLS / script), *map(str, args)]
    return subprocess.run(
        ["bash", "-c", around.replace("{}", shlex.join(command))] if around else command,
        cwd=cwd,
        env=clean_env(cwd) if env is None else env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )


def load_script(script: str) -> ModuleType:
    """Import `wandb-tools/SCRIPT` as a module, to test its functions."""
    import importlib.util

    name = script.removesuffix(".py")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TOOLS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _nothing_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees or touches the W&B settings, keys and caches of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "GRAPH_DENOISE", "AWS_", "NETRC")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))


TEAM = "graph_denoise_team"
FIXED = ["id", "name", "entity", "project", "state", "url", "created_at", "heartbeat_at", "tags", "user", "group"]
FIXED += ["job_type", "sweep", "notes", "commit", "last_step", "runtime_seconds", "history_rows"]
JSONS = ["_config_json", "_summary_json"]

# ---------------------------------------------------------------- exports in this process, for test_export_*.py


class Done(NamedTuple):
    """How an export ended."""

    code: int
    out: str
    err: str


class Exited(BaseException):
    """Raised in the place of os._exit."""


def leave(code: int) -> None:
    raise Exited(code)


def hurried(speed: float) -> SimpleNamespace:
    """A `time` module whose seconds pass `speed` times as fast, so that the waits of a backoff take no time here."""
    return SimpleNamespace(
        monotonic=lambda: time.monotonic() * speed,
        perf_counter=lambda: time.perf_counter() * speed,
        sleep=lambda seconds: time.sleep(seconds / speed),
        time=time.time,
    )


def forget_settings() -> None:
    """Let W&B's client, of which a process has one with one sidecar, read its settings anew, as at its start."""
    if setup := sys.modules.get("wandb.sdk.wandb_setup"):
        setup.singleton()._settings = None


def export(
    server: WandbServer, folder: Path, *args: str, entity: str = TEAM, speed: float = 1, key: str = KEY, **env: str
) -> Done:
    """Run export_runs.py to the end in this process, as its last line does, with `-e entity -o folder` and args."""
    script = load_script("export_runs.py")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    command = ["export_runs.py", *(["-e", entity] if entity else []), "-o", str(folder), *args]
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": key, "COLUMNS": "80"} | env
    forget_settings()
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(script, "time", hurried(speed)),
        mock.patch("os._exit", leave),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            script.finish(script.main)
        except Exited as exited:
            code = exited.args[0]
        except SystemExit as exited:  # argparse's
            code = int(exited.code or 0)
        finally:
            gc.enable()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert key not in "".join(said)
    assert "Traceback" not in said[1]
    return Done(code, *said)


def good(done: Done) -> Done:
    """The same, which must have ended with exit code 0."""
    assert done.code == 0, done
    return done


def runs_file(folder: Path, project: str, entity: str = TEAM) -> Path:
    return folder / f"{entity}_{project}_runs.parquet"


def read(folder: Path, project: str, entity: str = TEAM) -> pa.Table:
    """The runs file."""
    return pq.read_table(runs_file(folder, project, entity))


def metadata(folder: Path, project: str, entity: str = TEAM) -> dict[str, Any]:
    return json.loads((folder / f"{entity}_{project}_metadata.json").read_text())


def content(table: pa.Table) -> tuple[list[tuple[str, str]], str]:
    """Names, types and values of a table in a form that compares: NaN equals NaN, 1 differs from 1.0 and True."""
    return [(field.name, str(field.type)) for field in table.schema], repr(table.to_pylist())


def assert_same(left: pa.Table, right: pa.Table) -> None:
    """The tables agree in schema, rows and values; else say where they differ first."""
    if content(left) == content(right):
        return
    assert content(left)[0] == content(right)[0]
    assert left.num_rows == right.num_rows
    for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True):
        for name in a:
            assert repr(a[name]) == repr(b[name]), f"{name} of {a.get('id', a)}"


def leftovers(folder: Path) -> list[str]:
    """What an export left in the folder besides its three files."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not re.search(r"_(runs\.parquet|history\.parquet|metadata\.json)$", path.name)
    )


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "wandb_export"


# ---------------------------------------------------------------- the contract once more
# The data contract of the README, written slowly and on its own, from the JSON texts that W&B holds.


def leaves(value: Any, path: tuple[str, ...], media: bool) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path of keys, value) of everything in a dict that is no dict; without media if asked so."""
    for key, item in value.items():
        if not isinstance(item, dict):
            yield (*path, key), item
        elif not (media and "_type" in item):
            yield from leaves(item, (*path, key), media)


def json_of(text: str) -> dict[str, Any]:
    return json.loads(text, strict=False)


def unwrapped(text: str) -> dict[str, Any]:
    """A config without W&B's wrappers."""
    return {
        key: item["value"] if isinstance(item, dict) and "value" in item else item
        for key, item in json_of(text).items()
    }


def as_metric(value: Any) -> float | None:
    if isinstance(value, str):
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value)
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def storable(text: str) -> str:
    """Text as Parquet can hold it: `?` for lone surrogates, which only the JSON columns keep (escaped)."""
    return text.encode(errors="replace").decode()


def config_type(values: list[Any]) -> str:
    """The one type of a config key's values."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds and kinds <= {int, float} and all(abs(v) < 2**1023 for v in values if isinstance(v, int)):
        wide = any(isinstance(v, int) and not -(2**63) <= v < 2**63 for v in values)
        return "double" if float in kinds or wide else "int64"
    return "string"


def as_config(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "string" and not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return json.dumps(value) if storable(text) != text else text
    return {"bool": bool, "int64": int, "double": float, "string": storable}[kind](value)


def reference(configs: list[str], summaries: list[str]) -> tuple[dict[str, str], list[dict[str, Any]], dict[str, str]]:
    """Column -> type, the rows' values and column -> key of config_* and metric_*, for a project with these texts."""
    found: dict[tuple[str, ...], dict[int, Any]] = {}
    for row, (config, summary) in enumerate(zip(configs, summaries, strict=True)):
        for prefix, data in (("config", unwrapped(config)), ("metric", json_of(summary))):
            own = {key: value for key, value in data.items() if not key.startswith("_")}
            for path, value in leaves(own, (prefix,), media=prefix == "metric"):
                number = value if prefix == "config" else as_metric(value)
                if prefix == "config" or number is not None:
                    found.setdefault(path, {})[row] = number
    by_spelling: dict[str, list[tuple[str, ...]]] = {}
    for path in sorted(found):
        column = "".join(c if c.isalnum() or c == "_" else "_" for c in "_".join(path))
        by_spelling.setdefault(column, []).append(path)
    columns: dict[str, tuple[str, ...]] = {}
    for column, paths in by_spelling.items():
        paths.sort(key=lambda path: path != tuple(column.split("_", 1)))  # its own spelling first; stable
        columns[column] = paths[0]
        numbers = (n for n in range(2, 10**6) if f"{column}__{n}" not in by_spelling)
        columns |= {f"{column}__{next(numbers)}": path for path in paths[1:]}
    types: dict[str, str] = {}
    rows: list[dict[str, Any]] = [{} for _ in configs]
    for column, path in columns.items():
        values = found[path]
        types[column] = "double" if path[0] == "metric" else config_type(list(values.values()))
        for row in range(len(configs)):
            rows[row][column] = as_config(values.get(row), types[column])
    return types, rows, {column: ".".join(path[1:]) for column, path in columns.items()}


def assert_contract(table: pa.Table, runs: list[StoredRun]) -> dict[str, str]:
    """The table holds these runs as the contract says; returns column -> key, for the metadata."""
    assert table["id"].to_pylist() == [run.id for run in runs]
    types, rows, keys = reference([run.config_json for run in runs], [run.summary_json for run in runs])
    names = table.schema.names
    data = names[len(FIXED) : -len(JSONS)]
    assert names[: len(FIXED)] == FIXED
    assert names[-len(JSONS) :] == JSONS
    assert {name: str(table.schema.field(name).type) for name in data} == types
    for row, expected in zip(table.select(data).to_pylist(), rows, strict=True):
        assert {name: repr(value) for name, value in row.items()} == {n: repr(v) for n, v in expected.items()}
    for run, config, summary in zip(runs, *(table[name].to_pylist() for name in JSONS), strict=True):
        # repr: 1 and 1.0 and True differ, NaN equals itself, and the order of keys counts
        assert repr(json.loads(config)) == repr(unwrapped(run.config_json))
        assert repr(json.loads(summary)) == repr(json_of(run.summary_json))
    return keys


def assert_contract_of_ids(table: pa.Table, server: WandbServer, project: str = "p") -> None:
    """Each run of the project is there once, oldest first, and its summary is its own."""
    runs = sorted(server.runs(TEAM, project), key=lambda run: (run.created, run.id))
    assert table["id"].to_pylist() == [run.id for run in runs]
    assert table["_summary_json"].to_pylist() == [run.summary_json for run in runs]


def fill_small(server: WandbServer, project: str, runs: int = 3, entity: str = TEAM) -> None:
    for number in range(runs):
        server.add_run(entity, project, config={"n": number}, summary={"loss": 0.5}, created_at=iso(number))
