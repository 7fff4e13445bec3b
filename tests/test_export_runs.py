"""export_runs.py against the server: the runs file to the letter, incremental exports, windows, faces to the user.

History has its own file (test_export_history.py), and so have faults (test_export_faults.py).
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    TEAM,
    assert_contract,
    assert_contract_of_ids,
    clean_env,
    config_type,
    export,
    fill_small,
    good,
    json_of,
    leftovers,
    load_script,
    metadata,
    read,
    run_script,
    runs_file,
    unwrapped,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from wandb_server import KEY, WandbServer, iso

# ---------------------------------------------------------------- columns, types, values


def test_fixed_columns_their_order_types_and_values(server, folder):
    server.add_run(
        TEAM,
        "p",
        name="aaa",
        display_name="stage2, a/b\nc",
        state="crashed",
        created_at="2025-10-01T12:00:00.250Z",
        heartbeat_at="2025-10-01T14:30:00+02:00",
        tags=["b", "a", ""],
        group="g",
        job_type="train",
        notes="líne\n2",
        sweep="sw1",
        commit="c0ffee",
        summary={"_step": 41, "_runtime": 7.5, "_wandb": {"runtime": 8}, "loss": 0.5},
        history=[{"_step": step, "loss": 1.0} for step in range(42)],
    )
    server.add_run(TEAM, "p", name="bbb", display_name=None, created_at="2025-10-02T00:00:00", summary={"_runtime": 3})
    server.add_run(TEAM, "p", name="ccc", created_at="2025-10-03T00:00:00Z", summary={"_step": "x", "_runtime": "NaN"})
    good(export(server, folder, "-p", "p"))
    table = read(folder, "p")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        *[(name, "string") for name in ("id", "name", "entity", "project", "state", "url")],
        ("created_at", "timestamp[us, tz=UTC]"),
        ("heartbeat_at", "timestamp[us, tz=UTC]"),
        ("tags", table.schema.field("tags").type.__str__()),
        *[(name, "string") for name in ("user", "group", "job_type", "sweep", "notes", "commit")],
        ("last_step", "int64"),
        ("runtime_seconds", "double"),
        ("history_rows", "int64"),
        ("metric_loss", "double"),
        ("_config_json", "string"),
        ("_summary_json", "string"),
    ]
    assert table.schema.field("tags").type.value_type == pa.string()
    first, second, third = table.to_pylist()
    assert first == {
        "id": "aaa",
        "name": "stage2, a/b\nc",
        "entity": TEAM,
        "project": "p",
        "state": "crashed",
        "url": f"{server.url}/{TEAM}/p/runs/aaa",
        "created_at": datetime(2025, 10, 1, 12, 0, 0, 250_000, UTC),
        "heartbeat_at": datetime(2025, 10, 1, 12, 30, tzinfo=UTC),
        "tags": ["b", "a", ""],
        "user": "tester",
        "group": "g",
        "job_type": "train",
        "sweep": "sw1",
        "notes": "líne\n2",
        "commit": "c0ffee",
        "last_step": 41,
        "runtime_seconds": 8.0,
        "history_rows": 42,
        "metric_loss": 0.5,
        "_config_json": "{}",
        "_summary_json": '{"_step": 41, "_runtime": 7.5, "_wandb": {"runtime": 8}, "loss": 0.5}',
    }
    assert second["name"] is None
    assert second["created_at"] == datetime(2025, 10, 2, tzinfo=UTC)
    assert (second["tags"], second["last_step"], second["runtime_seconds"]) == ([], None, 3.0)
    assert third["last_step"] is None


def test_metadata_file(server, folder):
    server.add_run(TEAM, "p", name="a", config={"model": {"k": 8}, "lr/x": 1}, state="finished")
    server.add_run(TEAM, "p", name="b", config={"lr_x": 2}, state="crashed", summary={"test/eps_0.1/mse": 1})
    server.add_run(TEAM, "p", name="c", state="finished")
    good(export(server, folder, "-p", "p", "--until", "2030-01-01"))
    about = metadata(folder, "p")
    assert (about["entity"], about["project"]) == (TEAM, "p")
    assert abs(datetime.fromisoformat(about["exported_at"]) - datetime.now(UTC)) < timedelta(minutes=2)
    assert about["base_url"] == server.url
    assert about["wandb_version"].startswith("0.31")
    assert about["total_runs"] == 3
    assert about["runs_by_state"] == {"finished": 2, "crashed": 1}
    assert about["filters"]["until"].startswith("2030-01-01")
    assert about["columns"] == {
        "config_lr_x": "lr_x",
        "config_lr_x__2": "lr/x",
        "config_model_k": "model.k",
        "metric_test_eps_0_1_mse": "test/eps_0.1/mse",
    }
    done = about["export"]
    assert (done["new"], done["updated"], done["unchanged"], done["removed"], done["failed"]) == (3, 0, 0, [], [])
    assert leftovers(folder) == []
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert KEY.encode() not in everything


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([True, False, None], "bool", [True, False, None]),
        ([1, -(2**63), 2**63 - 1], "int64", [1, -(2**63), 2**63 - 1]),
        ([1, 0.001], "double", [1.0, 0.001]),
        ([2**63, 1], "double", [float(2**63), 1.0]),
        ([10**400, 1], "string", ["1" + "0" * 400, "1"]),
        ([True, 1], "string", ["true", "1"]),
        ([True, 1.5], "string", ["true", "1.5"]),
        (["adam", 0.001, True, None, 3], "string", ["adam", "0.001", "true", None, "3"]),
        ([[1, "ä", None], {"deep": 1}], "string", ['[1, "ä", null]', None]),
        ([[1, 2], 3], "string", ["[1, 2]", "3"]),
        ([None, None], "string", [None, None]),
        (["", "null"], "string", ["", "null"]),
        (["NaN", 0.5], "string", ["NaN", "0.5"]),
        ([1e-7, 1e22], "double", [1e-7, 1e22]),
    ],
)
def test_one_type_per_config_column(server, folder, values, kind, expected):
    assert kind == config_type([value for value in values if not isinstance(value, dict)])
    for number, value in enumerate(values):
        server.add_run(TEAM, "p", config={"x": value}, created_at=iso(number))
    good(export(server, folder, "-p", "p", "-q"))
    table = read(folder, "p")
    assert str(table.schema.field("config_x").type) == kind
    assert table["config_x"].to_pylist() == expected


def test_metric_values(server, folder):
    summary = {
        "int": 3,
        "bool": True,
        "off": False,
        "nan": "NaN",
        "up": "Infinity",
        "down": "-Infinity",
        "word": "nan",
        "text": "0.5",
        "null": None,
        "list": [1, 2],
        "big": 10**400,
        "loss": {"min": 0.1, "max": {"deep": True}},
        "picture": {"_type": "image-file", "width": 640},
        "box": {"table": {"_type": "table-file", "ncols": 3}, "n": 2},
        "_step": 3,
        "_wandb": {"runtime": 1},
        "_secret": 1,
    }
    server.add_run(TEAM, "p", name="a", summary=summary)
    server.add_run(
        TEAM, "p", name="b", summary_json='{"bare": NaN, "up": -Infinity, "int": 1e3, "text": 4, "huge": 1e999}'
    )
    good(export(server, folder, "-p", "p"))
    table = read(folder, "p")
    rows = table.select([name for name in table.schema.names if name.startswith("metric_")]).to_pylist()
    nan, inf = math.nan, math.inf
    names = ["int", "bool", "off", "nan", "up", "down", "big", "loss_min", "loss_max_deep"]
    names += ["box_n", "bare", "text", "huge"]
    expected = [
        dict(zip(names, [3.0, 1.0, 0.0, nan, inf, -inf, inf, 0.1, 1.0, 2.0, None, None, None], strict=True)),
        dict(zip(names, [1000.0, None, None, None, -inf, *[None] * 5, nan, 4.0, inf], strict=True)),
    ]
    for row, values in zip(rows, expected, strict=True):
        assert {k: repr(v) for k, v in row.items()} == {f"metric_{k}": repr(v) for k, v in values.items()}
    assert_contract(table, server.runs(TEAM, "p"))


def test_keys_that_land_on_one_column(server, folder):
    server.add_run(TEAM, "p", name="a", summary={"test/mse": 1, "test_mse": 2, "test.mse": 3, "test_mse__2": 4})
    server.add_run(TEAM, "p", name="b", config={"a": {"b": 1}, "a_b": 2, "a.b": 3, "é/x": 4, "": 5, "_": 6, "1": 7})
    server.add_run(TEAM, "p", name="c", config={"a": {"b": {"c": 1}, "b_c": 2}, "a_b": {"c": 3}, "model": {"_t_": 8}})
    good(export(server, folder, "-p", "p"))
    table = read(folder, "p")
    a, b, c = table.to_pylist()
    keys = metadata(folder, "p")["columns"]
    assert keys == assert_contract(table, server.runs(TEAM, "p"))
    assert [a[f"metric_test_mse{n}"] for n in ("", "__2", "__3", "__4")] == [2.0, 4.0, 3.0, 1.0]
    assert keys["metric_test_mse__2"] == "test_mse__2"
    assert b["config_a_b"] == 2
    assert {b["config_a_b__2"], b["config_a_b__3"]} == {1, 3}
    assert [b[name] for name in ("config_é_x", "config_", "config_1")] == [4, 5, 7]
    assert c["config_model__t_"] == 8
    assert {c["config_a_b_c"], c["config_a_b_c__2"], c["config_a_b_c__3"]} == {1, 2, 3}


@pytest.mark.parametrize(
    "text",
    [
        '{"b": 1, "a": 2, "": {"z": 1, "": 2}}',
        '{"n": 123456789012345678901234567890, "m": -9223372036854775809, "f": 1e22, "i": 1.0}',
        '{"s": "\\ud800 lone", "\\udfff": 1, "pair": "\\ud83d\\ude00", "snow": "☃ \\u2603"}',
        '{"s": "a\\u0000b\\u001f", "q": "\\"\\\\/", "line": "x\\u2028y"}',
        '{"tab": "a\tb", "newline": "a\nb"}',  # bare control characters
        '{"x": NaN, "y": [Infinity, -Infinity], "z": {"w": NaN}}',
        '{"list": [1, [2, {"a": null}], true], "empty": {}, "none": null, "el": []}',
        '{"%s": 1}' % ("k" * 3000),
        "{}",
        "",
    ],
)
def test_json_columns_give_back_exactly_what_wandb_holds(server, folder, text):
    wrapped = "" if not text else re.sub(r"^\{(.*)\}$", r'{"c": {"value": {\1}, "desc": null}}', text, flags=re.S)
    server.add_run(TEAM, "p", name="a", config_json=wrapped, summary_json=text)
    server.add_run(TEAM, "p", name="b", config_json="{}", summary_json="{}")
    good(export(server, folder, "-p", "p", "-q"))
    table = read(folder, "p")
    summary, config = table["_summary_json"][0].as_py(), table["_config_json"][0].as_py()
    assert repr(json.loads(summary)) == repr(json_of(text or "{}"))
    assert repr(json.loads(config)) == repr(unwrapped(wrapped or "{}"))


def test_config_without_wrappers_and_with_values_that_look_like_them(server, folder):
    text = '{"bare": 1, "w": {"value": {"value": 2, "desc": 3}}, "_wandb": {"value": {"t": 1}}, "nodesc": {"value": 4}}'
    server.add_run(TEAM, "p", config_json=text)
    good(export(server, folder, "-p", "p", "-q"))
    [row] = read(folder, "p").to_pylist()
    columns = {name: value for name, value in row.items() if name.startswith("config_")}
    assert columns == {"config_bare": 1, "config_w_value": 2, "config_w_desc": 3, "config_nodesc": 4}
    assert json.loads(row["_config_json"])["_wandb"] == {"t": 1}


def test_a_run_whose_json_is_broken_is_named_and_the_others_come(server, folder):
    server.add_run(TEAM, "p", name="bad", display_name="broken one", config_json='{"lr": ', summary_json="{}")
    server.add_run(TEAM, "p", name="deep", config_json="{}", summary_json='{"a":' * 50_000 + "1" + "}" * 50_000)
    server.add_run(TEAM, "p", name="fine", config={"lr": 1})
    done = export(server, folder, "-p", "p")
    assert done.code == 1
    assert "broken one" in done.err
    assert read(folder, "p")["id"].to_pylist() == ["fine"]
    assert sorted(run["id"] for run in metadata(folder, "p")["export"]["failed"]) == ["bad", "deep"]
    server.update_run(TEAM, "p", "bad", config={"lr": 2})
    server.update_run(TEAM, "p", "deep", summary={})
    good(export(server, folder, "-p", "p"))
    assert sorted(read(folder, "p")["id"].to_pylist()) == ["bad", "deep", "fine"]


def test_rows_come_oldest_first_whatever_order_they_were_stored_in(server, folder):
    rng = random.Random(3)
    for second in rng.sample(range(300), 300):
        server.add_run(TEAM, "p", created_at=iso(1_759_000_000 + second), display_name=str(second))
    good(export(server, folder, "-p", "p", "-q"))
    assert read(folder, "p")["name"].to_pylist() == [str(second) for second in range(300)]


# ---------------------------------------------------------------- any config and summary

NAMES = ["a", "b", "a_b", "a.b", "a/b", "_x", "", "a__2", "_type"]
texts = st.text(st.characters(), max_size=5) | st.sampled_from(NAMES)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | texts
    | st.sampled_from(["NaN", "Infinity", "-Infinity", 2**63, 2**1024, -1.0, 0.1, 1])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
objects = st.dictionaries(texts, values, max_size=5)


quietly = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


@settings(quietly, max_examples=15)
@given(projects=st.lists(st.lists(st.tuples(objects, objects), min_size=1, max_size=4), min_size=6, max_size=6))
def test_no_value_is_lost_or_invented_whatever_runs_hold(tmp_path_factory, projects):
    folder = tmp_path_factory.mktemp("any")
    with WandbServer() as server:
        for number, runs in enumerate(projects):
            for config, summary in runs:
                wrapped = json.dumps({key: {"value": value, "desc": None} for key, value in config.items()})
                server.add_run(TEAM, f"p{number}", config_json=wrapped, summary_json=json.dumps(summary))
        good(export(server, folder, "-q"))
        for number in range(len(projects)):
            runs = sorted(server.runs(TEAM, f"p{number}"), key=lambda run: run.id)  # of one second: by id
            keys = assert_contract(read(folder, f"p{number}"), runs)
            assert metadata(folder, f"p{number}")["columns"] == keys


# ---------------------------------------------------------------- pages and windows


@pytest.mark.parametrize(
    ("runs", "per_second", "seconds_apart"),
    [
        (1, 1, 60),
        (99, 1, 60),
        (100, 1, 60),
        (101, 1, 60),
        (1001, 1, 60),
        (1001, 400, 1),
        (2300, 2300, 1),
        (1500, 7, 86400),
    ],
)
def test_no_run_is_lost_or_doubled_between_pages_and_windows(server, folder, runs, per_second, seconds_apart):
    server.fill(TEAM, "p", runs, 3, 2, per_second=per_second, seconds_apart=seconds_apart)
    good(export(server, folder, "-p", "p", "-q"))
    assert_contract_of_ids(read(folder, "p"), server)
    assert server.stats.full_runs <= runs + 200  # the first page's second may be asked for again


def test_bursts_in_any_order_of_arrival(server, folder):
    rng = random.Random(5)
    seconds = [1_759_000_000 + rng.choice([0, 0, 0, 1, 2, 3600, 3601, 90_000]) + rng.random() for _ in range(1300)]
    for number, second in enumerate(seconds):
        moment = datetime.fromtimestamp(second, UTC).isoformat(timespec="milliseconds")
        server.add_run(TEAM, "p", summary={"n": number}, created_at=moment)
    good(export(server, folder, "-p", "p", "-q"))
    assert_contract_of_ids(read(folder, "p"), server)
    server.stats.reset()
    good(export(server, folder, "-p", "p", "-q", "--full", "--workers", "1"))
    assert_contract_of_ids(read(folder, "p"), server)
    assert server.stats.max_in_flight == 1


def test_a_cold_export_takes_few_requests_and_asks_for_no_more_than_it_needs(server, folder):
    server.fill(TEAM, "p", 2163, 20, 10)
    server.weather.latency = 0.01
    good(export(server, folder, "-p", "p", "-q"))
    assert server.stats.total <= 20
    assert server.stats.full_runs <= 2163 + 100
    asked = " ".join(query for _, query, _ in server.stats.queries)
    assert not re.search("historyKeys|systemMetrics|historyTail|files|eventsTail", asked)


def test_runs_that_come_and_go_while_they_are_fetched(server, folder):
    """Whatever the moment, runs that were there all the time are there once."""
    server.fill(TEAM, "p", 1500, 2, 2)
    server.weather.latency = 0.02
    stay = {run.id for run in server.runs(TEAM, "p")[::2]}

    def change() -> None:
        for number, run in enumerate(server.runs(TEAM, "p")[1::2]):
            server.delete_run(TEAM, "p", run.id)
            server.add_run(TEAM, "p", created_at=iso(1_759_276_800 + number * 97))
            time.sleep(0.0003)

    thread = threading.Thread(target=change)
    thread.start()
    done = export(server, folder, "-p", "p", "-q")
    thread.join()
    good(done)
    ids = read(folder, "p")["id"].to_pylist()
    assert len(ids) == len(set(ids))
    assert stay <= set(ids)
    good(export(server, folder, "-p", "p", "-q"))
    assert_contract_of_ids(read(folder, "p"), server)


# ---------------------------------------------------------------- several projects


def exported(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_runs.parquet") for path in folder.glob("*_runs.parquet"))


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ([], ["abc", "abd", "xyz"]),
        (["-p", "*"], ["abc", "abd", "xyz"]),
        (["-p", "ab*"], ["abc", "abd"]),
        (["-p", "ab?", "-p", "xyz"], ["abc", "abd", "xyz"]),
        (["-p", "abc", "-p", "abc"], ["abc"]),
        (["-p", "[ax]b[!d]"], ["abc"]),
    ],
)
def test_projects_by_name_and_by_glob(server, folder, wanted, names):
    for name in ("abc", "abd", "xyz"):
        fill_small(server, name)
    fill_small(server, "other", entity="tester")
    good(export(server, folder, *wanted))
    assert exported(folder) == [f"{TEAM}_{name}" for name in names]


def test_entities_come_from_the_command_line_the_environment_or_the_key(server, folder):
    fill_small(server, "team_project")
    fill_small(server, "own_project", entity="tester")
    good(export(server, folder / "1", entity=""))
    assert exported(folder / "1") == ["tester_own_project"]
    good(export(server, folder / "2", entity="", WANDB_ENTITY=f"tester, {TEAM}"))
    assert exported(folder / "2") == [f"{TEAM}_team_project", "tester_own_project"]
    good(export(server, folder / "3", WANDB_ENTITY="tester"))
    assert exported(folder / "3") == [f"{TEAM}_team_project"]
    good(export(server, folder / "4", "-e", "tester"))
    assert exported(folder / "4") == [f"{TEAM}_team_project", "tester_own_project"]


def test_a_project_that_is_not_there(server, folder):
    fill_small(server, "spectral_denoising")
    done = export(server, folder, "-p", "spectral_denoise")
    assert done.code == 2
    assert "spectral_denoise'" in done.err
    assert "Did you mean spectral_denoising?\n" in done.err
    done = export(server, folder, "-p", "spectral_denoisng*")
    assert done.code == 2
    assert "spectral_denoising" in done.err
    assert exported(folder) == []


def test_one_project_of_several_that_is_not_there(server, folder):
    fill_small(server, "here")
    done = export(server, folder, "-p", "here", "-p", "gone")
    assert done.code == 1
    assert "'gone'" in done.err
    assert exported(folder) == [f"{TEAM}_here"]


@pytest.mark.parametrize("hidden", ["null", "empty", "error"])
@pytest.mark.parametrize("wanted", [[], ["-p", "p"]])
def test_an_entity_that_is_not_there(server, folder, hidden, wanted):
    server.weather.hidden_entities = hidden
    done = export(server, folder, *wanted, entity="graph_denoise_tem")
    assert done.code == 2, done
    assert "graph_denoise_tem'" in done.err
    assert TEAM in done.err
    assert exported(folder) == []


def test_one_entity_of_several_that_is_not_there(server, folder):
    fill_small(server, "here")
    done = export(server, folder, "-e", "nowhere")
    assert done.code == 1, done
    assert "nowhere" in done.err
    assert exported(folder) == [f"{TEAM}_here"]


def test_a_glob_that_matches_projects_of_one_entity_only(server, folder):
    fill_small(server, "here")
    fill_small(server, "other", entity="tester")
    done = export(server, folder, "-e", "tester", "-p", "he*")
    assert exported(folder) == [f"{TEAM}_here"]
    assert done.code in (0, 1)


def test_nothing_to_export(server, folder):
    done = export(server, folder)  # an entity that is seen and has no project
    assert done.code == 1, done
    assert TEAM in done.err
    server.add_project(TEAM, "bare")
    done = export(server, folder)
    assert done.code == 1
    assert f"{TEAM}/bare" in done.err
    assert "no runs" in done.err
    fill_small(server, "full")
    good(export(server, folder))  # one of them has runs
    assert exported(folder) == [f"{TEAM}_full"]
    done = export(server, folder / "2", "-p", "full", "--since", "1d")
    assert done.code == 1
    assert "no runs that match" in done.err
    assert exported(folder / "2") == []
    assert leftovers(folder / "2") == []


def test_two_projects_that_spell_the_same_file(server, folder):
    server.add_key("k" * 40, "u", teams=["a", "a_b"])
    fill_small(server, "c", 2, entity="a_b")
    fill_small(server, "b_c", 5, entity="a")
    done = export(server, folder, "-e", "a", entity="a_b", key="k" * 40)
    assert done.code == 1
    assert "a/b_c" in done.err
    assert "a_b/c" in done.err
    table = pq.read_table(folder / "a_b_c_runs.parquet")
    assert table["project"].to_pylist() == ["c"] * 2
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = export(server, folder, entity="a", key="k" * 40)  # on another day
    assert done.code == 1
    assert "a_b/c" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---------------------------------------------------------------- what is said


def test_progress_and_results_are_plain_lines_where_nobody_watches(server, folder, tmp_path):
    server.fill(TEAM, "spectral_denoising", 250, 3, 3)
    env = clean_env(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    done = run_script("export_runs.py", "-e", TEAM, "-p", "spectral_denoising", "-o", folder, cwd=tmp_path, env=env)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert "... fetched 100 runs" in lines
    assert "... fetched 200 runs" in lines
    assert f"Saved 250 runs to {runs_file(folder, 'spectral_denoising')}" in done.stderr
    assert "WANDB_API_KEY" in lines[0]
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "spectral_denoising" in done.stdout
    assert KEY not in done.stdout + done.stderr
    server.update_run(TEAM, "spectral_denoising", server.runs(TEAM, "spectral_denoising")[0].id, notes="x")
    args = ["-e", TEAM, "-p", "spectral_denoising", "-o", folder, "-q", "--api-key", KEY]
    done = run_script("export_runs.py", *args, cwd=tmp_path, env=env | {"WANDB_API_KEY": "wrong"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_default_folder():
    assert load_script("export_runs.py").parse_arguments([]).output == Path("wandb_export")


def test_table_at_the_end(server, folder):
    server.fill(TEAM, "a_project_with_quite_a_long_name_that_goes_on_and_on", 120, 3, 3)
    fill_small(server, "small")
    server.add_run(TEAM, "small", history=[{"_step": n, "loss": n} for n in range(1234)], summary={"_step": 1233})
    server.add_project(TEAM, "empty")
    done = export(server, folder, "--include-history", "-p", "*", "-p", "gone")
    assert done.code == 1
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.out
    heads = re.split(r"  +", lines[0].strip())
    assert heads[0] == "project"
    [small] = [line.split() for line in lines if "small" in line]
    row = dict(zip(heads, small, strict=False))
    assert (row["runs"], row["new"], row["history"]) == ("4", "4", "1,234")
    assert "failed" not in heads or row["failed"] == "0"
    server.delete_run(TEAM, "small", server.runs(TEAM, "small")[0].id)
    server.update_run(TEAM, "small", server.runs(TEAM, "small")[0].id, notes="x")
    done = good(export(server, folder, "-p", "small"))
    heads, row = (re.split(r"  +", done.out.splitlines()[n].strip()) for n in (0, -1))
    row = dict(zip(heads, row, strict=False))
    assert (row["runs"], row["updated"], row["removed"]) == ("3", "1", "1")


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--since", "yesterday"], "yesterday"),
        (["--since", "2025-02-30"], "2025-02-30"),
        (["--since", "99999999999d"], "99999999999d"),
        (["--since", "2025-02-01", "--until", "2025-01-01"], "2025-02-01"),
        (["--state", "done"], "done"),
        (["--workers", "0"], "0"),
        (["--workers", "many"], "many"),
        (["--history-keys", "loss"], "--include-history"),
        (["--no-such-option"], "--no-such-option"),
        (["a_word"], "a_word"),
        (["-e", ""], "-e '' names no entity"),
        (["-e", "/p"], "-e '/p' names no entity"),
        (["-p", "team/p"], "Write -e team -p p. See"),
    ],
)
def test_arguments_that_cannot_be_meant(server, folder, args, word):
    done = export(server, folder, *args)
    assert done.code == 2
    assert word in done.err
    assert server.stats.total == 0
    assert not folder.exists()


def test_output_that_is_a_file(server, tmp_path):
    (tmp_path / "file").write_text("mine")
    fill_small(server, "p")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = export(server, place, "-p", "p")
        assert done.code in (1, 2)
        assert "file" in done.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["team/project", "../../x", "a b", "Pröjekt", "."])
def test_names_that_projects_do_not_have(server, folder, tmp_path, name):
    fill_small(server, "p")
    done = export(server, folder, "-p", name)
    assert done.code == 2, done
    assert name in done.err
    assert not list(tmp_path.rglob("*.lock"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_settings_that_cannot_be_meant(server, folder):
    fill_small(server, "p")
    done = export(server, folder, "-p", "p", WANDB_HTTP_TIMEOUT="soon")
    assert done.code in (0, 2)
    assert done.code == 0 or "WANDB_HTTP_TIMEOUT" in done.err
    done = export(server, folder, "-p", "p", WANDB_BASE_URL="api.wandb.ai")
    assert done.code == 2
    assert "api.wandb.ai" in done.err


def test_odd_names_in_addresses(server, folder):
    server.add_key("s" * 40, "user.name", teams=["team-1"])
    server.add_run("team-1", "my project", name="a b/c", display_name="x")
    good(export(server, folder, entity="team-1", key="s" * 40))
    [row] = pq.read_table(folder / "team-1_my project_runs.parquet").to_pylist()
    assert row["url"] == f"{server.url}/team-1/my%20project/runs/a%20b%2Fc"


def test_service_account_keys(server, folder):
    key = "wandb_v1_" + "x" * 77
    server.add_key(key, "svc", teams=[TEAM])
    fill_small(server, "p")
    good(export(server, folder, "-p", "p", key=key))
    assert read(folder, "p").num_rows == 3
