"""The connection to W&B: what it says and hides when the server or the network misbehaves, and that it never hangs.

Its code is the block `connection`, the same in both scripts, so what is tested on one copy holds for the other.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import TEAM, TOOLS, clean_env, load_script, run_script
from demo import sample
from wandb_server import KEY, WandbServer

SECRET = "wandb_v1_Zq7pLw2XsT9vRb4nKc8mJd5hGf3yUa6eWo1iQxVzNtBrMlCkHjPgDsFaYu0E"
VIEWER = {"id": "x", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
script = load_script("list_entities.py")


@pytest.fixture
def server():
    with WandbServer() as server:
        sample(server)
        yield server


@pytest.fixture
def connection(server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return script.Connection()


class Api:
    """A server that answers every request by `answer(request, headers, number)`; a request is a query and variables.

    `answer` gives `(status, headers, body)`; a body that is no bytes is sent as JSON under "data". None: no answer.
    """

    def __init__(self, answer) -> None:
        self.paths: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.closing = threading.Event()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
                api.paths[self.path] += 1
                api.agents.add(self.headers["User-Agent"])
                request = json.loads(sent) if self.path.endswith("/graphql") else {}
                reply = answer(request, self.headers, api.paths[self.path])
                if reply is None:
                    api.closing.wait()
                    self.close_connection = True
                    return
                status, headers, body = reply
                body = body if isinstance(body, bytes) else json.dumps({"data": body}).encode()
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Api:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def login_first(answer):
    """`answer`, but the client's login succeeds."""
    return lambda request, *rest: (
        (200, {}, {"viewer": VIEWER}) if "username" in request.get("query", "") else answer(request, *rest)
    )


def listing(url: str, home: Path, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = clean_env(home, **{"WANDB_BASE_URL": url, "WANDB_API_KEY": SECRET} | extra)
    done = run_script("list_entities.py", *args, cwd=home, env=environment)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def listed(monkeypatch, capsys):
    """A function that lists on a server in this process: exit code (of a `Stop` too), stdout, stderr."""

    def listed(url: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        try:
            code = script.list_entities(script.Connection(SECRET), script.parse_arguments(args))
        except script.Stop as stop:
            code = stop.code
            script.say(f"error: {stop}")
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return listed


# ----------------------------------------------------------------------------------------------------- nothing leaks


def spellings(key: str) -> dict[str, str]:
    raw = key.encode()
    return {
        "header": "Basic " + base64.b64encode(b"api:" + raw).decode(),
        "credentials": base64.b64encode(b"api:" + raw).decode(),
        "lower": base64.b64encode(b"api:" + raw).decode().lower(),
        "base64": base64.urlsafe_b64encode(raw).decode(),
        "shifted": base64.b64encode(b"xx" + raw).decode(),
        "raw": key,
        "cut": key[20:41],
        "hex": raw.hex().upper(),
        "bearer": "bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    }


def leaks(text: str) -> list[str]:
    """Spellings of the key, or of the token, of which five characters in a row stand in `text`."""
    secret = SECRET.removeprefix("wandb_v1_").encode()
    spelled = [secret, *(base64.b64encode(b"xx"[:n] + secret)[4:] for n in range(3)), secret.hex().encode()]
    spelled.append(b"dozjgNryP4J3jVmNHl0w5N")
    low = text.lower()
    return [s.decode() for s in spelled if any(s[n : n + 5].decode().lower() in low for n in range(len(s) - 4))]


@pytest.mark.parametrize("status", [200, 400, 404, 418, 500])
@pytest.mark.parametrize("spelling", sorted(spellings(SECRET)))
def test_a_server_that_echoes_the_key_shows_nobody_any_part_of_it(monkeypatch, status, spelling):
    text = f'no access for {{"authorization": "{spellings(SECRET)[spelling]}"}} to x'
    body = json.dumps({"errors": [{"message": text}]}).encode() if status == 200 else text.encode()
    with Api(login_first(lambda *_: (status, {}, body))) as api:
        monkeypatch.setenv("WANDB_BASE_URL", api.url)
        connection = script.Connection(SECRET)
        with pytest.raises(script.Stop, match="no access for") as caught:
            connection.ask("query Anything { x }", {}, tries=1)
    message = str(caught.value)
    assert not leaks(message), message
    assert len(message) < 300
    assert message.startswith(f"{api.url}: ")


def test_the_key_that_the_script_was_given_is_not_shown_where_the_login_is_answered_with_it(tmp_path):
    with Api(lambda _, headers, __: (400, {}, f"what is {headers['Authorization']}?".encode())) as api:
        done = listing(api.url, tmp_path)
    assert done.returncode == 1
    assert "what is Basic" in done.stderr
    assert not leaks(done.stderr + done.stdout)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("see https://me:hunter2@lab.example/x", "see https://lab.example/x"),
        ('Get "https://s3.example/f.parquet?X-Amz-Signature=abc&y=1": 403', 'Get "https://s3.example/f.parquet": 403'),
        ("\x1b[31mred\x1b[0m\nnext \u202eline", "\ufffd[31mred\ufffd[0m next \ufffdline"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_what_a_server_says_is_shown_plainly(said, shown):
    assert script.without_secrets(said, SECRET) == shown


def test_a_password_in_the_address_is_used_and_never_shown(server, tmp_path):
    secret = server.url.replace("//", "//lab:hunter2@")
    for address, key, code in ((secret, KEY, 0), (secret, "f" * 40, 2), ("http://lab:hunter2@127.0.0.1:9", KEY, 1)):
        done = listing(address, tmp_path, "-e", TEAM, WANDB_API_KEY=key)
        assert done.returncode == code, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert re.search(r"http://127\.0\.0\.1:\d+\b", done.stderr)
    done = listing("http://lab:hunter2@", tmp_path)
    assert done.returncode == 2
    assert "hunter2" not in done.stderr


# ------------------------------------------------------------------------------------------------ where keys are read


@pytest.mark.parametrize("danger", ["writable", "foreign"])
def test_a_dotenv_that_others_control_is_not_read_and_that_is_said(tmp_path, monkeypatch, capsys, danger):
    dotenv = tmp_path / ".env"
    dotenv.write_text("WANDB_BASE_URL=http://evil.example\n")
    dotenv.chmod(0o666 if danger == "writable" else 0o600)
    if danger == "foreign":
        monkeypatch.setattr(script.os, "fstat", lambda _: types.SimpleNamespace(st_uid=54321, st_mode=0o100600))
    monkeypatch.chdir(tmp_path)
    assert "WANDB_BASE_URL" not in script.read_settings()
    assert f"{dotenv} is not read" in capsys.readouterr().err
    monkeypatch.undo()


def test_a_dotenv_of_roots_or_ones_own_is_read(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("WANDB_ENTITY=lab\n")
    monkeypatch.chdir(tmp_path)
    assert script.read_settings()["WANDB_ENTITY"] == ("lab", str(tmp_path / ".env"))
    monkeypatch.setattr(script.os, "fstat", lambda _: types.SimpleNamespace(st_uid=0, st_mode=0o100644))
    assert script.read_settings()["WANDB_ENTITY"] == ("lab", str(tmp_path / ".env"))
    monkeypatch.undo()


def test_key_and_address_from_different_places_are_both_named(server, tmp_path):
    (tmp_path / ".env").write_text(f"WANDB_BASE_URL={server.url}\n")
    environment = clean_env(tmp_path)
    done = run_script("list_entities.py", cwd=tmp_path, env=environment | {"WANDB_API_KEY": KEY})
    said = f"Using the key from WANDB_API_KEY in the environment at {server.url} (WANDB_BASE_URL in {tmp_path}/.env)\n"
    assert done.stderr == said
    (tmp_path / ".env").write_text(f"WANDB_BASE_URL={server.url}\nWANDB_API_KEY={KEY}\n")
    done = run_script("list_entities.py", cwd=tmp_path, env=environment)
    assert done.stderr == f"Using the key from WANDB_API_KEY in {tmp_path}/.env at {server.url}\n"


def test_no_home_and_no_passwd_entry(server, tmp_path):
    environment = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    del environment["HOME"]
    nobody = (
        "import pwd, runpy, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        f"sys.argv = ['list_entities.py', '--json']\nrunpy.run_path({str(TOOLS / 'list_entities.py')!r}, "
        "run_name='__main__')\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    for key, code in ((KEY, 0), ("", 2)):
        done = subprocess.run(
            [sys.executable, "-c", nobody],
            cwd=work,
            env=environment | {"WANDB_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == (1 if key else 3), done.stderr
        assert list(work.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the client, kept quiet


def test_the_client_is_silent_sends_no_telemetry_and_leaves_nothing(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    page = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
    with Api(login_first(lambda *_: (200, {}, {"viewer": VIEWER, "models": page}))) as api:
        # Settings of a training job that the client would obey, and a sidecar of an outer process that is gone.
        job = {"WANDB_MODE": "offline", "WANDB_SERVICE": "3-1-unix-nowhere", "WANDB_ERROR_REPORTING": "true"}
        environment = clean_env(tmp_path, WANDB_BASE_URL=api.url, WANDB_API_KEY=SECRET, **job)
        done = run_script("list_entities.py", cwd=work, env=environment)
    said = f"Using the key from WANDB_API_KEY in the environment at {api.url}\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, said, "me: 0 projects, 0 runs\n")
    assert list(work.iterdir()) == []
    assert set(api.paths) == {"/graphql"}
    assert {agent.rpartition(" ")[0] for agent in api.agents} == {"W&B Public Client"}


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_silent_server_is_told_of_and_no_sidecar_outlives_the_script(tmp_path, end):
    with Api(lambda *_: None) as api:
        process = subprocess.Popen(
            [sys.executable, TOOLS / "list_entities.py"],
            cwd=tmp_path,
            env=clean_env(tmp_path, WANDB_BASE_URL=api.url, WANDB_API_KEY=SECRET),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        limit = time.monotonic() + 30
        while not api.paths and time.monotonic() < limit:
            time.sleep(0.02)
        asked = time.monotonic()
        sidecars = psutil.Process(process.pid).children(recursive=True)
        assert [sidecar.name() for sidecar in sidecars] == ["wandb-core"]
        assert process.stderr.readline().startswith(f"... no answer from {api.url} for ")
        assert time.monotonic() - asked < 10
        process.send_signal(end)
        sent = time.monotonic()
        process.wait(timeout=20)
        assert time.monotonic() - sent < 5
        assert process.returncode == (130 if end == signal.SIGINT else -end)
        assert "Traceback" not in process.stderr.read()
        assert psutil.wait_procs(sidecars, timeout=10)[1] == []


def test_a_refused_connection_and_an_unknown_host_are_sentences(tmp_path):
    for address, words in (("http://127.0.0.1:9", "connection refused"), ("http://nowhere.invalid", "no such host")):
        done = listing(address, tmp_path)
        assert done.returncode == 1
        assert re.fullmatch(rf"error: {address}: [\w.:, ]*{words}\n", done.stderr), done.stderr


@pytest.mark.parametrize("job", [{"WANDB_CONSOLE": "bogus"}, {"WANDB_BASE_URL": "https://wandb.ai"}])
def test_a_setting_that_the_client_refuses_is_named(tmp_path, job):
    done = listing("http://127.0.0.1:9", tmp_path, **job)
    assert done.returncode == 2
    assert repr(*job.values()) in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- limits and outages


class Clock:
    """`time` of the script, in which long sleeps take no time."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def sleep(self, seconds: float) -> None:
        if seconds > 0.5:  # `watch` sleeps for 0.5
            self.ahead += seconds
            self.slept.append(seconds)
        time.sleep(min(seconds, 0.5) if seconds <= 0.5 else 0)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(script, "time", clock)
    return clock


def failure(text: str, status: int | None = 0):
    """The error that the client raises: with a status, with status 0, or (None) at the end of our own limit."""
    from wandb.proto.wandb_api_pb2 import ApiErrorResponse
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return WandbApiFailedError(text, None if status is None else ApiErrorResponse(message=text, http_status=status))


def is_said(words: str, capsys, seconds: float = 10) -> bool:
    """Whether stderr gets these words; `watch` looks every half a second."""
    limit, said = time.monotonic() + seconds, ""
    while words not in said and time.monotonic() < limit:
        time.sleep(0.05)
        said += capsys.readouterr().err
    return words in said


GAVE_UP = "POST http://x/graphql giving up after 2 attempt(s)\nwhile retrying: HTTP {}: busy"
LATE = "Failed to execute API request: the service process is busy and did not respond in time."


@pytest.mark.parametrize(
    "header", ["junk", "²", "1e20", "1" + "0" * 20, "-5", "", "Wed, 21 Oct 2015 07:28:00 GMT", "1"]
)
def test_any_retry_after_is_survived(monkeypatch, header):
    """The client waits as it is told, or a second; then all threads pause together, and it goes on."""

    def limited_twice(_query, _headers, number):
        return (
            (429, {"Retry-After": header.encode().decode("latin-1")}, b"slow down")
            if number < 4
            else (200, {}, {"x": 1})
        )

    with Api(login_first(limited_twice)) as api:
        monkeypatch.setenv("WANDB_BASE_URL", api.url)
        connection = script.Connection(SECRET)
        clock = Clock()
        monkeypatch.setattr(script, "time", clock)
        assert connection.ask("query Anything { x }", {}, tries=1) == {"x": 1}
    assert len(clock.slept) == 1
    assert clock.slept[0] == pytest.approx(2, abs=0.1)


def test_a_rate_limit_uses_up_no_try_and_the_pauses_grow(connection, clock, capsys):
    replies = iter([failure(GAVE_UP.format(429))] * 40 + [failure(LATE, None), failure("", 429), "fine"])
    limits = []

    def send(limit: float) -> str:
        limits.append(limit)
        if isinstance(reply := next(replies), Exception):
            raise reply
        return reply

    assert connection.answer(send, tries=1) == "fine"
    assert clock.slept == pytest.approx([2, 4, 8, 16, 32] + [60] * 37, abs=0.5)
    assert set(limits) == {script.LONGEST_PAUSE + 2 * connection.seconds}
    assert is_said("... W&B limits requests; waiting ", capsys)


def test_threads_pause_together_after_a_rate_limit(connection, clock):
    """Eight requests that meet the limit at once bring one pause, not one of 2, 4, ... 256 seconds each."""
    gate = threading.Barrier(8)
    told = threading.local()

    def send(_limit: float) -> str:
        if not getattr(told, "limited", False):
            told.limited = True
            gate.wait(timeout=10)
            raise failure("", 429)
        return "fine"

    threads = [threading.Thread(target=connection.answer, args=(send,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert connection.limits <= 1
    assert connection.resume_at - clock.monotonic() <= 2


@pytest.mark.parametrize("took", [0, 1, 10, 20, 25])
def test_an_outage_of_a_minute_is_survived_and_one_that_lasts_is_given_up_within_two(connection, clock, took, capsys):
    begun = clock.monotonic()
    ends = begun + 60

    def send(limit: float) -> str:
        late = clock.monotonic() + limit
        for pause in (0, 1):  # the client's two attempts
            clock.ahead += pause
            if clock.monotonic() >= ends:
                return "fine"
            clock.ahead += took
            if (over := clock.monotonic() - late) > 0:
                clock.ahead -= over
                raise failure(LATE, None)
        raise failure(GAVE_UP.format(503))

    assert connection.answer(send) == "fine"
    assert is_said("HTTP 503 busy; trying again", capsys)
    begun, ends = clock.monotonic(), float("inf")
    with pytest.raises(script.Unanswered, match=r"HTTP 503 busy|no answer in time"):
        connection.answer(send)
    assert 90 <= clock.monotonic() - begun <= 125


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (failure(GAVE_UP.format(502)), "Unanswered"),
        (failure("context deadline exceeded", 504), "Unanswered"),
        (failure("input: context deadline exceeded\n"), "Unanswered"),
        (failure("input:3:5: project timed out"), "Unanswered"),
        (failure("too large", 413), "Unanswered"),
        (failure("unexpected EOF"), "Unanswered"),
        (failure('POST x giving up after 2 attempt(s): Post "x": EOF\nwhile retrying: Post "x": EOF'), "Unanswered"),
        (failure("read tcp 1.2.3.4:5->6.7.8.9:443: read: connection reset by peer"), "Unanswered"),
        (failure(f"POST x giving up\nwhile retrying: {GAVE_UP[-10:]} dial tcp: connect: connection refused"), "Stop"),
        (failure("no", 401), "Rejected"),
        (failure("no", 403), "Rejected"),
        (failure("invalid credentials: the server did not recognize an account"), "Rejected"),
        (failure("bad query", 400), "Stop"),
        (failure(GAVE_UP.format(418)), "Stop"),
        (failure("input: permission denied"), "Stop"),
        (failure("invalid character '<' looking for beginning of value"), "Stop"),
        (failure("EOF"), "Stop"),
        (failure("Failed to execute API request: the service process is not running.", None), "Stop"),
        (failure('Post "https://x": tls: failed to verify certificate: x509: unknown authority'), "Stop"),
    ],
)
def test_what_an_error_of_the_client_means(connection, error, kind):
    def send(_limit: float) -> None:
        raise error

    connection.heard = 0.0
    with pytest.raises(script.Stop) as caught:
        connection.answer(send, tries=1)
    assert type(caught.value).__name__ == kind
    assert caught.value.code == (2 if kind == "Rejected" else 1)


# ------------------------------------------------------------------------------------------------- malformed answers


def test_an_answer_that_is_too_large_or_no_data_is_refused(connection, server, monkeypatch):
    query = "query Viewer { viewer { entity } }"
    assert connection.ask(query, {}) == {"viewer": {"entity": "tester"}}
    monkeypatch.setattr(script, "LARGEST_ANSWER", 10)
    with pytest.raises(script.Unanswered, match="too much"):
        connection.ask(query, {})


def page(names, cursor, more=True):
    return {
        "edges": [{"node": {"name": name}} for name in names],
        "pageInfo": {"endCursor": cursor, "hasNextPage": more},
    }


@pytest.mark.parametrize(
    "models",
    [
        lambda number: page(["a"], None),
        lambda number: page(["a"], "same"),
        lambda number: page([f"p{number}"], "even" if number % 2 else "odd"),
        lambda number: page([], f"c{number}"),
        lambda number: page(["a"], ""),
    ],
    ids=["null", "repeats", "circle", "empty pages", "blank"],
)
def test_a_listing_that_leads_nowhere_ends_with_an_error(listed, models):
    with Api(login_first(lambda _, __, number: (200, {}, {"viewer": VIEWER, "models": models(number)}))) as api:
        code, _, errors = listed(api.url)
    assert code == 1
    assert "error: me: W&B's listing does not go on" in errors
    assert sum(api.paths.values()) < 10


COUNTED = {"run_count": 3, "finished_count": 1, "running_count": 1, "failed_count": 0}
LAST = {"runs": {"edges": [{"node": {"createdAt": "2025-01-01T00:00:00Z"}}]}}


@pytest.mark.parametrize(
    "odd",
    [
        {},
        [],
        "text",
        COUNTED,
        COUNTED | {"runs": None},
        COUNTED | {"runs": {"edges": [None]}},
        COUNTED | {"runs": {"edges": [{"node": None}]}},
        COUNTED | LAST | {"run_count": "many"},
        COUNTED | LAST | {"run_count": None},
    ],
    ids=repr,
)
def test_a_malformed_answer_costs_its_project_alone(listed, odd):
    projects = {"viewer": VIEWER, "models": page(["good", "odd", "fine"], None, more=False)}

    def answer(request, *_):
        if "CountRuns" not in request["query"]:
            return 200, {}, projects
        asked = {alias: name for alias, name in request["variables"].items() if re.fullmatch(r"p\d+", alias)}
        return 200, {}, {alias: odd if name == "odd" else COUNTED | LAST for alias, name in asked.items()}

    with Api(login_first(answer)) as api:
        code, printed, errors = listed(api.url, "--json")
    assert code == 1
    found = {project["name"]: project["run_count"] for project in json.loads(printed)["entities"][0]["projects"]}
    assert found == {"good": 3, "fine": 3, "odd": None}
    assert errors.startswith("error: me/odd: ")


@pytest.mark.parametrize(
    "data",
    [
        {"models": {}},
        {"models": {"edges": [None]}},
        {"models": 5},
        {"models": []},
        {"models": page(["a"], 1) | {"pageInfo": None}},
        {},
    ],
    ids=repr,
)
def test_a_malformed_listing_is_an_error_and_no_traceback(listed, data):
    with Api(login_first(lambda *_: (200, {}, {"viewer": VIEWER} | data))) as api:
        code, _, errors = listed(api.url, "-e", "me")
    assert code == 1
    assert errors.startswith("error: me: W&B's answer is malformed")
