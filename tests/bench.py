"""Speed and memory of the tools against what people write instead, side by side in one run.

    uv run tests/bench.py export            # 2,163 runs: the naive loop, the best public loop, export_runs.py
    uv run tests/bench.py --list            # every benchmark and what it compares

Figures are whole processes, start-up included: wall time, CPU time (all processes of the tree) and the peak of the
tree's resident memory. Nothing here is a test; the figures go into the README and into the closing notes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
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
