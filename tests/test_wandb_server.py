"""The W&B server of the tests is itself tested: with the real SDK, the real `wandb.Api`, and plain HTTP."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import clean_env
from demo import sample
from graphql.execution import execute_sync
from wandb_server import KEY, SCHEMA_WITH_RESOLVERS, LeanExecutor, Request, WandbServer, checked

TEAM, PROJECT = "graph_denoise_team", "spectral_denoising"
PAGE = """query Page($p: String!, $e: String!, $first: Int, $after: String, $order: String, $filters: JSONString) {
  project(name: $p, entityName: $e) { runCount(filters: $filters)
    runs(first: $first, after: $after, order: $order, filters: $filters) {
      edges { node { name createdAt } cursor } pageInfo { endCursor hasNextPage } totalCount } } }"""
FULL = """query Full($first: Int) { project(name: "%s", entityName: "%s") {
  runs(first: $first) { edges { node { config } } } } }"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running


def post(server: WandbServer, query: str, key: str | None = KEY, **variables: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one GraphQL request."""
    request = urllib.request.Request(
        f"{server.url}/graphql", json.dumps({"query": query, "variables": variables}).encode()
    )
    if key is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def page(server: WandbServer, project: str = PROJECT, **variables: Any) -> dict[str, Any]:
    status, answer = post(server, PAGE, p=project, e=TEAM, **variables)
    assert (status, answer.get("errors")) == (200, None)
    return answer["data"]["project"]


def pages(server: WandbServer, first: int, **variables: Any) -> list[str]:
    """Run ids of all pages, in order."""
    ids, after = [], None
    while True:
        runs = page(server, first=first, after=after, **variables)["runs"]
        assert len(runs["edges"]) <= first
        ids += [edge["node"]["name"] for edge in runs["edges"]]
        after = runs["pageInfo"]["endCursor"]
        if not runs["pageInfo"]["hasNextPage"]:
            return ids


def client(script: str, server: WandbServer, tmp_path: Path) -> Any:
    """Run a script with the real client against the server, in its own process; what it prints last, as JSON."""
    env = clean_env(
        tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_DIR=str(tmp_path), WANDB_SILENT="true"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- the real client


def test_the_real_sdk_logs_and_reads_back(server, tmp_path):
    script = """
import json, wandb
def start(**more):
    settings = wandb.Settings(console="off", x_disable_stats=True, disable_git=True)
    return wandb.init(entity="graph_denoise_team", project="logged", settings=settings, **more)
config = {"lr": 1e-3, "model": {"k": 8, "big": 2**70}}
with start(id="first", name="stage2 ünï, a/b", config=config, tags=["x"], group="g", notes="n", job_type="eval") as run:
    run.define_metric("tracked", summary="min,max")
    for step in range(4):
        odd = {"bad": float("nan"), "worse": float("-inf"), "nested": {"a": step}}
        run.log({"loss": 1 / (step + 1), "tracked": step, **odd})
    run.log({"h": wandb.Histogram([1, 2, 3]), "page": wandb.Html("<b>x</b>")})
with start(id="first", resume="must") as run:
    run.log({"loss": 9.5})
    run.config["added"] = [1, "two", None]
run = start(id="broken")
run.log({"a": 1})
run.finish(exit_code=1)
try:
    wandb.init(entity="not_mine", project="p", settings=wandb.Settings(console="off"))
except wandb.Error as error:
    refused = str(error)
read = wandb.Api().run("graph_denoise_team/logged/first")
read.tags.append("late"); read.notes = "edited"; read.update()
print(json.dumps({
    "config": dict(read.config), "summary": dict(read.summary_metrics), "name": read.name, "refused": refused,
    "rows": list(read.scan_history()), "keys": read.history(keys=["loss"], pandas=False),
    "files": [file.name for file in read.files()],
    "states": [r.state for r in wandb.Api().runs("graph_denoise_team/logged")],
}))
"""
    seen = client(script, server, tmp_path)
    run = server.run(TEAM, "logged", "first")
    assert seen["config"] == {"lr": 1e-3, "model": {"k": 8, "big": 2**70}, "added": [1, "two", None]}
    assert run.config["_wandb"]["cli_version"].startswith("0.31")
    assert (seen["summary"]["bad"], seen["summary"]["worse"]) == ("NaN", "-Infinity")
    assert seen["summary"]["tracked"] == {"min": 0, "max": 3}
    assert seen["summary"]["loss"] == 9.5
    assert seen["summary"]["h"]["_type"] == "histogram"
    assert seen["summary"]["page"]["_type"] == "html-file"
    assert seen["name"] == run.display_name == "stage2 ünï, a/b"
    assert (run.group, run.job_type, run.notes, tuple(run.tags)) == ("g", "eval", "edited", ("x", "late"))
    assert [row["_step"] for row in seen["rows"]] == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for row in seen["keys"]] == [1, 0.5, 1 / 3, 0.25, 9.5]
    assert seen["rows"][3]["nested"] == {"a": 3}
    assert any(name.startswith("media/html/") for name in seen["files"])
    assert seen["states"] == ["finished", "failed"]
    assert "permission denied" in seen["refused"]
    assert run.line_count == 6


def test_the_real_api_reads(server, tmp_path):
    rows = [{"_step": i, "_runtime": i * 0.5, "_timestamp": 1e9 + i, "loss": 1 / (i + 1)} for i in range(900)]
    server.add_run(
        TEAM, "p", name="one", config={"a": {"b": 1}}, summary={"x": math.nan}, history=rows, exported_steps=700
    )
    server.fill(TEAM, PROJECT, 120, config_values=20, metrics=10, per_second=7)
    server.add_key("f" * 40, "stranger")
    server.weather.only, server.weather.rate_limit = {"GetProjects"}, 1
    script = """
import json, wandb
api = wandb.Api(timeout=30)
def failing(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
run = api.run("graph_denoise_team/p/one")
lazy, full = api.runs("graph_denoise_team/spectral_denoising"), wandb.Api().runs(
    "graph_denoise_team/spectral_denoising", {"state": "failed"}, per_page=5, lazy=False)
export = run.download_history_exports("exports", require_complete_history=False)
print(json.dumps({
    "viewer": [api.viewer.username, api.default_entity, api.viewer.teams],
    "projects": [p.name for p in api.projects("graph_denoise_team")],
    "run": [run.id, run.config, run.summary_metrics, run.state, run.lastHistoryStep, run.user.username],
    "counts": [len(lazy), len(full), len([r.id for r in lazy]), len({r.id for r in full})],
    "config": len(full[0].config["model"]),
    "sampled": len(run.history(samples=100, pandas=False)), "scanned": len({r["_step"] for r in run.scan_history()}),
    "export": [len(export.paths), export.contains_live_data, export.errors or {}],
    "missing": [failing(lambda: len(api.runs("graph_denoise_team/none"))),
                failing(lambda: list(api.projects("hidden"))),
                failing(lambda: len(wandb.Api(api_key="f" * 40).runs("graph_denoise_team/p"))),
                failing(lambda: wandb.Api(api_key="0" * 40).viewer.username),
                failing(lambda: api._service_api.execute_graphql("query Q { viewer { shoeSize } }"))],
}))
"""
    seen = client(script, server, tmp_path)
    assert seen["viewer"] == ["tester", "tester", [TEAM]]
    assert seen["projects"] == [PROJECT, "p"]
    assert seen["run"] == ["one", {"a": {"b": 1}}, {"x": "NaN"}, "finished", 899, "tester"]
    assert seen["counts"] == [120, 6, 120, 6]
    assert seen["config"] >= 7
    assert (seen["sampled"], seen["scanned"]) == (100, 900)
    assert seen["export"] == [1, True, {}]
    missing, hidden, stranger, rejected, field = seen["missing"]
    assert missing == "ValueError: Could not find project none"
    assert "Projects" in hidden
    assert stranger == "ValueError: Could not find project p"
    assert "401" in rejected or "not logged in" in rejected or "API key" in rejected
    assert "Cannot query field 'shoeSize' on type 'User'" in field
    # The sidecar met a 429 on its way to the projects, waited and asked again.
    assert server.stats.statuses[429] == 1
    assert server.stats.requests["GetProjects"] >= 2


# --- GraphQL


def test_a_field_that_wandb_lacks_is_an_error(server):
    status, answer = post(server, '{ project(name: "p", entityName: "e") { runs { edges { node { colour } } } } }')
    assert status == 400
    assert "Cannot query field 'colour' on type 'Run'" in answer["errors"][0]["message"]
    assert post(server, "{ viewer { ")[0] == 400
    assert post(server, "query Q($x: Nothing) { viewer { id } }")[0] == 400


def test_the_lean_executor_answers_as_graphql_core_does(server):
    server.fill(TEAM, PROJECT, 30, config_values=20, metrics=12)
    server.update_run(TEAM, PROJECT, server.runs(TEAM, PROJECT)[3].id, display_name=None, notes='"quoted"\n\\ ü')
    query = """query Q($yes: Boolean!) { project(name: "spectral_denoising", entityName: "graph_denoise_team") {
      a: runs(first: 5) { edges { ...E cursor } totalCount }
      b: runs(first: 7, order: "-created_at") { edges { node { __typename summaryMetrics } } }
      run(name: "nothing") { id } } }
    fragment E on RunEdge {
      node { id who: user { username name } label: displayName notes tags config } ...M @include(if: $yes) }
    fragment M on RunEdge {
      node { summaryMetrics state @skip(if: $yes) historyKeys project { name entity { name } } } }"""
    document, errors = checked(query)
    assert not errors
    answers = []
    for executor in (None, LeanExecutor):
        request = Request(server, server.users["tester"], "Q")
        result = execute_sync(
            SCHEMA_WITH_RESOLVERS,
            document,
            context_value=request,
            variable_values={"yes": True},
            executor_class=executor,
        )
        assert result.errors is None
        answers.append(json.loads(request.answer({"data": result.data})))
    assert answers[0] == answers[1]
    first, stored = answers[0]["data"]["project"]["a"]["edges"][3]["node"], server.runs(TEAM, PROJECT)[3]
    assert (first["label"], first["notes"]) == (None, '"quoted"\n\\ ü')
    assert json.loads(first["config"])["model"]["value"] == stored.config["model"]
    assert json.loads(first["summaryMetrics"]) == stored.summary


def test_keys_see_their_own_entities(server):
    secret = server.add_run("secret_team", "p")
    server.add_key("s" * 40, "spy")
    server.add_key("wandb_v1_service", "bot", teams=["secret_team"])
    query = """query Q { viewer { entity teams { edges { node { name } } } } entity(name: "secret_team") { name }
      models(entityName: "secret_team") { edges { node { name } } }
      project(name: "p", entityName: "secret_team") { runCount } }"""
    for key in (KEY, "s" * 40):
        data = post(server, query, key=key)[1]["data"]
        assert (data["entity"], data["models"], data["project"]) == (None, None, None)
    data = post(server, query, key="wandb_v1_service")[1]["data"]
    assert data["viewer"] == {"entity": "bot", "teams": {"edges": [{"node": {"name": "secret_team"}}]}}
    assert data["entity"] == {"name": "secret_team"}
    assert data["models"]["edges"] == [{"node": {"name": "p"}}]
    assert data["project"] == {"runCount": 1}
    mutation = "mutation M($id: ID!) { deleteRun(input: {id: $id}) { clientMutationId } }"
    assert post(server, mutation, id=secret.storage_id)[1]["errors"]
    server.weather.hidden_entities = "empty"
    assert post(server, query)[1]["data"]["models"] == {"edges": []}
    server.weather.hidden_entities = "error"
    assert "permission denied" in post(server, query)[1]["errors"][0]["message"]
    server.revoke("s" * 40)
    for key in ("s" * 40, "x" * 40, "", None):
        status, answer = post(server, query, key=key)
        assert status == 401
        assert answer["errors"][0]["extensions"] == {"code": "PERMISSION_ERROR"}


# --- filters, pages and counts

FILTERS = [
    ({}, "abcd"),
    ({"state": "failed"}, "c"),
    ({"state": {"$ne": "failed"}}, "abd"),
    ({"state": {"$in": ["failed", "running"]}}, "cd"),
    ({"state": {"$nin": ["failed", "running"]}}, "ab"),
    ({"tags": "x"}, "ab"),
    ({"tags": {"$in": ["y", "z"]}}, "bc"),
    ({"tags": {"$ne": "x"}}, "cd"),
    ({"name": {"$in": ["a", "d", "nobody"]}}, "ad"),
    ({"displayName": {"$regex": "^stage2_.*_s1$"}}, "ac"),
    ({"display_name": {"$regex": "(?i)STAGE3"}}, "b"),
    ({"displayName": None}, "d"),
    ({"displayName": {"$exists": False}}, "d"),
    ({"group": "g", "jobType": "train"}, "a"),
    ({"username": "alice"}, "b"),
    ({"createdAt": {"$gte": "2025-10-01T12:00:00Z"}}, "bcd"),
    ({"createdAt": {"$gt": "2025-10-01T12:00:00"}}, "d"),
    ({"created_at": {"$lt": "2025-10-01T14:00:00+02:00"}}, "a"),
    ({"createdAt": {"$gte": "2025-10-01", "$lte": "2025-10-01T12:00:00.000Z"}}, "bc"),
    ({"createdAt": "2025-10-02T00:00:00Z"}, "d"),
    ({"$and": [{"createdAt": {"$gte": "2025-10-01"}}, {"createdAt": {"$lt": "2025-10-02"}}, {"state": "failed"}]}, "c"),
    ({"$or": [{"createdAt": {"$lt": "2025-10-01"}}, {"state": "running"}]}, "ad"),
    ({"$nor": [{"state": "failed"}, {"tags": "x"}]}, "d"),
    ({"createdAt": {"$not": {"$gte": "2025-10-01T12:00:00Z"}}}, "a"),
    ({"heartbeatAt": {"$gt": "2025-10-03"}}, "c"),
    ({"config.lr": 0.001}, "ab"),
    ({"config.lr": {"$gte": 0.001, "$lt": 0.01}}, "ab"),
    ({"config.lr": {"$gt": "0"}}, ""),
    ({"config.model.k": 8}, "a"),
    ({"config.model.value.k": 8}, "a"),
    ({"config.lr.value": 0.01}, "c"),
    ({"config.a.b": 1}, "b"),
    ({"config.flag": True}, "c"),
    ({"config.flag": 1}, ""),
    ({"config.lr": {"$exists": True}}, "abc"),
    ({"config.lr": None}, "d"),
    ({"summary_metrics.test/mse": {"$lt": 0.5}}, "a"),
    ({"summary_metrics.loss.min": {"$eq": 0.1}}, "b"),
    ({"summary_metrics.test/mse": "NaN"}, "c"),
]


@pytest.fixture(scope="module")
def filtered() -> Iterator[WandbServer]:
    with WandbServer() as running:
        add = running.add_run
        add(TEAM, PROJECT, name="a", display_name="stage2_x_s1", config={"lr": 0.001, "model": {"k": 8}},
            summary={"test/mse": 0.25}, created_at="2025-09-30T23:59:59", tags=["x"], group="g",
            job_type="train")  # fmt: skip
        add(TEAM, PROJECT, name="b", display_name="stage3_x_s1", config={"lr": 0.001, "a.b": 1}, tags=["x", "y"],
            summary={"test/mse": 0.5, "loss": {"min": 0.1}}, created_at="2025-10-01T12:00:00Z",
            user="alice")  # fmt: skip
        add(TEAM, PROJECT, name="c", display_name="stage2_y_s1", config={"lr": 0.01, "flag": True}, tags=["z"],
            summary={"test/mse": math.nan}, created_at="2025-10-01T12:00:00", heartbeat_at="2025-10-04T00:00:00",
            state="failed")  # fmt: skip
        add(TEAM, PROJECT, name="d", display_name=None, state="running", created_at="2025-10-02T00:00:00Z")
        yield running


@pytest.mark.parametrize(("filters", "expected"), FILTERS, ids=lambda value: json.dumps(value))
def test_filters(filtered, filters, expected):
    found = page(filtered, filters=json.dumps(filters), first=10)
    assert "".join(edge["node"]["name"] for edge in found["runs"]["edges"]) == expected
    assert found["runCount"] == found["runs"]["totalCount"] == len(expected)


@pytest.mark.parametrize(
    "filters",
    [
        {"state": {"$like": "x"}},
        {"$xor": []},
        {"colour": 1},
        {"createdAt": {"$gt": "yesterday"}},
        {"name": {"$regex": "("}},
        {"name": {"$in": "abc"}},
        {"$and": {"state": "failed"}},
        ["state"],
    ],
    ids=json.dumps,
)
def test_a_filter_that_wandb_does_not_know_is_an_error(filtered, filters):
    _, answer = post(filtered, PAGE, p=PROJECT, e=TEAM, filters=json.dumps(filters))
    assert "invalid filter" in answer["errors"][0]["message"]


@pytest.mark.parametrize("first", [1, 7, 25, 26, 100])
@pytest.mark.parametrize(
    "order", ["+created_at", "-created_at", "created_at", "-summary_metrics.test/mse", "+config.seed", "+heartbeat_at"]
)
def test_pages_lose_and_double_nothing_when_runs_share_a_second(server, first, order):
    server.fill(TEAM, PROJECT, 26, config_values=10, metrics=5, per_second=9)
    ids = pages(server, first, order=order)
    assert sorted(ids) == sorted(run.id for run in server.runs(TEAM, PROJECT))
    oldest_first = [run.id for run in server.runs(TEAM, PROJECT)]
    if order.endswith("created_at"):
        assert ids == (oldest_first[::-1] if order.startswith("-") else oldest_first)


def test_runs_that_come_and_go_between_pages_shift_nothing(server):
    server.fill(TEAM, PROJECT, 10, config_values=10, metrics=5, per_second=5)
    before = [run.id for run in server.runs(TEAM, PROJECT)]
    first = page(server, first=4)["runs"]
    server.delete_run(TEAM, PROJECT, before[3])
    server.add_run(TEAM, PROJECT, name="older", created_at="2020-01-01T00:00:00Z")
    server.add_run(TEAM, PROJECT, name="newer", created_at="2030-01-01T00:00:00Z")
    rest = page(server, first=100, after=first["pageInfo"]["endCursor"])["runs"]
    assert [edge["node"]["name"] for edge in rest["edges"]] == [*before[4:], "newer"]
    assert page(server)["runCount"] == 11
    assert post(server, PAGE, p=PROJECT, e=TEAM, after="rubbish")[1]["errors"]
    assert post(server, PAGE, p=PROJECT, e=TEAM, order="+colour")[1]["errors"]


# --- history

HISTORY = """query H($run: String!, $min: Int64, $max: Int64, $samples: Int) {
  project(name: "spectral_denoising", entityName: "graph_denoise_team") {
  run(name: $run) { historyLineCount historyKeys history(minStep: $min, maxStep: $max, samples: $samples)
    parquetHistory(liveKeys: ["_step"]) { parquetUrls liveData } } } }"""


def history_of(server: WandbServer, run: str, **variables: Any) -> dict[str, Any]:
    return post(server, HISTORY, run=run, **variables)[1]["data"]["project"]["run"]


def fetch(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.read()


def test_history_exported_and_live(server):
    rows = [
        {
            "_step": 2 * i,
            "_timestamp": 1e9 + i,
            "loss": 1 / (i + 1),
            "n": i,
            "mixed": i if i % 2 else "text",
            "flag": i > 3,
        }
        for i in range(10)
    ]
    rows[4] |= {"loss": math.nan, "nested": {"a": {"b": 7}}, "h": {"_type": "histogram", "values": [1]}, "few": [1, 2]}
    server.add_run(TEAM, PROJECT, name="r", history=rows, exported_steps=7, overlap=2, rows_per_file=4)
    got = history_of(server, "r")
    tables = [pq.read_table(io.BytesIO(fetch(url))) for url in got["parquetHistory"]["parquetUrls"]]
    assert [table.num_rows for table in tables] == [4, 3]
    assert [row["_step"] for row in got["parquetHistory"]["liveData"]] == [10, 12, 14, 16, 18]
    assert {name: str(kind) for name, kind in zip(tables[1].schema.names, tables[1].schema.types, strict=True)} == {
        "_step": "int64", "_timestamp": "double", "loss": "double", "n": "int64", "mixed": "string", "flag": "bool",
        "nested.a.b": "int64", "h": "string", "few": "string",
    }  # fmt: skip
    fourth = tables[1].to_pylist()[0]
    assert math.isnan(fourth.pop("loss"))
    assert fourth == {"_step": 8, "_timestamp": 1e9 + 4, "n": 4, "mixed": "text", "flag": True, "nested.a.b": 7,
                      "h": '{"_type": "histogram", "values": [1]}', "few": "[1, 2]"}  # fmt: skip
    assert got["historyLineCount"] == 10
    assert got["historyKeys"]["lastStep"] == 18
    assert got["historyKeys"]["keys"]["nested.a.b"] == {"typeCounts": [{"type": "number", "count": 1}]}
    assert len(got["history"]) == 10
    part = [json.loads(row) for row in history_of(server, "r", min=7, max=13, samples=100)["history"]]
    assert [row["_step"] for row in part] == [8, 10, 12]
    assert (part[0]["loss"], part[0]["nested"]) == ("NaN", {"a": {"b": 7}})
    assert len(history_of(server, "r", min=0, max=100, samples=4)["history"]) <= 4


def test_presigned_addresses_expire_and_cannot_be_forged(server):
    server.add_run(TEAM, PROJECT, name="a/b ü", history=[{"_step": i, "x": i} for i in range(5)])
    url = history_of(server, "a/b ü")["parquetHistory"]["parquetUrls"][0]
    assert url != history_of(server, "a/b ü")["parquetHistory"]["parquetUrls"][0]
    whole = fetch(url)
    assert fetch(url, Range="bytes=-8") == whole[-8:]
    assert fetch(url, Range="bytes=4-9") == whole[4:10]
    server.weather.url_lifetime = 0.0
    stale = history_of(server, "a/b ü")["parquetHistory"]["parquetUrls"][0]
    for bad in (stale, url.replace("Signature=", "Signature=0"), url.partition("?")[0]):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(bad)


def test_made_up_histories_are_whole_and_repeatable(server):
    server.fill(TEAM, PROJECT, 3, config_values=10, metrics=5)
    server.fill_history(TEAM, PROJECT, rows=1000, keys=12, fill=0.1, live_rows=100, rows_per_file=400)
    run = server.runs(TEAM, PROJECT)[1]
    got = history_of(server, run.id, min=900, max=1000, samples=1000)
    tables = [pq.read_table(io.BytesIO(fetch(url))) for url in got["parquetHistory"]["parquetUrls"]]
    steps = [step for table in tables for step in table["_step"].to_pylist()]
    assert steps + [row["_step"] for row in got["parquetHistory"]["liveData"]] == list(range(1000))
    assert [json.loads(row) for row in got["history"]] == run.history.live()
    share = 1 - sum(table.column(5).null_count for table in tables) / 900
    assert 0.05 < share < 0.15
    assert run.history.file(1) != server.runs(TEAM, PROJECT)[2].history.file(1)
    assert run.line_count == 1000
    whole = [json.loads(row) for row in history_of(server, run.id, samples=1000)["history"]]
    assert [row["_step"] for row in whole] == list(range(1000))
    assert whole[900:] == run.history.live()


# --- weather and cost


def test_rate_limit_and_errors_come_in_bursts_and_by_chance(server):
    server.weather.rate_limit, server.weather.retry_after = 2, 7
    request = urllib.request.Request(f"{server.url}/graphql", json.dumps({"query": "{ viewer { id } }"}).encode())
    with pytest.raises(urllib.error.HTTPError) as limited:
        urllib.request.urlopen(request, timeout=20)
    assert (limited.value.code, limited.value.headers["Retry-After"]) == (429, "7")
    assert [post(server, "{ viewer { id } }")[0] for _ in range(2)] == [429, 200]
    server.weather.error_5xx = 1
    server.weather.error_status = 502
    statuses = [status_of(server) for _ in range(2)]
    assert statuses == [502, 200]
    server.weather.error_5xx = 0.5
    drawn = []
    for _ in range(2):
        server.weather.random.seed(4)
        drawn.append([status_of(server) for _ in range(12)])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {200, 502}


def status_of(server: WandbServer, query: str = "query Who { viewer { id } }") -> int:
    request = urllib.request.Request(
        f"{server.url}/graphql",
        json.dumps({"query": query}).encode(),
        {"Authorization": "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_faults_befall_only_the_named_requests(server):
    server.weather.only, server.weather.error_5xx = {"Other"}, 1
    assert status_of(server) == 200
    assert status_of(server, "query Other { viewer { id } }") == 503
    assert status_of(server, "query Other { viewer { id } }") == 200


def test_a_body_cut_short_and_an_expired_address(server):
    server.add_run(TEAM, PROJECT, name="r", history=[{"_step": 0}])
    url = history_of(server, "r")["parquetHistory"]["parquetUrls"][0]
    server.weather.cut_body = 1
    with pytest.raises(IncompleteRead):
        fetch(url)
    assert fetch(url)
    server.weather.expired_url = 1
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(url)
    assert fetch(url)


def test_answers_are_compressed_only_on_wish(server):
    server.fill(TEAM, PROJECT, 20)
    request = urllib.request.Request(
        f"{server.url}/graphql",
        json.dumps({"query": FULL % (PROJECT, TEAM), "variables": {"first": 20}}).encode(),
        {"Authorization": "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode(), "Accept-Encoding": "gzip"},
    )
    bodies = []
    for wish in (False, True):
        server.weather.gzip = wish
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.headers["Content-Encoding"] == ("gzip" if wish else None)
            bodies.append(answer.read())
    assert gzip.decompress(bodies[1]) == bodies[0]
    assert len(bodies[1]) < len(bodies[0]) / 3


def test_a_hang_ends_without_an_answer(server):
    server.weather.hang, server.weather.hang_seconds = 1, 0.2
    start = time.monotonic()
    with pytest.raises(RemoteDisconnected):
        status_of(server)
    assert time.monotonic() - start >= 0.2
    assert status_of(server) == 200


def test_a_key_revoked_halfway(server):
    server.weather.revoke_after = 2
    assert [status_of(server) for _ in range(4)] == [200, 200, 401, 401]


def test_pages_that_are_too_heavy_time_out(server):
    runs = server.fill(TEAM, PROJECT, 30, config_values=10, metrics=5)
    server.weather.max_page, server.weather.timeout_after = 20, 0.1
    full = FULL % (PROJECT, TEAM)
    start = time.monotonic()
    status, answer = post(server, full, first=21)
    assert status == 502
    assert "context deadline exceeded" in answer["errors"][0]["message"]
    assert time.monotonic() - start >= 0.1
    assert post(server, full, first=20)[0] == 200
    assert len(page(server, first=30)["runs"]["edges"]) == 30
    server.weather.max_page, server.weather.heavy_runs = None, {runs[4].id}
    assert post(server, full, first=4)[0] == 200
    assert post(server, full, first=5)[0] == 502
    server.weather.timeout_status = 200
    status, answer = post(server, full, first=5)
    assert (status, answer["data"], answer["errors"][0]["message"]) == (200, None, "context deadline exceeded")


def test_latency_and_work_are_waited_for_and_requests_counted(server):
    server.fill(TEAM, PROJECT, 40, config_values=10, metrics=5)
    server.weather.latency, server.weather.work_per_run, server.weather.work_per_count = 0.05, 0.005, 0.1
    server.stats.reset()
    start = time.monotonic()
    page(server, first=30)  # 30 runs, runCount and totalCount
    assert time.monotonic() - start >= 0.05 + 0.15 + 0.2
    server.weather.latency, server.weather.work_per_run, server.weather.work_per_count = 0.3, 0, 0
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: status_of(server), range(4)):
            pass
    post(server, FULL % (PROJECT, TEAM), first=3)
    assert server.stats.requests == {"Page": 1, "Who": 4, "Full": 1}
    assert (server.stats.runs, server.stats.full_runs, server.stats.total) == (33, 3, 6)
    assert 2 <= server.stats.max_in_flight <= 4
    assert server.stats.bytes > 1000
    assert server.stats.queries[0][2] == {"p": PROJECT, "e": TEAM, "first": 30}
    assert json.loads(fetch(f"{server.url}/_stats")) == server.stats.as_dict()


# --- what it is filled with


def leaves(value: Any) -> int:
    return sum(map(leaves, value.values())) if isinstance(value, dict) else 1


def test_made_up_runs_have_the_size_asked_for_and_repeat(server):
    runs = server.fill(TEAM, PROJECT, 200, config_values=150, metrics=120, seed=3, per_second=4)
    again = server.fill(TEAM, "again", 200, config_values=150, metrics=120, seed=3, per_second=4)
    assert len({run.id for run in runs}) == 200
    assert {leaves(run.config) for run in runs} == {150}
    assert {leaves({k: v for k, v in run.summary.items() if not k.startswith("_")}) for run in runs} == {120}
    assert len({run.summary_json for run in runs}) == 200
    assert [(r.config_json, r.summary_json, r.created_at) for r in runs] == [
        (r.config_json, r.summary_json, r.created_at) for r in again
    ]
    assert len({run.created_at for run in runs}) == 50


def test_runs_can_be_changed(server):
    server.add_run(
        TEAM, PROJECT, name="r", config={"a": 1}, summary_json='{"x": NaN}', created_at="2025-10-02T00:00:00Z"
    )
    server.add_run(TEAM, PROJECT, name="s", created_at="2025-10-03T00:00:00Z")
    with pytest.raises(ValueError, match="already"):
        server.add_run(TEAM, PROJECT, name="r")
    run = server.update_run(
        TEAM, PROJECT, "r", state="failed", tags=["t"], config={"a": 2}, created_at="2025-10-04T00:00:00Z"
    )
    assert (run.state, run.tags, run.config, run.summary_json) == ("failed", ("t",), {"a": 2}, '{"x": NaN}')
    assert [run.id for run in server.runs(TEAM, PROJECT)] == ["s", "r"]
    with pytest.raises(AttributeError, match="colour"):
        server.update_run(TEAM, PROJECT, "r", colour=1)


def test_the_sample_is_a_lab_and_always_the_same(server):
    sample(server)
    other = WandbServer()
    sample(other)
    other.http.server_close()
    for project in server.projects_of(TEAM):
        ours, theirs = server.runs(TEAM, project.name), other.runs(TEAM, project.name)
        assert [(r.id, r.config_json, r.summary_json, r.created_at) for r in ours] == [
            (r.id, r.config_json, r.summary_json, r.created_at) for r in theirs
        ]
    runs = [run for project in server.projects_of(TEAM) for run in server.runs(TEAM, project.name)]
    assert {run.state for run in runs} == {"finished", "crashed", "failed", "running"}
    assert sum(run.summary.get("test/mse") == "NaN" for run in runs) == 1
    done = [run for run in server.runs(TEAM, PROJECT) if isinstance(run.summary.get("test/mse"), float)]
    best = min(done, key=lambda run: run.summary["test/mse"])
    assert best.display_name.startswith("stage2_self_attention_ring_of_cliques_default_lr1e-3_")


# --- by itself


def test_it_runs_by_itself(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py"))]
    refused = subprocess.run([*command, "--fill", "nonsense"], capture_output=True, text=True, timeout=30)
    assert refused.returncode == 2
    assert "ENTITY/PROJECT=N" in refused.stderr
    process = subprocess.Popen(
        [*command, "--fill", "graph_denoise_team/p=12", "--history-rows", "50"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        url = line.removeprefix("listening on ").strip()
        assert json.loads(fetch(f"{url}/_stats"))["total"] == 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
