"""export_runs.py in bad weather: every fault of the server, kills, full disks, files that are not what they seem.

Whatever happens, an export is exactly right and ends with 0, or it names what is missing, ends with 1, and the next
one completes it; and it never replaces a good file by a worse one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    TEAM,
    TOOLS,
    assert_contract_of_ids,
    clean_env,
    content,
    export,
    fill_small,
    good,
    leftovers,
    metadata,
    read,
    runs_file,
)
from wandb_server import KEY, WandbServer, iso

FAST = 60  # seconds of a backoff pass so many times as fast


def add_runs(server: WandbServer, number: int, rows: int = 0, every: int = 1) -> None:
    """Runs a second apart; every so-manieth has rows of history, some of them live."""
    most = rows
    for n in range(len(server.runs(TEAM, "p")), len(server.runs(TEAM, "p")) + number):
        rows = 0 if n % every else most
        server.add_run(
            TEAM,
            "p",
            name=f"r{n:05}",
            config={"n": n, f"k{n % 7}": n},
            summary={"loss": n / 8} | ({"_step": rows - 1} if rows else {}),
            created_at=iso(1_759_000_000 + n),
            history=[{"_step": step, "loss": step / 4} for step in range(rows)] if rows else None,
            exported_steps=rows - n % 3 if rows else None,
        )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tables(folder: Path) -> list[Any]:
    """The content of the runs and history files, None for what is not there."""
    paths = [folder / f"{TEAM}_p_{ending}.parquet" for ending in ("runs", "history")]
    return [content(pq.read_table(path)) if path.exists() else None for path in paths]


def undisturbed(server: WandbServer, folder: Path, *args: str) -> list[Any]:
    """What an export writes in good weather."""
    good(export(server, folder / "undisturbed", "-p", "p", "-q", *args))
    server.stats.reset()
    return tables(folder / "undisturbed")


# ---------------------------------------------------------------- pages that are too heavy


@pytest.mark.parametrize("status", [502, 504, 200])
def test_a_page_size_limit_is_found_and_kept_to(server, folder, status):
    add_runs(server, 400)
    server.weather.max_page, server.weather.timeout_status = 13, status
    good(export(server, folder, "-p", "p", speed=FAST))
    assert_contract_of_ids(read(folder, "p"), server)
    assert server.stats.total < 400 / 6 + 40


def test_pages_that_hang_are_halved_too(server, folder):
    add_runs(server, 150)
    server.weather.max_page, server.weather.timeout_after = 80, 30
    good(export(server, folder, "-p", "p", WANDB_HTTP_TIMEOUT="1"))
    assert_contract_of_ids(read(folder, "p"), server)


@pytest.mark.parametrize("status", [502, 200])
def test_a_run_too_heavy_to_fetch_is_named_and_the_rest_comes(server, folder, status):
    add_runs(server, 230)
    server.update_run(TEAM, "p", "r00007", display_name="the heavy one")
    server.weather.heavy_runs, server.weather.timeout_status = {"r00007", "r00200"}, status
    done = export(server, folder, "-p", "p", speed=FAST)
    assert done.code == 1
    assert "the heavy one" in done.err
    assert "r00200" in done.err
    failed = metadata(folder, "p")["export"]["failed"]
    assert sorted(run["id"] for run in failed) == ["r00007", "r00200"]
    assert all(run["error"] for run in failed)
    ids = [run.id for run in server.runs(TEAM, "p")]
    assert read(folder, "p")["id"].to_pylist() == [run for run in ids if run not in ("r00007", "r00200")]
    before = tables(folder)
    assert export(server, folder, "-p", "p", speed=FAST).code == 1  # still heavy, still named
    assert sorted(run["id"] for run in metadata(folder, "p")["export"]["failed"]) == ["r00007", "r00200"]
    assert tables(folder) == before
    server.weather.heavy_runs = set()
    server.stats.reset()
    good(export(server, folder, "-p", "p", speed=FAST))
    assert server.stats.full_runs == 2
    assert_contract_of_ids(read(folder, "p"), server)
    assert metadata(folder, "p")["export"]["failed"] == []


def test_a_run_that_has_become_too_heavy_keeps_its_row(server, folder):
    add_runs(server, 5)
    good(export(server, folder, "-p", "p"))
    before = tables(folder)
    server.update_run(TEAM, "p", "r00002", notes="changed")
    server.weather.heavy_runs = {"r00002"}
    for args in ([], ["--full"]):
        done = export(server, folder, "-p", "p", *args, speed=FAST)
        assert done.code == 1
        assert [run["id"] for run in metadata(folder, "p")["export"]["failed"]] == ["r00002"]
        assert tables(folder) == before


def test_all_runs_too_heavy(server, folder):
    add_runs(server, 2)
    server.weather.heavy_runs = {"r00000", "r00001"}
    done = export(server, folder, "-p", "p", speed=FAST)
    assert done.code == 1
    assert "r00001" in done.err
    assert not runs_file(folder, "p").exists()
    server.weather.heavy_runs = set()
    good(export(server, folder, "-p", "p"))


# ---------------------------------------------------------------- limits, outages


@pytest.mark.parametrize("args", [[], ["--include-history"]])
def test_rate_limits_slow_the_whole_export_down_and_never_fail_it(server, folder, args):
    add_runs(server, 300, rows=4, every=10)
    wanted = undisturbed(server, folder, *args)
    server.weather.rate_limit = 10**9
    limited: list[int] = []

    def lift() -> None:
        limited.append(server.stats.statuses[429])
        server.weather.rate_limit = 0.1

    threading.Timer(1, lift).start()
    done = good(export(server, folder, "-p", "p", *args, speed=10))
    assert tables(folder) == wanted
    assert "limit" in done.err
    assert limited[0] <= 20  # in ten of its seconds of nothing but 429 with `Retry-After: 1`


def test_a_rate_limit_that_outlives_the_clients_own_wait_makes_all_workers_wait_together(server, folder):
    server.fill(TEAM, "p", 2000, 2, 2)
    server.weather.latency = 0.01
    starts: list[float] = []
    strikes = server.weather.strikes

    def strike_for_a_while(fault: str, name: str) -> bool:
        if fault == "rate_limit":
            starts.append(time.monotonic())
            return len(starts) >= 5 and starts[-1] < starts[4] + 1.5
        return strikes(fault, name)

    server.weather.strikes = strike_for_a_while
    done = good(export(server, folder, "-p", "p"))
    assert_contract_of_ids(read(folder, "p"), server)
    assert "limits requests; waiting 2 s" in done.err
    assert starts[-1] - starts[4] > 2.8  # the client's own second, then two of ours


@pytest.mark.parametrize("fault", ["error_5xx", "cut_body", "hang"])
@pytest.mark.parametrize("burst", [1, 3])
def test_a_short_outage_is_waited_out(server, folder, fault, burst):
    add_runs(server, 130, rows=3, every=40)
    wanted = undisturbed(server, folder, "--include-history")
    server.weather.hang_seconds = 0
    for names in ({"ExportRuns"}, {"ListRuns"}, {"CountRuns"}, {"HistoryAddresses"}, {"LiveHistory"}, {"parquet"}):
        server.weather.only = names
        setattr(server.weather, fault, burst)
        server.update_run(TEAM, "p", "r00050", notes=f"{names}")
        args = [] if "ListRuns" in names else ["--full"]
        good(export(server, folder, "-p", "p", "--include-history", *args, speed=FAST))
    server.update_run(TEAM, "p", "r00050", notes=None)
    good(export(server, folder, "-p", "p", "--include-history"))
    assert tables(folder) == wanted


def test_an_outage_does_not_make_every_later_page_small(server, folder):
    server.fill(TEAM, "p", 1000, 2, 2)
    good(export(server, folder, "-p", "p", "-q"))
    server.stats.reset()
    server.weather.only, server.weather.error_5xx = {"ListRuns"}, 9
    good(export(server, folder, "-p", "p", "-q", speed=FAST))
    assert server.stats.total < 60
    server.stats.reset()
    server.weather.only, server.weather.error_5xx = {"ExportRuns"}, 9
    good(export(server, folder, "-p", "p", "-q", "--full", speed=FAST))
    assert server.stats.total < 100
    assert_contract_of_ids(read(folder, "p"), server)


def test_nobody_answers(server, folder):
    add_runs(server, 3)
    good(export(server, folder, "-p", "p"))
    before = snapshot(folder)
    server.weather.error_5xx = 10**9
    for args in (["-p", "p"], [], ["-p", "p", "--dry-run"]):
        done = export(server, folder, *args, speed=FAST)
        assert done.code == 1
        assert "503" in done.err
    done = export(server, folder, "-p", "p", speed=FAST, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.code == 1
    assert "127.0.0.1" in done.err
    assert snapshot(folder) == before


class Portal(BaseHTTPRequestHandler):
    """What answers in an airport: its own page, whatever is asked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        body = b"<html>Welcome to our network. Log in.</html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("args", [["-p", "p"], [], ["-p", "p", "--dry-run"]])
def test_something_else_answers(server, folder, args):
    portal = ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=portal.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{portal.server_address[1]}"
    done = export(server, folder, *args, speed=FAST, WANDB_BASE_URL=address)
    portal.shutdown()
    portal.server_close()
    assert done.code == 1
    assert "error" in done.err
    assert leftovers(folder) == [] if folder.exists() else True


def test_expired_addresses_are_asked_for_again(server, folder):
    add_runs(server, 30, rows=6)
    wanted = undisturbed(server, folder, "--include-history")
    server.weather.expired_url = 2  # the third time in a row a run would be given up
    good(export(server, folder, "-p", "p", "--include-history", speed=FAST))
    assert tables(folder) == wanted
    server.weather.expired_url = 1.0
    done = export(server, folder / "never", "-p", "p", "--include-history", speed=FAST)
    assert done.code == 1
    assert len(metadata(folder / "never", "p")["export"]["failed"]) == 30 - len(
        [run for run in server.runs(TEAM, "p") if not run.history.file_count()]
    )
    assert "Signature" not in done.err + (folder / "never" / f"{TEAM}_p_metadata.json").read_text()
    server.weather.expired_url = 0
    good(export(server, folder / "never", "-p", "p", "--include-history"))
    assert tables(folder / "never") == wanted


def test_one_history_that_cannot_be_had_is_named_and_the_rest_comes(server, folder):
    add_runs(server, 12, rows=5)
    wanted = undisturbed(server, folder, "--include-history")
    file = server.run(TEAM, "p", "r00003").history
    whole = file.file(0)
    for content_ in (b"", b"PAR1 this is no Parquet PAR1", whole[:-20]):
        file._files = {(0, file.exported): content_}
        done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
        assert done.code == 1
        assert "r00003" in done.err
        assert [run["id"] for run in metadata(folder, "p")["export"]["failed"]] == ["r00003"]
        ids = set(pq.read_table(folder / f"{TEAM}_p_history.parquet")["run_id"].to_pylist())
        assert ids == {run.id for run in server.runs(TEAM, "p")} - {"r00003"}
    file._files = {}
    server.stats.reset()
    good(export(server, folder, "-p", "p", "--include-history"))
    assert server.stats.requests["parquet"] == 1
    assert tables(folder) == wanted


def test_compressed_answers(server, folder):
    add_runs(server, 300, rows=3, every=30)
    wanted = undisturbed(server, folder, "--include-history")
    server.weather.gzip = True
    good(export(server, folder, "-p", "p", "--include-history"))
    assert tables(folder) == wanted


# ---------------------------------------------------------------- the key


def test_a_key_that_is_rejected_from_the_start(server, folder):
    add_runs(server, 3)
    for args in (["-p", "p"], [], ["-p", "p", "--dry-run"]):
        done = export(server, folder, *args, key="x" * 40)
        assert done.code == 2
        assert "WANDB_API_KEY" in done.err
        assert "rejects" in done.err
    assert not folder.exists() or snapshot(folder) == {}


@pytest.mark.parametrize("older", [False, True])
def test_a_key_that_is_revoked_at_any_moment(server, folder, older):
    """After n requests: what came is kept, what was there is as it was, the next export completes it."""
    add_runs(server, 250, rows=3, every=20)
    if older:
        good(export(server, folder / "older", "-p", "p", "--include-history"))
        for n in range(0, 250, 2):
            server.update_run(TEAM, "p", f"r{n:05}", notes="changed", heartbeat_at=iso(1_770_000_000))
        add_runs(server, 30, rows=3, every=20)
    wanted = undisturbed(server, folder, "--include-history")
    codes = []
    for after in range(40):
        place = folder / str(after)
        if older:
            place.mkdir(parents=True)
            for path in (folder / "older").iterdir():
                (place / path.name).write_bytes(path.read_bytes())
        before = tables(place)
        server.weather.revoke_after = after
        done = export(server, place, "-p", "p", "--include-history", "--workers", "3", speed=FAST)
        server.weather.revoke_after = None
        codes.append(done.code)
        if done.code == 0:
            assert tables(place) == wanted
            break
        assert "rejects" in done.err
        for left, was, whole in zip(tables(place), before, wanted, strict=True):
            assert left in (was, whole)
        server.stats.reset()
        good(export(server, place, "-p", "p", "--include-history"))
        assert tables(place) == wanted
        assert leftovers(place) == []
    assert codes[0] == 2
    assert set(codes[3:-1]) == {1}
    assert codes[-1] == 0


# ---------------------------------------------------------------- everything at once


def assert_named(folder: Path, server: WandbServer, err: str, wanted: list[Any], before: list[Any]) -> None:
    """What an export that ended with 1 left out is named, and what it wrote is right."""
    got = tables(folder)
    aborted = "error:" in err
    failed: set[str] = set()
    if (folder / f"{TEAM}_p_metadata.json").exists():
        failed = {run["id"] for run in metadata(folder, "p")["export"]["failed"]}
    assert aborted or failed
    for ending, left, was in zip(("runs", "history"), got, before, strict=True):
        if left == was or left is None:
            continue
        id_ = "id" if ending == "runs" else "run_id"
        rows = {ids: [] for ids in (run.id for run in server.runs(TEAM, "p"))}
        right = {ids: [] for ids in rows}
        for table, into in ((folder, rows), (folder / "undisturbed", right)):
            for row in pq.read_table(table / f"{TEAM}_p_{ending}.parquet").to_pylist():
                into.setdefault(row[id_], []).append(repr({k: v for k, v in row.items() if v is not None}))
        wrong = {run for run in right if rows.get(run) != right[run]}
        if ending == "runs" or not aborted:
            assert wrong <= failed, err


@pytest.mark.parametrize("seed", range(16))
def test_random_weather_through_whole_exports(server, folder, seed):
    rng = random.Random(seed)
    add_runs(server, rng.choice([3, 120, 260]), rows=rng.choice([1, 3, 5]), every=rng.choice([1, 7, 20]))
    if rng.random() < 0.5:
        good(export(server, folder, "-p", "p", "--include-history", "-q"))
        for run in rng.sample(server.runs(TEAM, "p"), 3):
            server.update_run(TEAM, "p", run.id, notes="changed", heartbeat_at=iso(1_770_000_000))
        add_runs(server, 20, rows=2, every=5)
    before = tables(folder)
    wanted = undisturbed(server, folder, "--include-history")
    weather = server.weather
    weather.random.seed(seed)
    weather.hang_seconds, weather.error_status = 0, rng.choice([500, 502, 503, 504])
    chances = {"rate_limit": 0.2, "error_5xx": 0.2, "cut_body": 0.2, "expired_url": 0.3, "hang": 0.1}
    for fault in rng.sample(sorted(chances), rng.randint(1, 5)):
        setattr(weather, fault, rng.choice([0.3, 1, 1.5]) * chances[fault])
    if rng.random() < 0.3:
        weather.max_page, weather.timeout_status = rng.choice([2, 30]), rng.choice([200, 504])
    if rng.random() < 0.3:
        weather.heavy_runs = {rng.choice(server.runs(TEAM, "p")).id}
    if rng.random() < 0.3:
        weather.revoke_after = rng.randint(1, 60)
    done = export(server, folder, "-p", "p", "--include-history", speed=4 * FAST)
    if done.code == 0:
        assert tables(folder) == wanted, done
        assert metadata(folder, "p")["export"]["failed"] == []
    else:
        assert done.code == 1 or "rejects" in done.err
        assert_named(folder, server, done.err, wanted, before)
    calm = server.weather = type(weather)()
    assert calm.heavy_runs == set()
    good(export(server, folder, "-p", "p", "--include-history", speed=FAST))
    assert tables(folder) == wanted
    assert [path for path in leftovers(folder) if not path.startswith("undisturbed")] == []


# ---------------------------------------------------------------- files that are not what they seem


def spoil_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def spoil_foreign(path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "name": [3], "config_lr": ["x"]}), path)


def spoil_stripped(path: Path) -> None:
    """The columns are ours, what the file says of itself is gone: as after polars.read_parquet and write_parquet."""
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def spoil_half_ours(path: Path) -> None:
    """What the file says of itself is ours, but columns were dropped."""
    table = pq.read_table(path)
    about = pq.read_metadata(path).metadata
    pq.write_table(table.select(table.schema.names[:1]).replace_schema_metadata(about), path)


SPOILS: list[Callable[[Path], Any]] = [
    spoil_truncated,
    spoil_foreign,
    spoil_stripped,
    spoil_half_ours,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"id,name\n1,a\n"),
    lambda path: (path.unlink(), path.mkdir()),
]


@pytest.mark.parametrize("ending", ["runs", "history"])
@pytest.mark.parametrize("number", range(len(SPOILS)))
def test_a_file_that_is_not_ours_or_broken_is_reported_and_left_alone(server, folder, ending, number):
    add_runs(server, 5, rows=2)
    fill_small(server, "other")
    good(export(server, folder, "--include-history"))
    path = folder / f"{TEAM}_p_{ending}.parquet"
    SPOILS[number](path)
    spoiled = path.read_bytes() if path.is_file() else None
    server.update_run(TEAM, "p", "r00001", notes="changed", heartbeat_at=iso(1_770_000_000))
    server.add_run(TEAM, "other")
    for args in ([], ["--full"], ["--dry-run"]):
        done = export(server, folder, "--include-history", *args, speed=FAST)
        if not ("--dry-run" in args and ending == "history"):
            assert done.code == 1, done
            assert path.name in done.err
        assert (path.read_bytes() if path.is_file() else None) == spoiled
    assert read(folder, "other").num_rows == 4
    assert [name for name in leftovers(folder) if name.endswith((".lock", ".tmp"))] == []
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    good(export(server, folder, "--include-history"))
    assert tables(folder) == undisturbed(server, folder, "--include-history")


def test_broken_parts_of_an_interrupted_export_are_fetched_again(server, folder):
    add_runs(server, 900)
    wanted = undisturbed(server, folder)
    server.weather.revoke_after = 4
    assert export(server, folder, "-p", "p").code == 1
    server.weather.revoke_after = None
    parts = [path for path in folder.rglob("*.parquet") if "undisturbed" not in path.parts]
    assert len(parts) > 1
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    parts[1].write_bytes(b"")
    good(export(server, folder, "-p", "p"))
    assert tables(folder) == wanted


# ---------------------------------------------------------------- kills

FORKS = f"""
import importlib.util, json, os, resource, signal, sys
import pyarrow.parquet, pyarrow.compute, dotenv, rich.table, rich.console
import wandb.apis.public, wandb.proto.wandb_api_pb2
pyarrow.array([1])  # imports pandas, which takes seconds, where there is one
spec = importlib.util.spec_from_file_location("export_runs", {str(TOOLS / "export_runs.py")!r})
script = importlib.util.module_from_spec(spec)
sys.modules["export_runs"] = script
spec.loader.exec_module(script)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(job["env"])
        log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["export_runs.py", *job["args"]]
        if job["largest_file"]:
            sys.dont_write_bytecode = True  # it would be cut off
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
        script.finish(script.main)
    print("pid", pid, flush=True)
    sys.stdin.readline()  # until then its id stays its own, so that no other process is ever killed
    print("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Starts exports as processes of their own, from one that has imported everything: 30 starts cost one."""

    def __init__(self, home: Path) -> None:
        command = [sys.executable, "-c", FORKS]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.log = home / "log"
        self.running = 0
        self.process = subprocess.Popen(command, env=clean_env(home), cwd=home, text=True, **pipes)
        assert self.output.readline() == "ready\n"

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until something is the case."""
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout
        return self.process.stdout

    def start(self, server: WandbServer, folder: Path, *args: str, largest_file: int = 0, **env: str) -> int:
        """Begin an export; returns its process id."""
        if self.running:  # a test that failed did not wait for its export
            os.kill(self.running, signal.SIGKILL)
            self.wait()
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY} | env
        job = {"args": ["-e", TEAM, "-o", str(folder), *args], "env": env, "log": str(self.log)}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job | {"largest_file": largest_file}) + "\n")
        self.process.stdin.flush()
        self.running = self.read("pid")
        return self.running

    def read(self, what: str) -> int:
        """The number that comes next, which must be a `pid` or a `code`: what is read here may be killed."""
        name, number = self.output.readline().split()
        assert name == what
        return int(number)

    def wait(self) -> int:
        """The exit code of the export that was begun last; negative after a signal."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        code = self.read("code")
        self.running = 0
        return code

    def said(self) -> str:
        text = self.log.read_text()
        assert KEY not in text
        assert "Traceback" not in text
        return text


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.mark.parametrize("args", [["--include-history"], ["--full"]], ids=["history", "full"])
def test_killed_at_random_moments_and_let_go_on(server, folder, forks, args):
    rng = random.Random(len(args[0]))
    add_runs(server, 450, rows=0)
    for n in range(0, 450, 15):
        history = [{"_step": step, "loss": step} for step in range(20)]
        server.update_run(TEAM, "p", f"r{n:05}", history=history, exported_steps=15, summary={"_step": 19})
    wanted = undisturbed(server, folder, *args)
    folder.mkdir(exist_ok=True)
    server.weather.latency, server.weather.work_per_run = 0.05, 0.0005
    killed = 0
    for attempt in range(20):
        place = folder / f"place{killed // 4}"  # each export is killed four times, then ends
        began = time.monotonic()
        pid = forks.start(server, place, "-p", "p", *args)
        how = rng.choice([signal.SIGKILL, signal.SIGINT])
        if attempt % 5 < 4:
            time.sleep(rng.uniform(0.02, 0.4))
            os.kill(pid, how)
        code = forks.wait()
        assert code in (0, -signal.SIGKILL, 130), forks.said()
        assert time.monotonic() - began < 20
        killed += code != 0
        if code == 0:
            assert tables(place) == wanted
        elif tables(place)[0] is not None:
            assert tables(place)[0] == wanted[0]
    for place in folder.glob("place*"):
        good(export(server, place, "-p", "p", *args))
        assert tables(place) == wanted
        assert leftovers(place) == []
    assert killed >= 8


def test_an_interrupted_export_goes_on_and_says_so(server, folder, forks):
    server.fill(TEAM, "p", 1200, 5, 5)
    server.weather.latency = 0.01
    pid = forks.start(server, folder, "-p", "p", "--workers", "2")
    forks.until(lambda: server.stats.full_runs >= 500)
    server.weather.latency = 5
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    server.weather.latency = 0
    held = sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))
    assert held >= 100
    server.stats.reset()
    done = good(export(server, folder, "-p", "p"))
    assert f"{held} runs" in done.err
    assert server.stats.full_runs == 1200 - held
    assert_contract_of_ids(read(folder, "p"), server)
    assert leftovers(folder) == []


def test_ctrl_c_ends_at_once_whatever_the_server_does(server, folder, forks):
    add_runs(server, 300)
    for hang_after in (0, 1, 2):
        strikes = server.weather.strikes
        seen: list[str] = []

        def hang(fault: str, name: str, seen: list[str] = seen, after: int = hang_after) -> bool:
            if fault == "hang":
                seen.append(name)
                return len(seen) > after
            return False

        server.weather.strikes = hang
        pid = forks.start(server, folder, "-p", "p", "--full")
        forks.until(lambda seen=seen, after=hang_after: len(seen) > after)
        began = time.monotonic()
        os.kill(pid, signal.SIGINT)
        assert forks.wait() == 130
        assert time.monotonic() - began < 2
        assert "interrupted" in forks.said()
        server.weather.strikes = strikes
    good(export(server, folder, "-p", "p"))
    assert_contract_of_ids(read(folder, "p"), server)


def test_two_exports_of_one_project_at_once(server, folder, forks):
    add_runs(server, 150)
    fill_small(server, "q")
    server.weather.latency = 1
    forks.start(server, folder, "-p", "p")
    forks.until(lambda: server.stats.requests["ExportRuns"])
    done = export(server, folder, "-p", "p", "-p", "q")
    assert done.code == 1
    assert f"{TEAM}/p" in done.err
    assert "another export" in done.err
    assert read(folder, "q").num_rows == 3
    server.weather.latency = 0
    assert forks.wait() == 0
    assert_contract_of_ids(read(folder, "p"), server)
    assert leftovers(folder) == []


@pytest.mark.parametrize("args", [[], ["--include-history"]])
def test_a_full_disk(server, folder, forks, args):
    add_runs(server, 200, rows=0)
    noise = random.Random(0)
    for n in range(0, 200, 20):
        history = [{"_step": step, "loss": noise.random()} for step in range(300)]
        server.update_run(TEAM, "p", f"r{n:05}", history=history, exported_steps=150, summary={"_step": 299})
    good(export(server, folder, "-p", "p", *args))
    add_runs(server, 100, rows=0)
    before = tables(folder)
    wanted = undisturbed(server, folder, *args)
    codes = []
    for largest_file in (500, 8_000, 20_000, 40_000):
        forks.start(server, folder, "-p", "p", "--full", *args, largest_file=largest_file)
        codes.append(forks.wait())
        assert codes[-1] in (0, 1), forks.said()
        if codes[-1] == 1:
            assert "error" in forks.said()
        for left, was, whole in zip(tables(folder), before, wanted, strict=True):
            assert left in (was, whole)
    assert codes[0] == 1
    good(export(server, folder, "-p", "p", *args))
    assert tables(folder) == wanted
    assert [name for name in leftovers(folder) if not name.startswith("undisturbed")] == []
