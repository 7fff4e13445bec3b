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

    uv run wandb-tools/aggregate_runs.py                  # wandb_export/ -> wandb_export/aggregated.parquet
    uv run wandb-tools/aggregate_runs.py a_runs.parquet 'old/*' s3://lab/exports/ -o all.parquet
    uv run wandb-tools/aggregate_runs.py --state finished --where 'config_model_k >= 16 AND metric_test_mse < 0.5'
    uv run wandb-tools/aggregate_runs.py --rule 'width=_w([0-9]+)' --columns 'id,name,width,metric_test_*' -o narrow.csv

Reads `{entity}_{project}_runs.parquet` files as export_runs.py writes them, merges them by column name, counts a run
that stands in several exports once (from the newest), adds what its name says about the experiment, and filters.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import json
import os
import re
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console

DEFAULT_INPUT = "wandb_export"
DEFAULT_OUTPUT = "wandb_export/aggregated.parquet"  # no folder input takes it for an export: those end in _runs.parquet
STATES = ("running", "finished", "crashed", "failed", "killed", "pending", "preempting", "preempted")
# Rows are written in groups of this many: 100,000 runs of 300 columns then need 0.6 GB instead of the 1.6 GB that
# Polars' own choice took, in less time, and a reader of a few columns still finds large pieces.
ROW_GROUP = 10_000


# --- console: the same in list_entities.py, export_runs.py, aggregate_runs.py and analyze_runs.py ---
class Stop(Exception):
    """Ends the script with one message, what was wrong (with the value) and what to do, and an exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    """Print progress or a notice to stderr; stdout belongs to results."""
    print(message, file=sys.stderr, flush=True)


def nearest(word: str, names: Iterable[str]) -> str:
    """` Did you mean a, b or c?` for the up to three `names` that resemble `word`, else an empty string."""
    folded = {name.lower(): name for name in names}
    close = [folded[match] for match in difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.5)]
    return f" Did you mean {' or '.join(filter(None, [', '.join(close[:-1]), close[-1]]))}?" if close else ""


def finish(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code; a `Stop`, a full disk, Ctrl-C or a closed pipe end it without a traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except Stop as stop:
        say(f"error: {stop}")
        code = stop.code
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except BrokenPipeError:  # the reader of our stdout, `head` for example, has seen enough
        code = 0
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # at once: worker threads may still wait for a server, and there is nothing left to clean up


# --- end console ---


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


def parse(text: pl.Expr, rule: Rule) -> pl.Expr:
    """What a rule of `RULES` finds in `text`, a String expression: a String, null where it finds nothing."""
    import polars as pl

    if isinstance(rule, str):
        return text.str.extract(f"(?i){rule}", 1)
    if isinstance(rule, dict):
        found = {value: text.str.contains(f"(?i){regex}") for value, regex in rule.items()}
    else:  # plain text search between separators: many regular expressions at once are slow
        words = pl.format("_{}_", text.str.to_lowercase().str.replace_all(r"[^\pL\pN]+", "_"))
        framed = {word: re.sub(r"[\W_]+", "_", f"_{word.lower()}_") for word in rule}
        found = {word: words.str.contains(frame, literal=True) for word, frame in framed.items()}
    return pl.coalesce([pl.when(hit).then(pl.lit(value)) for value, hit in found.items()] or pl.lit(None, pl.String))


def enrich(frame: pl.LazyFrame, rules: dict[str, Rule] = RULES) -> pl.LazyFrame:
    """Add what the run's name and config say about the experiment, lazily; columns that `frame` has stay as they are.

    In: any of `name` and the config columns named below, of any type. Out: `protocol`, `stage`, `arch`, `model_type`,
    `dataset` String, `k`, `seed_parsed` Int64, `lr_parsed`, `wd_parsed`, `eps_parsed` Float64, `asymmetric_flag`,
    `pearl_flag` Bool, and a String for every other rule; null where nothing is known, except `protocol` and the flags.
    """
    import polars as pl

    schema = frame.collect_schema()

    def text(*columns: str) -> pl.Expr:
        """The first of `columns` that is there and set, as String."""
        there = [pl.col(c).cast(pl.String) for c in columns if c in schema and not schema[c].is_nested()]
        return pl.coalesce([pl.when(value != "").then(value) for value in there] or pl.lit(None, pl.String))

    rules = {column: rules.get(column, []) for column in RULES} | rules
    same_graph = text("config_data_same_graph_all_splits").str.to_lowercase().is_in(["true", "1"])
    single_graph = text("config_data__target_").str.contains("SingleGraph", literal=True)
    single = pl.any_horizontal(same_graph, single_graph).fill_null(False)
    added = {"protocol": pl.when(single).then(pl.lit("single_graph")).otherwise(pl.lit("distribution"))}
    added |= {column: parse(text("name"), rule) for column, rule in rules.items()}
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
    target = text("config_model__target_", "config_model_target")
    family = pl.coalesce([parse(source, rules["model_type"]) for source in (target, text("name"), pl.col("arch"))])
    added["model_type"] = pl.lit(None, pl.String)  # holds the place; it needs `arch` to be there
    frame = frame.with_columns(**{column: value for column, value in added.items() if column not in schema})
    return frame if "model_type" in schema else frame.with_columns(model_type=family)


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


# ---- Which files ------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Whether `path` is an object storage address (`s3://bucket/path`) rather than a local path."""
    return "://" in path


def find_files(inputs: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The files that `inputs` (files, folders, globs, in any mix) name: runs files, left out files, empty inputs.

    Of a folder its `*_runs.parquet`; `*_history.parquet` that a glob brings along are left out. Each file once.
    """
    found: dict[str, str] = {}  # by what it is, so that two ways to say a file are one
    history: list[str] = []
    missing: list[str] = []
    for given in inputs:
        paths = list_remote(given) if is_remote(given) else list_local(given)
        if not paths:
            missing.append(given)
        for path in paths:
            if path.endswith("_history.parquet"):
                history.append(path)
            else:
                found.setdefault(path if is_remote(path) else os.path.realpath(path), path)
    return list(found.values()), sorted(set(history)), missing


def list_local(given: str) -> list[str]:
    """The files that a local file, folder or glob names; none when there is no such thing."""
    path = Path(given).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*_runs.parquet"))
    if path.exists():
        return [os.path.normpath(path)]
    matches = [Path(match) for match in glob(str(path), recursive=True) if match.endswith(".parquet")]  # noqa: PTH207
    return sorted(os.path.normpath(match) for match in matches if match.is_file())


def list_remote(given: str) -> list[str]:
    raise Stop("not written yet")


def exported_at(path: str, footer: dict[str, str]) -> datetime:
    """When an export was made: from its `_metadata.json`, else from the Parquet footer, else the file's time."""
    notes = [footer.get("wandb_tools", "{}")]
    beside = Path(path.removesuffix("_runs.parquet") + "_metadata.json")
    if path.endswith("_runs.parquet") and beside.exists():
        notes.insert(0, beside.read_text(encoding="utf-8"))
    for note in notes:
        try:
            when = datetime.fromisoformat(json.loads(note)["exported_at"])
        except (ValueError, KeyError, TypeError):
            continue
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return datetime.fromtimestamp(Path(path).stat().st_mtime, UTC)


def read_export(path: str) -> Export:
    """Read the footer of a runs file. Raises `Stop` with the reason when it is none."""
    import polars as pl

    try:
        schema = dict(pl.read_parquet_schema(path))
        footer = pl.read_parquet_metadata(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise Stop(f"no readable Parquet file ({reason(error)})") from None
    if missing := [column for column in ("id", "name") if column not in schema]:
        raise Stop(f"no export of runs: it has no column {' and no column '.join(missing)}")
    if "_source_file" in schema:
        raise Stop("an aggregate already; give the exports that it was made from")
    for column, dtype in schema.items():
        if not fits(column, dtype):
            raise Stop(f"no export of runs: column {column} is {dtype}")
    return Export(path, schema, exported_at(path, footer))


def reason(error: Exception) -> str:
    """The first line of an engine's error, without the plan that follows it."""
    return str(error).strip().splitlines()[0]


# ---- One type per column ----------------------------------------------------------------------------------------


def contract_type(column: str) -> pl.DataType | None:
    """The type that the data contract gives a column; None for config columns and for columns that it does not know."""
    import polars as pl

    if column.startswith("metric_") or column == "runtime_seconds":
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
    import polars as pl

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
    Float64; Int64 and Float64 are Float64; anything else that mixes is String. A column without a value in a file does not vote.
    """
    import polars as pl

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
        exact = all((seen[e.path, column] or 0) <= 2**53 for e in kept.get(pl.Int64(), []))
        if len(kept) <= 1:
            types[column] = next(iter(kept), pl.String())
            continue
        types[column] = pl.Float64() if set(kept) == {pl.Int64(), pl.Float64()} and exact else pl.String()
        counts = ", ".join(f"{dtype} in {len(files)}" for dtype, files in sorted(kept.items(), key=lambda i: str(i[0])))
        why = "" if exact or types[column] != pl.String() or len(kept) > 2 else ", integers too large for Float64"
        changes[column] = f"{counts}{why}: {types[column]}"
    return types, changes


def widest(dtype: pl.DataType) -> pl.DataType:
    """The contract's type for a config column that another tool wrote narrower: Int32 is Int64, Float32 is Float64."""
    import polars as pl

    if dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128, pl.UInt128):
        return pl.Int64()
    if dtype == pl.Float32:
        return pl.Float64()
    return pl.String() if dtype in (pl.Null, pl.Categorical, pl.Enum) else dtype


def probe(disputed: dict[str, dict[pl.DataType, list[Export]]]) -> dict[tuple[str, str], int | None]:
    """For each file of a disputed column: None when the column has no value there, else its largest magnitude, or 0.

    The magnitude is that of Int64 columns only; it tells whether they survive becoming Float64.
    """
    import polars as pl

    asked: dict[str, dict[str, pl.Expr]] = {}
    for column, by in disputed.items():
        for dtype, files in by.items():
            value = pl.col(column)
            if dtype == pl.Int64:
                size = pl.max_horizontal(value.max().cast(pl.Int128), -value.min().cast(pl.Int128))
            else:
                size = pl.when(value.count() > 0).then(pl.lit(0, pl.Int128))
            for export in files:
                asked.setdefault(export.path, {})[column] = size.alias(column)
    rows = pl.collect_all([pl.scan_parquet(path).select(*exprs.values()) for path, exprs in asked.items()])
    return {
        (p, column): value
        for p, row in zip(asked, rows, strict=True)
        for column, value in row.row(0, named=True).items()
    }


# ---- JSON text of numbers ---------------------------------------------------------------------------------------


@cache
def spelled(key: str) -> str:
    """A config key as columns spell it (the exporter's rule: all but letters, digits and `_` becomes `_`)."""
    return re.sub(r"\W", "_", key)


def leaves(config: dict[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Each value of a nested config with the column that it lands on, before collisions are told apart."""
    for key, value in config.items():
        column = f"{prefix}_{spelled(key)}"
        if isinstance(value, dict):
            yield from leaves(value, column)
        else:
            yield column, value


def number_text(value: float | None, candidates: Sequence[object]) -> str | None:
    """The JSON text of a number as its config has it: a Float64 column no longer knows `3` from `3.0`.

    `candidates` are the config's values that may stand behind the column; the one that equals `value` gives the text.
    """
    if value is None:
        return None
    for candidate in candidates:
        if type(candidate) is int or type(candidate) is float:
            try:
                if float(candidate) == value:
                    return json.dumps(candidate)
            except OverflowError:
                continue
    return json.dumps(value)


def number_texts(rows: pl.Series, columns: Sequence[str]) -> pl.Series:
    """Float64 `columns` as their JSON text, row by row from `_config_json`.

    In: Struct of `_config_json` and `columns`. Out: Struct of `columns` as String. Python, because no Polars expression
    spells a number as JSON does (`1e-05`); it runs only over files whose Float64 column is text elsewhere.
    """
    import polars as pl

    sources = {column: f"{re.sub('__[0-9]+$', '', column)}" for column in columns}
    texts: dict[str, list[str | None]] = {column: [] for column in columns}
    for row in rows.to_list():
        values: dict[str, list[object]] = {}
        if any(row[column] is not None for column in columns):
            for column, value in leaves(json.loads(row["_config_json"] or "{}"), "config"):
                values.setdefault(column, []).append(value)
        for column in columns:
            candidates = values.get(column, []) + values.get(sources[column], [])
            texts[column].append(number_text(row[column], candidates))
    return pl.DataFrame(texts, schema=dict.fromkeys(columns, pl.String)).to_struct(rows.name)


# ---- Merge ------------------------------------------------------------------------------------------------------


def read_rows(export: Export, types: dict[str, pl.DataType], number: int) -> pl.LazyFrame:
    """One export's rows with every column in its common type, plus `_source_file` and where the row stands."""
    import polars as pl

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


def merge(exports: Sequence[Export], types: dict[str, pl.DataType]) -> pl.LazyFrame:
    """All rows of all files, one under the other, by column name; a column that a file lacks is null there."""
    import polars as pl

    return pl.concat([read_rows(e, types, number) for number, e in enumerate(exports)], how="diagonal")


def column_order(columns: Iterable[str]) -> list[str]:
    """The output's columns: the contract's, config and metrics by name, both JSON columns, then what was added."""
    columns = set(columns) - {ROW, FILE}
    added = [column for column in ("protocol", *RULES) if column in columns]
    rest = columns - set(BASE_COLUMNS) - set(JSON_COLUMNS) - set(added) - {"_source_file"}
    kinds = [sorted(c for c in rest if c.startswith(prefix)) for prefix in ("config_", "metric_")]
    others = sorted(rest - set(kinds[0]) - set(kinds[1]))
    ordered = [*BASE_COLUMNS, *kinds[0], *kinds[1], *JSON_COLUMNS, *added, *others, "_source_file"]
    return [column for column in ordered if column in columns]


# ---- Rules for names --------------------------------------------------------------------------------------------


def check_regex(regex: str, where: str) -> str:
    """`regex`, with a group 1 around it when it has none. Raises `Stop` when it is no regular expression."""
    import polars as pl

    try:
        groups = pl.select(pl.lit("").str.extract_groups(f"(?i){regex}")).to_series().dtype
    except pl.exceptions.PolarsError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        what = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
        raise Stop(f"{where}: {regex!r} is no regular expression: {what}. Escape special characters with \\.") from None
    return regex if groups.fields else f"({regex})"


def read_rules(given: Sequence[str], file: str | None) -> dict[str, Rule]:
    """The patterns in force: the script's, or those of `--rules FILE`, with those of each `--rule NAME=REGEX` on top."""
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
        if contract_type(name) or name in ("protocol", ROW, FILE):
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
    import polars as pl

    own = [name for name in rules if name not in RULES]
    types: dict[str, pl.DataType] = {}
    if own:
        found = merged.select(parse(pl.col("name"), rules[name]).alias(name) for name in own).collect(
            engine="streaming"
        )
        number = f"^[+-]?{NUMBER}$"
        for name in own:
            values = found[name].drop_nulls()
            if len(values) and values.str.contains(f"(?i){number}").all():
                whole = values.cast(pl.Int64, strict=False).null_count() == 0
                types[name] = pl.Int64() if whole else pl.Float64()
    return types


# ---- Filters ----------------------------------------------------------------------------------------------------


def filters(args: argparse.Namespace) -> list[tuple[str, pl.Expr]]:
    """Each filter in force, in the order in which the summary counts them, as (option, Bool expression)."""
    import polars as pl

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
    import polars as pl

    try:
        pl.DataFrame(schema=schema).filter(pl.sql_expr(where))
    except pl.exceptions.ColumnNotFoundError as error:
        column = re.match(r'unable to find column "(.*?)"', str(error))
        name = column[1] if column else reason(error)
        raise Stop(f"--where {where!r}: there is no column {name}.{nearest(name, schema)}") from None
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {where!r}: {reason(error)}") from None


# ---- Choose the runs --------------------------------------------------------------------------------------------


def survey(merged: pl.LazyFrame, chosen: Sequence[tuple[str, pl.Expr]], rules: dict[str, Rule]) -> pl.DataFrame:
    """The few columns that decide which runs stay, and that the summary counts; a row per row of `merged`, in order.

    Out: `__file`, `__row`, `id`, `name`, `entity`, `project`, the summary's columns if there, `matched` (a
    pattern found something in the name) and one Bool per filter, `0`, `1`, ...
    """
    import polars as pl

    there = merged.collect_schema()
    columns = [c for c in (FILE, ROW, "id", "name", "entity", "project", "stage", "arch", "dataset") if c in there]
    found = [parse(pl.col("name"), rule).is_not_null() for rule in rules.values()]
    passed = [expr.fill_null(False).alias(str(number)) for number, (_, expr) in enumerate(chosen)]
    matched = pl.any_horizontal(found or [pl.lit(False)]).alias("matched")
    return merged.select(*columns, matched, *passed).collect(engine="streaming")


def newest_copies(rows: pl.DataFrame, exports: Sequence[Export]) -> pl.Series:
    """Bool per row: whether it is the run's copy from the newest export (the later row if one file has it twice)."""
    import polars as pl

    order = sorted(range(len(exports)), key=lambda number: (exports[number].exported_at, exports[number].path))
    age = pl.DataFrame({FILE: order, "age": range(len(order))}, schema={FILE: pl.Int32, "age": pl.Int32})
    key = [column for column in ("entity", "project", "id") if column in rows.columns]
    rank = pl.col("age").cast(pl.Int64) * 2**40 + pl.col(ROW).cast(pl.Int64)
    newest = (rank == rank.max().over(key)) | pl.col("id").is_null()
    return rows.join(age, on=FILE, how="left", maintain_order="left").select(newest).to_series()


def pick(merged_rows: pl.DataFrame, exports: Sequence[Export], types: dict[str, pl.DataType]) -> pl.LazyFrame:
    """The rows of `merged_rows` (columns `__file`, `__row`, `entity`, `project`) out of their files, lazily.

    Files follow one another by entity, project and time of export, whatever the order of the inputs; rows keep the
    file's order, which is oldest first. A file of which no row stays brings no columns.
    """
    import polars as pl

    place = [column for column in ("entity", "project") if column in merged_rows.columns]
    order = [pl.col(column).min().fill_null("").alias(column) for column in place]
    files = merged_rows.group_by(FILE).agg(*order, pl.col(ROW))

    def position(file: dict[str, object]) -> tuple[object, ...]:
        export = exports[file[FILE]]
        return (*(file[column] for column in place), export.exported_at, export.path)

    frames = []
    for file in sorted(files.iter_rows(named=True), key=position):
        frame = read_rows(exports[file[FILE]], types, file[FILE])
        frames.append(frame.filter(pl.col(ROW).is_in(pl.Series(file[ROW], dtype=pl.UInt32).implode())))
    return pl.concat(frames, how="diagonal")


def choose_columns(patterns: str | None, columns: Sequence[str]) -> list[str]:
    """The `columns` that the comma-separated globs name, in the globs' order; all without globs."""
    if patterns is None:
        return list(columns)
    chosen: dict[str, None] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = (
            fnmatch.filter(columns, pattern)
            if os.name != "nt"
            else [c for c in columns if fnmatch.fnmatchcase(c, pattern)]
        )
        if not matches:
            raise Stop(f"--columns: no column matches {pattern!r}.{nearest(pattern, columns)}")
        chosen |= dict.fromkeys(matches)
    return list(chosen)


# ---- Write ------------------------------------------------------------------------------------------------------


def check_output(target: str, partition: str | None, inputs: Iterable[str]) -> None:
    """Raise `Stop` when the output's suffix says no format, or when writing it would destroy an input or a folder."""
    suffix = Path(target).suffix
    if partition:
        if suffix not in ("", ".parquet"):
            raise Stop(f"-o {target}: --partition-by writes a folder of Parquet files. Give a folder's name.")
        if not is_remote(target) and Path(target).exists():
            entries = list(Path(target).iterdir()) if Path(target).is_dir() else [Path(target)]
            if foreign := [entry.name for entry in entries if not (entry.is_dir() and "=" in entry.name)]:
                raise Stop(
                    f"-o {target}: holds {foreign[0]}, which no earlier --partition-by wrote. Give another folder."
                )
    elif suffix not in (".parquet", ".csv", ".ndjson", ".arrow"):
        raise Stop(f"-o {target}: {suffix or 'no suffix'} is no format. End it in .parquet, .csv, .ndjson or .arrow.")
    elif Path(target).is_dir():
        raise Stop(f"-o {target}: is a folder. Give a file's name, or --partition-by.")
    if os.path.realpath(target) in {os.path.realpath(path) for path in inputs}:
        raise Stop(f"-o {target}: is one of the inputs. Give another name.")


def json_list(column: str) -> pl.Expr:
    """A list column as JSON text, for formats without lists."""
    import polars as pl

    return pl.struct(x=pl.col(column)).struct.json_encode().str.extract(r"^\{\"x\":(\[.*\])\}$", 1).alias(column)


def sink(frame: pl.LazyFrame, path: str, suffix: str, partition: str | None) -> None:
    """Stream `frame` to `path` in the format of `suffix`; with `partition` as a Hive-partitioned folder of Parquet."""
    import polars as pl

    if partition:
        target = pl.PartitionBy(path, key=partition, include_key=False)
        frame.sink_parquet(target, compression="zstd", row_group_size=ROW_GROUP, mkdir=True, engine="streaming")
    elif suffix == ".parquet":
        frame.sink_parquet(path, compression="zstd", row_group_size=ROW_GROUP, engine="streaming")
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
        return sink(frame, target, suffix, partition)
    final = Path(target)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    replaced = final.with_name(f".{final.name}.{os.getpid()}.old")
    try:
        sink(frame, str(beside), suffix, partition)
        if partition and final.exists():  # a folder with content cannot be replaced in one step
            final.rename(replaced)
        beside.replace(final)
    finally:
        for leftover in (beside, replaced):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            leftover.unlink(missing_ok=True)
    return None


# ---- Summary ----------------------------------------------------------------------------------------------------


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
        table.add_row(f"  {label}", f"-{count:,}")
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
            table.add_row(column, counted([f"{'-' if value is None else value} {n:,}" for value, n in ranked], 12))
    console.print(table)


def print_columns(console: Console, exports: Sequence[Export], changes: dict[str, str]) -> None:
    """Which columns stand in only some of the files, and which changed their type and why."""
    files = Counter(column for export in exports for column in export.schema)
    partial_columns = sorted(column for column, count in files.items() if count < len(exports))
    if partial_columns:
        console.print(
            f"{len(partial_columns):,} columns stand in only some files: {counted(partial_columns)}", soft_wrap=False
        )
    if changes:
        console.print(f"{len(changes):,} columns had different types (files each) and now have:")
        for column, why in sorted(changes.items())[:10]:
            console.print(f"  {column}: {why}")
        if len(changes) > 10:
            console.print(f"  and {len(changes) - 10:,} more")


# ---- Command line -----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` and every error here answer without Polars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        default=[DEFAULT_INPUT],
        help="runs files, folders, globs or s3:// addresses, in any mix (default: %(default)s)",
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
        help="finished, crashed, ...; repeat for any of several",
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


def read_exports(inputs: Sequence[str]) -> tuple[list[Export], int]:
    """The exports that `inputs` name, and how many of the inputs were unusable, each named on stderr.

    Raises `Stop` when nothing usable is left.
    """
    paths, history, missing = find_files(inputs)
    if history:
        say(f"left out {len(history)} history file{'s' * (len(history) > 1)}: {counted(history, 3)}")
    problems = [f"{given}: no such file, or nothing in it that ends in _runs.parquet" for given in missing]

    def attempt(path: str) -> Export | str:
        try:
            return read_export(path)
        except Stop as stop:
            return f"{path}: {stop}"

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(attempt, paths))
    problems += [result for result in results if isinstance(result, str)]
    exports = [result for result in results if isinstance(result, Export)]
    for problem in problems:
        say(f"skipped {problem}")
    if not exports:
        raise Stop("no export left to read. Make some with export_runs.py, or name files, folders or globs.")
    return exports, len(problems)


def main() -> int:
    """Read, choose, merge, write, and say what happened; returns the exit code."""
    args = parse_arguments()
    import polars as pl
    from rich.console import Console

    rules = read_rules(args.rule, args.rules)
    chosen = filters(args)
    exports, skipped = read_exports(args.inputs or [DEFAULT_INPUT])
    check_output(args.output, args.partition_by, (export.path for export in exports))
    types, changes = resolve_types(exports)
    merged = merge(exports, types)
    numbers = number_rules(merged, rules)

    def added(frame: pl.LazyFrame) -> pl.LazyFrame:
        """`frame` with the columns from names and config; with --no-enrich only `protocol`, which a filter needs."""
        wide = enrich(frame, rules).with_columns(pl.col(name).cast(dtype) for name, dtype in numbers.items())
        return wide.drop(set(rules) | set(RULES)) if args.no_enrich else wide

    frame = added(merged)
    if args.where:
        check_where(args.where, frame.collect_schema())
    rows = survey(frame, chosen, rules)

    newest = newest_copies(rows, exports)
    steps = [(f"runs in {len(exports):,} file{'s' * (len(exports) > 1)}", len(rows))]
    steps.append(("older copies of runs that a newer export holds", len(rows) - newest.sum()))
    stays = newest
    for number, (label, _) in enumerate(chosen):
        after = stays & rows[str(number)]
        steps.append((label, stays.sum() - after.sum()))
        stays = after
    kept = rows.filter(stays)

    console = Console(highlight=False, markup=False, soft_wrap=False)
    print_steps(console, steps, len(kept))
    if kept.is_empty():
        raise Stop(
            f"no run is left, so {args.output} was not written. The table above says which condition removed them.", 1
        )

    frame = added(pick(kept, exports, types))
    if args.no_enrich:
        frame = frame.drop("protocol")
    columns = choose_columns(args.columns, column_order(frame.collect_schema()))
    write(frame.select(columns), args.output, args.partition_by)

    print_values(console, kept)
    print_columns(console, exports, changes)
    unmatched = kept.filter(~pl.col("matched"))["name"]
    if len(unmatched):
        console.print(
            f"{len(unmatched):,} runs whose name matched no pattern: {counted([n or '-' for n in unmatched])}"
        )
    say(f"Saved {len(kept):,} runs, {len(columns):,} columns to {args.output}")
    return 1 if skipped else 0


if __name__ == "__main__":
    finish(main)
