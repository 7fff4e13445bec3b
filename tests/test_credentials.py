"""Keys and addresses: where they are looked for, in which order, and that no part of a key is ever shown or stored.

Every source holds a key of a different user, so the entity that a script lists by default says which key it used.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import TOOLS, clean_env, run_script
from wandb_server import WandbServer

letters = random.Random(7)
KEYS = {
    name: "".join(letters.choices(string.ascii_letters + string.digits, k=40))
    for name in ("argument", "environment", "dotenv", "other_dotenv", "login")
}
KEYS["team"] = "wandb_v1_" + "".join(letters.choices(string.ascii_letters + string.digits, k=70))
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"
SCRIPTS = ["list_entities.py", "export_runs.py"]
FOUR_PLACES = ("--api-key", "WANDB_API_KEY", TEAM_KEY, "netrc")


@pytest.fixture
def server():
    with WandbServer() as server:
        for user, key in KEYS.items():
            server.add_key(key, user)
            server.add_run(user, "things", config={"lr": 0.1}, summary={"loss": 1.5})
        yield server


def assert_no_key(text: str) -> None:
    """No five characters in a row of any key stand in `text`."""
    for user, key in KEYS.items():
        secret = key.removeprefix("wandb_v1_")
        pieces = {secret[start : start + 5] for start in range(len(secret) - 4)}
        assert not any(piece in text for piece in pieces), f"part of the key of {user} is shown"


def run_checked(script: str, *args: object, **kwargs) -> subprocess.CompletedProcess[str]:
    done = run_script(script, *args, **kwargs)
    assert_no_key(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    return done


def who(script: str, cwd: Path, env: dict[str, str], *args: str) -> tuple[str, str]:
    """The user whose key the script used, and what it said on stderr."""
    args = (*args, "--json") if script == "list_entities.py" else (*args, "--dry-run")
    done = run_checked(script, *args, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    if script == "list_entities.py":
        return json.loads(done.stdout)["entities"][0]["name"], done.stderr
    return done.stdout.partition("/things: would fetch")[0], done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_four_sources_in_their_order(server, tmp_path, script):
    home = tmp_path / "home"
    (home / ".netrc").write_text(f"machine {server.url[7:]}\n  login user\n  password {KEYS['login']}\n")
    work = tmp_path / "work" / "deep"
    work.mkdir(parents=True)
    dotenv = tmp_path / "work" / ".env"  # in a parent of the working directory
    env = clean_env(home, WANDB_BASE_URL=server.url)
    user, said = who(script, work, env)
    assert user == "login"
    assert "`wandb login`" in said

    dotenv.write_text(f'{TEAM_KEY}="{KEYS["team"]}"\n')
    user, said = who(script, work, env)
    assert user == "team"
    assert f"{TEAM_KEY} in {dotenv}" in said

    dotenv.write_text(f"{TEAM_KEY}={KEYS['team']}\nexport WANDB_API_KEY='{KEYS['dotenv']}'\n")
    user, said = who(script, work, env)
    assert user == "dotenv"
    assert f"WANDB_API_KEY in {dotenv}" in said

    user, said = who(script, work, env | {"WANDB_API_KEY": KEYS["environment"]})
    assert user == "environment"
    assert "WANDB_API_KEY in the environment" in said
    # A variable that is set to nothing counts as not set.
    assert who(script, work, env | {"WANDB_API_KEY": " "})[0] == "dotenv"

    if script == "export_runs.py":
        user, said = who(script, work, env | {"WANDB_API_KEY": KEYS["environment"]}, "--api-key", KEYS["argument"])
        assert user == "argument"
        assert "--api-key" in said


def test_dotenv_beside_the_script_comes_after_that_of_the_working_directory(server, tmp_path):
    tools, work = tmp_path / "repo" / "tools", tmp_path / "work"
    tools.mkdir(parents=True)
    work.mkdir()
    script = shutil.copy(TOOLS / "list_entities.py", tools)

    def user() -> str:
        command = [sys.executable, script, "--json"]
        done = subprocess.run(command, cwd=work, env=clean_env(tmp_path), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert_no_key(done.stdout + done.stderr)
        return json.loads(done.stdout)["entities"][0]["name"]

    # In a parent of the script's folder; the address stands there, too.
    (tmp_path / "repo" / ".env").write_text(f"WANDB_BASE_URL={server.url}/\nWANDB_API_KEY={KEYS['other_dotenv']}\n")
    assert user() == "other_dotenv"
    (work / ".env").write_text(f"WANDB_API_KEY={KEYS['dotenv']}\n")
    assert user() == "dotenv"


def test_entities_from_dotenv(server, tmp_path):
    lines = f"WANDB_BASE_URL={server.url}\nWANDB_API_KEY={KEYS['team']}\nWANDB_ENTITY=team,login\n"
    (tmp_path / ".env").write_text(lines)
    done = run_checked("list_entities.py", "--json", cwd=tmp_path)
    assert [entity["name"] for entity in json.loads(done.stdout)["entities"]] == ["team"]
    assert "'login'" in done.stderr


def test_what_the_real_wandb_login_stores_is_found(server, tmp_path):
    env = clean_env(tmp_path)
    wandb = [sys.executable, "-m", "wandb", "login", "--host", server.url, KEYS["login"]]
    done = subprocess.run(wandb, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert KEYS["login"] in (tmp_path / ".netrc").read_text()
    for script in SCRIPTS:  # the address, too, comes from what `wandb login --host` stored
        assert who(script, tmp_path, env)[0] == "login"
    moved = tmp_path / "moved"
    (tmp_path / ".netrc").rename(moved)
    assert who("list_entities.py", tmp_path, env | {"NETRC": str(moved)})[0] == "login"


def test_no_part_of_a_key_reaches_a_file(server, tmp_path):
    (tmp_path / ".env").write_text(f"{TEAM_KEY}={KEYS['team']}\n")
    run = server.runs("team", "things")[0]
    server.update_run("team", "things", run.id, history=[{"_step": 0, "loss": 1.5}], exported_steps=1)
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url)
    done = run_checked("export_runs.py", "--include-history", "-o", "out", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".env"]
    assert {"team_things_runs.parquet", "team_things_history.parquet", "team_things_metadata.json"} <= {
        path.name for path in written
    }
    for path in written:
        assert_no_key(path.read_bytes().decode("latin-1"))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("netrc", [None, "", "machine other.example.com login user password x", "machine {", "\x00"])
def test_no_key_names_the_four_places(server, tmp_path, script, netrc):
    if netrc is not None:
        (tmp_path / ".netrc").write_text(netrc)
    done = run_checked(script, cwd=tmp_path, env=clean_env(tmp_path, WANDB_BASE_URL=server.url))
    assert (done.returncode, done.stdout) == (2, "")
    assert all(place in done.stderr for place in FOUR_PLACES), done.stderr
    assert server.stats.total == 0


def test_a_rejected_key_is_named_by_its_source(server, tmp_path):
    refused = "Q" * 20 + "zJ5wWq8nLk2vXt7yRb4c"
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url)
    sources = {
        "WANDB_API_KEY in the environment": (SCRIPTS, env | {"WANDB_API_KEY": refused}, []),
        "--api-key": (SCRIPTS[1:], env | {"WANDB_API_KEY": KEYS["login"]}, ["--api-key", refused]),
    }
    for source, (scripts, environment, args) in sources.items():
        for script in scripts:
            done = run_checked(script, *args, cwd=tmp_path, env=environment)
            assert done.returncode == 2
            assert f"rejects the API key from {source}" in done.stderr
            assert not any(refused[start : start + 5] in done.stderr for start in range(len(refused) - 4))
            assert server.stats.total == 1  # no use in trying again
            server.stats.reset()


def test_a_key_that_is_revoked_half_way(server, tmp_path):
    server.weather.revoke_after = 2
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEYS["login"])
    done = run_checked("list_entities.py", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rejects the API key" in done.stderr


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"WANDB_BASE_URL": "api.wandb.ai"}, "'api.wandb.ai'"),
        ({"WANDB_BASE_URL": "https://"}, "'https:"),
        ({"WANDB_HTTP_TIMEOUT": "soon"}, "'soon'"),
        ({"WANDB_HTTP_TIMEOUT": "0"}, "'0'"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_that_cannot_be_meant(tmp_path, script, settings, wrong):
    env = clean_env(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEYS["login"])
    done = run_checked(script, cwd=tmp_path, env=env | settings)
    assert done.returncode == 2, done.stderr
    assert wrong in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dotenv_that_is_no_utf8(tmp_path, script):
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={KEYS['login']}\n", encoding="utf-16")
    done = run_checked(script, cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / ".env") in done.stderr


@pytest.mark.parametrize("fault", ["rate_limit", "error_5xx", "cut_body"])
def test_bad_weather_is_survived(server, tmp_path, fault):
    setattr(server.weather, fault, 2)
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEYS["login"])
    started = time.monotonic()
    assert who("list_entities.py", tmp_path, env)[0] == "login"
    assert server.stats.total == 6  # Viewer twice, Projects, CountRuns, and two in vain
    if fault == "rate_limit":
        assert time.monotonic() - started >= 2 * server.weather.retry_after


class Http:
    """An HTTP server of our own: answers every request by `handle(method, path, headers, body) -> status, body`."""

    def __init__(self, handle) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = handle(self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Http:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("answer", [b"<!doctype html><title>Welcome</title>", b"[]", b'{"data": null}', b""])
def test_an_address_that_is_not_the_api_is_no_traceback(tmp_path, script, answer):
    with Http(lambda *_: (200, answer)) as other:
        env = clean_env(tmp_path, WANDB_BASE_URL=f"http://{other.address}", WANDB_API_KEY=KEYS["login"])
        done = run_checked(script, cwd=tmp_path, env=env)
    assert done.returncode in (1, 2)
    assert f"http://{other.address}" in done.stderr
    assert re.match(r"error: .*(the answer is no JSON|no data|rejects the API key)", done.stderr.splitlines()[-1])


def test_proxies_are_used_with_their_password_and_no_proxy_goes_around_them(server, tmp_path):
    seen = []

    def forward(path, headers, body):
        seen.append((path, headers["Proxy-Authorization"]))
        passed = {"Authorization": headers["Authorization"], "Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.url}/graphql", body, passed)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=20) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    with Http(forward) as proxy:
        names = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        env = {k: v for k, v in clean_env(tmp_path).items() if k.lower() not in names}
        env |= {"WANDB_API_KEY": KEYS["login"], "WANDB_BASE_URL": "http://api.wandb.invalid"}
        for variable, address in [
            ("HTTP_PROXY", f"http://lab:p%40ss@{proxy.address}"),
            ("http_proxy", f"lab:p%40ss@{proxy.address}"),
        ]:
            seen.clear()
            assert who("list_entities.py", tmp_path, env | {variable: address})[0] == "login"
            # lab:p@ss
            assert seen == [("http://api.wandb.invalid/graphql", "Basic bGFiOnBAc3M=")] * 4
        seen.clear()
        around = env | {"WANDB_BASE_URL": server.url, "HTTP_PROXY": f"http://{proxy.address}", "NO_PROXY": "127.0.0.1"}
        assert who("list_entities.py", tmp_path, around)[0] == "login"
        assert seen == []


HEAVY = {"wandb", "polars", "pyarrow", "altair", "vl_convert", "rich", "dotenv", "urllib3", "pandas", "numpy"}
WRONG = {
    "list_entities.py": ["--nonsense"],
    "export_runs.py": ["--since", "yesterday-ish"],
    "aggregate_runs.py": ["--nonsense"],
    "analyze_runs.py": ["--nonsense"],
}


@pytest.mark.parametrize("script", sorted(WRONG))
def test_help_and_argument_errors_answer_before_anything_heavy_is_imported(tmp_path, script):
    for args, code in ((["--help"], 0), (WRONG[script], 2)):
        command = [sys.executable, "-X", "importtime", str(TOOLS / script), *args]
        done = subprocess.run(
            command, cwd=tmp_path, env=clean_env(tmp_path), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
        assert {"argparse", "sys"} & imported
        assert not imported & HEAVY
        if code == 0:
            assert re.search(rf"uv run \S*{script}", done.stdout), "the page shows examples"
        else:
            assert re.fullmatch(rf"error: .+ See {script} --help\.", done.stderr.strip().splitlines()[-1])
            assert WRONG[script][-1] in done.stderr


def test_a_key_of_the_users_own_is_out_of_reach_of_these_tests():
    assert not [name for name in os.environ if name.startswith(("WANDB", "GRAPH_DENOISE"))]
    assert not (Path.home() / ".netrc").exists()
