#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "polars>=2,<3",
#     "pyarrow>=26,<27",
# ]
# ///
"""Many exports in, one analysis table out.

    uv run wandb-tools/aggregate_runs.py
    uv run wandb-tools/aggregate_runs.py new_runs.parquet 'old/*' -o all.parquet
    uv run wandb-tools/aggregate_runs.py --state finished \\
        --where 'config_model_k >= 16 AND metric_test_mse < 0.5'
    uv run wandb-tools/aggregate_runs.py --rule 'width=_w([0-9]+)' \\
        --columns 'id,name,width,metric_test_*' -o narrow.csv
    uv run wandb-tools/aggregate_runs.py s3://lab/exports/ \\
        --partition-by project -o s3://lab/runs/

Reads the {entity}_{project}_runs.parquet files that export_runs.py writes,
merges them by column name, counts a run that stands in several of them once
(from the newest), adds what its name says about the experiment, and filters.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import fnmatch
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from glob import glob
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps apart two runs with one output
    fcntl = None

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from pyarrow.fs import FileSystem

DEFAULT_INPUT = "wandb_export"
DEFAULT_OUTPUT = "wandb_export/aggregated.parquet"  # no folder input takes it for an export: those end in _runs.parquet
# Rows are read and written in blocks of this many: 100,000 runs of 300 columns then need 0.6 GB, and a reader of a few
# columns still finds large pieces. zstd's level 1 takes a third less time than level 3, for smaller files.
BLOCK = 5_000
PARQUET = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}


# --- console: the same in list_entities.py, export_runs.py, aggregate_runs.py and analyze_runs.py ---
class Stop(Exception):
    """Ends the script with one message, what was wrong (with the value) and what to do, and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def plain(text: object) -> str:
    """One line of text from a server or a file as it may be shown: no control, escape or bidi character acts on it."""
    line = re.sub(r"[\t\n\r\u2028\u2029]+", " ", str(text))
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", line)


def say(message: str) -> None:
    """Print progress or a notice to stderr; stdout belongs to results. Names that it holds went through `plain`."""
    try:  # one write, for threads print too
        print("\n".join(map(plain, message.split("\n"))) + "\n", end="", file=sys.stderr, flush=True)
    except OSError:  # its reader has gone; the work goes on
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def nearest(word: str, names: Iterable[str]) -> str:
    """` Did you mean a, b or c?` for the up to three `names` that resemble `word`, else an empty string."""
    folded = {name.lower(): plain(name) for name in names}
    close = [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.5)]
    return f" Did you mean {' or '.join(filter(None, [', '.join(close[:-1]), close[-1]]))}?" if close else ""


class Parser(argparse.ArgumentParser):
    """A wrong argument is told in a line, with the way out, not after ten lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise Stop(f"{message.rstrip('.')}. See {self.prog} --help.")


def finish(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code; a `Stop`, a full disk, Ctrl-C or a closed pipe end it without a traceback."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by the caller: the next file opened would take its place
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a name that the terminal's encoding lacks
    if os.name == "posix":
        import resource

        if 0 < (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < 2 << 30:
            say(f"ulimit -v allows {limit >> 20} MB; libraries that need more may end the script without a word")
    words = ""
    try:
        code = main()
        sys.stdout.flush()
    except Stop as stop:
        code, words = stop.code, f"error: {stop}"
    except KeyboardInterrupt:
        code, words = 130, "interrupted"
    except SystemExit as end:  # after --help, or as rich turns a BrokenPipeError
        code = 0 if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except BrokenPipeError:
        code, words = 1, "error: a connection was closed from the other side. Try again."
        try:
            print(flush=True)  # one more byte, for what failed may be gone from the buffer
        except BrokenPipeError:  # it was the reader of our results, `head` for example, who has seen enough
            code, words = 0, ""
    except OSError as error:
        code, words = 1, f"error: {error.filename or 'the system'}: {error.strerror or error}"
    except BaseException as error:  # a panic of Polars is no Exception
        lack = "new thread|spawn thread|map segment|allocate"
        if not isinstance(error, MemoryError) and not re.search(lack, str(error)):
            raise
        code, words = 1, "error: there is not enough memory for this. Take fewer runs at once, or allow more."
    if words:
        say(words)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)  # at once: worker threads may still wait for a server, and there is nothing left to clean up


# --- end console ---


# --- lazy imports: the same in aggregate_runs.py and analyze_runs.py ---
def lazy(name: str) -> ModuleType:
    """A module that is imported when it is first used: `--help` and wrong arguments are answered without it."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}. Run this script with `uv run`.", name=name)
    spec.loader = importlib.util.LazyLoader(spec.loader)  # as its documentation has it
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- end lazy imports ---

if not TYPE_CHECKING:
    pl, pa = lazy("polars"), lazy("pyarrow")


# --- states: the same in export_runs.py, aggregate_runs.py and analyze_runs.py ---
STATES = ("running", "finished", "crashed", "failed", "killed", "pending", "preempting", "preempted")


def parse_states(text: str) -> list[str]:
    """The states of `finished,crashed`; `all` is itself. An argument's `type`, with `action="extend"`."""
    states = [state.strip().lower() for state in text.split(",") if state.strip()]
    if wrong := [state for state in states if state not in (*STATES, "all")] or (not states and [text]):
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no state. Name any of {', '.join(STATES)}, or all.")
    return states


# --- end states ---


# --- dates: the same in export_runs.py and aggregate_runs.py ---
def parse_when(text: str) -> datetime:
    """A moment in UTC: `90m`, `24h`, `7d`, `2w` before now, a date `2025-10-01`, or an ISO date with a time.

    A time without a zone is UTC. Raises `argparse.ArgumentTypeError`, so that it can be an argument's `type`.
    """
    if age := re.fullmatch(r"(\d+)([mhdw])", text.strip().lower()):
        unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[age[2]]
        try:
            return datetime.now(UTC) - timedelta(**{unit: int(age[1])})
        except OverflowError:
            raise argparse.ArgumentTypeError(f"{text!r} lies before the calendar begins") from None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time. Write 24h, 7d, 2w, 2025-10-01 or 2025-10-01T12:30:00 (UTC)."
        ) from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


# --- end dates ---


# --- run names: the same in aggregate_runs.py and analyze_runs.py ---
NUMBER = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)"
END = r"(?:[^a-z0-9.]|\.[^0-9]|\.?$)"  # what may follow a number: nothing that would make it another number or a word
Rule = str | list[str] | dict[str, str]

# How this lab names its runs. A column's rule is a regular expression, whose group 1 is the value; or a list of words,
# most specific first, of which the first that the name holds is the value (`ego` is in `x_ego-2`, not in `lego`); or a
# table of value = regular expression, likewise. Case never matters, and everything may stand anywhere in the name.
RULES: dict[str, Rule] = {
    "stage": r"(stage[0-9]+[a-z]?)",
    "arch": [
        *("gnn_all", "gnn_qk", "gnn_v", "filter_bank", "linear_pe", "self_attention_mlp", "multilayer_self_attention"),
        *("self_attention", "digress_transformer", "digress_default", "asymmetric", "spectral_linear", "spectral"),
        *("mlp", "linear", "digress"),
    ],
    # Searched in the class path of the config, then in the name, then in the arch. `hybrid` stands first because a
    # hybrid's name holds its parts; the whole words after `|` are the archs whose own name does not say the family.
    "model_type": {
        "hybrid": "hybrid",
        "spectral": "spectral|^(?:filter_bank|linear_pe|asymmetric)$",
        "digress": "digress",
        "gnn": "gnn",
        "attention": "attention",
    },
    "dataset": [
        *("pyg_enzymes", "pyg_proteins", "ring_of_cliques", "ego", "community", "grid", "sbm_small", "sbm", "tree"),
        "regular",
    ],
    "k": "_k([0-9]+)" + END,
    "lr_parsed": "_lr" + NUMBER + END,
    "wd_parsed": "_wd" + NUMBER + END,
    "seed_parsed": "_s([0-9]+)" + END,
    "eps_parsed": "_eps" + NUMBER + END,
    "asymmetric_flag": "(asymmetric)",
    "pearl_flag": "(pearl)",
}


def separated(text: pl.Expr) -> pl.Expr:
    """`text` in lower case, `_` for every other separator and at both ends, so that `_ego_` finds the word `ego`."""
    # concat_str, because pl.format panics in Polars 2.1 where a filter has left a chunk of a column empty
    return pl.concat_str(pl.lit("_"), text.str.to_lowercase().str.replace_all(r"[^\pL\pN_]", "_"), pl.lit("_"))


def parse(text: pl.Expr, words: pl.Expr, rule: Rule) -> pl.Expr:
    """What a rule of `RULES` finds in `text`, whose `separated` form is `words`: String, null where it finds none."""
    if isinstance(rule, str):
        return text.str.extract(f"(?i){rule}", 1)
    if isinstance(rule, dict):
        found = {value: text.str.contains(f"(?i){regex}") for value, regex in rule.items()}
    else:  # plain text, because Polars compiles a long list of regular expressions anew for every batch of rows
        framed = {word: re.sub(r"\W", "_", f"_{word.lower()}_") for word in rule}
        found = {word: words.str.contains(frame, literal=True) for word, frame in framed.items()}
    return pl.coalesce([pl.when(hit).then(pl.lit(value)) for value, hit in found.items()] or pl.lit(None, pl.String))


def enrich(frame: pl.LazyFrame, rules: dict[str, Rule] = RULES) -> pl.LazyFrame:
    """Add what the run's name and config say about the experiment, lazily; columns that `frame` has stay as they are.

    In: any of `name` and the config columns named below, of any type. Out: `protocol`, `stage`, `arch`, `model_type`,
    `dataset` String, `k`, `seed_parsed` Int64, `lr_parsed`, `wd_parsed`, `eps_parsed` Float64, `asymmetric_flag`,
    `pearl_flag` Bool, and a String for every other rule; null where nothing is known, except `protocol` and the flags.
    """
    schema = frame.collect_schema()

    def text(*columns: str) -> pl.Expr:
        """The first of `columns` that is there and set, as String."""
        there = [pl.col(c).cast(pl.String) for c in columns if c in schema and not schema[c].is_nested()]
        return pl.coalesce([pl.when(value != "").then(value) for value in there] or pl.lit(None, pl.String))

    rules = {column: rules.get(column, []) for column in RULES} | rules
    name, arch = text("name"), pl.col("arch")
    same_graph = text("config_data_same_graph_all_splits").str.to_lowercase().is_in(["true", "1"])
    single_graph = text("config_data__target_").str.contains("SingleGraph", literal=True)
    single = pl.any_horizontal(same_graph, single_graph).fill_null(False)
    added = {"protocol": pl.when(single).then(pl.lit("single_graph")).otherwise(pl.lit("distribution"))}
    added |= {column: parse(name, pl.col("__words"), rule) for column, rule in rules.items()}
    added["stage"] = added["stage"].str.to_lowercase()
    added["arch"] = pl.coalesce(added["arch"], text("config_model_type"))
    target = text("config_model__target_", "config_model_target")
    in_target, in_arch = (parse(t, separated(t), rules["model_type"]) for t in (target, arch))
    family = pl.coalesce(in_target, added["model_type"], in_arch)
    added["model_type"] = pl.lit(None, pl.String)  # holds the place until `arch` is there
    config = ("data_dataset_name", "dataset_name", "data_graph_type", "graph_type")
    added["dataset"] = pl.coalesce(text(*(f"config_{key}" for key in config)), added["dataset"])
    added |= {column: added[column].cast(pl.Int64, strict=False) for column in ("k", "seed_parsed")}
    for column in ("lr_parsed", "wd_parsed", "eps_parsed"):
        added[column] = added[column].cast(pl.Float64, strict=False)
    added |= {column: added[column].is_not_null() for column in ("asymmetric_flag", "pearl_flag")}
    # what several expressions use is a column first: Polars works it out anew for each of them otherwise
    frame = frame.with_columns(__words=separated(name))
    frame = frame.with_columns(**{column: value for column, value in added.items() if column not in schema})
    return (frame if "model_type" in schema else frame.with_columns(model_type=family)).drop("__words")


# Where a config says what names say: `k` may be config_k or config_model_k, `lr` also config_learning_rate.
SECTIONS = "(?:(?:model|optimizer|optim|data|training|trainer|train|hparams|args)_)?"
SYNONYMS = {"arch": "arch|architecture", "lr": "lr|learning_rate", "wd": "wd|weight_decay"}


def partners(columns: Sequence[str]) -> dict[str, str]:
    """Of `columns`, those that names fill -> the config column that says the same: `k` -> `config_model_k`."""
    found = {}
    for column in [c for c in RULES if c in columns and c != "model_type"]:  # which is a family, in words of our own
        word = column.removesuffix("_parsed")
        same = re.compile(f"config_{SECTIONS}(?:{SYNONYMS.get(word, word)})")
        if there := [c for c in columns if same.fullmatch(c)]:
            found[column] = min(there, key=len)
    return found


def contradicts(column: str, config: str) -> pl.Expr:
    """Whether a run's name and its config say different things: numbers, or words of which neither holds the other."""

    a, b = (pl.col(c).cast(pl.Float64, strict=False) for c in (column, config))
    one, two = (pl.col(c).cast(pl.String).str.to_lowercase() for c in (column, config))
    words = one.str.contains(two, literal=True) | two.str.contains(one, literal=True)
    return pl.coalesce((a - b).abs() > 1e-6 * b.abs(), ~words).fill_null(False)


# --- end run names ---


# What an export holds besides config_* and metric_*: the data contract's columns, in its order.
BASE_COLUMNS = [
    *("id", "name", "entity", "project", "state", "url", "created_at", "heartbeat_at", "tags", "user", "group"),
    *("job_type", "sweep", "notes", "commit", "last_step", "runtime_seconds", "history_rows"),
]
JSON_COLUMNS = ("_config_json", "_summary_json")
FILE, WHERE = "__file", "__where"  # while we work: the number of a row's file, whether --where holds


Version = tuple[int, int]  # a file's size and time of change, which tell whether another one took its place
Broken = dict[tuple[str, Version], str]  # files whose rows cannot be read, and why


@dataclass
class Export:
    """One readable runs file: its address, its columns and when it was exported."""

    path: str
    schema: dict[str, pl.DataType]
    exported_at: datetime
    version: Version  # when its footer was read: what comes later must be the same file
    fault: str = ""  # why its rows cannot be read, once that has shown


# ---- Which files ------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Whether `path` is an object storage address (`s3://bucket/path`) rather than a local path."""
    return "://" in path


@cache
def storage(root: str) -> FileSystem:
    """The object storage of `s3://bucket`; credentials come from the usual places (`AWS_ACCESS_KEY_ID`, ...)."""
    try:
        return pa.fs.FileSystem.from_uri(f"{root}/")[0]
    except (OSError, ValueError) as error:
        raise Stop(f"{root}: {reason(error)}") from None


def locate(address: str) -> tuple[FileSystem, str]:
    """The file system of a path or an object storage address, and the path there."""
    if not is_remote(address):
        return pa.fs.LocalFileSystem(), address
    scheme, path = address.split("://", 1)
    return storage(f"{scheme}://{path.split('/', 1)[0]}"), path


def find_files(given: str) -> list[str]:
    """What one input names: itself, the `*_runs.parquet` of a folder, or what a glob matches.

    What exists is a path, whatever characters it holds: `exp[1]/*` looks into `exp[1]` if that is a folder. In a glob
    for object storage `*` stays inside one folder, `**` does not.
    """
    if not is_remote(given):
        path = Path(os.path.expanduser(given))  # noqa: PTH111 (Path.expanduser raises where nobody has a home)
        if path.is_dir():
            return sorted(map(str, path.glob("*_runs.parquet"))) or [str(path)]
        if path.exists():
            return [os.path.normpath(path)]
        start = next(parent for parent in path.parents if parent.is_dir())
        found = glob(str(path.relative_to(start)), root_dir=start, recursive=True)  # noqa: PTH207 (skips hidden files)
        return [file for match in sorted(found) for file in find_files(str(start / match))]
    system, wanted = locate(given)
    try:
        kind = system.get_file_info(wanted).type
        if kind == pa.fs.FileType.File:
            return [given]
        wanted = f"{wanted.rstrip('/')}/*_runs.parquet" if kind == pa.fs.FileType.Directory else wanted
        folder = re.split(r"[*?[]", wanted, maxsplit=1)[0].rpartition("/")[0]
        deep = "**" in wanted or wanted.count("/") > folder.count("/") + 1
        entries = system.get_file_info(pa.fs.FileSelector(folder, allow_not_found=True, recursive=deep))
    except OSError as error:
        raise Stop(f"{given}: {reason(error)}") from None
    files = [entry.path for entry in entries if entry.type == pa.fs.FileType.File]
    if "**" not in wanted:
        files = [file for file in files if file.count("/") == wanted.count("/")]
    return sorted(given.split("://")[0] + "://" + file for file in files if fnmatch.fnmatchcase(file, wanted))


def version(path: str) -> Version | None:
    """Which version of a file is there; None when there is no file."""
    system, there = locate(path)
    info = system.get_file_info(there)
    return (info.size, info.mtime_ns) if info.type == pa.fs.FileType.File else None


def exported_at(path: str, footer: dict[bytes, bytes]) -> datetime | None:
    """When an export was made: from its `_metadata.json`, else from the Parquet footer, else None."""
    beside = path.removesuffix("_runs.parquet") + "_metadata.json"
    system, there = locate(beside)
    notes = [system.open_input_stream(there).read()] if beside != path and version(beside) else []
    for note in (*notes, footer.get(b"wandb_tools", b"")):
        try:
            when = datetime.fromisoformat(json.loads(note.decode(errors="replace"))["exported_at"])
            return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return None


def read_export(path: str, broken: Broken) -> Export:
    """Read the footer of a runs file. Raises `Stop` with the reason when it is none, or `broken` knows its version.

    Its code is 1 where an export was to be expected and 0 for what folders of exports hold besides: that is no fault.
    """
    foreign = int(path.endswith("_runs.parquet"))
    if path.endswith("_history.parquet") or not path.endswith(".parquet"):
        raise Stop("no file that ends in .parquet and holds runs", 0)
    system, there = locate(path)
    try:
        size_and_time = version(path)
        if size_and_time is None:
            raise Stop("no regular file", foreign)
        if fault := broken.get((path, size_and_time)):
            raise Stop(f"its rows cannot be read ({fault})", 1)
        with pa.parquet.ParquetFile(there, filesystem=system) as file:
            schema, footer = dict(pl.Schema(file.schema_arrow)), file.metadata.metadata or {}
        when = exported_at(path, footer) or datetime.fromtimestamp(size_and_time[1] / 1e9, UTC)
    except faults() as error:
        raise Stop(f"no readable Parquet file ({reason(error)})", 1) from None
    if missing := [column for column in ("id", "name") if column not in schema]:
        raise Stop(f"no export of runs: it has no column {' and no column '.join(missing)}", foreign)
    if "_source_file" in schema:
        raise Stop("an aggregate already; give the exports that it was made from", 0)
    for column, dtype in schema.items():
        if target_type(column, dtype) is None:
            raise Stop(f"no export of runs: its column {column} is {dtype}", 1)
    return Export(path, schema, when, size_and_time)


def read_exports(inputs: Sequence[str], broken: Broken) -> tuple[list[Export], dict[str, Stop]]:
    """The exports that `inputs` name, each once, oldest first; and why the rest is none, as `read_export` says it."""
    found: dict[str, str] = {}  # by what it is, so that two ways to say a file are one
    problems: dict[str, Stop] = {}
    for given in inputs:
        paths = find_files(given)
        if not paths:
            problems[given] = Stop("no such file, or nothing there that ends in _runs.parquet", 1)
        for path in paths:
            found.setdefault(path if is_remote(path) else os.path.realpath(path), path)
    exports: list[Export] = []
    with ThreadPoolExecutor(8) as pool:
        for path, future in [(path, pool.submit(read_export, path, broken)) for path in found.values()]:
            try:
                exports.append(future.result())
            except Stop as stop:
                problems[path] = stop
    return sorted(exports, key=lambda export: (export.exported_at, export.path)), problems


def describe(problems: dict[str, Stop], left: int) -> list[str]:
    """What to say about inputs that are no exports, beside `left` that are: what is no fault fits in one line."""
    notes = [f"skipped {path}: {stop}" for path, stop in problems.items() if stop.code or not left]
    others = [Path(path).name for path, stop in problems.items() if left and not stop.code]
    if not others:
        return notes
    return [f"left out {many(len(others), 'file')} without runs of an export: {counted(others, 3)}", *notes]


def intact(exports: Sequence[Export]) -> bool:
    """Whether every row could be read, and every file still is the one whose footer was read."""
    return not any(export.fault or version(export.path) != export.version for export in exports)


def confirm(exports: Sequence[Export]) -> None:
    """Raise `OSError` when what was read of the `exports` is not to be used: `main` then reads them again."""
    if not intact(exports):
        raise OSError("an export changed, or proved damaged, while it was read")


def faults() -> tuple[type[BaseException], ...]:
    """What a damaged or odd file can make pyarrow and Polars raise."""
    return (pa.ArrowException, pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def reason(error: BaseException) -> str:
    """The first line of an engine's error, without the plan that follows it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # What Arrow's other threads say once a file of a partition was closed because it could not grow.
    return "no space is left, or a file is too large" if line.endswith("closed file") else line


# ---- One type per column ----------------------------------------------------------------------------------------


def contract_type(column: str) -> pl.DataType | None:
    """The type that the data contract gives a column; None for config columns and for columns that it does not know."""
    if column.startswith(("metric_", "system_")) or column == "runtime_seconds":
        return pl.Float64()
    if column in ("last_step", "history_rows"):
        return pl.Int64()
    if column in ("created_at", "heartbeat_at"):
        return pl.Datetime("us", "UTC")
    if column == "tags":
        return pl.List(pl.String)
    return pl.String() if column in BASE_COLUMNS or column in JSON_COLUMNS else None


@cache
def target_type(column: str, dtype: pl.DataType) -> pl.DataType | None:
    """The contract's type for a file's column of type `dtype`; None when no type of the contract keeps its values.

    A config column that another tool wrote narrower is widened: Int32 is Int64, Float32 is Float64.
    """
    want = contract_type(column)
    if want is None:
        if dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128, pl.UInt128):
            return pl.Int64()
        if dtype in (pl.Null, pl.Categorical, pl.Enum):
            return pl.String()
        return pl.Float64() if dtype == pl.Float32 else None if dtype.is_nested() else dtype
    fits = {
        pl.Float64(): dtype.is_numeric() or dtype == pl.Boolean,
        pl.Int64(): dtype.is_integer(),
        pl.Datetime("us", "UTC"): isinstance(dtype, pl.Datetime) and dtype.time_zone == "UTC",
        pl.String(): dtype in (pl.Categorical, pl.Enum),
    }
    return want if dtype in (want, pl.Null) or fits.get(want) else None


def resolve_types(exports: Sequence[Export]) -> tuple[dict[str, pl.DataType], dict[str, str]]:
    """One type per column over all files, which keeps every value, and why a column's type had to change.

    Out: column -> type, and column -> reason for columns whose files disagree. The contract's rules: metrics are
    Float64; Int64 and Float64 are Float64; anything else that mixes is String. A column that is all null in a file has
    no say there, for an export calls it String for want of a type.
    """
    votes: dict[str, Counter[pl.DataType]] = {}
    for export in exports:
        for column, dtype in export.schema.items():
            votes.setdefault(column, Counter())[target_type(column, dtype)] += 1
    disputed = [column for column, by in votes.items() if len(by) > 1]
    large: set[str] = set()  # which hold integers that Float64 would change
    for export in exports:
        asked = [column for column in disputed if column in export.schema]
        silent = set(asked)
        for block in read(export, asked) if asked else ():
            silent -= {column for column in asked if block[column].count()}
            whole = [column for column in asked if block[column].dtype == pl.Int64]
            large |= {column for column in whole if not block[column].is_between(-(2**53), 2**53).all()}
        for column in silent:
            votes[column][target_type(column, export.schema[column])] -= 1
    types = {column: next(iter(+by), pl.String()) for column, by in votes.items()}
    changes: dict[str, str] = {}
    for column in disputed:
        if len(by := +votes[column]) > 1:
            numbers = set(by) == {pl.Int64(), pl.Float64()}
            types[column] = pl.Float64() if numbers and column not in large else pl.String()
            counts = sorted(f"{dtype} in {many(count, 'file')}" for dtype, count in by.items())
            why = " (integers too large for Float64)" if numbers and column in large else ""
            changes[column] = f"{types[column]}, for it is {' and '.join(counts)}{why}"
    return types, changes


# ---- JSON text of numbers ---------------------------------------------------------------------------------------


def leaves(value: object, column: str = "config") -> Iterator[tuple[str, object]]:
    """(column, value) of all that a config nests, by the exporter's spelling before it tells collisions apart."""
    if not isinstance(value, dict):
        yield column, value
        return
    for key, inner in value.items():
        yield from leaves(inner, f"{column}_" + re.sub(r"\W", "_", key))


def number_texts(rows: pl.DataFrame, columns: Sequence[str]) -> list[pl.Series]:
    """Float64 `columns` as their JSON text, which for whole numbers only `_config_json` knows: `3`, `3.0` or `3e20`.

    Python, because no Polars expression spells numbers as JSON does (`1e-05`); it runs only over files whose Float64
    column is text elsewhere.
    """
    texts: dict[str, list[str | None]] = {column: [] for column in columns}
    light = rows.select("^_config_json$", pl.col(columns).cast(pl.Float64))
    for row in light.iter_rows(named=True) if columns else ():
        numbers: dict[str, list[int | float]] = {}
        # an integer too long for a Float64 is the text of no Float64, and Python may refuse to read it; a config that
        # is no JSON, or nested deeper than Python reads, knows no numbers
        with contextlib.suppress(ValueError, RecursionError):
            config = row.get("_config_json") or "{}"
            config = json.loads(config, parse_int=lambda digits: int(digits) if len(digits) < 309 else digits)
            for column, value in leaves(config):
                if type(value) in (int, float):
                    numbers.setdefault(column, []).append(value)
        for column in columns:
            known = numbers.get(column, []) + numbers.get(re.sub("__[0-9]+$", "", column), [])
            text = json.dumps(next((value for value in known if float(value) == row[column]), row[column]))
            texts[column].append(None if row[column] is None else text)
    return [pl.Series(column, texts[column], pl.String) for column in columns]


# ---- Merge ------------------------------------------------------------------------------------------------------


def read(export: Export, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The rows of a file in blocks, with page checksums verified; `export.fault` says why they end before its end.

    By pyarrow, for Polars reads a page with a flipped bit without a word.
    """
    system, path = locate(export.path)
    try:
        with pa.parquet.ParquetFile(path, filesystem=system, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BLOCK, columns=list(columns)):
                yield pl.from_arrow(batch).select(columns)
    except MemoryError:
        raise
    except faults() as error:
        export.fault = reason(error)


def scan(
    exports: Sequence[Export], types: dict[str, pl.DataType], stays: dict[str, pl.Series] | None = None
) -> pl.LazyFrame:
    """All rows of all exports lazily, by column name; what a file lacks is null there.

    Out: the files' columns, every one in its type of `types`, what they lack of the contract's base columns, so that
    what follows need not ask, `_source_file`, and `__file`, the file's place in `exports`. `stays` says for a file's
    path which of its rows are wanted, as one Bool per row.
    """
    schema = {column: types[column] for export in exports for column in export.schema}
    schema |= {c: contract_type(c) for c in (*BASE_COLUMNS, *JSON_COLUMNS) if c not in schema}
    schema |= {"_source_file": pl.String(), FILE: pl.Int32()}

    def blocks(names: list[str] | None, where: pl.Expr | None, _: int | None, __: int | None) -> Iterator[pl.DataFrame]:
        names = names or list(schema)
        for number, export in enumerate(exports):
            there, known = export.schema, {"_source_file": export.path, FILE: number}
            as_text = [c for c in names if schema[c] == pl.String and c in there and there[c].is_float()]
            needed = [c for c in there if c in names or (c == "_config_json" and as_text)]
            made = [
                pl.col(c).cast(schema[c]) if c in there else pl.lit(known.get(c), schema[c]).alias(c)
                for c in names
                if there.get(c) != schema[c]
            ]
            start = 0
            for block in read(export, needed or ["id"]):
                show_progress(f"file {number + 1} of {len(exports)}")
                rows = block.filter(stays[export.path][start : start + len(block)]) if stays else block
                rows = rows.with_columns(number_texts(rows, as_text)).with_columns(made).select(names)
                start += len(block)
                yield rows if where is None else rows.filter(where)

    from polars.io.plugins import register_io_source

    return register_io_source(blocks, schema=schema)


def column_order(columns: Iterable[str]) -> list[str]:
    """The output's columns: the contract's, config and metrics by name, both JSON columns, then what was added."""
    places = [*BASE_COLUMNS, "config_", "metric_", "system_", *JSON_COLUMNS, "protocol", *RULES, "", "_source_file"]

    def place(column: str) -> tuple[int, str]:
        prefix = re.match("config_|metric_|system_|", column)[0]
        return places.index(column if column in places else prefix), column

    return sorted(set(columns) - {FILE}, key=place)


# ---- Rules for names --------------------------------------------------------------------------------------------


def check_regex(regex: str, where: str) -> str:
    """`regex`, with a group 1 around it when it has none. Raises `Stop` when it is no regular expression."""
    try:
        groups = pl.select(pl.lit("").str.extract_groups(f"(?i){regex}")).to_series().dtype
    except pl.exceptions.PolarsError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        what = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
        hint = "Escape special characters with \\."
        raise Stop(f"{where}: {regex!r} is no regular expression: {what}. {hint}") from None
    return regex if groups.fields else f"({regex})"


def read_rules(given: Sequence[str], file: str | None) -> dict[str, Rule]:
    """The patterns in force: the script's, or those of `--rules FILE`, with each `--rule NAME=REGEX` on top."""
    rules: dict[str, Rule] = dict(RULES)
    if file:
        try:
            rules = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Stop(f"--rules {file}: there is no such file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Stop(f"--rules {file}: no TOML: {error}") from None
    for text in given:
        name, equals, regex = text.partition("=")
        if not equals:
            raise Stop(f"--rule {text!r}: write NAME=REGEX, for example 'width=_w([0-9]+)'")
        rules[name.strip()] = regex
    for name, rule in rules.items():
        where = f"rule {name}"
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise Stop(f"{where}: {name!r} is no column name. Use letters, digits and _.")
        if contract_type(name) or name.startswith("config_") or name == "protocol":
            raise Stop(f"{where}: exports have a column {name} of their own. Choose another name.")
        if isinstance(rule, str):
            rules[name] = check_regex(rule, where)
        elif isinstance(rule, dict) and all(isinstance(regex, str) for regex in rule.values()):
            rules[name] = {value: check_regex(regex, f"{where}, {value}") for value, regex in rule.items()}
        elif not isinstance(rule, list) or not all(isinstance(word, str) for word in rule):
            raise Stop(f"{where}: {rule!r} is no regular expression, no list of words, no table of regular expressions")
    return rules


def number_rules(merged: pl.LazyFrame, rules: dict[str, Rule]) -> dict[str, pl.DataType]:
    """The rules beyond the contract whose every value is a number, with Int64 or Float64."""
    own = [name for name in rules if name not in RULES]
    types: dict[str, pl.DataType] = {}
    for values in enrich(merged.select("name"), rules).select(own).collect(engine="streaming") if own else ():
        values = values.drop_nulls()
        if len(values) and values.str.contains(f"(?i)^[+-]?{NUMBER}$").all():
            whole = values.cast(pl.Int64, strict=False).null_count() == 0
            types[values.name] = pl.Int64() if whole else pl.Float64()
    return types


# ---- Choose the runs --------------------------------------------------------------------------------------------


def filters(args: argparse.Namespace) -> dict[str, pl.Expr]:
    """Each filter in force, in the order in which the summary counts them: option -> Bool expression."""
    chosen: dict[str, pl.Expr] = {}
    if args.state and "all" not in args.state:
        chosen[f"--state {' or '.join(args.state)}"] = pl.col("state").is_in(args.state)
    for option, column in (("filter", "name"), ("project", "project"), ("entity", "entity")):
        if regex := getattr(args, option):
            check_regex(regex, f"--{option}")
            chosen[f"--{option} {regex}"] = pl.col(column).str.contains(f"(?i){regex}")
    if args.tag:
        has_tag = pl.any_horizontal(pl.col("tags").list.contains(tag) for tag in args.tag)
        chosen[f"--tag {' or '.join(args.tag)}"] = has_tag
    for option, passes in (("since", pl.col("created_at").ge), ("until", pl.col("created_at").lt)):
        if moment := getattr(args, option):
            chosen[f"--{option} {moment:%Y-%m-%d %H:%M}"] = passes(moment)
    if args.where:
        chosen[f"--where {args.where}"] = pl.col(WHERE)
    if args.protocol != "all":
        chosen[f"--protocol {args.protocol}"] = pl.col("protocol") == args.protocol
    return chosen


def with_where(frame: pl.LazyFrame, where: str) -> pl.LazyFrame:
    """`frame` with a Bool `__where`; raises `Stop` when the condition does not fit the columns, before a row is read.

    As a query, for an SQL expression alone does not compare dates with text: `created_at >= '2025-10-01'`.
    """
    query, schema = f"SELECT *, ({where}) AS {WHERE} FROM runs", frame.collect_schema()
    try:
        if missing := [name for name in pl.sql_expr(where).meta.root_names() if name not in schema]:
            raise Stop(f"--where {where!r}: there is no column {missing[0]}.{nearest(missing[0], schema)}")
        dtype = pl.SQLContext({"runs": pl.DataFrame(schema=schema)}).execute(query).collect().schema[WHERE]
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {where!r} is no SQL condition: {reason(error)}") from None
    if dtype != pl.Boolean:
        raise Stop(f"--where {where!r}: is no condition, but {dtype}. Compare it with something.")
    return pl.SQLContext({"runs": frame}).execute(query)


def newest_copies() -> pl.Expr:
    """Whether a row is its run's last one: exports stand in the order of their age, so that is the newest copy."""
    return pl.struct("entity", "project", "id").is_last_distinct() | pl.col("id").is_null()


def pick(
    rows: pl.DataFrame, stays: pl.Series, exports: Sequence[Export], types: dict[str, pl.DataType]
) -> pl.LazyFrame:
    """The rows of the survey that stay, out of their files, lazily.

    Files follow one another by name, then age, whatever the order of the inputs; rows keep the file's order, which is
    oldest first. A file of which no row stays brings no columns.
    """
    parts = rows.select(FILE, stays.alias("stays")).partition_by(FILE, as_dict=True)
    wanted = {exports[number].path: part["stays"] for (number,), part in parts.items() if part["stays"].any()}
    files = [export for export in exports if export.path in wanted]
    return scan(sorted(files, key=lambda export: Path(export.path).name), types, wanted)


def choose_columns(patterns: str | None, columns: Sequence[str]) -> list[str]:
    """The `columns` that the comma-separated globs name, in the globs' order; all without globs."""
    if patterns is None:
        return list(columns)
    chosen: dict[str, None] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = [column for column in columns if fnmatch.fnmatchcase(column, pattern)]
        if not matches:
            raise Stop(f"--columns: no column matches {pattern!r}.{nearest(pattern, columns)}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)


# ---- Write ------------------------------------------------------------------------------------------------------


def check_output(target: str, partition: str | None, inputs: Sequence[str]) -> None:
    """Raise `Stop` when the output's suffix says no format, or when writing it would destroy an input or a folder."""
    suffix, foreign = Path(target).suffix, []
    if os.path.realpath(target) in {os.path.realpath(path) for path in inputs}:
        raise Stop(f"-o {target}: is one of the inputs. Give another name.")
    if not partition:
        if suffix not in (".parquet", ".csv", ".ndjson", ".arrow"):
            raise Stop(f"-o {target}: {suffix or 'no suffix'} is no format. Use .parquet, .csv, .ndjson or .arrow.")
        if not is_remote(target) and Path(target).is_dir():
            raise Stop(f"-o {target}: is a folder. Give a file's name, or --partition-by.")
        return
    if suffix not in ("", ".parquet"):
        raise Stop(f"-o {target}: --partition-by writes a folder of Parquet files. Give a folder's name.")
    if is_remote(target):  # objects cannot be swapped all at once, and old ones among the new would be read with them
        foreign = find_files(f"{target.rstrip('/')}/**")
    elif Path(target).is_dir():
        foreign = [entry.name for entry in Path(target).iterdir() if not (entry.is_dir() and "=" in entry.name)]
    elif Path(target).exists():
        foreign = [target]
    if foreign:
        raise Stop(f"-o {target}: holds {foreign[0]}. Give a new folder, or one that an earlier --partition-by wrote.")


def sink(frame: pl.LazyFrame, path: Path, suffix: str, partition: str | None) -> None:
    """Stream `frame` to `path` in the format of `suffix`; with `partition` as a Hive-partitioned folder of Parquet.

    Parquet with page checksums, which Polars does not write.
    """
    if suffix == ".csv" and "tags" in frame.collect_schema():  # CSV has no lists: tags, the only ones, are JSON text
        frame = frame.with_columns(tags=pl.struct(x="tags").struct.json_encode().str.extract(r'^\{"x":(\[.*\])\}$', 1))
    sinks = {
        ".csv": frame.sink_csv,
        ".ndjson": frame.sink_ndjson,
        ".arrow": partial(frame.sink_ipc, compression="zstd"),
    }
    if suffix in sinks:
        sinks[suffix](path)
        return
    if partition:  # folders are called as Polars writes numbers: it does not read back Arrow's `nan` and `-0`
        frame = frame.with_columns(pl.col(partition).cast(pl.String))
    empty = pl.DataFrame(schema=frame.collect_schema())
    schema = empty.to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    options = PARQUET | {"use_dictionary": [c for c, dtype in empty.schema.items() if not dtype.is_float()]}
    blocks = frame.collect_batches(chunk_size=BLOCK, maintain_order=True, engine="streaming")
    tables = (block.to_arrow(compat_level=pl.CompatLevel.oldest()) for block in blocks)
    if not partition:
        with pa.parquet.ParquetWriter(path, schema, **options) as writer:
            for table in tables:
                writer.write_table(table)
        return
    import pyarrow.dataset as ds  # slow to import

    ds.write_dataset(
        pa.RecordBatchReader.from_batches(schema, (batch for table in tables for batch in table.to_batches())),
        path,
        format="parquet",
        file_options=ds.ParquetFileFormat().make_write_options(**options),
        partitioning=ds.partitioning(pa.schema([schema.field(partition)]), flavor="hive"),
        basename_template="{i}.parquet",
        max_partitions=2**31 - 1,
        min_rows_per_group=BLOCK,
        max_rows_per_group=BLOCK,
        use_threads=False,  # keeps the order of the rows
    )


@contextlib.contextmanager
def workspace(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` to write in, for one run at a time; what a killed one left there is tidied."""
    folder = final.with_name(f".{final.name}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or (fcntl and folder.stat().st_uid != os.geteuid()):
        raise Stop(f"{folder}: is not this user's own folder. Remove it, or give another -o.")
    with (folder / "lock").open("w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat()):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError):  # held by another run, or just removed by it
            raise Stop(f"-o {final}: another run is writing it. Wait for that, or give another name.") from None
        except OSError as error:
            say(f"note: {folder}: this file system has no locks ({reason(error)}). Run one at a time.")
        if (folder / "old").exists() and not final.exists():  # killed between the two renames of `write`
            (folder / "old").rename(final)
        for left in set(folder.iterdir()) - {folder / "lock"}:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    name, here = ("renameatx_np", -2) if sys.platform == "darwin" else ("renameat2", -100)
    call = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), 2) == 0


def write(frame: pl.LazyFrame, target: str, partition: str | None, check: Callable[[], None]) -> None:
    """Write `frame` so that `target` is at every moment the old output or the whole new one.

    What `check` raises once all is written leaves the old one in place.
    """
    mine = f"{getattr(os, 'geteuid', int)()}_{re.sub(r'[^0-9A-Za-z]', '_', target)}"  # for what is uploaded when whole
    beside = Path(tempfile.gettempdir()) / mine if is_remote(target) else Path(target)
    with workspace(beside) as folder:
        new, old = folder / "new", folder / "old"
        sink(frame, new, "" if partition else Path(target).suffix, partition)
        show_progress("")
        check()
        if is_remote(target):  # an upload becomes visible when it is complete
            local, (system, path) = pa.fs.LocalFileSystem(), locate(target)
            for file in filter(Path.is_file, [new, *new.rglob("*")]):
                there = PurePosixPath(path, file.relative_to(new).as_posix())
                pa.fs.copy_files(str(file), str(there), source_filesystem=local, destination_filesystem=system)
        elif not beside.is_dir():
            new.replace(beside)
        elif not exchange(new, beside):  # elsewhere a folder with content cannot be replaced in one step
            beside.rename(old)
            new.rename(beside)


# ---- Summary ----------------------------------------------------------------------------------------------------


def many(count: int, what: str) -> str:
    """`1 run`, `2,163 runs`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def counted(names: Sequence[str], shown: int = 5) -> str:
    """`a, b, c and 7 more`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def show(label: str, text: str = "") -> None:
    """Print a line of results to stdout: `text`, wrapped, right of the label. Its reader may have gone."""
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap(plain(text), max(width - len(label), 20), break_long_words=False, break_on_hyphens=False)
    try:
        print(plain(label) + ("\n" + " " * len(label)).join(lines), flush=True)
    except BrokenPipeError:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def show_progress(text: str) -> None:
    """Show a passing line on a terminal's stderr, and nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def show_steps(steps: dict[str, int]) -> None:
    """How many runs came in, what each step dropped, and how many are left."""
    (first, total), *drops = steps.items()
    table = [(first, f"{total:,}"), *((f"  {label}", f"-{count:,}" if count else "0") for label, count in drops)]
    table.append(("runs out", f"{total - sum(count for _, count in drops):,}"))
    labels, counts = (max(map(len, column)) for column in zip(*table, strict=True))
    for label, count in table:
        show(f"{label:<{labels}}  {count:>{counts}}")


def show_runs(kept: pl.DataFrame, exports: Sequence[Export], changes: dict[str, str]) -> None:
    """What the runs are, most frequent first; the columns of some files only, or of another type in some of them."""
    for column in [c for c in ("project", "stage", "arch", "dataset") if c in kept.columns]:
        counts = Counter(kept[column].to_list())
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0] is None, item[0] or ""))
        show(f"{column:<9}", counted([f"{'-' if value is None else value} ({n:,})" for value, n in ranked], 12))
    files = Counter(column for export in exports for column in export.schema)
    if some := sorted(column for column, count in files.items() if count < len(exports)):
        show("", f"{many(len(some), 'column')} in only some files: {counted(some)}")
    if changes:
        show("", f"{many(len(changes), 'column')} of another type in some files, now of one:")
        why = [f"{column}: {why}" for column, why in sorted(changes.items())]
        for line in why[:10] + [f"and {len(why) - 10:,} more"] * (len(why) > 10):
            show("  ", line)


def show_names(kept: pl.DataFrame, rules: dict[str, Rule], pairs: dict[str, str]) -> None:
    """In how many runs a name contradicts the config (Bool columns `__k`, ...), and how many names told nothing."""
    for column, config in pairs.items():
        if differ := kept[f"__{column}"].sum():
            show("", f"{column}: {config} says otherwise in {differ:,} of {many(len(kept), 'run')}; {column} is used")
    told = [pl.col(c) if c in ("asymmetric_flag", "pearl_flag") else pl.col(c).is_not_null() for c in rules]
    silent = enrich(kept.select("name").lazy(), rules).filter(~pl.any_horizontal(pl.lit(False), *told)).collect()
    if len(silent):
        names = silent["name"].unique(maintain_order=True).fill_null("-").to_list()
        show("", f"{many(len(silent), 'run')} whose name matched no pattern: {counted(names)}")


# ---- Command line -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` and every error here answer without Polars."""
    usage = "%(prog)s [INPUT ...] [-o FILE] [--state STATE,..] [--filter REGEX] [--where SQL] [...]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage=usage, description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    where = f"runs files, folders, globs or s3:// addresses, in any mix (default: {DEFAULT_INPUT}/)"
    add("inputs", nargs="*", metavar="INPUT", help=where)
    formats = f".parquet, .csv, .ndjson or .arrow, also s3:// (default: {DEFAULT_OUTPUT})"
    add("-o", "--output", metavar="FILE", help=formats)
    columns = "only these columns, comma-separated: 'id,name,config_model_*,metric_test_*'"
    add("--columns", metavar="GLOBS", help=columns)
    add("--partition-by", metavar="COLUMN", help="write a Hive-partitioned folder of Parquet files by this column")
    which = parser.add_argument_group("which runs (all conditions together)").add_argument
    states = f"{', '.join(STATES)} or all; several with commas, or repeat it (default: all)"
    which("--state", type=parse_states, action="extend", metavar="STATE,..", help=states)
    which("--filter", metavar="REGEX", help="the run's name holds this")
    which("--project", metavar="REGEX", help="the project's name holds this")
    which("--entity", metavar="REGEX", help="the entity's name holds this")
    which("--tag", action="append", metavar="TAG", help="has this tag; repeat for any of several")
    which("--since", type=parse_when, metavar="WHEN", help="created at or after: 24h, 7d, 2025-10-01, 2025-10-01T12:30")
    which("--until", type=parse_when, metavar="WHEN", help="created before")
    which("--where", metavar="SQL", help="a condition over the output's columns: 'k >= 16 AND metric_test_mse < 0.5'")
    protocols, split = ("distribution", "single_graph", "all"), "how the data were split (default: %(default)s)"
    which("--protocol", choices=protocols, default="distribution", help=split)
    names = parser.add_argument_group("what the names say").add_argument
    rule = "add a column: the regex's group 1, or its whole match, in the run's name; repeatable"
    names("--rule", action="append", default=[], metavar="NAME=REGEX", help=rule)
    names("--rules", metavar="FILE", help="a TOML file with another lab's patterns in place of the built-in ones")
    names("--no-enrich", action="store_true", help="add no columns from names and config")
    args = parser.parse_args()
    if args.no_enrich and (args.rule or args.rules):
        parser.error("--rule and --rules add columns from names, which --no-enrich turns off")
    if args.output is None:
        args.output = DEFAULT_OUTPUT.removesuffix(".parquet") if args.partition_by else DEFAULT_OUTPUT
    return args


def aggregate(args: argparse.Namespace, exports: Sequence[Export], rules: dict[str, Rule]) -> None:
    """Choose the runs of `exports` (oldest first), write them, and print the summary.

    Raises `Stop` with code 1 when no run is left, and what `faults` names when a file changed or proved damaged while
    it was read; the older output then stays in place.
    """
    types, changes = resolve_types(exports)
    merged = scan(exports, types)
    numbers = number_rules(merged, rules)

    def added(frame: pl.LazyFrame) -> pl.LazyFrame:
        """`frame` with the columns from names and config; with --no-enrich only `protocol`, which a filter needs."""
        wide = enrich(frame, rules).with_columns(pl.col(name).cast(dtype) for name, dtype in numbers.items())
        return wide.drop(rules) if args.no_enrich else wide

    frame = added(merged)
    available = list(frame.collect_schema())
    pairs, chosen = partners(available), filters(args)
    if args.where:
        frame = with_where(frame, args.where)
    # The few columns that decide which runs stay, and that the summary counts; a row per row of the files, in order.
    flags = chosen | {f"__{column}": contradicts(column, config) for column, config in pairs.items()}
    told = [c for c in (FILE, "id", "name", "entity", "project", "stage", "arch", "dataset") if c in available]
    flags = [passes.fill_null(False).alias(name) for name, passes in flags.items()]
    rows = frame.select(*told, *flags).collect(engine="streaming")
    confirm(exports)
    copies = "older copies of runs that a newer export holds"
    rows = rows.with_columns(newest_copies().alias(copies))
    stays, steps = pl.repeat(True, len(rows), eager=True), {f"runs in {many(len(exports), 'file')}": len(rows)}
    for label in (copies, *chosen):
        steps[label] = (stays & ~rows[label]).sum()
        stays &= rows[label]
    kept = rows.filter(stays)
    if kept.is_empty():
        show_steps(steps)
        raise Stop(f"no run is left, so {args.output} was not written. See above which condition removed them.", 1)

    frame = added(pick(rows, stays, exports, types))
    available = column_order(set(frame.collect_schema()) - ({"protocol"} if args.no_enrich else set()))
    columns, partition = choose_columns(args.columns, available), args.partition_by
    if partition and partition not in available:
        raise Stop(f"--partition-by {partition}: no such column.{nearest(partition, available)}")
    if partition == "tags":
        raise Stop("--partition-by tags: a run has several. Choose a column of single values.")
    if partition and partition not in columns:
        columns.append(partition)
    write(frame.select(columns), args.output, partition, partial(confirm, exports))
    show_steps(steps)
    show_runs(kept, exports, changes)
    if not args.no_enrich:
        show_names(kept, rules, pairs)
    say(f"Saved {many(len(kept), 'run')} ({many(len(columns), 'column')}) to {args.output}")


def main() -> int:
    """Read, choose, merge, write, and say what happened; returns the exit code."""
    args = parse_arguments()
    import pyarrow.parquet  # noqa: F401 (brings `pa.parquet` and `pa.fs`: heavy, so only once the arguments are right)

    rules = dict(RULES) if args.no_enrich else read_rules(args.rule, args.rules)
    filters(args)  # a mistake in a regular expression is told before any file is looked for
    broken: Broken = {}
    say_once = cache(say)
    for _ in range(10):
        exports, problems = read_exports(args.inputs or [DEFAULT_INPUT], broken)
        for note in describe(problems, len(exports)):
            say_once(note)
        if not exports:
            raise Stop("no export is left to read. Make some with export_runs.py, or name files, folders or globs.")
        check_output(args.output, args.partition_by, [export.path for export in exports])
        try:
            aggregate(args, exports, rules)
            return max((stop.code for stop in problems.values()), default=0)
        except faults() as error:
            if intact(exports):
                raise Stop(f"{args.output} was not written: {reason(error)}", 1) from None
            broken |= {(export.path, export.version): export.fault for export in exports if export.fault}
    raise Stop("the exports change faster than they can be read. Run it again when no export is under way.", 1)


if __name__ == "__main__":
    finish(main)
