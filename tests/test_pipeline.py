"""The four scripts together: W&B to answers, the demo, each script alone in a folder, and what the README shows."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import demo
import polars as pl
import pytest
from conftest import REPO, TOOLS, clean_env, run_script
from demo import sample
from test_export_offline import simple_run, write_log
from wandb_server import KEY, WandbServer

pytestmark = pytest.mark.timeout(240)  # the demo runs within whichever test comes first
TEAM = "graph_denoise_team"
# Asked before any test moves HOME: the scripts' environments are made from what is downloaded already.
UV_CACHE = subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def lab():
    with WandbServer() as server:
        sample(server)
        yield server


@functools.cache
def offline() -> dict[str, str]:
    """UV_OFFLINE, wherever what was downloaded for the tests suffices for every script."""
    env = os.environ | {"UV_CACHE_DIR": UV_CACHE, "UV_PYTHON": sys.executable, "UV_OFFLINE": "1"}
    for script in [*TOOLS.glob("*.py"), REPO / "tests" / "demo.py"]:
        command = ["uv", "sync", "--script", str(script), "--dry-run", "-q"]
        if subprocess.run(command, env=env, capture_output=True, timeout=60).returncode != 0:
            return {}
    return {"UV_OFFLINE": "1"}


def uv_env(home: Path, **extra: str) -> dict[str, str]:
    """The environment for a real `uv run`."""
    env = clean_env(home, UV_CACHE_DIR=UV_CACHE, UV_PYTHON=sys.executable, **extra) | offline()
    env.pop("VIRTUAL_ENV", None)
    return env


@pytest.fixture(scope="session")
def shown(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a fresh clone in which the demo was run, and what it printed; once for all workers."""
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    place = (shared or tmp_path_factory.getbasetemp()) / "demo"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "printed").exists():
            printed = run_demo(place)
            (place / "printed").write_text(printed)
    return place / "clone", (place / "printed").read_text()


def run_demo(place: Path) -> str:
    """Run the demo as in a fresh clone, PLACE/clone; returns what it printed."""
    clone, home = place / "clone", place / "home"
    (clone / "tests").mkdir(parents=True)
    home.mkdir()
    for name in ("demo.py", "wandb_server.py"):
        shutil.copy(REPO / "tests" / name, clone / "tests")
    shutil.copytree(TOOLS, clone / "wandb-tools", ignore=shutil.ignore_patterns("__pycache__"))
    # Settings of the user's own must not lead the demo astray.
    (clone / ".env").write_text("WANDB_ENTITY=someone_else\nWANDB_API_KEY=" + "x" * 40 + "\n")
    done = subprocess.run(
        ["uv", "run", "tests/demo.py"],
        cwd=clone,
        env=uv_env(home, COLUMNS="80", WANDB_ENTITY="someone_else", HTTP_PROXY="http://127.0.0.1:9"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def exported(shown) -> Path:
    """The files that the demo left."""
    return shown[0] / "wandb_export"


def analyze(exported: Path, *args: str) -> list[dict]:
    done = run_script("analyze_runs.py", "aggregated.parquet", *args, "--json", cwd=exported)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer if isinstance(answer, list) else answer["rows"]


# ---------------------------------------------------------------- from W&B to an answer


def test_configs_and_summaries_come_back_as_wandb_holds_them(lab, exported):
    for project in lab.projects_of(TEAM):
        table = pl.read_parquet(exported / f"{TEAM}_{project.name}_runs.parquet")
        rows = {row["id"]: row for row in table.iter_rows(named=True)}
        assert list(rows) == [run.id for run in lab.runs(TEAM, project.name)]
        for run in lab.runs(TEAM, project.name):
            assert json.loads(rows[run.id]["_config_json"]) == run.config
            assert json.loads(rows[run.id]["_summary_json"]) == run.summary


def test_the_best_run_is_the_best_on_the_server(lab, exported):
    errors = {
        run.display_name: run.summary["test/mse"]
        for project in lab.projects_of(TEAM)
        for run in lab.runs(TEAM, project.name)
        if run.state == "finished" and not run.config["data"]["same_graph_all_splits"]
    }
    numbers = {name: error for name, error in errors.items() if isinstance(error, float) and math.isfinite(error)}
    best = sorted(numbers, key=numbers.__getitem__)[:5]
    top = analyze(exported, "--metric", "test/mse", "--top", "5")
    assert [row["name"] for row in top] == best
    query = "SELECT arch, count(metric_test_mse) AS n FROM runs GROUP BY arch ORDER BY arch"
    counted = {row["arch"]: row["n"] for row in analyze(exported, "--sql", query)}
    assert sum(counted.values()) == len(errors)
    assert set(counted) >= {"filter_bank", "self_attention", "gnn_qk", "digress_default"}


def test_history_is_every_logged_step(lab, exported):
    for project in lab.projects_of(TEAM):
        runs = lab.runs(TEAM, project.name)
        table = pl.read_parquet(exported / f"{TEAM}_{project.name}_history.parquet")
        assert table.height == sum(run.line_count for run in runs)
        run = runs[-1]
        ours = table.filter(pl.col("run_id") == run.id)
        theirs = run.history.rows(range(run.line_count))
        assert ours["_step"].to_list() == [row["_step"] for row in theirs]
        assert ours["val/loss"].to_list() == [row.get("val/loss") for row in theirs]


# ---------------------------------------------------------------- mistakes: said, not thrown


MISTAKES = [
    ("list_entities.py -e graph_denoise_tem", 2, "Did you mean graph_denoise_team?"),
    ("export_runs.py -e graph_denoise_tem", 2, "Did you mean graph_denoise_team?"),
    ("export_runs.py -e graph_denoise_team -p spectral_denoisin", 2, "spectral_denoising"),
    ("export_runs.py -e graph_denoise_team -p 'spectrum*'", 2, "spectrum"),
    ("export_runs.py -e tester -p scratch", 1, "scratch"),
    ("export_runs.py --since tomorrowish", 2, "tomorrowish"),
    ("export_runs.py --state done", 2, "done"),
    ("aggregate_runs.py nowhere/", 2, "nowhere"),
    ("aggregate_runs.py --filter '('", 2, "'('"),
    ("aggregate_runs.py --filter nothing_is_called_this -o none.parquet", 1, "no run is left"),
    ("aggregate_runs.py -o out.xlsx", 2, "xlsx"),
    ("analyze_runs.py nowhere.parquet", 2, "nowhere.parquet"),
    ("analyze_runs.py wandb_export/aggregated.parquet --metric test/mes", 2, "metric_test_mse"),
    ("analyze_runs.py wandb_export/aggregated.parquet --group-by archh", 2, "arch"),
    ("analyze_runs.py wandb_export/aggregated.parquet --filter nothing_is_called_this", 1, "no run matches"),
    ("analyze_runs.py wandb_export/aggregated.parquet --filter '('", 2, "'('"),
    ("analyze_runs.py wandb_export/aggregated.parquet --plot heat.gif", 2, "gif"),
]


@pytest.mark.parametrize(("command", "code", "said"), MISTAKES, ids=[command for command, _, _ in MISTAKES])
def test_a_users_mistake_ends_as_designed(lab, exported, tmp_path, command, code, said):
    (tmp_path / "wandb_export").mkdir()
    for path in (exported / "aggregated.parquet", *exported.glob("*_pyg_transfer_*")):
        shutil.copy(path, tmp_path / "wandb_export")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    env = clean_env(tmp_path, WANDB_BASE_URL=lab.url, WANDB_API_KEY=KEY)
    done = run_script(*shlex.split(command), cwd=tmp_path, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if "export_runs.py" not in command:  # which may note what it found; W&B's client keeps a log in the home
        after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and "logs" not in path.parts)
        assert after == before


# ---------------------------------------------------------------- real `uv run`


def test_the_demo_runs_the_workflow_and_leaves_its_files(shown):
    clone, output = shown
    commands = [line.removeprefix("$ ") for line in output.splitlines() if line.startswith("$ uv run")]
    assert commands[: len(demo.WORKFLOW)] == [f"uv run wandb-tools/{command}" for _, command in demo.WORKFLOW]
    assert not re.search(r"Traceback|^error:", output, re.M)
    assert "warning:" not in output.partition("--report")[0]  # the page also compares cells of few seeds, and says so
    files = {path.name for path in (clone / "wandb_export").iterdir()}
    assert {"aggregated.parquet", "pivot.html", "report.html", f"{TEAM}_spectral_denoising_runs.parquet"} <= files
    assert all(name in output for name in files if not name.startswith("."))
    assert KEY not in output
    assert not (clone / "demo_1").exists()


def test_the_demo_never_works_where_files_are(tmp_path):
    assert demo.working_folder(tmp_path) == tmp_path
    (tmp_path / "wandb_export").mkdir()
    assert demo.working_folder(tmp_path) == tmp_path  # an empty one will do
    (tmp_path / "wandb_export" / "mine_runs.parquet").write_bytes(b"mine")
    assert demo.working_folder(tmp_path) == tmp_path / "demo_1"
    assert demo.working_folder(tmp_path) == tmp_path / "demo_2"
    assert [path.name for path in (tmp_path / "wandb_export").iterdir()] == ["mine_runs.parquet"]


def test_each_script_runs_alone_in_an_empty_folder(lab, exported, tmp_path):
    runs = exported / f"{TEAM}_pyg_transfer_runs.parquet"
    jobs = {
        "list_entities.py": ["-e", TEAM],
        "export_runs.py": ["-e", TEAM, "-p", "pyg_transfer"],
        "aggregate_runs.py": [str(runs)],
        "analyze_runs.py": [str(runs), "--metric", "test/mse", "--top", "1"],
    }
    env = uv_env(tmp_path, WANDB_BASE_URL=lab.url, WANDB_API_KEY=KEY)
    for script, job in jobs.items():
        alone = tmp_path / f"only {script}"
        alone.mkdir()
        shutil.copy(TOOLS / script, alone)
        for args in (["--help"], job):
            done = subprocess.run(
                ["uv", "run", script, *args], cwd=alone, env=env, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout


def test_the_demo_has_the_bounds_of_the_dev_environment():
    text = (REPO / "tests" / "demo.py").read_text()
    header = tomllib.loads(re.sub(r"^# ?", "", text.partition("# /// script\n")[2].partition("# ///\n")[0], flags=re.M))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    assert set(header["dependencies"]) <= set(project["dependencies"])


# ---------------------------------------------------------------- the README and .env.example


def readme_commands() -> list[str]:
    """Every command of the README that starts one of the four scripts, continued lines joined."""
    text = (REPO / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"uv run (wandb-tools/\w+\.py[^\n`]*)", text)
    return [re.sub(r"\s+(#|\||>) .*", "", command).strip() for command in found]


def test_the_readme_shows_the_demos_workflow():
    commands = readme_commands()
    assert len(commands) > 20
    missing = [command for _, command in demo.WORKFLOW if f"wandb-tools/{command}" not in commands]
    assert not missing


def test_every_option_that_the_readme_shows_exists(tmp_path):
    for command in dict.fromkeys(readme_commands()):
        script, *args = shlex.split(command)
        # argparse names the first thing that is wrong; it has to be what is added here.
        done = run_script(Path(script).name, *args, "--no-such-option", cwd=tmp_path)
        assert done.returncode == 2, command
        assert "unrecognized arguments: --no-such-option. See " in done.stderr, command


def lines_of(text: str, numbers: bool) -> list[str]:
    """The lines that are not empty, without trailing blanks; without figures, where they differ from run to run."""
    lines = [line.rstrip() for line in text.splitlines()]
    return [line if numbers else re.sub(r"[\d.,]+ ?(kB|MB|B\b)?|\s+", "", line) for line in lines if line]


def test_what_the_readme_shows_is_what_the_commands_print(shown):
    """Every line of every console block is real; `...` stands for lines that are left out."""
    clone, output = shown
    for run in ("run0", "run1", "run2"):  # of --offline wandb/
        write_log(clone / "wandb", simple_run(run, 200, entity="my_team", project="my_project"))
    printed: dict[str, str] = {}
    for command, text in re.findall(r"^\$ (uv run .*)\n((?:(?!\$ |# \S).*\n)*)", output, flags=re.M):
        printed.setdefault(command, text)  # of two equal commands, the first
    blocks = re.findall(r"```console\n\$ (uv run [^\n]*)\n(.*?)```", (REPO / "README.md").read_text(), flags=re.S)
    assert len(blocks) >= 8
    for command, block in blocks:
        if not printed.get(command):
            script, *args = shlex.split(command.removeprefix("uv run wandb-tools/"))
            done = run_script(script, *args, cwd=clone, env=clean_env(clone, COLUMNS="80"))
            printed[command] = done.stderr + done.stdout
        steady = "export_runs.py" not in command  # seconds and sizes are not
        real = lines_of(printed[command], steady)
        untrue = [line for line in lines_of(block.replace("...\n", ""), steady) if line not in real]
        assert not untrue, f"`{command}` does not print this any more: {untrue}"


def test_the_readmes_python_runs(shown):
    clone, _ = shown
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), flags=re.S)
    here = [block for block in blocks if not re.search(r"import (pyspark|ray)|from pyspark", block)]  # need a cluster
    assert here
    for block in here:
        done = subprocess.run([sys.executable, "-c", block], cwd=clone, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, block + done.stderr


def test_the_readmes_name_patterns_work(tmp_path):
    lab = {"display_name": "Phase2/ViT-B-heads12-lr3e-4 in1k aug=mix"}
    [rules] = re.findall(r"```toml\n(.*?)```", (REPO / "README.md").read_text(), flags=re.S)
    assert lab["display_name"] in (REPO / "README.md").read_text()
    (tmp_path / "lab.toml").write_text(rules)
    with WandbServer() as server:
        server.add_run("tester", "vision", **lab)
        env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        assert run_script("export_runs.py", cwd=tmp_path, env=env).returncode == 0
    done = run_script("aggregate_runs.py", "--rules", "lab.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    columns = ["stage", "arch", "k", "lr_parsed", "augmentation", "dataset"]
    table = pl.read_parquet(tmp_path / "wandb_export" / "aggregated.parquet", columns=columns)
    assert table.select(columns).rows() == [("phase2", "vit-b", 12, 3e-4, "mix", "imagenet")]


def test_dotenv_example_names_every_variable_that_the_scripts_read():
    example = (REPO / ".env.example").read_text()
    read = set()
    for script in ("list_entities.py", "export_runs.py"):
        text = (TOOLS / script).read_text()
        read |= set(re.findall(r'(?:settings\.get|os\.environ\.get)\(\s*"(\w+)"', text)) | {"WANDB_API_KEY"}
        read |= set(re.findall(r'^TEAM_KEY = "(\w+)"', text, re.M))
    read -= {"NETRC", "WANDB_CONFIG_DIR", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"}  # belong to other tools
    named = set(re.findall(r"^#?[ ]*(\w+)=", example, re.M))
    assert {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "GRAPH_DENOISE_TEAM_SERVICE"} <= read
    assert read <= named
    active = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert all(line.endswith("=") for line in active), "an example holds no values that would take effect"
