"""Speed and memory of the tools against what people write instead, side by side in one run.

    uv run tests/bench.py export            # 2,163 runs: the naive loop, the best public loop, export_runs.py
    uv run tests/bench.py --list            # every benchmark and what it compares

Figures are whole processes, start-up included: wall time, CPU time (all processes of the tree) and the peak of the
tree's resident memory. Nothing here is a test; the figures go into the README and into the closing notes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
TOOLS = REPO / "wandb-tools"


@dataclass(frozen=True)
class Measured:
    """One whole process tree: wall and CPU seconds, peak resident memory in MB."""

    label: str
    wall: float
    cpu: float
    peak_mb: float
    note: str = ""


def measure(
    label: str, command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Measured:
    """Run `command` to its end and measure it with all its children (the wandb-core sidecar is one)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    cpu: dict[int, float] = {}
    peak = 0

    def watch() -> None:
        nonlocal peak
        root = psutil.Process(process.pid)
        while process.returncode is None:
            resident = 0
            try:
                for member in [root, *root.children(recursive=True)]:
                    with member.oneshot():
                        times = member.cpu_times()
                        cpu[member.pid] = times.user + times.system
                        resident += member.memory_info().rss
            except psutil.NoSuchProcess:
                pass
            peak = max(peak, resident)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = os.times()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.wait()
    wall = time.perf_counter() - start
    watcher.join()
    after = os.times()
    if process.returncode != 0:
        sys.exit(f"{label} failed with exit code {process.returncode}:\n{errors[-4000:]}")
    # The kernel's sum is exact for children that were waited for; the sidecar is seen only by the watcher.
    waited = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(label, wall, max(waited, sum(cpu.values())), peak / 1e6)


def show(title: str, rows: Sequence[Measured]) -> None:
    """Print the rows as a table; ratios are against the last row, which is ours."""
    ours = rows[-1]
    print(f"\n{title}")
    print(f"{'':<44} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'x wall':>7}  note")
    for row in rows:
        ratio = row.wall / ours.wall
        print(f"{row.label:<44} {row.wall:>8.2f} {row.cpu:>8.2f} {row.peak_mb:>8.0f} {ratio:>7.1f}  {row.note}")


BENCHMARKS: dict[str, Callable[[], None]] = {}


def benchmark(function: Callable[[], None]) -> Callable[[], None]:
    """Register `function` under its name without `bench_`."""
    BENCHMARKS[function.__name__.removeprefix("bench_").replace("_", "-")] = function
    return function


# ---------------------------------------------------------------- export_runs.py, against tests/wandb_server.py

ENTITY = "graph_denoise_team"
WEATHER = "server.weather.latency, server.weather.work_per_run = 0.08, 0.001"  # 80 ms round trip, 1 ms of work per run
LOOP = """# /// script
# requires-python = ">=3.11"
# dependencies = ["polars>=2,<3", "wandb>=0.31,<0.32"]
# ///
import wandb
import polars as pl

def row(run):
    summary = {k: v for k, v in dict(run.summary).items() if isinstance(v, (int, float))}
    return {"id": run.id, "name": run.name, "state": run.state, "created_at": run.created_at,
            **flat("config", run.config), **flat("metric", summary)}

def flat(prefix, values):
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(f"{prefix}_{key}", value)
        else:
            out[f"{prefix}_{key}"] = str(value) if isinstance(value, list) else value
    return out

"""
NAIVE = LOOP + 'rows = [row(run) for run in wandb.Api().runs("ENTITY/p")]\n'
PUBLIC = LOOP + 'rows = [row(run) for run in wandb.Api().runs("ENTITY/p", lazy=False, per_page=1000)]\n'
SCAN = LOOP + 'rows = [row | {"run": run.id} for run in wandb.Api().runs("ENTITY/p") for row in run.scan_history()]\n'
WRITE = 'pl.DataFrame(rows, infer_schema_length=None, strict=False).write_parquet("runs.parquet")\n'


@contextlib.contextmanager
def serving(code: str) -> Iterator[Callable[[str], str]]:
    """A W&B server in a process of its own, prepared by `code`, which sees it as `server`.

    Yields a function that runs more code there and returns what the code prints, as one line.
    """
    harness = (
        "import sys, json; from wandb_server import WandbServer, KEY\n"
        f"with WandbServer() as server:\n    exec({code!r})\n    print(server.url, KEY, flush=True)\n"
        "    for line in sys.stdin: exec(json.loads(line)); print('', flush=True)\n"
    )
    command = [sys.executable, "-c", harness]
    with subprocess.Popen(
        command, cwd=REPO / "tests", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"] = process.stdout.readline().split()

        def tell(more: str) -> str:
            print(json.dumps(more), file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        yield tell
        process.stdin.close()


STATS = "print(sum(n for name, n in server.stats.requests.items()), end=''); server.stats.reset()"


def uv_script(folder: Path, name: str, text: str) -> list[str]:
    """The command that runs a loop as its author would, its environment made beforehand.

    With bytecode, as a first run leaves it, unless PYTHONDONTWRITEBYTECODE forbids it, as many containers do: without,
    Python compiles W&B's client anew at every start, half a second on both sides.
    """
    path = folder / name
    path.write_text(text.replace("ENTITY", ENTITY))
    subprocess.run(["uv", "sync", "-q", "--compile-bytecode", "--script", str(path)], check=True)
    return ["uv", "run", "-q", "--script", str(path)]


def counted(tell: Callable[[str], str], label: str, command: list[str], folder: Path) -> Measured:
    """`measure`, with the number of requests as the note."""
    tell(STATS)
    cache = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()
    env = os.environ | {"HOME": str(folder), "UV_CACHE_DIR": cache}  # a home of its own, but uv's cache is warm
    measured = measure(label, command, cwd=folder, env=env)
    return dataclasses.replace(measured, note=f"{tell(STATS)} requests")


def export_command(*arguments: str) -> list[str]:
    script = str(TOOLS / "export_runs.py")
    subprocess.run(["uv", "sync", "-q", "--compile-bytecode", "--script", script], check=True)
    return ["uv", "run", "-q", "--script", script, "-e", ENTITY, "-p", "p", *arguments]


@benchmark
def bench_export() -> None:
    """2,163 runs cold, then with 20 changed: the naive loop, the best public loop, export_runs.py."""
    code = f'server.fill("{ENTITY}", "p", 2163); server.add_project("{ENTITY}", "empty"); {WEATHER}'
    with serving(code) as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = export_command()
        naive = uv_script(folder, "naive.py", NAIVE + WRITE)
        public = uv_script(folder, "public.py", PUBLIC + WRITE)
        rows = [
            counted(tell, "for run in Api().runs(path): run.config", naive, folder),
            counted(tell, "api.runs(lazy=False, per_page=1000)", public, folder),
            counted(tell, "export_runs.py, cold", ours, folder),
        ]
        show("2,163 runs of 150 config values and 120 metrics, 80 ms round trip, 1 ms of server work per run", rows)
        start_up = counted(tell, "start-up: --dry-run of an empty project", [*ours[:-1], "empty", "--dry-run"], folder)
        change = (
            f'for run in server.runs("{ENTITY}", "p")[::110]: server.update_run("{ENTITY}", "p", run.id, notes="again")'
        )
        tell(change)
        again = counted(tell, "export_runs.py, 20 runs changed", ours, folder)
        show("the same project again", [start_up, rows[-1], again])
        share = (again.wall - start_up.wall) / (rows[-1].wall - start_up.wall)
        print(f"after start-up, the second export took {share:.0%} of the first one's time")


@benchmark
def bench_export_10k() -> None:
    """10,000 runs: the best public loop and export_runs.py; then 50,000 runs by export_runs.py alone."""
    for runs in (10_000, 50_000):
        code = f'server.fill("{ENTITY}", "p", {runs}); {WEATHER}'
        with serving(code) as tell, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            public = uv_script(folder, "public.py", PUBLIC + WRITE)
            rows = [counted(tell, "export_runs.py", export_command(), folder)]
            if runs == 10_000:
                rows.insert(0, counted(tell, "api.runs(lazy=False, per_page=1000)", public, folder))
            show(f"{runs:,} runs of 150 config values and 120 metrics", rows)


@benchmark
def bench_history() -> None:
    """60 runs of 3,000 rows: scan_history() run after run, and export_runs.py --include-history."""
    code = f'server.fill("{ENTITY}", "p", 60)'
    code += f'; server.fill_history("{ENTITY}", "p", rows=3000, keys=10, prepare=True); {WEATHER}'
    with serving(code) as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = uv_script(folder, "scan.py", SCAN + WRITE)
        rows = [
            counted(tell, "scan_history() run after run", scan, folder),
            counted(tell, "export_runs.py --include-history", export_command("--include-history"), folder),
        ]
        show("history of 60 runs, 3,000 rows and 10 keys each", rows)


@benchmark
def bench_history_large() -> None:
    """1,000 runs x 10,000 rows x 10 keys, and 25 runs x 200,000 rows x 100 keys at 3 %: memory of export_runs.py."""
    for runs, steps, keys, fill in ((1000, 10_000, 10, 1.0), (25, 200_000, 100, 0.03)):
        code = f'server.fill("{ENTITY}", "p", {runs})'
        history = f"rows={steps}, keys={keys}, fill={fill}, prepare=True"
        code += f'; server.fill_history("{ENTITY}", "p", {history}); {WEATHER}'
        with serving(code) as tell, tempfile.TemporaryDirectory() as name:
            command = export_command("--include-history")
            rows = [counted(tell, "export_runs.py --include-history", command, Path(name))]
            show(f"history of {runs:,} runs, {steps:,} rows and {keys} keys each, {fill:.0%} filled", rows)


@benchmark
def bench_history_wide() -> None:
    """20 runs x 10 rows with 2,000 keys, then with 5,000: time must grow with the keys, not with their square."""
    rows = []
    for keys in (2000, 5000):
        code = f'server.fill("{ENTITY}", "p", 20)'
        code += f'; server.fill_history("{ENTITY}", "p", rows=10, keys={keys}, prepare=True); {WEATHER}'
        with serving(code) as tell, tempfile.TemporaryDirectory() as name:
            command = export_command("--include-history")
            rows.append(counted(tell, f"export_runs.py --include-history, {keys} keys", command, Path(name)))
    show("history of 20 runs, 10 rows each", rows)


LOGGING = """
import random, wandb

settings = wandb.Settings(console="off", x_disable_stats=True, disable_git=True, silent=True)
about = {"entity": "ENTITY", "project": "p", "id": "r000", "config": {"lr": 0.1, "model": {"k": 8}}}
with wandb.init(mode="offline", settings=settings, **about) as run:
    for step in range(5000):
        run.log({f"train/m{key}": random.random() for key in range(10)})
"""


def offline_runs(folder: Path, runs: int) -> list[Path]:
    """Folders of offline runs in `folder`/wandb: one that W&B's client logged, and copies of it under other ids."""
    subprocess.run([sys.executable, "-c", LOGGING.replace("ENTITY", ENTITY)], cwd=folder, check=True)
    [log] = folder.glob("wandb/offline-run-*/*.wandb")
    logs = [log]
    for number in range(1, runs):
        data, at = bytearray(log.read_bytes()), 7
        for _ in range(2):  # the id stands in the first two records
            length = int.from_bytes(data[at + 4 : at + 6], "little")
            chunk = data[at + 6 : at + 7 + length].replace(b"r000", f"r{number:03}".encode())
            data[at : at + 7 + length] = struct.pack("<IH", zlib.crc32(chunk), length) + chunk
            at += 7 + length
        logs.append(folder / "wandb" / f"offline-run-20250101_000000-r{number:03}" / f"run-r{number:03}.wandb")
        logs[-1].parent.mkdir()
        logs[-1].write_bytes(data)
    return [log.parent for log in logs]


@benchmark
def bench_offline() -> None:
    """200 offline runs of 5,000 rows and 10 keys by export_runs.py; 20 of them by `wandb sync`, without latency."""
    with serving(f'server.add_project("{ENTITY}", "p")') as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = offline_runs(folder, 200)
        sync = [sys.executable, "-m", "wandb", "sync", *map(str, logs[:20])]
        ours = export_command("--offline", str(folder / "wandb"), "--include-history")
        rows = [
            counted(tell, "wandb sync of 20 of them, still to be exported", sync, folder),
            counted(tell, "export_runs.py --offline, all 200", ours, folder),
        ]
        show("200 offline runs, 5,000 rows and 10 keys each", rows)
        show("the same again, nothing changed", [counted(tell, "export_runs.py --offline", ours, folder)])


# ---------------------------------------------------------------- analyze_runs.py, against pandas


PANDAS_PIVOT = """
import sys
import pandas as pd

runs = pd.read_parquet(sys.argv[1])
runs = runs[runs["state"] == "finished"]
cells = runs.pivot_table(index="arch", columns="dataset", values="metric_test_mse", aggfunc=["mean", "std", "count"])
print(cells)
"""


def wide_runs(path: Path, runs: int = 20_000, metrics: int = 285) -> None:
    """Write an aggregated file of `runs` runs with 300 columns, most of them metrics."""
    import polars as pl

    def one_of(names: Sequence[str], every: int) -> pl.Expr:
        return pl.lit(pl.Series(names)).gather(pl.col("i") // every % len(names))

    archs = ["gnn_qk", "filter_bank", "self_attention", "spectral_linear", "mlp", "linear"]
    noise = {f"metric_m{j}": (pl.col("i").hash(j) / 2.0**64) for j in range(metrics)}
    pl.DataFrame({"i": range(runs)}).select(
        id=pl.format("run{}", "i"),
        name=pl.format("stage2_{}_lr1e-3_k8_s{}", one_of(archs, 1), pl.col("i") % 5),
        entity=pl.lit("team"),
        project=pl.lit("demo"),
        state=one_of(["finished"] * 19 + ["crashed"], 1),
        url=pl.format("https://wandb.ai/team/demo/runs/run{}", "i"),
        config_lr=pl.lit(0.001),
        config_seed=pl.col("i") % 5,
        protocol=pl.lit("distribution"),
        arch=one_of(archs, 1),
        dataset=one_of(["sbm", "ego", "grid", "tree", "community"], 6),
        k=pl.lit(8),
        metric_test_mse=pl.col("i").hash(1234) / 2.0**64,
        _source_file=pl.lit("team_demo_runs.parquet"),
        **noise,
    ).write_parquet(path)


@benchmark
def bench_analyze() -> None:
    """analyze_runs.py --pivot on 20,000 runs x 300 columns against pandas' read_parquet and pivot_table."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.parquet"
        wide_runs(path)
        ours = [sys.executable, str(TOOLS / "analyze_runs.py"), str(path), "--pivot", "--metric", "test/mse"]
        commands = {"pandas: read_parquet, pivot_table": [sys.executable, "-c", PANDAS_PIVOT, str(path)]}
        commands["analyze_runs.py --pivot"] = ours
        # The best of three each, taken in turn: the first run of either also reads its libraries from the disk.
        rounds = [[measure(label, command) for label, command in commands.items()] for _ in range(3)]
        show(
            "Pivot of 20,000 runs x 300 columns",
            [min(turn, key=lambda m: m.wall) for turn in zip(*rounds, strict=True)],
        )


PANDAS_AT_BEST = """
import sys
import pandas as pd

history = pd.read_parquet(sys.argv[1])
best = history.loc[history.groupby("run_id")["val/loss"].idxmin(), ["run_id", "_step"]]
history = history.merge(best.rename(columns={"_step": "best_step"}), on="run_id")
history = history[history["_step"] <= history["best_step"]]
print(history.drop(columns=["run_name", "entity", "project"]).groupby("run_id").last())
"""


def long_history(folder: Path, runs: int = 1000, rows: int = 10_000, keys: int = 10) -> Path:
    """Write an export of `runs` runs with `rows` steps of `keys` keys, at every step; returns the file of runs."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random, steps, writer = np.random.default_rng(0), np.arange(rows), None
    names = ["val/loss", "test/mse", *(f"train/m{j}" for j in range(keys - 2))]
    for number in range(runs):
        run = {"run_id": f"run{number:04}", "run_name": f"mlp_s{number}", "entity": "team", "project": "demo"}
        table = {name: pa.array([text] * rows) for name, text in run.items()} | {"_step": steps}
        table = pa.table(table | {name: random.random(rows) for name in names})
        writer = writer or pq.ParquetWriter(folder / "team_demo_history.parquet", table.schema, compression="zstd")
        writer.write_table(table)
    assert writer
    writer.close()
    wide_runs(folder / "team_demo_runs.parquet", runs, metrics=1)
    ids = pa.array([f"run{number:04}" for number in range(runs)])
    table = pq.read_table(folder / "team_demo_runs.parquet")
    pq.write_table(table.set_column(0, "id", ids), folder / "team_demo_runs.parquet")
    return folder / "team_demo_runs.parquet"


@benchmark
def bench_at_best() -> None:
    """analyze_runs.py --at-best on the history of 1,000 runs x 10,000 rows x 10 keys, against the same in pandas."""
    with tempfile.TemporaryDirectory() as name:
        runs = long_history(Path(name))
        history = str(runs.with_name("team_demo_history.parquet"))
        ours = [sys.executable, str(TOOLS / "analyze_runs.py"), str(runs), "--at-best", "val/loss", "--state", "all"]
        query = "SELECT metric_val_loss, metric_test_mse, " + ", ".join(f"metric_train_m{j}" for j in range(8))
        rows = [
            measure("pandas: read_parquet, idxmin, merge, last", [sys.executable, "-c", PANDAS_AT_BEST, history]),
            measure("analyze_runs.py --at-best, one metric", [*ours, "-m", "test/mse"]),
            measure("analyze_runs.py --at-best, all ten", [*ours, "--sql", f"{query} FROM runs"]),
        ]
        show("The value at the best step: 1,000 runs x 10,000 rows x 10 keys", rows)


@benchmark
def bench_report() -> None:
    """analyze_runs.py --report on 20,000 runs x 300 columns: time, memory and the size of the page beside Vega's."""
    import vl_convert

    with tempfile.TemporaryDirectory() as name:
        runs, page = Path(name) / "team_demo_runs.parquet", Path(name) / "report.html"
        wide_runs(runs)
        command = [sys.executable, str(TOOLS / "analyze_runs.py"), str(runs), "-m", "test/mse", "--best-by", "m0"]
        measured = measure("analyze_runs.py --report", [*command, "--report", str(page)])
        beside = (page.stat().st_size - len(vl_convert.javascript_bundle())) / 1e6
        rows = [dataclasses.replace(measured, note=f"{beside:.2f} MB beside Vega")]
        show("A page of 20,000 runs x 300 columns", rows)


@benchmark
def bench_analyze_help() -> None:
    """analyze_runs.py --help: should need less than 0.3 s of CPU."""
    command = [sys.executable, str(TOOLS / "analyze_runs.py"), "--help"]
    show("Help", [min((measure("analyze_runs.py --help", command) for _ in range(3)), key=lambda m: m.cpu)])


# ---------------------------------------------------------------- list_entities.py, against a loop over wandb.Api()


COUNTING = """# /// script
# requires-python = ">=3.11"
# dependencies = ["wandb>=0.31,<0.32"]
# ///
import wandb

api = wandb.Api()
for project in api.projects("ENTITY"):
    path = f"ENTITY/{project.name}"
    wanted = [{}, {"state": "finished"}, {"state": "running"}, {"state": {"$in": ["crashed", "failed"]}}]
    counts = [len(api.runs(path, filters, per_page=1)) for filters in wanted]
    print(project.name, *counts, [run.created_at for run in api.runs(path, order="-created_at", per_page=1)[:1]])
"""


@benchmark
def bench_list() -> None:
    """100 projects: len(api.runs(path, filters)) for each count, and list_entities.py."""
    fill = f'for i in range(100): server.fill("{ENTITY}", f"project_{{i:03}}", 50, config_values=5, metrics=5)'
    weather = "server.weather.latency, server.weather.work_per_count = 0.08, 0.005"
    with serving(f"{fill}\n{weather}") as tell, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = str(TOOLS / "list_entities.py")
        subprocess.run(["uv", "sync", "-q", "--compile-bytecode", "--script", script], check=True)
        ours = ["uv", "run", "-q", "--script", script]
        rows = [
            counted(tell, "start-up: list_entities.py --help", [*ours, "--help"], folder),
            counted(tell, "wandb.Api(), project after project", uv_script(folder, "loop.py", COUNTING), folder),
            counted(tell, "list_entities.py", [*ours, "-e", ENTITY], folder),
        ]
        show("100 projects, 80 ms round trip, 5 ms of server work per count", rows)


# ---------------------------------------------------------------- aggregate_runs.py, against pandas

PANDAS_AGGREGATE = r"""
import re, sys
from pathlib import Path
import pandas as pd

ARCHS = ("gnn_all gnn_qk gnn_v filter_bank linear_pe self_attention_mlp multilayer_self_attention self_attention "
         "digress_transformer digress_default asymmetric spectral_linear spectral mlp linear digress").split()
DATASETS = "pyg_enzymes pyg_proteins ring_of_cliques ego community grid sbm_small sbm tree regular".split()

def parse(row):
    name = row["name"] or ""
    def number(pattern):
        found = re.search(pattern, name)
        return float(found[1]) if found else None
    stage = re.search(r"stage\d+[a-z]?", name)
    return pd.Series({
        "stage": stage[0] if stage else None,
        "arch": next((arch for arch in ARCHS if arch in name), None),
        "dataset": next((dataset for dataset in DATASETS if dataset in name), None),
        "k": number(r"_k(\d+)"), "lr_parsed": number(r"_lr([\d.e-]+)"), "wd_parsed": number(r"_wd([\d.e-]+)"),
        "seed_parsed": number(r"_s(\d+)"), "eps_parsed": number(r"_eps([\d.]+)"),
    })

files = sorted(Path(sys.argv[1]).glob("*_runs.parquet"))
runs = pd.concat([pd.read_parquet(file).assign(_source_file=file.name) for file in files], ignore_index=True)
runs = runs.drop_duplicates(["entity", "project", "id"], keep="last")
pd.concat([runs, runs.apply(parse, axis=1)], axis=1).to_parquet(sys.argv[2])
"""

PLAIN_CONCAT = """
import sys
from pathlib import Path
import polars as pl

files = sorted(Path(sys.argv[1]).glob("*_runs.parquet"))
pl.concat([pl.scan_parquet(file) for file in files], how="diagonal").sink_parquet(sys.argv[2])
"""


def wide_exports(folder: Path, files: int, runs: int = 1000) -> None:
    """Write `files` exports of `runs` runs and 300 columns each: 80 of config, 200 metrics, some in few files only."""
    import polars as pl

    archs = ["gnn_qk", "filter_bank", "self_attention", "spectral_linear", "digress_transformer"]
    for file in range(files):
        project, row = f"project{file:03}", pl.col("i")
        rare = file % 7
        config = {f"p{j}": (row.hash(j) % [2, 100, 7, 5][j % 4]).cast(pl.Int64) for j in range(0, 60, 2)}
        config |= {f"p{j}": pl.lit(10.0) ** -(row.hash(j) % 6).cast(pl.Int64) for j in range(1, 60, 2)}
        config |= {f"only{rare}_{j}": (row % 3 == j % 3) for j in range(20)}
        metrics = {f"test_m{j}": row.hash(1000 * file + j) / 2.0**64 for j in range(160)}
        metrics |= {f"only{rare}_{j}": row.hash(j) / 2.0**64 for j in range(40)}
        wide = pl.DataFrame({"i": range(runs)}).select(
            id=pl.format("{}-{}", pl.lit(project), "i"),
            name=pl.format(
                "stage2_{}_sbm_default_lr1e-3_wd1e-4_k8_s{}", pl.lit(pl.Series(archs)).gather(row % 5), row % 10
            ),
            entity=pl.lit("team"),
            project=pl.lit(project),
            state=pl.lit("finished"),
            url=pl.format("https://wandb.ai/team/{}/runs/{}", pl.lit(project), "i"),
            created_at=pl.datetime(2025, 10, 1, time_zone="UTC") + pl.duration(minutes="i"),
            heartbeat_at=pl.datetime(2025, 10, 2, time_zone="UTC") + pl.duration(minutes="i"),
            tags=pl.concat_list(pl.lit("paper")),
            **{name: pl.lit(name) for name in ("user", "group", "job_type", "sweep", "notes", "commit")},
            **{"last_step": row, "runtime_seconds": row / 7, "history_rows": row},
            **{f"config_model_{key}": value for key, value in config.items()},
            **{f"metric_{key}": value for key, value in metrics.items()},
            _config_json=pl.struct(model=pl.struct(**config)).struct.json_encode(),
            _summary_json=pl.struct(**metrics).struct.json_encode(),
        )
        wide.write_parquet(folder / f"team_{project}_runs.parquet")


def aggregate_beside(title: str, label: str, code: str, files: int) -> None:
    """Measure `code` and aggregate_runs.py on the same `files` exports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide_exports(folder, files)
        ours = [sys.executable, str(TOOLS / "aggregate_runs.py"), name, "-o", f"{name}/ours.parquet"]
        rows = [measure(label, [sys.executable, "-c", code, name, f"{name}/theirs.parquet"])]
        show(title, [*rows, measure("aggregate_runs.py", ours)])


@benchmark
def bench_aggregate() -> None:
    """aggregate_runs.py on 20 files of 1,000 runs x 300 columns against pandas: concat, apply per row, write."""
    title = "Aggregate 20 files of 1,000 runs x 300 columns"
    aggregate_beside(title, "pandas: read_parquet, concat, apply", PANDAS_AGGREGATE, 20)


@benchmark
def bench_aggregate_100() -> None:
    """aggregate_runs.py on 100 files of 1,000 runs x 300 columns against a bare diagonal concat to a sink."""
    title = "Aggregate 100 files of 1,000 runs x 300 columns"
    aggregate_beside(title, "polars: diagonal concat, sink (no parsing)", PLAIN_CONCAT, 100)


def main() -> None:
    """Run the named benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="which benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and exit")
    args = parser.parse_args()
    if args.list:
        for name, function in BENCHMARKS.items():
            print(f"{name:<20} {(function.__doc__ or '').splitlines()[0]}")
        return
    for name in args.name or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
