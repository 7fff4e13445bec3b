#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pyarrow>=26,<27",
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "urllib3>=2.5,<3",
#     "wandb>=0.31,<0.32",
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


# --- naming: the same in export_runs.py and analyze_runs.py ---
def column_name(key: str) -> str:
    """The column spelling of a W&B key: every character but letters, digits and `_` becomes `_`, one for one."""
    return re.sub(r"\W", "_", key)


# --- end naming ---


def main() -> int:
    """Parse the arguments and do the work; returns the exit code."""
    raise Stop("not written yet")


if __name__ == "__main__":
    finish(main)
