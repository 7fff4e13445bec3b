"""export_runs.py day after day: an incremental export writes what a full one would have written at that moment."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import TEAM, assert_same, content, export, good, leftovers, metadata, read, runs_file
from wandb_server import StoredRun, WandbServer, iso

# ---------------------------------------------------------------- random days

SECRETS: list[Any] = [
    1,
    0,
    -(2**63),
    2**63,
    10**400,
    2.5,
    1e-7,
    True,
    False,
    None,
    "text",
    "NaN",
    "",
    [1, "x"],
    [],
    "1",
]
NUMBERS: list[Any] = [1, 0.5, "NaN", "-Infinity", True, None, "text", {"min": 1, "max": 2}, {"_type": "table-file"}]


def random_config(rng: random.Random) -> dict[str, Any]:
    """A few keys out of few, so that types mix and columns collide, appear and vanish."""
    config: dict[str, Any] = {}
    for key in rng.sample(["x", "y", "a/b", "a_b", "a.b", "a", "a_b__2"], rng.randint(0, 4)):
        config[key] = {"b": rng.choice(SECRETS), "c": {}} if key == "a" else rng.choice(SECRETS)
    return config


def random_summary(rng: random.Random) -> dict[str, Any]:
    keys = rng.sample(["loss", "test/mse", "test_mse", "test.mse", "acc"], rng.randint(0, 3))
    return {key: rng.choice(NUMBERS) for key in keys}


def random_history(rng: random.Random, rows: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows with gaps; the key `mixed` is now a number, now a text."""
    mixed = rng.choice([lambda: rng.random(), lambda: "word"])
    history, step = [], start + rng.choice([0, 0, 5])
    for _ in range(rows):
        row = {"_step": step, "_timestamp": 1.7e9 + step, "_runtime": step / 2, "train/loss": rng.random()}
        if rng.random() < 0.5:
            row |= {"mixed": mixed(), "val/acc": rng.choice([0.5, float("nan"), 3])}
        history.append(row)
        step += rng.choice([1, 1, 1, 7])
    return history


class Lab:
    """A project in which something happens every day."""

    def __init__(self, server: WandbServer, seed: int, with_history: bool) -> None:
        self.server, self.rng, self.with_history = server, random.Random(seed), with_history
        self.beats = 0
        for _ in range(self.rng.randint(1, 12)):
            self.new()

    def runs(self) -> list[StoredRun]:
        return self.server.runs(TEAM, "p")

    def beat(self) -> str:
        self.beats += 1
        return iso(1_760_000_000 + self.beats)

    def logged(self, rows: int, old: StoredRun | None = None) -> dict[str, Any]:
        """History and the summary that goes with it: the old one's rows and `rows` more."""
        before = list(old.history.source) if old and old.history else []
        start = before[-1]["_step"] + 1 if before else 0
        history = before + random_history(self.rng, rows, start)
        summary = random_summary(self.rng) | ({"_step": history[-1]["_step"]} if history else {})
        return {"history": history, "summary": summary} if self.with_history else {"summary": summary}

    def new(self) -> None:
        fields = self.logged(self.rng.choice([0, 1, 5])) if self.rng.random() < 0.8 else {"summary": {}}
        if "history" in fields:
            fields["exported_steps"] = self.rng.randint(0, len(fields["history"]))
        self.server.add_run(
            TEAM,
            "p",
            created_at=iso(1_759_000_000 + self.rng.choice([0, 1, 1, 50, 1000, 86_400]) + self.beats),
            config=random_config(self.rng),
            state=self.rng.choice(["finished", "running", "crashed"]),
            tags=self.rng.sample(["t1", "t2"], self.rng.randint(0, 2)),
            system_metrics={"system.cpu": self.rng.random(), "disk/in": 3} if self.rng.random() < 0.5 else None,
            **fields,
        )

    def delete(self) -> None:
        if len(self.runs()) > 1:
            self.server.delete_run(TEAM, "p", self.rng.choice(self.runs()).id)

    def relabel(self) -> None:
        """Changes without a heartbeat."""
        fields = {
            "display_name": self.rng.choice([None, "renamed", f"n{self.beats}"]),
            "tags": self.rng.sample(["t1", "t2", "t3"], 2),
            "notes": self.rng.choice(["", None, "good one"]),
            "group": self.rng.choice([None, "g1", "g2"]),
            "state": self.rng.choice(["finished", "failed", "killed"]),
        }
        some = dict(self.rng.sample(sorted(fields.items(), key=str), self.rng.randint(1, 3)))
        self.server.update_run(TEAM, "p", self.rng.choice(self.runs()).id, **some)

    def go_on(self) -> None:
        """The run logs, with a heartbeat."""
        run = self.rng.choice(self.runs())
        fields = self.logged(self.rng.choice([0, 1, 4]), run)
        if "history" in fields and self.rng.random() < 0.5:
            fields["exported_steps"] = len(fields["history"])
        system = {"system.cpu": self.rng.random(), "system.gpu.0.temp": 60}
        config = random_config(self.rng)
        beat = self.beat()
        self.server.update_run(TEAM, "p", run.id, config=config, system_metrics=system, heartbeat_at=beat, **fields)

    def day(self) -> None:
        for _ in range(self.rng.randint(0, 4)):
            self.rng.choice([self.new, self.delete, self.relabel, self.go_on])()


def assert_like_a_full_export(server: WandbServer, folder: Path, other: Path, *args: str) -> None:
    """What stands in `folder` is what a full export writes, to `other`."""
    good(export(server, other, "-p", "p", "-q", *args))
    for ending in ("runs.parquet", "history.parquet"):
        left, right = (path / f"{TEAM}_p_{ending}" for path in (folder, other))
        if not right.exists():
            assert not left.exists() or pq.read_table(left).num_rows == 0
            continue
        assert_same(pq.read_table(left), pq.read_table(right))
        about = [json.loads(pq.read_metadata(path).metadata[b"wandb_tools"]) for path in (left, right)]
        for each in about:
            del each["exported_at"]
        assert about[0] == about[1]
    about = [metadata(path, "p") for path in (folder, other)]
    for name in ("total_runs", "runs_by_state", "history_unconfirmed", "columns"):
        assert about[0][name] == about[1][name], name
    assert (about[0]["history_rows"] or 0) == (about[1]["history_rows"] or 0)


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("options", ["", "--include-history", "--system-metrics", "--include-history --system-metrics"])
def test_incremental_exports_equal_a_full_one(server, folder, tmp_path, seed, options):
    args = options.split()
    lab = Lab(server, seed, "--include-history" in args)
    for _ in range(lab.rng.randint(1, 4)):
        limits = lab.rng.choice([[], [], [], ["--state", "running"], ["--tag", "t1"], ["--since", "2025-09-28"]])
        keep = lab.rng.choice([[], [], ["--keep-deleted"]])
        done = export(server, folder, "-p", "p", "-q", *args, *limits, *keep)
        assert done.code == 0 or (limits and "no runs that match" in done.err), done
        lab.day()
    good(export(server, folder, "-p", "p", "-q", *args))
    assert_like_a_full_export(server, folder, tmp_path / "full", *args)
    assert leftovers(folder) == []


def test_a_large_project_after_twenty_changes(server, folder, tmp_path):
    server.fill(TEAM, "p", 2163, 10, 5)
    good(export(server, folder, "-p", "p", "-q"))
    rng = random.Random(1)
    for number, run in enumerate(rng.sample(server.runs(TEAM, "p"), 20)):
        if number < 8:
            server.update_run(TEAM, "p", run.id, summary={"new/metric": number}, heartbeat_at=iso(1_770_000_000))
        elif number < 14:
            server.update_run(TEAM, "p", run.id, config={"k": "text now"}, state="killed")
        elif number < 17:
            server.delete_run(TEAM, "p", run.id)
        else:
            server.add_run(TEAM, "p", created_at=iso(1_600_000_000 + number * 20_000_000))
    server.stats.reset()
    done = good(export(server, folder, "-p", "p"))
    assert server.stats.total <= 7
    assert server.stats.full_runs == 17
    about = metadata(folder, "p")["export"]
    assert (about["new"], about["updated"], about["unchanged"]) == (3, 14, 2146)
    assert len(about["removed"]) == 3
    assert about["removed"][0]["id"] in done.err
    assert_like_a_full_export(server, folder, tmp_path / "full")


def test_a_project_that_outgrew_what_is_known_of_it(server, folder, tmp_path):
    """Few runs are on disk: the listing is split by time, and many runs of one second are all in it."""
    server.add_run(TEAM, "p", created_at=iso(1_600_000_000))
    good(export(server, folder, "-p", "p"))
    server.fill(TEAM, "p", 1500, 10, 5)
    for run in server.runs(TEAM, "p")[600:1200]:
        server.update_run(TEAM, "p", run.id, created_at=iso(1_760_000_000))
    server.stats.reset()
    good(export(server, folder, "-p", "p"))
    assert server.stats.requests["CountRuns"] >= 1
    assert server.stats.requests["ListRuns"] >= 3
    assert metadata(folder, "p")["export"]["not_listed"] == 0
    assert_like_a_full_export(server, folder, tmp_path / "full")


def test_nothing_changed(server, folder):
    server.fill(TEAM, "p", 300, 5, 5)
    good(export(server, folder, "-p", "p"))
    before = runs_file(folder, "p").read_bytes()
    server.stats.reset()
    good(export(server, folder, "-p", "p"))
    assert (server.stats.full_runs, server.stats.requests["ListRuns"]) == (0, 1)
    assert pq.read_table(runs_file(folder, "p")).num_rows == 300
    assert runs_file(folder, "p").read_bytes() == before
    assert metadata(folder, "p")["export"]["unchanged"] == 300


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "killed"},
        {"heartbeat_at": "2026-01-01T00:00:00Z"},
        {"display_name": "new name"},
        {"display_name": None},
        {"tags": ["b", "a"]},
        {"notes": "seen"},
        {"group": "g"},
        {"history": [{"_step": 0}, {"_step": 1}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_makes_a_run_count_as_changed(server, folder, fields):
    server.add_run(TEAM, "p", name="x", tags=["a", "b"], summary={"loss": 1})
    server.add_run(TEAM, "p", name="y", summary={"loss": 1})
    good(export(server, folder, "-p", "p"))
    server.update_run(TEAM, "p", "x", summary={"loss": 2}, **fields)
    server.stats.reset()
    good(export(server, folder, "-p", "p"))
    assert server.stats.full_runs == 1
    assert dict(zip(*(read(folder, "p")[name].to_pylist() for name in ("id", "metric_loss")), strict=True))["x"] == 2.0
    assert metadata(folder, "p")["export"]["updated"] == 1


# ---------------------------------------------------------------- filters, deleted runs, --full, --dry-run


def project_of_four(server: WandbServer) -> None:
    server.add_run(TEAM, "p", name="old", created_at="2025-01-01T00:00:00Z", state="finished", tags=["x"])
    server.add_run(TEAM, "p", name="edge", created_at="2025-06-01T00:00:00Z", state="crashed", tags=["y", "z"])
    server.add_run(TEAM, "p", name="late", created_at="2025-06-01T12:00:00Z", state="finished", tags=["z"])
    server.add_run(TEAM, "p", name="last", created_at="2025-07-01T00:00:00Z", state="running")


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        (["--since", "2025-06-01"], ["edge", "late", "last"]),
        (["-s", "2025-06-01T12:00:00"], ["late", "last"]),
        (["-s", "2025-06-01T14:00:00+02:00"], ["late", "last"]),
        (["--until", "2025-06-01"], ["old"]),
        (["--since", "2025-06-01", "--until", "2025-06-01T12:00:00Z"], ["edge"]),
        (["--state", "finished"], ["old", "late"]),
        (["--state", "finished", "--state", "running"], ["old", "late", "last"]),
        (["--tag", "z"], ["edge", "late"]),
        (["--tag", "x", "--tag", "y"], ["old", "edge"]),
        (["--tag", "z", "--state", "finished"], ["late"]),
        (["--since", "9999w", "--until", "2025-02-01"], ["old"]),
    ],
)
def test_filters_limit_what_is_fetched_and_rows_on_disk_stay(server, folder, tmp_path, args, ids):
    project_of_four(server)
    good(export(server, folder, "-p", "p", *args))
    assert read(folder, "p")["id"].to_pylist() == ids
    good(export(server, tmp_path / "all", "-p", "p"))
    for run in server.runs(TEAM, "p"):
        server.update_run(TEAM, "p", run.id, notes="changed")
    server.stats.reset()
    good(export(server, tmp_path / "all", "-p", "p", *args))
    table = read(tmp_path / "all", "p")
    assert table["id"].to_pylist() == ["old", "edge", "late", "last"]
    changed = [run for run, notes in zip(*(table[n].to_pylist() for n in ("id", "notes")), strict=True) if notes]
    assert changed == ids
    assert server.stats.full_runs == len(ids)
    assert any(metadata(tmp_path / "all", "p")["filters"].values())
    good(export(server, tmp_path / "all", "-p", "p"))
    assert read(tmp_path / "all", "p")["notes"].to_pylist() == ["changed"] * 4


def test_deleted_runs_leave_the_file_unless_they_are_kept(server, folder):
    project_of_four(server)
    good(export(server, folder, "-p", "p"))
    server.delete_run(TEAM, "p", "edge")
    good(export(server, folder, "-p", "p", "--tag", "z"))  # of what a filter hides nothing is known
    assert read(folder, "p").num_rows == 4
    good(export(server, folder, "-p", "p", "--keep-deleted"))
    assert read(folder, "p").num_rows == 4
    assert metadata(folder, "p")["export"]["removed"] == []
    done = good(export(server, folder, "-p", "p"))
    assert read(folder, "p")["id"].to_pylist() == ["old", "late", "last"]
    assert "edge" in done.err
    assert metadata(folder, "p")["export"]["removed"] == [{"id": "edge", "name": "edge"}]


def test_all_runs_deleted_keeps_the_last_file(server, folder):
    project_of_four(server)
    good(export(server, folder, "-p", "p"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for run in server.runs(TEAM, "p"):
        server.delete_run(TEAM, "p", run.id)
    done = export(server, folder, "-p", "p")
    assert done.code == 1
    assert "no runs" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_full_finds_what_nothing_shows(server, folder):
    project_of_four(server)
    good(export(server, folder, "-p", "p"))
    server.update_run(TEAM, "p", "old", config={"edited": 1})
    good(export(server, folder, "-p", "p"))
    assert "config_edited" not in read(folder, "p").schema.names
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--full"))
    assert server.stats.full_runs == 4
    assert read(folder, "p")["config_edited"].to_pylist() == [1, None, None, None]
    assert leftovers(folder) == []


def test_system_metrics_come_and_go(server, folder, tmp_path):
    server.add_run(TEAM, "p", name="a", system_metrics={"system.gpu.0.temp": 61, "cpu": 3.5, "system.note": "hot"})
    server.add_run(TEAM, "p", name="b", created_at="2025-11-01T00:00:00Z")
    good(export(server, folder, "-p", "p"))
    without = content(read(folder, "p"))
    good(export(server, folder, "-p", "p", "--system-metrics"))
    table = read(folder, "p")
    columns = {name: table[name].to_pylist() for name in table.schema.names if name.startswith("system_")}
    assert columns == {"system_cpu": [3.5, None], "system_gpu_0_temp": [61.0, None]}
    assert {str(table.schema.field(name).type) for name in columns} == {"double"}
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--system-metrics"))
    assert server.stats.full_runs == 0
    good(export(server, folder, "-p", "p"))
    assert content(read(folder, "p")) == without


def test_dry_run_says_what_an_export_would_fetch_and_writes_nothing(server, folder):
    server.fill(TEAM, "p", 250, 2, 2)
    server.fill(TEAM, "q", 30, 2, 2)
    done = good(export(server, folder, "--dry-run"))
    assert not folder.exists()
    assert server.stats.full_runs == 0
    assert f"{TEAM}/p: would fetch 250 of 250 runs" in done.out
    assert f"{TEAM}/q: would fetch 30 of 30 runs" in done.out
    good(export(server, folder, "-p", "p"))
    for run in server.runs(TEAM, "p")[::50]:
        server.update_run(TEAM, "p", run.id, notes="new")
    server.add_run(TEAM, "p")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for args, count in (([], "6 of 251"), (["--full"], "251 of 251"), (["--tag", "ablation"], "0 of 62")):
        done = good(export(server, folder, "-p", "p", "--dry-run", *args))
        assert f"would fetch {count} runs" in done.out
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    server.stats.reset()
    good(export(server, folder, "-p", "p"))
    assert server.stats.full_runs == 6
