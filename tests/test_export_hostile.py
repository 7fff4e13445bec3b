"""export_runs.py against answers, names and files that nobody would send in good faith: each costs itself only."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    TEAM,
    assert_contract_of_ids,
    content,
    export,
    fill_small,
    good,
    leftovers,
    metadata,
    read,
    runs_file,
)
from test_export_history import add, assert_complete, history, steps
from wandb_server import KEY, WandbServer, iso

FAST = 20


def add_runs(server: WandbServer, number: int) -> None:
    for n in range(number):
        server.add_run(TEAM, "p", name=f"r{n:03}", config={"n": n}, created_at=iso(1_759_000_000 + 60 * n))


def edges(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The edges of a page of runs, none in other answers."""
    page = ((answer["data"] or {}).get("project") or {}).get("runs") or {}
    return page.get("edges") or []


# ---------------------------------------------------------------- listings that do not hold what W&B counts


@pytest.mark.parametrize("requests", ["ExportRuns ListRuns", "ExportRuns"])
def test_a_run_that_a_listing_leaves_out_is_missed(server, folder, requests):
    add_runs(server, 30)
    good(export(server, folder / "older", "-p", "p"))

    def leave_out(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        if name in requests:
            kept = [edge for edge in edges(answer) if edge["node"]["name"] != "r007"]
            if edges(answer):
                answer["data"]["project"]["runs"]["edges"] = kept
        return answer

    server.weather.tamper = leave_out
    done = export(server, folder, "-p", "p")
    if "ListRuns" not in requests:  # asked once more, it came
        assert (done.code, done.err.count("error")) == (0, 0)
        return
    assert done.code == 1
    assert "counts 30 runs and lists 29" in done.err
    assert metadata(folder, "p")["export"]["not_listed"] == 1
    assert read(folder, "p").num_rows == 29
    server.delete_run(TEAM, "p", "r003")
    assert export(server, folder / "older", "-p", "p").code == 1
    assert read(folder / "older", "p").num_rows == 30  # nothing is removed on the word of such a listing
    server.weather.tamper = None
    for place in (folder, folder / "older"):
        good(export(server, place, "-p", "p"))
        assert_contract_of_ids(read(place, "p"), server)


def test_an_empty_listing_removes_nothing(server, folder):
    add_runs(server, 5)
    good(export(server, folder, "-p", "p"))

    def empty(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        if edges(answer):
            answer["data"]["project"]["runs"] = {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return answer

    server.weather.tamper = empty
    done = export(server, folder, "-p", "p")
    assert done.code == 1
    assert "counts 5 runs and lists 0" in done.err
    assert read(folder, "p").num_rows == 5


@pytest.mark.parametrize(
    ("kind", "older"), [("null", False), ("null", True), ("empty", False), ("empty", True), ("repeated", False)]
)
def test_cursors_that_lead_nowhere_end_with_an_error(server, folder, kind, older):
    add_runs(server, 250)
    if older:
        good(export(server, folder, "-p", "p"))

    cursors: list[str] = []

    def confuse(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        if edges(answer):
            page = answer["data"]["project"]["runs"]
            cursors.append(page["pageInfo"]["endCursor"])
            page["pageInfo"]["hasNextPage"] = True
            page["pageInfo"]["endCursor"] = {"null": None, "repeated": cursors[0]}.get(kind, cursors[-1])
            page["edges"] = [] if kind == "empty" else page["edges"]
        return answer

    server.weather.tamper = confuse
    done = export(server, folder, "-p", "p")
    assert done.code == 1
    assert "listing" in done.err
    assert server.stats.total < 20
    server.weather.tamper = None
    good(export(server, folder, "-p", "p"))
    assert_contract_of_ids(read(folder, "p"), server)


# ---------------------------------------------------------------- runs that are none


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"createdAt": "yesterday"},
        {"createdAt": "9999-12-31T23:59:59Z"},
        {"heartbeatAt": "-1"},
        {"createdAt": 5},
        {"tags": 5, "user": "me"},
        None,
    ],
    ids=str,
)
def test_one_bad_run_costs_itself_only(server, folder, wrong, older):
    add_runs(server, 130)
    if older:
        good(export(server, folder, "-p", "p"))
        for n in (6, 7, 8):
            server.update_run(TEAM, "p", f"r{n:03}", notes="changed")

    def spoil(name: str, answer: dict[str, Any]) -> dict[str, Any]:
        for edge in edges(answer):
            if edge["node"]["name"] == "r007":
                edge["node"] = wrong and edge["node"] | wrong
        return answer

    server.weather.tamper = spoil
    done = export(server, folder, "-p", "p", speed=FAST)
    others = [run.id for run in server.runs(TEAM, "p") if run.id != "r007"]
    assert sorted(set(read(folder, "p")["id"].to_pylist()) - {"r007"}) == others
    if wrong != {"createdAt": "9999-12-31T23:59:59Z"}:  # which is a time
        assert done.code == 1, done
        assert "r007" in done.err or "129" in done.err
    server.weather.tamper = None
    good(export(server, folder, "-p", "p"))
    assert_contract_of_ids(read(folder, "p"), server)


@pytest.mark.parametrize("answer", [{"data": {"project": {"runs": 5}}}, {"data": {"project": {}}}, {"data": []}, [], 7])
def test_answers_of_another_shape(server, folder, answer):
    add_runs(server, 3)
    server.weather.tamper = lambda name, whole: whole if name == "Viewer" else answer
    done = export(server, folder, "-p", "p", speed=FAST)
    assert done.code == 1, done
    assert "error" in done.err
    assert not runs_file(folder, "p").exists()


def test_nothing_secret_is_kept_or_said(server, folder):
    add(server, "a", steps(*range(5)))
    server.weather.expired_url = 1.0
    done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
    assert done.code == 1
    written = b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file()) + done.err.encode()
    assert KEY.encode() not in written
    assert b"Signature" not in written
    assert b"Expires" not in written


# ---------------------------------------------------------------- histories


def exported_file(server: WandbServer, run: str, table: pa.Table, **options: Any) -> bytes:
    """Put a file of our making in the place of the run's exported one."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    kept = server.run(TEAM, "p", run).history
    kept._files = {(0, kept.exported): sink.getvalue().to_pybytes()}
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_exported_file_costs_that_run_alone(server, folder, seed):
    rng = random.Random(seed)
    for n in range(8):
        add(server, f"r{n}", steps(*range(200), word=f"w{n}"), exported_steps=200)
    kept = server.run(TEAM, "p", "r3").history
    table = pq.read_table(pa.BufferReader(kept.file(0)))
    data = bytearray(exported_file(server, "r3", table, write_page_checksum=True))
    for _ in range(rng.choice([1, 1, 5, 50])):
        data[rng.randrange(4, len(data) - 8)] ^= 1 << rng.randrange(8)
    kept._files = {(0, kept.exported): bytes(data)}
    done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
    found = set(history(folder)["run_id"].to_pylist())
    assert found | {"r3"} == {f"r{n}" for n in range(8)}
    if done.code:
        assert "r3" in done.err
        assert [run["id"] for run in metadata(folder, "p")["export"]["failed"]] == ["r3"]
    kept._files = {}
    good(export(server, folder, "-p", "p", "--include-history", *([] if done.code else ["--full"])))
    assert_complete(history(folder), server)


def test_columns_of_types_that_wandb_does_not_write(server, folder):
    add(server, "odd", steps(0, 1), exported_steps=2)
    add(server, "fine", steps(0, 1), exported_steps=2)
    from datetime import UTC, date, datetime
    from decimal import Decimal

    columns = {
        "_step": pa.array([0, 1], pa.int32()),
        "when": pa.array([datetime(2025, 1, 1, tzinfo=UTC), None]),
        "day": pa.array([date(2025, 1, 1), None]),
        "money": pa.array([Decimal("1.25"), None]),
        "raw": pa.array([b"\xff\x00", b"ok"]),
        "list": pa.array([[1, 2], None]),
        "struct": pa.array([{"a": 1}, None]),
        "void": pa.nulls(2),
        "half": pa.array([1.5, 2], pa.float16()),
        "category": pa.array(["a", "b"]).dictionary_encode(),
        "unsigned": pa.array([2**64 - 1, 0], pa.uint64()),
    }
    exported_file(server, "odd", pa.table(columns))
    done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
    rows = [row for row in history(folder).to_pylist() if row["run_id"] == "odd"]
    assert len([row for row in history(folder).to_pylist() if row["run_id"] == "fine"]) == 2
    assert done.code == 0, done
    first = rows[0]
    assert (first["money"], first["half"], first["unsigned"]) == (1.25, 1.5, float(2**64 - 1))
    assert (first["list"], first["struct"], first["category"]) == ("[1, 2]", '{"a": 1}', "a")
    assert first["when"].startswith("2025-01-01")
    assert rows[1]["raw"] == "ok"


def test_a_file_that_claims_a_billion_rows(server, folder):
    add(server, "huge", steps(0, 1), exported_steps=2)
    add(server, "fine", steps(0, 1), exported_steps=2)
    many = pa.chunked_array([pa.nulls(1_000_000, pa.int64())] * 20)
    exported_file(server, "huge", pa.table({"_step": many}))
    done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
    assert done.code == 1
    assert "huge" in done.err
    assert set(history(folder)["run_id"].to_pylist()) == {"fine"}


def test_a_logged_integer_of_400_digits(server, folder):
    add(server, "long", [{"_step": 0, "x": 10**400, "y": 1}, {"_step": 1, "x": -(10**400)}], state="running")
    add(server, "fine", [{"_step": 0, "x": 2}])
    good(export(server, folder, "-p", "p", "--include-history"))
    assert history(folder)["x"].to_pylist() == [2.0, float("inf"), float("-inf")]


@pytest.mark.parametrize("live", [False, True])
def test_names_that_the_columns_of_the_run_have_and_more(server, folder, live):
    fields = {"state": "running"} if live else {"exported_steps": 1}
    add(server, "a", [{"_step": 0, "run_id": 5, "run_id__2": 6, "project": "mine"}], **fields)
    good(export(server, folder, "-p", "p", "--include-history"))
    for name in "bc":
        row = history(folder).to_pylist()[0]
        assert (row["run_id"], row["run_id__2"], row["run_id__3"], row["project__2"]) == ("a", 6.0, 5.0, "mine")
        add(server, name, [{"_step": 0, "loss": 1}], **fields)
        good(export(server, folder, "-p", "p", "--include-history"))


def test_a_nested_and_a_plain_key_that_are_spelled_alike(server, folder):
    add(server, "a", [{"_step": 0, "m": {"x": 1}, "m.x": 2}, {"_step": 1, "m": {"x": 3}}], state="running")
    good(export(server, folder, "-p", "p", "--include-history"))
    table = history(folder)
    assert (table["m.x"].to_pylist(), table["m.x__2"].to_pylist()) == ([2.0, 3.0], [1.0, None])


def test_keys_that_a_run_out_of_order_lacks(server, folder):
    add(server, "both", [{"_step": n, "val/loss": n / 2} for n in range(5)])
    add(server, "none", steps(*range(50)), state="running", exported_steps=30, overlap=10)
    good(export(server, folder, "-p", "p", "--include-history", "--history-keys", "val/loss"))
    assert set(history(folder)["run_id"].to_pylist()) == {"both"}
    assert metadata(folder, "p")["history_unconfirmed"] == []


def test_thousands_of_live_rows_with_gaps(server, folder):
    rng = random.Random(1)
    at = 0
    numbers = [at := at + rng.choice([1, 1, 1, 3, 900, 5000]) for _ in range(4000)]
    add(server, "a", steps(*numbers), state="running")
    add(server, "b", steps(*range(0, 12_000, 3)))
    server.update_run(TEAM, "p", "b", exported_steps=0)
    good(export(server, folder, "-p", "p", "--include-history", "-q"))
    assert_complete(history(folder), server)
    assert metadata(folder, "p")["history_unconfirmed"] == []


def test_runs_that_logged_nothing(server, folder):
    add_runs(server, 3)
    done = good(export(server, folder, "-p", "p", "--include-history"))
    assert "none of these runs has logged anything" in done.err
    assert not (folder / f"{TEAM}_p_history.parquet").exists()
    assert metadata(folder, "p")["history_rows"] == 0


@pytest.mark.parametrize("rows", [0, 3])
def test_a_history_that_became_shorter(server, folder, rows):
    add(server, "rewound", steps(*range(9)))
    add(server, "other", steps(*range(4)))
    good(export(server, folder, "-p", "p", "--include-history"))
    left = steps(*range(rows))
    summary = {"_step": left[-1]["_step"]} if left else {}
    server.update_run(TEAM, "p", "rewound", history=left, exported_steps=rows, summary=summary)
    good(export(server, folder, "-p", "p", "--include-history"))
    assert_complete(history(folder), server)
    assert metadata(folder, "p")["history_rows"] == 4 + rows
    assert metadata(folder, "p")["history_unconfirmed"] == []


def test_old_rows_of_a_history_that_fails_are_not_confirmed(server, folder):
    add(server, "a", steps(*range(9)))
    good(export(server, folder, "-p", "p", "--include-history"))
    server.update_run(TEAM, "p", "a", history=steps(*range(12)), exported_steps=12, summary={"_step": 11})
    server.run(TEAM, "p", "a").history._files = {(0, 12): b"no"}
    done = export(server, folder, "-p", "p", "--include-history", speed=FAST)
    assert done.code == 1
    assert history(folder).num_rows == 9
    assert metadata(folder, "p")["history_unconfirmed"] == [{"id": "a", "name": "a"}]


# ---------------------------------------------------------------- files on disk


def flip(path: Path, rng: random.Random) -> None:
    """One bit in a data page of one of the columns."""
    about = pq.read_metadata(path)
    column = about.row_group(0).column(rng.randrange(about.num_columns))
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[rng.randrange(start, start + column.total_compressed_size)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ending", ["runs", "history"])
def test_a_flipped_bit_in_the_export_before_never_reaches_the_next(server, folder, ending, seed):
    for n in range(6):
        add(server, f"r{n}", steps(*range(60)), config={"lr": n / 7, "opt": f"adam{n}"}, created_at=iso(n))
    good(export(server, folder, "-p", "p", "--include-history"))
    path = folder / f"{TEAM}_p_{ending}.parquet"
    flip(path, random.Random(seed))
    # A run that is new makes both files be written anew, from what was read.
    add(server, "r9", steps(0, 1), created_at=iso(99))
    good(export(server, folder, "-p", "p", "--include-history", speed=FAST))
    good(export(server, folder / "fresh", "-p", "p", "--include-history"))
    assert content(read(folder, "p")) == content(read(folder / "fresh", "p"))
    assert content(history(folder)) == content(history(folder / "fresh"))
    assert [name for name in leftovers(folder) if not name.startswith("fresh")] == []


def test_a_damaged_export_is_named_and_what_a_filter_hides_is_not_lost(server, folder):
    add_runs(server, 9)
    good(export(server, folder, "-p", "p"))
    path = runs_file(folder, "p")
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    path.write_bytes(data)
    spoiled = path.read_bytes()
    done = export(server, folder, "-p", "p", "--since", "2025-09-27T19:10")
    assert done.code == 1
    assert f"{path} is damaged" in done.err
    assert path.read_bytes() == spoiled
    done = good(export(server, folder, "-p", "p"))
    assert f"{path} is damaged" in done.err
    assert_contract_of_ids(read(folder, "p"), server)


@pytest.mark.parametrize(
    "name", ["../../evil", "a/b", "a\\b", "..", "nul\x00l", ".hidden", "x" * 300, "CON", "ü" * 150]
)
def test_names_from_the_server_stay_in_the_folder(server, folder, tmp_path, name):
    server.add_key("s" * 40, "u", teams=[name])
    fill_small(server, "p")
    fill_small(server, name, 2, entity="u")
    good(export(server, folder, "--include-history", entity="u", key="s" * 40))
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "home"}
    [about] = [json.loads(path.read_text()) for path in folder.glob("*_metadata.json")]
    assert about["project"] == name
    for path in folder.iterdir():
        assert re.fullmatch(r"\w[^/\\]*", path.name)
        assert len(path.name.encode()) < 255
    good(export(server, folder, "--include-history", entity="u", key="s" * 40))
    assert leftovers(folder) == []


def test_links_are_not_followed(server, folder, tmp_path):
    add_runs(server, 3)
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "mine").write_text("mine")
    folder.mkdir()
    parts = folder / f".{TEAM}_p.parts"
    parts.symlink_to(treasure)
    (folder / f"{TEAM}_p_runs.parquet").symlink_to(treasure / "nothing")
    good(export(server, folder, "-p", "p"))
    assert [path.name for path in treasure.iterdir()] == ["mine"]
    assert not runs_file(folder, "p").is_symlink()
    server.update_run(TEAM, "p", "r000", notes="x")
    lock = folder / f".{TEAM}_p.lock"
    lock.symlink_to(treasure / "mine")
    done = export(server, folder, "-p", "p")
    assert done.code == 1
    assert lock.name in done.err
    assert (treasure / "mine").read_text() == "mine"
    lock.unlink()
    parts.mkdir()
    (parts / f"{TEAM}_p_runs.parquet.tmp").symlink_to(treasure / "mine")
    good(export(server, folder, "-p", "p"))
    assert (treasure / "mine").read_text() == "mine"
    assert leftovers(folder) == []


# ---------------------------------------------------------------- the command line


def test_a_project_whose_name_is_a_glob(server, folder):
    for name in ("exp1", "exp[1]", "exp2"):
        fill_small(server, name)
    good(export(server, folder, "-p", "exp[1]"))
    assert [path.name for path in folder.glob("*_runs.parquet")] == [f"{TEAM}_exp[1]_runs.parquet"]
    good(export(server, folder, "-p", "exp[12]"))
    assert len(list(folder.glob("*_runs.parquet"))) == 3


def test_an_entity_with_a_project(server, folder):
    for name in ("a", "b"):
        fill_small(server, name)
    fill_small(server, "c", entity="tester")
    good(export(server, folder, "-e", "tester/c", entity=f"{TEAM}/a"))
    assert sorted(path.name for path in folder.glob("*_runs.parquet")) == [
        f"{TEAM}_a_runs.parquet",
        "tester_c_runs.parquet",
    ]


def test_states(server, folder):
    for state in ("finished", "crashed", "running"):
        server.add_run(TEAM, "p", name=state, state=state)
    for number, (args, states) in enumerate(
        [
            (["--state", "finished,crashed"], {"finished", "crashed"}),
            (["--state", "finished", "--state", "Running"], {"finished", "running"}),
            (["--state", "finished,all"], {"finished", "crashed", "running"}),
        ]
    ):
        good(export(server, folder / str(number), "-p", "p", *args))
        assert set(read(folder / str(number), "p")["state"].to_pylist()) == states


def test_paths_can_be_copied_from_what_is_said(server, folder):
    add(server, "a", steps(0, 1))
    lines = good(export(server, folder, "-p", "p", "--include-history")).err.splitlines()
    assert f"Saved 1 run to {runs_file(folder, 'p')}" in lines
    assert f"Saved 2 history rows to {folder / f'{TEAM}_p_history.parquet'}" in lines
    assert f"Up to date: 1 run in {runs_file(folder, 'p')}" in export(server, folder, "-p", "p").err.splitlines()
