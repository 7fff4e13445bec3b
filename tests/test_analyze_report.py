"""analyze_runs.py --report: the page in a browser, and every number on it against the question that it comes from."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
from pathlib import Path

import polars as pl
import pytest
from conftest import load_script
from test_analyze_pictures import in_browser
from test_analyze_runs import KEYS, demo_rows, run_row, write_history, write_runs
from test_analyze_runs import call as call  # fixtures
from test_analyze_runs import result as result

analyze = load_script("analyze_runs.py")
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's 144 runs with their history; the best run, a config and a tag try to become markup and script."""
    folder = tmp_path_factory.mktemp("lab")
    rows = demo_rows()
    for i, row in enumerate(rows):
        row["tags"] = [HOSTILE]
        row["config_note"] = HOSTILE if i % 2 else "none"
    rows[0] |= {"name": f"stage2_gnn_qk_sbm_{HOSTILE}", "metric_test_mse": 1e-4, "url": "javascript:alert(1)"}
    write_runs(folder / "wandb_export" / "lab_demo_runs.parquet", rows, KEYS)
    steps = range(0, 200, 10)
    curve = {str(row["id"]): [(s, math.exp(-s / 60) + i / 1e3) for s in steps] for i, row in enumerate(rows)}
    write_history(folder / "wandb_export" / "lab_demo_history.parquet", rows, curve)
    return folder


@pytest.fixture(scope="module")
def page(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report of the lab, and what making it said."""
    monkeypatch = pytest.MonkeyPatch()
    said = io.StringIO()
    target = tmp_path_factory.mktemp("page") / "report.html"
    monkeypatch.chdir(lab)
    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr("sys.argv", ["analyze_runs.py", "-m", "test/mse", "--report", str(target)])
    try:
        assert analyze.main() == 0, said.getvalue()
    finally:
        monkeypatch.undo()
    return target, said.getvalue()


WAIT = """
const all = selector => [...document.querySelectorAll(selector)];
async function drawn() {
  while (all("figure").some(f => !f.querySelector("svg"))) await new Promise(done => setTimeout(done, 50));
}
const click = element => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
"""


def drive(page: Path, tmp_path: Path, script: str, width: int = 1280) -> object:
    """What `script` returns in the page, after the pictures are drawn, as JSON; fails on an error or a request.

    The script is added to a copy of the page, and to the scripts that the policy of the copy allows. The copy stands in
    a frame of `width` pixels, for Chromium's own window has at least 500.
    """
    script = f"{WAIT}drawn().then(async () => {{\n{script}\n}}).then(found => parent.postMessage(found, '*'));"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8")
    assert text.count("script-src 'sha256-") == 1
    text = text.replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-")
    (tmp_path / "driven.html").write_text(f"{text.removesuffix('</html>')}<script>{script}</script></html>", "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<script>onmessage = e => { found.textContent = JSON.stringify(e.data) }</script><pre id=found></pre>"
        f"<iframe src=driven.html style='border: 0; width: {width}px; height: 900px'></iframe>"
    )
    document, console, asked = in_browser(frame, tmp_path, "--window-size=1400,1000")
    assert console == []
    assert asked == []
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.S)[1]))


SEEN = """
return {
  width: innerWidth, wide: document.documentElement.scrollWidth, title: document.title, images: all("img").length,
  headings: all("h1, h2").map(h => h.textContent), methods: all("nav button").map(b => b.textContent),
  labels: all("figure").map(f => f.querySelector("[role=graphics-document]")?.getAttribute("aria-label")),
  scopes: all("thead th").map(h => h.scope), links: all("td a").map(a => [a.textContent, a.getAttribute("href")]),
  marks: all("figure").map(f => Object.fromEntries(["rect", "symbol", "rule", "line", "area", "text"].map(
    kind => [kind, f.querySelectorAll(`.mark-${kind}.role-mark > *`).length]))),
  tables: all("table").map(t => [...t.rows].map(r => [...r.cells].map(c => c.textContent))),
};
"""


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_holds_what_it_promises_in_a_browser(page, result, lab, tmp_path, width):
    seen = drive(page[0], tmp_path, SEEN, width)
    assert seen["wide"] <= seen["width"] == width, "tables and pictures scroll in themselves"
    assert seen["title"] == "test/mse: demo"
    assert [h.split(". ")[-1] for h in seen["headings"]] == ["test/mse: demo", *SECTIONS]
    assert seen["methods"] == ["filter_bank", "gnn_qk", "mlp", "multilayer_self_attention"]
    assert set(seen["scopes"]) == {"col"}
    assert all(seen["labels"]), "every picture says what it is"
    weeks, best, top, *along, curves = seen["marks"]
    assert weeks["rect"] == 1
    assert best["symbol"] == 12, "a point per cell"
    assert top["symbol"] == 10
    assert len(along) == 3
    assert (curves["line"], curves["area"]) == (4, 4)
    tables = {table[0][-1 if table[0][0] == "" else 0]: table for table in seen["tables"]}
    assert tables["project"][1][:2] == ["demo", "144"]
    named = result(lab, "-m", "test/mse")[:10]
    assert [row[1] for row in tables["#"][1:]] == [analyze.number(row["name"]) for row in named]
    assert [row[2] for row in tables["#"][1:]] == [f"{row['metric_test_mse']:.4g}" for row in named]


SECTIONS = [
    *("What was run", "What varied", "The comparison", "The best runs", "What matters", "Learning curves"),
    "What to be careful about",
]


def test_text_that_looks_like_markup_stays_text(page, tmp_path):
    seen = drive(page[0], tmp_path, SEEN)
    assert (seen["title"], seen["images"]) == ("test/mse: demo", 0)
    best = next(table for table in seen["tables"] if table[0][0] == "#")[1]
    assert best[1] == f"stage2_gnn_qk_sbm_{HOSTILE}"
    links = dict(seen["links"])
    assert best[1] not in links, "no link to javascript:"
    assert len(links) == 9
    assert all(link.startswith("https://wandb.ai/lab/demo/runs/run") for link in links.values())
    text = page[0].read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; style-src-elem 'sha256-")
    assert len(re.findall(r"script-src 'sha256-[\w+/=]{44}'$", policy)) == 1, "one script, no eval"
    assert HOSTILE not in text


def test_a_script_that_got_into_the_page_would_not_run(page, tmp_path):
    """The policy itself: a copy with one more script, and a handler, in which neither does anything."""
    copy = tmp_path / "attacked.html"
    text = page[0].read_text(encoding="utf-8")
    attack = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    copy.write_text(text.replace("<main>", f"<main>{attack}"), encoding="utf-8")
    document, console, _ = in_browser(copy, tmp_path)
    assert "<title>test/mse: demo</title>" in document
    assert any("Content Security Policy" in line for line in console)


def test_tables_are_sorted_by_the_column_that_is_clicked(page, tmp_path):
    sort = """
    const table = all("table").find(t => t.rows[0].cells[0].textContent === "#"), head = table.rows[0].cells;
    const column = i => [...table.rows].slice(1).map(r => r.cells[i].textContent), found = [];
    for (const i of [2, 2, 1, 0]) {
      head[i].querySelector("button").click();
      found.push([column(i), [...head].map(h => h.getAttribute("aria-sort"))]);
    }
    return found;
    """
    up, down, names, ranks = drive(page[0], tmp_path, sort)
    numbers = [float(text) for text in up[0]]
    assert numbers == sorted(numbers)
    assert [float(text) for text in down[0]] == numbers[::-1]
    assert (up[1][2], down[1][2], names[1][1], names[1][2]) == ("ascending", "descending", "ascending", None)
    assert sorted(names[0], key=str.lower) == names[0]
    assert ranks[0] == [str(i) for i in range(1, 11)], "as numbers: 10 after 9"


def test_numbers_of_every_form_are_sorted_as_numbers(tmp_path):
    texts = ["0.5", "-", "[0.01, 0.2]", "(1.2 ± 0.1)e+07", "3e-05", "12.0 ± 1.5 (n=3)", "-7"]
    found = drive_script(tmp_path, f"return {json.dumps(texts)}.map(value)")
    assert found == [0.5, "-", 0.01, 1.2e7, 3e-05, 12.0, -7]
    words = ["2025-10-01", "8bit", "gnn", "1-2"]
    assert drive_script(tmp_path, f"return {json.dumps(words)}.map(value)") == words, "no numbers"


def drive_script(tmp_path: Path, script: str) -> object:
    """What `script` returns where SCRIPT has run, in an empty page."""
    (tmp_path / "empty.html").write_text(analyze.page("empty", "", analyze.SCRIPT), encoding="utf-8")
    return drive(tmp_path / "empty.html", tmp_path, script)


def test_a_method_is_singled_out_in_all_pictures(page, tmp_path):
    single = """
    const state = () => all("figure").map(f => {
      const marks = [...f.querySelectorAll(".role-mark *")].filter(e => e.__data__?.datum);
      const named = v => v === "mlp" || `${v}`.startsWith("mlp /");
      const mine = marks.filter(e => Object.values(e.__data__.datum).some(named));
      return [mine.length, mine.filter(e => e.matches(".dim")).length,
        marks.length - mine.length, marks.filter(e => e.matches(".dim")).length];
    });
    const mlp = all("nav button").find(b => b.textContent === "mlp"), found = [state()];
    mlp.click(); found.push(state(), mlp.getAttribute("aria-pressed"), all("tbody tr.on").length);
    mlp.click(); found.push(state());
    const curve = all("figure").at(-1).querySelector(".mark-line.role-mark path");
    const box = curve.getBoundingClientRect(), at = { bubbles: true, clientX: box.x + 5, clientY: box.y + 5 };
    for (const kind of ["pointerdown", "mousedown", "pointerup", "mouseup", "click"])
      curve.dispatchEvent(new (kind.startsWith("p") ? PointerEvent : MouseEvent)(kind, at));
    found.push(all("[aria-pressed=true]").map(b => b.textContent), curve.__data__.datum.group);
    return found;
    """
    before, chosen, pressed, rows, after, picked, curve = drive(page[0], tmp_path, single)
    assert all(mine_dim == all_dim == 0 for _, mine_dim, _, all_dim in before + after)
    with_methods = [figure for figure in chosen if figure[0]]
    assert len(with_methods) >= 3, "the comparison, the influence of arch, the learning curves"
    assert all(mine_dim == 0 and all_dim == others for _, mine_dim, others, all_dim in with_methods)
    assert all(all_dim == 0 for mine, _, _, all_dim in chosen if not mine), "a picture without the method stays"
    assert pressed == "true"
    assert rows >= 3
    assert picked == [curve], "a click on a line does the same"


def test_a_point_names_its_run_and_leads_to_it(page, tmp_path):
    hover = """
    const point = all("figure").map(f => [...f.querySelectorAll(".mark-symbol.role-mark path")])
      .find(points => points.length === 10)[1];
    const box = point.getBoundingClientRect(), at = { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 };
    for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"])
      point.dispatchEvent(new (kind.startsWith("p") ? PointerEvent : MouseEvent)(kind, at));
    await new Promise(done => setTimeout(done, 100));
    const tip = document.querySelector("#vg-tooltip-element");
    return [tip.className.includes("visible"), tip.textContent, point.__data__.datum.name, point.__data__.href];
    """
    visible, text, name, href = drive(page[0], tmp_path, hover)
    assert visible
    assert name in text
    assert re.fullmatch(r"https://wandb\.ai/lab/demo/runs/run\d{4}", href)


def test_every_table_can_be_saved_as_csv(page, result, lab):
    text = page[0].read_text(encoding="utf-8")
    links = re.findall(r'<a download="(\w+)\.csv" href="data:text/csv;base64,([\w+/=]+)"', text)
    saved = {name: list(csv.DictReader(io.StringIO(base64.b64decode(data).decode()))) for name, data in links}
    assert len(saved) == text.count("<table>\n<thead>")
    top = next(rows for name, rows in saved.items() if name.startswith("Top_10"))
    expected = result(lab, "-m", "test/mse")[:10]
    assert [(row["name"], float(row["metric_test_mse"])) for row in top] == [
        (row["name"], row["metric_test_mse"]) for row in expected
    ]
    assert {"config_model_lr", "config_model_k", "url"} <= set(top[0])
    curves = next(rows for name, rows in saved.items() if name.startswith("val_loss_along"))
    assert len(curves) == 20, "all steps"


def test_what_was_said_stands_in_the_page_and_is_printed_once(page, call, lab):
    text, said = html.unescape(page[0].read_text(encoding="utf-8")), page[1]
    lines = [line for line in said.splitlines() if not line.startswith("Saved")]
    assert len(lines) == len(set(lines)) >= 5
    assert all(f"<li>{line}" in text for line in lines)
    alone = call(lab, "-m", "test/mse", "--best-by", "val/loss").err
    assert alone.splitlines()[0] in lines
    assert "5 of 144 runs left out: 5 crashed" in said
    assert "--report" in re.search(r"Made by <code>(.*?)</code>", text)[1]


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("metric_val_loss", ["no validation metric (val/mse, val/loss, ...)", "mean ± std (n)"]),
        ("history", ["Left out: there is no ", "--include-history"]),
        ("names", ["Left out: no column that tells methods apart"]),
        ("metrics", ["Runs: demo", "Left out: none of the common metrics"]),
        ("created_at", ["<th scope=col class=number>runs"]),
    ],
)
def test_what_the_data_cannot_give_is_left_out_with_a_word(call, tmp_path, drop, words):
    rows = demo_rows()[:24] + demo_rows()[72:96]
    if drop == "metrics":
        rows = [{key: value for key, value in row.items() if not key.startswith("metric_")} for row in rows]
    if drop == "names":
        rows = [row | {"name": f"run {i}", "config_data_dataset_name": "x"} for i, row in enumerate(rows)]
    path = write_runs(
        tmp_path / "lab_demo_runs.parquet", [{k: v for k, v in r.items() if k != drop} for r in rows], KEYS
    )
    if drop != "history":
        curve = {str(row["id"]): [(0, 1.0), (1, 0.5)] for row in rows}
        write_history(tmp_path / "lab_demo_history.parquet", rows, curve)
    metric = [] if drop == "metrics" else ["-m", "test/mse"]
    ran = call(tmp_path, path, *metric, "--report", "r.html")
    assert ran.code == 0, ran.err
    text = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert all(word in text for word in words), words
    assert [heading for heading in SECTIONS if f". {heading}</h2>" in text] == SECTIONS
    left_out = {"metric_val_loss": 2, "history": 1, "names": 1, "metrics": 4, "created_at": 0}
    assert text.count("Left out:") == left_out[drop]


def test_what_is_ignored_neither_varied_nor_matters(call, tmp_path):
    rows = [row | {"config_z_random": i / 7} for i, row in enumerate(demo_rows())]
    path = write_runs(tmp_path / "random_runs.parquet", rows, KEYS)
    said = {}
    for options in ([], ["--ignore", "z_*"]):
        target = tmp_path / f"{len(options)}.html"
        assert call(tmp_path, path, "-m", "test/mse", "--report", target, *options).code == 0
        tables = re.findall(r"<section>.*?</section>", target.read_text(encoding="utf-8"), re.S)
        said[len(options)] = [
            name for name, text in zip(SECTIONS, tables, strict=True) if "<td>config_z_random" in text
        ]
    assert said == {0: ["What varied", "What matters"], 2: []}


def test_the_step_that_was_best_holds_for_the_whole_page(call, tmp_path):
    rows = [run_row(i, name=f"{'mlp' if i % 2 else 'gnn_qk'}_s{i // 2}", config_seed=i // 2) for i in range(8)]
    rows = [row | {"metric_val_loss": 5.0, "metric_test_mse": float(i)} for i, row in enumerate(rows)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows, KEYS)
    write_history(
        tmp_path / "lab_demo_history.parquet", rows, {str(row["id"]): [(0, 1.0), (9, 0.25), (19, 5.0)] for row in rows}
    )
    ran = call(tmp_path, path, "-m", "test/mse", "--at-best", "val/loss", "--report", "r.html")
    assert ran.code == 0, ran.err
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "best_step" in text
    assert "<td class=number>0.25" in text


def test_many_runs_are_thinned_with_a_word(call, tmp_path):
    rows = [run_row(i, name=f"mlp_s{i}", config_lr=i / 1000, metric_test_mse=i % 97 + 1.0) for i in range(2400)]
    ran = call(tmp_path, write_runs(tmp_path / "lab_demo_runs.parquet", rows), "-m", "test/mse", "--report", "r.html")
    assert ran.code == 0, ran.err
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Of 2400 runs each picture shows at most about 1000; the means are of all" in text


@pytest.mark.parametrize(
    "options", [["--sql", "SELECT 1"], ["--importance"], ["--schema"], ["-o", "x.csv"], ["--json"]]
)
def test_the_report_is_a_question_of_its_own(call, lab, options):
    ran = call(lab, "--report", "r.html", *options)
    assert ran.code == 2
    assert "--report" in ran.err
    assert options[0] in ran.err or "--output" in ran.err


def luminance(colour: str) -> float:
    """The relative luminance of `#rgb` or `#rrggbb`, as WCAG 2 has it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_ink_and_links_stand_out_from_the_paper_in_light_dark_and_print():
    themes = re.findall(r":root \{([^}]+)\}", analyze.STYLE)
    assert len(themes) == 3
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for ink, paper in (("ink", "paper"), ("link", "paper"), ("ink", "on")):
            light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, colours)


def test_projects_and_what_varied_are_counted(tmp_path):
    rows = demo_rows()
    for i, row in enumerate(rows):
        row["project"] = ("one", "two")[i % 3 == 0]
        row["config_constant"] = 7
        row["config_drawn"] = i / 1000
    runs = analyze.read([write_runs(tmp_path / "lab_one_runs.parquet", rows, KEYS)])
    table = analyze.projects(runs).frame
    for row in table.rows(named=True):
        mine = [r for r in rows if r["project"] == row["project"]]
        assert row["runs"] == len(mine)
        assert row["crashed"] == sum(r["state"] == "crashed" for r in mine)
        assert row["hours"] == pytest.approx(sum(r["runtime_seconds"] for r in mine) / 3600)
        assert (row["first"], row["last"]) == (
            min(r["created_at"] for r in mine).date(),
            max(r["created_at"] for r in mine).date(),
        )
    assert table["runs"].sum() == len(rows)
    answer = analyze.varied(runs)
    values = {row["column"]: row["values (runs)"] for row in answer.frame.rows(named=True)}
    assert values["config_model_k"] == "8 (72), 16 (72)"
    assert values["config_drawn"].endswith("138 more from 0 to 0.143")
    assert "config_out_dir" not in values, "a label"
    assert "constant=7" in answer.notes[0]
    assert pl.DataFrame(answer.frame)["distinct"].max() == 144


def test_thinned_groups_say_so_whichever_metric_has_fewer_values(call, tmp_path):
    rows = [run_row(i, metric_val_loss=1.0 + i if i < 900 else None, metric_test_mse=i + 1.0) for i in range(2400)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    ran = call(tmp_path, path, "-g", "state", "--metrics", "test/mse,val/loss", "--plot", "g.svg")
    assert ran.code == 0, ran.err
    assert "one in 3 runs drawn" in (tmp_path / "g.svg").read_text(encoding="utf-8")


def test_thinning_leaves_no_group_without_its_runs(call, tmp_path):
    """Runs of a sweep take turns: every third run of three methods would be of one method alone."""
    rows = [run_row(i, name=f"{('mlp', 'linear', 'digress')[i % 3]}_{i}", metric_test_mse=i + 1.0) for i in range(2400)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    ran = call(tmp_path, path, "-g", "arch", "-m", "test/mse", "--plot", "g.html")
    assert ran.code == 0, ran.err
    drawn = re.findall(r'"name": ?"(mlp|linear|digress)_', (tmp_path / "g.html").read_text(encoding="utf-8"))
    assert len(drawn) <= 1000
    assert {drawn.count(arch) for arch in ("mlp", "linear", "digress")} == {267}
