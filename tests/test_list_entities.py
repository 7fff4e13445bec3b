"""list_entities.py: its counts are W&B's, it costs few requests, and it names what it cannot show."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import TOOLS, clean_env, load_script, run_script
from demo import sample
from wandb_server import KEY, WandbServer

STATES = ["running", "finished", "crashed", "failed", "killed", "pending", "preempting", "preempted"]
TEAM = "graph_denoise_team"


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


def env(server: WandbServer, home: Path, **extra: str) -> dict[str, str]:
    return clean_env(home, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, **extra)


def listed(server: WandbServer, home: Path, *args: str, code: int = 0, **extra: str) -> dict:
    """What `--json` prints: entity -> its object."""
    done = run_script("list_entities.py", *args, "--json", cwd=home, env=env(server, home, **extra))
    assert done.returncode == code, done.stderr
    return {entity["name"]: entity for entity in json.loads(done.stdout)["entities"]}


@pytest.fixture
def connection(server, monkeypatch):
    """The script's module, and its connection to `server`."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return load_script("list_entities.py").Connection()


def test_json_is_the_contract_and_counts_every_state(server, tmp_path):
    odd = 'a "quoted" \\ {name} $x 模型'
    for position, state in enumerate(STATES):
        for number in range(position + 1):
            server.add_run(TEAM, odd, state=state, created_at=f"2025-10-{position + 1:02}T0{number}:00:00Z")
    server.add_run(TEAM, "small", state="finished", created_at="2025-11-05T10:00:00Z")
    server.add_project(TEAM, "empty")
    assert listed(server, tmp_path, "-e", TEAM) == {
        TEAM: {
            "name": TEAM,
            "total_projects": 3,
            "total_runs": 37,
            "total_finished": 3,
            "projects": [
                {
                    "name": odd,
                    "run_count": 36,
                    "finished_count": 2,
                    "running_count": 1,
                    "failed_count": 7,
                    "last_run_at": "2025-10-08T07:00:00Z",
                },
                {
                    "name": "small",
                    "run_count": 1,
                    "finished_count": 1,
                    "running_count": 0,
                    "failed_count": 0,
                    "last_run_at": "2025-11-05T10:00:00Z",
                },
                {
                    "name": "empty",
                    "run_count": 0,
                    "finished_count": 0,
                    "running_count": 0,
                    "failed_count": 0,
                    "last_run_at": None,
                },
            ],
        }
    }


def test_counts_are_those_of_the_real_client(server, tmp_path):
    sample(server)
    ours = listed(server, tmp_path, "-e", TEAM)[TEAM]
    loop = f"""
import json, wandb
api = wandb.Api()
wanted = {{"run_count": {{}}, "finished_count": {{"state": "finished"}}, "running_count": {{"state": "running"}},
           "failed_count": {{"state": {{"$in": ["crashed", "failed"]}}}}}}
found = {{}}
for project in api.projects("{TEAM}"):
    path = f"{TEAM}/{{project.name}}"
    found[project.name] = {{name: len(api.runs(path, filters, per_page=1)) for name, filters in wanted.items()}}
    found[project.name]["last_run_at"] = api.runs(path, order="-created_at", per_page=1)[0].created_at
print(json.dumps(found))
"""
    client = subprocess.run(
        [sys.executable, "-c", loop],
        cwd=tmp_path,
        env=env(server, tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    theirs = json.loads(client.stdout)
    assert {project.pop("name"): project for project in ours["projects"]} == theirs
    assert len(theirs) == 4


def on_terminal(*args: str, cwd: Path, env: dict[str, str]) -> str:
    """What the script shows on a terminal of 80 columns."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    command = [sys.executable, TOOLS / "list_entities.py", *args]
    environment = env | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the script has ended
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 0, errors
    return re.sub(r"\x1b\[[\d;]*m", "", shown.decode())


def test_table_is_sorted_and_totalled_and_fits_a_terminal_but_folds_no_name_in_a_pipe(server, tmp_path):
    sample(server)
    server.add_run(TEAM, "x" * 100, state="finished", created_at="2026-01-02T03:04:05Z")
    server.add_run(TEAM, "[bold]a :smile: [/x]", state="crashed", created_at="2024-01-02T03:04:05Z")
    server.add_run(TEAM, "clear\x1b[2J\u202e\x9b", state="crashed", created_at="2023-01-02T03:04:05Z")
    done = run_script("list_entities.py", "-e", TEAM, cwd=tmp_path, env=env(server, tmp_path))
    assert done.returncode == 0, done.stderr
    shown = on_terminal("-e", TEAM, cwd=tmp_path, env=env(server, tmp_path))
    assert all(len(line) <= 80 for line in shown.splitlines()), shown
    for text in (done.stdout, shown):
        lines = [line.split() for line in text.splitlines()]
        assert lines[0] == f"{TEAM}: 7 projects, 315 runs".split()
        assert ["spectral_denoising", "216", "201", "0", "15", "93.1%", "2025-09-20"] in lines
        assert ["total", "315", "293", "3", "19", "93.0%", "2026-01-02"] in lines
        assert "[bold]a :smile: [/x]" in text
        assert "clear\ufffd[2J\ufffd\ufffd" in text
        counts = [int(line[1]) for line in lines if len(line) == 7 and line[1].isdigit() and line[0] != "total"]
        assert counts == sorted(counts, reverse=True)
        assert not set("\x1b\u202e\x9b") & set(text)
    assert ["x" * 100, "1", "1", "0", "0", "100.0%", "2026-01-02"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    printed = run_script("list_entities.py", "-e", TEAM, "--json", cwd=tmp_path, env=env(server, tmp_path)).stdout
    assert not set("\x1b\u202e\x9b") & set(printed)
    names = [project["name"] for project in json.loads(printed)["entities"][0]["projects"]]
    assert "clear\x1b[2J\u202e\x9b" in names


def test_entities_asked_for(server, tmp_path):
    sample(server)
    assert list(listed(server, tmp_path)) == ["tester"]
    assert list(listed(server, tmp_path, WANDB_ENTITY=f" {TEAM} , tester,")) == [TEAM, "tester"]
    assert list(listed(server, tmp_path, "-e", "tester", WANDB_ENTITY=TEAM)) == ["tester"]
    assert list(listed(server, tmp_path, "--discover")) == ["tester", TEAM]
    assert list(listed(server, tmp_path, "--discover", "-e", TEAM, "-e", TEAM)) == [TEAM, "tester"]


def test_empty_entity_is_an_answer(server, tmp_path):
    done = run_script("list_entities.py", cwd=tmp_path, env=env(server, tmp_path))
    assert (done.returncode, done.stdout) == (0, "tester: 0 projects, 0 runs\n")


@pytest.mark.parametrize("hidden", ["null", "empty", "error"])
def test_an_entity_that_cannot_be_seen_is_named_and_the_others_come(server, tmp_path, hidden):
    sample(server)
    server.weather.hidden_entities = hidden
    args = ["-e", "graph_denoise_tean", "-e", TEAM]
    done = run_script("list_entities.py", *args, "--json", cwd=tmp_path, env=env(server, tmp_path))
    assert done.returncode == 1
    assert [entity["name"] for entity in json.loads(done.stdout)["entities"]] == [TEAM]
    assert "'graph_denoise_tean'" in done.stderr
    assert f"Did you mean {TEAM}?" in done.stderr
    alone = run_script("list_entities.py", "-e", "nowhere", cwd=tmp_path, env=env(server, tmp_path))
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "'nowhere'" in alone.stderr
    assert f"tester, {TEAM}" in alone.stderr


def test_a_hundred_projects_cost_few_requests_and_no_run_is_fetched(server, tmp_path):
    for number in range(100):
        server.fill(TEAM, f"project_{number:03}", 20, config_values=5, metrics=5)
    server.weather.latency = 0.08
    assert len(listed(server, tmp_path, "-e", TEAM)[TEAM]["projects"]) == 100
    assert server.stats.requests["Projects"] == 1
    assert server.stats.total <= 15
    assert server.stats.max_in_flight > 3
    assert server.stats.full_runs == 0
    assert server.stats.runs == 100  # the date of the last run of each


def test_listing_goes_on_behind_the_first_page(server, tmp_path):
    for number in range(501):
        server.add_project(TEAM, f"project_{number}")
    assert listed(server, tmp_path, "-e", TEAM)[TEAM]["total_projects"] == 501
    assert server.stats.requests["Projects"] == 2


def test_a_request_that_is_too_much_is_cut_in_two(server, connection):
    script = load_script("list_entities.py")
    sample(server)
    projects = [(TEAM, project.name) for project in server.projects_of(TEAM)]
    server.weather.error_5xx, server.weather.only = 2, {"CountRuns"}  # the client asks twice
    counted = script.count_runs(connection, projects)
    assert [facts["name"] for facts in counted] == [name for _, name in projects]
    assert [facts["run_count"] for facts in counted] == [len(server.runs(*project)) for project in projects]
    assert server.stats.requests["CountRuns"] == 4


def test_a_project_that_vanished_is_named_and_the_others_are_counted(server, connection):
    script = load_script("list_entities.py")
    sample(server)
    projects = [(TEAM, "pyg_transfer"), (TEAM, "gone")]
    first, second = script.count_runs(connection, projects)
    assert first["run_count"] == 24
    assert isinstance(second, script.Stop)
    assert "no such project" in str(second)


def test_projects_that_cannot_be_counted_are_named_and_shown_without_counts(server, connection, monkeypatch, capsys):
    script = load_script("list_entities.py")
    monkeypatch.setattr(script, "PATIENCE", 0.5)  # each further try would be seconds later
    sample(server)
    server.weather.error_5xx, server.weather.only = 1.0, {"CountRuns"}
    args = script.parse_arguments(["-e", TEAM])
    assert script.list_entities(connection, args) == 1
    shown = capsys.readouterr()
    assert shown.err.count("error: ") == 4
    assert f"error: {TEAM}/pyg_transfer: {server.url}: HTTP 503" in shown.err
    assert ["pyg_transfer", "-", "-", "-", "-", "-", "-"] in [line.split() for line in shown.out.splitlines()]


def test_control_c_ends_it_at_once(server, tmp_path):
    server.weather.hang = 1.0
    process = subprocess.Popen(
        [sys.executable, TOOLS / "list_entities.py"],
        env=env(server, tmp_path),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 30
    while not server.stats.total and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("args", [["-e"], ["-e", " "], ["-e", f"{TEAM}/pyg_transfer"], ["--nonsense"], ["surplus"]])
def test_wrong_arguments_end_with_two(tmp_path, args):
    done = run_script("list_entities.py", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.fullmatch(r"error: .+ See list_entities.py --help\.\n", done.stderr)
