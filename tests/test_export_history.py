"""export_runs.py --include-history: every logged step of every run, once."""

from __future__ import annotations

import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEAM, content, export, good, leftovers, metadata
from wandb_server import WandbServer, iso

FIXED = ["run_id", "run_name", "entity", "project", "_step", "_timestamp", "_runtime"]
TYPES = ["string", "string", "string", "string", "int64", "double", "double"]


def history(folder: Path, project: str = "p") -> pa.Table:
    return pq.read_table(folder / f"{TEAM}_{project}_history.parquet")


def dotted(row: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A row with nested dicts spelled `a.b`, as W&B's exported files have them; media and lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            flat |= dotted(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def number(value: Any) -> float | None:
    """A logged value as Float64, None for what is no number."""
    if isinstance(value, str):
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value)
    return float(value) if isinstance(value, bool | int | float) else None


def text(value: Any) -> str | None:
    """A logged value in a column of text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        value = float(value)
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else json.dumps(value)
    return json.dumps(value, ensure_ascii=False)


def reference(server: WandbServer, project: str = "p") -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Column -> type and the rows of the history file, slowly, from the rows that were logged."""
    rows: list[dict[str, Any]] = []
    for run in sorted(server.runs(TEAM, project), key=lambda run: run.id):
        for row in run.history.rows(range(len(run.history))) if run.history else ():
            fixed = {"run_id": run.id, "run_name": run.display_name, "entity": TEAM, "project": project}
            fixed |= {"_timestamp": None, "_runtime": None}
            rows.append(fixed | dotted(row))
    keys = sorted({key for row in rows for key in row} - set(FIXED))
    numeric = {key for key in keys if all(number(row[key]) is not None for row in rows if row.get(key) is not None)}
    types = dict(zip(FIXED, TYPES, strict=True)) | {key: "double" if key in numeric else "string" for key in keys}
    for row in rows:
        for key in ("_timestamp", "_runtime", *keys):
            row[key] = number(row.get(key)) if types[key] == "double" else text(row.get(key))
    rows.sort(key=lambda row: (row["run_id"], row["_step"]))
    return types, [{name: row[name] for name in types} for row in rows]


def assert_complete(table: pa.Table, server: WandbServer, project: str = "p") -> None:
    """The table holds exactly the rows that were logged."""
    types, rows = reference(server, project)
    assert {field.name: str(field.type) for field in table.schema} == types
    assert table.schema.names[: len(FIXED)] == FIXED
    found = table.to_pylist()
    assert [(row["run_id"], row["_step"]) for row in found] == [(row["run_id"], row["_step"]) for row in rows]
    for a, b in zip(found, rows, strict=True):
        assert {k: repr(v) for k, v in a.items()} == {k: repr(v) for k, v in b.items()}


def steps(*numbers: int, **values: Any) -> list[dict[str, Any]]:
    """Rows with these steps."""
    return [
        {"_step": n, "_timestamp": 1.7e9 + n, "_runtime": n / 4, "train/loss": 1 / (n + 1)} | values for n in numbers
    ]


def add(server: WandbServer, name: str, rows: list[dict[str, Any]], project: str = "p", **fields: Any) -> None:
    """A run whose row count and last step agree with its rows."""
    summary = {"_step": rows[-1]["_step"]} if rows else {}
    server.add_run(TEAM, project, name=name, history=rows, summary=summary, **fields)


# ---------------------------------------------------------------- complete and exact


def test_every_step_is_there_once_and_none_is_sampled(server, folder):
    add(server, "exported", steps(*range(3000)), display_name="stage1, x")
    add(server, "files", steps(*range(1000)), rows_per_file=333)
    add(server, "live", steps(*range(2500)), state="running")
    add(server, "both", steps(*range(2000)), state="running", exported_steps=1200)
    add(server, "overlap", steps(*range(1500)), state="running", exported_steps=900, overlap=300)
    add(server, "gaps", steps(*range(0, 40_000, 37)), state="running", exported_steps=10)
    add(server, "resumed", steps(*range(700, 900)), exported_steps=100)
    add(server, "far", steps(0, 5, 10**6, 10**9, 10**12), exported_steps=2)
    add(server, "one", steps(0))
    add(server, "none", [])
    server.add_run(TEAM, "p", name="never", history=None)
    done = good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)
    about = metadata(folder, "p")
    assert about["history_rows"] == history(folder).num_rows
    assert about["history_unconfirmed"] == []
    assert "not confirmed" not in done.err
    assert leftovers(folder) == []


def test_values_as_they_were_logged(server, folder):
    add(server, "a", [*steps(0, 1), {"_step": 2, "loss": float("nan"), "up": float("inf"), "flag": True, "n": 3}])
    add(server, "b", [{"_step": 0, "é/ü x": 1.5, "with.dot": 2, "with": 3, "n": 0.25, "flag": False}])
    add(server, "c", [{"_step": 0, "word": "hello", "list": [1, "x"], "image": {"_type": "image-file", "size": 3}}])
    add(server, "d", [{"_step": 0, "only_null": None, "loss": None, "n": 2}])
    for name in "abcd":  # the same, not exported yet
        rows = server.run(TEAM, "p", name).history.source
        add(server, f"live_{name}", rows, state="running")
    good(export(server, folder, "-p", "p", "--include-history"))
    table = history(folder)
    assert_complete(table, server)


@pytest.mark.parametrize("exported_steps", [0, 1, 2, 3])
def test_nested_values_are_spelled_alike_wherever_they_come_from(server, folder, exported_steps):
    rows = [
        {"_step": n, "loss": {"a": n / 2, "deep": {"b": n}}, "m": {"_type": "histogram", "bins": [n]}} for n in range(3)
    ]
    add(server, "x", rows, state="running", exported_steps=exported_steps)
    good(export(server, folder, "-p", "p", "--include-history"))
    assert history(folder).schema.names == [*FIXED, "loss.a", "loss.deep.b", "m"]
    assert_complete(history(folder), server)


@pytest.mark.parametrize("live", [False, True])
def test_a_key_that_is_a_number_in_one_run_and_text_in_another(server, folder, live):
    fields = {"state": "running"} if live else {}
    add(server, "a", [{"_step": 0, "x": 3}, {"_step": 1, "x": 4}], **fields)
    add(server, "b", [{"_step": 0, "x": "word"}, {"_step": 1}], **fields)
    add(server, "c", [{"_step": 0, "x": 0.5}, {"_step": 1, "x": float("nan")}], **fields)
    add(server, "d", [{"_step": 0, "x": 1e300}, {"_step": 1, "x": 123456.789}], **fields)
    good(export(server, folder, "-p", "p", "--include-history"))
    table = history(folder)
    assert table["x"].to_pylist() == ["3", "4", "word", None, "0.5", "NaN", "1e+300", "123456.789"]
    assert_complete(table, server)
    server.delete_run(TEAM, "p", "b")  # what remains are numbers again
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)
    assert server.stats.requests["HistoryAddresses"] == 0


def test_keys_named_like_the_fixed_columns_do_not_replace_them(server, folder):
    add(server, "a", [{"_step": 0, "run_id": 5, "project": "mine", "entity": 1, "run_name": 2, "loss": 1}])
    good(export(server, folder, "-p", "p", "--include-history"))
    [row] = history(folder).to_pylist()
    assert (row["run_id"], row["run_name"], row["entity"], row["project"]) == ("a", "a", TEAM, "p")
    assert [row[f"{name}__2"] for name in ("run_id", "run_name", "entity", "project")] == [5.0, 2.0, 1.0, "mine"]
    assert row["loss"] == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(server, folder, seed):
    rng = random.Random(seed)
    numbers, flags, words = (
        [1, 0.5, float("nan"), 2**40, None],
        [True, False, None],
        ["w", [1], {"_type": "table-file", "rows": 1}, None],
    )
    keys = ["a", "a.b", "c/d", "e", "f"]
    for number_ in range(25):
        at, rows = rng.choice([0, 0, 100]), []
        kinds = {key: rng.choice([numbers, numbers, flags, words, [{"k": 2, "l": {"m": 0.5}}]]) for key in keys}
        for _ in range(rng.choice([0, 1, 3, 30])):
            logged = rng.sample(keys, rng.randint(0, 4))
            rows.append({"_step": at} | {key: rng.choice(kinds[key]) for key in logged})
            at += rng.choice([1, 1, 1, 2, 1500])
        exported = rng.randint(0, len(rows))
        overlap = rng.randint(0, exported)
        add(
            server, f"r{number_}", rows, exported_steps=exported, overlap=overlap, rows_per_file=rng.choice([2, 7, 100])
        )
    good(export(server, folder, "-p", "p", "--include-history", "-q"))
    assert_complete(history(folder), server)


# ---------------------------------------------------------------- keys


def test_history_keys_are_globs_and_a_row_needs_any_of_them(server, folder):
    rows = [
        {"_step": 0, "train/loss": 1.0, "val/loss": 2.0, "lr": 0.1},
        {"_step": 1, "lr": 0.1},
        {"_step": 2, "train/acc": 3.0},
        {"_step": 3, "val/loss": None, "lr": 1},
        {"_step": 4, "val/loss": 5.0, "Train/x": 1},
    ]
    add(server, "a", rows)
    add(server, "live", rows, state="running")
    add(server, "without", [{"_step": 0, "lr": 1}])
    good(export(server, folder, "-p", "p", "--include-history", "--history-keys", "train/*, val/loss"))
    table = history(folder)
    assert table.schema.names == [*FIXED, "train/acc", "train/loss", "val/loss"]
    expected = [(0, None, 1.0, 2.0), (2, 3.0, None, None), (4, None, None, 5.0)]
    columns = [table[name].to_pylist() for name in ("_step", "train/acc", "train/loss", "val/loss")]
    assert list(zip(*columns, strict=True)) == expected * 2
    assert metadata(folder, "p")["history_unconfirmed"] == []
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--include-history", "--history-keys", "train/*, val/loss"))
    assert server.stats.requests["HistoryAddresses"] == 0
    good(export(server, folder, "-p", "p", "--include-history"))  # other keys: all of it again
    assert_complete(history(folder), server)


def test_other_keys_after_an_interrupted_export_of_some(server, folder):
    """What an interrupted export left on disk is not mistaken for what this one asks for."""
    for n in range(40):
        add(server, f"r{n:02}", [{"_step": s, "train/loss": s, "val/loss": -s} for s in range(3)])
    good(export(server, folder, "-p", "p"))
    server.weather.revoke_after = 3  # the key itself, the listing, and where the first histories are
    done = export(server, folder, "-p", "p", "--include-history", "--history-keys", "train/*", "--workers", "1")
    assert done.code != 0
    server.weather.revoke_after = None
    assert list(folder.rglob("history/*.parquet")), "this test needs an export that was interrupted half-way"
    good(export(server, folder, "-p", "p", "--include-history", "--history-keys", "val/*"))
    table = history(folder)
    assert table.schema.names == [*FIXED, "val/loss"]
    assert table.num_rows == 120
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)


def test_history_keys_need_history(server, folder):
    done = export(server, folder, "--history-keys", "x")
    assert done.code == 2
    assert "--include-history" in done.err


# ---------------------------------------------------------------- day after day


def test_only_runs_that_changed_are_fetched_again(server, folder):
    for n in range(30):
        add(server, f"r{n:02}", steps(*range(20)), created_at=iso(n))
    good(export(server, folder, "-p", "p", "--include-history"))
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--include-history"))
    assert [server.stats.requests[name] for name in ("ListRuns", "ExportRuns", "HistoryAddresses")] == [1, 0, 0]
    server.update_run(TEAM, "p", "r03", history=steps(*range(25)), summary={"_step": 24}, exported_steps=25)
    server.update_run(TEAM, "p", "r04", display_name="renamed")
    server.delete_run(TEAM, "p", "r05")
    add(server, "r99", steps(5, 6))
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--include-history"))
    assert server.stats.requests["parquet"] == 2
    assert server.stats.requests["HistoryAddresses"] == 1
    assert_complete(history(folder), server)


def test_a_run_that_goes_on_is_never_stale(server, folder):
    rows: list[dict[str, Any]] = []
    add(server, "x", steps(0), state="running")
    for day in range(1, 6):
        rows = steps(*range(day * 300))
        exported = 0 if day < 2 else (day - 1) * 250
        server.update_run(TEAM, "p", "x", history=rows, exported_steps=exported, summary={"_step": rows[-1]["_step"]})
        good(export(server, folder, "-p", "p", "--include-history", "-q"))
        assert_complete(history(folder), server)


def test_history_of_runs_that_a_filter_leaves_out_stays(server, folder):
    add(server, "old", steps(*range(5)), created_at="2025-01-01T00:00:00Z")
    add(server, "new", steps(*range(5)), created_at="2025-11-01T00:00:00Z")
    good(export(server, folder, "-p", "p", "--include-history", "--since", "2025-10-01"))
    assert set(history(folder)["run_id"].to_pylist()) == {"new"}
    good(export(server, folder, "-p", "p", "--include-history", "--until", "2025-02-01"))
    assert_complete(history(folder), server)


def test_a_full_export_that_stops_in_its_history_goes_on_as_one(server, folder):
    """Values that changed without a trace, which only --full finds, are found by the export that goes on, too."""
    for n in range(3):
        add(server, f"r{n}", steps(0, 1, loss=1.0))
    good(export(server, folder, "-p", "p", "--include-history"))
    for n in range(3):
        server.update_run(TEAM, "p", f"r{n}", history=steps(0, 1, loss=2.0))
    server.weather.only, server.weather.error_5xx = {"HistoryAddresses"}, 1.0
    stopped = export(server, folder, "-p", "p", "--include-history", "--full", speed=100)
    assert stopped.code == 1
    assert set(history(folder)["loss"].to_pylist()) == {1.0}
    server.weather.only, server.weather.error_5xx = None, 0
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)
    assert not leftovers(folder)


def test_history_of_a_run_that_wandb_deleted_and_the_file_keeps(server, folder):
    """The run stays in the file; its history, which is nowhere any more, is no failure of every further day."""
    add(server, "gone", steps(*range(5)), created_at="2025-01-01T00:00:00Z")
    add(server, "here", steps(*range(5)), created_at="2025-11-01T00:00:00Z")
    good(export(server, folder, "-p", "p"))
    server.delete_run(TEAM, "p", "gone")
    good(export(server, folder, "-p", "p", "--include-history", "--keep-deleted"))
    assert set(history(folder)["run_id"].to_pylist()) == {"here"}
    assert metadata(folder, "p")["total_runs"] == 2
    good(export(server, folder, "-p", "p", "--include-history", "--keep-deleted", "--full"))


def test_history_kept_of_a_deleted_run(server, folder):
    add(server, "gone", steps(*range(5)))
    add(server, "here", steps(*range(5)))
    good(export(server, folder, "-p", "p", "--include-history"))
    before = content(history(folder))
    server.delete_run(TEAM, "p", "gone")
    good(export(server, folder, "-p", "p", "--include-history", "--keep-deleted"))
    assert content(history(folder)) == before
    good(export(server, folder, "-p", "p", "--include-history", "--keep-deleted", "--full"))
    assert content(history(folder)) == before
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)


def test_what_cannot_be_confirmed_is_named_and_asked_for_again(server, folder):
    add(server, "sure", steps(0, 1, 2))
    server.add_run(TEAM, "p", name="unsure", display_name="odd one", history=steps(0, 1, 2), summary={"_step": 9})
    done = export(server, folder, "-p", "p", "--include-history")
    assert done.code == 0
    assert "odd one" in done.err
    assert metadata(folder, "p")["history_unconfirmed"] == [{"id": "unsure", "name": "odd one"}]
    assert_complete(history(folder), server)
    server.stats.reset()
    export(server, folder, "-p", "p", "--include-history")
    assert server.stats.requests["parquet"] == 1
    server.update_run(TEAM, "p", "unsure", summary={"_step": 2}, heartbeat_at="2026-01-01T00:00:00Z")
    good(export(server, folder, "-p", "p", "--include-history"))
    assert metadata(folder, "p")["history_unconfirmed"] == []


# ---------------------------------------------------------------- cost, caches


def test_many_addresses_per_request(server, folder):
    for n in range(60):
        add(server, f"r{n:02}", steps(*range(10)))
    good(export(server, folder, "-p", "p", "--include-history", "-q"))
    graphql = server.stats.total - server.stats.requests["parquet"]
    assert server.stats.requests["parquet"] == 60
    assert graphql <= 6 + 3  # one per ten runs, and the runs themselves
    assert_complete(history(folder), server)


def test_row_groups_stay_bounded(server, folder):
    """No run's history is held whole: the row groups of the file, which are what is held, do not grow with it."""
    server.fill(TEAM, "p", 3, 2, 2)
    server.fill_history(TEAM, "p", rows=60_000, keys=100, fill=0.03, live_rows=100)
    done = export(server, folder, "-p", "p", "--include-history", "-q")
    assert done.code == 0
    file = pq.ParquetFile(folder / f"{TEAM}_p_history.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(groups) == 180_000
    assert max(groups) * len(file.schema_arrow.names) < 10_000_000
    table = file.read(columns=["run_id", "_step"])
    assert table["_step"].to_pylist() == [*range(60_000)] * 3
    source = server.runs(TEAM, "p")[0].history.source
    one = pq.read_table(folder / f"{TEAM}_p_history.parquet", filters=[("run_id", "==", server.runs(TEAM, "p")[0].id)])
    for name in source.column_names:
        if not name.startswith("_"):
            assert one[name].to_pylist() == source[name].cast(pa.float64()).to_pylist()


def test_the_users_wandb_cache_is_neither_read_nor_touched(server, folder, tmp_path):
    add(server, "a", steps(*range(10)))
    cache = tmp_path / "home" / ".cache" / "wandb"
    poisoned = cache / "runhistory" / TEAM / "p" / "a" / "0000.parquet"
    poisoned.parent.mkdir(parents=True)
    poisoned.write_bytes(b"")
    good(export(server, folder, "-p", "p", "--include-history", WANDB_CACHE_DIR=str(cache)))
    assert_complete(history(folder), server)
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == [poisoned]
    assert poisoned.read_bytes() == b""


def test_rows_logged_while_the_history_is_fetched(server, folder):
    """Rows that come in the middle may be there or not; then they are, and none is there twice."""
    for n in range(20):
        add(server, f"r{n:02}", steps(*range(50)), state="running", exported_steps=20)
    server.weather.latency = 0.02
    stop = threading.Event()

    def log() -> None:
        length = 50
        while not stop.wait(0.002):
            length += 1
            for n in range(20):
                server.update_run(TEAM, "p", f"r{n:02}", history=steps(*range(length)), summary={"_step": length - 1})

    thread = threading.Thread(target=log)
    thread.start()
    done = export(server, folder, "-p", "p", "--include-history")
    stop.set()
    thread.join()
    assert done.code == 0
    ids = list(zip(*(history(folder)[name].to_pylist() for name in ("run_id", "_step")), strict=True))
    assert len(ids) == len(set(ids)) >= 1000
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)
