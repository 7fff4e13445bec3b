"""export_runs.py over a connection that stammers, breaks and echoes: nothing lost, nothing leaked, nothing stuck."""

from __future__ import annotations

import base64
import copy
import random
import re
import shlex
import subprocess
import sys
from unittest import mock

import pytest
from conftest import TEAM, TOOLS, clean_env, content, export, good, load_script, metadata, read
from test_connection import GAVE_UP, SECRET, Clock, failure, leaks
from wandb_server import KEY, WandbServer, iso

script = load_script("export_runs.py")


@pytest.fixture
def server():
    """Twelve runs, each with a history of which the last rows are live."""
    with WandbServer() as server:
        for n in range(12):
            server.add_run(
                TEAM,
                "p",
                name=f"r{n:02}",
                config={"n": n},
                summary={"loss": n / 8, "_step": 5},
                created_at=iso(1_759_000_000 + 60 * n),
                history=[{"_step": step, "loss": step / 4} for step in range(6)],
                exported_steps=4,
            )
        yield server


@pytest.fixture
def spoil(monkeypatch):
    """A function that from now on lets `change(operation, data)` change what W&B answers."""
    true_ask = script.Connection.ask

    def spoil(change):
        def ask(self, query, variables, tries=0):
            operation = re.search(r"query (\w+)", query)[1]
            return change(operation, copy.deepcopy(true_ask(self, query, variables, tries)))

        monkeypatch.setattr(script.Connection, "ask", ask)

    return spoil


@pytest.fixture
def intercept(monkeypatch):
    """A function that from now on calls `check(operation, variables, answer)`, which may raise, on what W&B answers."""
    true_init = script.Connection.__init__

    def intercept(check):
        def init(self, *args):
            true_init(self, *args)
            ask, load = self.service.execute_graphql, self.service.send_api_request

            def execute_graphql(query, variables, **options):
                text = ask(query, variables, **options)
                check(re.search(r"query (\w+)", query)[1], variables, text)
                return text

            def download(request, **options):
                if request.HasField("download_file_request"):
                    check("parquet", {}, "")
                return load(request, **options)

            self.service.execute_graphql, self.service.send_api_request = execute_graphql, download

        monkeypatch.setattr(script.Connection, "__init__", init)

    return intercept


# ------------------------------------------------------------------------------------------------- malformed answers


ODD = [None, "text", [], {"project": 5}, {"project": {"r0": 5, "run": 5}}]


@pytest.mark.parametrize("operation", ["ListRuns", "HistoryAddresses", "LiveHistory"])
@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_malformed_answer_is_no_traceback_and_the_next_export_has_everything(server, folder, spoil, operation, odd):
    before = None
    if operation == "ListRuns":
        good(export(server, folder, "-p", "p", "--include-history"))
        before = content(read(folder, "p"))
        server.update_run(TEAM, "p", "r03", summary={"loss": 99.0})
    spoil(lambda name, data: copy.deepcopy(odd) if name == operation else data)
    done = export(server, folder, "-p", "p", "--include-history")
    assert done.code in (1, 2), done.err
    assert re.search("^error: |malformed|failed", done.err, re.M), done.err
    assert before is None or content(read(folder, "p")) == before
    spoil(lambda _name, data: data)
    good(export(server, folder, "-p", "p", "--include-history"))
    assert len(read(folder, "p")) == 12
    assert metadata(folder, "p")["history_rows"] == 72


# ------------------------------------------------------------------------------------------------------------- leaks


def test_an_echoed_key_and_signed_addresses_reach_neither_output_nor_files(server, folder, intercept):
    echo = f" {base64.b64encode(f'api:{SECRET}'.encode()).decode()} and {SECRET} and {SECRET.encode().hex()}"
    signed = "https://s3.example/x.parquet?X-Amz-Signature=5up3rs3cr3t"

    def check(operation, _variables, answer):
        if operation == "ExportRuns" and '"r05"' in answer:
            raise failure(GAVE_UP.format(503) + echo)
        if operation == "parquet":
            raise failure(f'file transfer: download: Get "{signed}": HTTP 503 at {signed}: {echo}')

    intercept(check)
    server.add_key(SECRET, "tester", teams=[TEAM])
    done = export(server, folder, "-p", "p", "--include-history", speed=100, key=SECRET)
    assert done.code == 1
    assert len(read(folder, "p")) == 11
    assert len(metadata(folder, "p")["export"]["failed"]) == 12  # the run, and the histories of the others
    texts = {"stdout": done.out, "stderr": done.err}
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    for place, text in texts.items():
        assert not leaks(text), place
        assert "5up3rs3cr3t" not in text, place


# --------------------------------------------------------------------------------------------------- limits and outages


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_rate_limits_and_faults_loses_nothing(server, folder, intercept, seed):
    dice = random.Random(seed)
    faults = [GAVE_UP.format(429)] * 4 + [GAVE_UP.format(503), "unexpected EOF", "input: context deadline exceeded"]
    stormy = True

    def check(operation, *_):
        if stormy and operation != "Viewer" and dice.random() < 0.4:
            raise failure(dice.choice(faults))

    intercept(check)
    good(export(server, folder, "-p", "p", "--include-history", speed=25))
    stormy = False
    clean = folder.parent / "clean"
    good(export(server, clean, "-p", "p", "--include-history"))
    assert content(read(folder, "p")) == content(read(clean, "p"))
    assert metadata(folder, "p")["history_rows"] == metadata(clean, "p")["history_rows"] == 72


@pytest.mark.parametrize("where", ["ExportRuns", "HistoryAddresses", "LiveHistory", "parquet"])
def test_an_outage_of_more_than_a_minute_is_survived_anywhere(server, folder, intercept, where):
    ends: list[float] = []

    def check(operation, *_):
        if ends or operation == where:
            ends[:] = ends or [script.time.monotonic() + 75]
            if script.time.monotonic() < ends[0]:
                raise failure(GAVE_UP.format(503))

    intercept(check)
    good(export(server, folder, "-p", "p", "--include-history", speed=50))
    assert ends
    assert len(read(folder, "p")) == 12
    assert metadata(folder, "p")["history_rows"] == 72


def test_a_run_that_never_answers_is_given_up_within_two_minutes_and_the_rest_comes(server, folder, intercept):
    """Each of the client's two attempts at a page with this run ends after 25 s; everything else is answered."""
    clock = Clock()
    alone = []

    def check(operation, variables, answer):
        if operation == "ExportRuns" and '"r00"' in answer:
            clock.ahead += 51
            alone.extend([clock.ahead] * (variables["first"] == 1))
            raise failure(GAVE_UP.format(503))

    intercept(check)
    with mock.patch("conftest.hurried", return_value=clock):
        done = export(server, folder, "-p", "p", "--workers", "1")
    assert done.code == 1
    assert [run["id"] for run in metadata(folder, "p")["export"]["failed"]] == ["r00"]
    assert len(read(folder, "p")) == 11
    assert alone[1] - alone[0] + 51 <= 120  # given up then, unless another window holds it too
    assert len(alone) <= 6


# ---------------------------------------------------------------------------------------------------- closed outputs


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&-", "2>&1 | head -1", "2> >(exit)", "> >(exit)"])
def test_an_output_that_nobody_reads_ends_no_export_early(server, tmp_path, redirection):
    command = shlex.join([sys.executable, str(TOOLS / "export_runs.py"), "-e", TEAM, "-p", "p"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {redirection}"],
        cwd=tmp_path,
        env=clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0
    assert len(read(tmp_path / "wandb_export", "p")) == 12
    assert metadata(tmp_path / "wandb_export", "p")["total_runs"] == 12
