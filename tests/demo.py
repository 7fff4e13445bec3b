#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["graphql-core>=3.3,<3.4", "pyarrow>=26,<27"]
# ///
"""The README's typical workflow, from start to end, with no W&B account.

    uv run tests/demo.py

Starts the W&B server that the tests use, with a small lab's runs in it, and lets the four scripts work on it, each
command printed before what it prints. The files stay in wandb_export/ for you to look at. Where that folder holds
files already, the demo works in a fresh folder demo_1/, demo_2/, ... and touches nothing else.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from wandb_server import KEY, WandbServer, sample

TOOLS = Path(__file__).resolve().parent.parent / "wandb-tools"
WORKFLOW = [  # as the README has it; tests/test_pipeline.py compares the two
    ("Who can I see, and how much is there?", "list_entities.py --discover"),
    ("Every project of the team, with every logged step", "export_runs.py -e graph_denoise_team --include-history"),
    ("Again: only what is new or changed is fetched", "export_runs.py -e graph_denoise_team --include-history"),
    ("One table of all projects, with what the runs' names say", "aggregate_runs.py"),
    ("The best runs", "analyze_runs.py wandb_export/aggregated.parquet --metric test/mse --top 5"),
    (
        "Which architecture, on which data set?",
        "analyze_runs.py wandb_export/aggregated.parquet --metric test/mse --pivot --plot wandb_export/pivot.html",
    ),
    (
        "The number for the paper: chosen on validation, reported on test, over seeds only",
        "analyze_runs.py wandb_export/aggregated.parquet --metric test/mse --best-by val/loss --filter enzymes",
    ),
    (
        "Learning curves",
        "analyze_runs.py wandb_export/graph_denoise_team_pyg_transfer_runs.parquet --curves val/loss --group-by arch",
    ),
    (
        "All of it on one page, which opens offline and can be mailed",
        "analyze_runs.py wandb_export/aggregated.parquet --metric test/mse --report wandb_export/report.html",
    ),
]


def working_folder(start: Path) -> Path:
    """`start`, or a new folder demo_N in it when its wandb_export/ holds something."""
    export = start / "wandb_export"
    if not export.exists() or (export.is_dir() and not any(export.iterdir())):
        return start
    number = 1
    while (start / f"demo_{number}").exists():
        number += 1
    folder = start / f"demo_{number}"
    folder.mkdir()
    print(f"wandb_export/ holds files already, so the demo works in {folder.name}/:\n\n$ cd {folder.name}")
    return folder


def environment(server: WandbServer) -> dict[str, str]:
    """The caller's environment without W&B settings of theirs, with the address and a key of the demo's server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "VIRTUAL_ENV"}
    around = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1"]))
    settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "NO_PROXY": around, "no_proxy": around}
    return kept | settings | {"PYTHONUTF8": "1"}


def main() -> int:
    """Run the workflow; returns 0, or the exit code of the first script that fails."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if not uv:
        print("the demo starts the scripts with uv, which is not here. Install it: pip install uv", file=sys.stderr)
        return 2
    folder = working_folder(Path.cwd())
    with WandbServer() as server:
        sample(server)
        print(f"A W&B server with the runs of a small lab listens on {server.url}; nothing leaves this machine.")
        for title, command in WORKFLOW:
            script, *arguments = shlex.split(command)
            path = os.path.relpath(TOOLS / script, folder)
            print(f"\n# {title}\n$ uv run {shlex.join([path, *arguments])}", flush=True)
            code = subprocess.run([uv, "run", path, *arguments], cwd=folder, env=environment(server)).returncode
            if code != 0:
                print(f"the demo stops here: {script} ended with exit code {code}", file=sys.stderr)
                return code
    export = folder / "wandb_export"
    print(f"\nThe files are in {os.path.relpath(export)}/:")
    for path in sorted(export.iterdir()):
        if not path.name.startswith("."):
            print(f"{path.stat().st_size:>12,} bytes  {path.name}")
    analyze, table = os.path.relpath(TOOLS / "analyze_runs.py"), os.path.relpath(export / "aggregated.parquet")
    print(
        f"\nOpen {os.path.relpath(export / 'report.html')} in a browser, or ask on, no server needed:\n"
        f"$ uv run {analyze} {table} --metric test/mse --importance\n"
        f'$ uv run {analyze} {table} --sql "SELECT arch, min(metric_test_mse) AS best FROM runs GROUP BY arch"'
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
