#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "altair>=6,<7",
#     "polars>=2,<3",
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
  uv run analyze_runs.py --best-by val/loss -m test/mse     the honest comparison: choose by one, report the other
  uv run analyze_runs.py --curves val/loss -g arch -p c.html    learning curves, mean and band over seeds
  uv run analyze_runs.py -m test/mse --report report.html   all of these on one page, to look at and to mail
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import difflib
import fnmatch
import functools
import glob
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import altair as alt
    import polars as pl
    import vl_convert

    Frames = dict[str, pl.DataFrame]  # by panel

FOLDER = Path("wandb_export")  # where export_runs.py puts its files

# Without --metric, the first of these that has values: test/mse, test/loss, ..., val/mse, ..., and at last mse, ...
MEASURES = ("mse", "loss", "accuracy", "acc", "f1", "auroc", "auc", "mae", "rmse", "r2")
DEFAULT_METRICS = [split + measure for split in ("test/", "val/", "validation/", "eval/", "") for measure in MEASURES]

# Words of metric names that say whether more is better or less. The last one in a name decides: `acc_loss` is an error.
DIRECTION = re.compile(
    r"(?:^|_)(?:(?P<score>acc|accuracy|f1|auc|auroc|auprc|map|r2|precision|recall|iou|dice|bleu|rouge|psnr|ssim|reward|"
    r"return|score|validity|uniqueness|novelty|ndcg|mrr|hits?)|(?P<error>[a-z]*(?:loss|losses|mse|mae|errors?|nll|"
    r"perplexity)|err|ppl|wer|cer|fid|mmd))(?=_|\d|$)"
)

# Config keys, in the spelling of columns, that name a run: ids, hosts, dates, folders, commits, jobs, loggers. Unless,
# as SOURCE has it, they name what the run started from.
LABEL = re.compile(
    r"(?:.*_)?(?:(?:uuid|guid|pid|host|hostname|date|datetime|timestamp|commit|sha|git|slurm|wandb|logger|mlflow|"
    r"tensorboard)(?:_.*)?|(?:run|job|trial|display)_?(?:name|number|num|no)|(?:run|job|trial|exp)?id|job|folder|paths?|"
    r"(?:out|log|save|work|run|sub)?dir|file|filename|node|node_?name|nodelist|machine|port|user|username|command|cmd|cwd|"
    r"(?:start|end|launch)_?time|(?:created|started|launched)(?:_at|_on)?|(?:local|global|node)_rank|master_addr)|name"
)
SOURCE = re.compile(
    r"(?:.*_)?(?:data|datasets?|train|valid|val|test|model|pretrained|init|teacher|tokenizer|vocab|config|cfg|env|fold|"
    r"split|subject|domain|layer)_(?:name_or_)?(?:id|dir|folder|paths?|file|filename)"
)

# Columns that say what is to be solved, not how: choosing among their values is choosing the easiest.
TASK = re.compile(
    r"^(?:dataset|protocol|eps_parsed)$|^config_(?:data_)?(?:dataset|graph_type|noise)|"
    r"^config_(?:env(?:_id|_name)?|data_(?:dir|path|root|file))$"
)

# W&B's own fields of a run; every other column without `config_` or `metric_` was parsed from names.
RUN_COLUMNS = frozenset(
    (
        *("id", "name", "entity", "project", "state", "url", "created_at", "heartbeat_at", "tags", "user", "group"),
        *("job_type", "sweep", "notes", "commit", "last_step", "runtime_seconds", "history_rows"),
        "best_step",  # with --at-best
    )
)

TOP = 10  # runs that are shown without --top
ROWS = 100  # rows of a query's result that are shown without --top
GRID = 400  # points of a learning curve; more are binned

# Columns of a top list beside the name and the metric, from left to right, as long as there is room.
CONTEXT = ("best_step", "arch", "dataset", "k", "lr", "wd", "seed", "project")

ALIASES = {"architecture": "arch"}


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
    alt, pl, vl_convert = lazy("altair"), lazy("polars"), lazy("vl_convert")


# --- states: the same in export_runs.py, aggregate_runs.py and analyze_runs.py ---
STATES = ("running", "finished", "crashed", "failed", "killed", "pending", "preempting", "preempted")


def parse_states(text: str) -> list[str]:
    """The states of `finished,crashed`; `all` is itself. An argument's `type`, with `action="extend"`."""
    states = [state.strip().lower() for state in text.split(",") if state.strip()]
    if wrong := [state for state in states if state not in (*STATES, "all")] or (not states and [text]):
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no state. Name any of {', '.join(STATES)}, or all.")
    return states


# --- end states ---


# --- naming: the same in export_runs.py and analyze_runs.py ---
def column_name(key: str) -> str:
    """The column spelling of a W&B key: every character but letters, digits and `_` becomes `_`, one for one."""
    return re.sub(r"\W", "_", key)


# --- end naming ---


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


# What a question is asked of, and what answers it ---------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """Runs to ask about: `frame` has one row per run that passed the filters, and is scanned anew by every question."""

    frame: pl.LazyFrame
    schema: dict[str, pl.DataType]
    keys: dict[str, str]  # column -> its key as W&B spells it
    files: list[Path]
    damaged: int = 0  # Parquet files that should hold runs and cannot be read


@dataclass(frozen=True)
class Column:
    """A column of a shown table: the frame's `value`, `value ± std (n=n)` or `[value, to]` of columns of the frame."""

    title: str
    value: str
    std: str | None = None
    n: str | None = None
    to: str | None = None  # the upper end: `[value, to]`
    best: bool | None = None  # mark the best row: the highest (True) or the lowest (False)
    within: tuple[str, ...] = ()  # the best among the rows that are equal in these columns
    near: str | None = None  # a Boolean column: mark with ≈ what is not told apart from the best
    key: bool = False  # says which row this is: always shown


@dataclass(frozen=True)
class Answer:
    """A small frame at full precision, how it is shown, the runs behind it for a picture, and what must be said."""

    title: str
    frame: pl.DataFrame
    columns: list[Column]
    notes: list[str] = field(default_factory=list)  # results in words: printed below the table
    rows: Sequence[int] | None = None  # of a long frame, the rows that are printed
    draw: Callable[[Look], alt.TopLevelMixin] | None = None
    caption: str = ""  # of the picture
    closing: Answer | None = None  # a second table, shown below the first


# Input: which files, which columns, which runs ------------------------------------------------------------------------


def find_files(inputs: Sequence[str]) -> list[Path]:
    """What `inputs` (files, folders, globs) name, each once; with none, of the exports in `FOLDER` the one made last.

    Of a folder the `*_runs.parquet` files. What exists is a path, whatever characters it holds, and no glob.
    """
    if not inputs:
        found = [path for path in FOLDER.glob("*_runs.parquet") if path.is_file()]
        if not found:
            raise Stop(f"no *_runs.parquet in {FOLDER}/. Export runs first (export_runs.py), or name a file.")
        found.sort(key=exported_at, reverse=True)
        say(f"Reading {found[0]}" + (f", the newest of {len(found)}; not read:" if found[1:] else ""))
        for other in found[1:]:
            say(f"  {other}")
        return found[:1]
    files: list[Path] = []
    for path in (Path(os.path.expanduser(text)) for text in inputs):  # noqa: PTH111 (Path's raises for an unknown ~user)
        if path.is_dir():
            found = [file for file in sorted(path.glob("*_runs.parquet")) if file.is_file()] or [path]
        elif path.exists():
            found = [path]
        else:  # what exists of it, `exp[1]/` of `exp[1]/*`, is a path too
            start = next(parent for parent in path.parents if parent.exists())
            pattern = str(path.relative_to(start))
            found = [start / name for name in sorted(glob.glob(pattern, root_dir=start, recursive=True))]  # noqa: PTH207
        if not found:
            near = nearest(path.name, (file.name for file in path.parent.glob("*.parquet")))
            raise Stop(f"no file of runs at {path}.{near} Name *_runs.parquet files, a folder with them, or a glob.")
        files += found
    return list(dict.fromkeys(files))


def exported_at(path: Path) -> float:
    """When the runs in a file were exported, in seconds: what its footer says, else when the file changed."""
    if not path.is_file():  # a FIFO would never answer
        return 0.0
    try:
        when = datetime.fromisoformat(json.loads(pl.read_parquet_metadata(path)["wandb_tools"])["exported_at"])
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, LookupError, TypeError, ValueError):
        return path.stat().st_mtime


def scan(path: Path) -> pl.LazyFrame:
    """Scan one file of runs, with the columns parsed from names if aggregate_runs.py did not add them already.

    Raises `Stop` for what is no file of runs; with code 1 if it should be one: a Parquet file that cannot be read.
    """
    if path.is_dir():
        raise Stop(f"{path} is a folder without *_runs.parquet. Name *_runs.parquet files, or a folder with them.")
    if not path.is_file():
        raise Stop(f"{path} is no regular file.")
    try:
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        what = f"{path} is no Parquet file that can be read: {first_line(error)}."
        raise Stop(what, 1 if path.suffix == ".parquet" else 2) from None
    if "run_id" in schema and "_step" in schema:
        raise Stop(f"{path} is a history file. Name the file of runs beside it; --curves finds the history.")
    if "name" not in schema:
        raise Stop(f"{path} has no column `name`: it is no file of runs, as export_runs.py writes them.")
    return frame if "_source_file" in schema else enrich(frame)


def common_type(types: set[pl.DataType]) -> pl.DataType:
    """The type that keeps every value of columns of `types`: theirs if equal, Float64 for numbers, else String."""
    types = {dtype for dtype in types if dtype not in (pl.Null, pl.List(pl.Null))} or types
    if len(types) <= 1:
        return next(iter(types), pl.Null())
    return pl.Float64() if all(t.is_numeric() for t in types) else pl.String()


def align(frames: list[pl.LazyFrame]) -> tuple[pl.LazyFrame, dict[str, pl.DataType]]:
    """The frames as one, columns by name, each cast to the type that keeps every value; and its schema."""
    schemas = [frame.collect_schema() for frame in frames]
    columns = dict.fromkeys(column for schema in schemas for column in schema)
    target = {c: common_type({schema[c] for schema in schemas if c in schema}) for c in columns}
    aligned = [
        frame.cast({c: target[c] for c, dtype in schema.items() if dtype != target[c]})
        for frame, schema in zip(frames, schemas, strict=True)
    ]
    return pl.concat(aligned, how="diagonal") if aligned[1:] else aligned[0], target


def read(files: list[Path]) -> Runs:
    """Scan those of `files` that hold runs as one frame: columns by name, types aligned.

    Where several files hold a run (entity, project, id), the export that was made last has the say. Other files, and
    aggregates beside raw exports, are left out with a word. Raises `Stop` where no file holds runs.
    """
    frames: dict[Path, pl.LazyFrame] = {}
    others: dict[Path, Stop] = {}
    for path in sorted(files, key=exported_at, reverse=True) if files[1:] else files:
        try:
            frames[path] = scan(path)
        except Stop as stop:
            others[path] = stop
    if not frames:
        raise Stop(str(next(iter(others.values()))))
    damaged = [stop for stop in others.values() if stop.code == 1]
    for stop in damaged:
        say(f"warning: left out: {stop}")
    aside = [path for path, stop in others.items() if stop.code != 1]
    aggregates = [path for path in frames if "_source_file" in frames[path].collect_schema()]
    if len(aggregates) < len(frames):
        aside += aggregates
        frames = {path: frame for path, frame in frames.items() if path not in aggregates}
    if aside:
        listed = ", ".join(sorted(path.name for path in aside)[:4]) + (", ..." if aside[4:] else "")
        say(f"{len(aside)} of {len(files)} files left out, no exports of runs: {listed}")
    frame, target = align(list(frames.values()))
    identity = [c for c in ("entity", "project", "id") if c in target]
    if len(frames) > 1 and "id" in identity:
        total, distinct = collect(frame.select(pl.len(), pl.struct(identity).n_unique().alias("n")), "the files").row(0)
        if distinct < total:
            say(f"{total - distinct} of {total} runs stand in several files; each counts once.")
            frame = frame.unique(identity, keep="first", maintain_order=True)
    return Runs(frame, target, read_keys(list(frames)), list(frames), len(damaged))


def read_keys(files: list[Path]) -> dict[str, str]:
    """Column -> W&B key, from the `_metadata.json` beside each file, or all of its folder for an aggregated file."""
    keys: dict[str, str] = {}
    for path in files:
        own = path.with_name(path.name.removesuffix("_runs.parquet") + "_metadata.json")
        for beside in [own] if own.is_file() else sorted(path.parent.glob("*_metadata.json")):
            try:
                found = json.loads(beside.read_text(encoding="utf-8")).get("columns") or {}
                found = {column: key for column, key in found.items() if isinstance(key, str)}
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                say(f"warning: {beside} cannot be read ({first_line(error)}); keys cannot be named as W&B spells them.")
                continue
            keys = found | keys
    return keys


def first_line(error: Exception) -> str:
    """The first line of an error's message; Polars appends query plans."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def unknown(word: str, columns: Iterable[str], what: str = "column") -> Stop:
    """The error for a column that does not exist, with the nearest names, compared with and without their prefix."""
    by_short = {re.sub(r"^(?:config|metric)_", "", column): column for column in columns}
    part = f"_{column_name(word).lower()}_"
    holding = [column for column in by_short.values() if part in f"_{column.lower()}_"][:3]
    near = f" Did you mean {' or '.join(holding)}?" if holding else nearest(word, by_short.values())
    near = near or nearest(word, by_short)
    return Stop(f"there is no {what} {word!r}.{near} --schema lists the columns, --schema --match TEXT some of them.")


def find(word: str, runs: Runs) -> str | None:
    """The column that `word` means: its own name, W&B's key, or a name without `config_`, `metric_`, `_parsed`.

    A column that names fill, and none of these names did, stands back behind the config's column of that name.
    """
    spelled = column_name(ALIASES.get(word, word))
    by_key = [column for column, key in runs.keys.items() if key == word]
    candidates = (word, *by_key, spelled, f"config_{spelled}", f"{spelled}_parsed", f"metric_{spelled}")
    found = next((column for column in candidates if column in runs.schema), None)
    config = partners(list(runs.schema)).get(found or "")
    return config if config and not take(runs, [found])[found].count() else found


def resolve(word: str, runs: Runs) -> str:
    """The column that `word` means, as `find` finds it; an error with the nearest names if there is none.

    Says where the column and its like, of names and of the config, contradict each other, and which is used.
    """
    column = find(word.strip(), runs)
    if not column:
        raise unknown(word.strip(), runs.schema)
    for named, config in partners(list(runs.schema)).items():
        if column in (named, config):
            say_contradiction(take(runs, [named, config]), named, config, column)
    return column


def resolve_globs(words: str, runs: Runs) -> list[str]:
    """The columns that a list of globs and short words means; a short word every column of its name, `seed` all seeds.

    Matched with column names, with and without `config_` and `_parsed`, and with W&B's keys, in any case.
    """
    found: list[str] = []
    for word in filter(None, map(str.strip, words.split(","))):
        names = {c: (c, short(c), runs.keys.get(c, c)) for c in hyperparameters(runs)}
        hits = [c for c, spelled in names.items() if any(fnmatch.fnmatch(s.lower(), word.lower()) for s in spelled)]
        hits += [c for c in names if word == "seed" and is_seed(c)]
        hits += [config for named, config in partners(list(runs.schema)).items() if named in hits]
        found += hits or [resolve(word, runs)]
    return list(dict.fromkeys(found))


def resolve_metric(word: str, runs: Runs) -> str:
    """The column of numbers that `word` means: `metric_test_mse`, `test_mse` and `test/mse` are one."""
    word = word.strip()
    by_key = [column for column, key in runs.keys.items() if key == word and column.startswith("metric_")]
    for candidate in (*by_key, word, f"metric_{column_name(word)}", column_name(word)):
        if candidate in runs.schema:
            if not runs.schema[candidate].is_numeric():
                raise Stop(f"{candidate} holds {runs.schema[candidate]}, not numbers. Choose a metric.")
            return candidate
    raise unknown(word, [column for column in runs.schema if column.startswith("metric_")], "metric")


def resolve_all(words: str, runs: Runs) -> list[str]:
    """The columns of a comma-separated list, each once."""
    return list(dict.fromkeys(resolve(word, runs) for word in words.split(",") if word.strip()))


def where(text: str, runs: Runs) -> pl.LazyFrame:
    """The runs that pass the SQL condition of --where; its columns must exist."""
    try:
        names = pl.sql_expr(text).meta.root_names()
        if missing := [name for name in names if name not in runs.schema and name not in ALIASES]:
            raise unknown(missing[0], runs.schema)
        # A query, not the expression, because only queries compare dates with text: created_at >= '2025-10-01'.
        return pl.SQLContext({"runs": aliased(runs, text)}).execute(f"SELECT * FROM runs WHERE ({text})")
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--where {text!r} is no SQL condition: {first_line(error)}.") from None


def aliased(runs: Runs, query: str) -> pl.LazyFrame:
    """The frame, with the aliases that `query` uses as columns of their own."""
    found = {new: pl.col(old) for new, old in ALIASES.items() if new in query and old in runs.schema}
    return runs.frame.with_columns(**{new: column for new, column in found.items() if new not in runs.schema})


def matching(option: str, regex: str, column: str) -> pl.Expr:
    """Whether `column` holds `regex`, in any case; an error that names the `option` if it is none."""
    try:
        pl.Series([""]).str.contains(f"(?i){regex}")
    except pl.exceptions.PolarsError as error:
        reason = str(error).split("error: ")[-1].splitlines()[0]
        raise Stop(f"{option} {regex!r} is no regular expression: {reason}.") from None
    return pl.col(column).str.contains(f"(?i){regex}")


def keep(runs: Runs, args: argparse.Namespace) -> Runs:
    """The runs that pass --filter, --project, --protocol, --tag, --where and --state; says what the state removed."""
    frame = where(args.where, runs) if args.where and not args.at_best else runs.frame
    if args.filter:
        frame = frame.filter(matching("--filter", args.filter, "name"))
    if args.project:
        frame = frame.filter(matching("--project", args.project, resolve("project", runs)))
    if args.protocol not in (None, "all"):
        frame = frame.filter(pl.col(resolve("protocol", runs)) == args.protocol)
    if args.tag:
        tags = pl.col(resolve("tags", runs))
        frame = frame.filter(pl.any_horizontal(tags.list.contains(tag) for tag in args.tag))
    states = args.state or ["finished"]
    state = pl.col("state") if "state" in runs.schema else pl.lit("finished").alias("state")
    single = pl.col("protocol") == "single_graph" if "protocol" in runs.schema else pl.lit(False)
    counts = frame.group_by(state).agg(pl.len(), single.sum().alias("single"))
    counts = counts.sort("len", "state", descending=[True, False])
    found = collect(counts, f"--where {args.where!r}" if args.where else "the files")
    if found.is_empty():
        raise Stop("no run matches these filters. Loosen --filter, --project, --protocol, --tag or --where.", 1)
    if "all" not in states:
        others = found.filter(pl.col("state").is_in(states).not_().fill_null(True))
        listed = ", ".join(f"{n} {state or 'of unknown state'}" for state, n, _ in others.rows())
        if others.height == found.height:
            raise Stop(f"no run is {' or '.join(states)}: {listed}. --state all takes every run.", 1)
        if others.height:
            say(f"{others['len'].sum()} of {found['len'].sum()} runs left out: {listed} (--state all keeps them)")
        found = found.filter(pl.col("state").is_in(states))
        frame = frame.filter(state.is_in(states))
    singles, total = found["single"].sum(), found["len"].sum()
    if not args.protocol and 0 < singles < total:
        say(f"warning: {singles} of {total} runs are single_graph, the others distribution, and do not compare with")
        say("         them. Name one with --protocol, or say --protocol all.")
    return replace(runs, frame=frame)


def collect(frame: pl.LazyFrame, what: str) -> pl.DataFrame:
    """Collect the frame; an error that says that `what` does not work, such as a file that is damaged inside."""
    try:
        return frame.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise Stop(f"{what} cannot be evaluated: {first_line(error)}.") from None


def take(runs: Runs, columns: Iterable[str]) -> pl.DataFrame:
    """Read just these columns of the runs; lists (tags) become text, so that they can be grouped and saved."""
    wanted = list(dict.fromkeys(columns))
    for column in wanted:
        if column not in runs.schema:
            raise Stop(f"these files have no column {column}, which this question needs. Export the runs again.")
    lists = [c for c in wanted if isinstance(runs.schema[c], pl.List)]
    frame = runs.frame.select(wanted).with_columns(pl.col(column).list.join(",") for column in lists)
    return collect(frame, ", ".join(map(str, runs.files)))


# Metrics: which one, and which of its values count -------------------------------------------------------------------


def default_metric(runs: Runs) -> str:
    """The first of `DEFAULT_METRICS` that has a finite value in these runs."""
    there = [f"metric_{column_name(key)}" for key in DEFAULT_METRICS]
    there = [column for column in there if column in runs.schema]
    counts = take(runs, there).select(pl.all().is_finite().sum())
    for column in there:
        if counts[column].item():
            say(f"Metric: {column} (--metric chooses another)")
            return column
    raise Stop(
        "none of the common metrics (test/mse, test/loss, test/accuracy, val/loss, ...) has values here. "
        "Name one with --metric; --schema --match metric_ lists them."
    )


def finite(column: str) -> pl.Expr:
    """The column as Float64 with null for NaN and the infinities: a diverged run has none to average."""
    value = pl.col(column).cast(pl.Float64)
    return pl.when(value.is_finite()).then(value).alias(column)


def say_unusable(points: pl.DataFrame, metrics: Iterable[str]) -> None:
    """Say how many runs have no number in a metric, NaN or an infinity; they are in no mean and in no ranking."""
    for metric in metrics:
        value = pl.col(metric).cast(pl.Float64)
        unusable = {"without a value": value.is_null(), "NaN": value.is_nan(), "infinite": value.is_infinite()}
        counts = points.select(expr.sum().alias(word) for word, expr in unusable.items()).row(0, named=True)
        if sum(counts.values()) == points.height:
            raise Stop(f"{metric} has no finite value in these {points.height} runs. Choose another --metric.", 1)
        if parts := [f"{n} {word}" for word, n in counts.items() if n]:
            say(f"{metric}: of {points.height} runs {', '.join(parts)}; left out")


def directed(word: str) -> tuple[str, str | None]:
    """A metric and the direction that was said with it: `test/mse:min` is `test/mse` and `min`."""
    metric, _, direction = word.strip().rpartition(":")
    return (metric, direction) if direction in ("min", "max") else (word.strip(), None)


def highest_wins(metric: str, said: str | None, descending: bool, reported: bool = True) -> bool:
    """Whether the highest of `metric` is its best: the one rule about directions.

    What was `said` with the metric (min or max) decides; then --descending, which speaks of the metric that is
    `reported` and that orders (others follow it where their name tells nothing); then the name (`DIRECTION`); else the
    lowest is the best. A name that points the other way, or that decided against the default, is said.
    """
    words = [match.lastgroup for match in DIRECTION.finditer(metric.lower())]
    name = words[-1] if words else None
    highest = said == "max" if said else name == "score" or (descending and (reported or not name))
    looks = f"{metric} looks like " + ("a score, more is better" if name == "score" else "an error, less is better")
    if name and (name == "score") != highest:
        say(f"hint: {looks}; but {f':{said}' if said else '--descending'} takes the other way")
    elif name == "score" and reported and not said and not descending:
        say(f"hint: {looks}: the highest is the best ({metric}:min turns it)")
    return highest


def say_contradiction(points: pl.DataFrame, named: str, config: str, used: str) -> None:
    """Say in how many runs the column that names filled and the config's contradict each other, and which is used."""
    if differ := points.select(contradicts(named, config).sum()).item():
        say(f"{named} (from names) and {config} disagree in {differ} of {points.height} runs; {used} is used")


def say_nameless(points: pl.DataFrame, columns: Iterable[str]) -> None:
    """Say how many runs no pattern knows the name of, in the columns that names fill: they stand together as `-`."""
    for column in columns:
        if kind(column) == "name" and (n := points[column].null_count()):
            say(f"{column}: {n} of {points.height} runs have none, for no pattern knows their names; they stand as -")


def short(column: str) -> str:
    """A column's name as a heading."""
    return re.sub(r"^(?:config|metric)_|_parsed$", "", column)


def spelled(runs: Runs, metric: str, descending: bool | None = None) -> str:
    """A metric as W&B spells it, for a picture; on its axes with the direction that is better."""
    key = runs.keys.get(metric, short(metric))
    return key if descending is None else f"{key} ({'higher' if descending else 'lower'} is better)"


def names(columns: list[str]) -> str:
    """Column names as a heading has them."""
    return ", ".join(map(short, columns))


# The value at the best step -------------------------------------------------------------------------------------------


def history_files(runs: Runs) -> dict[tuple[str, str], Path]:
    """(entity, project) -> its `_history.parquet`, beside the runs or in `FOLDER`; `Stop` if no project has one."""
    folders = dict.fromkeys([*(path.parent for path in runs.files), FOLDER])  # an aggregated file may lie elsewhere
    found: dict[tuple[str, str], Path] = {}
    for who in take(runs, ["entity", "project"]).unique(maintain_order=True).rows():
        wanted = [folder / "{}_{}_history.parquet".format(*who) for folder in folders]
        if path := next(filter(Path.exists, wanted), None):
            found[who] = path
    if not found:
        raise Stop(f"there is no {wanted[0]}. Export it with export_runs.py --include-history.")
    return found


def history_metrics(path: Path, runs: Runs) -> dict[str, str]:
    """Column -> key of the metrics in a history file, as its project's metadata, or the keys' spelling, say."""
    beside = read_keys([path.with_name(path.name.replace("_history.parquet", "_runs.parquet"))])
    own = {key: column for column, key in beside.items() if column.startswith("metric_")}
    found: dict[str, str] = {}
    for key, dtype in pl.scan_parquet(path, glob=False).collect_schema().items():
        column = own.get(key, f"metric_{column_name(key)}")
        # Text is a metric where some runs hold it as a number.
        metric = dtype.is_numeric() or (column in runs.schema and not dtype.is_nested())
        if metric and not key.startswith("_") and (key in own or column not in own.values()):
            found[column] = key
    return found


def at_best(runs: Runs, word: str, highest: bool) -> Runs:
    """The runs with every metric as it was at the step where the run's own `word` was best, and that `best_step`.

    The best step (Int64) is the first one with the lowest (`highest`: highest) finite value of the key. A `metric_*`
    column then holds what was logged at that step, else the last finite value before it, else null. Two kinds keep the
    value of the summary, and are true in `{column} kept`: metrics that the project's history lacks, and what a run
    logged just once, not before its last `word`: a test after training. Runs without a finite `word` are left out.
    The history is scanned for the key at once, for other keys when a question reads their columns; both streaming.
    Raises `Stop` where there is no history, or no run with the key in it.
    """
    ids, found, pieces, keys = take(runs, ["entity", "project", "id"]), 0, [], {}
    step, best = pl.col("_step"), pl.col("best_step")
    for (entity, project), path in history_files(runs).items():
        metrics = history_metrics(path, runs)
        keys |= metrics
        chosen = [column for column, key in metrics.items() if key == word]
        chosen += [column for column in (word, f"metric_{column_name(word)}") if column in metrics]
        if not chosen:
            continue
        numbers = {column: pl.col(key).cast(pl.Float64, strict=False) for column, key in metrics.items()}
        history = pl.scan_parquet(path, glob=False).select("run_id", "_step", **numbers)
        y, mine = pl.col(chosen[0]), ids.lazy().filter(entity=entity, project=project)
        points = history.filter(y.is_finite()).join(mine, left_on="run_id", right_on="id", how="semi")
        first = step.min_by(pl.struct(-y if highest else y, step))
        ends = collect(points.group_by("run_id").agg(best_step=first, _end=step.max()), str(path))
        found += ends.height

        at = [pl.min("best_step")]
        for column in numbers:
            value = pl.col(column)
            usable = ((step < best) & value.is_finite()) | ((step == best) & value.is_not_null())
            there = value.max_by(pl.when(usable).then(step))
            end = pl.when(value.is_not_null()).then(step).max()
            once = there.is_null() & (value.count() == 1) & (end >= pl.min("_end"))
            at += [pl.when(once).then(value.max()).otherwise(there).alias(column), once.alias(f"{column} kept")]
        values = history.join(ends.lazy(), on="run_id").group_by("run_id").agg(at)
        summary = runs.frame.filter(entity=entity, project=project).drop(*numbers, "best_step", strict=False)
        others = [c for c in runs.schema if c.startswith("metric_") and c not in numbers]
        summary = summary.with_columns(pl.col(c).is_not_null().alias(f"{c} kept") for c in others)
        pieces.append(summary.join(values, left_on="id", right_on="run_id", maintain_order="left"))
    if not pieces:
        raise Stop(f"there is no {word!r} in the history.{nearest(word, keys.values())}")
    if not found:
        raise Stop(f"no run has a finite {word} in the history. Choose another key for --at-best.", 1)
    lacking = f"; {ids.height - found} of {ids.height} runs have none in the history: left out"
    order = "highest" if highest else "lowest"
    say(f"Metrics at the step of each run's {order} {word}{lacking if found < ids.height else ''}")
    if "test" in word.lower():
        say(f"warning: {word} looks like a test metric: a step chosen by it makes what is reported optimistic. Choose")
        say("         it by a validation metric.")
    frame, schema = align(pieces)
    schema = {column: dtype for column, dtype in schema.items() if not column.endswith(" kept")}
    return replace(runs, frame=frame, schema=schema, keys=runs.keys | keys)


def say_kept(runs: Runs, metrics: Iterable[str]) -> None:
    """With --at-best, say in how many runs the `metrics` of a question are still those of the summary."""
    there = runs.frame.collect_schema() if "best_step" in runs.schema else {}
    flags = {metric: pl.col(f"{metric} kept").sum() for metric in metrics if f"{metric} kept" in there}
    counts = collect(runs.frame.select(pl.len(), **flags), "the history").row(0, named=True) if flags else {}
    for metric in filter(counts.get, flags):
        of = f"{counts[metric]} of {counts['len']} runs"
        say(f"{metric}: logged after training only, or in no history, in {of}; there the summary's value stands")


# Top runs -------------------------------------------------------------------------------------------------------------


def top(runs: Runs, metrics: list[str], n: int | None, descending: bool, whole: bool = False) -> Answer:
    """The best runs by `metrics[0]`: rank (`#`), name, metrics, what is known of the configuration, id and url.

    All of them are in the frame, and ten shown, or `n` in both. With `whole` the frame has every column, and without
    `n` also the runs that have no finite value: last, without a rank.
    """
    metric = metrics[0]
    known = [known_as for word in CONTEXT if (known_as := find(word, runs))]
    address = [column for column in ("id", "url") if column in runs.schema]
    columns = list(dict.fromkeys(["name", *metrics, *known, *address, *(runs.schema if whole else ())]))
    points = collect(runs.frame.select(columns), ", ".join(map(str, runs.files)))
    say_unusable(points, [metric])
    frame = points.sort(finite(metric), descending=descending, nulls_last=True, maintain_order=True)
    ranked = points.select(finite(metric).count()).item()
    rank = pl.int_range(1, pl.len() + 1)
    frame = frame.select(pl.when(rank <= ranked).then(rank).alias("#"), *columns)
    frame = frame.head(min(n, ranked) if n else frame.height if whole else ranked)
    shown = frame.head(min(n or TOP, ranked))
    known = [c for c in known if shown[c].null_count() < shown.height and (c != "project" or points[c].n_unique() > 1)]
    order = "highest" if descending else "lowest"
    always = {"best_step", *metrics[1:2]} if "best_step" in known else {}  # with --at-best
    return Answer(
        f"Top {shown.height} of {points.height} runs by {metric} ({order} first)",
        frame,
        [
            Column("#", "#", key=True),
            Column("name", "name", key=True),
            Column(short(metric), metric, best=descending, key=True),
            *(Column(short(column), column, key=column in always) for column in [*metrics[1:], *known]),
        ],
        rows=range(shown.height),
        draw=lambda look: draw_top(shown, metric, spelled(runs, metric, descending), look),
        caption=f"The {shown.height} best runs",
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


def group(runs: Runs, by: list[str], metrics: list[str], descending: Sequence[bool]) -> Answer:
    """One row per group, best mean of `metrics[0]` first: statistics of one metric, or several metrics side by side.

    `descending` says of each metric whether its highest mean is the best.
    """
    points = take(runs, [*by, *metrics, *(column for column in ("name", "url") if column in runs.schema)])
    say_unusable(points, metrics)
    say_nameless(points, by)
    prefix = {metric: f"{metric}_" if metrics[1:] else "" for metric in metrics}
    frame = points.group_by(by, maintain_order=True).agg(
        pl.len().alias("runs"), *(e for metric in metrics for e in summary(metric, prefix[metric]))
    )
    frame = frame.sort(f"{prefix[metrics[0]]}mean", descending=descending[0], nulls_last=True, maintain_order=True)
    titles = [spelled(runs, metric, highest) for metric, highest in zip(metrics, descending, strict=True)]
    order = "highest" if descending[0] else "lowest"
    if metrics[1:]:
        columns = [
            Column(short(m), f"{m}_mean", std=f"{m}_std", n=f"{m}_n", best=highest, key=m == metrics[0])
            for m, highest in zip(metrics, descending, strict=True)
        ]
    else:
        columns = [Column(name, name) for name in ("n", "std", "min", "median", "max")]
        columns.insert(1, Column("mean", "mean", best=descending[0], key=True))
    return Answer(
        f"{', '.join(metrics)} by {names(by)} ({order} mean {short(metrics[0])} first)",
        frame,
        [*(Column(short(column), column, key=True) for column in by), *columns],
        draw=lambda look: draw_groups(points, by, metrics, labelled(frame, by)["_label"].to_list(), titles, look),
        caption=f"{', '.join(spelled(runs, metric) for metric in metrics)} by {names(by)}",
    )


def label(columns: list[str], separator: str = " / ") -> pl.Expr:
    """One text for the values of several columns: `a / b`, null as `-`."""
    return pl.concat_str([pl.col(c).cast(pl.String).fill_null("-") for c in columns], separator=separator)


def texts(groups: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """The different rows of `columns`, in the order of their own types (8 before 16), with their label as `_label`.

    Labels that would be equal, of null and the text "-" for example, get `__2`, as columns of equal spelling do.
    """
    frame = groups.select(columns).unique().sort(columns, nulls_last=True).with_columns(label(columns).alias("_label"))
    nth = pl.int_range(1, pl.len() + 1).over("_label")
    again = pl.concat_str("_label", pl.lit("__"), nth)
    return frame.with_columns(pl.when(nth > 1).then(again).otherwise("_label").alias("_label"))


def labels(groups: pl.DataFrame, columns: list[str]) -> list[str]:
    """The labels of all groups by `columns`, each once, in order."""
    return texts(groups, columns)["_label"].to_list()


def labelled(groups: pl.DataFrame, columns: list[str], name: str = "_label") -> pl.DataFrame:
    """`groups` with the label of each row's `columns` as the column `name`."""
    found = texts(groups, columns).rename({"_label": name})
    return groups.join(found, on=columns, how="left", nulls_equal=True, maintain_order="left")


def spread(
    groups: pl.DataFrame, rows: list[str], cols: list[str], best: bool | None = None
) -> tuple[pl.DataFrame, list[Column]]:
    """From one row per (rows, cols) to one row per `rows`, and how it is shown, the `best` of each column marked.

    The columns are `{label}_mean`, `_std`, `_n`, and `_not_told_apart` if `groups` has it, per label of `cols`.
    """
    frame = groups.select(rows).unique().sort(rows, nulls_last=True)
    shown = [Column(short(c), c, key=True) for c in rows]
    marked = labelled(groups, cols)
    values = [value for value in ("mean", "std", "n", "not_told_apart") if value in groups.columns]
    for name in labels(groups, cols):
        of = {value: f"{name}_{value}" for value in values}
        cell = marked.filter(_label=name).select(*rows, *(pl.col(value).alias(to) for value, to in of.items()))
        frame = frame.join(cell, on=rows, how="left", nulls_equal=True, maintain_order="left")
        near = of.get("not_told_apart")
        shown.append(Column(name, of["mean"], std=of["std"], n=of["n"], best=best, near=near))
    return frame, shown


def pivot(runs: Runs, rows: list[str], cols: list[str], metric: str, descending: bool) -> Answer:
    """Mean, std and n of `metric` in each cell of rows x cols; the best mean of each column is marked."""
    points = take(runs, [*rows, *cols, metric])
    say_unusable(points, [metric])
    say_nameless(points, [*rows, *cols])
    groups = points.group_by(*rows, *cols, maintain_order=True).agg(summary(metric)[:3])
    order = "highest" if descending else "lowest"
    return Answer(
        f"{metric}: {names(rows)} x {names(cols)}, mean ± std (n); the {order} of a column is marked",
        *spread(groups, rows, cols, descending),
        draw=lambda look: draw_pivot(groups, rows, cols, spelled(runs, metric, descending), descending, look),
        caption=f"{spelled(runs, metric)}: {names(rows)} x {names(cols)}",
    )


# The honest comparison ------------------------------------------------------------------------------------------------


def hyperparameters(runs: Runs) -> list[str]:
    """The columns that say what was run: `config_*`, and those parsed from names."""
    return [c for c in runs.schema if kind(c) in ("config", "name")]


def is_seed(column: str) -> bool:
    """Whether the column holds a random seed: `seed_parsed`, `config_seed`, `config_data_split_seed`."""
    return "seed" in column.lower()


def with_seed(points: pl.DataFrame, over: list[str]) -> pl.DataFrame:
    """`points` with `_seed`, an integer for each different combination of `over`; null where none of it is known."""
    known = pl.any_horizontal(pl.lit(False), pl.col(over).is_not_null())
    first = pl.col("_seed").min().over(over or pl.lit(0))
    return points.with_row_index("_seed").with_columns(pl.when(known).then(first).alias("_seed"))


def without_labels(points: pl.DataFrame, columns: list[str]) -> list[str]:
    """Those of `columns` that describe runs; says which are labels, which only name them: no hyperparameters.

    `points` has the columns and `_seed` (`with_seed`). A label is a column, not of Booleans,
    1. whose name says so (`LABEL`), whether its values repeat or not; or
    2. that carries the seed: more than half of the runs whose value other runs share, share it only with runs of their
       own seed, of all such runs and on average over the seeds (so that a search with one seed, whose best was run with
       others, makes no labels of what it searched); or
    3. of text that never repeats in three or more runs, and names the experiment or looks like a path or a date.

    What else is unique per run, as a rate that a sweep drew, stays a hyperparameter: to average it were worse.
    """
    keys = {c: c.removeprefix("config_").lower() for c in columns if points[c].dtype != pl.Boolean}
    found = {c for c in keys if kind(c) == "config" and LABEL.fullmatch(keys[c]) and not SOURCE.fullmatch(keys[c])}
    rest = [c for c in keys if c not in found]
    shared, seed = {c: pl.col(c).is_not_null() & (pl.len().over(c) > 1) for c in rest}, pl.col("_seed")
    alone = {c: pl.when(shared[c]).then(seed.min().over(c) == seed.max().over(c)) for c in rest}
    alone = points.drop_nulls("_seed").select("_seed", **alone)
    by_seed = alone.group_by("_seed", maintain_order=True).agg(pl.all().mean()).drop("_seed").mean()
    found |= {c for c in rest if min(alone[c].mean() or 0, by_seed[c].item() or 0) > 0.5}
    for column in (c for c in rest if points[c].dtype == pl.String):
        values = points[column].drop_nulls()
        named = re.search(r"exp(?:eriment)?_?name$", column.lower())
        named = named or values.str.contains(r"[/\\]|^\d{4}-\d\d-\d\d").all()
        if named and len(values) >= 3 and values.n_unique() == len(values):
            found.add(column)
    if found:
        say(f"Labels of runs, no hyperparameters: {', '.join(c for c in columns if c in found)}")
    return [c for c in columns if c not in found]


def distinct_partitions(points: pl.DataFrame, columns: list[str]) -> list[str]:
    """Of `columns`, one for each way to split the runs: `config_lr` and `lr_parsed` often say the same.

    The one that reads best stands for the others: of the config, set in most runs, a number, with a short name.
    """

    def reads(column: str) -> tuple[bool, int, bool, int]:
        return kind(column) == "name", points[column].null_count(), points[column].dtype == pl.String, len(column)

    first = pl.col("_row").min()
    firsts = points.with_row_index("_row").select(first.over(c).alias(c) for c in columns)
    seen: dict[tuple[int, ...], str] = {}
    for column in sorted(columns, key=reads):
        seen.setdefault(tuple(firsts[column]), column)
    return [c for c in columns if c in seen.values()]


def student_density(t: float, df: float) -> float:
    """The density of Student's t with `df` degrees of freedom."""
    factor = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi * df) / 2
    return math.exp(factor - (df + 1) / 2 * math.log1p(t * t / df))


def student_tail(t: float, df: float) -> float:
    """P(|T| > t) for t >= 0 of Student's t with `df` degrees of freedom, whole or not: the p of a two-sided test.

    The incomplete beta function I_x(df/2, 1/2) at x = df / (df + t²), by the continued fraction of Numerical Recipes,
    6.4 (Lentz), from that end where it converges fast; to ten digits up to df = 10,000.
    """
    if not 0 < t < math.inf:
        return float(t == 0)
    a, b, x, y = df / 2, 0.5, df / (df + t * t), t * t / (df + t * t)
    front = student_density(t, df) * t  # x^a y^b / B(a, b)
    if upper := x > (a + 1) / (a + b + 2):
        a, b, x = b, a, y
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        for term in (m * (b - m) / (a + 2 * m - 1), -(a + m) * (a + b + m) / (a + 2 * m + 1)):
            term *= x / (a + 2 * m)
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return 1 - front * fraction / a if upper else front * fraction / a


@functools.cache
def student_quantile(df: float, level: float = 0.95) -> float:
    """The t that |T| exceeds with probability 1 - `level`: 12.71 for one degree of freedom, 1.96 for very many.

    Newton's method from the normal quantile: the tail is convex, and the root lies to the right of every step.
    """
    t = NormalDist().inv_cdf((1 + level) / 2)
    for _ in range(100):
        step = (student_tail(t, df) - (1 - level)) / (2 * student_density(t, df))
        t += max(step, 0.0)
        if step <= 1e-15 * t:
            break
    return t


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Student's 95 % t interval of the mean of `values`, n - 1 degrees of freedom; none for fewer than two."""
    if len(values) < 2:
        return None, None
    half = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def difference(
    values: Sequence[float], best: Sequence[float], seeds: Sequence[int], best_seeds: Sequence[int]
) -> tuple[float, float | None, float | None, float | None]:
    """Mean of `values` minus mean of `best`, its 95 % t interval and its two-sided p.

    Paired where both ran the same seeds, each once; else Welch's, with the degrees of freedom of Welch and
    Satterthwaite. Interval and p are None where one of the two has fewer than two values.
    """
    gap, n, m = fmean(values) - fmean(best), len(values), len(best)
    if min(n, m) < 2:
        return gap, None, None, None
    if n == m == len(set(seeds)) and None not in seeds and set(seeds) == set(best_seeds):
        other = dict(zip(best_seeds, best, strict=True))
        error, df = stdev(v - other[s] for v, s in zip(values, seeds, strict=True)) / math.sqrt(n), n - 1
    else:
        a, b = stdev(values) ** 2 / n, stdev(best) ** 2 / m
        error = math.sqrt(a + b)
        df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1)) if error else 1
    half = student_quantile(df) * error
    t = abs(gap) / error if error else math.inf if gap else 0.0
    return gap, gap - half, gap + half, student_tail(t, df)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p values adjusted by Holm's step-down method, over those that are there."""
    there = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted, highest = list(ps), 0.0
    for rank, (p, i) in enumerate(there):
        adjusted[i] = highest = max(highest, min(1.0, p * (len(there) - rank)))
    return adjusted


def compared(
    runs: Runs, points: pl.DataFrame, dims: list[str], over: list[str] | None, ignore: list[str], only: list[str] | None
) -> tuple[pl.DataFrame, list[str]]:
    """Who is compared: the columns of `points` that tell configurations apart, each for a way to split the runs.

    Those are `only`, or every hyperparameter that varies within a cell of `dims` but for `over` (by default every seed
    column), labels (`without_labels`), `ignore`, and what names say where the config of every run says it too. Out:
    `points` with `_seed`, an integer for each different seed, null where none is known; and the columns. Says what it
    averages over and leaves out. Raises `Stop` where seeds vary, yet no configuration has two of them.
    """
    twice = {named: config for named, config in partners(points.columns).items() if not points[config].null_count()}
    varying = [c for c in hyperparameters(runs) if c in points.columns and c not in dims and points[c].n_unique() > 1]
    over = [c for c in varying if is_seed(c)] if over is None else over
    say(f"Averaged over {', '.join(over)}" if over else "No seed varies: runs of equal configuration are seeds")
    points = with_seed(points, [c for c in over if c not in twice] or over)
    config = [c for c in varying if c not in (*over, *ignore, *twice)]
    for named in [c for c in varying if c in twice]:
        say_contradiction(points, named, twice[named], twice[named])
    if only is not None:
        config = [c for c in only if c in points.columns and c not in (*over, *ignore, *dims)]
    else:
        config = without_labels(points, config)
    # What is constant in every cell cannot tell its configurations apart, and would only lengthen their names.
    inside = points.group_by(dims).agg(pl.col(config).n_unique())
    config = [c for c in config if inside[c].max() > 1]
    if only is None:
        check_seeds(points, dims, config)
    return points, distinct_partitions(points, config)


def check_seeds(points: pl.DataFrame, dims: list[str], config: list[str]) -> None:
    """Raise `Stop` where two seeds meet in a cell of `dims`, but in no configuration; names what parts them."""

    def meet(columns: list[str]) -> bool:
        """Whether two seeds meet somewhere, if just these columns make a configuration."""
        found = points.drop_nulls("_seed").group_by(*dims, *columns).agg(pl.col("_seed").n_unique())
        return (found["_seed"].max() or 0) > 1

    if not meet([]) or meet(config):
        return
    counts = {c: points[c].n_unique() for c in config}
    apart = sorted(config, key=lambda c: -counts[c])
    parting = apart[: bisect.bisect_left(range(len(apart)), True, key=lambda i: meet(apart[i:]))]
    for column in parting[:-1]:  # the last one of the shortest such list is needed
        if meet([c for c in apart if c not in parting or c == column]):
            parting.remove(column)
    listed = ", ".join(f"{c} ({counts[c]} values)" for c in apart[:6]) + (", ..." if apart[6:] else "")
    raise Stop(
        f"seeds vary, but no configuration has two of them. What keeps the runs apart: {listed}. If that is no "
        f"hyperparameter: --ignore {','.join(map(short, parting))}. If every run is a configuration of its own, as in "
        "a random search: --config '*'."
    )


def configurations(points: pl.DataFrame, dims: list[str], config: list[str], select: str, metric: str) -> pl.DataFrame:
    """One row per configuration of each cell of `dims`: what its seeds say.

    Out: `dims`, `config`, `runs`, `repeats` (runs with the seed of another one), `selection` (mean of the finite
    values of `select`, null without any), `diverged` (runs whose `select` is NaN or infinite), `n`, `mean`, `std` of
    the finite values of `metric`, and they as `values`, with their `seeds`.
    """
    value = finite(metric)
    return points.group_by(*dims, *config, maintain_order=True).agg(
        *summary(metric)[:3],
        runs=pl.len(),
        repeats=pl.count("_seed") - pl.col("_seed").drop_nulls().n_unique(),
        selection=finite(select).mean(),
        diverged=(~pl.col(select).cast(pl.Float64).is_finite()).sum(),
        values=value.drop_nulls(),
        seeds=pl.col("_seed").filter(value.is_not_null()),
    )


def distinct_seeds() -> pl.Expr:
    """How many seeds the runs of `n` have: a run without a seed is one of its own, a repeated one is none."""
    seeds = pl.col("seeds").list.drop_nulls()
    return pl.col("n") - (seeds.list.len() - seeds.list.n_unique())


def choose(every: pl.DataFrame, dims: list[str], highest: bool) -> pl.DataFrame:
    """What is chosen: in each cell of `dims` the configuration with the best `selection`, if the `highest` is or not.

    One of which a seed diverged stands after all of which none did; of equal ones the one with the most seeds stands.
    Out: the chosen rows of `every` with `tied` (how many are as good), and of all of the cell's configurations
    `configurations` (with a mean), `median`, `min`, `max` of their means, `most_seeds`, `any_diverged`.
    """
    mean, diverged = pl.col("mean"), pl.col("diverged") > 0
    means = {"configurations": mean.count(), "median": mean.median(), "min": mean.min(), "max": mean.max()}
    overall = every.group_by(dims).agg(most_seeds=distinct_seeds().max(), any_diverged=diverged.sum(), **means)
    order = [diverged, pl.col("selection"), pl.col("n")]
    able = every.filter(pl.col("selection").is_not_null())
    able = able.sort(order, descending=[False, highest, True], maintain_order=True)
    as_good = pl.all_horizontal(value == value.first().over(dims) for value in order[:2])
    chosen = able.with_columns(as_good.sum().over(dims).alias("tied")).unique(dims, keep="first", maintain_order=True)
    return chosen.join(overall, on=dims, how="left", nulls_equal=True, maintain_order="left")


def sure(chosen: pl.DataFrame, within: list[str], descending: bool) -> pl.DataFrame:
    """How sure it is: `chosen` with the interval of each mean and its difference to the best of equal `within`.

    Out: `ci_low`, `ci_high` (`mean_interval`), `difference`, `difference_low`, `difference_high` (`difference`), `p`
    (adjusted by Holm over what stands in one table column, the rows of equal `within`), and `not_told_apart`.

    `not_told_apart` goes by the interval: it holds 0, or there is none for want of seeds. It is the interval of one
    comparison; p is that of all of its column. So a p of 0.05 and more can stand beside an interval without 0: one
    such comparison alone would tell the two apart, but not the one that looks best of several.
    """
    rows = chosen.to_dicts()
    cells: dict[tuple[object, ...], list[dict]] = {}
    for row in rows:
        row["ci_low"], row["ci_high"] = mean_interval(row["values"])
        if row["n"]:
            cells.setdefault(tuple(row[c] for c in within), []).append(row)
    for members in cells.values():
        best = (max if descending else min)(members, key=lambda row: row["mean"])
        others = [row for row in members if row is not best]
        gaps = [difference(row["values"], best["values"], row["seeds"], best["seeds"]) for row in others]
        for row, (gap, low, high, _), p in zip(others, gaps, holm([gap[3] for gap in gaps]), strict=True):
            row |= {"difference": gap, "difference_low": low, "difference_high": high, "p": p}
            row["not_told_apart"] = low is None or low <= 0 <= high
    numbers = ("ci_low", "ci_high", "difference", "difference_low", "difference_high", "p")
    types = dict.fromkeys(numbers, pl.Float64) | {"not_told_apart": pl.Boolean}
    added = pl.from_dicts(rows, types) if rows else pl.DataFrame(schema=types)
    return pl.concat([chosen, added.with_columns(pl.col("not_told_apart").fill_null(False))], how="horizontal")


def better(values: Sequence[float], others: Sequence[float], descending: bool) -> float:
    """P(a value beats another): Mann and Whitney's U over the number of pairs, ties counted as half."""
    ranked = sorted(others)
    below = sum(bisect.bisect_left(ranked, v) + bisect.bisect_right(ranked, v) for v in values) / 2
    share = below / (len(values) * len(others))
    return share if descending else 1 - share


def across(chosen: pl.DataFrame, rows: list[str], cols: list[str], metric: str, descending: bool) -> Answer | None:
    """The closing table over data sets (`cols`): one row per method (`rows`), with `mean_rank` and `p_best_better`.

    `p_best_better` is P(the method with the best mean rank is better than this one), averaged over data sets (Agarwal
    et al., 2021, "Deep reinforcement learning at the edge of the statistical precipice"). Only data sets where every
    method has a mean count; None with fewer than two of them, or of methods.
    """
    if not rows or not cols:
        return None
    there = labelled(labelled(chosen.filter(pl.col("n") > 0), rows, "_row"), cols, "_col")
    methods = there["_row"].n_unique()
    there = there.filter(pl.len().over("_col") == methods)
    sets = there["_col"].unique(maintain_order=True).to_list()
    if methods < 2 or len(sets) < 2:
        return None
    ranked = there.with_columns(pl.col("mean").rank(descending=descending).over("_col").alias("mean_rank"))
    frame = ranked.group_by(*rows, "_row", maintain_order=True).agg(pl.col("mean_rank").mean())
    frame = frame.sort("mean_rank", maintain_order=True)
    values = dict(zip(there.select("_row", "_col").rows(), there["values"].to_list(), strict=True))
    best = frame["_row"][0]
    against = [
        None if m == best else fmean(better(values[best, s], values[m, s], descending) for s in sets)
        for m in frame["_row"]
    ]
    return Answer(
        f"Across {names(cols)} ({len(sets)} that all have): mean rank by {short(metric)}, and P({best} is better)",
        frame.drop("_row").with_columns(pl.Series("p_best_better", against, pl.Float64)),
        [
            *(Column(short(c), c, key=True) for c in rows),
            Column("mean rank", "mean_rank", key=True),
            Column(f"P({best} is better)", "p_best_better", key=True),
        ],
    )


def best_by(
    runs: Runs,
    dims: list[str],
    within: list[str],
    select: str,
    select_highest: bool,
    metric: str,
    descending: bool,
    over: list[str] | None,
    ignore: Sequence[str] = (),
    only: list[str] | None = None,
    pivoted: bool = False,
) -> Answer:
    """In each cell of `dims`, choose the configuration with the best mean of `select`, and report its `metric`.

    A configuration is the runs that `compared` cannot tell apart; `choose` chooses, and `sure` says how sure the means
    of `metric` are (higher is better if `descending`); the median and range of all configurations' means stand beside.
    Rows are ordered, and the best is marked, among those that are equal in `within`, the data sets; `pivoted` makes
    them the columns of a table. Raises `Stop` where a metric has no finite value at all, or no two seeds meet.
    """
    candidates = [c for c in hyperparameters(runs) if c not in (select, metric)]
    points = take(runs, [*dims, *candidates, *(over or []), *(only or []), select, metric])
    say_unusable(points, dict.fromkeys([select, metric]))
    say_nameless(points, dims)
    points, config = compared(runs, points, dims, over, list(ignore), only)
    every = configurations(points, dims, config, select, metric)
    chosen = sure(choose(every, dims, select_highest), within, descending)
    if missing := every.select(pl.struct(dims).n_unique()).item() - chosen.height:
        total = missing + chosen.height
        say(f"warning: {missing} of {total} cells have no run with a finite {select}: nothing to choose there")
    order = [False] * len(within) + [descending]
    chosen = chosen.sort([*within, "mean"], descending=order, nulls_last=True, maintain_order=True)
    if tasks := [c for c in config if TASK.search(c)]:
        say(f"warning: {', '.join(tasks)} varies within cells, and the easiest is chosen. Add it to --rows, --cols or")
        say("         --group-by, or filter by it.")
    warn_of_choice(chosen, dims, within, select, metric)
    rows = [c for c in dims if c not in within]
    closing = across(chosen, rows, within, metric, descending)
    frame = chosen.drop("values", "seeds", "repeats", "diverged", "any_diverged", "most_seeds", "tied")
    what, near = f"{metric} of the best configuration by {select}", "not_told_apart"
    of = f" of its {names(within)}" if within else ""
    notes = []
    if chosen[near].any():
        notes = [f"≈ is not told apart from the best{of}: the 95 % interval of their difference holds 0, or n is 1."]
    if doubtful := chosen.filter(~pl.col(near) & (pl.col("p") >= 0.05)).height:
        notes.append(f"Of the others {doubtful} have p >= 0.05, which is adjusted for all comparisons (Holm's method).")
    if not closing and chosen.select(within or pl.lit(0)).n_unique() > 1:
        notes.append(f"No mean ranks: fewer than two {names(within)} have a value of every {names(rows)}.")
    if pivoted:
        title = f"{what}: {names(rows)} x {names(within)}, mean ± std (n) over seeds"
        wide, columns = spread(chosen, rows, within, descending)
        notes.append("Without --pivot: the configurations that were chosen, intervals and differences.")
    else:
        title, wide = f"{what}, mean ± std over seeds, 95 % t intervals", frame
        notes += notes_of_choice(chosen, dims, config, f"{'highest' if select_highest else 'lowest'} mean {select}")
        columns = [
            *(Column(short(c), c, key=True) for c in dims),
            Column(short(metric), "mean", std="std", n="n", best=descending, within=tuple(within), near=near),
            Column("95 % interval", "ci_low", to="ci_high", key=True),
            Column("minus the best", "difference_low", to="difference_high"),
            Column("p", "p"),
            Column(f"by {short(select)}", "selection"),
            Column("configs", "configurations"),
            Column("median", "median"),
            Column("range", "min", to="max"),
        ]
    if closing:
        wide = wide.join(closing.frame, on=rows, how="left", nulls_equal=True, maintain_order="left")
    drawn, heading = draw_pivot if pivoted else draw_best, spelled(runs, metric, descending)
    return Answer(
        title,
        wide,
        columns,
        notes,
        draw=lambda look: drawn(chosen, rows, within, heading, descending, look),
        caption=f"{spelled(runs, metric)} of the best configuration by {spelled(runs, select)}",
        closing=closing,
    )


def notes_of_choice(chosen: pl.DataFrame, dims: list[str], config: list[str], how: str) -> list[str]:
    """What was chosen in each cell, from how many, and how far all of them reach, a line for each."""
    notes = [f"Chosen by the {how} of a configuration:"]
    for row in chosen.iter_rows(named=True):
        cell = " / ".join(number(row[c]) for c in dims)
        values = ", ".join(f"{short(c)}={number(row[c])}" for c in config) or "the only configuration"
        others = f"of {row['configurations']}: median {number(row['median'])}"
        last = f"; {row['any_diverged']} of which a seed diverged stood last" if row["any_diverged"] else ""
        notes.append(f"  {cell}: {values} ({others}, range {number(row['min'])} to {number(row['max'])}{last})")
    return notes


def warn_of_choice(chosen: pl.DataFrame, dims: list[str], within: list[str], select: str, metric: str) -> None:
    """Warn of what makes the claim weaker than it looks: selection on what is reported or on test data, n, ties."""
    if select == metric:
        where = "the same test metric" if "test" in metric else "the same metric"
        say(f"warning: chosen and reported by {where}, {metric}: the best of many looks better than it is. Choose by a")
        say("         validation metric (--best-by val/loss), or compare the medians.")
    elif "test" in select:
        say(f"warning: {select} looks like a test metric: choosing by it makes what is reported optimistic.")
    tries = pl.col("configurations")
    unequal = chosen.filter((tries.max() != tries.min()).over(within or pl.lit(0)))["configurations"]
    if len(unequal):
        tried = f"{unequal.min()} to {unequal.max()}"
        say(f"warning: cells that are compared offered {tried} configurations: the best of more tries looks better")
    for condition, text in (
        (pl.col("n") == 0, f"have no finite {metric}"),
        (pl.col("n") == 1, "rest on n = 1 run: no spread, no interval, and a lucky seed may have been chosen"),
        (
            (pl.col("n") > 1) & (distinct_seeds() < pl.col("most_seeds")),
            "have fewer seeds than another configuration there",
        ),
        (pl.col("n") < pl.col("runs"), f"chose a configuration some of whose runs have no finite {metric}: left out"),
        (pl.col("diverged") > 0, f"have no configuration without a seed that diverged in {select}"),
        (pl.col("repeats") > 0, "hold a seed twice; repeated runs count as n, but are not independent"),
        (pl.col("tied") > 1, f"have several configurations with the best {select}; the one with most seeds stands"),
    ):
        hit = chosen.filter(condition)
        if hit.height:
            cells = ", ".join(hit.head(3).select(label(dims)).to_series()) + (", ..." if hit.height > 3 else "")
            say(f"warning: {hit.height} of {chosen.height} cells {text} ({cells})")


# What matters ---------------------------------------------------------------------------------------------------------


FEW = 12  # numbers of up to so many values are compared value by value, as categories are: 0.1 may be best of 0.01 to 1


def association(
    points: pl.DataFrame, column: str, metric: str, descending: bool, shuffles: dict[bytes, pl.DataFrame]
) -> pl.DataFrame:
    """One row: how strongly `column` goes with `metric` (finite, no nulls), over the runs where it is set.

    Out: `column`, `measure`, `value`, `explained`, `p`, `spearman`, `n`, `distinct`, `best_value`, `mean_there`,
    `n_there`. Of categories and of numbers of up to `FEW` values, `value` and `explained` are epsilon squared, eta
    squared corrected for the number K of values, 1 - (1 - eta²) (n - 1) / (n - K) (Kelley 1935), `p` the share of up
    to 999 permutations, of a fixed seed, that reach it. Of other numbers they are Spearman's rho and rho².
    `spearman` is rho of all numbers. `shuffles` keeps the permutations for columns that are set in the same runs.
    """
    known = points.select(_x=column, _y=metric).drop_nulls()
    deviation = known["_y"] - known["_y"].mean()
    groups = known.group_by("_x", maintain_order=True).agg(pl.col("_y").mean().alias("mean"), pl.len().alias("n"))
    groups = groups.sort("mean", "_x", descending=[descending, False])
    n, k, numeric = known.height, groups.height, known["_x"].dtype.is_numeric()
    rho = known.select(pl.corr(pl.col("_x").rank(), pl.col("_y").rank())).item() if numeric else None
    measure, value, explained, p = "Spearman", rho, None if rho is None else rho**2, None
    if k < n and known["_y"].n_unique() > 1 and (not numeric or k <= FEW):
        draws = max(99, min(999, 2_000_000 // n))
        where = bytes(points[column].is_not_null().to_list())
        if where not in shuffles:
            shuffles[where] = pl.DataFrame(
                {str(i): deviation.sample(fraction=1, shuffle=True, seed=i) for i in range(draws)}
            )
        drawn = shuffles[where].with_columns(known["_x"], deviation.alias("_real"))
        within = drawn.group_by("_x", maintain_order=True).agg(pl.all().sum() ** 2 / pl.len())
        sums = within.drop("_x").sum()  # of squares between the groups
        real = sums["_real"].item()
        measure = "epsilon²"
        value = explained = 1 - (1 - real / (deviation**2).sum()) * (n - 1) / (n - k)
        p = sum(drawn >= real * (1 - 1e-12) for drawn in sums.row(0)) / (draws + 1)  # the real one counts as drawn
    best = groups.row(0, named=True)
    row = {"column": column, "measure": measure, "value": value, "explained": explained, "p": p, "spearman": rho}
    row |= {"n": n, "distinct": k, "best_value": number(best["_x"]), "mean_there": best["mean"], "n_there": best["n"]}
    return pl.DataFrame(row, schema_overrides=dict.fromkeys(("value", "explained", "p", "spearman"), pl.Float64))


def importance(runs: Runs, metric: str, descending: bool) -> Answer:
    """How strongly each hyperparameter that varies goes with the metric, most important first."""
    columns = [c for c in hyperparameters(runs) if c != metric]
    points = take(runs, [*columns, metric])
    say_unusable(points, [metric])
    points = points.with_columns(finite(metric)).drop_nulls(metric)
    points = points.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    varying = [c for c in columns if points[c].drop_nulls().n_unique() > 1]
    seeds = [c for c in varying if is_seed(c)]
    varying = [*without_labels(with_seed(points, seeds), [c for c in varying if c not in seeds]), *seeds]
    # A category of its own for nearly every run says nothing of the next run.
    words = [c for c in varying if not points[c].dtype.is_numeric()]
    crowded = [c for c in words if points[c].drop_nulls().n_unique() > points[c].count() / 2]
    if crowded:
        say(f"Left out, with fewer than two runs per value: {', '.join(crowded)}")
    varying = distinct_partitions(points, [c for c in varying if c not in crowded])
    constant = points[metric].n_unique() == 1
    if not varying or constant:
        what = f"{metric} is the same in all runs" if constant else "no hyperparameter varies"
        raise Stop(f"{what}: there is nothing to compare. Loosen the filters or choose another --metric.", 1)
    shuffles: dict[bytes, pl.DataFrame] = {}
    frame = pl.concat(association(points, c, metric, descending, shuffles) for c in varying)
    frame = frame.filter(pl.col("value").is_not_nan()).sort("explained", descending=True, maintain_order=True)
    return Answer(
        f"What goes with {metric}: epsilon² of values with p by permutation, Spearman's rho of numbers; by epsilon² "
        "and rho²",
        frame,
        [
            Column("column", "column", key=True),
            Column("measure", "measure"),
            Column("value", "value", key=True),
            Column("p", "p"),
            Column("Spearman", "spearman"),
            Column("n", "n"),
            Column("best value", "best_value"),
            Column("mean there", "mean_there", n="n_there"),
            Column("distinct", "distinct"),
        ],
    )


# SQL and the schema ---------------------------------------------------------------------------------------------------


def sql(runs: Runs, query: str) -> Answer:
    """The result of a Polars SQL query over `runs` and, if there are history files beside them, `history`.

    Says which of the columns that the query names hold NaN or infinities: SQL's means and sums count them.
    """
    tables = {"runs": aliased(replace(runs, frame=runs.frame.select(list(runs.schema))), query)}
    if re.search(r"\bhistory\b", query, re.I):
        tables["history"] = history(runs)
    schemas = {name: table.collect_schema() for name, table in tables.items()}
    try:
        result = pl.SQLContext(tables).execute(query).collect(engine="streaming")
    except pl.exceptions.ColumnNotFoundError as error:
        name = re.search(r'"([^"]+)"', str(error))
        raise unknown(name[1] if name else query, [c for found in schemas.values() for c in found]) from None
    except pl.exceptions.PolarsError as error:
        raise Stop(f"--sql: {first_line(error)}. Tables are runs and history; --schema lists the columns.") from None
    for name, types in schemas.items():
        used = [c for c in types if types[c].is_float() and re.search(rf"(?<!\w){re.escape(c)}(?!\w)", query)]
        counts = tables[name].select((~pl.col(c).is_finite()).sum() for c in used).collect(engine="streaming")
        for column in counts.iter_columns():
            if n := column.item():
                say(f"{column.name}: {n} rows of {name} hold NaN or infinity, which SQL counts in means and sums:")
                say(f'  WHERE "{column.name}" < 1e308 leaves them out')
    columns = [Column(c, c, key=i == 0) for i, c in enumerate(result.columns)]
    return Answer(f"{result.height} rows", result, columns, rows=range(min(ROWS, result.height)))


def kind(column: str) -> str:
    """What a column of runs is: json, config, metric, run (W&B's own fields), or name (parsed from the run's name)."""
    if column.startswith("_"):
        return "json"
    for prefix in ("config", "metric"):
        if column.startswith(f"{prefix}_"):
            return prefix
    return "run" if column in RUN_COLUMNS else "name"


def schema(runs: Runs, match: str | None) -> Answer:
    """One row per column of the runs: `column`, `kind`, `type`, `null_share`, `distinct`, `values`, `key` (W&B's)."""
    columns = sorted(runs.schema, key=lambda c: ("run", "name", "config", "metric", "json").index(kind(c)))
    if match:
        both = pl.DataFrame({"column": columns, "key": [runs.keys.get(column) for column in columns]})
        either = pl.any_horizontal(matching("--match", match, name) for name in ("column", "key"))
        columns = both.cast(pl.String).filter(either)["column"].to_list()
        if not columns:
            raise Stop(f"no column matches --match {match!r}.{nearest(match, runs.schema)}", 1)
    points = take(runs, columns)
    rows = []
    for column in columns:
        values = points[column].drop_nulls()
        distinct = values.n_unique()
        if values.dtype.is_numeric() or values.dtype.is_temporal():
            shown = f"{number(values.min())} to {number(values.max())}" if distinct > 1 else number(values.max())
        elif kind(column) != "json" and distinct <= 4:
            shown = ", ".join(map(number, values.unique().sort()))
        else:
            shown = f"{distinct} distinct"
        dtype = str(runs.schema[column]).replace("time_unit='us', time_zone='UTC'", "UTC")
        nulls, key = points[column].null_count() / points.height, runs.keys.get(column)
        rows.append((column, kind(column), dtype, nulls, distinct, shown if len(values) else None, key))
    texts = dict.fromkeys(("column", "kind", "type", "null_share", "distinct", "values", "key"), pl.String)
    frame = pl.DataFrame(rows, texts | {"null_share": pl.Float64, "distinct": pl.Int64}, orient="row")
    titles = {"kind": "kind", "type": "type", "null_share": "nulls", "values": "values", "key": "W&B key"}
    columns = [Column("column", "column", key=True), *(Column(title, c) for c, title in titles.items())]
    return Answer(f"{len(rows)} columns of {points.height} runs", frame, columns)


# Learning curves ------------------------------------------------------------------------------------------------------


def history(runs: Runs) -> pl.LazyFrame:
    """The history of just these runs, one row per logged step, from the `_history.parquet` files beside them."""
    steps = align([pl.scan_parquet(path, glob=False) for path in history_files(runs).values()])[0]
    here = runs.frame.select("entity", "project", run_id="id")
    return steps.join(here, on=["entity", "project", "run_id"], how="semi", maintain_order="left")


def resolve_key(word: str, columns: list[str]) -> str:
    """The history column that `word` means: W&B's own key, or its spelling as a column, with or without `metric_`."""
    if word in columns:
        return word
    for column in columns:
        if column_name(column) in (column_name(word), column_name(word).removeprefix("metric_")):
            return column
    raise Stop(f"there is no {word!r} in the history.{nearest(word, columns)}")


def declared_step(runs: Runs, key: str) -> str | None:
    """The step metric that the runs declared for `key` with `define_metric`, that of most of them; None without one.

    The client keeps the definitions in the config, `_wandb.m`: a list of its MetricRecord messages by field number: 1
    the name, 2 or a glob, 5 the step metric's place in the list, from 1.
    """
    if "_config_json" not in runs.schema:
        return None
    texts = take(runs, ["_config_json"]).select(pl.col("_config_json").str.json_path_match("$._wandb.m")).to_series()
    declared: dict[str, int] = {}
    for text, count in texts.drop_nulls().value_counts(sort=True).rows():
        records = [record if isinstance(record, dict) else {} for record in json.loads(text)]
        by_place = {place: record.get("1") for place, record in enumerate(records, 1)}
        exact = [record for record in records if record.get("1") == key]
        globs = [record for record in records if fnmatch.fnmatchcase(key, record.get("2") or "")]
        steps = [by_place.get(record.get("5")) for record in exact + globs]
        if (step := next(filter(None, steps), None)) not in (None, key):
            declared[step] = declared.get(step, 0) + count
    return max(declared, key=declared.__getitem__, default=None)


def curves(runs: Runs, key: str, by: list[str], x: str | None, smooth: float) -> Answer:
    """Mean and std over runs of a logged key along `x`, one line per group of `by`.

    Without `x` it is the step metric that the runs declared for the key, which is said, else `_step`.

    Every run is smoothed by itself first, as W&B does: an exponential moving average with weight `smooth` on the past,
    divided by the weights so far (debiased), over the logged points in the order of `x`. Text, NaN and
    infinities are no points. Beyond `GRID` distinct values of `x` they are binned, equally wide, each run
    averaged inside a bin; a bin stands at its first `x`.
    """
    frame = history(runs)
    there = frame.collect_schema()
    y = resolve_key(key, there.names())
    declared = declared_step(runs, y) if x is None else None
    if declared in there:
        say(f"Along {declared}, the step metric that the runs declared for {y} (--x chooses another)")
    x = resolve_key(x or (declared if declared in there else "_step"), there.names())
    run, point = ["entity", "project", "run_id"], pl.col("_x", "_y")
    who = take(runs, ["entity", "project", "id", *by]).rename({"id": "run_id"})
    lines = frame.select(*run, _at="_step", _x=x, _y=y).drop_nulls().join(who.lazy(), on=run, how="inner")
    lines = collect(lines, "the history")
    numbers = lines.with_columns(point.cast(pl.Float64, strict=False)).filter(pl.all_horizontal(point.is_finite()))
    if numbers.is_empty():
        raise Stop(f"{y} has no finite value along {x} in the history of these runs.", 1)
    if dropped := lines.height - numbers.height:
        say(f"{y}: {dropped} of {lines.height} points are no finite numbers; left out")
    distinct = numbers.select(pl.struct(run).n_unique()).item()
    if distinct < who.height:
        say(f"{who.height - distinct} of {who.height} runs have no {y} in the history")
    numbers = numbers.sort(*run, "_x", "_at")  # for joins lose the order, and an epoch holds many steps
    if smooth:
        numbers = numbers.with_columns(pl.col("_y").ewm_mean(alpha=1 - smooth, adjust=True).over(run))
    if numbers["_x"].n_unique() > GRID:
        low, high = numbers["_x"].min(), numbers["_x"].max()
        bin_ = ((pl.col("_x") - low) / (high - low) * GRID).floor().clip(0, GRID - 1)
        numbers = numbers.with_columns(pl.col("_x").min().over(bin_))
    numbers = numbers.group_by(*run, *by, "_x", maintain_order=True).agg(pl.col("_y").mean())
    say_nameless(who, by)
    groups = by or ["all"]
    numbers = numbers if by else numbers.with_columns(all=pl.lit("all"))
    stats = numbers.group_by(*groups, "_x", maintain_order=True).agg(summary("_y")[:3])
    if there[x].is_integer():
        stats = stats.with_columns(pl.col("_x").cast(pl.Int64))
    wide, shown = spread(stats.rename({"_x": x}), [x], groups)
    rows = sorted({round(i * (wide.height - 1) / 9) for i in range(10)})
    smoothed = f", smoothed {smooth:g}" if smooth else ""
    word = column_name(y).lower()
    way = highest_wins(word, None, False, reported=False) if DIRECTION.search(word) else None
    return Answer(
        f"{y} along {x}: mean ± std over runs{smoothed}",
        wide,
        shown,
        rows=rows if len(rows) < wide.height else None,
        draw=lambda look: draw_curves(stats, groups, x, spelled(runs, y, way), look),
        caption=y + (f" by {names(by)}" if by else ""),
    )


# An answer becomes text, a file or a picture ------------------------------------------------------------------------


GAP = 2  # between two columns
MORE_ROOM = "A wider terminal (COLUMNS=N) or -o FILE shows all."


def left_aligned(answer: Answer, column: Column) -> bool:
    """Whether the column holds words, not numbers."""
    return answer.frame[column.value].dtype in (pl.String, pl.Boolean)


def number(value: object) -> str:
    """A value as a cell: 4 significant digits, null as `-`, no line breaks or control characters."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if 1e4 <= abs(value) < 1e6:
            return f"{value:.0f}"
        return f"{value:.4g}"
    return plain(value)


def with_error(value: float, std: float) -> str:
    """`value ± std`, both rounded to the std's two significant digits, trailing zeros kept: `0.0156 ± 0.0015`."""
    if not math.isfinite(std) or std <= abs(value) * 1e-12:  # no spread but that of rounding
        return f"{number(value)} ± {number(std) if std > 1 else 0}"
    size = math.floor(math.log10(max(abs(value), std)))
    power = 0 if -5 <= size < 6 else size
    value, std = value / 10.0**power, std / 10.0**power
    digits = 1 - int(f"{std:.1e}".partition("e")[2])
    mean, spread = (f"{round(part, digits) + 0.0:.{max(digits, 0)}f}" for part in (value, std))
    return f"({mean} ± {spread})e{power:+03d}" if power else f"{mean} ± {spread}"


def cells(answer: Answer, column: Column, rows: Sequence[int] | None = None) -> tuple[list[str], list[bool]]:
    """The texts of a shown column, in all rows or in these, and which of them are the best of all rows."""
    best = pl.lit(False)
    if column.best is not None:
        value = finite(column.value)
        best = value == (value.max() if column.best else value.min()).over(column.within or pl.lit(0))
    frame = answer.frame.with_columns(_best=best.fill_null(False))
    frame = frame if rows is None else frame[rows]

    def cell(value: object, to: float | None, std: float | None, n: int | None, near: bool | None) -> str:
        text = number(value) if std is None else with_error(value, std)
        text = text if to is None else f"[{text}, {number(to)}]"
        text = text if n is None else f"{text} (n={n})"
        return f"≈ {text}" if near else text

    needed = (column.value, column.to, column.std, column.n, column.near)
    parts = [frame[name] if name else [None] * frame.height for name in needed]
    return [cell(*values) for values in zip(*parts, strict=True)], frame["_best"].to_list()


def cut(text: str, width: int) -> str:
    """`text` in at most `width` characters, its middle replaced by `…`: names differ at both ends."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return set_cell_size(text, width - 1 - tail).rstrip() + "…" + text[-tail:] if tail else text[:width]


def fit(answer: Answer, texts: dict[Column, list[str]], width: int) -> tuple[dict[Column, list[str]], list[str]]:
    """The columns that `width` characters have room for, with their texts, and notes on what was cut or left out.

    Which row it is, the first column with a best, and its interval are the last to go; words are cut before.
    """
    from rich.cells import cell_len

    widths = {c: max(map(cell_len, [number(c.title), *texts[c]])) + GAP for c in answer.columns}
    metric = next((c for c in answer.columns if c.best is not None), None)
    shown = [c for c in answer.columns if c.key or c is metric]
    words = [c for c in shown if left_aligned(answer, c)]
    full = dict(widths)

    def over() -> int:
        return sum(widths[c] for c in shown) - GAP - width

    while over() > 0 and words and (widest := max(words, key=widths.__getitem__)) and widths[widest] > 8 + GAP:
        widths[widest] -= 1
    shown = [c for c in shown if not (c.to and over() > 0)]
    notes = [
        f"Long texts in {number(c.title)!r} are cut where … stands. {MORE_ROOM}" for c in words if widths[c] < full[c]
    ]
    others = [c for c in answer.columns if c not in shown]
    while others and over() + widths[others[0]] <= 0:
        shown.append(others.pop(0))
    if others:
        listed = ", ".join(number(c.title) for c in others[:8]) + (", ..." if others[8:] else "")
        do = "1 more column does" if len(others) == 1 else f"{len(others)} more columns do"
        notes.append(f"{do} not fit in {width} characters: {listed}. {MORE_ROOM}")
    return {c: [cut(text, widths[c] - GAP) for text in texts[c]] for c in answer.columns if c in shown}, notes


def colourful() -> bool:
    """Whether stdout shows colour: a terminal, unless NO_COLOR says no or FORCE_COLOR yes (no-color.org)."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_answer(answer: Answer) -> None:
    """Print title, table and notes to stdout, as wide as the terminal; what does not fit is named, never squeezed.

    A pipe gets every column at full width, unless COLUMNS says how wide it is. Of rich only the widths of characters
    are used: its console takes longer to import than most questions to answer.
    """
    from rich.cells import cell_len

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() or os.environ.get("COLUMNS") else 10**6
    height = answer.frame.height
    rows = range(height) if answer.rows is None else answer.rows
    texts, best = {}, {}
    for column in answer.columns:
        texts[column], best[column] = cells(answer, column, rows)
        # Colour would be lost in a pipe. The column that orders the rows needs no mark: its best stands on top.
        if column.within or not column.key:
            texts[column] = [f"* {t}" if star else t for t, star in zip(texts[column], best[column], strict=True)]
    shown, notes = fit(answer, texts, width)
    if len(rows) < height:
        notes.append(f"{len(rows)} of {height} rows shown; -o FILE has all.")
    bold, green, normal = ("\x1b[1m", "\x1b[1;32m", "\x1b[0m") if colourful() else ("", "", "")
    widths = {column: max(map(cell_len, [number(column.title), *values])) for column, values in shown.items()}

    def padded(column: Column, text: str, style: str) -> str:
        space = " " * (widths[column] - cell_len(text))
        text = f"{style}{text}{normal}" if style else text
        return text + space if left_aligned(answer, column) else space + text

    def line(parts: Iterable[str]) -> str:
        return (" " * GAP).join(parts).rstrip()

    print(f"{bold}{textwrap.fill(plain(answer.title), width)}{normal}")
    print(line(padded(column, number(column.title), bold) for column in shown))
    print("─" * (sum(widths.values()) + GAP * (len(widths) - 1)))
    for i in range(len(rows)):
        print(line(padded(c, values[i], green if best[c][i] else "") for c, values in shown.items()))
    for note in map(plain, [*answer.notes, *notes]):
        print(
            textwrap.fill(note, width, subsequent_indent="    " if note.startswith(" ") else "", break_on_hyphens=False)
        )
    if answer.closing:
        print()
        print_answer(answer.closing)


def unnested(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with nested columns as JSON text, which CSV can hold."""
    nested = [c for c, dtype in frame.schema.items() if dtype.is_nested()]
    return frame.with_columns(pl.Series(c, [json.dumps(v, default=str) for v in frame[c].to_list()]) for c in nested)


def typeset(answer: Answer, escape: Callable[[str], str], bold: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of the shown table, all of its columns; `escape` is put on every text, the best go into `bold`."""
    columns = []
    for column in answer.columns:
        texts = zip(*cells(answer, column), strict=True)
        columns.append([bold.replace("%", escape(text)) if best else escape(text) for text, best in texts])
    return [escape(number(column.title)) for column in answer.columns], list(zip(*columns, strict=True))


def as_markdown(answer: Answer) -> str:
    """The shown table for a README; the best in bold. Texts stay texts: no link, image, markup or formula."""

    def escape(text: str) -> str:
        return re.sub(r"([\\|_*<>`\[\]~&$]|:(?=//)|(?<=www)\.)", r"\\\1", text)

    head, rows = typeset(answer, escape, "**%**")
    rule = [":--" if left_aligned(answer, column) else "--:" for column in answer.columns]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, rule, *rows])


LATEX = {character: f"\\{character}" for character in "_%&#${}"} | {
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "²": "$^2$",
    "…": r"\dots{}",
}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def as_latex(answer: Answer) -> str:
    """The shown table for a paper, with booktabs; the best in bold."""

    def escape(text: str) -> str:
        text = "--" if text == "-" else "".join(LATEX.get(character, character) for character in text)
        return re.sub(r"(?<![\w.])(-?[\d.]+|\([-\d. $\\pm]+\))e([+-]?)0*(\d+)(?!\w)", power, text)

    def power(match: re.Match[str]) -> str:
        return f"${match[1].replace('$', '')} \\times 10^{{{match[2].replace('+', '')}{match[3]}}}$"

    head, rows = typeset(answer, escape, r"\textbf{%}")
    align = "".join("l" if left_aligned(answer, column) else "r" for column in answer.columns)

    def line(row: Sequence[str]) -> str:
        text = " & ".join(row) + " \\\\\n"
        return "{}" + text if text[0] in "[*" else text  # or it would be the argument of the \\ or \midrule before it

    return (
        f"% needs \\usepackage{{booktabs}}\n\\begin{{tabular}}{{{align}}}\n\\toprule\n"
        f"{line(head)}\\midrule\n{''.join(map(line, rows))}\\bottomrule\n\\end{{tabular}}\n"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --link: #0b5cad; --on: #dbeafe }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --line: #444; --link: #8ab8f0; --on: #1f3a5f }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 88em }
body { margin: 0 auto; padding: 1em } h1 { font-size: 1.5em } h3 { font-size: 1em; margin-bottom: .3em }
h2 { font-size: 1.2em; margin: 2em 0 .5em; border-bottom: 2px solid } a { color: var(--link) }
.table, figure { overflow-x: auto; margin: .5em 0 } .row { display: flex; flex-wrap: wrap; gap: 1em }
.sized { zoom: 1.2 } .sized svg { width: 100%; height: auto }
.table p { margin: 0 } .vega-actions a { margin-right: 1em; font-size: 12px } code { overflow-wrap: anywhere }
.number { text-align: right; white-space: nowrap } td:last-child:not(.number) { min-width: 18em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: .5em }
th, td { padding: .2em .7em; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th button { all: unset; cursor: pointer } :focus-visible { outline: 2px solid var(--link) !important }
[aria-sort=ascending]::after { content: " ▲" } [aria-sort=descending]::after { content: " ▼" }
nav { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .3em 0 }
nav button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 1em }
nav button { margin: .1em; padding: .1em .8em; cursor: pointer }
nav [aria-pressed=true], tr.on { background: var(--on) } .dim { opacity: .12 !important }
#vg-tooltip-element { visibility: hidden; position: fixed; z-index: 2; padding: .4em; font-size: 13px }
#vg-tooltip-element { background: var(--paper); border: 1px solid var(--line) }
#vg-tooltip-element.visible { visibility: visible }
@page { size: A4; margin: 12mm }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #bbb; --link: #000; --on: #fff }
  body { font-size: 9px; padding: 0 } th, td { padding: .1em .4em; overflow-wrap: anywhere }
  .number { white-space: normal }
  nav, .save, .vega-actions { display: none } h2, h3 { break-after: avoid } figure, tr { break-inside: avoid }
  .table, figure { overflow: visible } .sized { zoom: 1; max-width: 100% } svg { max-width: 100%; height: auto }
}
"""

# Draws the pictures (without eval, which the policy does not allow), lets a method be singled out in all of them, and
# sorts a table by the column that is clicked.
SCRIPT = """
const buttons = [...document.querySelectorAll("nav button")], methods = buttons.map(b => b.textContent);
const method = values => methods.find(m => values.some(v => v === m || String(v).startsWith(m + " / ")));
let single;
function pick(name) {
  single = name === single ? undefined : name;
  for (const b of buttons) b.setAttribute("aria-pressed", b.textContent === single);
  for (const row of document.querySelectorAll("tbody tr"))
    row.classList.toggle("on", !!single && method([...row.cells].map(c => c.textContent)) === single);
  for (const figure of document.querySelectorAll("figure")) {
    const marks = [...figure.querySelectorAll(".role-mark *")].filter(e => e.__data__?.datum);
    const named = marks.map(e => [e, method(Object.values(e.__data__.datum))]);
    const there = named.some(([, m]) => m === single);
    for (const [e, m] of named) e.classList.toggle("dim", !!single && there && m !== single);
  }
}
for (const b of buttons) b.addEventListener("click", () => pick(b.textContent));
for (const figure of document.querySelectorAll("figure")) {
  const spec = JSON.parse(figure.querySelector("script").textContent), loader = { target: "_blank" };
  const actions = { export: true, source: false, compiled: false, editor: false };
  const how = { renderer: "svg", ast: true, actions, defaultStyle: false, loader };
  vegaEmbed(figure.querySelector("div"), spec, { ...how, tooltip: { disableDefaultStyle: true } }).then(({ view }) =>
    view.addEventListener("click", (event, item) => {
      const name = item?.datum && !item.href && method(Object.values(item.datum));
      if (name) pick(name);
    }));
}
function value(text) {
  const found = /^[[(]?(-?[\\d.]+(?:e[+-]?\\d+)?)(?:[^)]*\\)(e[+-]?\\d+))?(?![-\\w])/.exec(text);
  return found ? Number(found[1] + (found[2] ?? "")) : text;
}
const order = (a, b) => isFinite(a) && isFinite(b) ? a - b : `${a}`.localeCompare(b);
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button"), body = head.closest("table").tBodies[0];
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [value(row.cells[head.cellIndex].textContent), row]);
    rows.sort(([a], [b]) => (a === "-") - (b === "-") || up * order(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}
"""


def page(title: str, body: str, script: str = "") -> str:
    """A page that loads nothing and runs nothing but `script`: the policy that it carries names its parts by hash."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src-elem {digest(STYLE)}"
    if script:
        policy += f"; style-src-attr 'unsafe-inline'; img-src data:; script-src {digest(script)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{html.escape(plain(title))}</title>\n'
        f"<style>{STYLE}</style>\n{body}" + (f"<script>{script}</script>\n" if script else "") + "</html>\n"
    )


def html_table(answer: Answer) -> str:
    """Title, shown table and notes as a part of a page; the best in bold, a run's name with a link to W&B."""
    head, rows = typeset(answer, html.escape, "<b>%</b>")
    kinds = ["" if left_aligned(answer, column) else " class=number" for column in answer.columns]
    names = [column.value == "name" for column in answer.columns]
    urls = answer.frame["url"] if "url" in answer.frame.columns else [None] * len(rows)
    body = ""
    for row, url in zip(rows, urls, strict=True):
        link = f'<a href="{html.escape(url)}">' if re.match("https?://", url or "") else ""
        texts = [f"{link}{text}</a>" if link and name else text for text, name in zip(row, names, strict=True)]
        body += "<tr>" + "".join(f"<td{kind}>{text}" for kind, text in zip(kinds, texts, strict=True)) + "\n"
    heads = "".join(f"<th scope=col{kind}>{text}" for kind, text in zip(kinds, head, strict=True))
    notes = "".join(f"<p>{html.escape(plain(note))}</p>\n" for note in answer.notes)
    title = f"<h3>{html.escape(plain(answer.title))}</h3>"
    return f"{title}\n<table>\n<thead><tr>{heads}\n</thead>\n<tbody>\n{body}</tbody></table>\n{notes}"


def as_html(answer: Answer) -> str:
    """The shown table as a page of its own."""
    return page(answer.title, "".join(html_table(table) for table in (answer, answer.closing) if table))


def write(path: Path, content: bytes) -> None:
    """Write a file beside `path`, then put it in its place: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with beside.open("xb") as file:  # never through a link that somebody laid there
            file.write(content)
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
    buffer = io.BytesIO()
    if suffix in TYPESET:
        buffer.write(TYPESET[suffix](answer).encode())
        if answer.closing and suffix != ".html":  # where it stands on the page
            buffer.write(f"\n{TYPESET[suffix](answer.closing)}".encode())
    elif suffix == ".csv":
        unnested(answer.frame).write_csv(buffer)
    else:
        (answer.frame.write_json if suffix == ".json" else answer.frame.write_parquet)(buffer)
    write(path, buffer.getvalue())


# Pictures -------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by people who do not see red and green alike; yellow, faint on paper, left out.
# The last is the ink of the page around the picture: black, unless that is dark.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "currentColor"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]  # for more groups than colours
GREY = "#bbb"
SHADES = ["#f7fbff", "#08306b"]  # of a heat map, from the worst to the best
# Of white and black the one with the higher contrast on a cell, 4.6 and above (WCAG 2).
INK = "luminance(scale('color', datum.mean)) < 0.179 ? 'white' : 'black'"
CM = 72 / 2.54  # points; a point is Vega's pixel in .pdf, and 1/72 inch of every other picture
COLUMN, PAGE, TALLEST = 8.5, 17.5, 23.0  # cm: a paper's column and page are as wide, and a page as high
MOST = 80  # rows of a picture that can still be read on a page
THINNED = 1000  # runs that are drawn as points, about; of more every n-th of each group is


@dataclass(frozen=True)
class Look:
    """How a picture is to look. Sizes of all in cm; for a draw_ function in points of what the axes frame."""

    width: float | None = None  # None: as it comes
    height: float | None = None
    title: str | None = None  # None: the answer's caption
    log: bool = False
    band: bool = True


def pointer(frame: pl.DataFrame) -> dict[str, object]:
    """For the pointer: a tooltip with the columns of `frame`, and with a click the run in W&B if `url` is there."""
    columns = [column for column in frame.columns if column != "url" and not column.startswith("_")]
    # In fields, dots, brackets, quotes and colons would mean something else.
    tips = [alt.Tooltip(re.sub(r"([.\[\]'\"\\:])", r"\\\1", column), type="nominal") for column in columns]
    return {"tooltip": tips} | ({"href": "url:N"} if "url" in frame.columns else {})


def measured(look: Look, title: str | None, frame: pl.DataFrame, *columns: str, ticks: int = 5) -> dict[str, Any]:
    """Title, scale and ticks of an axis of the values in `columns`; it need not hold zero.

    It is logarithmic on demand or where the values, all positive, span two decades, with ticks at 1, 2, 5, 10, ...
    """
    low, high = frame.select(pl.min_horizontal(*columns).min().alias("low"), pl.max_horizontal(*columns).max()).row(0)
    if look.log and low <= 0:
        raise Stop(f"--log: {number(low)} has no logarithm. Leave it out (--where), or leave out --log.")
    if look.log or 0 < 100 * low < high:
        values = [digit * 10.0**power for power in range(-12, 13) for digit in (1, 2, 5)]
        return {"title": title, "scale": {"type": "log", "nice": False}, "axis": alt.Axis(values=values)}
    return {"title": title, "scale": {"type": "linear", "zero": False}, "axis": alt.Axis(tickCount=ticks)}


def legend(look: Look, texts: Sequence[str], **how: object) -> alt.Legend:
    """A legend below the picture with as many columns as its width has room for, so that no text is cut."""
    room = (look.width or 6 * CM) * 1.2 / (4.5 * max(map(len, texts)) + 24)
    return alt.Legend(orient="bottom", columns=max(1, min(len(texts), int(room))), symbolOpacity=1, **how)


def panelled(
    look: Look, names: Sequence[str], width: float, height: float, panel: Callable[..., alt.Chart | alt.LayerChart]
) -> alt.TopLevelMixin:
    """A grid of panels, `panel(name, width, height, left)` each, whether at the left edge; of several with names above.

    Each is of `width` x `height` points where `look` asks for nothing; `usermeta` holds the size of all together.
    """
    beside = next(most for most, upto in ((1, 1), (2, 2), (3, 6), (4, 12), (5, len(names))) if len(names) <= upto)
    below = -(-len(names) // beside)
    all_of_them = {"width": look.width or width * beside, "height": look.height or height * below}
    width, height = all_of_them["width"] / beside, all_of_them["height"] / below
    charts = [panel(name, width, height, i % beside == 0) for i, name in enumerate(names)]
    for chart, name in zip(charts, names, strict=True):
        chart.width, chart.height = width, height  # `properties` would copy the chart, each time anew
        if names[1:]:
            chart.title = alt.Title(name, fontSize=8, anchor="middle")
    if names[1:]:
        charts = [alt.concat(*charts, columns=beside, spacing=8, align="each")]
    return charts[0].properties(usermeta=all_of_them)


def draw_rows(
    look: Look, panels: Frames, rows: list[str], titles: tuple[str, str], colours: dict[str, str], runs: Frames | None
) -> alt.TopLevelMixin:
    """A dot plot: a panel per frame, a dot per row of it at `_x`, coloured by `_what`, a diamond if `_best`.

    The frames may also hold `min`, `max`, and below the dots `median` and a grey range `_from` - `_to`; above them an
    interval `_low` - `_high`. `runs` are small points between, at `_x` and, from -0.5 to 0.5 across a row, `_y`; then
    no legend is due. `titles` are those of the rows and of the values.
    """
    shown, several = rows[:MOST], len(panels) > 1
    of = f"{titles[0]} (the first {MOST} of {len(rows)})" if len(rows) > MOST else titles[0]
    key = legend(look, list(colours), title=titles[1] if several else None) if len(colours) > 1 and not runs else None
    colour = alt.Color("_what:N", scale={"domain": list(colours), "range": list(colours.values())}, legend=key)

    def panel(name: str, _: float, height: float, left: bool) -> alt.LayerChart:
        frame, each = panels[name].filter(pl.col("_row").is_in(shown)), height / len(shown)
        ends = [column for column in ("_x", "min", "max") if column in frame.columns]
        axis = measured(look, None if several else titles[1], frame, *ends, ticks=3 if several else 5)
        x = functools.partial(alt.X, type="quantitative", **axis)
        if "_low" in frame.columns and axis["scale"]["type"] == "log":
            frame = frame.with_columns(pl.col("_low").clip(pl.min("min")))  # what is negative has no place
        labels = alt.Axis(labelFontSize=min(7.5, 0.95 * each), labels=left, grid=True)
        row = alt.Y("_row:N", scale={"domain": shown}, title=(of or None) if left else None, axis=labels)
        chart = alt.Chart().encode(row)
        size, layers = min(60.0, 3 * each), []
        if "min" in frame.columns and look.band:
            span = chart.mark_rule(strokeWidth=size / 8, color=GREY, opacity=0.6)
            layers.append(span.encode(x("_from"), alt.X2("_to")))
            layers.append(chart.mark_tick(thickness=2, size=size / 3, color="#888").encode(x("median")))
        if runs:
            run = alt.Chart(runs[name]).mark_circle(size=size / 3, opacity=0.6, color=COLOURS[0])
            across = alt.YOffset("_y:Q", scale={"domain": [-1, 1]})
            layers.append(run.encode(x("_x"), row, across, **pointer(runs[name])))
        shape = alt.condition("datum._best", alt.value("diamond"), alt.value("diamond" if runs else "circle"))
        area = alt.condition("datum._best", alt.value(1.6 * size), alt.value(size))
        dot = chart.mark_point(filled=True, opacity=1).encode(x("_x"), colour, shape=shape, size=area)
        layers.append(dot.encode(**pointer(frame)))
        if "_low" in frame.columns:
            layers.append(chart.mark_rule(color=COLOURS[-1]).encode(x("_low"), alt.X2("_high")))
        return alt.layer(*layers, data=frame)

    return panelled(look, list(panels), (4 if several else 5.5) * CM, (24 if runs else 15) * len(shown), panel)


def draw_top(frame: pl.DataFrame, metric: str, title: str, look: Look) -> alt.TopLevelMixin:
    """The top runs, best on top, coloured by `arch`; `frame` has `#`, `name`, `metric`, perhaps `arch` and `url`."""
    frame = frame.select(c for c in ("#", "name", metric, "arch", "dataset", "url") if c in frame.columns).head(MOST)
    rows = [f"{i}  {cut(plain(name or '-'), 48)}" for i, name in enumerate(frame["name"], 1)]
    what = pl.col("arch").fill_null("-") if "arch" in frame.columns else pl.lit("run")
    frame = frame.with_columns(pl.Series("_row", rows), _x=metric, _best=pl.col("#") == 1, _what=what)
    archs = frame["_what"].unique().sort().to_list()
    colours = dict(zip(archs, COLOURS if len(archs) <= len(COLOURS) else COLOURS[:1] * len(archs), strict=False))
    return draw_rows(look, {"": frame}, rows, ("", title), colours, None)


def draw_groups(
    points: pl.DataFrame, by: list[str], metrics: list[str], order: list[str], titles: list[str], look: Look
) -> alt.TopLevelMixin:
    """The runs of each group as points over their median and middle half, the mean as a diamond; a panel per metric."""
    means, runs = {}, {}
    counts = points.select(map(finite, metrics)).count().row(0)
    every = max(1, -(-max(counts) // THINNED))  # in all panels the same, for it is said once
    for metric, title in zip(metrics, titles, strict=True):
        known = labelled(points, by, "_row").with_columns(finite(metric)).drop_nulls(metric)
        known = known.drop(m for m in metrics if m != metric)
        best = pl.col("_row") == order[0]
        what = pl.when(best).then(pl.lit("best")).otherwise(pl.lit("other"))
        half = {end: pl.quantile(metric, share, "linear") for end, share in (("_from", 0.25), ("_to", 0.75))}
        found = known.group_by("_row").agg(*summary(metric), **half)
        means[title] = found.with_columns(_x="mean", _best=best, _what=what)
        # Evenly over the values of each group: in the order of the runs, sweeps would lose some groups whole.
        drawn = (pl.col(metric).rank("ordinal").over("_row") - 1) % every == 0
        known = known.filter(pl.col("_row").is_in(order[:MOST]), drawn)
        # The golden ratio spreads the points of a group evenly over its height, and the same way every time.
        spread = (pl.int_range(pl.len()).over("_row") * 0.618034) % 1 - 0.5
        runs[title] = known.with_columns(_x=metric, _y=spread)
    down = names(by) + (f", one in {every} runs drawn" if every > 1 else "")
    colours = {"best": COLOURS[1], "other": COLOURS[-1]}
    return draw_rows(look, means, order, (down, titles[0]), colours, runs)


def draw_best(
    chosen: pl.DataFrame, rows: list[str], cols: list[str], title: str, descending: bool, look: Look
) -> alt.TopLevelMixin:
    """The honest comparison, one panel per value of `cols`: each chosen configuration's mean under its interval.

    Behind both stand median and range of all configurations. Rows are ordered by their mean rank over the panels.
    """
    title, mean, rank = f"{title}: mean, 95 % interval", pl.col("mean"), pl.col("_rank")
    what = ["the best", "≈ not told apart from it", "the others", "all configurations: median, range"]
    colours = dict(zip(what, [COLOURS[1], COLOURS[5], COLOURS[0], GREY], strict=True))
    split = bool(rows and cols)
    frame = labelled(chosen.drop("values", "seeds"), rows or cols, "_row")
    frame = labelled(frame, cols, "_col") if split else frame.with_columns(_col=pl.lit(""))
    frame = frame.with_columns(mean.rank("min", descending=descending).over("_col").alias("_rank"))
    near = pl.when("not_told_apart").then(pl.lit(what[1])).otherwise(pl.lit(what[2]))
    low, high = (pl.col(end).fill_null(mean) for end in ("ci_low", "ci_high"))
    which = pl.when(rank == 1).then(pl.lit(what[0])).otherwise(near)
    frame = frame.with_columns(_x=mean, _best=rank == 1, _what=which, _from="min", _to="max", _low=low, _high=high)
    order = frame.group_by("_row", maintain_order=True).agg(rank.mean()).sort("_rank", maintain_order=True)
    panels = {name: frame.filter(_col=name) for name in (labels(chosen, cols) if split else [""])}
    return draw_rows(look, panels, order["_row"].to_list(), (names(rows or cols), title), colours, None)


def draw_pivot(
    groups: pl.DataFrame, rows: list[str], cols: list[str], title: str, descending: bool, look: Look
) -> alt.TopLevelMixin:
    """The pivot as a heat map, dark is good; each cell says its mean, std and n as far as they can be read in it.

    The best of each column is framed and bold; ≈ stands before what is `not_told_apart` from it, if `groups` says so.
    """
    mean, across, down = pl.col("mean"), labels(groups, cols), labels(groups, rows)
    frame = labelled(labelled(groups, rows, "_row"), cols, "_col").drop_nulls("mean")
    near = pl.col("not_told_apart") if "not_told_apart" in frame.columns else pl.lit(False)
    best = mean == (mean.max() if descending else mean.min()).over("_col")
    frame = frame.select("mean", "std", "n", "_row", "_col", _near=near, _best=best)
    scale = measured(look, None, frame, "mean")["scale"]
    scale |= {"range": SHADES if descending else SHADES[::-1], "interpolate": "rgb", "nice": False}
    bar = {"orient": "bottom", "gradientLength": 110, "gradientThickness": 8, "titleLimit": 0}

    def panel(_: str, width: float, height: float, __: bool) -> alt.LayerChart:
        each, high = width / len(across), height / len(down)
        values = frame.select("_near", "mean", "std", "n").rows()
        texts = ["≈ " * near + (number(m) if std is None else with_error(m, std)) for near, m, std, _ in values]
        lines = [[text, f"n={n}"] for text, (*_, n) in zip(texts, values, strict=True)]
        if each < 3.9 * max(map(len, texts)):  # not in one line that can be read: the std goes below, in place of n
            lines = [text.replace("(", "").replace(" ± ", "|± ").split("|") for text in texts]
        size = min(8.0, each / (0.56 * max(len(line) for cell in lines for line in cell)))
        two = high > 2.2 * size
        texts = ["|".join(cell[: 1 + two]) for cell in lines]
        top = {"orient": "top", "labelAngle": 0 if each > 60 else -40, "labelOverlap": False}
        cell = alt.Chart(frame.with_columns(pl.Series("_text", texts, pl.String))).encode(
            alt.X("_col:N", sort=across, title=names(cols), axis=top), alt.Y("_row:N", sort=down, title=names(rows))
        )
        shade = alt.Color("mean:Q", title=title, scale=scale, legend=bar)
        best = cell.transform_filter("datum._best").mark_rect(filled=False, stroke=COLOURS[-1], strokeWidth=1.2)
        ink = {"color": alt.expr(INK), "fontWeight": alt.expr("datum._best ? 'bold' : 'normal'"), "fontSize": size}
        words = cell.mark_text(**ink, lineBreak="|", lineHeight=1.2 * size, dy=-0.6 * size * two).encode(text="_text:N")
        layers = [cell.mark_rect(stroke="white").encode(shade, **pointer(frame)), best, words]
        return alt.layer(*layers[: 2 + (size >= 3.5)])

    return panelled(look, [""], 66 * len(across), 26 * len(down), panel)


def draw_curves(stats: pl.DataFrame, groups: list[str], x: str, title: str, look: Look) -> alt.TopLevelMixin:
    """Learning curves: the mean of each group as a line, mean ± std as a band; many of several columns in panels."""
    lines, panels, by = labels(stats, groups), [""], groups
    if len(lines) > 2 * len(COLOURS) and groups[1:]:
        by, panels, lines = groups[:-1], labels(stats, groups[-1:]), labels(stats, groups[:-1])
    mean, std, axis = pl.col("mean"), pl.col("std"), measured(look, title, stats, "mean")
    frame = labelled(labelled(stats, by, "_line"), groups[-1:], "_col").sort("_x")
    frame = frame.select("mean", "std", "n", "_col", x="_x", group="_line", _low=mean - std, _high=mean + std)
    if axis["scale"]["type"] == "log":
        frame = frame.with_columns(pl.col("_low").clip(mean.min()))
    few = len(lines) <= len(COLOURS)
    key = legend(look, lines, title=names(by), symbolType="stroke", symbolSize=200) if lines[1:] else None
    colour = alt.Color("group:N", scale={"domain": lines, "range": COLOURS}, legend=key)
    dashes = [dash for dash in DASHES for _ in COLOURS]
    dash = alt.StrokeDash("group:N", scale={"domain": lines, "range": dashes}, legend=key)

    def panel(name: str, _: float, __: float, left: bool) -> alt.LayerChart:
        mine = frame.filter(_col=name) if panels[1:] else frame
        labelled_y = axis if left else axis | {"title": None, "axis": alt.Axis(labels=False)}
        along = alt.X("x:Q", title=x, scale={"nice": False}, axis=alt.Axis(tickCount=4))
        chart = alt.Chart(mine).encode(along, colour)
        band = chart.mark_area(opacity=0.18).encode(alt.Y("_low:Q", **labelled_y), alt.Y2("_high"))
        line = chart.mark_line(strokeWidth=1.5).encode(alt.Y("mean:Q", **labelled_y), dash, **pointer(frame))
        return alt.layer(band, line) if look.band and few else alt.layer(line)  # more bands would hide the lines

    width, height = (4, 3.2) if panels[1:] else (6 if few else 12, 4.5)
    return panelled(look, panels, width * CM, height * CM, panel).resolve_scale(x="shared", y="shared")


def shown_plainly(spec: Any) -> Any:
    """A specification whose every text went through `plain`, and whose links lead to web pages.

    Some control characters, and addresses that Vega finds unsafe, end its drawing and with it Python.
    """
    if isinstance(spec, dict):
        web = {key: value for key, value in spec.items() if key != "url" or re.match("https?://", str(value))}
        return {plain(key): shown_plainly(value) for key, value in web.items()}
    if isinstance(spec, list):
        return [shown_plainly(value) for value in spec]
    return plain(spec) if isinstance(spec, str) else spec


TYPE = {"labelFontSize": 7.5, "titleFontSize": 8, "labelColor": "currentColor", "titleColor": "currentColor"}
THEME = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "padding": 3,
    "axis": TYPE | {"gridColor": "#8883"},
    "axisX": {"labelFlush": False, "labelOverlap": True, "labelSeparation": 4},
    "axisYQuantitative": {"labelFlush": True},
    "legend": TYPE | {"labelLimit": 0, "titleLimit": 0, "symbolSize": 40, "offset": 8},
    "title": {"fontSize": 9.5, "color": "currentColor"},
    "view": {"stroke": None},
}
SIZE = re.compile(r'width="([\d.]+)" height="([\d.]+)"')


def picture(
    draw: Callable[[Look], alt.TopLevelMixin], title: str, look: Look, times: int = 4
) -> tuple[dict[str, Any], str]:
    """A picture as a Vega-Lite specification and as SVG, of the size that `look` asks for or one that fits a page.

    Only the drawing knows the room that axes, titles and legends take: it is drawn as it comes, which says whether it
    fits a column or needs the page, and again into the room that they leave, up to `times`: once for a page
    that scrolls. `usermeta` holds the width in points.
    """
    alt.data_transformers.disable_max_rows()
    width = height = within = across = None  # in points, wanted of all and of what the axes frame
    for _ in range(times):
        room = width or PAGE * CM
        chart = draw(replace(look, width=across, height=within))
        if title:
            lines = textwrap.wrap(plain(title), int(room / 4.9))
            chart = chart.properties(title=alt.Title(lines, anchor="start", frame="bounds", offset=8))
        theme = THEME | {"axis": THEME["axis"] | {"labelLimit": 0.45 * room}}
        spec = shown_plainly(chart.to_dict(validate=False)) | {"config": theme}
        svg = vl_convert.vegalite_to_svg(spec)
        wide, high = map(float, SIZE.search(svg).groups())
        if width is None:
            width = CM * (look.width or (COLUMN if wide <= COLUMN * CM else PAGE))
            height = CM * look.height if look.height else TALLEST * CM if high > TALLEST * CM else None
        if abs(wide - width) < 2 and abs(high - (height or high)) < 2:
            break
        across = max(30.0, spec["usermeta"]["width"] + width - wide)
        within = height and max(20.0, spec["usermeta"]["height"] + height - high)
    return spec | {"usermeta": {"width": wide}}, svg


def figure(title: str, spec: dict[str, Any]) -> str:
    """A picture as a part of a page, whose script draws it in the page's ink; `title` is its alternative text."""
    text = json.dumps(spec | {"description": plain(title), "background": None})
    text = text.replace("<", r"\u003c")  # no text can end the element
    width = f'class=sized style="width:{spec["usermeta"]["width"]:.0f}pt"'
    return f'<figure><div {width}></div><script type="application/json">{text}</script></figure>\n'


def plot(answer: Answer, path: Path, look: Look) -> None:
    """Draw the answer to a file: .html (interactive, all of Vega inlined, no network needed), .png, .svg or .pdf."""
    assert answer.draw is not None
    spec, svg = picture(answer.draw, answer.caption if look.title is None else look.title, look)
    suffix = path.suffix.lower()
    if suffix == ".html":
        script = vl_convert.javascript_bundle() + SCRIPT
        write(path, page(answer.caption, figure(answer.caption, spec), script).encode())
    elif suffix == ".svg":
        write(path, SIZE.sub(r'width="\1pt" height="\2pt"', svg, count=1).encode())
    else:
        write(path, vl_convert.svg_to_pdf(svg) if suffix == ".pdf" else vl_convert.svg_to_png(svg, ppi=300))


# The report -----------------------------------------------------------------------------------------------------------


def projects(runs: Runs) -> Answer:
    """What was run: one row per project with `runs`, those of each state, `first` and `last` day, `hours`, if known."""
    types = {"state": pl.String, "created_at": pl.Datetime("us", "UTC"), "runtime_seconds": pl.Float64}
    points = take(runs, ["entity", "project", *(c for c in types if c in runs.schema)])
    points = points.with_columns(pl.lit(None, dtype).alias(c) for c, dtype in types.items() if c not in points.columns)
    by = [c for c in ("entity", "project") if c == "project" or points[c].n_unique() > 1]
    created, seconds = pl.col("created_at"), pl.col("runtime_seconds")
    states = [(pl.col("state") == state).sum().alias(state) for state in STATES if state in points["state"]]
    days = {"first": created.min().dt.date(), "last": created.max().dt.date()}
    hours = pl.when(seconds.count() > 0).then(seconds.sum() / 3600)
    frame = points.group_by(by).agg(pl.len().alias("runs"), *states, **days, hours=hours)
    frame = frame.sort("runs", *by, descending=[True, *[False] * len(by)])
    monday = created.dt.truncate("1w").dt.date()
    weeks = points.drop_nulls("created_at").select(week=monday, until=monday.dt.offset_by("6d"), project=label(by))

    def draw(look: Look) -> alt.TopLevelMixin:
        x, y = alt.X("week:T", title="runs per week", scale={"type": "utc"}), alt.Y("count()", title="runs")
        bars = alt.Chart(weeks.cast(pl.String)).mark_bar(orient="vertical", color=COLOURS[0])
        bars = bars.encode(x, y, alt.X2("until"), tooltip=["week:N", "project:N", "count()"])
        if 1 < frame.height <= len(COLOURS):
            key = legend(look, weeks["project"].unique(), title=None)
            bars = bars.encode(alt.Color("project:N", scale={"range": COLOURS}, legend=key))
        return panelled(look, [""], 12 * CM, 3 * CM, lambda *_: bars)

    title = f"{points.height} runs, {number(frame['hours'].sum())} hours"
    columns = [Column(c, c, key=c in by) for c in frame.columns]
    return Answer(title, frame, columns, draw=draw if weeks.height else None)


def varied(runs: Runs) -> Answer:
    """What varied: one row per hyperparameter, its `values` with how many runs have each; constants in a note."""
    columns = hyperparameters(runs)
    points = with_seed(take(runs, columns), [c for c in columns if is_seed(c)])
    counts = {c: points[c].drop_nulls().value_counts(sort=True) for c in without_labels(points, columns)}
    constant = [f"{short(c)}={number(table[c][0])}" for c, table in counts.items() if table.height == 1]
    rows = []
    for column in distinct_partitions(points, [c for c, table in counts.items() if table.height > 1]):
        table = counts[column]
        few = table.sort(column) if table.height <= 8 else table.head(6)
        texts = [f"{number(value)} ({n})" for value, n in few.rows()]
        if table.height > few.height:
            low, high = number(table[column].min()), number(table[column].max())
            span = f" from {low} to {high}" if table[column].dtype.is_numeric() else ""
            texts.append(f"{table.height - few.height} more{span}")
        rows.append((column, table.height, table["count"].sum(), ", ".join(texts)))
    frame = pl.DataFrame(rows, ["column", "distinct", "runs", "values (runs)"], orient="row")
    more = [f"and {len(constant) - 20} more (--schema)"] if constant[20:] else []
    notes = [f"The same in all runs: {', '.join(constant[:20] + more)}"] if constant else []
    return Answer(f"{frame.height} hyperparameters vary", frame, [Column(c, c) for c in frame.columns], notes)


def draw_along(points: pl.DataFrame, column: str, metric: str, title: str, look: Look) -> alt.TopLevelMixin:
    """The metric of the runs along a hyperparameter of numbers, and a line through the mean at each of its values."""
    means = points.group_by(column).agg(pl.col(metric).mean(), pl.len().alias("n")).sort(column)

    def drawn(frame: pl.DataFrame) -> alt.Chart:
        frame = frame.sort(column, metric).gather_every(-(-frame.height // THINNED))  # evenly, see `draw_groups`
        frame = frame.with_columns(_x=column, _y=metric)
        x, y = alt.X("_x:Q", **measured(look, short(column), points, column)), measured(look, title, points, metric)
        return alt.Chart(frame).encode(x, alt.Y("_y:Q", **y), **pointer(frame))

    dots = drawn(points).mark_circle(color=COLOURS[0], opacity=0.5, size=15)
    chart = alt.layer(dots, drawn(means).mark_line(point={"color": COLOURS[1]}, color=COLOURS[1], strokeWidth=1.5))
    return panelled(look, [""], 5 * CM, 5 * CM, lambda *_: chart)


def validation_metric(runs: Runs, metric: str) -> str:
    """The metric to choose by: `metric` itself if of validation, else such a one of its or a common measure."""
    measures = [metric.rpartition("_")[2], *MEASURES]
    of = {c: measures.index(c.rpartition("_")[2]) for c in runs.schema if c.rpartition("_")[2] in measures}
    of = {c: i for c, i in of.items() if re.search("^metric(_.*)?_(val|valid|validation|eval|dev)_", c)}
    counts = take(runs, of).select(pl.all().is_finite().sum()).row(0, named=True) if of else {}
    if found := [c for c in of if counts[c] or c == metric]:
        return min(found, key=lambda c: (c != metric, of[c], len(c)))
    raise Stop(f"no validation metric (val/{measures[0]}, val/loss, ...) has a value. Name one with --best-by.")


@contextlib.contextmanager
def heard() -> Iterator[Callable[[], list[str]]]:
    """Hold back what is said; yields a function that lists the notices so far, each once. At the end they are said."""
    caught = io.StringIO()

    def notices() -> list[str]:
        return list(dict.fromkeys(re.sub(r"\n {3,}", " ", caught.getvalue()).splitlines()))

    try:
        with contextlib.redirect_stderr(caught):
            yield notices
    finally:
        for notice in notices():
            say(notice)


def part(answer: Answer | Stop) -> str:
    """An answer on the page: table, link that saves it, picture; or the word why there is none."""
    if isinstance(answer, Stop):
        return f"<p>Left out: {html.escape(plain(answer))}</p>\n"
    name = re.sub(r"\W+", "_", answer.title)[:100]
    data = base64.b64encode(unnested(answer.frame).write_csv().encode()).decode()
    link = f'<p class=save><a download="{name}.csv" href="data:text/csv;base64,{data}">Save as CSV</a></p>\n'
    table = html_table(answer if answer.rows is None else replace(answer, frame=answer.frame[answer.rows]))
    drawn = figure(answer.title, picture(answer.draw, "", Look(), 1)[0]) if answer.draw else ""
    return f"<div class=table>{table}</div>\n{link}{drawn}{part(answer.closing) if answer.closing else ''}"


def report(every: Runs, runs: Runs, args: argparse.Namespace, said: Callable[[], list[str]]) -> str:
    """The page of --report: every question about `runs`, asked as the command line asks it, and laid out.

    `every` are the runs before the filters, `said` lists the notices. What cannot be answered is left out with a word.
    """

    def ask(of: Runs | None = None, **options: object) -> Answer:
        mine = dict.fromkeys(("best_by", "group_by", "rows", "cols", "top")) | {"metric": args.metric or metric}
        return answer_to(argparse.Namespace(**(vars(args) | mine | options)), of or runs)

    def named(option: str | None, otherwise: Callable[[], str]) -> str | None:
        with contextlib.nullcontext() if option else contextlib.suppress(Stop):
            return resolve_metric(directed(option)[0], runs) if option else otherwise()

    def differing(words: str) -> list[str]:
        return [c for c in resolve_all(words, runs) if take(runs, [c])[c].n_unique() > 1]

    def comparison() -> str:
        if metric and not by:
            raise Stop("no column that tells methods apart differs. Name one with --group-by.")
        try:
            choice = {"best_by": args.best_by or validation_metric(runs, metric or "")}
            answer = ask(**cells, **choice)
        except Stop as stop:  # then the weaker one
            weak = "<p>These are means over all runs: tuning and luck count in them as much as the method.</p>"
            return part(stop) + weak + part(ask(**cells, pivot=bool(cols)))
        if not cols:
            return part(answer)
        paper = ask(**cells, **choice, pivot=True)
        notes = [note for note in paper.notes if "--pivot" not in note]
        return part(replace(paper, notes=notes, draw=None, closing=None)) + part(answer)

    def best() -> str:
        answer = ask(json=True)  # with every column
        shown = [column.value for column in answer.columns]
        config = [c for c in varying.frame["column"] if c not in shown]
        frame = answer.frame.head(TOP).select(*shown, *config, *(c for c in ("id", "url") if c in answer.frame.columns))
        columns = [*answer.columns, *(Column(short(c), c) for c in config)]
        return part(replace(answer, frame=frame, rows=None, columns=columns))

    def matters() -> str:
        answer, drawn = ask(described, importance=True), ""
        strongest = answer.frame["column"].head(3).to_list()
        points = take(runs, [*strongest, metric, *(c for c in ("name", "url") if c in runs.schema)])
        points = points.with_columns(finite(metric)).drop_nulls(metric)
        for c in strongest:
            along = functools.partial(draw_along, points.drop_nulls(c), c, metric, spelled(runs, metric))
            draw = along if points[c].dtype.is_numeric() else ask(group_by=c).draw  # names read better as rows
            drawn += figure(f"{metric} along {c}", picture(draw, "", Look(), 1)[0])
        if points.height > THINNED:
            drawn += f"<p>Of {points.height} runs each picture shows at most about {THINNED}; the means are of all.</p>"
        return f"{part(answer)}<div class=row>{drawn}</div>\n"

    def careful() -> str:
        times = [f"{datetime.fromtimestamp(exported_at(path), UTC):%Y-%m-%d %H:%M}" for path in runs.files]
        files = pl.DataFrame({"file": list(map(str, runs.files)), "exported (UTC)": times})
        command = f"<p>Made by <code>{html.escape(plain(shlex.join(sys.argv)))}</code></p>\n"
        notices = "".join(f"<li>{html.escape(notice)}\n" for notice in said())
        table = Answer("The files", files, [Column(c, c) for c in files.columns])
        return f"<ul>\n{notices}</ul>\n{part(table)}{command}"

    metric = named(args.metric, lambda: default_metric(runs))
    select = named(args.best_by, lambda: validation_metric(runs, metric or ""))
    asked = (metric, select, named(args.at_best, lambda: metric or ""))  # no question needs to read more metrics
    runs = replace(runs, schema={c: dtype for c, dtype in runs.schema.items() if kind(c) != "metric" or c in asked})
    by, cols = differing(args.group_by or args.rows or "arch"), differing(args.cols or "dataset")
    cells = {"rows": ",".join(by), "cols": ",".join(cols)} if by and cols else {"group_by": ",".join(by)}
    ignore, only = resolve_globs(args.ignore or "", runs), resolve_globs(args.config or "*", runs)
    out = {c for c in hyperparameters(runs) if c not in (*by, *cols) and (c in ignore or c not in only)}
    described = replace(runs, schema={c: dtype for c, dtype in runs.schema.items() if c not in out})
    varying = varied(described)
    all_states = argparse.Namespace(**(vars(args) | {"state": ["all"], "protocol": args.protocol or "all"}))
    key = select or metric or ""
    sections = {
        "What was run": lambda: part(projects(keep(every, all_states))),
        "What varied": lambda: part(varying),
        "The comparison": comparison,
        "The best runs": best,
        "What matters": matters,
        "Learning curves": lambda: part(ask(curves=runs.keys.get(key, key), group_by=",".join(by))),
        "What to be careful about": careful,
    }
    body = ""
    for i, (name, content) in enumerate(sections.items(), 1):
        try:
            text = content()
        except Stop as stop:
            text = part(stop)
        body += f"<section><h2>{i}. {name}</h2>\n{text}</section>\n"
    methods = labels(take(runs, by), by) if by else []
    buttons = "".join(f"<button aria-pressed=false>{html.escape(plain(method))}</button>" for method in methods)
    of = take(runs, ["project"])["project"].unique().sort() if "project" in runs.schema else map(str, runs.files)
    title = f"{runs.keys.get(metric, short(metric)) if metric else 'Runs'}: {', '.join(of)}"
    head = f"<h1>{html.escape(plain(title))}</h1>\n<nav aria-label='Single out a method'>{buttons}</nav>\n"
    return page(title, f"{head}<main>\n{body}</main>\n", vl_convert.javascript_bundle() + SCRIPT)


# The command ----------------------------------------------------------------------------------------------------------


def file_of(suffixes: Sequence[str]) -> Callable[[str], Path]:
    """An argument type: a path that ends in one of `suffixes`."""

    def path(text: str) -> Path:
        found = Path(os.path.expanduser(text))  # noqa: PTH111
        if found.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {' '.join(suffixes)}")
        return found

    return path


def number_of(kind: type, holds: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """An argument type: a number of which `holds` is true; `what` it is called in the error."""

    def converted(text: str) -> float:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")

    return converted


def parser() -> argparse.ArgumentParser:
    """The options, by question."""
    description, _, examples = (__doc__ or "").partition("\n\n  uv run")
    made = Parser(
        prog="analyze_runs.py",
        description=description,
        epilog=f"examples:\n  uv run{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = f"Parquet files, folders or globs (default: the newest *_runs.parquet in {FOLDER}/)"
    made.add_argument("input", nargs="*", metavar="FILE", help=files)
    runs = made.add_argument_group("which runs").add_argument
    runs("-f", "--filter", metavar="REGEX", help="name matches, any case, anywhere in it")
    runs("--project", metavar="REGEX", help="project matches, likewise")
    runs("--protocol", choices=("distribution", "single_graph", "all"), help="how the data were split (default: all)")
    states = "states, or all; repeatable (default: finished)"
    runs("--state", type=parse_states, action="extend", metavar="STATE,..", help=states)
    runs("--tag", action="append", metavar="TAG", help="has this tag; repeat for any of several")
    runs("--where", metavar="SQL", help="a condition, such as 'k >= 16 AND metric_test_mse < 0.5'")
    metric = made.add_argument_group("which metric").add_argument
    common = "test/mse, test_mse or metric_test_mse (default: the first common test or val metric with values)"
    metric("-m", "--metric", metavar="NAME", help=common)
    metric("--metrics", metavar="A,B,..", help="several side by side, in --top and --group-by; the first orders")
    directions = "the highest is the best, whatever the name says; NAME:max and NAME:min say it of one metric"
    metric("--descending", action="store_true", help=directions)
    ask = made.add_argument_group("which question (default: --top 10)").add_argument
    count = number_of(int, lambda n: n > 0, "whole number above 0")
    ask("-n", "--top", type=count, metavar="N", help="the N best runs; of another question the first N rows")
    ask("-g", "--group-by", metavar="A,B,..", help="n, mean, std, min, median, max of each group")
    ask("--pivot", action="store_true", help="mean ± std (n) for each arch (rows) and dataset (columns)")
    ask("--rows", metavar="A,B,..", help="other rows for --pivot and --best-by (default: arch)")
    ask("--cols", metavar="A,B,..", help="other columns for them (default: dataset)")
    best_by = (
        "in each cell of --rows x --cols, or of --group-by, the configuration with the best mean METRIC over seeds; "
        "its --metric as mean ± std with a 95%% interval, the difference to the best, median and range of all "
        "configurations; with --pivot as a table of rows x columns"
    )
    ask("--best-by", metavar="METRIC", help=best_by)
    ask("--over", metavar="GLOB,..", help="what --best-by averages over (default: every seed)")
    ask("--ignore", metavar="GLOB,..", help="columns that are no hyperparameters, beside the labels that it finds")
    ask("--config", metavar="GLOB,..", help="just the columns that make a configuration")
    ask("--importance", action="store_true", help="how strongly each varying hyperparameter goes with the metric")
    best = "metrics as they were at the step where each run's KEY was best, from the history (early stopping)"
    metric("--at-best", metavar="KEY[:max]", help=best)
    ask("--sql", metavar="QUERY", help="Polars SQL over the tables runs and history")
    ask("--schema", action="store_true", help="the columns: kind, type, share of nulls, values, W&B key")
    ask("--match", metavar="REGEX", help="of --schema, the columns that match")
    ask("--curves", metavar="KEY", help="mean ± std of a logged key over the runs of each --group-by")
    ask("--x", metavar="KEY", help="what --curves aligns by (default: the declared step metric, else _step)")
    weight = number_of(float, lambda w: 0 <= w < 1, "number from 0 up to, but not, 1")
    ask("--smooth", type=weight, default=0.0, metavar="W", help="smooth --curves as W&B does, 0 <= W < 1")
    out = made.add_argument_group("where to").add_argument
    out("-o", "--output", type=file_of(SAVED), metavar="FILE", help=f"save what is shown: {' '.join(SAVED)}")
    out("-p", "--plot", type=file_of(DRAWN), metavar="FILE", help=f"draw it: {' '.join(DRAWN)}")
    out("--title", metavar="TEXT", help="the picture's title; '' for none")
    sizes = f"the picture's width (default: {COLUMN} or {PAGE}, a column or the page)"
    centimetres = number_of(float, lambda cm: 2 <= cm <= 100, "length from 2 to 100 cm")
    out("--width", type=centimetres, metavar="CM", help=sizes)
    out("--height", type=centimetres, metavar="CM", help=f"its height (default: as it comes, up to {TALLEST:g})")
    out("--log", action="store_true", help="a logarithmic axis (default: where values span two decades)")
    out("--no-band", action="store_true", help="no bands around curves, no ranges of --best-by")
    out("--report", type=file_of((".html",)), metavar="FILE", help="all questions on one page: .html")
    out("--json", action="store_true", help="print it as JSON instead of a table")
    return made


QUESTIONS = ("--schema", "--sql", "--curves", "--importance", "--best-by", "--pivot", "--group-by", "--top")
LOOKS = "--title --width --height --log --no-band"
# Options that not all questions take, and the questions (or the option) that they go with.
GOES_WITH = {
    LOOKS: "--plot",
    "--plot": "--top --group-by --pivot --best-by --curves",
    "--metrics": "--top --group-by",
    "--rows --cols": "--pivot --best-by",
    "--over --ignore --config": "--best-by",
    "--no-band": "--curves --best-by",
    "--x --smooth": "--curves",
    "--top": "--top --group-by --best-by --importance --sql",
}


def check(args: argparse.Namespace, made: argparse.ArgumentParser) -> None:
    """End with a usage error when options ask two questions at once, or belong to a question that is not asked."""
    given = {f"--{name.replace('_', '-')}" for name, value in vars(args).items() if value}
    if "--report" in given:
        single = {"--metrics", "--match", "--output", "--plot", "--json", *LOOKS.split(), *QUESTIONS}
        if others := sorted(given & single - {"--best-by", "--group-by"}):
            made.error(f"--report asks every question and writes a page of its own; leave out {', '.join(others)}")
        return
    given |= {"--schema"} if "--match" in given else set()
    given |= {"--pivot"} if given & {"--rows", "--cols"} and "--best-by" not in given else set()
    asked = [question for question in QUESTIONS[:-1] if question in given]
    if asked and asked[0] in ("--curves", "--best-by"):  # which may be asked by groups, or as a pivot
        asked = [q for q in asked if q != "--group-by" and (asked[0], q) != ("--best-by", "--pivot")]
    if asked[1:]:
        made.error(f"{' and '.join(asked)} are separate questions; ask one at a time")
    there = {(asked or ["--top"])[0], *(given & {"--plot"})}
    if {"--at-best", "--curves"} <= given:
        made.error("--at-best does not go with --curves, which show every step")
    for options, others in GOES_WITH.items():
        if (wrong := [o for o in options.split() if o in given]) and not there.intersection(others.split()):
            known = " or ".join(", ".join(o for o in others.split() if o not in wrong).rsplit(", ", 1))
            made.error(f"{' and '.join(wrong)} {'go' if wrong[1:] else 'goes'} with {known}")
    if "--group-by" in given and given & {"--rows", "--cols", "--pivot"}:
        made.error("--rows and --cols go with --pivot, or with --best-by without --group-by")


def answer_to(args: argparse.Namespace, runs: Runs) -> Answer:
    """The answer to the question that the options ask."""
    if args.schema or args.match:
        return schema(runs, args.match)
    if args.sql:
        return sql(runs, args.sql)
    by = resolve_all(args.group_by or "", runs)
    if args.curves:
        return curves(runs, args.curves, by, args.x, args.smooth)
    said: dict[str, str | None] = {}
    for word in filter(str.strip, [args.metric or "", *(args.metrics or "").split(",")]):
        name, direction = directed(word)
        metric = resolve_metric(name, runs)
        said[metric] = said.get(metric) or direction
    metrics = list(said or [default_metric(runs)])
    word, direction = directed(args.best_by or "")
    select = resolve_metric(word, runs) if word else metrics[0]
    said[select] = direction or said.get(select)
    highest = {m: highest_wins(m, said.get(m), args.descending, m == metrics[0]) for m in [*metrics, select]}
    if len(set(highest.values())) > 1:
        best = ", ".join(f"the {'highest' if high else 'lowest'} {metric}" for metric, high in highest.items())
        say(f"hint: opposite directions: the best is {best}")
    say_kept(runs, highest)
    descending = highest[metrics[0]]
    if args.importance:
        return importance(runs, metrics[0], descending)
    if by and not args.best_by:
        return group(runs, by, metrics, [highest[metric] for metric in metrics])
    if not (args.pivot or args.rows or args.cols or args.best_by):
        shown = [resolve_metric(directed(args.at_best)[0], runs)] if args.at_best else []
        metrics = list(dict.fromkeys([metrics[0], *shown, *metrics[1:]]))
        return top(runs, metrics, args.top, descending, bool(args.output or args.json))
    rows, cols = resolve_all(args.rows or "arch", runs), resolve_all(args.cols or "dataset", runs)
    if (args.pivot or not args.best_by) and (both := [c for c in rows if c in cols]):
        raise Stop(f"{both[0]} stands in the rows and in the columns. Choose other --rows or --cols.")
    if not args.best_by:
        return pivot(runs, rows, cols, metrics[0], descending)
    over, only = (resolve_globs(words, runs) if words else None for words in (args.over, args.config))
    ignore = resolve_globs(args.ignore or "", runs)
    dims, within = (by, []) if by else (list(dict.fromkeys([*rows, *cols])), cols)
    question = (dims, within, select, highest[select], metrics[0], descending)
    return best_by(runs, *question, over, ignore, only, args.pivot)


def questioned(runs: Runs, args: argparse.Namespace) -> Runs:
    """The runs that the options leave, as the question sees them: with --at-best --where is about the values there."""
    runs = keep(runs, args)
    if args.at_best:
        key, said = directed(args.at_best)
        runs = at_best(runs, key, highest_wins(column_name(key), said, args.descending, reported=False))
        if args.where:
            runs = replace(runs, frame=where(args.where, runs))
    return runs


def main() -> int:
    """Parse the arguments, answer one question, print, save or draw the answer; returns the exit code."""
    made = parser()
    args = made.parse_args()
    check(args, made)
    if args.output and args.output == args.plot:
        made.error("-o and --plot name the same file")
    if args.report:
        with heard() as said:
            every = read(find_files(args.input))
            text = report(every, questioned(every, args), args, said)
        write(args.report, text.encode())
        return 1 if every.damaged else 0
    runs = questioned(read(find_files(args.input)), args)
    if args.output and args.output.resolve() in [path.resolve() for path in runs.files]:
        raise Stop(f"{args.output} is read from, and would be overwritten. Choose another -o.")
    answer = answer_to(args, runs)
    if args.top:
        more = [f"The first {args.top} of {answer.frame.height}."] if answer.frame.height > args.top else []
        answer = replace(answer, frame=answer.frame.head(args.top), notes=[*answer.notes, *more], rows=None)
    if args.output:
        save(answer, args.output)
    if args.plot:
        plot(answer, args.plot, Look(args.width, args.height, args.title, args.log, not args.no_band))
    if args.json:
        print(answer.frame.write_json())
    else:
        print_answer(answer)
    return 1 if runs.damaged else 0


if __name__ == "__main__":
    finish(main)
