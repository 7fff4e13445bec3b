"""analyze_runs.py --plot: what is drawn and how large, and pages in a browser that may load and run nothing else."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import xml.etree.ElementTree as ET
import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import clean_env, load_script
from test_analyze_runs import QUESTIONS, run_row, write_history, write_runs
from test_analyze_runs import call as call  # fixtures
from test_analyze_runs import demo as demo

analyze = load_script("analyze_runs.py")
TEXT, RECT = "{http://www.w3.org/2000/svg}text", "{http://www.w3.org/2000/svg}path"


PICTURES = {  # question -> how often each kind of mark must be there, and words that must be readable
    "top": ({"mark-symbol role-mark": 10}, ["stage2_gnn_qk_sbm", "test/mse (lower is better)", "10 best runs"]),
    "group": ({"mark-symbol role-mark": 136 + 8}, ["gnn_qk / 8", "mlp / 16", "test/mse (lower is better)"]),
    "metrics": ({"mark-symbol role-mark": 136 + 139 * 2 + 12}, ["filter_bank", "val/loss", "test/acc"]),
    "pivot": ({"mark-rect role-mark": 12 + 3}, ["pyg_enzymes", "multilayer_self_attention", "n=12", "±"]),
    "best-by": ({"mark-symbol role-mark": 12, "mark-rule role-mark": 24}, ["gnn_qk", "sbm", "median, range"]),
    "curves": ({"mark-line role-mark": 4, "mark-area role-mark": 4}, ["_step", "val/loss", "filter_bank"]),
}  # fmt: skip


def marks(svg: ET.Element) -> dict[str, int]:
    """How many items each kind of mark in a Vega SVG has, by the class of its group."""
    found: dict[str, int] = defaultdict(int)
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        name = " ".join(group.get("class", "").split()[:2])
        found[name] += len(group)
    return found


@pytest.mark.parametrize("question", PICTURES)
def test_svg_holds_the_expected_marks_and_words(call, demo, tmp_path, question):
    ran = call(demo, *QUESTIONS[question], "--plot", tmp_path / "p.svg")
    assert ran.code == 0, ran.err
    svg = ET.parse(tmp_path / "p.svg").getroot()
    expected, words = PICTURES[question]
    found = marks(svg)
    assert {kind: found[kind] for kind in expected} == expected
    text = " ".join(svg.itertext())
    assert all(word in text for word in words), text
    assert (found["mark-group role-legend"] > 0) == (question in ("pivot", "best-by", "curves")), "a legend where due"
    [title] = [g for g in svg.iter() if g.get("aria-roledescription") == "title" and "±" in g.get("aria-label")] or [
        None
    ]
    assert title is None, "the table's caption"
    if question in ("top", "group", "metrics"):
        assert "https://wandb.ai/lab/demo/runs/run00" in (tmp_path / "p.svg").read_text(), "a point leads to its run"


def test_the_heat_map_has_the_order_of_the_table(call, tmp_path):
    """8 before 16, although the first row has no 8."""
    rows = [run_row(i, arch=a, k=k, metric_m=float(i)) for i, (a, k) in enumerate([("a", 16), ("b", 8), ("b", 16)])]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    ran = call(tmp_path, path, "--pivot", "--cols", "k", "-m", "m", "--plot", "p.svg")
    assert ran.out.splitlines()[1].split() == ["arch", "8", "16"]
    text = [t.text for t in ET.parse(tmp_path / "p.svg").getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert text.index("8") < text.index("16")


def png_pixels(path: Path) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct 64-byte stretches of the filtered rows of a PNG, by its specification."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    pixels = zlib.decompress(packed)
    return width, height, {pixels[i : i + 64] for i in range(0, len(pixels), 64)}


@pytest.mark.parametrize("question", ["pivot", "curves"])
def test_png_and_pdf_are_valid_and_not_blank(call, demo, tmp_path, question):
    for suffix in ("png", "pdf"):
        assert call(demo, *QUESTIONS[question], "--plot", tmp_path / f"p.{suffix}").code == 0
    width, height, stretches = png_pixels(tmp_path / "p.png")
    assert width > 1000, "sharp enough for print"
    assert height > 400
    assert len(stretches) > 1000, "something is drawn"
    pdf = (tmp_path / "p.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert b"%%EOF" in pdf[-32:]
    assert len(pdf) > 5_000


class Refuser:
    """A proxy on loopback that refuses every request and remembers it; a connection that asks nothing is none."""

    def __enter__(self) -> Refuser:
        self.asked: list[str] = []
        self.threads: list[threading.Thread] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:  # closed: the test is over
                return
            self.threads.append(threading.Thread(target=self.refuse, args=(connection,), daemon=True))
            self.threads[-1].start()

    def refuse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            if asked := connection.makefile("rb").readline().decode(errors="replace").strip():
                self.asked.append(asked)
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def __exit__(self, *_: object) -> None:
        self.server.close()
        for thread in self.threads:
            thread.join(10)


# What the browser asks by itself, whatever page it shows: the time, its updates, its account.
CHROMIUMS_OWN = re.compile(r"(?:clients2|accounts|www)\.google\.com|(?:update|optimizationguide-pa)\.googleapis\.com")


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def in_browser(page: Path, tmp_path: Path, *more: str) -> tuple[str, list[str], list[str]]:
    """Open `page` in headless Chromium; returns its document, its console messages, and requests that left it."""
    if not BROWSER and not os.environ.get("CI"):  # where CI is set, a missing browser is a failure
        pytest.skip("the pages are tested in a browser that is not installed: apt-get install chromium")
    assert BROWSER, "Chromium is not installed. The pages are tested in it: apt-get install chromium"
    with Refuser() as proxy:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-default-apps"]
        flags += ["--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000"]
        command = [
            BROWSER,
            *flags,
            *more,
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--proxy-server=127.0.0.1:{proxy.port}",
        ]
        command += ["--proxy-bypass-list=<-loopback>", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=clean_env(tmp_path))
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console, [line for line in proxy.asked if not CHROMIUMS_OWN.search(line)]


def test_the_browser_test_sees_errors_and_requests(tmp_path):
    """The instrument itself: a page that logs an error and asks for a script from elsewhere is caught doing both."""
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('oh no')</script><script src='http://cdn.example/vega.js'></script><p>hello")
    document, console, asked = in_browser(page, tmp_path)
    assert "hello" in document
    assert any("oh no" in line for line in console)
    assert any("cdn.example/vega.js" in line for line in asked)


@pytest.mark.parametrize("question", ["top", "group", "pivot", "best-by", "curves"])
def test_html_draws_in_a_browser_and_asks_nobody(call, demo, tmp_path, question):
    page = tmp_path / "p.html"
    assert call(demo, *QUESTIONS[question], "--plot", page).code == 0
    document, console, asked = in_browser(page, tmp_path)
    assert console == []
    assert asked == []
    drawn = re.search(r"<svg[^>]*class=\"marks\".*?</svg>", document, re.S)
    assert drawn, "the chart is drawn"
    expected, words = PICTURES[question]
    found = marks(ET.fromstring(drawn[0].replace("&nbsp;", " ")))
    assert {kind: found[kind] for kind in expected} == expected
    assert all(word in drawn[0] for word in words)
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=", page.read_text(encoding="utf-8"))


def test_a_picture_of_values_that_span_decades_is_logarithmic(call, tmp_path):
    rows = [run_row(i, name=f"mlp_sbm_s{i}", metric_test_mse=10.0 ** (-i), config_opt="ab"[i % 2]) for i in range(6)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    for options in ([], ["-g", "opt"], ["--pivot", "--cols", "seed"]):
        assert call(tmp_path, path, *options, "--plot", "p.svg").code == 0
        text = set(ET.parse(tmp_path / "p.svg").getroot().itertext())
        assert {"0.0001", "0.001"} <= text, text


# ---------------------------------------------------------------- sizes, marks and words


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of 20 methods on 15 data sets, 3 seeds each, and curves of some."""
    folder = tmp_path_factory.mktemp("lab")
    rows, curve = [], {}
    for i, (method, data, seed) in enumerate(itertools.product(range(20), range(15), range(3))):
        name, task = f"method_{method:02}_of_the_lab", f"data_set_{data:02}"
        error = 10 ** (data / 6 - 2) * (1 + method * 7 % 20 / 10) * (1 + 0.05 * math.sin(37.0 * i))
        rows.append(
            run_row(
                i,
                name=f"{name}_{task}_s{seed}",
                config_method=name,
                config_dataset_name=task,
                config_seed=seed,
                metric_test_mse=error,
                metric_val_loss=error * 1.1,
            )
        )
        if seed == 0:
            curve[f"run{i:04d}"] = [(s, error + math.exp(-s / 60)) for s in range(0, 200, 50)]
    keys = {"metric_test_mse": "test/mse", "metric_val_loss": "val/loss"}
    write_runs(folder / "wandb_export" / "lab_demo_runs.parquet", rows, keys)
    write_history(folder / "wandb_export" / "lab_demo_history.parquet", rows, curve)
    return folder


LAB = {
    "pivot": ["--pivot", "--rows", "method", "-m", "test/mse"],
    "best-by": ["--best-by", "val/loss", "--rows", "method", "-m", "test/mse"],
    "group": ["-g", "method", "-m", "test/mse"],
    "groups": ["-g", "method,dataset", "-m", "test/mse"],
    "curves": ["--curves", "val/loss", "-g", "method,dataset_name"],
}


def centimetres(path: Path) -> tuple[float, float]:
    """The page of a PDF."""
    box = re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", path.read_bytes())
    assert box
    return float(box[1]) / analyze.CM, float(box[2]) / analyze.CM


@pytest.mark.parametrize("question", PICTURES)
def test_a_picture_fits_a_column_or_a_page(call, demo, tmp_path, question):
    assert call(demo, *QUESTIONS[question], "--plot", tmp_path / "p.pdf").code == 0
    width, height = centimetres(tmp_path / "p.pdf")
    assert min(abs(width - analyze.COLUMN), abs(width - analyze.PAGE)) < 0.2
    assert height < analyze.TALLEST + 0.2


@pytest.mark.parametrize("question", LAB)
def test_twenty_methods_on_fifteen_data_sets_fit_a_page(call, lab, tmp_path, question):
    assert call(lab, *LAB[question], "--plot", tmp_path / "p.svg").code == 0
    svg = ET.parse(tmp_path / "p.svg").getroot()
    width, height = (float(svg.get(side).removesuffix("pt")) / analyze.CM for side in ("width", "height"))
    assert width == pytest.approx(analyze.PAGE, abs=0.5)
    assert height < analyze.TALLEST + 0.5
    texts = [("".join(t.itertext()), float(t.get("font-size").removesuffix("px"))) for t in svg.iter(TEXT)]
    words = {text for text, _ in texts}
    if question == "groups":
        assert "method, dataset (the first 80 of 300)" in words
    else:
        assert all(any(f"method_{i:02}_of_the_lab" in word for word in words) for i in range(20)), "none is cut"
        assert question == "group" or all(any(f"data_set_{i:02}" in word for word in words) for i in range(15))
    assert min(size for _, size in texts) >= 3.5, "points: small, but print"
    if question == "pivot":
        assert sum("±" in text for text, _ in texts) == 300


def test_the_size_is_what_was_asked_for(call, demo, tmp_path):
    for question, width, height in (("pivot", 12, 7), ("best-by", 15, 8), ("metrics", 14, 9), ("top", 16, 5.5)):
        options = [
            *QUESTIONS[question],
            "--width",
            width,
            "--height",
            height,
            "--title",
            "",
            "--plot",
            tmp_path / "p.pdf",
        ]
        assert call(demo, *options).code == 0
        assert centimetres(tmp_path / "p.pdf") == pytest.approx((width, height), abs=0.25), question


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours, `#rrggbb` or `rgb(r, g, b)`."""
    light = []
    for colour in (one, other):
        colour = {"black": "#000000", "white": "#ffffff"}.get(colour, colour)
        parts = (
            [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            if colour[0] == "#"
            else map(int, re.findall(r"\d+", colour))
        )
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts)]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.parametrize("options", [[], ["--log"], ["--descending"]])
def test_every_cell_of_a_heat_map_can_be_read(call, lab, tmp_path, options):
    assert call(lab, *LAB["pivot"], *options, "--plot", tmp_path / "p.svg").code == 0
    svg = ET.parse(tmp_path / "p.svg").getroot()
    rects = []
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        if (group.get("class") or "").startswith("mark-rect"):
            for path in group:
                numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))]
                if (path.get("fill") or "").startswith("rgb"):
                    rects.append((*numbers[:4], path.get("fill")))
    assert len(rects) == 300
    checked = 0
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        if (group.get("class") or "").startswith("mark-text role-mark"):
            for text in group.iter(TEXT):
                x, y = map(float, re.findall(r"-?[\d.]+", text.get("transform"))[:2])
                [fill] = [f for left, top, wide, high, f in rects if left <= x < left + wide and top <= y < top + high]
                assert contrast(fill, text.get("fill")) >= 4.5
                checked += 1
    assert checked == 300


def test_the_best_of_each_column_is_framed_and_bold(call, lab, tmp_path):
    call(lab, *LAB["pivot"], "--plot", tmp_path / "p.svg")
    svg = ET.parse(tmp_path / "p.svg").getroot()
    bold = ["".join(t.itertext()) for t in svg.iter(TEXT) if t.get("font-weight") == "bold"]
    frames = [path for path in svg.iter(RECT) if path.get("stroke") == analyze.COLOURS[-1]]
    assert len(frames) == 15
    assert len([text for text in bold if "±" in text]) == 15


def test_titles_axes_and_directions(call, demo, tmp_path):
    def words(*options: object) -> list[str]:
        ran = call(demo, *options, "--plot", tmp_path / "p.svg")
        assert ran.code == 0, ran.err
        return [t.text or "" for t in ET.parse(tmp_path / "p.svg").getroot().iter(TEXT)]

    assert "test/mse (lower is better)" in words(*QUESTIONS["group"])
    assert any("test/acc (higher is better)" in word for word in words(*QUESTIONS["best-by"]))
    assert "Ours & theirs <2>" in words(*QUESTIONS["group"], "--title", "Ours & theirs <2>")
    assert "val/loss (lower is better)" in words(*QUESTIONS["curves"])
    assert "epoch" in words("--curves", "epoch", "-g", "arch"), "of which nobody knows"
    assert "test/mse by arch, k" in words(*QUESTIONS["group"])
    assert "test/mse by arch, k" not in words(*QUESTIONS["group"], "--title", "")


def test_intervals_lie_above_the_dots_and_bands_can_go(call, demo, tmp_path):
    def classes(*options: object) -> list[str]:
        assert call(demo, *options, "--plot", tmp_path / "p.svg").code == 0
        groups = ET.parse(tmp_path / "p.svg").getroot().iter("{http://www.w3.org/2000/svg}g")
        return [" ".join((g.get("class") or "").split()[:1]) for g in groups if "role-mark" in (g.get("class") or "")]

    drawn = classes(*QUESTIONS["best-by"], "--filter", "sbm")
    assert drawn.index("mark-symbol") < len(drawn) - 1 - drawn[::-1].index("mark-rule")
    assert drawn.count("mark-rule") == 2
    assert classes(*QUESTIONS["best-by"], "--filter", "sbm", "--no-band") == ["mark-symbol", "mark-rule"]
    assert "mark-area" in classes(*QUESTIONS["curves"])
    assert "mark-area" not in classes(*QUESTIONS["curves"], "--no-band")


def test_lines_are_in_the_order_of_their_values(call, tmp_path):
    rows = [run_row(i, name=f"mlp_k{k}_s1", metric_m=1.0) for i, k in enumerate((128, 16, 8))]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows)
    write_history(tmp_path / "lab_demo_history.parquet", rows, {row["id"]: [(0, 1.0), (1, 0.5)] for row in rows})
    assert call(tmp_path, path, "--curves", "val/loss", "-g", "k", "--plot", "p.svg").code == 0
    text = [t.text for t in ET.parse(tmp_path / "p.svg").getroot().iter(TEXT)]
    assert text.index("8") < text.index("16") < text.index("128")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--width", "12"], "--width goes with --plot"),
        (["--title", "x"], "--title goes with --plot"),
        (["--log"], "--log goes with --plot"),
        (["--plot", "p.svg", "--no-band"], "--no-band goes with"),
        (["--plot", "p.svg", "--width", "x"], "'x' is no length from 2 to 100 cm"),
        (["--plot", "p.svg", "--height", "500"], "'500' is no length from 2 to 100 cm"),
    ],
)
def test_options_of_pictures_say_what_they_go_with(call, demo, options, word):
    ran = call(demo, *options)
    assert ran.code == 2
    assert word in ran.err


def test_log_needs_positive_values(call, tmp_path):
    path = write_runs(tmp_path / "lab_demo_runs.parquet", [run_row(i, metric_m=i - 1.0) for i in range(3)])
    ran = call(tmp_path, path, "-m", "m", "--log", "--plot", "p.svg")
    assert ran.code == 2
    assert "--log: -1 has no logarithm" in ran.err
    assert not (tmp_path / "p.svg").exists()


# ---------------------------------------------------------------- names that would be more than names

HOSTILE = ["</script><script>document.title='owned'</script>", "<img src=x onerror=\"document.title='owned'\">"]
HOSTILE += [
    "a\x00b\x07\x1b[2J",
    "line\u2028paragraph\u2029end",
    "\u202egnp.exe",
    'it\'s "quoted" \\ ${x} {{y}}',
    "日本語 ☃ 😀",
    "",
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    urls = ["javascript:document.title='owned'", None, "https://wandb.example/<&\"'", "data:text/html,x"] * 4
    names = zip(HOSTILE * 2, urls, strict=True)
    rows = [run_row(i, name=name, config_opt=name, metric_m=i + 1.0, url=url) for i, (name, url) in enumerate(names)]
    path = write_runs(tmp_path / "lab_demo_runs.parquet", rows, {"metric_m": "m</script>\x1b\u2028"})
    curve = {row["id"]: [(0, 1.0), (1, 0.5)] for row in rows}
    write_history(tmp_path / "lab_demo_history.parquet", rows, curve)
    return path


ASKED = (["-m", "m"], ["-m", "m", "-g", "opt"], ["-m", "m", "--pivot", "--rows", "opt", "--cols", "project"])
ASKED += (
    ["--curves", "val/loss", "-g", "opt"],
    ["-m", "m", "--best-by", "m", "-g", "opt", "--title", "\x00\u2028</script>"],
)


@pytest.mark.parametrize("options", ASKED)
def test_no_name_ends_the_drawing(call, hostile, options):
    """In a process of its own, which a control character used to end by a signal."""
    for suffix in ("svg", "png"):
        ran = call(hostile.parent, hostile, *options, "--plot", f"p.{suffix}")
        assert ran.code == 0, ran.err
    text = (hostile.parent / "p.svg").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u2028\u2029\u202e]", text)
    ET.fromstring(text)


def policy(page: str) -> dict[str, list[str]]:
    """The directives of a page's Content-Security-Policy."""
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert found
    return {name: values for name, *values in (part.split() for part in found[1].split(";"))}


@pytest.mark.parametrize("options", ASKED)
def test_no_name_becomes_script(call, hostile, tmp_path, options):
    assert call(tmp_path, hostile, *options, "--plot", "p.html", "-o", "t.html").code == 0
    for name in ("p.html", "t.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        allowed = policy(page)
        assert allowed["default-src"] == ["'none'"]
        assert not {"'unsafe-inline'", "'unsafe-eval'"} & set(allowed.get("script-src", []))
        assert page.count("<script") == page.count("</script>") == 2 * (name == "p.html")
    document, console, asked = in_browser(tmp_path / "p.html", tmp_path)
    assert console == []
    assert asked == []
    assert "owned</title>" not in document
    assert re.search(r"<svg[^>]*class=\"marks\"", document)


def test_a_pages_policy_stops_what_its_script_is_not(call, demo, tmp_path):
    """A script, an image from elsewhere and its handler, put into the page by hand: none runs, nothing is loaded."""
    assert call(demo, *QUESTIONS["top"], "--plot", tmp_path / "p.html").code == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    more = "<script>document.title='owned'</script>"
    more += "<img src='http://elsewhere.example/x.png' onerror=\"document.title='owned'\">"
    (tmp_path / "p.html").write_text(page.replace("<figure", more + "<figure", 1), encoding="utf-8")
    document, console, asked = in_browser(tmp_path / "p.html", tmp_path)
    assert "<title>owned" not in document
    assert len([line for line in console if "Content Security Policy" in line]) == 3, console
    assert asked == []


def test_the_pointer_shows_the_run(call, demo, tmp_path, monkeypatch):
    """Under the page's own policy; the mouse is moved by the script, whose hash is then another."""
    move = """
    setTimeout(() => {
      const point = document.querySelector('.mark-symbol path');
      for (const type of ['pointerover', 'pointermove', 'mouseover', 'mousemove'])
        point.dispatchEvent(new MouseEvent(type, {bubbles: true, clientX: 200, clientY: 100}));
    }, 3000);
    """
    monkeypatch.setattr(analyze, "SCRIPT", analyze.SCRIPT + move)
    assert call(demo, *QUESTIONS["top"], "--plot", tmp_path / "p.html").code == 0
    document, console, _ = in_browser(tmp_path / "p.html", tmp_path)
    assert console == []
    tip = re.search(r'<div id="vg-tooltip-element"[^>]*>.*?</div>', document, re.S)
    assert tip, "no tooltip"
    assert "visible" in tip[0]
    assert "left: " in tip[0], "it has a place"
    assert "stage2_gnn_qk" in tip[0]
