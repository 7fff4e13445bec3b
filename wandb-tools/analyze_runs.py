#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "altair>=6,<7",
#     "polars>=2,<3",
#     "pyarrow>=26,<27",
#     "rich>=15,<16",
#     "vl-convert-python>=1.9,<2",
# ]
# ///
"""From exported W&B runs to the table, the picture and the claim in a paper.

Reads what export_runs.py or aggregate_runs.py wrote; needs neither of them, nor W&B, nor a network.

  uv run analyze_runs.py                                    the 10 best runs of the newest export in wandb_export/
  uv run analyze_runs.py --top 20 --metric test/mse         the 20 lowest of one metric
  uv run analyze_runs.py --group-by arch,k                  n, mean, std, min, median, max of each group
  uv run analyze_runs.py --pivot                            arch x dataset; --rows and --cols for other columns
  uv run analyze_runs.py data/*.parquet --pivot -o t.tex    the same as a LaTeX table, best of each column in bold
"""

from __future__ import annotations

import argparse
import difflib
import html
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import altair as alt
    import polars as pl

FOLDER = Path("wandb_export")  # where export_runs.py puts its files

# Without --metric, the first of these that has values: test/mse, test/loss, ..., val/mse, ..., and at last mse, ...
MEASURES = ("mse", "loss", "accuracy", "acc", "f1", "auroc", "auc", "mae", "rmse", "r2")
DEFAULT_METRICS = [split + measure for split in ("test/", "val/", "validation/", "eval/", "") for measure in MEASURES]

# Names of metrics where more is better; only hints and the direction of --best-by depend on it.
SCORE = re.compile(
    r"(?:^|_)(?:acc|accuracy|f1|auc|auroc|auprc|map|r2|precision|recall|iou|dice|bleu|psnr|ssim|reward|score)(?:_|\d|$)"
)

# Columns of a top list beside the name and the metric, from left to right, as long as there is room.
CONTEXT = ("arch", "dataset", "k", "lr", "wd", "seed", "project", "state")

ALIASES = {"architecture": "arch"}


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


# --- naming: the same in export_runs.py and analyze_runs.py ---
def column_name(key: str) -> str:
    """The column spelling of a W&B key: every character but letters, digits and `_` becomes `_`, one for one."""
    return re.sub(r"\W", "_", key)


# --- end naming ---


# --- run names: the same in aggregate_runs.py and analyze_runs.py ---
NUMBER = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)"
END = r"(?:[^a-z\d.]|\.\D|\.?$)"  # what may follow a number: nothing that would make it another number or a word
WORD = r"(?:^|\PL){}(?:\PL|$)"  # `ego` is no dataset in `lego`, but is one in `ego2` and `_ego_`
ARCHS = (
    "gnn_all gnn_qk gnn_v filter_bank linear_pe self_attention_mlp multilayer_self_attention self_attention "
    "digress_transformer digress_default asymmetric spectral_linear spectral mlp linear digress"
)
DATASETS = "pyg_enzymes pyg_proteins ring_of_cliques ego community grid sbm_small sbm tree regular"

# How this lab names its runs: column -> a regular expression whose group 1 is the value, or a table value -> regular
# expression, most specific first, of which the first that is found stands. Case never matters; searched anywhere.
RULES: dict[str, str | dict[str, str]] = {
    "stage": r"(stage[0-9]+[a-z]?)",
    "arch": {arch: WORD.format(arch) for arch in ARCHS.split()},
    # Searched in the class path of the config, then in the name, then in the arch. `hybrid` stands first because a
    # hybrid's name holds its parts; the whole words after `|` are the archs whose own name does not say the family.
    "model_type": {
        "hybrid": "hybrid",
        "spectral": "spectral|^(?:filter_bank|linear_pe|asymmetric)$",
        "digress": "digress",
        "gnn": "gnn",
        "attention": "attention",
    },
    "dataset": {dataset: WORD.format(dataset) for dataset in DATASETS.split()},
    "k": "_k([0-9]+)" + END,
    "lr_parsed": "_lr" + NUMBER + END,
    "wd_parsed": "_wd" + NUMBER + END,
    "seed_parsed": "_s([0-9]+)" + END,
    "eps_parsed": "_eps" + NUMBER + END,
    "asymmetric_flag": "(asymmetric)",
    "pearl_flag": "(pearl)",
}


def parse(text: pl.Expr, rule: str | dict[str, str]) -> pl.Expr:
    """What a rule of `RULES` finds in `text`, a String expression: a String, null where it finds nothing."""
    import polars as pl

    if isinstance(rule, str):
        return text.str.extract(f"(?i){rule}", 1)
    found = [pl.when(text.str.contains(f"(?i){regex}")).then(pl.lit(value)) for value, regex in rule.items()]
    return pl.coalesce(found or [pl.lit(None, pl.String)])


def enrich(frame: pl.LazyFrame, rules: dict[str, str | dict[str, str]] = RULES) -> pl.LazyFrame:
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
        return pl.coalesce([pl.when(value != "").then(value) for value in there] or [pl.lit(None, pl.String)])

    rules = {column: rules.get(column, {}) for column in RULES} | rules
    name, target = text("name"), text("config_model__target_", "config_model_target")
    added = {column: parse(name, rule) for column, rule in rules.items()}
    same_graph = text("config_data_same_graph_all_splits").str.to_lowercase().is_in(["true", "1"])
    single_graph = same_graph.fill_null(False) | text("config_data__target_").str.contains("SingleGraph").fill_null(
        False
    )
    protocol = pl.when(single_graph).then(pl.lit("single_graph")).otherwise(pl.lit("distribution"))
    added["stage"] = added["stage"].str.to_lowercase()
    added["arch"] = pl.coalesce(added["arch"], text("config_model_type"))
    added["model_type"] = pl.coalesce([parse(t, rules["model_type"]) for t in (target, name, added["arch"])])
    config = ("data_dataset_name", "dataset_name", "data_graph_type", "graph_type")
    added["dataset"] = pl.coalesce(text(*(f"config_{key}" for key in config)), added["dataset"])
    for column in ("k", "seed_parsed"):
        added[column] = added[column].cast(pl.Int64, strict=False)
    for column in ("lr_parsed", "wd_parsed", "eps_parsed"):
        added[column] = added[column].cast(pl.Float64, strict=False)
    for column in ("asymmetric_flag", "pearl_flag"):
        added[column] = added[column].is_not_null()
    return frame.with_columns(**{c: e for c, e in {"protocol": protocol, **added}.items() if c not in schema})


# --- end run names ---


# What a question is asked of, and what answers it ---------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Runs to ask about: `frame` has one row per run that passed the filters, and is scanned anew by every question."""

    frame: pl.LazyFrame
    schema: dict[str, pl.DataType]
    keys: dict[str, str]  # column -> its key as W&B spells it
    files: list[Path]


@dataclass(frozen=True)
class Column:
    """A column of a shown table: the frame's `value`, or `value ± std (n=n)` of three columns of the frame."""

    title: str
    value: str
    std: str | None = None
    n: str | None = None
    best: str | None = None  # "min" or "max": mark the best row
    key: bool = False  # says which row this is: always shown


@dataclass(frozen=True)
class Answer:
    """A small frame at full precision, how it is shown, the runs behind it for a picture, and what must be said."""

    title: str
    frame: pl.DataFrame
    columns: list[Column]
    notes: list[str] = field(default_factory=list)  # results in words: printed below the table
    draw: Callable[[], alt.TopLevelMixin] | None = None


# Input: which files, which columns, which runs ------------------------------------------------------------------------


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The Parquet files of runs that `inputs` (files, folders, globs) name; with none, the newest of `FOLDER`."""
    if not inputs:
        found = sorted(FOLDER.glob("*_runs.parquet"), key=lambda path: path.stat().st_mtime, reverse=True)
        if not found:
            raise Stop(f"no *_runs.parquet in {FOLDER}/. Export runs first (export_runs.py), or name a file.")
        say(f"Reading {found[0]}, the newest of {len(found)}" if found[1:] else f"Reading {found[0]}")
        for other in found[1:]:
            say(f"  not read: {other}")
        return found[:1]
    files: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*_runs.parquet"))
            if not found:
                raise Stop(f"no *_runs.parquet in the folder {text}. Export runs into it, or name a file.")
        elif path.is_file():
            found = [path]
        else:
            base = Path(path.anchor or ".")
            pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
            found = sorted(p for p in base.glob(pattern) if p.is_file()) if re.search(r"[*?\[]", text) else []
            kept = [p for p in found if not p.name.endswith("_history.parquet")]
            if found and not kept:
                raise Stop(f"{text} matches history files only. Name files of runs; --curves finds their history.")
            found = kept
            if not found:
                near = nearest(
                    path.name, (p.name for p in path.parent.glob("*.parquet")) if path.parent.is_dir() else ()
                )
                raise Stop(f"no such file or folder: {text}.{near}")
        files += found
    return list(dict.fromkeys(files))


def scan(path: Path) -> tuple[pl.LazyFrame, pl.Schema]:
    """Scan one file of runs, with the columns parsed from names if aggregate_runs.py did not add them already."""
    import polars as pl

    try:
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise Stop(f"{path} is no Parquet file that can be read: {first_line(error)}.") from None
    if "run_id" in schema and "_step" in schema:
        raise Stop(f"{path} is a history file. Name the file of runs beside it; --curves finds the history.")
    if "name" not in schema:
        raise Stop(f"{path} has no column `name`: it is no file of runs, as export_runs.py writes them.")
    if "_source_file" not in schema:
        frame = enrich(frame)
        schema = frame.collect_schema()
    return frame, schema


def common_type(types: set[pl.DataType]) -> pl.DataType:
    """The type that keeps every value of columns of `types`: theirs if equal, Float64 for numbers, else String."""
    import polars as pl

    types = types - {pl.Null()}
    if len(types) <= 1:
        return next(iter(types), pl.Null())
    return pl.Float64() if all(t.is_numeric() for t in types) else pl.String()


def read(files: list[Path]) -> Runs:
    """Scan `files` as one frame: columns by name, types aligned, a run that stands in several files once.

    Where several files hold a run (entity, project, id), the newest file has the say.
    """
    import polars as pl

    if files[1:]:
        files = sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)
    scans = [scan(path) for path in files]
    types: dict[str, set[pl.DataType]] = {}
    for _, schema in scans:
        for column, dtype in schema.items():
            types.setdefault(column, set()).add(dtype)
    target = {column: common_type(found) for column, found in types.items()}
    aligned = [
        frame.with_columns(pl.col(c).cast(target[c]) for c, dtype in schema.items() if dtype != target[c])
        for frame, schema in scans
    ]
    frame = aligned[0]
    if aligned[1:]:
        frame = pl.concat(aligned, how="diagonal")
        identity = [c for c in ("entity", "project", "id") if c in target]
        if "id" in identity:
            total, distinct = frame.select(pl.len(), pl.struct(identity).n_unique().alias("n")).collect().row(0)
            if distinct < total:
                say(f"{total - distinct} of {total} runs stand in several files; each counts once.")
                frame = frame.unique(identity, keep="first", maintain_order=True)
    return Runs(frame, target, read_keys(files), files)


def read_keys(files: list[Path]) -> dict[str, str]:
    """Column -> W&B key, from the `_metadata.json` beside each file, or all of its folder for an aggregated file."""
    keys: dict[str, str] = {}
    for path in files:
        own = path.with_name(path.name.removesuffix("_runs.parquet") + "_metadata.json")
        for beside in [own] if own.exists() else sorted(path.parent.glob("*_metadata.json")):
            try:
                found = json.loads(beside.read_text(encoding="utf-8")).get("columns", {})
            except (OSError, ValueError, AttributeError) as error:
                say(f"warning: {beside} cannot be read ({first_line(error)}); keys cannot be named as W&B spells them.")
                continue
            keys = found | keys
    return keys


def first_line(error: Exception) -> str:
    """The first line of an error's message; Polars appends query plans."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def unknown(word: str, names: Iterable[str], what: str) -> Stop:
    """The error for a column that does not exist, with the nearest names, compared with and without their prefix."""
    short = {re.sub(r"^(?:config|metric)_", "", name): name for name in names}
    part = column_name(word).lower()
    near = nearest(word, short.values()) or nearest(word, short)
    holding = [name for name in short.values() if part in name.lower()][:3]
    if holding and not near:
        near = f" Did you mean {' or '.join(holding)}?"
    return Stop(f"there is no {what} {word!r}.{near} --schema lists the columns, --schema --match TEXT some of them.")


def resolve(word: str, runs: Runs) -> str:
    """The column that `word` means: its own name, W&B's key, or a name without `config_`, `metric_`, `_parsed`."""
    word = word.strip()
    spelled = column_name(ALIASES.get(word, word))
    by_key = [c for c, key in runs.keys.items() if key == word]
    for candidate in (word, *by_key, spelled, f"config_{spelled}", f"{spelled}_parsed", f"metric_{spelled}"):
        if candidate in runs.schema:
            return candidate
    raise unknown(word, runs.schema, "column")


def resolve_metric(word: str, runs: Runs) -> str:
    """The column of numbers that `word` means: `metric_test_mse`, `test_mse` and `test/mse` are one."""
    word = word.strip()
    by_key = [c for c, key in runs.keys.items() if key == word and c.startswith("metric_")]
    for candidate in (*by_key, word, f"metric_{column_name(word)}", column_name(word)):
        if candidate in runs.schema:
            if not runs.schema[candidate].is_numeric():
                raise Stop(f"{candidate} holds {runs.schema[candidate]}, not numbers. Choose a metric.")
            return candidate
    raise unknown(word, [c for c in runs.schema if c.startswith("metric_")], "metric")


def resolve_all(words: str, runs: Runs) -> list[str]:
    """The columns of a comma-separated list, each once."""
    return list(dict.fromkeys(resolve(word, runs) for word in words.split(",") if word.strip()))


def condition(text: str, runs: Runs) -> pl.Expr:
    """The Polars SQL condition of --where; its columns must exist."""
    import polars as pl

    try:
        expression = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {text!r} is no SQL condition: {first_line(error)}.") from None
    for name in expression.meta.root_names():
        if name not in runs.schema and name not in ALIASES:
            raise unknown(name, runs.schema, "column")
    return expression


def keep(runs: Runs, args: argparse.Namespace) -> Runs:
    """The runs that pass --filter, --project, --protocol, --where and --state; says what the state removed."""
    import polars as pl

    frame = runs.frame
    aliased = {new: pl.col(old) for new, old in ALIASES.items() if old in runs.schema and new not in runs.schema}
    if args.where and any(alias in args.where for alias in aliased):
        frame = frame.with_columns(**aliased)
    for option, column in (("filter", "name"), ("project", "project")):
        if regex := getattr(args, option):
            try:
                pl.Series([""]).str.contains(f"(?i){regex}")
            except pl.exceptions.PolarsError as error:
                reason = str(error).split("error: ")[-1].splitlines()[0]
                raise Stop(f"--{option} {regex!r} is no regular expression: {reason}.") from None
            frame = frame.filter(pl.col(column).str.contains(f"(?i){regex}"))
    if args.protocol:
        frame = frame.filter(pl.col("protocol") == args.protocol)
    if args.where:
        frame = frame.filter(condition(args.where, runs))
    states = [state.strip().lower() for state in args.state.split(",")]
    try:
        if "state" in runs.schema:
            found = dict(frame.group_by("state").len().sort("len", "state", descending=[True, False]).collect().rows())
        else:
            found = {"finished": frame.select(pl.len()).collect().item()}
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {args.where!r} does not work on these columns: {first_line(error)}.") from None
    total = sum(found.values())
    if not total:
        raise Stop("no run matches these filters. Loosen --filter, --project, --protocol or --where.", 1)
    if states != ["all"] and "state" in runs.schema:
        others = {state: n for state, n in found.items() if state not in states}
        listed = ", ".join(f"{n} {state or 'of unknown state'}" for state, n in others.items())
        if sum(others.values()) == total:
            raise Stop(f"none of {total} runs is {' or '.join(states)}: {listed}. --state all takes every run.", 1)
        if others:
            say(f"{sum(others.values())} of {total} runs left out by state: {listed} (--state all keeps them)")
        frame = frame.filter(pl.col("state").is_in(states))
    return Runs(frame, runs.schema, runs.keys, runs.files)


def take(runs: Runs, columns: Iterable[str]) -> pl.DataFrame:
    """Read just these columns of the runs; lists (tags) become text, so that they can be grouped and saved."""
    import polars as pl

    wanted = list(dict.fromkeys(columns))
    lists = [c for c in wanted if isinstance(runs.schema[c], pl.List)]
    return runs.frame.select(wanted).with_columns(pl.col(c).list.join(",") for c in lists).collect()


# Metrics: which one, and which of its values count -------------------------------------------------------------------


def default_metric(runs: Runs) -> str:
    """The first of `DEFAULT_METRICS` that has a finite value in these runs."""
    import polars as pl

    names = {key: f"metric_{column_name(key)}" for key in DEFAULT_METRICS}
    there = list(dict.fromkeys(c for c in names.values() if c in runs.schema))
    if there:
        counts = runs.frame.select(pl.col(c).is_finite().sum() for c in there).collect().row(0)
        for column, count in zip(there, counts, strict=True):
            if count:
                say(f"Metric: {column} (--metric chooses another)")
                return column
    raise Stop(
        "none of the common metrics (test/mse, test/loss, test/accuracy, val/loss, ...) has values here. "
        "Name one with --metric; --schema --match metric_ lists them."
    )


def finite(column: str) -> pl.Expr:
    """The column as Float64 with null for NaN and the infinities: a diverged run has none to average."""
    import polars as pl

    value = pl.col(column).cast(pl.Float64)
    return pl.when(value.is_finite()).then(value).alias(column)


def say_unusable(points: pl.DataFrame, metrics: Iterable[str]) -> None:
    """Say how many runs have no number in a metric, NaN or an infinity; they are in no mean and in no ranking."""
    import polars as pl

    for metric in metrics:
        value = pl.col(metric).cast(pl.Float64)
        missing, nan, infinite = points.select(
            a=value.is_null().sum(), b=value.is_nan().sum(), c=value.is_infinite().sum()
        ).row(0)
        if missing + nan + infinite == points.height:
            raise Stop(f"{metric} has no finite value in these {points.height} runs. Choose another --metric.", 1)
        counts = [(missing, "without a value"), (nan, "NaN"), (infinite, "infinite")]
        if parts := [f"{n} {word}" for n, word in counts if n]:
            say(f"{metric}: of {points.height} runs {', '.join(parts)}; left out")


def hint_direction(metric: str, descending: bool) -> None:
    """A hint when the metric's name looks like a score and the lowest would win."""
    if SCORE.search(metric.lower()) and not descending:
        say(f"hint: {metric} looks like a score where more is better; --descending ranks the highest first")


def short(column: str) -> str:
    """A column's name as a heading."""
    return re.sub(r"^(?:config|metric)_|_parsed$", "", column)


# Top runs -------------------------------------------------------------------------------------------------------------


def top(runs: Runs, metrics: list[str], n: int, descending: bool) -> Answer:
    """The `n` best runs by `metrics[0]`: name, metrics, what is known of the configuration, id and url."""
    import polars as pl

    context = []
    for word in CONTEXT:
        try:
            context.append(resolve(word, runs))
        except Stop:
            continue  # this export does not know the word, which is no error: nobody asked for it
    extra = [c for c in ("id", "url") if c in runs.schema]
    points = take(runs, ["name", *metrics, *context, *extra])
    say_unusable(points, metrics[:1])
    order = points.with_columns(finite(metrics[0])).filter(pl.col(metrics[0]).is_not_null())
    order = order.sort(metrics[0], descending=descending, maintain_order=True).head(n).with_row_index("#", offset=1)
    shown = [
        c
        for c in context
        if order[c].null_count() < order.height and (c not in ("project", "state") or points[c].n_unique() > 1)
    ]
    best = "max" if descending else "min"
    return Answer(
        f"Top {order.height} of {points.height} runs by {metrics[0]} ({'highest' if descending else 'lowest'} first)",
        order.select("#", "name", *metrics, *shown, *extra),
        [
            Column("#", "#", key=True),
            Column("name", "name", key=True),
            *(Column(short(m), m, best=best if i == 0 else None, key=i == 0) for i, m in enumerate(metrics)),
            *(Column(short(c), c) for c in shown),
        ],
    )


# Groups and pivot -----------------------------------------------------------------------------------------------------


def summary(metric: str, prefix: str = "") -> list[pl.Expr]:
    """n, mean, sample std, min, median and max of the finite values of `metric`, as `{prefix}n`, `{prefix}mean`, ..."""

    value = finite(metric)
    statistics = {
        "n": value.count(),
        "mean": value.mean(),
        "std": value.std(),
        "min": value.min(),
        "median": value.median(),
        "max": value.max(),
    }
    return [expression.alias(f"{prefix}{name}") for name, expression in statistics.items()]


def group(runs: Runs, by: list[str], metrics: list[str], descending: bool) -> Answer:
    """One row per group, best mean of `metrics[0]` first: statistics of one metric, or several metrics side by side."""
    import polars as pl

    points = take(runs, [*by, *metrics])
    say_unusable(points, metrics)
    best = "max" if descending else "min"
    keys = [Column(short(c), c, key=True) for c in by]
    one = len(metrics) == 1
    prefixes = [""] if one else [f"{m}_" for m in metrics]
    expressions = [e for m, p in zip(metrics, prefixes, strict=True) for e in summary(m, p)]
    frame = points.group_by(by, maintain_order=True).agg(pl.len().alias("runs"), *expressions)
    frame = frame.sort(f"{prefixes[0]}mean", descending=descending, nulls_last=True, maintain_order=True)
    order = "highest" if descending else "lowest"
    if one:
        names = ["n", "mean", "std", "min", "median", "max"]
        columns = keys + [Column(n, n, best=best if n == "mean" else None, key=n == "mean") for n in names]
        title = f"{metrics[0]} by {', '.join(map(short, by))} ({order} mean first)"
    else:
        columns = keys + [
            Column(short(m), f"{p}mean", f"{p}std", f"{p}n", best if i == 0 else None, key=i == 0)
            for i, (m, p) in enumerate(zip(metrics, prefixes, strict=True))
        ]
        title = f"{len(metrics)} metrics by {', '.join(map(short, by))} ({order} mean of {metrics[0]} first)"
    return Answer(title, frame, columns)


def label(columns: list[str]) -> pl.Expr:
    """One text for the values of several columns: `a / b`, null as `-`."""
    import polars as pl

    return pl.concat_str([pl.col(c).cast(pl.String).fill_null("-") for c in columns], separator=" / ")


def pivot(runs: Runs, rows: list[str], cols: list[str], metric: str, descending: bool) -> Answer:
    """Mean, std and n of `metric` in each cell; one row per row group, three columns per column group."""
    import polars as pl

    points = take(runs, [*rows, *cols, metric])
    say_unusable(points, [metric])
    cells = points.group_by(*rows, label(cols).alias("_column")).agg(summary(metric)[:3]).filter(pl.col("n") > 0)
    names = sorted(cells["_column"].unique())
    frame = cells.select(rows).unique().sort(rows, nulls_last=True)
    for name in names:
        cell = cells.filter(pl.col("_column") == name)
        cell = cell.select(*rows, *(pl.col(s).alias(f"{name}_{s}") for s in ("mean", "std", "n")))
        frame = frame.join(cell, on=rows, how="left", nulls_equal=True, maintain_order="left")
    best = "max" if descending else "min"
    return Answer(
        f"{metric}: {', '.join(map(short, rows))} x {', '.join(map(short, cols))}, mean ± std (n)"
        f" ({'highest' if descending else 'lowest'} of each column marked *)",
        frame,
        [Column(short(r), r, key=True) for r in rows]
        + [Column(name, f"{name}_mean", f"{name}_std", f"{name}_n", best) for name in names],
    )


# An answer becomes text, a file or a picture ------------------------------------------------------------------------


GAP = 2  # between two columns
MORE_ROOM = "A wider terminal (COLUMNS=160) or -o FILE shows all."


def left_aligned(answer: Answer, column: Column) -> bool:
    """Whether the column holds words, not numbers."""
    import polars as pl

    return answer.frame[column.value].dtype in (pl.String, pl.Boolean)


def number(value: object) -> str:
    """A value as a cell: 4 significant digits, null as `-`, no line breaks or control characters."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e6:
            return f"{value:.0f}"
        return f"{value:.4g}"
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(value))


def cells(answer: Answer, column: Column) -> tuple[list[str], list[bool]]:
    """The texts of a shown column, and which of them are its best."""
    values = answer.frame[column.value].to_list()
    texts = [number(value) for value in values]
    if column.std and column.n:
        spread = zip(texts, answer.frame[column.std], answer.frame[column.n], strict=True)
        texts = [
            "-" if text == "-" else f"{text} (n={n})" if std is None else f"{text} ± {number(std)} (n={n})"
            for text, std, n in spread
        ]
    best = None
    if column.best and any(v is not None for v in values):
        best = {"min": min, "max": max}[column.best](v for v in values if v is not None)
    return texts, [best is not None and value == best for value in values]


def cut(text: str, width: int) -> str:
    """`text` in at most `width` characters, its middle replaced by `…`: names differ at both ends."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return set_cell_size(text, width - 1 - tail).rstrip() + "…" + text[-tail:] if tail else text[:width]


def fit(answer: Answer, texts: dict[Column, list[str]], width: int) -> tuple[dict[Column, list[str]], list[str]]:
    """The columns that `width` characters have room for, with their texts, and notes on what was cut or left out."""
    from rich.cells import cell_len

    widths = {c: max(map(cell_len, [number(c.title), *texts[c]])) + GAP for c in answer.columns}
    shown = {c: texts[c] for c in answer.columns if c.key}
    notes = []
    for column in sorted(shown, key=lambda c: -widths[c]):
        over = sum(widths[c] for c in shown) - width
        if over > 0 and left_aligned(answer, column):
            widths[column] = max(20 + GAP, widths[column] - over)
            shown[column] = [cut(text, widths[column] - GAP) for text in texts[column]]
            notes.append(f"Long texts in {column.title!r} are cut where … stands. {MORE_ROOM}")
    others = [c for c in answer.columns if not c.key]
    while others and sum(widths[c] for c in shown) + widths[others[0]] <= width:
        shown[others[0]] = texts[others[0]]
        others.pop(0)
    if others:
        listed = ", ".join(number(c.title) for c in others[:8]) + (", ..." if others[8:] else "")
        do = "1 more column does" if len(others) == 1 else f"{len(others)} more columns do"
        notes.append(f"{do} not fit in {width} characters: {listed}. {MORE_ROOM}")
    return {c: shown[c] for c in answer.columns if c in shown}, notes


def print_answer(answer: Answer) -> None:
    """Print title, table and notes to stdout, as wide as the terminal; what does not fit is named, never squeezed."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False, emoji=False)
    made = {column: cells(answer, column) for column in answer.columns}
    # Colour alone would be lost in a pipe. A column that the table is sorted by needs no mark: its best stands on top.
    texts = {
        c: texts if c.key else [f"* {text}" if best else text for text, best in zip(texts, bests, strict=True)]
        for c, (texts, bests) in made.items()
    }
    shown, notes = fit(answer, texts, console.width)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column, values in shown.items():
        table.add_column(
            Text(number(column.title)),
            justify="left" if left_aligned(answer, column) else "right",
            min_width=max(map(len, values), default=0),
            no_wrap=True,
        )
    for i in range(answer.frame.height):
        table.add_row(*(Text(v[i], "bold green" if made[c][1][i] else "") for c, v in shown.items()))
    console.print(Text(answer.title, "bold"))
    console.print(table, soft_wrap=True)
    for note in [*answer.notes, *notes]:
        console.print(Text(note))


def plain(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with nested columns as JSON text, which CSV can hold."""
    import polars as pl

    nested = [c for c, dtype in frame.schema.items() if dtype.is_nested()]
    return frame.with_columns(pl.Series(c, [json.dumps(v, default=str) for v in frame[c].to_list()]) for c in nested)


def as_markdown(answer: Answer) -> str:
    """The shown table for a README; the best in bold."""

    def escaped(text: str) -> str:
        return (
            text.replace("\\", "\\\\").replace("|", "\\|").replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")
        )

    left = [left_aligned(answer, c) for c in answer.columns]
    made = [cells(answer, column) for column in answer.columns]
    body = [[f"**{escaped(t)}**" if b else escaped(t) for t, b in zip(*m, strict=True)] for m in made]
    lines = [[escaped(number(c.title)) for c in answer.columns], ["---" if is_left else "---:" for is_left in left]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*lines, *zip(*body, strict=True)])


def as_latex(answer: Answer) -> str:
    """The shown table for a paper, with booktabs; the best in bold."""

    special = {c: f"\\{c}" for c in "_%&#${}"} | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    special |= {"±": r"$\pm$", "…": r"\dots{}", "×": r"$\times$"}

    def escaped(text: str) -> str:
        text = "".join(special.get(character, character) for character in text)
        return re.sub(
            r"(?<![\w.])(-?\d+(?:\.\d+)?)e([+-])0*(\d+)",
            lambda m: f"${m[1]} \\times 10^{{{m[2].strip('+')}{m[3]}}}$",
            text,
        )

    made = [cells(answer, column) for column in answer.columns]
    body = [
        [f"\\textbf{{{escaped(t)}}}" if b else "--" if t == "-" else escaped(t) for t, b in zip(*m, strict=True)]
        for m in made
    ]
    align = "".join("l" if left_aligned(answer, c) else "r" for c in answer.columns)
    rows = [" & ".join(row) + r" \\" for row in zip(*body, strict=True)]
    head = " & ".join(escaped(number(c.title)) for c in answer.columns) + r" \\"
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{align}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def as_html(answer: Answer) -> str:
    """The shown table as a page of its own; the best in bold, the full number under the pointer."""
    made = [cells(answer, column) for column in answer.columns]
    left = ["" if left_aligned(answer, c) else ' class="n"' for c in answer.columns]
    head = "".join(f"<th{a}>{html.escape(number(c.title))}</th>" for a, c in zip(left, answer.columns, strict=True))
    rows = []
    for i in range(answer.frame.height):
        row = ""
        for a, column, (texts, best) in zip(left, answer.columns, made, strict=True):
            text = html.escape(texts[i])
            full = html.escape(str(answer.frame[column.value][i]), quote=True)
            row += f'<td{a} title="{full}">{f"<b>{text}</b>" if best[i] else text}</td>'
        rows.append(f"<tr>{row}</tr>")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in answer.notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(answer.title)}</title><style>'
        "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{padding:.3em .8em;text-align:left;border-bottom:1px solid #ddd}.n{text-align:right}</style>"
        f"<h3>{html.escape(answer.title)}</h3><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}</html>\n"
    )


def write(path: Path, content: Callable[[Path], object]) -> None:
    """Let `content` write a file beside `path`, then put it in its place: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        content(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    say(f"Saved {path}")


TYPESET = {".md": as_markdown, ".tex": as_latex, ".html": as_html}
SAVED = (".csv", ".parquet", ".json", *TYPESET)
DRAWN = (".html", ".png", ".svg", ".pdf")


def save(answer: Answer, path: Path) -> None:
    """Save by suffix: data at full precision (.csv, .parquet, .json), or the shown table (.md, .tex, .html)."""
    suffix = path.suffix.lower()
    if suffix in TYPESET:
        write(path, lambda beside: beside.write_text(TYPESET[suffix](answer), encoding="utf-8"))
    elif suffix == ".csv":
        write(path, plain(answer.frame).write_csv)
    else:
        write(path, answer.frame.write_json if suffix == ".json" else answer.frame.write_parquet)


# The command ----------------------------------------------------------------------------------------------------------


def file_of(suffixes: Sequence[str]) -> Callable[[str], Path]:
    """An argument type: a path that ends in one of `suffixes`."""

    def path(text: str) -> Path:
        found = Path(text).expanduser()
        if found.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {' '.join(suffixes)}")
        return found

    return path


def positive(text: str) -> int:
    """An argument type: a whole number above 0."""
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options, by question."""
    description, _, examples = (__doc__ or "").partition("\n\n  uv run")
    made = argparse.ArgumentParser(
        prog="analyze_runs.py",
        description=description,
        epilog=f"examples:\n  uv run{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "input",
        nargs="*",
        metavar="FILE",
        help=f"Parquet files, folders or globs; default: the newest *_runs.parquet in {FOLDER}/",
    )
    which = made.add_argument_group("which runs")
    which.add_argument("-f", "--filter", metavar="REGEX", help="name matches, any case, anywhere in it")
    which.add_argument("--project", metavar="REGEX", help="project matches, likewise")
    which.add_argument("--protocol", choices=("distribution", "single_graph"))
    which.add_argument("--state", default="finished", metavar="STATE,..", help="states, or all (default: finished)")
    which.add_argument("--where", metavar="SQL", help="a condition, such as 'k >= 16 AND metric_test_mse < 0.5'")
    metric = made.add_argument_group("which metric")
    metric.add_argument(
        "-m",
        "--metric",
        metavar="NAME",
        help="metric_test_mse, test_mse and test/mse are one; default: a common test metric",
    )
    metric.add_argument("--metrics", metavar="A,B,..", help="several side by side; the first one orders")
    metric.add_argument("--descending", action="store_true", help="the highest is the best (accuracies)")
    question = made.add_argument_group("which question (default: --top 10)")
    question.add_argument(
        "-n", "--top", type=positive, metavar="N", help="the N best runs; with another question its first N rows"
    )
    question.add_argument("-g", "--group-by", metavar="A,B,..", help="n, mean, std, min, median, max of each group")
    question.add_argument(
        "--pivot", action="store_true", help="mean ± std (n) for each arch (rows) and dataset (columns)"
    )
    question.add_argument("--rows", metavar="A,B,..", help="other rows for --pivot (default: arch)")
    question.add_argument("--cols", metavar="A,B,..", help="other columns for --pivot (default: dataset)")
    out = made.add_argument_group("where to")
    out.add_argument(
        "-o", "--output", type=file_of(SAVED), metavar="FILE", help=f"save what is shown, by suffix: {' '.join(SAVED)}"
    )
    out.add_argument("--json", action="store_true", help="print it as JSON instead of a table")
    return made


def answer_to(args: argparse.Namespace, runs: Runs) -> Answer:
    """The answer to the question that the options ask."""
    metrics = [resolve_metric(m, runs) for m in [args.metric or "", *(args.metrics or "").split(",")] if m.strip()]
    metrics = list(dict.fromkeys(metrics)) or [default_metric(runs)]
    hint_direction(metrics[0], args.descending)
    if args.pivot or args.rows or args.cols:
        rows, cols = resolve_all(args.rows or "arch", runs), resolve_all(args.cols or "dataset", runs)
        return pivot(runs, rows, cols, metrics[0], args.descending)
    if args.group_by:
        return group(runs, resolve_all(args.group_by, runs), metrics, args.descending)
    return top(runs, metrics, args.top or 10, args.descending)


def main() -> int:
    """Parse the arguments, answer one question, print, save or draw the answer; returns the exit code."""
    args = parser().parse_args()
    runs = read(find_files(args.input))
    if args.output and args.output.resolve() in [path.resolve() for path in runs.files]:
        raise Stop(f"{args.output} is read from, and would be overwritten. Choose another -o.")
    answer = answer_to(args, keep(runs, args))
    if args.json:
        print(answer.frame.write_json())
    else:
        print_answer(answer)
    if args.output:
        save(answer, args.output)
    return 0


if __name__ == "__main__":
    finish(main)
