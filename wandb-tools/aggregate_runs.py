#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "polars>=2,<3",
#     "pyarrow>=26,<27",
#     "rich>=15,<16",
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
import difflib
import fnmatch
import importlib.util
import json
import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import polars as pl
    from pyarrow.fs import FileSystem
    from rich.console import Console

DEFAULT_INPUT = "wandb_export"
DEFAULT_OUTPUT = "wandb_export/aggregated.parquet"  # no folder input takes it for an export: those end in _runs.parquet
# Rows are written in groups of this many: 100,000 runs of 300 columns then need 0.7 GB instead of the 1.6 GB that
# Polars' own choice took, in less time, and a reader of a few columns still finds large pieces.
# zstd's level 1 took a third less time than Polars' level 3 and made smaller files of such numbers.
PARQUET = {"compression": "zstd", "compression_level": 1, "row_group_size": 5_000}


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
    try:
        code = main()
        sys.stdout.flush()
    except Stop as stop:
        say(f"error: {stop}")
        code = stop.code
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except SystemExit as end:  # after --help, or as rich turns a BrokenPipeError
        code = 0 if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except BrokenPipeError:
        try:
            print(flush=True)  # one more byte, for what failed may be gone from the buffer
        except BrokenPipeError:  # the reader of our results, `head` for example, has seen enough
            code = 0
        else:  # what broke is another connection
            say("error: a connection was closed from the other side. Try again.")
            code = 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "new thread" not in str(error):
            raise
        say("error: there is not enough memory for this. Take fewer runs at once, or allow more.")
        code = 1
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        code = 1
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
    pl = lazy("polars")


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
    name, words, arch = text("name"), pl.col("__words"), pl.col("arch")
    target = text("config_model__target_", "config_model_target")
    same_graph = text("config_data_same_graph_all_splits").str.to_lowercase().is_in(["true", "1"])
    single_graph = text("config_data__target_").str.contains("SingleGraph", literal=True)
    single = pl.any_horizontal(same_graph, single_graph).fill_null(False)
    added = {"protocol": pl.when(single).then(pl.lit("single_graph")).otherwise(pl.lit("distribution"))}
    added |= {column: parse(name, words, rule) for column, rule in rules.items()}
    added["stage"] = added["stage"].str.to_lowercase()
    added["arch"] = pl.coalesce(added["arch"], text("config_model_type"))
    config = ("data_dataset_name", "dataset_name", "data_graph_type", "graph_type")
    added["dataset"] = pl.coalesce(text(*(f"config_{key}" for key in config)), added["dataset"])
    for column in ("k", "seed_parsed"):
        added[column] = added[column].cast(pl.Int64, strict=False)
    for column in ("lr_parsed", "wd_parsed", "eps_parsed"):
        added[column] = added[column].cast(pl.Float64, strict=False)
    for column in ("asymmetric_flag", "pearl_flag"):
        added[column] = added[column].is_not_null()
    in_target, in_arch = (parse(t, separated(t), rules["model_type"]) for t in (target, arch))
    family = pl.coalesce(in_target, added["model_type"], in_arch)
    added["model_type"] = pl.lit(None, pl.String)  # holds the place until `arch` is there
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
ROW, FILE = "__row", "__file"  # where a row comes from while we work: its number in its file, the file's number


@dataclass(frozen=True)
class Export:
    """One readable runs file: its address, its columns and when it was exported."""

    path: str
    schema: dict[str, pl.DataType]
    exported_at: datetime


class Aggregate(Stop):
    """A file is no export but something that this script wrote."""


# ---- Which files ------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Whether `path` is an object storage address (`s3://bucket/path`) rather than a local path."""
    return "://" in path


def remote(address: str) -> tuple[FileSystem, str, str]:
    """The file system of an object storage address, its path there, and what to put before paths to have addresses.

    Polars reads and writes the data; pyarrow lists and looks at times, which Polars does not offer. Both find
    credentials in the usual places (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`).
    """
    from pyarrow.fs import FileSystem

    try:
        system, path = FileSystem.from_uri(address)
    except (OSError, ValueError) as error:
        raise Stop(f"{address}: {reason(error)}") from None
    return system, path, address[: address.index("://") + 3]


def find_files(given: str) -> list[str]:
    """The files that one input names: itself, the `*_runs.parquet` of a folder, or the `*.parquet` of a glob."""
    if is_remote(given):
        return find_remote(given)
    path = Path(given).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*_runs.parquet"))
    if path.exists():
        return [os.path.normpath(path)]
    matches = [Path(match) for match in glob(str(path), recursive=True) if match.endswith(".parquet")]  # noqa: PTH207
    return sorted(os.path.normpath(match) for match in matches if match.is_file())


def find_remote(given: str) -> list[str]:
    """`find_files` for object storage. In a glob `*` stays inside one folder, `**` does not."""
    from pyarrow.fs import FileSelector, FileType

    fixed = re.split(r"[*?[]", given, maxsplit=1)[0]
    system, path, scheme = remote(given if fixed == given else fixed[: fixed.rindex("/")])
    try:
        entry = system.get_file_info(path)
        if entry.type != FileType.Directory:
            return [given] if entry.type == FileType.File else []
        entries = system.get_file_info(FileSelector(path, recursive=fixed != given))
    except OSError as error:
        raise Stop(f"{given}: {reason(error)}") from None
    files = sorted(scheme + entry.path for entry in entries if entry.type == FileType.File)
    if fixed == given:
        return [file for file in files if file.endswith("_runs.parquet")]
    inside = [file for file in files if "**" in given or file.count("/") == given.count("/")]
    return [file for file in inside if file.endswith(".parquet") and fnmatch.fnmatchcase(file, given)]


def exported_at(path: str, footer: dict[str, str]) -> datetime:
    """When an export was made: from its `_metadata.json`, else from the Parquet footer, else the file's time."""
    beside = path.removesuffix("_runs.parquet") + "_metadata.json"
    if is_remote(path):
        from pyarrow.fs import FileType

        system, there, _ = remote(path)
        changed, notes = system.get_file_info([there, remote(beside)[1]])
        modified = changed.mtime
        text = system.open_input_stream(notes.path).read().decode() if notes.type == FileType.File else "{}"
    else:
        modified = datetime.fromtimestamp(Path(path).stat().st_mtime, UTC)
        text = Path(beside).read_text(encoding="utf-8") if Path(beside).is_file() else "{}"
    for note in (text, footer.get("wandb_tools", "{}")):
        try:
            when = datetime.fromisoformat(json.loads(note)["exported_at"])
        except (ValueError, KeyError, TypeError):
            continue
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return modified


def read_export(path: str) -> Export:
    """Read the footer of a runs file. Raises `Stop` with the reason when it is none."""

    try:
        schema = dict(pl.read_parquet_schema(path))
        footer = pl.read_parquet_metadata(path)
        when = exported_at(path, footer)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise Stop(f"no readable Parquet file ({reason(error)})") from None
    if missing := [column for column in ("id", "name") if column not in schema]:
        raise Stop(f"no export of runs: it has no column {' and no column '.join(missing)}")
    if "_source_file" in schema:
        raise Aggregate("an aggregate already; give the exports that it was made from")
    for column, dtype in schema.items():
        if not fits(column, dtype):
            raise Stop(f"no export of runs: its column {column} is {dtype}")
    return Export(path, schema, when)


def read_exports(inputs: Sequence[str]) -> tuple[list[Export], int]:
    """The exports that `inputs` name, each once, and how many inputs or files were unusable, each named on stderr.

    History files, and aggregates that a folder or a glob brings along, are left out with a word.
    """
    found: dict[str, str] = {}  # by what it is, so that two ways to say a file are one
    left_out: list[str] = []
    problems: list[str] = []
    for given in inputs:
        paths = find_files(given)
        if not paths:
            problems.append(f"{given}: no such file, or nothing there that ends in _runs.parquet")
        for path in paths:
            if path.endswith("_history.parquet"):
                left_out.append(path)
            else:
                found.setdefault(path if is_remote(path) else os.path.realpath(path), path)

    def attempt(path: str) -> Export | Stop:
        try:
            return read_export(path)
        except Stop as stop:
            return stop

    exports: list[Export] = []
    with ThreadPoolExecutor(16) as pool:
        for path, result in zip(found.values(), pool.map(attempt, found.values()), strict=True):
            if isinstance(result, Export):
                exports.append(result)
            elif isinstance(result, Aggregate) and path not in inputs:
                left_out.append(path)
            else:
                problems.append(f"{path}: {result}")
    if left_out:
        names = sorted({path.rsplit("/", 1)[-1] for path in left_out})
        say(f"left out {many(len(names), 'file')} without runs of an export (history, aggregates): {counted(names, 3)}")
    for problem in problems:
        say(f"skipped {problem}")
    return exports, len(problems)


def reason(error: Exception) -> str:
    """The first line of an engine's error, without the plan that follows it."""
    return str(error).strip().splitlines()[0]


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


def fits(column: str, dtype: pl.DataType) -> bool:
    """Whether a file's column can take its contract type without a value changing."""

    want = contract_type(column)
    if want is None:
        return not dtype.is_nested()
    if dtype in (want, pl.Null):
        return True
    if want == pl.Float64:
        return dtype.is_numeric() or dtype == pl.Boolean
    if want == pl.Int64:
        return dtype.is_integer()
    if isinstance(want, pl.Datetime):
        return isinstance(dtype, pl.Datetime) and dtype.time_zone == "UTC"
    return want == pl.String and dtype in (pl.Categorical, pl.Enum)


def resolve_types(exports: Sequence[Export]) -> tuple[dict[str, pl.DataType], dict[str, str]]:
    """One type per column over all files, which keeps every value, and why a column's type had to change.

    Out: column -> type, and column -> reason for columns whose files disagree. The contract's rules: metrics are
    Float64; Int64 and Float64 are Float64; anything else that mixes is String. A column that is all null in a file has
    no say there, for an export calls it String for want of a type.
    """

    votes: dict[str, dict[pl.DataType, list[Export]]] = {}
    for export in exports:
        for column, dtype in export.schema.items():
            votes.setdefault(column, {}).setdefault(contract_type(column) or widest(dtype), []).append(export)
    disputed = {column: by for column, by in votes.items() if len(by) > 1}
    seen = probe(disputed)
    types = {column: next(iter(by)) for column, by in votes.items()}
    changes: dict[str, str] = {}
    for column, by in disputed.items():
        kept = {dtype: [e for e in files if seen[e.path, column] is not None] for dtype, files in by.items()}
        kept = {dtype: files for dtype, files in kept.items() if files}
        exact = all(seen[e.path, column] for e in kept.get(pl.Int64(), []))
        if len(kept) <= 1:
            types[column] = next(iter(kept), pl.String())
            continue
        types[column] = pl.Float64() if set(kept) == {pl.Int64(), pl.Float64()} and exact else pl.String()
        counts = [f"{dtype} in {many(len(files), 'file')}" for dtype, files in kept.items()]
        why = " (integers too large for Float64)" if not exact and len(kept) == 2 and pl.Float64() in kept else ""
        changes[column] = f"{types[column]}, for it is {' and '.join(sorted(counts))}{why}"
    return types, changes


def widest(dtype: pl.DataType) -> pl.DataType:
    """The contract's type for a config column that another tool wrote narrower: Int32 is Int64, Float32 is Float64."""

    if dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128, pl.UInt128):
        return pl.Int64()
    if dtype == pl.Float32:
        return pl.Float64()
    return pl.String() if dtype in (pl.Null, pl.Categorical, pl.Enum) else dtype


def probe(disputed: dict[str, dict[pl.DataType, list[Export]]]) -> dict[tuple[str, str], bool | None]:
    """For each (file, disputed column): None when it has no value there, else whether Float64 would keep its values."""

    asked: dict[str, list[pl.Expr]] = {}
    for column, by in disputed.items():
        value = pl.col(column)
        for dtype, files in by.items():
            exact = value.is_between(-(2**53), 2**53).all() if dtype == pl.Int64 else pl.lit(True)
            for export in files:
                asked.setdefault(export.path, []).append(pl.when(value.count() > 0).then(exact).alias(column))
    rows = pl.collect_all([pl.scan_parquet(path).select(exprs) for path, exprs in asked.items()])
    answers = zip(asked, rows, strict=True)
    return {(path, column): answer for path, row in answers for column, answer in row.row(0, named=True).items()}


# ---- JSON text of numbers ---------------------------------------------------------------------------------------


def paths_to(column: str, config: dict[str, object], prefix: str = "config") -> Iterator[tuple[str, ...]]:
    """The key paths of a nested config that land on `column`, or on it before the exporter told collisions apart."""
    for key, value in config.items():
        spelled = prefix + "_" + re.sub(r"\W", "_", key)
        if isinstance(value, dict):
            yield from ((key, *path) for path in paths_to(column, value, spelled))
        elif re.fullmatch(re.escape(spelled) + "(__[0-9]+)?", column):
            yield (key,)


def value_at(config: object, path: tuple[str, ...]) -> object:
    """The value at a key path of a nested config; None when there is none."""
    for key in path:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def number_text(number: float, config: dict[str, object], paths: Iterable[tuple[str, ...]]) -> str | None:
    """The JSON text of the value at one of `paths` that equals `number`; None when there is none."""
    for path in paths:
        value = value_at(config, path)
        if type(value) is float and value == number:
            return json.dumps(value)
        if type(value) is int and abs(value) < 2**1023 and float(value) == number:
            return json.dumps(value)
    return None


def number_texts(rows: pl.Series, columns: Sequence[str]) -> pl.Series:
    """Float64 `columns` as their JSON text, which for whole numbers only `_config_json` knows: `3`, `3.0` or `3e20`.

    In: Struct of `_config_json` and `columns`. Out: Struct of `columns` as String. Python, because no Polars expression
    spells numbers as JSON does (`1e-05`); it runs only over files whose Float64 column is text elsewhere.
    """

    configs = rows.struct.field("_config_json").to_list()
    parsed: dict[int, dict[str, object]] = {}
    texts: dict[str, list[str | None]] = {}
    for column in columns:
        paths: list[tuple[str, ...]] = []  # the same in nearly all runs, so looked for only when they do not lead there
        texts[column] = []
        for index, number in enumerate(rows.struct.field(column).to_list()):
            text = None
            if number is not None and number.is_integer():
                if index not in parsed:
                    parsed[index] = json.loads(configs[index] or "{}")
                text = number_text(number, parsed[index], paths)
                if text is None:
                    paths += [path for path in paths_to(column, parsed[index]) if path not in paths]
                    text = number_text(number, parsed[index], paths)
            texts[column].append(json.dumps(number) if text is None and number is not None else text)
    return pl.DataFrame(texts, schema=dict.fromkeys(columns, pl.String)).to_struct(rows.name)


# ---- Merge ------------------------------------------------------------------------------------------------------


def read_rows(export: Export, types: dict[str, pl.DataType], number: int) -> pl.LazyFrame:
    """One export's rows with every column in its common type, plus `_source_file` and where the row stands."""

    frame = pl.scan_parquet(export.path, row_index_name=ROW)
    casts = {column: pl.col(column) for column, dtype in export.schema.items() if dtype != types[column]}
    floats = [c for c in casts if types[c] == pl.String and export.schema[c].is_float()]
    if floats:
        config = pl.col("_config_json") if "_config_json" in export.schema else pl.lit(None, pl.String)
        rows = pl.struct(config.alias("_config_json"), *(pl.col(c).cast(pl.Float64) for c in floats))
        to_text = partial(number_texts, columns=floats)
        dtype = pl.Struct(dict.fromkeys(floats, pl.String))
        texts = rows.map_batches(to_text, return_dtype=dtype, is_elementwise=True)
        casts |= {column: texts.struct.field(column) for column in floats}
    return frame.with_columns(
        *(value.cast(types[column]).alias(column) for column, value in casts.items()),
        pl.lit(export.path).alias("_source_file"),
        pl.lit(number, pl.Int32).alias(FILE),
    )


def stack(frames: Sequence[pl.LazyFrame]) -> pl.LazyFrame:
    """All rows of all frames, one under the other, by column name; what a frame lacks is null there.

    The contract's base columns are always there, so that what follows need not ask.
    """

    stacked = pl.concat(frames, how="diagonal")
    there = stacked.collect_schema()
    lacking = [column for column in (*BASE_COLUMNS, *JSON_COLUMNS) if column not in there]
    return stacked.with_columns(pl.lit(None, contract_type(column)).alias(column) for column in lacking)


def column_order(columns: Iterable[str]) -> list[str]:
    """The output's columns: the contract's, config and metrics by name, both JSON columns, then what was added."""
    columns = set(columns) - {ROW, FILE}
    added = [column for column in ("protocol", *RULES) if column in columns]
    rest = columns - set(BASE_COLUMNS) - set(JSON_COLUMNS) - set(added) - {"_source_file"}
    kinds = [sorted(c for c in rest if c.startswith(prefix)) for prefix in ("config_", "metric_", "system_")]
    others = sorted(rest.difference(*kinds))
    ordered = [*BASE_COLUMNS, *kinds[0], *kinds[1], *kinds[2], *JSON_COLUMNS, *added, *others, "_source_file"]
    return [column for column in ordered if column in columns]


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
    checked: dict[str, Rule] = {}
    for name, rule in rules.items():
        where = f"rule {name}"
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise Stop(f"{where}: {name!r} is no column name. Use letters, digits and _.")
        if contract_type(name) or name.startswith("config_") or name == "protocol":
            raise Stop(f"{where}: exports have a column {name} of their own. Choose another name.")
        if isinstance(rule, str):
            checked[name] = check_regex(rule, where)
        elif isinstance(rule, list) and all(isinstance(word, str) for word in rule):
            checked[name] = rule
        elif isinstance(rule, dict) and all(isinstance(regex, str) for regex in rule.values()):
            checked[name] = {value: check_regex(regex, f"{where}, {value}") for value, regex in rule.items()}
        else:
            raise Stop(f"{where}: {rule!r} is no regular expression, no list of words, no table of regular expressions")
    return checked


def number_rules(merged: pl.LazyFrame, rules: dict[str, Rule]) -> dict[str, pl.DataType]:
    """The rules beyond the contract whose every value is a number, with Int64 or Float64."""

    own = [name for name in rules if name not in RULES]
    types: dict[str, pl.DataType] = {}
    if own:
        found = enrich(merged.select("name"), rules).select(own).collect(engine="streaming")
        for name in own:
            values = found[name].drop_nulls()
            if len(values) and values.str.contains(f"(?i)^[+-]?{NUMBER}$").all():
                whole = values.cast(pl.Int64, strict=False).null_count() == 0
                types[name] = pl.Int64() if whole else pl.Float64()
    return types


# ---- Filters ----------------------------------------------------------------------------------------------------


def filters(args: argparse.Namespace) -> list[tuple[str, pl.Expr]]:
    """Each filter in force, in the order in which the summary counts them, as (option, Bool expression)."""

    chosen: list[tuple[str, pl.Expr]] = []
    if args.state:
        chosen.append((f"--state {' or '.join(args.state)}", pl.col("state").is_in(args.state)))
    for option, column in (("filter", "name"), ("project", "project"), ("entity", "entity")):
        if regex := getattr(args, option):
            check_regex(regex, f"--{option}")
            chosen.append((f"--{option} {regex}", pl.col(column).str.contains(f"(?i){regex}")))
    if args.tag:
        has_tag = pl.any_horizontal(pl.col("tags").list.contains(tag) for tag in args.tag)
        chosen.append((f"--tag {' or '.join(args.tag)}", has_tag))
    if args.since:
        chosen.append((f"--since {args.since:%Y-%m-%d %H:%M}", pl.col("created_at") >= args.since))
    if args.until:
        chosen.append((f"--until {args.until:%Y-%m-%d %H:%M}", pl.col("created_at") < args.until))
    if args.where:
        try:
            chosen.append((f"--where {args.where}", pl.sql_expr(args.where)))
        except pl.exceptions.PolarsError as error:
            raise Stop(f"--where {args.where!r} is no SQL condition: {reason(error)}") from None
    if args.protocol != "all":
        chosen.append((f"--protocol {args.protocol}", pl.col("protocol") == args.protocol))
    return chosen


def check_where(where: str, schema: dict[str, pl.DataType]) -> None:
    """Raise `Stop` when the condition `where` does not fit the columns, before any row is read."""

    try:
        pl.DataFrame(schema=schema).filter(pl.sql_expr(where))
    except pl.exceptions.ColumnNotFoundError as error:
        column = re.match(r'unable to find column "(.*?)"', str(error))
        name = column[1] if column else reason(error)
        raise Stop(f"--where {where!r}: there is no column {name}.{nearest(name, schema)}") from None
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {where!r}: {reason(error)}") from None


# ---- Choose the runs --------------------------------------------------------------------------------------------


def survey(merged: pl.LazyFrame, chosen: Sequence[tuple[str, pl.Expr]]) -> pl.DataFrame:
    """The few columns that decide which runs stay, and that the summary counts; a row per row of `merged`, in order.

    Out: `__file`, `__row`, `id`, `name`, `entity`, `project`, what is there of `stage`, `arch`, `dataset`, and a Bool
    per filter: `0`, `1`, ...
    """
    there = merged.collect_schema()
    columns = [c for c in (FILE, ROW, "id", "name", "entity", "project", "stage", "arch", "dataset") if c in there]
    passed = [expr.fill_null(False).alias(str(number)) for number, (_, expr) in enumerate(chosen)]
    return merged.select(*columns, *passed).collect(engine="streaming")


def newest_copies(rows: pl.DataFrame, exports: Sequence[Export]) -> pl.Series:
    """Bool per row: whether it is the run's copy from the newest export (the later row if one file has it twice)."""

    order = sorted(range(len(exports)), key=lambda number: (exports[number].exported_at, exports[number].path))
    age = pl.DataFrame({FILE: order, "age": range(len(order))}, schema={FILE: pl.Int32, "age": pl.Int32})
    rank = pl.col("age").cast(pl.Int64) * 2**40 + pl.col(ROW).cast(pl.Int64)
    newest = (rank == rank.max().over("entity", "project", "id")) | pl.col("id").is_null()
    return rows.join(age, on=FILE, how="left", maintain_order="left").select(newest).to_series()


def pick(kept: pl.DataFrame, exports: Sequence[Export], types: dict[str, pl.DataType]) -> pl.LazyFrame:
    """The rows of `kept` (columns `__file`, `__row`, `entity`, `project`) out of their files, lazily.

    Files follow one another by entity, project and time of export, whatever the order of the inputs; rows keep the
    file's order, which is oldest first. A file of which no row stays brings no columns.
    """

    place = (pl.col("entity", "project").min().fill_null(""), pl.col(ROW))
    files = kept.group_by(FILE).agg(*place).rows()
    files.sort(key=lambda file: (*file[1:3], exports[file[0]].exported_at, exports[file[0]].path))
    frames = []
    for number, _, _, numbers in files:
        wanted = pl.lit(pl.Series(numbers, dtype=pl.UInt32).implode())
        frames.append(read_rows(exports[number], types, number).filter(pl.col(ROW).is_in(wanted)))
    return stack(frames)


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
    suffix = Path(target).suffix
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
    else:
        foreign = [target] if Path(target).exists() else []
    if foreign:
        raise Stop(f"-o {target}: holds {foreign[0]}. Give a new folder, or one that an earlier --partition-by wrote.")


def json_list(column: str) -> pl.Expr:
    """A list column as JSON text, for formats without lists."""

    return pl.struct(x=pl.col(column)).struct.json_encode().str.extract(r"^\{\"x\":(\[.*\])\}$", 1).alias(column)


def sink(frame: pl.LazyFrame, path: str, suffix: str, partition: str | None) -> None:
    """Stream `frame` to `path` in the format of `suffix`; with `partition` as a Hive-partitioned folder of Parquet."""

    if partition:
        target = pl.PartitionBy(path, key=partition, include_key=False)
        frame.sink_parquet(target, **PARQUET, mkdir=True, engine="streaming")
    elif suffix == ".parquet":
        frame.sink_parquet(path, **PARQUET, engine="streaming")
    elif suffix == ".csv":
        lists = [column for column, dtype in frame.collect_schema().items() if dtype.is_nested()]
        frame.with_columns(json_list(column) for column in lists).sink_csv(path, engine="streaming")
    elif suffix == ".ndjson":
        frame.sink_ndjson(path, engine="streaming")
    else:
        frame.sink_ipc(path, compression="zstd", engine="streaming")


def write(frame: pl.LazyFrame, target: str, partition: str | None) -> None:
    """Write `frame` so that `target` is at every moment the old output or the whole new one."""
    suffix = Path(target).suffix
    if is_remote(target):  # an upload becomes visible when it is complete
        sink(frame, target, suffix, partition)
        return
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True) as folder:
        beside, replaced = Path(folder) / final.name, Path(folder) / "replaced"
        sink(frame, str(beside), suffix, partition)
        if not (partition and final.exists()):
            beside.replace(final)
            return
        final.rename(replaced)  # a folder with content cannot be replaced in one step
        try:
            beside.rename(final)
        except BaseException:
            replaced.rename(final)
            raise


# ---- Summary ----------------------------------------------------------------------------------------------------


def many(count: int, what: str) -> str:
    """`1 run`, `2,163 runs`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def counted(names: Sequence[str], shown: int = 5) -> str:
    """`a, b, c and 7 more`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def print_steps(console: Console, steps: Sequence[tuple[str, int]], left: int) -> None:
    """How many runs came in, what each step dropped, and how many are left."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    (first, total), *drops = steps
    table.add_row(first, f"{total:,}")
    for label, count in drops:
        table.add_row(f"  {label}", f"-{count:,}" if count else "0")
    table.add_row("runs out", f"{left:,}")
    console.print(table)


def print_values(console: Console, kept: pl.DataFrame) -> None:
    """The projects, stages, archs and datasets of the runs that stay, with counts, most frequent first."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for column in ("project", "stage", "arch", "dataset"):
        if column in kept.columns:
            counts = Counter(kept[column].to_list())
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0] is None, item[0] or ""))
            table.add_row(column, counted([f"{'-' if value is None else value} ({n:,})" for value, n in ranked], 12))
    console.print(table)


def print_columns(console: Console, exports: Sequence[Export], changes: dict[str, str]) -> None:
    """Which columns stand in only some of the files, and which changed their type and why."""
    files = Counter(column for export in exports for column in export.schema)
    partial_columns = sorted(column for column, count in files.items() if count < len(exports))
    if partial_columns:
        console.print(f"{many(len(partial_columns), 'column')} in only some files: {counted(partial_columns)}")
    if changes:
        console.print(f"{many(len(changes), 'column')} of another type in some files, now of one:")
        for column, why in sorted(changes.items())[:10]:
            console.print(f"  {column}: {why}")
        if len(changes) > 10:
            console.print(f"  and {len(changes) - 10:,} more")


def print_unmatched(console: Console, kept: pl.DataFrame, rules: dict[str, Rule]) -> None:
    """How many names told nothing, and the first few of them."""

    flags = {"asymmetric_flag", "pearl_flag"}
    told = [pl.col(column) if column in flags else pl.col(column).is_not_null() for column in rules]
    matched = enrich(kept.select("name").lazy(), rules).select(pl.any_horizontal(pl.lit(False), *told)).collect()
    silent = kept["name"].filter(~matched.to_series())
    if len(silent):
        names = silent.unique(maintain_order=True).fill_null("-").to_list()
        console.print(f"{many(len(silent), 'run')} whose name matched no pattern: {counted(names)}")


# ---- Command line -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` and every error here answer without Polars."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        default=[DEFAULT_INPUT],
        help=f"runs files, folders, globs or s3:// addresses, in any mix (default: {DEFAULT_INPUT}/)",
    )
    add(
        "-o",
        "--output",
        metavar="FILE",
        help=f".parquet, .csv, .ndjson or .arrow, also s3:// (default: {DEFAULT_OUTPUT})",
    )
    add(
        "--columns", metavar="GLOBS", help="only these columns, comma-separated: 'id,name,config_model_*,metric_test_*'"
    )
    add("--partition-by", metavar="COLUMN", help="write a Hive-partitioned folder of Parquet files by this column")
    which = parser.add_argument_group("which runs (all conditions together)").add_argument
    which(
        "--state",
        action="append",
        choices=STATES,
        metavar="STATE",
        help=f"{', '.join(STATES)}; repeat for any of several",
    )
    which("--filter", metavar="REGEX", help="the run's name holds this")
    which("--project", metavar="REGEX", help="the project's name holds this")
    which("--entity", metavar="REGEX", help="the entity's name holds this")
    which("--tag", action="append", metavar="TAG", help="has this tag; repeat for any of several")
    which("--since", type=parse_when, metavar="WHEN", help="created at or after: 24h, 7d, 2025-10-01, 2025-10-01T12:30")
    which("--until", type=parse_when, metavar="WHEN", help="created before")
    which("--where", metavar="SQL", help="a condition over the output's columns: 'k >= 16 AND metric_test_mse < 0.5'")
    which(
        "--protocol",
        choices=("distribution", "single_graph", "all"),
        default="distribution",
        help="how the data were split (default: %(default)s)",
    )
    names = parser.add_argument_group("what the names say").add_argument
    names("--no-enrich", action="store_true", help="add no columns from names and config")
    names(
        "--rule",
        action="append",
        default=[],
        metavar="NAME=REGEX",
        help="add a column: the regex's group 1, or its whole match, in the run's name; repeatable",
    )
    names("--rules", metavar="FILE", help="a TOML file with another lab's patterns in place of the built-in ones")
    args = parser.parse_args()
    if args.no_enrich and (args.rule or args.rules):
        parser.error("--rule and --rules add columns from names, which --no-enrich turns off")
    if args.output is None:
        args.output = DEFAULT_OUTPUT.removesuffix(".parquet") if args.partition_by else DEFAULT_OUTPUT
    return args


def aggregate(args: argparse.Namespace, exports: Sequence[Export], rules: dict[str, Rule]) -> None:
    """Choose the runs, write them, and print the summary. Raises `Stop` with code 1 when no run is left."""
    from rich.console import Console

    chosen = filters(args)
    types, changes = resolve_types(exports)
    merged = stack([read_rows(export, types, number) for number, export in enumerate(exports)])
    numbers = number_rules(merged, rules)

    def added(frame: pl.LazyFrame) -> pl.LazyFrame:
        """`frame` with the columns from names and config; with --no-enrich only `protocol`, which a filter needs."""
        wide = enrich(frame, rules).with_columns(pl.col(name).cast(dtype) for name, dtype in numbers.items())
        return wide.drop(rules) if args.no_enrich else wide

    frame = added(merged)
    if args.where:
        check_where(args.where, frame.collect_schema())
    rows = survey(frame, chosen)
    stays = newest_copies(rows, exports)
    steps = [(f"runs in {many(len(exports), 'file')}", len(rows))]
    steps.append(("older copies of runs that a newer export holds", len(rows) - stays.sum()))
    for number, (label, _) in enumerate(chosen):
        after = stays & rows[str(number)]
        steps.append((label, stays.sum() - after.sum()))
        stays = after
    kept = rows.filter(stays)

    console = Console(highlight=False, markup=False, emoji=False)
    if kept.is_empty():
        print_steps(console, steps, 0)
        raise Stop(f"no run is left, so {args.output} was not written. See above which condition removed them.", 1)
    frame = added(pick(kept, exports, types))
    if args.no_enrich:
        frame = frame.drop("protocol")
    available = column_order(frame.collect_schema())
    if args.partition_by and args.partition_by not in available:
        raise Stop(f"--partition-by {args.partition_by}: no such column.{nearest(args.partition_by, available)}")
    columns = choose_columns(args.columns, available)
    if args.partition_by and args.partition_by not in columns:
        columns.append(args.partition_by)
    with Console(stderr=True).status(f"writing {many(len(kept), 'run')}"):  # shown on a terminal only
        write(frame.select(columns), args.output, args.partition_by)

    print_steps(console, steps, len(kept))
    print_values(console, kept)
    print_columns(console, exports, changes)
    if not args.no_enrich:
        print_unmatched(console, kept, rules)
    say(f"Saved {many(len(kept), 'run')} ({many(len(columns), 'column')}) to {args.output}")


def unreadable(path: str) -> str | None:
    """Why the rows of a file whose footer was fine cannot be read; None when they can."""

    try:
        pl.scan_parquet(path).collect(engine="streaming")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        return reason(error)
    return None


def main() -> int:
    """Read, choose, merge, write, and say what happened; returns the exit code."""
    args = parse_arguments()

    rules = dict(RULES) if args.no_enrich else read_rules(args.rule, args.rules)
    filters(args)  # a mistake in a condition is told before any file is looked for
    exports, skipped = read_exports(args.inputs or [DEFAULT_INPUT])
    check_output(args.output, args.partition_by, [export.path for export in exports])
    while exports:
        try:
            aggregate(args, exports, rules)
            return 1 if skipped else 0
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # damaged files can do either
            broken = {export.path: why for export in exports if (why := unreadable(export.path))}
            if not broken:
                raise Stop(f"{args.output} was not written: {reason(error)}", 1) from None
        for path, why in broken.items():
            say(f"skipped {path}: its rows cannot be read ({why})")
        skipped += len(broken)
        exports = [export for export in exports if export.path not in broken]
    raise Stop("no export is left to read. Make some with export_runs.py, or name files, folders or globs.")


if __name__ == "__main__":
    finish(main)
