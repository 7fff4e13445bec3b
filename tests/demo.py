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

import itertools
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from wandb_server import KEY, WandbServer, instant, iso

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


# ---------------------------------------------------------------------------------------------------------------------
# The sample: a graph-denoising lab.

ARCH_BASE = {  # log10 of the test error that an architecture reaches at its best
    "filter_bank": -1.95,
    "self_attention": -2.10,
    "linear_pe": -1.60,
    "spectral_linear": -1.45,
    "digress_default": -1.70,
    "digress_transformer_gnn_all": -2.00,
    "digress_transformer_gnn_qk": -2.05,
    "digress_transformer_gnn_v": -1.90,
}
DATASET_HARDNESS = {"sbm": 0.0, "ring_of_cliques": -0.25, "ego": 0.2, "pyg_enzymes": 0.35, "pyg_proteins": 0.45}
BEST_K = {"sbm": 8, "ring_of_cliques": 16, "ego": 8, "pyg_enzymes": 16, "pyg_proteins": 16}
MODEL_TARGETS = {
    "filter_bank": "graph_denoise.models.SpectralDenoiser",
    "spectral_linear": "graph_denoise.models.SpectralDenoiser",
    "self_attention": "graph_denoise.models.AttentionDenoiser",
    "linear_pe": "graph_denoise.models.LinearPE",
}
SAMPLE_START = "2025-09-15T08:00:00Z"


def sample(server: WandbServer) -> None:
    """Fill a fresh server with the lab that the demo and the README show: four projects of `graph_denoise_team`.

    Deterministic. k and the learning rate have an optimum, architectures and datasets differ, seeds scatter a little;
    a few runs crashed, failed or still run, and one diverged to NaN.
    """
    rng = random.Random(2025)
    clock = instant(SAMPLE_START)
    lab = "graph_denoise_team"
    plans: list[tuple[str, str, dict[str, Any]]] = []
    for arch, lr, wd, seed in itertools.product(
        [name for name in ARCH_BASE if name.startswith("digress")], (1e-4, 1e-3), (1e-4, 1e-2), (1, 2, 3)
    ):
        plans.append(
            (
                "digress_baselines",
                "stage1c_{arch}_lr{lr}_wd{wd}_k{k}_s{seed}",
                sample_knobs(arch, "sbm", lr, wd, 8, seed),
            )
        )
    for arch, dataset, eps, seed in itertools.product(
        ("filter_bank", "self_attention"), ("sbm", "ego"), (0.1, 0.2), (1, 2, 3)
    ):
        knobs = sample_knobs(arch, dataset, 1e-3, 1e-4, 8, seed) | {"eps": eps, "single": True}
        plans.append(
            ("single_graph_ablation", "stage1_{arch}_{dataset}_single_lr{lr}_wd{wd}_k{k}_eps{eps}_s{seed}", knobs)
        )
    for arch, dataset, k, lr, seed in itertools.product(
        ("filter_bank", "self_attention", "linear_pe", "spectral_linear"),
        ("sbm", "ring_of_cliques", "ego"),
        (4, 8, 16),
        (1e-4, 1e-3, 1e-2),
        (1, 2),
    ):
        knobs = sample_knobs(arch, dataset, lr, 1e-4, k, seed)
        plans.append(("spectral_denoising", "stage2_{arch}_{dataset}_default_lr{lr}_wd{wd}_k{k}_s{seed}", knobs))
    for arch, dataset, lr, seed in itertools.product(
        ("self_attention", "filter_bank"), ("pyg_enzymes", "pyg_proteins"), (3e-4, 1e-3), (1, 2, 3)
    ):
        knobs = sample_knobs(arch, dataset, lr, 1e-4, 16, seed)
        plans.append(("pyg_transfer", "stage3_pyg_dist_{arch}_{dataset}_lr{lr}_wd{wd}_k{k}_s{seed}", knobs))
    for number, (project, pattern, knobs) in enumerate(plans):
        left = len(plans) - number
        state = "running" if left <= 3 else rng.choices(("finished", "crashed", "failed"), (94, 4, 2))[0]
        diverged = project == "spectral_denoising" and (
            knobs["arch"],
            knobs["dataset"],
            knobs["k"],
            knobs["lr"],
            knobs["seed"],
        ) == (
            "self_attention",
            "ego",
            16,
            1e-2,
            2,
        )
        spelled = knobs | {"lr": short_float(knobs["lr"]), "wd": short_float(knobs["wd"])}
        sample_run(
            server,
            lab,
            project,
            pattern.format_map(spelled),
            knobs,
            "finished" if diverged else state,
            diverged,
            clock,
            rng,
        )
        clock += rng.randint(300, 3000)
    server.add_project("tester", "scratch", SAMPLE_START)


def sample_knobs(arch: str, dataset: str, lr: float, wd: float, k: int, seed: int) -> dict[str, Any]:
    """The hyperparameters of a sample run."""
    return {"arch": arch, "dataset": dataset, "lr": lr, "wd": wd, "k": k, "seed": seed, "eps": 0.1, "single": False}


def short_float(value: float) -> str:
    """`0.001` -> `1e-3`, as the lab writes it into names."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def sample_run(
    server: WandbServer,
    entity: str,
    project: str,
    name: str,
    knobs: dict[str, Any],
    state: str,
    diverged: bool,
    clock: float,
    rng: random.Random,
) -> None:
    """Add one run of the lab: config, curves and, when it finished, test metrics that follow from its knobs."""
    arch, dataset, lr, k, eps = (knobs[key] for key in ("arch", "dataset", "lr", "k", "eps"))
    error = 10 ** (
        ARCH_BASE[arch]
        + DATASET_HARDNESS[dataset]
        + 0.22 * math.log10(lr / 1e-3) ** 2
        + 0.10 * math.log2(k / BEST_K[dataset]) ** 2
        + (0.12 if knobs["wd"] > 1e-3 else 0.0)
        + 0.9 * math.log10(eps / 0.1)
        - (0.3 if knobs["single"] else 0.0)
        + rng.gauss(0, 0.04)
    )
    epochs = 200 if state == "finished" else rng.randint(40, 160)
    seconds = rng.uniform(6, 14)
    rows = []
    for step in range(epochs):
        decay = math.exp(-step / (30 * (1e-3 / lr) ** 0.3))
        row: dict[str, Any] = {
            "_step": step,
            "_timestamp": clock + step * seconds,
            "_runtime": step * seconds,
            "epoch": step,
            "train/loss": error * 0.8 + decay * rng.uniform(0.9, 1.1),
        }
        if step % 5 == 4:
            row["val/loss"] = error * 1.05 + decay * rng.uniform(1.0, 1.2)
        if diverged and step > 60:
            row = {key: math.nan if key.endswith("loss") else value for key, value in row.items()}
        rows.append(row)
    validated = [row for row in rows if "val/loss" in row]
    best = min(validated, key=lambda row: math.inf if math.isnan(row["val/loss"]) else row["val/loss"])
    summary = rows[-1] | {
        "val/loss": validated[-1]["val/loss"],
        "best_epoch": best["epoch"],
        "val/best": {"min": best["val/loss"]},
        "_wandb": {"runtime": int(epochs * seconds)},
    }
    if state == "finished":
        summary |= {
            "test/mse": math.nan if diverged else error,
            "test/accuracy": math.nan if diverged else 1 / (1 + 4 * error),
            "test/eps_0.1/mse": math.nan if diverged else error * 0.8,
            "test/eps_0.2/mse": math.nan if diverged else error * 1.6,
            "test/spectrum": {"_type": "histogram", "values": [3, 9, 14, 6], "bins": [0.0, 0.5, 1.0, 1.5, 2.0]},
        }
    config = {
        "seed": knobs["seed"],
        "model": {
            "_target_": MODEL_TARGETS.get(arch, "graph_denoise.models.DigressTransformer"),
            "k": k,
            "hidden_dim": 128,
            "num_layers": 4,
            "dropout": 0.1,
            "eigenvectors": {"normalize": True, "sign_invariant": arch == "linear_pe"},
        },
        "data": {
            "_target_": f"graph_denoise.data.{'SingleGraph' if knobs['single'] else 'GraphDistribution'}DataModule",
            "dataset_name": dataset,
            "graph_type": "real" if dataset.startswith("pyg") else "synthetic",
            "same_graph_all_splits": knobs["single"],
            "num_graphs": 1 if knobs["single"] else 200,
            "noise": {"type": "gaussian", "eps": [eps]},
            "batch_size": 32,
        },
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr, "weight_decay": knobs["wd"]},
        "trainer": {"max_epochs": 200, "gradient_clip_val": 1.0, "precision": "32-true", "devices": 1},
        "_wandb": {"cli_version": "0.31.0", "python_version": "3.11.9", "framework": "lightning"},
    }
    stage = name.partition("_")[0]
    created_at = iso(clock)
    server.add_run(
        entity,
        project,
        display_name=name,
        config=config,
        summary=summary,
        state=state,
        created_at=created_at,
        heartbeat_at=iso(clock + epochs * seconds),
        tags=(stage, "paper") if project == "spectral_denoising" and lr == 1e-3 else (stage,),
        group=name.rpartition("_s")[0],
        job_type="train",
        sweep="k3x9q2ab" if project == "spectral_denoising" and arch == "filter_bank" else None,
        commit=f"{rng.getrandbits(160):040x}",
        user=("tester", "alice")[len(name) % 2],
        history=rows,
        exported_steps=epochs - epochs % 50 if state == "running" else epochs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command line.


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
