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
