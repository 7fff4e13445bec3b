"""export_runs.py --offline: run folders in place of the server.

The proof: one training script, run once online against the server and once offline, comes to the same files. And random
logs, which `wandb sync` brings to the server, are read as the server has them then.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import Done, assert_same, clean_env, export, good, leftovers, load_script, metadata, read, run_script
from conftest import server as server  # a fixture
from wandb.proto import wandb_internal_pb2 as pb
from wandb_server import KEY, WandbServer

script = load_script("export_runs.py")
TEAM = "graph_denoise_team"
BLOCK = 32_768


# ---------------------------------------------------------------- logs as W&B's client writes them


def log_bytes(records: Iterable[pb.Record]) -> bytes:
    """The log of these records."""
    log = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        data, kinds = record.SerializeToString(), (1, 2)
        while True:
            left = BLOCK - len(log) % BLOCK
            if left < 7:
                log += bytes(left)
                continue
            part, data = data[: left - 7], data[left - 7 :]
            chunk = bytes([kinds[bool(data)]]) + part
            log += struct.pack("<IH", zlib.crc32(chunk), len(part)) + chunk
            kinds = (4, 3)
            if not data:
                break
    return bytes(log)


def write_log(folder: Path, records: Iterable[pb.Record], name: str = "", prefix: str = "offline-run") -> Path:
    """Write a run's folder into `folder`, as `wandb/` holds them; returns the log's path."""
    records = list(records)
    run = next(record.run.run_id for record in records if record.HasField("run"))
    path = folder / f"{prefix}-{name or '20250101_000000'}-{run}" / f"run-{run}.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(log_bytes(records))
    return path


def run_record(run: str, config: dict[str, Any] | None = None, started: float = 1.7e9, **fields: Any) -> pb.Record:
    """What a log begins with."""
    record = pb.RunRecord(run_id=run, **{"entity": TEAM, "project": "odd"} | fields)
    record.start_time.FromNanoseconds(int(started * 1e9))
    for key, value in (config or {}).items():
        record.config.update.add(key=key, value_json=json.dumps(value))
    return pb.Record(run=record)


def fill(items: Any, values: dict[tuple[str, ...], str], nested: bool = True) -> None:
    """Add config, summary or history items: the JSON text of each path; one-part paths as `key` unless `nested`."""
    for path, text in values.items():
        item = items.add(value_json=text)
        if nested or len(path) > 1:
            item.nested_key.extend(path)
        else:
            item.key = path[0]


def row_records(step: int, row: dict[str, Any], **summary: Any) -> list[pb.Record]:
    """A logged row as W&B's core writes it: what changes in the summary, then the row."""
    texts = {(key,): json.dumps(value) for key, value in {**row, "_step": step}.items()}
    told, logged = pb.SummaryRecord(), pb.HistoryRecord()
    fill(told.update, texts | {(key,): json.dumps(value) for key, value in summary.items()})
    fill(logged.item, texts)
    logged.step.num = step
    return [pb.Record(summary=told), pb.Record(history=logged)]


def exit_record(code: int = 0) -> pb.Record:
    return pb.Record(exit=pb.RunExitRecord(exit_code=code))


def simple_run(run: str, rows: int = 3, **fields: Any) -> list[pb.Record]:
    """A finished run with rows of `loss`."""
    logged = [record for step in range(rows) for record in row_records(step, {"loss": 1 / (step + 1)})]
    return [run_record(run, {"lr": 0.1}, **fields), *logged, exit_record()]


def read_runs(*paths: Path) -> dict[str, dict[str, Any]]:
    """Run id -> what the logs in these folders come to; nothing may be wrong with them."""
    folders = script.Folders(list(paths))
    runs = {run: read_run(logs, folders.damage) for own in folders.runs.values() for run, logs in own.items()}
    assert not folders.damage
    return runs


def read_run(logs: list[Any], damage: dict[Path, str]) -> dict[str, Any]:
    """What the logs of a run come to: the node with its JSON read, and its rows, without nested dicts and nulls."""
    node = script.read_run_logs(logs, damage)
    rows = [plain_row(row) for rows in script.read_logged(logs) for row in rows]
    config = {key: value["value"] for key, value in json.loads(node["config"]).items()}
    node |= {"config": config, "summary": json.loads(node["summaryMetrics"]), "history": rows}
    return node | {"tags": list(node["tags"] or [])}


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in script.dotted(row).items() if value is not None}


# ---------------------------------------------------------------- random logs, as `wandb sync` reads them

NAMES = ["a", "b", "c", "a.b", "x/y", "z w", "é", "_p"]


def random_text(rng: random.Random, depth: int = 0) -> str:
    """The JSON text of a value."""
    if depth < 3 and rng.random() < 0.2:
        inside = [f"{json.dumps(name)}: {random_text(rng, depth + 1)}" for name in rng.sample(NAMES, rng.randrange(3))]
        return f"{{{', '.join(inside)}}}"
    texts = ["1", "-2.5", "true", "null", '"s"', '"NaN"', "NaN", "-Infinity", "1.0", "1e5", '[1, NaN, {"q": null}]']
    return rng.choice([*texts, str(rng.randrange(2**70))])


def random_path(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choice(NAMES) for _ in range(rng.choice([1, 1, 1, 2, 3])))


def random_config(rng: random.Random) -> pb.Record:
    """Any values at any paths, then some removed."""
    change = pb.ConfigRecord()
    fill(change.update, {random_path(rng): random_text(rng) for _ in range(rng.randrange(4))}, rng.random() < 0.5)
    fill(change.remove, {random_path(rng): "" for _ in range(rng.randrange(2))})
    return pb.Record(config=change)


def random_summary(rng: random.Random) -> pb.Record:
    """Values at paths where only a value, or only branches, ever stood; then one removed."""
    change = pb.SummaryRecord()
    paths = [("a",), ("b",), ("c",), ("x/y", "q"), ("x/y", "r"), ("x/y", "d", "a.b"), ("", "k")]
    fill(change.update, {rng.choice(paths): random_text(rng) for _ in range(rng.randrange(4))}, rng.random() < 0.5)
    if rng.random() < 0.3:
        fill(change.remove, {rng.choice([("a",), ("x/y", "q"), ("x/y", "d", "no"), ("b", "no")]): ""})
    return pb.Record(summary=change)


def random_metric(rng: random.Random) -> pb.Record:
    """A call of `define_metric`."""
    name = {"glob_name": rng.choice("pq") + "/*"} if rng.random() < 0.3 else {"name": rng.choice("pqrs")}
    metric = pb.MetricRecord(**name, step_metric=rng.choice(["", "", "p", "q", "t"]), goal=rng.choice([0, 0, 1, 2]))
    metric.options.defined = True
    metric.options.hidden, metric.options.step_sync = rng.random() < 0.3, bool(metric.step_metric)
    metric._control.overwrite = rng.random() < 0.3
    for what in rng.sample(["min", "max", "mean", "best", "last", "copy", "first"], rng.randrange(4)):
        setattr(metric.summary, what, True)
    return pb.Record(metric=metric)


def random_row(rng: random.Random, step: int) -> list[pb.Record]:
    """A row with any values, none in the place of another."""
    row: dict[tuple[str, ...], str] = {}
    for _ in range(rng.randrange(6)):
        text = random_text(rng)
        path = (*random_path(rng), *(["z"] if text[0] == "{" else []))
        if not any(path[: len(other)] == other or other[: len(path)] == path for other in row):
            row[path] = text
    told, logged = pb.SummaryRecord(), pb.HistoryRecord()
    fill(told.update, {("_step",): str(step)})
    fill(logged.item, row, rng.random() < 0.7)
    fill(logged.item, {("_step",): str(step)})
    logged.step.num = step
    return [pb.Record(summary=told), pb.Record(history=logged)]


def random_records(run: str, rng: random.Random) -> list[pb.Record]:
    """A log of anything, whose steps may repeat or fall behind."""
    config = {rng.choice(NAMES): json.loads(random_text(rng)) for _ in range(rng.randrange(4))}
    texts = {"notes": rng.choice(["", "n"]), "display_name": run, "run_group": "g"}
    records = [run_record(run, config, tags=rng.sample("abc", rng.randrange(3)), **texts)]
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.5:
            records += random_row(rng, rng.randrange(8))
        else:
            records.append(rng.choice([random_config, random_summary, random_metric])(rng))
    if rng.random() < 0.3:
        records.append(run_record(run, {"not": "taken"}, display_name=f"{run} renamed", tags=["late"], job_type="j"))
    return [*records, exit_record(rng.choice([0, 0, 1]))]


def comparable(value: Any) -> Any:
    """A value in which 1 is 1.0 and NaN is itself, however they are spelled."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def defined(metrics: list[dict[str, Any]]) -> list[list[Any]]:
    """What `define_metric` said, in any order: name, glob, the step metric's name, options and aggregates.

    Left out is what W&B's core leaves out today (`best`, `copy`, `goal`), and `defined`, which it says of most.
    """
    names = [metric.get("1") or metric["2"] for metric in metrics]
    told = [
        [
            m.get("1"),
            m.get("2"),
            names[m["5"] - 1] if "5" in m else "",
            sorted({*m["6"]} - {3}),
            sorted({*m["7"]} - {4, 7}),
        ]
        for m in metrics
    ]
    return sorted(told, key=repr)


def test_random_logs_as_wandb_sync_reads_them(tmp_path):
    for number in range(70):
        write_log(tmp_path / "wandb", random_records(f"r{number:02}", random.Random(number)))
    nodes = read_runs(tmp_path / "wandb")
    assert len(nodes) == 70
    with WandbServer() as server:
        server.add_project(TEAM, "odd")
        env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_ERROR_REPORTING="false")
        command = [sys.executable, "-m", "wandb", "sync", *map(str, (tmp_path / "wandb").glob("offline-run-*"))]
        synced = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert synced.returncode == 0, synced.stderr
        ends = {name: node["state"] for name, node in nodes.items()}
        patience = time.monotonic() + 20  # the last message of a run may still be on its way when the client has ended
        while any(run.state != ends[run.id] for run in server.runs(TEAM, "odd")) and time.monotonic() < patience:
            time.sleep(0.1)
        for run in server.runs(TEAM, "odd"):
            node, config = nodes.pop(run.id), run.config
            about, own = config.pop("_wandb"), node["config"].pop("_wandb")
            rows = [plain_row(row) for row in run.history.source] if run.history else []
            step = {"_step": rows[-1]["_step"]} if rows else {}
            assert comparable(node["config"]) == comparable(config), run.id
            assert comparable(node["summary"]) == comparable(run.summary | step), run.id
            assert comparable(node["history"]) == comparable(rows), run.id
            assert defined(own["m"]) == defined(about["m"]), run.id
            theirs = [run.state, run.display_name, list(run.tags), run.group, run.job_type, run.notes, run.line_count]
            mine = ["state", "displayName", "tags", "group", "jobType", "notes", "historyLineCount"]
            assert [node[name] for name in mine] == theirs, run.id
    assert not nodes


# ---------------------------------------------------------------- damaged logs


def records_of(path: Path) -> tuple[list[pb.Record], str | None]:
    """The records that are read from a log, and what is said to be wrong with it."""
    damage: dict[Path, str] = {}
    records = list(script.read_log(path, damage))
    return records, damage.get(path)


def long_records() -> list[pb.Record]:
    """Records of a few bytes to a few blocks."""
    sizes = [10, BLOCK - 60, 5, 0, 3 * BLOCK, 30, BLOCK // 2, 7, 40_000, 12]
    return [run_record("long"), *(pb.Record(num=n, output=pb.OutputRecord(line="x" * s)) for n, s in enumerate(sizes))]


def test_records_of_any_length_and_blocks_of_any_fill(tmp_path):
    for size in range(BLOCK - 80, BLOCK - 20):  # the second record begins at any byte around a block's end
        records = [pb.Record(output=pb.OutputRecord(line="x" * size)), *simple_run("r", 2)]
        (tmp_path / "log").write_bytes(log_bytes(records))
        assert records_of(tmp_path / "log") == (records, None)
    (tmp_path / "log").write_bytes(log_bytes(long_records()))
    assert records_of(tmp_path / "log") == (long_records(), None)


def test_a_log_that_is_cut_off_anywhere_gives_the_records_before(tmp_path):
    path = tmp_path / "log"
    records = simple_run("r", 2)
    whole = log_bytes(records)
    ends = {len(log_bytes(records[:n])): n for n in range(len(records) + 1)}
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        read, wrong = records_of(path)
        assert read == records[: max([n for end, n in ends.items() if end <= size], default=0)]
        if size < 7:
            assert wrong == ("is no run log in the format that this script knows" if size else "is empty")
        else:
            assert wrong == (None if size in ends else "is cut off in mid-record")
    records = long_records()
    whole = log_bytes(records)
    for size in range(BLOCK - 3, len(whole), 4999):
        path.write_bytes(whole[:size])
        read, wrong = records_of(path)
        assert read == [record for n, record in enumerate(records) if len(log_bytes(records[: n + 1])) <= size]
        assert wrong == "is cut off in mid-record"


def test_a_flipped_bit_costs_the_record_that_it_is_in(tmp_path):
    path = tmp_path / "log"
    records = simple_run("r", 6)
    whole = log_bytes(records)
    ends = [len(log_bytes(records[: n + 1])) for n in range(len(records))]
    for place in range(7, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        hit = next(n for n, end in enumerate(ends) if place < end)
        last = hit == len(records) - 1
        assert records_of(path) == (
            records[:hit] + records[hit + 1 :],
            "is cut off in mid-record" if last else "is damaged in 1 place",
        )
    records = long_records()
    whole = log_bytes(records)
    ends = [len(log_bytes(records[: n + 1])) for n in range(len(records))]
    for place in range(7, len(whole), 49_999):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        read, wrong = records_of(path)
        hit = next(n for n, end in enumerate(ends) if place < end)
        padding = len(log_bytes(records[:hit])) <= place < ends[hit] and read == records
        assert padding or (read == records[:hit] + records[hit + 1 :] and wrong), place


def test_damage_at_several_places_and_a_tail_of_zeros(tmp_path):
    path = tmp_path / "log"
    records = simple_run("r", 6)
    damaged = bytearray(log_bytes(records))
    for n in (3, 7):
        damaged[len(log_bytes(records[:n])) + 20] ^= 1
    path.write_bytes(bytes(damaged))
    kept = [record for n, record in enumerate(records) if n not in (3, 7)]
    assert records_of(path) == (kept, "is damaged in 2 places")
    path.write_bytes(bytes(damaged) + bytes(200_000))
    read, wrong = records_of(path)
    assert read == kept
    assert re.fullmatch(r"is damaged in \d places", wrong)


def test_files_that_are_no_logs(tmp_path):
    path = tmp_path / "log"
    other = log_bytes(simple_run("r"))
    for data, wrong in (
        (b"", "is empty"),
        (other[:6] + b"\1" + other[7:], "is no run log in the format that this script knows"),
        (b"PAR1" * 100, "is no run log in the format that this script knows"),
    ):
        path.write_bytes(data)
        assert records_of(path) == ([], wrong)
    (tmp_path / "run.wandb").write_bytes(log_bytes([exit_record()]))
    folders = script.Folders([tmp_path])
    assert (folders.runs, folders.damage) == ({}, {tmp_path / "run.wandb": "tells of no run"})


# ---------------------------------------------------------------- what the sessions of a run come to


def set_age(path: Path, seconds: float) -> None:
    """Let a log have been changed so many seconds ago."""
    at = time.time() - seconds
    os.utime(path, (at, at))


@pytest.mark.parametrize(
    ("last", "age", "state"),
    [
        ([exit_record()], 5, "finished"),
        ([exit_record(3)], 1e6, "failed"),
        ([], 300, "running"),
        ([], 900, "crashed"),
    ],
)
def test_the_state_is_that_of_the_exit_record_or_of_the_files_age(tmp_path, last, age, state):
    path = write_log(tmp_path, [*simple_run("r")[:-1], *last])
    set_age(path, age)
    node = read_runs(tmp_path)["r"]
    assert node["state"] == state
    assert datetime.fromisoformat(node["heartbeatAt"]).timestamp() == pytest.approx(path.stat().st_mtime, abs=1e-5)
    assert node["createdAt"] == "2023-11-14T22:13:20+00:00"


def test_the_last_record_of_a_run_that_goes_on_may_be_on_its_way(tmp_path):
    path = write_log(tmp_path, simple_run("r"))
    path.write_bytes(path.read_bytes()[:-20])
    assert read_runs(tmp_path)["r"]["state"] == "running"  # nothing is wrong with it
    set_age(path, 900)
    folders = script.Folders([tmp_path])
    node = read_run(folders.runs[TEAM, "odd"]["r"], folders.damage)
    assert (node["state"], node["historyLineCount"]) == ("crashed", 2)
    assert folders.damage == {path: "is cut off in mid-record"}


def test_folders_of_runs_and_copies_of_sessions(tmp_path):
    whole = write_log(tmp_path / "wandb", simple_run("a", 5, started=1e9))
    write_log(tmp_path / "wandb", simple_run("b", 1, started=2e9), prefix="run")
    write_log(tmp_path / "wandb", simple_run("c", 1, started=3e9), prefix="other")
    (tmp_path / "wandb" / "latest-run").symlink_to(whole.parent, target_is_directory=True)
    copy = tmp_path / "copy" / whole.parent.name / whole.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(whole.read_bytes()[:-40])  # synced while the run went on
    runs = read_runs(tmp_path / "copy", tmp_path / "wandb", tmp_path / "wandb" / "latest-run", tmp_path / "none")
    assert list(runs) == ["a", "b"]
    assert runs["a"]["historyLineCount"] == 5
    assert list(read_runs(whole.parent)) == ["a"]


def test_sessions_of_a_resumed_run(tmp_path):
    first = [run_record("r", {"lr": 1, "m": {"a": 1, "b": 2}, "once": 1}, 1e9, tags=["x"], notes="n", run_group="g")]
    first += [*row_records(0, {"loss": 3, "a": 1}), *row_records(5, {"loss": 2}, best=2), exit_record(1)]
    second = [run_record("r", {"lr": 2, "m": {"a": 9}}, 2e9, tags=["y"], display_name="named", resume=True)]
    second += [*row_records(0, {"loss": 1}), *row_records(9, {"loss": 0.5}, late=1), exit_record()]
    write_log(tmp_path, second, "20250102_000000")
    write_log(tmp_path, first, "20250101_000000")
    node = read_runs(tmp_path)["r"]
    assert [(row["_step"], row["loss"]) for row in node["history"]] == [(0, 3), (5, 2), (6, 1), (9, 0.5)]
    assert node["summary"] == {"loss": 0.5, "a": 1, "best": 2, "late": 1, "_step": 9}
    assert {key: value for key, value in node["config"].items() if key != "_wandb"} == {
        "lr": 2,
        "m": {"a": 9},
        "once": 1,
    }
    assert [node[name] for name in ("tags", "notes", "group", "displayName")] == [["y"], "n", "g", "named"]
    assert (node["state"], node["historyLineCount"]) == ("finished", 4)
    assert node["createdAt"].startswith("2001-09-09")


def test_logs_of_clients_before_0_17(tmp_path):
    """They spell every path as a key, and write the summary when the run ends, if it ever does."""
    rows = []
    for step in range(3):
        logged = pb.HistoryRecord()
        texts = {
            "loss": f"{3 - step}.0",
            "nest": f'{{"a": {{"b": {step}}}}}',
            "_step": str(step),
            "h": '{"_type": "histogram"}',
        }
        fill(logged.item, {(key,): text for key, text in texts.items()}, nested=False)
        logged.step.num = step
        rows.append(pb.Record(history=logged))
    told = pb.SummaryRecord()
    fill(told.update, {("loss",): '{"min": 1.0}', ("_step",): "2", ("by hand",): "4"}, nested=False)
    write_log(tmp_path, [run_record("done"), *rows, exit_record(), pb.Record(summary=told)])
    crashed = write_log(tmp_path, [run_record("cut"), *rows])
    set_age(crashed, 900)
    nodes = read_runs(tmp_path)
    assert nodes["done"]["summary"] == {"loss": {"min": 1}, "_step": 2, "by hand": 4}
    assert nodes["cut"]["summary"] == {"loss": 1, "nest": {"a": {"b": 2}}, "_step": 2, "h": {"_type": "histogram"}}
    assert nodes["cut"]["history"][1] == {"loss": 2, "nest.a.b": 1, "_step": 1, "h": {"_type": "histogram"}}


# ---------------------------------------------------------------- one script, online and offline


def train(mode: str) -> None:
    """Log runs of all kinds. Runs in its own process, in a folder where `wandb/` is to be."""
    import numpy as np
    import wandb

    def start(run: str, **about: Any) -> Any:
        settings = {"console": "off", "x_disable_stats": True, "disable_git": True} | about.pop("settings", {})
        about = {"entity": TEAM, "project": "lab", "id": run, "name": run, "mode": mode} | about
        return wandb.init(settings=wandb.Settings(**settings), **about)

    image = np.zeros((4, 4, 3), np.uint8)
    config = {"lr": 1e-3, "model": {"k": 8, "deep": {"list": [1, {"a": None}]}, "empty": {}}, "ünï/c d.e": "日本語 😀"}
    config |= {"on": True, "none": None, "inf": math.inf, "tuple": (1, 2), "f32": np.float32(0.1), "i": np.int64(3)}
    config |= {"big": 2**62, "array": np.arange(3), "path": Path("/data/x"), "text": "a\nb"}
    about = {"tags": ["b", "a", "ä/ö"], "group": "g/1", "job_type": "train", "notes": "n\nm"}
    with start("full", config=config, **about) as run:
        run.define_metric("epoch")
        run.define_metric("val/loss", step_metric="epoch", summary="min,max,mean,last,first")
        run.define_metric("val/acc", step_metric="epoch", step_sync=False, summary="max", hidden=True)
        run.define_metric("test/*", step_metric="epoch", summary="min")
        run.define_metric("silent", summary="none")
        run.define_metric("nested.a", summary="max")
        for epoch in range(4):
            row = {"loss": 1 / (epoch + 1), "epoch": epoch * 10, "val/loss": [3, 1, 2, 4][epoch], "val/acc": epoch / 7}
            row |= {
                "test/x y": 3 - epoch,
                "silent": epoch,
                "nested": {"a": epoch, "b": {"c.d": -epoch}},
                "on": epoch > 1,
            }
            row |= {
                "nan": math.nan,
                "inf": -math.inf,
                "f32": np.float32(0.1),
                "f64": np.float64(epoch),
                "i": np.int8(epoch),
            }
            run.log(row | {"word": f"w{epoch}", "list": [epoch, 2.5, "x"], "array": np.ones(2), "big": 2**60 + epoch})
        run.log({"val/loss": 0.5})  # `epoch` fills in
        run.config.update({"late": 1, "model": {"k": 9}}, allow_val_change=True)
        run.config["later"] = {"a": {"b": 1}}
        run.log(
            {"image": wandb.Image(image), "images": [wandb.Image(image)] * 2, "histogram": wandb.Histogram([1, 2, 2])}
        )
        run.log({"table": wandb.Table(columns=["a", "b"], data=[[1, "x"]]), "html": wandb.Html("<p>x</p>")})
        run.log({"x": 1, "gone": None}, step=20)
        run.log({"y": 2}, step=20)
        run.log({"x": 3}, commit=False)
        run.log({"loss": None})
        run.summary["best"] = 0.25
        run.summary["by hand"] = {"a": {"b": 1}, "n": [math.nan]}
        run.summary["by hand"]["c"] = 2
        run.summary.update({"u": True, "loss": 99, "temporary": 1})
        del run.summary["temporary"]
        run.log({"loss": 0.01})
        run.tags += ("late",)
        run.notes = "changed"
    for session in range(2):
        about = {"config": {"lr": session, "model": {f"k{session}": 1}, f"only{session}": 1}, "resume": "allow"}
        with start("resumed", group="g", tags=["r"], **about) as run:
            run.define_metric("loss", summary="min,mean,last")
            for n in range(3):
                run.log({"loss": n + session, f"of{session}": n})
            run.summary[f"done{session}"] = session
    git = {"disable_git": False, "git_root": os.environ["REPO"]}
    with start("failed", job_type="wide", config={"long": "x" * 100_000}, settings=git) as run:
        run.log({f"m{n}": n for n in range(300)}, step=5)
        run.log({"long": "y" * 100_000, "m0": 1}, step=900)
        table = wandb.Table(columns=["x", "y"], data=[[1, 2]])
        run.log({"plot": wandb.plot.line(table, "x", "y")})
        run.finish(exit_code=3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WandbServer, Path]]:
    """The server with the runs of `train`, and the folder with those that it logged offline."""
    folder = tmp_path_factory.mktemp("lab")
    git = ["git", "-c", "user.email=a@b", "-c", "user.name=c"]
    subprocess.run([*git, "init", "-q", folder / "repo"], check=True)
    subprocess.run([*git, "-C", folder / "repo", "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    subprocess.run([*git, "-C", folder / "repo", "remote", "add", "origin", "https://example.com/lab"], check=True)
    with WandbServer() as server:
        server.add_project(TEAM, "lab")
        processes = []
        for mode in ("online", "offline"):
            (folder / mode).mkdir()
            env = clean_env(folder / mode, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_SILENT="true")
            env |= {"WANDB_ERROR_REPORTING": "false", "REPO": str(folder / "repo")}
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
            command = [sys.executable, "-c", f"{code}import test_export_offline as t; t.train({mode!r})"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, cwd=folder / mode, env=env, **pipes))
        for process in processes:
            said, _ = process.communicate(timeout=200)
            assert process.returncode == 0, said
        yield server, folder / "offline" / "wandb"


def offline(folder: Path, *args: object, source: Path | Sequence[Path] = (), **env: str) -> Done:
    """Run export_runs.py --offline SOURCE -o FOLDER without a key, with an address where nothing listens."""
    nowhere = SimpleNamespace(url="http://127.0.0.1:9")
    sources = [source] if isinstance(source, Path) else source
    given = [text for path in sources for text in ("--offline", str(path))]
    return export(nowhere, folder, *given, *map(str, args), entity="", key="no key", WANDB_API_KEY="", **env)


TIMES = ("created_at", "heartbeat_at", "runtime_seconds", "_timestamp", "_runtime")


def without_times(value: Any) -> Any:
    """JSON without what differs from one run of the script to the next."""
    if isinstance(value, dict):
        changing = {*TIMES, "_wandb", "artifact_path", "_latest_artifact_path"}
        return {key: without_times(item) for key, item in value.items() if key not in changing}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.mark.timeout(240)  # the client alone takes half a minute where the machine is busy
def test_a_script_gives_the_same_files_online_and_offline(lab, tmp_path):
    server, logs = lab
    good(export(server, tmp_path / "online", "-p", "lab", "--include-history"))
    done = good(offline(tmp_path / "offline", "--include-history", source=logs))
    assert "Saved 3 runs to" in done.err
    theirs, ours = read(tmp_path / "online", "lab"), read(tmp_path / "offline", "lab")
    assert theirs.schema.names == ours.schema.names
    assert [(f.name, f.type) for f in theirs.schema] == [(f.name, f.type) for f in ours.schema]
    expected = {row["id"]: row for row in theirs.to_pylist()}
    assert len(expected) == 3
    for row in ours.to_pylist():
        wanted = expected.pop(row["id"])
        for name in row.keys() - {*TIMES, "url", "user", "_config_json", "_summary_json"}:
            assert repr(row[name]) == repr(wanted[name]), (row["id"], name)
        for name in ("_config_json", "_summary_json"):
            mine, yours = json.loads(row[name]), json.loads(wanted[name])
            assert comparable(without_times(mine)) == comparable(without_times(yours)), (row["id"], name)
            if name == "_config_json":
                mine, yours = mine["_wandb"], yours["_wandb"]
                assert defined(mine.pop("m")) == defined(yours.pop("m"))
                if row["id"] == "full":  # what the client finds out about the machine comes late for the short ones
                    [machine], [other] = mine["e"].values(), yours["e"].values()
                    assert machine.keys() == other.keys()
                mine.pop("e", None), yours.pop("e", None)
                assert yours.pop("t")  # telemetry, of which a log knows less
                assert mine == yours
        assert row["url"] is row["user"] is None
        assert 0 <= row["runtime_seconds"] < 60
        assert abs((row["created_at"] - wanted["created_at"]).total_seconds()) < 60
        assert abs((row["heartbeat_at"] - wanted["heartbeat_at"]).total_seconds()) < 60
    assert not expected
    assert_same_history(tmp_path / "online", tmp_path / "offline", "lab")
    about, other = metadata(tmp_path / "offline", "lab"), metadata(tmp_path / "online", "lab")
    for name in ("entity", "project", "wandb_version", "total_runs", "runs_by_state", "history_rows", "columns"):
        assert about[name] == other[name], name
    assert about["base_url"] is None
    assert leftovers(tmp_path / "offline") == []


def assert_same_history(left: Path, right: Path, project: str) -> None:
    """The history files are equal but for times, the order of media's keys, and how W&B calls a table's artifact."""
    tables = [pq.read_table(folder / f"{TEAM}_{project}_history.parquet") for folder in (left, right)]
    assert tables[0].schema == tables[1].schema
    for name in set(tables[0].column_names) - set(TIMES):
        a, b = (table[name].to_pylist() for table in tables)
        if repr(a) != repr(b):
            read = [without_times(json.loads(text)) if text else None for text in [*a, *b]]
            assert read[: len(a)] == read[len(a) :], name
    for name in ("_timestamp", "_runtime"):
        a, b = (table[name].to_pylist() for table in tables)
        assert all(abs(one - other) < 60 for one, other in zip(a, b, strict=True))


# ---------------------------------------------------------------- the command


def three_projects(folder: Path) -> Path:
    """A folder with runs of two entities and of none, in three projects, created on three days."""
    logs = folder / "wandb"
    write_log(logs, simple_run("a", 3, started=1.7e9, tags=["x"], display_name="first"))
    write_log(logs, [*simple_run("b", 2, started=1.7e9 + 86_400, tags=["x", "y"])[:-1], exit_record(1)])
    write_log(logs, simple_run("c", 1, started=1.7e9 + 2 * 86_400, project="odder"))
    write_log(logs, simple_run("d", 1, entity="rival"))
    write_log(logs, simple_run("e", 1, entity="", project=""))
    return logs


def ids(folder: Path, project: str, entity: str = TEAM) -> list[str]:
    return read(folder, project, entity)["id"].to_pylist()


def test_projects_are_those_that_the_runs_recorded(tmp_path):
    logs = three_projects(tmp_path)
    done = good(offline(tmp_path / "all", source=logs))
    files = {path.name.removesuffix("_runs.parquet") for path in (tmp_path / "all").glob("*_runs.parquet")}
    assert files == {f"{TEAM}_odd", f"{TEAM}_odder", "rival_odd", "offline_uncategorized"}
    assert "Using 5 run logs in " in done.err
    good(offline(tmp_path / "env", source=logs, WANDB_ENTITY="me,you"))
    assert ids(tmp_path / "env", "uncategorized", "me") == ["e"]
    for args, found in (
        (["-e", TEAM], {f"{TEAM}_odd", f"{TEAM}_odder"}),
        (["-e", TEAM, "-p", "odd"], {f"{TEAM}_odd"}),
        (["-p", "odd*"], {f"{TEAM}_odd", f"{TEAM}_odder", "rival_odd"}),
        (["-e", f"{TEAM}/odder", "-e", "rival"], {f"{TEAM}_odder", "rival_odd"}),
    ):
        folder = tmp_path / "_".join(args).replace("/", "_").replace("*", "_")
        good(offline(folder, *args, source=logs))
        assert {path.name.removesuffix("_runs.parquet") for path in folder.glob("*_runs.parquet")} == found
    for args in (["-e", "rivals"], ["-p", "od"], ["-e", "rival", "-p", "odder"]):
        done = offline(tmp_path / "none", *args, source=logs)
        assert done.code == 2
        assert "rival/odd" in done.err
        assert not (tmp_path / "none").exists()


def test_folders_that_hold_no_logs(tmp_path):
    done = offline(tmp_path / "out", source=tmp_path / "no such")
    assert (done.code, "no such" in done.err, done.err.count("\n")) == (2, True, 1)
    done = offline(tmp_path / "out", source=tmp_path)
    assert (done.code, "Name one like wandb/" in done.err) == (2, True)


def test_filters(tmp_path):
    logs = three_projects(tmp_path)
    for number, (args, found) in enumerate(
        [
            (["--since", "2023-11-15"], ["b"]),
            (["--until", "2023-11-15"], ["a"]),
            (["--since", "2023-11-14T22:13:20", "--until", "2023-11-15T22:13:20"], ["a"]),
            (["--state", "failed"], ["b"]),
            (["--state", "all"], ["a", "b"]),
            (["--tag", "y", "--tag", "z"], ["b"]),
            (["--tag", "x", "--state", "finished"], ["a"]),
        ]
    ):
        good(offline(tmp_path / str(number), "-e", TEAM, "-p", "odd", *args, source=logs))
        assert ids(tmp_path / str(number), "odd") == found
    done = offline(tmp_path / "none", "-e", TEAM, "--state", "crashed", source=logs)
    assert (done.code, "no runs that match" in done.err) == (1, True)
    folder = tmp_path / "grows"  # filters limit what is read; what is there stays
    good(offline(folder, "-e", TEAM, "--state", "failed", "--include-history", source=logs))
    good(offline(folder, "-e", TEAM, "--tag", "x", "--until", "2023-11-15", "--include-history", source=logs))
    assert ids(folder, "odd") == ["a", "b"]
    history = pq.read_table(folder / f"{TEAM}_odd_history.parquet")
    assert history["run_id"].to_pylist() == ["a", "a", "a", "b", "b"]


def test_a_project_whose_name_reads_like_a_glob(tmp_path):
    write_log(tmp_path / "wandb", [run_record("r", project="exp[1]"), exit_record()])
    good(offline(tmp_path / "out", "-p", "exp[1]", source=tmp_path / "wandb"))
    assert ids(tmp_path / "out", "exp[1]") == ["r"]


def test_history_keys_and_quiet_and_dry_run(tmp_path):
    rows = [*row_records(0, {"loss": 1, "val/a": 2}), *row_records(1, {"loss": 1}), *row_records(2, {"val/b": "x"})]
    write_log(tmp_path / "wandb", [run_record("r"), *rows, exit_record()])
    done = good(offline(tmp_path / "out", "--include-history", "--dry-run", source=tmp_path / "wandb"))
    assert done.out == f"{TEAM}/odd: would fetch 1 of 1 runs, and the history of up to 1\n"
    assert not (tmp_path / "out").exists()
    keys = ["--include-history", "--history-keys", "val/*", "-q"]
    done = good(offline(tmp_path / "out", *keys, source=tmp_path / "wandb"))
    assert (done.out, done.err) == ("", "")
    table = pq.read_table(tmp_path / "out" / f"{TEAM}_odd_history.parquet")
    assert table.column_names[4:] == ["_step", "_timestamp", "_runtime", "val/a", "val/b"]
    assert table["val/a"].to_pylist() == [2, None]
    assert table["val/b"].to_pylist() == [None, "x"]
    done = good(offline(tmp_path / "out", "--dry-run", source=tmp_path / "wandb"))
    assert done.out == f"{TEAM}/odd: would fetch 0 of 1 runs\n"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the runs whose logs are read, in order, once for the run and once for its history."""
    read_ids: list[str] = []
    run, history = script.read_run_logs, script.read_logged
    monkeypatch.setattr(script, "read_run_logs", lambda logs, damage: read_ids.append(logs[0].run) or run(logs, damage))
    monkeypatch.setattr(script, "read_logged", lambda logs: read_ids.append(logs[0].run) or history(logs))
    return read_ids


def test_what_did_not_change_is_not_read_again(tmp_path, reads):
    logs, out = tmp_path / "wandb", tmp_path / "out"
    a, b = (write_log(logs, simple_run(run)) for run in "ab")
    running = write_log(logs, simple_run("c")[:-1])

    def again(*args: str) -> tuple[list[str], str]:
        reads.clear()
        done = good(offline(out, "--include-history", *args, source=logs))
        return sorted(reads), done.err

    assert again()[0] == ["a", "a", "b", "b", "c", "c"]
    assert again()[0] == ["c"]  # it had not ended
    set_age(running, 900)
    assert again()[0] == ["c", "c"]
    assert read(out, "odd")["state"].to_pylist() == ["finished", "finished", "crashed"]
    assert again() == ([], again()[1])
    assert "Up to date: 3 runs in " in again()[1]
    set_age(a, 50)
    assert again()[0] == ["a", "a"]
    status = b.stat()
    b.write_bytes(log_bytes(simple_run("b", 9)))
    os.utime(b, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert again()[0] == ["b", "b"]  # its size tells
    assert read(out, "odd")["history_rows"].to_pylist() == [3, 9, 3]
    write_log(logs, [run_record("a", started=1.8e9), *row_records(0, {"loss": 7}), exit_record()], "second")
    assert again()[0] == ["a", "a"]
    assert again("--full")[0] == ["a", "a", "b", "b", "c", "c"]
    (out / f"{TEAM}_odd_history.parquet").unlink()
    assert again()[0] == ["a", "b", "c"]


def test_an_export_after_changes_equals_a_fresh_one(tmp_path):
    rng = random.Random(7)
    logs: dict[str, list[list[pb.Record]]] = {}
    for round_ in range(6):
        for run in rng.sample("abcdef", 3):
            sessions = logs.setdefault(run, [])
            if not sessions or (sessions[-1][-1].HasField("exit") and rng.random() < 0.5):
                started = 1.7e9 + 1000 * len(sessions) + ord(run)
                sessions.append([run_record(run, {rng.choice("kl"): rng.random()}, started=started)])
            if not sessions[-1][-1].HasField("exit"):
                for step in range(rng.randrange(5)):
                    sessions[-1] += row_records(step, {rng.choice("pq"): rng.choice([1, 0.5, "text"])})
                sessions[-1] += [exit_record(rng.randrange(2))] if rng.random() < 0.5 else []
        for run, sessions in logs.items():
            for number, records in enumerate(sessions):
                path = tmp_path / "wandb" / f"offline-run-{number}-{run}" / f"run-{run}.wandb"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists() or path.read_bytes() != log_bytes(records):
                    path.write_bytes(log_bytes(records))
                    set_age(path, rng.choice([5, 5000]))
        fresh = tmp_path / f"fresh{round_}"
        for folder in (tmp_path / "kept", fresh):
            good(offline(folder, "--include-history", source=tmp_path / "wandb"))
        assert_same(read(tmp_path / "kept", "odd"), read(fresh, "odd"))
        name = f"{TEAM}_odd_history.parquet"
        assert_same(pq.read_table(tmp_path / "kept" / name), pq.read_table(fresh / name))


def test_what_the_server_says_of_a_run_replaces_what_its_log_says_and_stays(tmp_path, server, reads):
    server.add_project(TEAM, "odd")
    server.add_run(
        TEAM,
        "odd",
        name="synced",
        config={"lr": 0.2},
        summary={"loss": 9, "_step": 0},
        history=[{"_step": 0, "loss": 9.0}],
    )
    server.add_run(TEAM, "odd", name="other", config={"lr": 0.3})
    logs, out = tmp_path / "wandb", tmp_path / "out"
    synced = write_log(logs, simple_run("synced", 5))
    write_log(logs, simple_run("never synced", 5))
    history = ["--include-history"]
    good(offline(out, *history, source=logs))
    assert ids(out, "odd") == ["never synced", "synced"]
    done = good(export(server, out, "-p", "odd", *history))
    assert "removed" not in done.err
    rows = {row["id"]: row for row in read(out, "odd").to_pylist()}
    assert (rows["synced"]["config_lr"], rows["synced"]["history_rows"]) == (0.2, 1)
    assert rows["synced"]["url"] == f"{server.url}/{TEAM}/odd/runs/synced"
    assert (rows["never synced"]["config_lr"], rows["never synced"]["url"]) == (0.1, None)
    table = pq.read_table(out / f"{TEAM}_odd_history.parquet")
    assert table.filter(pc.equal(table["run_id"], "synced"))["loss"].to_pylist() == [9.0]
    before = (out / f"{TEAM}_odd_runs.parquet").read_bytes()
    for args in ([], ["--full"], ["--include-history"]):
        reads.clear()
        set_age(synced, 77 + len(args))
        good(offline(out, *args, source=logs))
        assert "synced" not in reads
        assert_same(read(out, "odd"), pq.read_table(io.BytesIO(before)))
    server.delete_run(TEAM, "odd", "other")
    done = good(export(server, out, "-p", "odd"))
    assert "removed 1 that W&B no longer has" in done.err
    assert ids(out, "odd") == ["never synced", "synced"]


def test_damaged_logs_are_named_and_what_is_whole_is_exported(tmp_path, reads):
    logs, out = tmp_path / "wandb", tmp_path / "out"
    good_log = write_log(logs, simple_run("good", 4))
    cut = write_log(logs, simple_run("cut", 4))
    cut.write_bytes(cut.read_bytes()[:-2])
    set_age(cut, 900)
    flipped = write_log(logs, simple_run("flipped", 4))
    data = bytearray(flipped.read_bytes())
    data[len(log_bytes(simple_run("flipped", 4)[:3])) - 3] ^= 4  # in the first row
    flipped.write_bytes(data)
    empty, foreign = (write_log(logs, simple_run(run)) for run in ("empty", "foreign"))
    (folder := logs / "offline-run-2-folder" / "run-folder.wandb").mkdir(parents=True)
    empty.write_bytes(b"")
    foreign.write_bytes(good_log.read_bytes().replace(b":W&B", b":X&B", 1))
    assert offline(out, "--dry-run", source=logs).code == 1
    for _ in range(2):
        reads.clear()
        done = offline(out, "--include-history", source=logs)
        assert done.code == 1
        for path, wrong in (
            (empty, " is empty"),
            (folder, " cannot be read: Is a directory"),
            (foreign, " is no run log in the format that this script knows"),
            (cut, " is cut off in mid-record; what is whole is exported"),
            (flipped, " is damaged in 1 place; what is whole is exported"),
        ):
            assert f"error: {path}{wrong}\n" in done.err
        assert {row["id"]: row["history_rows"] for row in read(out, "odd").to_pylist()} == {
            "cut": 4,
            "flipped": 3,
            "good": 4,
        }
    assert sorted(reads) == ["cut", "flipped"]  # the second time
    assert read(out, "odd").filter(pc.equal(read(out, "odd")["id"], "cut"))["state"].to_pylist() == ["crashed"]
    failed = {run["id"]: run["error"] for run in metadata(out, "odd")["export"]["failed"]}
    assert failed == {"cut": f"{cut} is cut off in mid-record", "flipped": f"{flipped} is damaged in 1 place"}
    history = pq.read_table(out / f"{TEAM}_odd_history.parquet")
    assert history["_step"].to_pylist() == [0, 1, 2, 3, 1, 2, 3, 0, 1, 2, 3]


def test_the_sessions_of_a_run_may_lie_in_several_folders(tmp_path):
    rows = [*row_records(0, {"loss": 1.0}), *row_records(1, {"loss": 0.5})]
    write_log(tmp_path / "one", [run_record("r", started=1e9), *rows, exit_record(1)])
    write_log(tmp_path / "two" / "wandb", [run_record("r", started=2e9), *rows, exit_record()], prefix="run")
    done = good(offline(tmp_path / "out", "--include-history", source=[tmp_path / "one", tmp_path / "two" / "wandb"]))
    assert "Saved 4 history rows to" in done.err
    table = pq.read_table(tmp_path / "out" / f"{TEAM}_odd_history.parquet")
    assert table["_step"].to_pylist() == [0, 1, 2, 3]
    assert read(tmp_path / "out", "odd")["last_step"].to_pylist() == [3]


def test_what_cannot_be_a_run_is_named_and_the_others_are_exported(tmp_path):
    deep = pb.ConfigRecord()
    fill(deep.update, {("deep",): '{"a":' * 20_000 + "1" + "}" * 20_000})
    write_log(tmp_path / "wandb", [run_record("deep"), pb.Record(config=deep), exit_record()])
    write_log(tmp_path / "wandb", [run_record("broken"), *row_records(0, {"a": 1}), exit_record()])
    path = write_log(tmp_path / "wandb", [run_record("no json"), pb.Record(config=pb.ConfigRecord()), exit_record()])
    wrong = pb.ConfigRecord()
    fill(wrong.update, {("a",): "{"})
    path.write_bytes(log_bytes([run_record("no json"), pb.Record(config=wrong), exit_record()]))
    done = offline(tmp_path / "out", source=tmp_path / "wandb")
    assert done.code == 1
    assert ids(tmp_path / "out", "odd") == ["broken"]
    assert {run["id"] for run in metadata(tmp_path / "out", "odd")["export"]["failed"]} == {"deep", "no json"}


def test_system_metrics(tmp_path):
    stats = pb.StatsRecord()
    for key, text in (("gpu.0.temp", "50"), ("cpu", "1.5"), ("cpu", "2.5")):
        stats.item.add(key=key, value_json=text)
    write_log(tmp_path / "wandb", [run_record("r"), pb.Record(stats=stats), exit_record()])
    for args in ([], ["--system-metrics"]):
        good(offline(tmp_path / "out", *args, source=tmp_path / "wandb"))
    table = read(tmp_path / "out", "odd")
    assert (table["system_cpu"].to_pylist(), table["system_gpu_0_temp"].to_pylist()) == ([2.5], [50])


def test_sparse_and_long_histories_come_in_pieces(tmp_path, monkeypatch):
    rows = [record for step in range(300) for record in row_records(step, {f"m{step % 70}": step, "all": step})]
    write_log(tmp_path / "wandb", [run_record("r"), *rows, exit_record()])
    good(offline(tmp_path / "whole", "--include-history", source=tmp_path / "wandb"))
    for name, size in (("HISTORY_CELLS", 2000), ("LOGGED_VALUES", 50)):
        monkeypatch.setattr(script, name, size)
        [logs] = script.Folders([tmp_path / "wandb"]).runs[TEAM, "odd"].values()
        assert len(list(script.read_logged(logs))) > 5
        good(offline(tmp_path / name, "--include-history", source=tmp_path / "wandb"))
        file = f"{TEAM}_odd_history.parquet"
        assert_same(pq.read_table(tmp_path / name / file), pq.read_table(tmp_path / "whole" / file))


def test_no_key_no_network_no_sidecar(tmp_path):
    """As a user runs it, where no name resolves and every process that it starts is seen."""
    logs = three_projects(tmp_path)
    spy = tmp_path / "sitecustomize.py"
    spy.write_text(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event in ('subprocess.Popen', 'os.posix_spawn', 'os.fork', 'socket.connect', 'socket.getaddrinfo'):\n"
        "        sys.stderr.write(f'SEEN {event} {args}')\n"
        "sys.addaudithook(hook)\n"
    )
    env = clean_env(tmp_path, PYTHONPATH=str(tmp_path))
    done = run_script("export_runs.py", "--offline", logs, "--include-history", "-e", TEAM, cwd=tmp_path, env=env)
    assert (done.returncode, "SEEN" in done.stderr) == (0, False), done.stderr
    assert ids(tmp_path / "wandb_export", "odd") == ["a", "b"]
