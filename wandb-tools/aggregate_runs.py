#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "polars>=2,<3",
#     "pyarrow>=26,<27",
#     "rich>=15,<16",
# ]
# ///
"""To be written."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import polars as pl


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


def main() -> int:
    """Parse the arguments and do the work; returns the exit code."""
    raise Stop("not written yet")


if __name__ == "__main__":
    finish(main)
