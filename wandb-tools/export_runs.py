#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pyarrow>=26,<27",
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "wandb>=0.31,<0.32",
# ]
# ///
"""Export the runs of W&B projects to Parquet, one file per project: complete, typed, lossless.

    uv run wandb-tools/export_runs.py -e my_team -p my_project
    uv run wandb-tools/export_runs.py -e my_team                  # every project
    uv run wandb-tools/export_runs.py -e my_team -p 'sweep_*' --since 7d
    uv run wandb-tools/export_runs.py -e my_team --include-history \\
        --history-keys 'train/*,val/loss'
    uv run wandb-tools/export_runs.py -e my_team --dry-run
    uv run wandb-tools/export_runs.py --offline wandb/            # runs that never reached W&B

The files are wandb_export/{entity}_{project}_runs.parquet and so on. Run it
again at any time: only runs that are new or changed are fetched. Kill it at
any time: the next run goes on from what is on disk. A file is replaced only
when its successor is whole.
"""

# How it works: runs come as pages, several at a time, and each page becomes a small Parquet file (a part) in a hidden
# folder. An export is the merge of its sources: the parts and the export before. Which row of which source stands for
# a run, and which type each column has, is decided first, from light columns and from counts that each file keeps in
# its footer; then the rows are copied in order, a block at a time. History comes run by run into the same hidden
# folder, one clean file each, and is merged in the same way.

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import difflib
import fnmatch
import functools
import gc
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

if TYPE_CHECKING:
    import pyarrow as pa

# What a copier may want to change.
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"  # the name of the team's service-account key in .env
OUTPUT = Path("wandb_export")
WORKERS = 10  # requests in flight, over all projects; W&B's client sends no more at a time
FIRST_PAGE, PAGE, LARGEST_PAGE = 100, 200, 1000  # runs per request: the very first, those that follow, the most
LISTED = 450  # runs that one request lists, without config and summary, where several can go at a time
PAGE_BYTES = 3_400_000  # of config and summary on a page, about
BLOCK = 500  # runs per row group, and held at once when the file is built
HISTORY_ROWS, HISTORY_CELLS = 20_000, 4_000_000  # rows of history converted at once, values per row group
PART = {"compression": "lz4", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
LIVE_STEPS = 1000  # the span of one history call; W&B's client pages so too, and wider ones may be sampled
HEAVY = 10  # runs in a row that do not come even alone: then not they but the server is at fault
PATIENCE = 90  # seconds for which a request is tried again before it counts as unanswered
LONGEST_PAUSE = 300  # seconds that W&B's client may wait in one go because of a rate limit
LARGEST_ANSWER = 256 << 20  # characters
IMPORTED_AHEAD = ("pyarrow.parquet", "pyarrow.compute", "rich.console", "rich.table")  # while the client starts

T = TypeVar("T")

# A key of a run's data: the column's prefix (config, metric or system), then the path of keys as W&B spells them.
Key = tuple[str, ...]
# A piece of work, which may give back what is to be done next: jobs, and what the thread that runs them does itself.
Job = Callable[[], tuple[Sequence["Job"], Callable[[], None] | None] | None]
# What a listing shows of a run, see `fingerprint`.
Print = tuple[Any, ...]


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


# --- connection: the same in list_entities.py and export_runs.py ---
class Unanswered(Stop):
    """No usable answer: the request timed out, the server failed, or the connection broke. A smaller one may pass."""


class Rejected(Stop):
    """The server does not accept the key."""


def read_settings() -> dict[str, tuple[str, str]]:
    """name -> value and where it stood: the environment, `.env` of the working directory or above, then the script's.

    The first place that has a non-empty value wins.
    """
    from dotenv import dotenv_values

    places: dict[str, Mapping[str, str | None]] = {"the environment": os.environ}
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        path = next((path for folder in (start, *start.parents) if (path := folder / ".env").is_file()), None)
        if path is None:
            continue
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if os.name == "posix" and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002):
                say(f"{path} is not read: it belongs to another user, or anyone may write to it")
                continue
            try:
                places.setdefault(str(path), dotenv_values(stream=file))
            except UnicodeDecodeError:
                raise Stop(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    found = [(name, (value or "").strip(), place) for place, values in places.items() for name, value in values.items()]
    return {name: (value, place) for name, value, place in reversed(found) if value}


def without_secrets(text: object, key: str | None = None) -> str:
    """A server's text as it may be shown: at most 200 characters, no part of the key, no address's secret part."""
    line = plain(text)[:5000]
    line = re.sub(r"(?<=://)[^/\s@]*@|(?i:(?<=basic )|(?<=bearer )|(?<=eyJ))[\w.~+/=-]+", "", line)
    line = re.sub(r"""(?<=://)([^\s?"'<>]+)\?[^\s"'<>]*""", r"\1", line)
    key = (key or "").removeprefix("wandb_v1_")
    spelled = [key, key.encode().hex(), *(base64.b64encode(b"api"[:n] + key.encode()).decode() for n in range(3))]
    pieces = {word[n : n + 5].lower() for word in spelled for n in range(len(word) - 4)}
    hidden = {n + m for n in range(len(line)) if line[n : n + 5].lower() in pieces for m in range(5)}
    return "".join(char for n, char in enumerate(line) if n not in hidden)[:200]


def start_client(seconds: int) -> str:
    """Start W&B's client, silent and without telemetry; it gives a request two attempts of `seconds`, not twenty.

    Returns the server's address. Raises `ValueError` where a setting, or the address, is none.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):  # keys are handed over; the sidecar is to be our own
        os.environ.pop(name, None)
    try:
        Path.home()
    except RuntimeError:  # nothing is found there, nothing is written there
        os.environ["HOME"] = os.devnull
    gc.disable()  # it would walk the many objects of W&B's client again and again
    import wandb

    retries = {"retry_max": 1, "retry_wait_min_seconds": 1, "retry_wait_max_seconds": 1}
    options = {f"x_{kind}_{name}": value for kind in ("graphql", "file_transfer") for name, value in retries.items()}
    stderr, pool = os.dup(2), ThreadPoolExecutor(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the sidecar logs there when it finds no place for a file
    try:
        settings = wandb.Settings(silent=True, x_graphql_timeout_seconds=seconds, **options)
        setup = pool.submit(wandb.setup, settings=settings)  # the sidecar starts while the rest is imported
        importlib.import_module("wandb.apis.public")
        pool.submit(lambda: [importlib.import_module(name) for name in IMPORTED_AHEAD])
        started = setup.result()  # before stderr is given back, which the sidecar would inherit
        return os.environ.get("WANDB_BASE_URL") or started.settings.base_url
    finally:
        os.dup2(stderr, 2)


NO_KEY = f"""no W&B API key for {{}}. Looked for --api-key (export_runs.py), for WANDB_API_KEY in the
environment or in .env, for {TEAM_KEY} in .env, and for what `wandb login` stores in ~/.netrc.
Set one of them; your key is shown at https://wandb.ai/authorize."""


class Connection:
    """W&B through its own client, for any number of threads, which wait together when W&B limits requests.

    `account` says whose key is used at which address. `base_url` and `app_url` are the server's (without a password),
    `entities` those of WANDB_ENTITY, `version` is the client's. `service` sends what is asked of it within `answer`.
    """

    def __init__(self, api_key: str | None = None) -> None:
        """Log in with the first key there is: the argument, WANDB_API_KEY, the team's, what the client itself finds.

        Raises `Stop` with the four places where there is none, and where the key or the address is wrong.
        """
        settings = read_settings()
        self.entities = [name.strip() for name in settings.get("WANDB_ENTITY", " ")[0].split(",") if name.strip()]
        name = next((name for name in ("WANDB_API_KEY", TEAM_KEY) if name in settings and not api_key), None)
        self.key, place = settings[name] if name else (api_key, "--api-key" if api_key else "`wandb login`")
        self.source = f"{name} in {place}" if name else place
        os.environ |= {name: settings[name][0] for name in ("WANDB_BASE_URL", "WANDB_APP_URL") if name in settings}
        seconds = os.environ.get("WANDB_HTTP_TIMEOUT") or "25"
        if not re.fullmatch("0*[1-9][0-9]{0,3}", seconds):
            raise Stop(f"WANDB_HTTP_TIMEOUT {seconds!r} is no whole number of seconds. Write it like 25.")
        self.seconds = int(seconds)  # for each of the client's two attempts
        self.lock, self.slots = threading.Lock(), threading.BoundedSemaphore(10)  # what the client sends at a time
        self.under_way: list[float] = []  # when each request began
        self.heard = self.resume_at = self.limits = 0.0  # last answer, end of the pause, rate limits of late
        self.news = ""  # what is waited for
        try:
            self.base_url = without_secrets(start_client(self.seconds)).rstrip("/")
            threading.Thread(target=self.watch, daemon=True).start()
            import wandb

            api = self.answer(lambda limit: wandb.Api(api_key=self.key, timeout=limit))
        except ValueError as error:  # most are pydantic's
            errors = getattr(error, "errors", list)()
            wrong = [f"{'.'.join(map(str, e['loc'])) or 'the address'} {e['input']!r}: {e['msg']}" for e in errors]
            raise Stop(f"the W&B client refuses {without_secrets('; '.join(wrong) or error)}") from None
        self.service, self.key = api._service_api, api.api_key  # nothing public takes a query of one's own
        self.app_url, self.version = without_secrets(self.service.app_url).rstrip("/"), wandb.__version__
        self.account = f"the key from {self.source} at {self.base_url}"
        if "WANDB_BASE_URL" in settings and settings["WANDB_BASE_URL"][1] != place:
            self.account += f" (WANDB_BASE_URL in {settings['WANDB_BASE_URL'][1]})"

    def ask(self, query: str, variables: dict[str, Any], tries: int = 0) -> dict[str, Any]:
        """The `data` of one GraphQL query. Raises as `answer` does, and `Stop` where the answer is no data."""
        send = self.service.execute_graphql
        text = self.answer(lambda limit: send(query, variables, timeout=limit, parse=str), tries)
        if len(text) > LARGEST_ANSWER:
            raise Unanswered(f"{self.base_url}: the answer has {len(text) >> 20} MB, which is too much", 1)
        with expected("the answer"):
            if isinstance(data := json.loads(text), dict):
                return data
        raise Stop(f"{self.base_url}: the answer holds no data. Is this the address of W&B's API?", 1)

    def answer(self, send: Callable[[float], T], tries: int = 0) -> T:
        """What `send`, given the seconds that it may take, returns. Raises `Rejected`, `Unanswered`, or another `Stop`.

        `Unanswered` comes after `tries` tries, or where that is 0 after 90 to 120 seconds of trying. A rate limit (429)
        is waited out for as long as it lasts and uses up neither.
        """
        from wandb.errors import AuthenticationError, UsageError
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        tried, spent = 0, 0.0
        while True:
            while (pause := self.resume_at - time.monotonic()) > 0:
                time.sleep(pause)
            # The client itself waits for as long as a rate limit asks, but not for ever.
            limit = max(1, PATIENCE + 30 - spent) if spent else LONGEST_PAUSE + 2 * self.seconds
            with self.slots:
                began = time.monotonic()
                self.under_way.append(began)
                try:
                    result = send(limit)
                    self.heard, self.limits = time.monotonic(), self.limits * 0.9
                    return result
                except (AuthenticationError, WandbApiFailedError) as error:
                    stop = self.explain(error.__cause__ or error, limited=not spent)
                except UsageError:  # of the login, where the client finds no key either
                    raise Stop(NO_KEY.format(self.base_url)) from None
                finally:
                    self.under_way.remove(began)
            if stop is None:
                with self.lock:
                    if began >= self.resume_at:  # not before the pause that another thread's request brought
                        self.limits += 1
                        self.resume_at = time.monotonic() + min(60, 2**self.limits)
                self.news = f"W&B limits requests; waiting {self.resume_at - time.monotonic():.0f} s"
                continue
            tried, spent = tried + 1, spent + time.monotonic() - began
            if not isinstance(stop, Unanswered) or tried == tries or (not tries and spent >= PATIENCE):
                raise stop
            self.news = f"{stop}; trying again"
            time.sleep(wait := min(16, 2**tried))
            spent += wait

    def explain(self, error: BaseException, limited: bool) -> Stop | None:
        """What an error of the client means; None for a rate limit, which a time-out is where it may be (`limited`)."""
        response = getattr(error, "response", None)
        text = str(error).rpartition("while retrying: ")[2].strip()
        status = getattr(response, "http_status", 0) or int((re.match(r"HTTP (\d{3})", text) or ("", 0))[1])
        if status == 429 or (limited and response is None and "in time" in text):
            return None
        words = without_secrets(re.sub(r'^(HTTP \d+: |input:[\d:]* |\w+ "[^"]*": )', "", text), self.key)
        if status in (401, 403) or re.match("API key|invalid credentials", text):  # which the client says
            return Rejected(f"{self.base_url} rejects the API key from {self.source} ({words.rstrip('.')}). Check it.")
        passing = status >= 500 or status in (408, 413, 425)
        if status:
            words = f"HTTP {status} {words}"
        elif re.search(r"deadline exceeded|[Tt]ime.?out|timed out|in time", text):
            words, passing = "no answer in time", True
        elif text == "EOF" or re.match("invalid character|json: ", text):
            words = "the answer is no JSON. Is this the address of W&B's API?"
        elif re.search("giving up after|EOF$|reset by peer|broken pipe", str(error)):
            passing = bool(self.heard) or not re.search("refused$|no such host$", text)  # which is a wrong address
            words = words.rpartition(": ")[2]  # connection refused, no such host, unexpected EOF
        return (Unanswered if passing else Stop)(f"{self.base_url}: {words}", 1)

    def watch(self) -> None:
        """Say what is waited for, every 15 seconds while there is something."""
        told = 0.0
        while True:
            time.sleep(0.5)
            now, news, self.news = time.monotonic(), self.news, ""
            silence = now - max(self.heard, min(self.under_way, default=now))
            if silence > 4 and not news:
                news = f"no answer from {self.base_url} for {silence:.0f} s; still waiting"
            if news and now - told > 15:
                say(f"... {news}")
                told = now


@contextlib.contextmanager
def expected(what: str) -> Iterator[None]:
    """What is not of the form that W&B's schema promises ends in a `Stop` that says so."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise Stop(f"W&B's answer is malformed, see {what} ({type(error).__name__})", 1) from error


def next_cursor(page: dict[str, Any], seen: set[str]) -> str | None:
    """Where the page after this one starts, None after the last. Raises `Stop` where it leads nowhere or in circles."""
    if not page["pageInfo"]["hasNextPage"]:
        return None
    cursor = page["pageInfo"]["endCursor"]
    if not cursor or not page["edges"] or cursor in seen:
        raise Stop("W&B's listing does not go on: its pages are empty, or lead nowhere or in circles", 1)
    seen.add(cursor)
    return cursor


def visible_entities(connection: Connection) -> list[str]:
    """The key's own entity, then its teams."""
    data = connection.ask("query Viewer { viewer { entity teams { edges { node { name } } } } }", {})
    with expected("the key's entities"):
        names = [data["viewer"]["entity"], *(edge["node"]["name"] for edge in data["viewer"]["teams"]["edges"])]
        return list(dict.fromkeys(filter(None, names)))


def list_projects(connection: Connection, entity: str) -> list[str]:
    """The names of all projects of an entity, newest first as W&B lists them; empty if it cannot be seen."""
    query = """query Projects($entity: String!, $after: String) {
      models(entityName: $entity, first: 500, after: $after) {
        edges { node { name } } pageInfo { endCursor hasNextPage } } }"""
    names, seen, after = [], set(), None
    with expected(f"the projects of {entity}"):
        while (page := connection.ask(query, {"entity": entity, "after": after})["models"]) is not None:
            names += [edge["node"]["name"] for edge in page["edges"]]
            if (after := next_cursor(page, seen)) is None:
                break
    return names


# --- end connection ---


# --- naming: the same in export_runs.py and analyze_runs.py ---
def column_name(key: str) -> str:
    """The column spelling of a W&B key: every character but letters, digits and `_` becomes `_`, one for one."""
    return re.sub(r"\W", "_", key)


# --- end naming ---


# ---------------------------------------------------------------- a run's data, flattened

DECODER = json.JSONDecoder(strict=False)  # control characters in strings occur, which other JSON parsers reject
BY_NAME = json.JSONDecoder(parse_constant=str)  # NaN and the infinities as W&B hands them out, by name
NAMED_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def read_json(text: str | None) -> tuple[dict[str, Any], str]:
    """A JSON object as W&B sends it, and as text that every parser takes. Null is empty; bare NaN and Infinity stay."""
    text = text or "{}"
    try:
        value, clean = json.loads(text), is_storable(text)
    except ValueError:
        value, clean = DECODER.decode(text), False
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text!r:.50}")
    return value, text if clean else dump_json(value)


def dump_json(value: Any) -> str:
    """JSON text that gives back the same value, readable unless it holds lone surrogates, which no file can store."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_storable(text) else json.dumps(value)


def is_storable(text: str) -> bool:
    """Whether the text is valid Unicode: JSON may spell lone surrogates, Arrow and Parquet cannot."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def clean_text(value: Any) -> str | None:
    """Text with lone surrogates replaced by `?`; null stays null."""
    return None if value is None else str(value).encode(errors="replace").decode()


def unwrap_config(text: str | None) -> dict[str, Any]:
    """The config without W&B's `{"value": ..}` wrappers, `_wandb` included."""
    return {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in read_json(text)[0].items()}


def gather(
    configs: Sequence[dict[str, Any]],
    summaries: Sequence[dict[str, Any]] = (),
    systems: Sequence[dict[str, Any]] = (),
) -> dict[Key, tuple[list[Any], Counter[str]]]:
    """The values of each key, one per run (None where a run has none), and how many there are of each kind.

    Kinds of a config value are null, bool, int, float and text; the values of other keys are all float, and keys
    without any number are left out, as are media (dicts with `_type`) and keys of W&B's own, which start with `_`.
    """
    columns: dict[Key, tuple[list[Any], Counter[str]]] = {}
    for prefix, mappings in (("config", configs), ("metric", summaries), ("system", systems)):
        tree: dict[Any, Any] = {}
        for row, mapping in enumerate(mappings):
            own = {name: value for name, value in mapping.items() if name[:1] != "_"}
            _place(own, tree, row, len(mappings), None if prefix == "config" else "_type")
        for key, values in _branches(tree, (prefix,)):
            column = config_column(values) if prefix == "config" else number_column(values)
            if column[1].total():
                columns[key] = column
    return columns


def _place(mapping: dict[str, Any], tree: dict[Any, Any], row: int, size: int, media: str | None) -> None:
    """Put each value into its key's column. In the tree a column stands under its name, a branch under (name,)."""
    for name, value in mapping.items():
        if value.__class__ is not dict:
            if (column := tree.get(name)) is None:
                column = tree[name] = [None] * size
            column[row] = NULL if value is None else value
        elif media not in value:
            _place(value, tree.setdefault((name,), {}), row, size, media)


def _branches(tree: dict[Any, Any], path: Key) -> Iterator[tuple[Key, list[Any]]]:
    for name, below in tree.items():
        if isinstance(name, str):
            yield (*path, name), below
        else:
            yield from _branches(below, path + name)


NULL = ...  # a null that stands in the JSON, in contrast to a key that does not


def config_column(values: list[Any]) -> tuple[list[Any], Counter[str]]:
    """The values of one config key, with lists as their JSON text, and the count of each kind."""
    types = Counter(map(type, values))
    kinds = Counter(bool=types[bool], int=types[int], float=types[float], text=types[str] + types[list])
    if nulls := types[type(NULL)]:
        kinds["null"] = nulls
        values = [None if value is NULL else value for value in values]
    if types[list]:
        values = [dump_json(value) if type(value) is list else value for value in values]
    if types[int]:
        wide = [value for value in values if type(value) is int and not -(2**63) <= value < 2**63]
        # An integer beyond 64 bits makes the column Float64; beyond what that holds, only its text is faithful.
        huge = sum(abs(value) >= 2**1023 for value in wide)
        kinds.update(int=-len(wide), float=len(wide) - huge, text=huge)
    return values, kinds


def number_column(values: list[Any]) -> tuple[list[float | None], Counter[str]]:
    """The values of one metric as numbers, None for what is none, and their count."""
    if not {type(value) for value in values} <= {float, type(None)}:
        values = [as_number(value) for value in values]
    return values, Counter(float=len(values) - values.count(None))


def as_number(value: Any) -> float | None:
    """A number of a summary: bools are 1 and 0, W&B's spellings of NaN and the infinities are what they name."""
    if isinstance(value, str):
        return NAMED_FLOATS.get(value)
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an integer beyond the largest Float64 rounds to infinity, as 1e999 does
        return float("inf") if value > 0 else float("-inf")


def column_type(counts: Counter[str]) -> str:
    """The type that keeps every value of these kinds: bool, int64, double or string. Nothing but nulls is string."""
    kinds = {kind for kind, count in counts.items() if count and kind != "null"}
    if kinds in ({"bool"}, {"int"}):
        return {"bool": "bool", "int": "int64"}[kinds.pop()]
    return "double" if kinds and kinds <= {"int", "float"} else "string"


def name_columns(keys: Iterable[Key]) -> dict[Key, str]:
    """Each key's column. Of keys that land on one column, the one spelled like it keeps it, others get __2, __3."""
    spelled: dict[str, list[Key]] = {}
    for key in sorted(keys):
        spelled.setdefault("_".join(map(column_name, key)), []).append(key)
    names: dict[Key, str] = {}
    taken = set(spelled)
    for column, same in spelled.items():
        keeper = next((key for key in same if len(key) == 2 and f"{key[0]}_{key[1]}" == column), same[0])
        names |= {key: column if key == keeper else next_free(column, taken) for key in same}
    return dict(sorted(names.items(), key=lambda item: (item[0][0], item[1])))


def next_free(name: str, taken: set[str]) -> str:
    """The first of `name__2`, `name__3`, ... that is not taken; it is from now on."""
    free = next(spelled for n in itertools.count(2) if (spelled := f"{name}__{n}") not in taken)
    taken.add(free)
    return free


def to_array(values: list[Any], kind: pa.DataType | str) -> pa.Array:
    """An Arrow array; for `string`, values that are no text yet become their JSON text."""
    import pyarrow as pa

    if kind == "string":
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    elif kind == "double":
        values = [None if value is None else float(value) for value in values]
    try:
        return pa.array(values, pa.type_for_alias(kind) if isinstance(kind, str) else kind)
    except UnicodeEncodeError:  # lone surrogates, which the JSON columns keep, are shown as ?
        return pa.array([clean_text(value) for value in values], pa.string())


# ---------------------------------------------------------------- one project, and its runs as a table


@dataclass
class Project:
    """One project on its way to disk: what is asked for, and what became of it, a row of the closing table."""

    entity: str
    name: str
    args: argparse.Namespace  # the command line; `filters`, Mongo-style, were added to it
    server: Connection | Folders
    pool: ThreadPoolExecutor  # requests run here, at most `--workers` at a time over all projects
    progress: Progress
    lock: threading.RLock = field(default_factory=threading.RLock)
    sizes: dict[bool, int] = field(default_factory=lambda: {True: PAGE, False: LARGEST_PAGE})  # of pages: full, light
    heavy: int = 0  # runs in a row that did not even come alone
    arrived: float = field(default_factory=lambda: time.monotonic())  # when a history last came
    part_number: Iterator[int] = field(default_factory=itertools.count)
    logs: dict[str, list[list[int]]] = field(default_factory=dict)  # of runs from folders: times and sizes
    runs: int = 0
    new: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: list[dict[str, str]] = field(default_factory=list)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # run id -> id, name, error
    damaged: set[Path] = field(default_factory=set)  # files of ours that are not used any more
    listed: set[str] = field(default_factory=set)  # ids of the runs that the filters let through
    states: Counter[str] = field(default_factory=Counter)
    not_listed: int = 0  # runs that W&B counts and does not list
    history_rows: int | None = None
    seconds: float = 0.0
    size: int = 0
    error: str | None = None
    refused: bool = False  # there is no such project, or the key is rejected

    @property
    def title(self) -> str:
        return f"{self.entity}/{self.name}"

    def path(self, ending: str) -> Path:
        return self.args.output / f"{file_stem(f'{self.entity}_{self.name}')}_{ending}"

    @property
    def parts(self) -> Path:
        """Where fetched pages wait for the merge; there only while an export is under way or was interrupted."""
        return self.args.output / f".{file_stem(f'{self.entity}_{self.name}')}.parts"

    def ask(self, query: str, variables: dict[str, Any], tries: int = 0) -> dict[str, Any]:
        """What W&B says of the project. Raises as `Connection.ask` does, and `Stop` where there is no such project."""
        reply = self.server.ask(query, {"entity": self.entity, "project": self.name} | variables, tries)["project"]
        if reply is None:
            raise unseen(self.server, self.entity, self.name)
        return reply


def file_stem(name: str) -> str:
    """A name from W&B as one part of a file's name; what no file system should see becomes `_` and a digest."""
    reserved = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE)
    safe = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f\ud800-\udfff]', "_", name)
    if safe == name and name[:1] not in ("", ".") and not reserved and len(name.encode()) <= 200:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:10]
    return f"_{safe.lstrip('.').encode()[:180].decode(errors='ignore')}_{digest}"


# The columns that a listing shows, each with its field in W&B's GraphQL. A run in which none changed did not change.
FIELDS = {"id": "name", "name": "displayName", "state": "state", "created_at": "createdAt"}
FIELDS |= {"heartbeat_at": "heartbeatAt", "tags": "tags", "user": "user", "group": "group", "job_type": "jobType"}
FIELDS |= {"sweep": "sweepName", "notes": "notes", "commit": "commit", "history_rows": "historyLineCount"}
STATE, CREATED = list(FIELDS).index("state"), list(FIELDS).index("created_at")


def fingerprint(node: dict[str, Any]) -> Print:
    """The columns of FIELDS, in order, from a run as W&B lists it. Times are microseconds since 1970."""
    user = node["user"] or {}
    values: dict[str, Any] = {name: clean_text(node[field]) for name, field in FIELDS.items()} | {
        "created_at": microseconds(node["createdAt"]),
        "heartbeat_at": microseconds(node["heartbeatAt"]),
        "tags": tuple(map(clean_text, node["tags"] or [])),
        "user": clean_text(user.get("username") or user.get("name")),
        "history_rows": whole(node["historyLineCount"]),
    }
    return tuple(values.values())


def microseconds(text: str | None) -> int | None:
    """An ISO time of W&B, which is UTC where it names no zone, in microseconds since 1970."""
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def whole(value: Any) -> int | None:
    """A step or a count as Int64, or null if it is none."""
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 2**63 else None


def fixed_schema() -> dict[str, pa.DataType]:
    """The names and types of the columns that every export has, in order; `*` is where the data's columns stand."""
    import pyarrow as pa

    text, moment = pa.string(), pa.timestamp("us", "UTC")
    return {
        **dict.fromkeys(["id", "name", "entity", "project", "state", "url"], text),
        **dict.fromkeys(["created_at", "heartbeat_at"], moment),
        "tags": pa.list_(text),
        **dict.fromkeys(["user", "group", "job_type", "sweep", "notes", "commit"], text),
        "last_step": pa.int64(),
        "runtime_seconds": pa.float64(),
        "history_rows": pa.int64(),
        "*": pa.null(),
        "_config_json": text,
        "_summary_json": text,
    }


def tabulate(project: Project, nodes: Iterable[tuple[dict[str, Any], Print]]) -> pa.Table:
    """Runs as W&B (or another source) gives them, with their fingerprints, as a table in the contract's form.

    A node is a dict of the fields in FIELDS, and of `config`, `summaryMetrics` and, where they are asked for,
    `systemMetrics`, JSON text. A run whose data is no JSON is noted as failed.
    """
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    data: list[tuple[dict[str, Any], ...]] = []  # config, summary and system metrics of each
    app = project.server.app_url
    place = f"{app}/{quote(project.entity, safe='')}/{quote(project.name, safe='')}/runs"
    for node, print_ in nodes:
        try:
            row, *parsed = read_run(node, print_, project.args.system_metrics)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            note_failure(project, node, f"its config or summary cannot be read: {error}")
            continue
        url = f"{place}/{quote(row['id'], safe='')}" if app else None
        rows.append(row | {"entity": project.entity, "project": project.name, "url": url})
        data.append(tuple(parsed))
    cells = gather(*zip(*data, strict=True)) if data else {}
    kinds = {key: counts for key, (_, counts) in cells.items()}
    columns: dict[str, pa.Array] = {}
    for name, kind in fixed_schema().items():
        if name == "*":
            for key, column in name_columns(cells).items():
                columns[column] = to_array(cells[key][0], column_type(kinds[key]))
        else:
            columns[name] = to_array([row[name] for row in rows], kind)
    return pa.table(columns).replace_schema_metadata(runs_footer(project, kinds))


def read_run(node: dict[str, Any], print_: Print, system: bool) -> tuple[dict[str, Any], ...]:
    """A run's fixed columns and JSON columns; its config, its summary and its system metrics, if asked for."""
    config, (summary, summary_text) = unwrap_config(node["config"]), read_json(node["summaryMetrics"])
    own = summary.get("_wandb")
    runtime = own.get("runtime") if isinstance(own, dict) else None
    row = dict(zip(FIELDS, print_, strict=True)) | {
        "last_step": whole(summary.get("_step")),
        "runtime_seconds": as_number(summary.get("_runtime") if runtime is None else runtime),
        "_config_json": dump_json(config),
        "_summary_json": summary_text,
    }
    metrics = read_json(node["systemMetrics"])[0] if system else {}  # spelled system.gpu.0.temp; one prefix suffices
    return row, config, summary, {name.removeprefix("system."): value for name, value in metrics.items()}


def footer(project: Project, **about: Any) -> dict[str, str]:
    """What each of our files says of itself, beginning with whose it is."""
    own = {"entity": project.entity, "project": project.name, "exported_at": now()}
    return {"wandb_tools": json.dumps(own | about)}


def runs_footer(project: Project, kinds: dict[Key, Counter[str]]) -> dict[str, str]:
    """The footer of a file of runs: how many values of which kind each key has, and its column."""
    keys = [[list(key), +kinds[key], column] for key, column in name_columns(kinds).items()]
    return footer(project, system=project.args.system_metrics, keys=keys, logs=project.logs)


def now() -> str:
    """The time in UTC, as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def note_failure(project: Project, node: dict[str, Any], error: object) -> None:
    """Remember a run (`name` is its id) that could not be fetched, for the report and the metadata."""
    run, name = str(node["name"]), node.get("displayName") or ""
    with project.lock:
        project.failed[run] = {"id": run, "name": name, "error": str(error)}
    say(f"... {plain(project.title)}: run {plain(name)} ({plain(run)}) failed: {error}")


# ---------------------------------------------------------------- files of this tool, and their merge


class Damaged(Stop):
    """A file that is ours and whose rows cannot be read any more."""

    def __init__(self, path: Path, error: object) -> None:
        super().__init__(f"{path} is damaged ({error})", 1)
        self.path = path


class Stored:
    """A Parquet file of this tool: what it says of itself, and its rows by number, a row group at a time.

    Raises `Stop` where it cannot be opened or is not this project's, `Damaged` where its rows cannot be read.
    """

    def __init__(self, path: Path, project: Project, what: str) -> None:
        self.path = path
        advice = "It is left alone; move it away, or use another -o"
        try:
            if not path.is_file():  # a pipe would wait for ever
                raise OSError("it is no file")
            with open_parquet(path) as file:
                self.metadata, self.names = file.metadata, file.schema_arrow.names
            self.about = json.loads((self.metadata.metadata or {}).get(b"wandb_tools", b"{}"))
        except (ValueError, OSError, KeyError) as error:
            raise Stop(f"{path} cannot be read ({error}). {advice}", 1) from None
        if what not in self.about:
            raise Stop(f"{path} is no export of this tool. {advice}", 1)
        if (self.about["entity"], self.about["project"]) != (project.entity, project.name):
            owner = f"{self.about['entity']}/{self.about['project']}"
            raise Stop(f"{path} is that of {owner}, whose name spells the same file. Use another -o", 1)
        sizes = (self.metadata.row_group(i).num_rows for i in range(self.metadata.num_row_groups))
        self.starts = list(itertools.accumulate(sizes, initial=0))

    def read(self, columns: list[str] | None = None, group: int | None = None) -> pa.Table:
        """One row group, or all."""
        try:
            with open_parquet(self.path) as file:
                return file.read(columns) if group is None else file.read_row_group(group, columns)
        except (ValueError, OSError) as error:
            raise Damaged(self.path, error) from None

    def group(self, row: int) -> int:
        """The number of the row group that holds a row."""
        return bisect_right(self.starts, row) - 1


def open_parquet(path: Path) -> Any:
    """A Parquet file whose pages are checked as they are read."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


class Runs(Stored):
    """A file of runs in the contract's form: a part, or the export before."""

    def __init__(self, path: Path, project: Project) -> None:
        import pyarrow as pa

        super().__init__(path, project, "keys")
        self.kinds: dict[Key, Counter[str]] = {tuple(key): Counter(kinds) for key, kinds, _ in self.about["keys"]}
        self.columns: dict[Key, str] = {tuple(key): column for key, _, column in self.about["keys"]}
        if set(self.names) != {*self.columns.values(), *fixed_schema()} - {"*"}:
            raise Stop(f"{path} cannot be read (its columns are not those that its footer tells of)", 1)
        light = self.read(list(FIELDS)).select(list(FIELDS))
        columns = (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column for column in light)
        values = dict(zip(FIELDS, (column.to_pylist() for column in columns), strict=True))
        self.prints: list[Print] = list(zip(*(values | {"tags": map(tuple, values["tags"])}).values(), strict=True))

    def configs(self, table: pa.Table) -> dict[Key, tuple[list[Any], Counter[str]]]:
        """`gather` of the configs of these rows."""
        try:
            return gather([read_json(text)[0] for text in table["_config_json"].to_pylist()])
        except (ValueError, RecursionError) as error:  # written before pages had checksums
            raise Damaged(self.path, error) from None

    def count_kinds(self, rows: set[int]) -> dict[Key, Counter[str]]:
        """How many values of which kind each key has in these rows: all that there are, less those of the others."""
        left = {key: kinds.copy() for key, kinds in self.kinds.items()}
        needed = ["_config_json", *(column for key, column in self.columns.items() if key[0] != "config")]
        dropped = (row for row in range(len(self.prints)) if row not in rows)
        for group, some in itertools.groupby(dropped, self.group):
            table = self.read(needed, group).take([row - self.starts[group] for row in some])
            configs = self.configs(table)
            for key, column in self.columns.items():
                if key[0] != "config":
                    left[key] -= Counter(float=len(table) - table[column].null_count)
                elif key in configs:
                    left[key] -= configs[key][1]
        return {key: kinds for key, kinds in left.items() if kinds}

    def conform(self, table: pa.Table, columns: dict[Key, str], schema: pa.Schema) -> pa.Table:
        """Rows of this file in another schema. Where the type changed, values are read from the JSON again."""
        import pyarrow as pa

        arrays = {name: table[name] for name in fixed_schema() if name != "*"}
        own = {key: schema.field(column).type for key, column in columns.items() if key in self.columns}
        again = {
            key
            for key, kind in own.items()
            if (held := table[self.columns[key]]).type != kind and held.null_count < len(held)
            if not (pa.types.is_int64(held.type) and pa.types.is_float64(kind))  # rounds as Python's float() does
        }
        cells = self.configs(table) if again else {}
        for key, column in columns.items():
            kind = schema.field(column).type
            if key in again and key in cells:
                arrays[column] = to_array(cells[key][0], str(kind))
            elif key in own and key not in again:
                arrays[column] = table[self.columns[key]].cast(kind, safe=False)
            else:
                arrays[column] = pa.nulls(len(table), kind)
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size` items (itertools.batched came with Python 3.12)."""
    return (items[i : i + size] for i in range(0, len(items), size))


def merge(project: Project, sources: list[Runs], winners: dict[str, tuple[int, int]]) -> None:
    """Write the file of all runs from the rows that stand for them, oldest first, a block at a time.

    `winners` maps a run id to its source (by number) and the row there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    used: dict[int, set[int]] = {}  # the rows of each source that stand for a run
    kept: dict[tuple[int, int], list[int]] = {}  # the same by source and row group, counted within that
    places: dict[str, tuple[tuple[int, int], int]] = {}  # where a run's row is in `kept`
    for (s, row), run in sorted((place, run) for run, place in winners.items()):
        group = sources[s].group(row)
        rows = kept.setdefault((s, group), [])
        places[run] = (s, group), len(rows)
        rows.append(row - sources[s].starts[group])
        used.setdefault(s, set()).add(row)
    kinds: dict[Key, Counter[str]] = {}
    for s, rows in used.items():
        for key, counts in sources[s].count_kinds(rows).items():
            if key[0] != "system" or project.args.system_metrics:
                kinds.setdefault(key, Counter()).update(counts)
    columns = name_columns(kinds)
    typed = [(column, pa.type_for_alias(column_type(kinds[key]))) for key, column in columns.items()]
    fields: list[tuple[str, Any]] = []
    for name, kind in fixed_schema().items():
        fields += typed if name == "*" else [(name, kind)]
    schema = pa.schema(fields, metadata=runs_footer(project, kinds))
    small = [name for name in schema.names if not name.endswith("_json")]
    options = {"compression": "zstd", "compression_level": 3, "write_statistics": small, "write_page_checksum": True}
    options["use_dictionary"] = [name for name in small if schema.field(name).type == pa.string()]

    @functools.lru_cache(6)  # as many row groups as hold runs of about the same time
    def read(s: int, group: int) -> pa.Table:
        table, rows = sources[s].read(group=group), kept[s, group]
        return sources[s].conform(table if len(rows) == len(table) else table.take(rows), columns, schema)

    with (
        written_beside(project, project.path("runs.parquet")) as path,
        pq.ParquetWriter(path, schema, **options) as writer,
        ThreadPoolExecutor(1) as pool,  # one block is written while the next is read
    ):
        written: Future[Any] = pool.submit(int)  # nothing yet
        created_at = {run: sources[s].prints[row][CREATED] or 0 for run, (s, row) in winners.items()}
        for block in batched(sorted(winners, key=lambda run: (created_at[run], run)), BLOCK):
            tables = {place: read(*place) for place in dict.fromkeys(places[run][0] for run in block)}
            firsts = dict(zip(tables, itertools.accumulate(map(len, tables.values()), initial=0)))  # noqa: B905
            rows = [firsts[place] + row for place, row in map(places.__getitem__, block)]
            table = pa.concat_tables(tables.values())
            in_place = rows == list(range(rows[0], rows[0] + len(rows)))  # then nothing is copied
            table = table.slice(rows[0], len(rows)) if in_place else table.take(rows)
            written.result()
            written = pool.submit(writer.write_table, table)
        written.result()


@contextlib.contextmanager
def written_beside(project: Project, target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's place when the block ends well. Leftovers go with the parts."""
    path = project.parts / f"{target.name}.tmp"
    yield path
    if target.parent == project.args.output:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(path, target)


# ---------------------------------------------------------------- runs from W&B


def run_jobs(project: Project, jobs: Iterable[Job]) -> None:
    """Run the jobs on the export's workers; those that a job gives back come before what still waits.

    The first error ends it; what has begun by then still ends well.
    """
    waiting, running = deque(jobs), set[Future[Any]]()
    keep: Callable[[], None] | None = None
    error: BaseException | None = None
    while True:
        while waiting and not error and len(running) < project.args.workers:
            running.add(project.pool.submit(waiting.popleft()))
        if keep:
            time.sleep(0.002)  # so that the threads that got a job ask W&B first
            keep()
        if not running:
            break
        future = wait(running, return_when=FIRST_COMPLETED).done.pop()
        running.remove(future)
        failed, following, keep = future.exception(), (), None
        if not failed:
            following, keep = future.result() or ((), None)
        error = error or failed
        waiting.extendleft(reversed(following))
    if error:
        raise error


class Listing:
    """One pass over the runs that the filters let through; what it asks for is done by jobs (`run_jobs`).

    `prints` maps the id of each run that came to its fingerprint, `total` is how many there are by W&B's count. In a
    full pass the runs come with config and summary, and each page is kept as a part.
    """

    def __init__(self, project: Project, full: bool) -> None:
        self.project, self.full = project, full
        self.prints: dict[str, Print] = {}
        self.total = 0
        self.seen: dict[str, set[str]] = {}  # cursors, by window

    def run(self, windows: Iterable[dict[str, Any]], most: int = LARGEST_PAGE, probe: bool = True) -> Listing:
        """Ask for the pages of these windows. A first page of less than LARGEST_PAGE runs says how to split the rest.

        Raises as `Connection.ask` does.
        """
        pages = (functools.partial(self.page, w, None, most, probe and not i) for i, w in enumerate(windows))
        run_jobs(self.project, pages)
        return self

    def page(
        self, window: dict[str, Any], after: str | None = None, most: int = LARGEST_PAGE, probe: bool = False
    ) -> tuple[list[Job], Callable[[], None] | None]:
        """A job: one page of a window, from a cursor on, then the rest of the window; smaller if it does not arrive."""
        project, sizes = self.project, self.project.sizes
        size = min(most, sizes[self.full])
        try:
            reply = self.ask(window, size, after, probe, self.full, tries=int(self.full or size > 1))
            if self.full and reply["runs"]["edges"]:
                project.heavy = 0
        except Unanswered:
            if size > 1:
                sizes[self.full] = max(1, min(sizes[self.full], size // 2))
                return [functools.partial(self.page, window, after, most, probe)], None
            if not self.full:
                raise
            reply = self.ask(window, 1, after, probe, full=False, tries=0)  # raises where not the run is at fault
            try:
                reply = self.ask(window, 1, after, probe, full=True, tries=1)
            except Unanswered as error:
                project.heavy += 1
                if project.heavy == HEAVY:
                    raise
                for edge in reply["runs"]["edges"]:
                    note_failure(project, edge["node"], f"too heavy to fetch: {error}")
        nodes = [edge["node"] for edge in reply["runs"]["edges"] if edge["node"]]
        if len(nodes) == size:  # grow slowly: a page that is too large costs the server a time-out
            weight = sum(len(node.get(name) or "") for node in nodes for name in ("config", "summaryMetrics"))
            roof = PAGE_BYTES * size // max(1, weight)
            sizes[self.full] = max(1, min(LARGEST_PAGE, roof, sizes[self.full] + 1 + sizes[self.full] // 20))
        if probe:
            self.total = reply["total"]
            project.progress.expect(self.total if self.full else 0)
        jobs: list[Job] = []
        if cursor := next_cursor(reply["runs"], self.seen.setdefault(json.dumps(window), set())):
            newest = reply["newest"]["edges"][0]["node"] if probe and most < LARGEST_PAGE else None
            start, end = second(nodes[-1] if nodes else None), second(newest)
            if start is None or end is None:
                jobs.append(functools.partial(self.page, window, cursor))
            else:
                jobs.append(functools.partial(self.split, start, end + 1, None))
        return jobs, functools.partial(self.keep, nodes)

    def ask(
        self, window: dict[str, Any], size: int, after: str | None, probe: bool, full: bool, tries: int
    ) -> dict[str, Any]:
        """One page of runs, oldest first: `runs`; with `probe` also `total` and `newest`, of the whole project."""
        project = self.project
        fields = " ".join(field for field in FIELDS.values() if field != "user") + " user { username name }"
        if full:
            fields += " config summaryMetrics" + " systemMetrics" * project.args.system_metrics
        query = f"""query {"ExportRuns" if full else "ListRuns"}($entity: String!, $project: String!, $probe: Boolean!,
            $filters: JSONString, $all: JSONString, $first: Int!, $after: String) {{
          project(name: $project, entityName: $entity) {{
            total: runCount(filters: $all) @include(if: $probe)
            newest: runs(filters: $all, first: 1, order: "-created_at") @include(if: $probe) {{
              edges {{ node {{ createdAt }} }} }}
            runs(filters: $filters, first: $first, after: $after, order: "+created_at") {{
              edges {{ node {{ {fields} }} }} pageInfo {{ endCursor hasNextPage }} }} }} }}"""
        variables = {"first": size, "after": after, "probe": probe, "all": all_of(project.args.filters)}
        return project.ask(query, variables | {"filters": all_of([*project.args.filters, window])}, tries)

    def split(self, start: int, end: int, last: int | None) -> tuple[list[Job], None]:
        """A job: the pages of windows that hold about as many of the runs created in [start, end) each, in seconds.

        Counts slices of time in one request and joins neighbours; a slice that holds far too many is split in turn.
        Windows are half-open and meet, so that no run is in two or in none; the last ends at `last`, None is open.
        """
        project = self.project
        slices = list(itertools.pairwise(sorted({start + (end - start) * i // 64 for i in range(65)})))
        declared = ", ".join(f"$s{i}: JSONString" for i in range(len(slices)))
        asked = " ".join(f"s{i}: runCount(filters: $s{i})" for i in range(len(slices)))
        query = f"""query CountRuns($entity: String!, $project: String!, {declared}) {{
          project(name: $project, entityName: $entity) {{ {asked} }} }}"""
        filters = {f"s{i}": all_of([*project.args.filters, created(a, b)]) for i, (a, b) in enumerate(slices)}
        counts = list(project.ask(query, filters).values())
        pages = -(-sum(counts) // (project.sizes[True] if self.full else LISTED))  # a window each where they are few
        windows = pages if pages < 2 * project.args.workers else project.args.workers
        share = max(FIRST_PAGE, -(-sum(counts) // max(1, windows)))
        jobs: list[Job] = []
        held = 0
        for (a, b), runs in zip(slices, counts, strict=True):
            heavy = runs > 2 * share and b - a > 1
            if held and (heavy or held + runs > share):
                jobs.append(functools.partial(self.page, created(start, a)))
                start, held = a, 0
            held += runs
            if heavy:
                jobs.append(functools.partial(self.split, a, b, b))
                start, held = b, 0
        if last is None or start < last:
            jobs.append(functools.partial(self.page, created(start, last)))
        return jobs, None

    def keep(self, nodes: list[dict[str, Any]]) -> None:
        """Take the runs of a page down, in a full pass also as a part on disk."""
        import pyarrow.parquet as pq

        project = self.project
        fresh: list[tuple[dict[str, Any], Print]] = []
        for node in nodes:
            if not node.get("name"):
                continue  # no run; the count will tell
            try:
                print_ = fingerprint(node)
            except (ValueError, OverflowError, TypeError, AttributeError) as error:  # a date that is none
                note_failure(project, node, f"what W&B says of it cannot be read: {error}")
                print_ = (node["name"],)
            else:
                if "config" in node and self.prints.get(node["name"]) != print_:
                    fresh.append((node, print_))
            self.prints[node["name"]] = print_
        if fresh:
            table = tabulate(project, fresh)
            with written_beside(project, project.parts / f"{next(project.part_number):07}.parquet") as path:
                pq.write_table(table, path, **PART)
            project.progress.fetched(len(table))


def all_of(filters: Iterable[dict[str, Any]]) -> str:
    """One Mongo-style filter of several, as the JSON text that W&B takes."""
    parts = [part for part in filters if part]
    return json.dumps({"$and": parts} if len(parts) > 1 else dict(*parts))


def created(start: int | None, end: int | None) -> dict[str, Any]:
    """The filter for runs created in [start, end), in seconds since 1970; None is open."""
    day = {"$gte": start, "$lt": end}
    bounds = {op: f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S}" for op, at in day.items() if at is not None}
    return {"createdAt": bounds} if bounds else {}


def second(node: dict[str, Any] | None) -> int | None:
    """When a run was created, in whole seconds since 1970; None where W&B does not say, or means no time of ours."""
    try:
        moment = microseconds((node or {}).get("createdAt"))
    except (ValueError, OverflowError, TypeError):
        return None
    return moment // 1_000_000 if moment and 0 < moment < 4e15 else None  # until 2096


def list_runs(project: Project, known: Iterable[Print], full: bool) -> dict[str, Print]:
    """Run id -> fingerprint of every run that the filters let through.

    A `full` pass fetches the runs at once, page by page. A light listing, without config and summary, is for projects
    of which runs are known: it comes in windows cut where their times say, or after a first page, as a full pass, where
    they are few. Either is held against W&B's own count.
    """
    if full:
        listing = Listing(project, True).run([{}], FIRST_PAGE)
    else:
        times = sorted((print_[CREATED] or 0) // 1_000_000 for print_ in known)
        pieces = min(project.args.workers, -(-len(times) // LISTED))
        edges = sorted({times[len(times) * i // pieces] for i in range(1, pieces)})
        windows = [created(a, b) for a, b in itertools.zip_longest([None, *edges], edges)]
        listing = Listing(project, False).run(windows, LARGEST_PAGE if edges else LISTED)
    prints, total = listing.prints, listing.total
    if len(prints) < total:  # once more, in one window: some went meanwhile, or have no time of creation
        again = Listing(project, False).run([{}])
        prints, total = prints | again.prints, again.total
    project.not_listed = max(0, total - len(prints))
    return prints


def fetch_runs(project: Project, ids: list[str]) -> None:
    """Fetch the runs with these ids in full, as parts."""
    project.progress.expect(len(ids))
    some = batched(ids, max(FIRST_PAGE, min(project.sizes[True], -(-len(ids) // project.args.workers))))
    Listing(project, True).run(({"name": {"$in": list(part)}} for part in some), probe=False)


# ---------------------------------------------------------------- history

# What is known of a run's history is a dict: `kinds` says of each logged key with values whether they are all a number
# or (also) text; `mark` is the run's state, heartbeat and row count at the time; `confirmed` whether row count and last
# step agree with what W&B says; the history itself is the `rows` of `file` (a `Stored`) from `first` on.
Facts = dict[str, Any]
RUN = ("run_id", "run_name", "entity", "project")
STEP = ("_step", "_timestamp", "_runtime")


class Expired(Stop):
    """A pre-signed download address that is no longer good; asking again gives a new one."""


def history_schema(kinds: dict[str, str], before: Sequence[str] = ()) -> pa.Schema:
    """Columns of text `before`, then STEP and these columns, each `number` or `text`."""
    import pyarrow as pa

    types = {"text": pa.string(), "step": pa.int64(), "number": pa.float64()}
    kinds = dict.fromkeys(before, "text") | dict.fromkeys(STEP, "number") | {"_step": "step"} | kinds
    return pa.schema([(key, types[kind]) for key, kind in kinds.items()])


def joined(kinds: Iterable[dict[str, str]]) -> dict[str, str]:
    """The kinds of all keys, sorted; text where it is text anywhere."""
    both: dict[str, str] = {}
    for each in kinds:
        both |= {key: max(kind, both.get(key, kind)) for key, kind in each.items()}
    return dict(sorted(both.items()))


def history_mark(run: dict[str, Any]) -> list[Any]:
    """What of a run shows that its history changed."""
    return [run["state"], run["heartbeat_at"], run["history_rows"]]


def fetch_history(project: Project, runs: Iterable[dict[str, Any]]) -> dict[str, Facts]:
    """Fetch the history of these runs (rows of the runs file), one clean file each; run id -> what came."""
    (project.parts / "history").mkdir(exist_ok=True)
    done: dict[str, Facts] = {}
    todo = []
    for run in runs:
        with contextlib.suppress(Stop):  # what an interrupted export left behind
            stored = Stored(history_part(project, run), project, "mark")
            if (stored.about["mark"], stored.about["globs"]) == (history_mark(run), project.args.history_keys):
                done[run["id"]] = stored.about | {"file": stored, "first": 0}
                continue
        todo.append(run)
    if done:
        project.progress.note(f"... {plain(project.title)}: going on from the history of {len(done)} runs on disk")
    project.progress.expect(len(todo), "histories")
    size = max(10, min(25, -(-len(todo) // project.args.workers)))
    if project.args.offline:
        logs = project.server.runs[project.entity, project.name]
        jobs = [functools.partial(fetch_run_history, project, run, {"logs": logs[run["id"]]}, done) for run in todo]
    else:
        jobs = [functools.partial(ask_addresses, project, some, done) for some in batched(todo, size)]
    run_jobs(project, jobs)
    return done


def history_part(project: Project, run: dict[str, Any]) -> Path:
    """Where a run's history waits for the merge; its id may be no file's name."""
    return project.parts / "history" / f"{file_stem('/' + run['id'])}.parquet"


def ask_addresses(
    project: Project, runs: Sequence[dict[str, Any]], done: dict[str, Facts], attempt: int = 1
) -> tuple[list[Job], None]:
    """A job: ask where the history of these runs is, in one request, then fetch it; fewer runs if none is told.

    Of each run comes `parquetUrls`, its exported files, and `liveData`, the steps that are in none yet.
    """
    ids = {f"r{i}": run["id"] for i, run in enumerate(runs)}
    declared = ", ".join(f"${n}: String!" for n in ids)
    asked = " ".join(f'{n}: run(name: ${n}) {{ parquetHistory(liveKeys: ["_step"]) {{ ...files }} }}' for n in ids)
    query = f"""query HistoryAddresses($entity: String!, $project: String!, {declared}) {{
      project(name: $project, entityName: $entity) {{ {asked} }} }}
      fragment files on ParquetHistory {{ parquetUrls liveData }}"""
    try:
        reply = project.ask(query, ids, tries=2 if len(runs) > 1 else 0)
        with expected("histories"):
            found = [where and where["parquetHistory"] for where in map(reply.get, ids)]
    except Stop as error:
        if len(runs) == 1:
            note_history_failure(project, runs[0], error)
            return [], None
        half = len(runs) // 2
        return [functools.partial(ask_addresses, project, some, done) for some in (runs[:half], runs[half:])], None
    project.arrived = time.monotonic()
    pairs = zip(runs, found, strict=True)
    return [functools.partial(fetch_run_history, project, run, where, done, attempt) for run, where in pairs], None


def fetch_run_history(
    project: Project, run: dict[str, Any], where: dict[str, Any] | None, done: dict[str, Facts], attempt: int = 1
) -> tuple[list[Job], None]:
    """A job: fetch a run's history. A run that fails, for whatever reason of its own, is noted and left out."""
    import pyarrow as pa

    try:
        if where is None:
            raise Stop("W&B does not show this run any more", 1)
        done[run["id"]] = assemble(project, run, where)
        project.arrived = time.monotonic()
        project.progress.fetched(1, "histories")
    except (Stop, pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, Expired) and attempt < 3:
            return [functools.partial(ask_addresses, project, [run], done, attempt + 1)], None
        note_history_failure(project, run, error)
    return [], None


def note_history_failure(project: Project, run: dict[str, Any], error: Exception) -> None:
    """Note that a run's history failed. Raises the error where not the run but the key, the server or our disk did."""
    silent = isinstance(error, Unanswered) and time.monotonic() > project.arrived + PATIENCE
    if isinstance(error, Rejected) or silent or getattr(error, "errno", None):
        raise error
    note_failure(project, {"name": run["id"], "displayName": run["name"]}, f"history: {error}")


def assemble(project: Project, run: dict[str, Any], where: dict[str, Any]) -> Facts:
    """Download a run's exported files and fetch its live rows, or read its `logs`, and make one clean file of them.

    It has the columns STEP and the logged keys, Float64 or String, one row per step, ordered by it, and the facts in
    its footer. Rows are converted in small batches, so that no run is held whole (one whose rows are out of order or
    doubled excepted).
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    target, globs = history_part(project, run), project.args.history_keys
    urls = where.get("parquetUrls") or []
    raw = [target.with_suffix(f".{number}.raw") for number in range(len(urls))]
    for path, url in zip(raw, urls, strict=True):
        download(project, url, path)
    claimed = sum(open_parquet(path).metadata.num_rows for path in raw)
    if claimed > 2 * (run["history_rows"] or 10_000_000) + 100_000:
        raise ValueError(f"its exported files claim {claimed} rows, and W&B counts {run['history_rows']}")
    live = fetch_live_rows(project, run, where.get("liveData") or [])
    for rows in filter(None, read_logged(where["logs"]) if "logs" in where else live):
        raw.append(target.with_suffix(f".{len(raw)}.raw"))
        pq.write_table(live_table(rows), raw[-1], compression="lz4")
    kinds = joined(key_kinds(path, globs) for path in raw)
    schema = history_schema(kinds)
    columns = (open_parquet(path).read(["_step"])["_step"].cast(pa.int64()) for path in raw)
    steps = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.int64()).combine_chunks()
    if steps.null_count:
        raise ValueError("some of its rows have no step")
    tables = (table for path in raw for table in read_raw(path, schema, list(kinds) if globs else None))
    rows, last = pc.count_distinct(steps).as_py(), pc.max(steps).as_py()
    if not pc.all(pc.greater(steps[1:], steps[:-1])).as_py() and len(steps) > 1:
        table = pa.concat_tables(tables)
        order = pc.sort_indices(table["_step"])  # stable: of rows of one step the first stays
        steps = table["_step"].combine_chunks().take(order)
        first = pa.concat_arrays([pa.array([True]), pc.not_equal(steps[1:], steps[:-1])])[: len(steps)]
        tables = iter([table.take(order.filter(first))])
    facts: Facts = {"globs": globs, "kinds": kinds, "mark": history_mark(run), "rows": 0}
    facts["confirmed"] = rows == (run["history_rows"] or 0) and run["last_step"] in (None, last)
    with written_beside(project, target) as path, pq.ParquetWriter(path, schema, **PART) as writer:
        for table in tables:
            writer.write_table(table)
            facts["rows"] += len(table)
        writer.add_key_value_metadata(footer(project, **facts))
    for path in raw:
        path.unlink()
    return facts | {"file": Stored(target, project, "mark"), "first": 0}


def download(project: Project, url: str, path: Path) -> None:
    """Download a file of exported history through W&B's client. Raises `Expired`, or `Unanswered`."""
    from wandb.proto.wandb_api_pb2 import ApiRequest, DownloadFileRequest

    request = ApiRequest(download_file_request=DownloadFileRequest(path=str(path.resolve()), url=url))
    try:
        project.server.answer(lambda seconds: project.server.service.send_api_request(request, timeout=seconds))
    except Unanswered:
        raise
    except Stop as error:
        reason = "" if isinstance(error, Rejected) else f" ({error})"
        raise Expired(f"its download address is no longer good{reason}", 1) from None


def fetch_live_rows(project: Project, run: dict[str, Any], live: list[Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows that are in no exported file yet, in lists of a few thousand, from steps as `liveData` gives them."""
    items = [json.loads(item) if isinstance(item, str) else item for item in live]
    steps = sorted({int(item["_step"]) for item in items if isinstance(item, dict) and item.get("_step") is not None})
    if items and not steps:  # live rows of which W&B does not say the steps
        steps = list(range((run["last_step"] or 0) + 1))
    windows: list[tuple[int, int]] = []
    for step in steps:
        fits = windows and step < windows[-1][0] + LIVE_STEPS
        windows[-1:] = [(windows[-1][0], step + 1)] if fits else [*windows[-1:], (step, step + 1)]
    wanted = set(steps)
    for some in batched(windows, 10):
        calls = " ".join(f"h{a}: history(minStep: {a}, maxStep: {b}, samples: {b - a})" for a, b in some)
        query = f"""query LiveHistory($entity: String!, $project: String!, $run: String!) {{
          project(name: $project, entityName: $entity) {{ run(name: $run) {{ {calls} }} }} }}"""
        reply = project.ask(query, {"run": run["id"]})
        with expected("live rows"):
            texts = [text for a, _ in some for text in reply["run"][f"h{a}"]]
        rows = [read_json(text)[0] if isinstance(text, str) else text for text in texts]
        yield [row for row in rows if row.get("_step") in wanted]


def live_table(rows: list[dict[str, Any]]) -> pa.Table:
    """History rows as a table: `_step` Int64, keys whose values are all numbers Float64, others their text."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(map(dotted, rows)):
        for key, value in row.items():
            if (column := columns.get(key)) is None:
                column = columns[key] = [None] * len(rows)
            column[number] = value
    arrays = {"_step": pa.array(map(int, columns.pop("_step")), pa.int64())}
    for key, values in zip(map(clean_text, columns), columns.values(), strict=True):
        numbers, _ = number_column(values)
        numeric = numbers.count(None) == values.count(None)
        arrays[key] = to_array(numbers, "double") if numeric else to_array(list(map(as_text, values)), "string")
    return pa.table(arrays)


def dotted(row: dict[str, Any]) -> dict[str, Any]:
    """A row without nested dicts: their keys are joined with dots, as in exported files. Media stay what they are.

    Of a nested and a plain key that are spelled alike the plain one keeps the name, the other gets `__2`.
    """
    flat, nested = {}, {}
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            nested |= {(key, inner): item for inner, item in dotted(value).items()}
        else:
            flat[key] = value
    for (key, inner), value in nested.items():
        name = f"{key}.{inner}"
        flat[next_free(name, {*flat, *row}) if name in flat else name] = value
    return flat


def as_text(value: Any) -> str | None:
    """A logged value in a column of text: numbers as Float64 holds them (3, 0.5, NaN), lists and dicts as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        number = as_number(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else json.dumps(number)
    if isinstance(value, list | dict):
        return dump_json(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def key_kinds(path: Path, globs: list[str]) -> dict[str, str]:
    """Of each logged key of a history file that matches a glob, if there are any: whether it is number or text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    file = open_parquet(path)
    types = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    asked = {key for key in types if not globs or any(fnmatch.fnmatchcase(key, glob) for glob in globs)}
    asked -= {*STEP, "_wandb"}
    kinds = {key: "number" for key in asked if is_number(types[key])}
    texts = asked - kinds.keys()
    for batch in file.iter_batches(HISTORY_ROWS, columns=list(texts)) if texts else ():
        for key, column in zip(batch.schema.names, batch.columns, strict=True):
            if kinds.get(key) != "text" and key in texts and column.null_count < len(column):
                named = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
                names = pa.array(list(NAMED_FLOATS), column.type) if named else None
                numeric = named and pc.all(pc.is_in(column.drop_null(), value_set=names)).as_py()
                kinds[key] = "number" if numeric else "text"
    return kinds


def is_number(kind: pa.DataType) -> bool:
    """Whether a column's values are numbers or bools."""
    import pyarrow as pa

    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    return any(test(kind) for test in tests)


def read_raw(path: Path, schema: pa.Schema, needed: list[str] | None) -> Iterator[pa.Table]:
    """The rows of an exported file, in batches of the schema; if any keys are `needed`, those that have one of them."""
    import pyarrow.compute as pc

    file = open_parquet(path)
    there = set(file.schema_arrow.names)
    size = max(1, min(HISTORY_ROWS, HISTORY_CELLS // len(schema)))
    for batch in file.iter_batches(size, columns=[name for name in schema.names if name in there]):
        table = to_schema(dict(zip(batch.schema.names, batch.columns, strict=True)), len(batch), schema)
        if needed is not None:
            filled = [pc.is_valid(table[key]) for key in needed]
            table = table.filter(functools.reduce(pc.or_, filled)) if filled else table.slice(0, 0)
        yield table


def to_schema(columns: dict[str, Any], rows: int, schema: pa.Schema) -> pa.Table:
    """Rows of any history file with the schema's columns and types; what a file lacks is null."""
    import pyarrow as pa

    nulls = {kind: pa.nulls(rows, kind) for kind in set(schema.types)}
    fields = zip(schema.names, schema.types, strict=True)
    arrays = [to_kind(columns[name], kind) if name in columns else nulls[kind] for name, kind in fields]
    return pa.table(arrays, schema=schema)


def to_kind(column: Any, kind: pa.DataType) -> Any:
    """A column as numbers or as text; numbers in text are spelled as `as_text` does, whatever type W&B stored."""
    import pyarrow as pa

    if column.type == kind:
        return column
    if pa.types.is_string(kind):
        return to_array(list(map(as_text, column.to_pylist())), "string")
    if is_number(column.type):
        return (column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column).cast(kind, safe=False)
    return to_array(column.to_pylist(), "double")  # NaN and the infinities, or numbers that stood beside text


def history_columns(keys: Iterable[str]) -> dict[str, str]:
    """The column of each logged key: the key itself, but for the names of the run's own columns."""
    taken = set(keys)
    return {key: next_free(key, taken) if key in RUN else key for key in sorted(taken)}


def read_history(project: Project) -> tuple[list[str], dict[str, Facts]]:
    """Of the earlier export of a project's history its globs and, by run id, what it holds."""
    path = project.path("history.parquet")
    stored = Stored(path, project, "schemas")
    schemas: list[dict[str, str]] = stored.about["schemas"]
    columns = history_columns(joined(schemas))
    first, facts = 0, {}
    for run, about in stored.about["runs"].items():  # whose rows stand one after another
        facts[run] = about | {"kinds": schemas[about["schema"]], "file": stored, "first": first, "columns": columns}
        first += about["rows"]
    if (set(stored.names), stored.metadata.num_rows) != ({*RUN, *STEP, *columns.values()}, first):
        raise Stop(f"{path} cannot be read (its rows or columns are not those that its footer tells of)", 1)
    return stored.about["history_keys"], facts


def merge_history(project: Project, facts: dict[str, Facts], names: dict[str, str | None]) -> None:
    """Write the history file of these runs, ordered by id and step. A run's rows are gathered into row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = joined(about["kinds"] for about in facts.values())
    columns = history_columns(kinds)
    schema = history_schema({columns[key]: kind for key, kind in kinds.items()}, RUN)
    texts = [name for name, kind in zip(schema.names, schema.types, strict=True) if kind == pa.string()]
    schemas: dict[str, int] = {}
    runs: dict[str, dict[str, Any]] = {}
    held: list[pa.Table] = []
    read = functools.lru_cache(1)(lambda file, group: file.read(group=group))  # runs of the export before share one
    options = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True, "use_dictionary": texts}
    with (
        written_beside(project, project.path("history.parquet")) as path,
        pq.ParquetWriter(path, schema, **options) as writer,
    ):
        for run, about in sorted(facts.items()):
            own = dict(zip(RUN, (run, clean_text(names[run]), project.entity, project.name), strict=True))
            spelled = about.get("columns", {})  # what reserved names became in an earlier export
            for table in slices(about, read):
                values = dict(zip(table.column_names, table.columns, strict=True))
                logged = {columns[key]: values[spelled.get(key, key)] for key in about["kinds"]}
                logged |= {name: values[name] for name in STEP}
                logged |= {name: pa.repeat(pa.scalar(text, pa.string()), len(table)) for name, text in own.items()}
                held.append(to_schema(logged, len(table), schema))
                if sum(map(len, held)) * len(schema) >= HISTORY_CELLS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            number = schemas.setdefault(json.dumps(about["kinds"], sort_keys=True), len(schemas))
            runs[run] = {"name": names[run], "schema": number}
            runs[run] |= {name: about[name] for name in ("rows", "mark", "confirmed")}
        if held:
            writer.write_table(pa.concat_tables(held))
        spelled = {"runs": runs, "history_keys": project.args.history_keys, "schemas": list(map(json.loads, schemas))}
        writer.add_key_value_metadata(footer(project, **spelled))


def slices(facts: Facts, read: Callable[[Stored, int], pa.Table]) -> Iterator[pa.Table]:
    """The rows of a run's history, in order, in small tables, from row groups as `read` gives them."""
    row, end = facts["first"], facts["first"] + facts["rows"]
    while row < end:
        group = facts["file"].group(row)
        start, table = facts["file"].starts[group], read(facts["file"], group)
        rows = min(end, start + len(table), row + HISTORY_ROWS) - row
        yield table.slice(row - start, rows)
        row += rows


# ---------------------------------------------------------------- runs from folders, in place of W&B

LOG_HEADER = b":W&B\xe1\xbe\x00"  # its last byte is the format's version
LOG_BLOCK = 32_768
LOGGED_VALUES = 200_000  # decoded at once
STILL_RUNNING = 600  # seconds since its last change in which a log that tells of no end is that of a running run
# What of a run its log tells: W&B's name of it, and the log's.
RECORDED = {"displayName": "display_name", "tags": "tags", "group": "run_group", "jobType": "job_type"}
RECORDED |= {"notes": "notes", "sweepName": "sweep_id"}


class Log(NamedTuple):
    """A `.wandb` file: what one session of a run logged. Times are nanoseconds since 1970."""

    entity: str
    project: str
    run: str  # its id
    started: int
    size: int
    path: Path
    changed: int


class Folders:
    """Folders of run logs, in the place of a `Connection`. `runs` has the logs by (entity, project), then by run id."""

    app_url = base_url = None
    entities: Sequence[str] = ()

    def __init__(self, folders: list[Path]) -> None:
        """Find the logs in `FOLDER/offline-run-*/` and `FOLDER/run-*/`, or in the folder of one run.

        Of copies of one session the largest counts. A run that recorded no entity gets WANDB_ENTITY, else `offline`.
        """
        import wandb

        self.version, self.damage = wandb.__version__, dict[Path, str]()
        entity = read_settings().get("WANDB_ENTITY", ("", ""))[0].split(",")[0].strip() or "offline"
        places = ("*.wandb", "offline-run-*/*.wandb", "run-*/*.wandb")
        found: list[Log] = []
        for path in (path for folder in folders for place in places for path in folder.glob(place)):
            run = next((record.run for record in read_log(path, self.damage) if record.HasField("run")), None)
            if run is None:
                self.damage.setdefault(path, "tells of no run")
                continue
            about, started = path.stat(), run.start_time.ToNanoseconds()
            whose = run.entity or entity, run.project or "uncategorized", run.run_id
            found.append(Log(*whose, started, about.st_size, path, about.st_mtime_ns))
        self.runs: dict[tuple[str, str], dict[str, list[Log]]] = {}
        for log in sorted(found):
            logs = self.runs.setdefault((log.entity, log.project), {}).setdefault(log.run, [])
            if logs and logs[-1].started == log.started:
                logs.pop()
            logs.append(log)
        self.account = f"{len(found)} run log{'s'[: len(found) != 1]} in {', '.join(map(str, folders))}"


def read_log(path: Path, damage: dict[Path, str]) -> Iterator[Any]:
    """The `Record`s of a log that are whole; what is wrong with the rest is noted in `damage`.

    Behind the header it is LevelDB's format: blocks of 32 KiB hold chunks of CRC-32 (over type and data), length, type
    and data. A record is a whole chunk (type 1), or a first (2), middle ones (3) and a last (4); fewer than 7 bytes at
    the end of a block are padding. Where a CRC does not hold, the next chunk whose CRC does is looked for.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    pieces: list[bytes] = []
    bad, lost = 0, False
    try:
        file = path.open("rb")
    except OSError as error:
        damage[path] = f"cannot be read: {error.strerror}"
        return
    with file:
        if (header := file.read(len(LOG_HEADER))) != LOG_HEADER:
            damage[path] = "is no run log in the format that this script knows" if header else "is empty"
            return
        while block := file.read(LOG_BLOCK - file.tell() % LOG_BLOCK):
            at, lost = 0, False
            end = len(block) if file.tell() % LOG_BLOCK else len(block) - 6
            while at < end:
                length = int.from_bytes(block[at + 4 : at + 6], "little")
                chunk = block[at + 6 : at + 7 + length]
                if len(chunk) <= length or zlib.crc32(chunk) != int.from_bytes(block[at : at + 4], "little"):
                    bad, lost, pieces, at = bad + (not lost), True, [], at + 1
                    continue
                lost, at, kind = False, at + 7 + length, chunk[0]
                if kind < 3:
                    pieces = [chunk[1:]]
                elif pieces:  # otherwise its beginning was in a damaged chunk
                    pieces.append(chunk[1:])
                if pieces and kind in (1, 4):
                    try:
                        yield Record.FromString(b"".join(pieces))
                    except DecodeError:
                        bad += 1
                    pieces = []
    if bad > lost:
        damage[path] = f"is damaged in {bad} place{'s'[: bad != 1]}"
    elif lost or pieces:
        damage[path] = "is cut off in mid-record"


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set what a path leads to, as W&B's core does: what is in the way goes, and a dict is set value by value."""
    if isinstance(value, dict):
        for name, below in value.items():
            put(tree, [*path, name], below)
        return
    for name in path[:-1]:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[path[-1]] = value


def drop(tree: dict[str, Any], path: Sequence[str]) -> None:
    """Remove what a path leads to, and the dicts that are empty then."""
    below = tree.get(path[0])
    if len(path) > 1 and isinstance(below, dict):
        drop(below, path[1:])
    if len(path) == 1 or below == {}:
        tree.pop(path[0], None)


def change(tree: dict[str, Any], record: Any, read: Callable[[str], Any]) -> None:
    """Carry out a config or a summary record, with the values that `read` makes of their JSON."""
    for item in record.update:
        path = item.nested_key
        if len(path) == 1 and read is str:  # as `put` does, for the many
            tree[path[0]] = item.value_json
        else:
            put(tree, path or [item.key], read(item.value_json))
    for item in record.remove:
        drop(tree, item.nested_key or [item.key])


def read_texts(tree: dict[str, Any]) -> dict[str, Any]:
    """A summary from its values' JSON, as W&B hands it out: NaN and the infinities by name, nothing that is null."""
    values = {n: read_texts(t) or None if isinstance(t, dict) else BY_NAME.decode(t) for n, t in tree.items()}
    return {name: value for name, value in values.items() if value is not None}


def number_metrics(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What `define_metric` said, as W&B's config has it: by numbers of protobuf fields, step metrics by their place."""
    for metric in list(metrics.values()):
        if metric.step_metric not in ("", *metrics):
            metrics[metric.step_metric] = type(metric)(name=metric.step_metric)
    order = sorted(metrics, key=lambda name: name.endswith("*"))
    return [
        {"2" if (metric := metrics[name]).glob_name else "1": name}
        | ({"5": 1 + order.index(metric.step_metric)} if metric.step_metric else {})
        | {"6": [field.number for field, _ in metric.options.ListFields()]}
        | {"7": [field.number for field, _ in metric.summary.ListFields()]}
        for name in order
    ]


def read_run_logs(logs: list[Log], damage: dict[Path, str]) -> dict[str, Any]:
    """A run as `tabulate` takes it, from the logs of its sessions, oldest first; what they do not tell is None.

    The sessions of a resumed run become one as in W&B: of config and summary a later session's top-level keys replace
    an earlier one's, and a step that is not above the one before becomes the next one.
    """
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import EnvironmentRecord, MetricRecord

    node: dict[str, Any] = {**dict.fromkeys(FIELDS.values()), "name": logs[0].run}
    config, summary, system = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    rows, step, code = 0, -1, None
    for log in logs:
        own, told, logged, metrics = {"_wandb": dict[str, Any]()}, dict[str, Any](), dict[str, Any](), dict[str, Any]()
        environment, begun, code = EnvironmentRecord(), False, None
        for record in read_log(log.path, damage):
            kind = record.WhichOneof("record_type")
            about = getattr(record, kind) if kind else None
            if kind == "history":
                rows, step = rows + 1, max(step + 1, about.step.num)
                if "_step" not in told:  # before 0.17 the client wrote the summary only when the run ended
                    for item in about.item:
                        put(logged, item.nested_key or [item.key], item.value_json)
            elif kind == "summary":
                change(told, about, str)
            elif kind == "config":
                change(own, about, json.loads)
            elif kind == "run":
                if not begun:  # later ones tell the config as the client has it, not as W&B has
                    change(own, about.config, json.loads)
                    own["_wandb"] |= {
                        name: getattr(about.telemetry, name) for name in ("cli_version", "python_version")
                    }
                begun = True
                node |= {name: value for name, field in RECORDED.items() if (value := getattr(about, field))}
                node["commit"] = about.git.commit or node["commit"]
            elif kind == "metric" and not about.expanded_from_glob:
                name = about.glob_name or about.name
                if about._control.overwrite:
                    metrics.pop(name, None)
                metrics.setdefault(name, MetricRecord()).MergeFrom(about)
            elif kind == "environment":
                environment.MergeFrom(about)
            elif kind == "stats":
                system |= {item.key: json.loads(item.value_json) for item in about.item}
            elif kind == "exit":
                code = about.exit_code
        own["_wandb"]["m"] = number_metrics(metrics)
        if environment.writer_id:
            own["_wandb"]["e"] = {environment.writer_id: MessageToDict(environment)}
        config |= own
        summary |= read_texts(told if "_step" in told else logged | told)
    if "_step" in summary:
        summary["_step"] = step
    changed = max(log.changed for log in logs)
    node["state"] = "crashed" if code is None else "failed" if code else "finished"
    if code is None and time.time() - changed / 1e9 < STILL_RUNNING:
        node["state"] = "running"
        damage.pop(logs[-1].path, None)  # its last record may be on its way to the disk
    for name, moment in (("createdAt", logs[0].started), ("heartbeatAt", changed)):
        node[name] = datetime.fromtimestamp(moment // 1000 / 1e6, UTC).isoformat() if moment else None
    node |= {"historyLineCount": rows, "config": json.dumps({name: {"value": config[name]} for name in config})}
    return node | {"summaryMetrics": json.dumps(summary), "systemMetrics": json.dumps(system)}


def read_logged(logs: list[Log]) -> Iterator[list[dict[str, Any]]]:
    """What a run logged, in lists of some thousand rows as W&B gives them, with steps as in `read_run_logs`."""
    step, held = -1, 0
    texts: list[str] = []  # rows as JSON, but for
    nested: list[tuple[int, Sequence[str], str]] = []  # values with a path of several keys
    names: dict[Any, str] = {}  # every key so far, as JSON

    def rows() -> list[dict[str, Any]]:
        decoded = BY_NAME.decode(f"[{','.join(texts)}]")
        for row, path, text in nested:
            put(decoded[row], path, BY_NAME.decode(text))
        return decoded

    for record in (record for log in logs for record in read_log(log.path, {}) if record.HasField("history")):
        step = max(step + 1, record.history.step.num)
        values = []
        for item in record.history.item:
            path = item.nested_key
            if len(path) > 1:
                nested.append((len(texts), path, item.value_json))
                names[*path] = ""
            else:
                key = path[0] if path else item.key
                values.append(f"{names.get(key) or names.setdefault(key, json.dumps(key))}:{item.value_json}")
        texts.append("{" + ",".join([*values, f'"_step":{step}']) + "}")
        held += len(record.history.item)
        if held > LOGGED_VALUES or len(texts) * len(names) > HISTORY_CELLS:
            yield rows()
            texts, nested, held = [], [], 0
    yield rows()


def recorded_projects(
    folders: Folders, entities: Sequence[str], wanted: list[str]
) -> tuple[list[tuple[str, str]], list[Stop]]:
    """(entity, project) of the runs in the folders that are asked for, and which files tell of no run."""
    found = [
        (entity, project)
        for entity, project in folders.runs
        if not entities or {entity, f"{entity}/{project}"} & {*entities}
        if not wanted or project in wanted or any(fnmatch.fnmatchcase(project, glob) for glob in wanted)
    ]
    problems = [Stop(f"{plain(path)} {wrong}", 1) for path, wrong in folders.damage.items()]
    if not found and not problems:
        asked, known = " and ".join([*entities, *wanted]), ", ".join(map("/".join, folders.runs))
        advice = (
            f"is of {asked}. They are of {known}." if known else "was found. Name one like wandb/, of offline-run-*."
        )
        problems.append(Stop(f"no run in the folders {advice}"))
    return found, problems


def is_wanted(args: argparse.Namespace, print_: Print) -> bool:
    """Whether the filters let the run with this fingerprint through; as at W&B, by whole seconds."""
    run = dict(zip(FIELDS, print_, strict=True))
    second = (run["created_at"] or 0) // 1_000_000
    return not (
        (args.since and second < int(args.since.timestamp()))
        or (args.until and second >= int(args.until.timestamp()))
        or (args.state and run["state"] not in args.state)
        or (args.tag and {*args.tag}.isdisjoint(run["tags"]))
    )


def list_logs(project: Project, previous: Runs | None) -> dict[str, Print]:
    """Run id -> fingerprint of the runs with logs that are asked for; those that are new or changed become parts.

    A run is read again until its logs are whole and tell of its end. What W&B itself said of a run stands.
    """
    folders, args, listing = project.server, project.args, Listing(project, full=True)
    runs = folders.runs[project.entity, project.name]
    project.logs = dict(previous.about.get("logs", {})) if previous else {}
    before = {print_[0]: print_ for print_ in previous.prints} if previous else {}
    full = not previous or args.full or bool(full_phase(project)) or previous.about["system"] < args.system_metrics
    stale: dict[str, list[list[int]]] = {}
    for run, logs in runs.items():
        marks = [[log.changed, log.size] for log in logs]
        if run not in before or (run in project.logs and (full or project.logs[run] != marks)):
            stale[run] = marks
        elif run in project.logs and is_wanted(args, before[run]):
            listing.prints[run] = before[run]
    project.progress.expect(len(stale))
    for some in batched(list(stale), 20):  # few, so that one sees it go on
        nodes: list[dict[str, Any]] = []
        for run in some:
            try:
                node = read_run_logs(runs[run], folders.damage)
            except (ValueError, RecursionError) as error:
                note_failure(project, {"name": run}, f"its logs cannot be read: {error}")
                continue
            print_ = fingerprint(node)
            if not is_wanted(args, print_):
                continue
            wrong = [f"{log.path} {folders.damage[log.path]}" for log in runs[run] if log.path in folders.damage]
            for what in wrong:
                say(f"error: {plain(what)}; what is whole is exported")
                project.failed[run] = {"id": run, "name": node["displayName"] or "", "error": what}
            project.logs[run] = [] if wrong or node["state"] == "running" else stale[run]
            if args.dry_run:
                listing.prints[run] = print_
            else:
                nodes.append(node)
        listing.keep(nodes)
    return listing.prints


# ---------------------------------------------------------------- one project, from W&B to its files


def export_project(project: Project) -> None:
    """Export one project. Whatever goes wrong is noted in it; files that were good before are so still."""
    started, kept = time.monotonic(), False
    try:
        with working(project):
            try:
                mended(project, export_runs)
                if project.runs:
                    write_metadata(project)
                if project.runs and project.args.include_history:
                    mended(project, export_history)
                    write_metadata(project)
            finally:
                kept = any(project.parts.rglob("*.parquet")) or bool(full_phase(project))
    except (Stop, OSError) as error:
        project.error = str(error)
        if number := getattr(error, "errno", None):
            project.error = f"{getattr(error, 'filename', None) or project.args.output}: {os.strerror(number)}"
        project.refused = getattr(error, "code", 1) == 2 and not (kept or project.runs)
        advice = ". What was fetched is kept; run the command again to go on." if kept else ""
        say(f"error: {plain(project.title)}: {project.error.rstrip('.')}{advice}")
    project.seconds = time.monotonic() - started


@contextlib.contextmanager
def working(project: Project) -> Iterator[None]:
    """Hold the project's lock and its hidden folder, which goes afterwards unless what was fetched waits there.

    Raises `Stop` if another export is at work. Symbolic links are not followed, whoever made them.
    """
    path = project.parts.with_suffix(".lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                break  # otherwise its last holder has just removed it: what we hold is no longer the lock
        except ImportError:  # Windows
            break
        except BlockingIOError:
            os.close(lock)
            raise Stop("another export of this project is under way; wait for it, or stop it", 1) from None
        os.close(lock)
    try:
        for place in (project.parts, *project.parts.rglob("*")):
            if place.is_symlink():
                place.unlink()
        project.parts.mkdir(exist_ok=True)
        yield
    finally:
        if not any(project.parts.rglob("*.parquet")) and not full_phase(project):
            shutil.rmtree(project.parts, ignore_errors=True)
        if os.name == "posix":  # elsewhere a file that is open stays
            path.unlink(missing_ok=True)
        os.close(lock)


def full_phase(project: Project, phase: str | None = None) -> str:
    """What a `--full` export that is under way fetches, `runs` or `history`: an interrupted one goes on as such.

    With a `phase` that is noted, an empty one ends it.
    """
    note = project.parts / "full"
    if phase is not None:
        note.write_text(phase)
    return note.read_text() if note.is_file() else ""


def mended(project: Project, export: Callable[[Project], None]) -> None:
    """Run `export`; when it meets a file of ours that is damaged, again without it, so that what it held is fetched.

    A file that cannot even be opened may be anything: it is left alone.
    """
    while True:
        try:
            with expected(f"the runs of {project.title}"):
                return export(project)
        except Damaged as error:
            if error.path.parent == project.parts or error.path.parent.parent == project.parts:
                error.path.unlink()
            elif project.args.filters or project.args.keep_deleted:
                advice = "Export once without filters and without --keep-deleted, or move it away"
                raise Stop(f"{error}, and what it holds cannot all be fetched again this way. {advice}", 1) from None
            project.damaged.add(error.path)
            say(f"... {plain(project.title)}: {error}; what it holds is fetched again")


def export_runs(project: Project) -> None:
    """Bring the project's runs file up to date; notes the ids of the runs that the filters let through."""
    args, target = project.args, project.path("runs.parquet")
    previous = Runs(target, project) if target.exists() and target not in project.damaged else None
    if args.full and not full_phase(project):
        shutil.rmtree(project.parts)
        project.parts.mkdir()
        full_phase(project, "runs")
    parts: dict[Path, Runs] = {}
    if held := sum(len(part.prints) for part in open_parts(project, parts)):
        on_disk = f"going on from {held} runs that an interrupted export left on disk"
        project.progress.note(f"... {plain(project.title)}: {on_disk}")
    known = [*parts.values(), *([previous] if previous and full_phase(project) != "runs" else [])]
    have = {print_ for runs in known if runs.about["system"] >= args.system_metrics for print_ in runs.prints}
    if args.offline:
        listing = list_logs(project, previous)
    else:
        listing = list_runs(project, have, full=not have)
        held = previous.about.get("logs", {}) if previous else {}
        project.logs = {run: marks for run, marks in held.items() if run not in listing}
        have |= {print_ for part in open_parts(project, parts) for print_ in part.prints}
        stale = [run for run, print_ in listing.items() if print_ not in have and run not in project.failed]
        fetch_runs(project, stale)
    open_parts(project, parts)
    unchanged = merge_runs(project, previous, [*parts.values()], listing)
    project.listed = set(listing)
    if not project.runs:
        what = "no runs that match" if args.filters else "no runs"
        left = f", {target} is left as it is" if target.exists() else ""
        say(f"{plain(project.title)}: {what}; nothing is written{left}")
        return
    project.size = target.stat().st_size
    for path in parts:
        path.unlink()
    full_phase(project, "history" if full_phase(project) and args.include_history else "")
    some = f"{project.runs} run{'s'[: project.runs != 1]}"
    project.progress.note(f"Up to date: {some} in {target}" if unchanged else f"Saved {some} to {target}")
    if project.removed:
        count, names = len(project.removed), named(project.removed)
        project.progress.note(f"{plain(project.title)}: removed {count} that W&B no longer has: {names}")


def open_parts(project: Project, parts: dict[Path, Runs]) -> list[Runs]:
    """The parts on disk, in the order in which they came; those not in `parts` yet are opened and put there."""
    for path in sorted(project.parts.glob("*.parquet")):
        if path not in parts:
            try:
                parts[path] = Runs(path, project)
            except Stop:  # the machine went down while it was written: as if never fetched
                path.unlink()
    project.part_number = itertools.count(max((int(path.stem) for path in parts), default=-1) + 1)
    return list(parts.values())


def merge_runs(project: Project, previous: Runs | None, parts: list[Runs], listing: dict[str, Print]) -> bool:
    """Find the row that stands for each run, count what is new, and write the file; True if nothing changed."""
    sources = [previous, *parts] if previous else parts
    winners: dict[str, tuple[int, int]] = {}
    for number, source in enumerate(sources):  # later ones are newer; one that agrees with the listing beats them
        for row, print_ in enumerate(source.prints):
            run = print_[0]
            standing = winners.get(run)
            agrees = standing and sources[standing[0]].prints[standing[1]] == listing.get(run)
            if not agrees or print_ == listing.get(run):
                winners[run] = number, row
    before = {print_[0]: print_ for print_ in previous.prints} if previous else {}
    if project.not_listed:
        counted = f"W&B counts {len(listing) + project.not_listed} runs and lists {len(listing)}, also when asked again"
        say(f"error: {plain(project.title)}: {counted}. Nothing is removed on its word; run the command again later.")
    elif not (project.args.filters or project.args.keep_deleted):
        for run in winners.keys() - listing.keys() - project.failed.keys() - project.logs.keys():
            del winners[run]
        project.removed = [{"id": run, "name": before[run][1] or ""} for run in before if run not in winners]
    from_before = {run for run, (number, _) in winners.items() if previous and number == 0}
    project.runs, project.unchanged = len(winners), len(from_before)
    project.new = len(winners.keys() - before.keys())
    project.updated = project.runs - project.new - project.unchanged
    project.states = Counter(sources[s].prints[row][STATE] for s, row in winners.values())
    same = bool(previous) and previous.about["system"] == project.args.system_metrics
    same = same and from_before == before.keys() == winners.keys() and previous.about.get("logs", {}) == project.logs
    if winners and not same:
        merge(project, sources, winners)
    return same


def named(runs: list[dict[str, str]]) -> str:
    """The first few runs by name and id."""
    shown = ", ".join(f"{plain(run['name'])} ({plain(run['id'])})" for run in runs[:5])
    return shown + (f" and {len(runs) - 5} more" if len(runs) > 5 else "")


def export_history(project: Project) -> None:
    """Bring the project's history file up to date, after its runs file. Only the listed runs are fetched."""
    import pyarrow as pa

    args, target = project.args, project.path("history.parquet")
    usable = target.exists() and target not in project.damaged
    globs, before = read_history(project) if usable else (args.history_keys, {})
    stored = Stored(project.path("runs.parquet"), project, "keys")
    columns = ["id", "name", "state", "history_rows", "last_step", "heartbeat_at"]
    table = stored.read(columns).select(columns)
    table = table.set_column(5, "heartbeat_at", table["heartbeat_at"].cast(pa.int64()))
    runs = {run["id"]: run for run in table.to_pylist()}
    facts = {run: known for run, known in before.items() if run in runs}
    stale: dict[str, dict[str, Any]] = {}
    for run, about in runs.items():
        known = None if globs != args.history_keys or full_phase(project) == "history" else facts.get(run)
        if run in project.listed and about["history_rows"] == 0:
            facts.pop(run, None)  # it may have had rows once
        elif run in project.listed and not (known and known["confirmed"] and known["mark"] == history_mark(about)):
            stale[run] = about
    if globs != args.history_keys and facts.keys() - stale.keys():
        raise Stop(
            f"{target} holds the keys {globs or 'all'}, also of runs that this export leaves out. "
            "Export without filters, with the same --history-keys, or to another -o",
            1,
        )
    fresh = fetch_history(project, stale.values())
    # What could not be fetched again keeps the rows that there are, unconfirmed.
    facts |= {run: facts[run] | {"confirmed": False} for run in facts.keys() & stale.keys()} | fresh
    names = {run: runs[run]["name"] for run in facts}
    shown = {run: (names[run], known["confirmed"]) for run, known in facts.items()}
    project.history_rows = sum(known["rows"] for known in facts.values())
    if fresh or shown != {run: (known["name"], known["confirmed"]) for run, known in before.items()}:
        merge_history(project, facts, names)
        project.progress.note(f"Saved {project.history_rows} history rows to {target}")
    shutil.rmtree(project.parts / "history", ignore_errors=True)
    full_phase(project, "")
    if not project.history_rows:
        keys = f"any of the keys {', '.join(args.history_keys)}" if args.history_keys else "anything"
        say(f"{plain(project.title)}: none of these runs has logged {keys}; there is no history to save")
    if unsure := [{"id": run, "name": names[run] or ""} for run in fresh if not fresh[run]["confirmed"]]:
        say(f"... {plain(project.title)}: history not confirmed by W&B's row count and last step: {named(unsure)}")


def write_metadata(project: Project) -> None:
    """Write the metadata file, which describes the runs and history files as they now stand."""
    facts: dict[str, Facts] = {}
    if project.path("history.parquet").exists():
        with contextlib.suppress(Stop):  # which is reported where history is asked for
            _, facts = read_history(project)
    keys = Stored(project.path("runs.parquet"), project, "keys").about["keys"]
    done = {name: getattr(project, name) for name in ("new", "updated", "unchanged", "removed", "not_listed")}
    about = {
        "entity": project.entity,
        "project": project.name,
        "exported_at": now(),
        "wandb_version": project.server.version,
        "base_url": project.server.base_url,
        "total_runs": project.runs,
        "runs_by_state": dict(project.states.most_common()),
        "history_rows": sum(known["rows"] for known in facts.values()) if facts else project.history_rows,
        "history_unconfirmed": [{"id": r, "name": k["name"]} for r, k in facts.items() if not k["confirmed"]],
        "filters": project.args.filters_shown,
        "export": done | {"failed": list(project.failed.values())},
        "columns": {column: ".".join(key[1:]) for key, _, column in keys},
    }
    with written_beside(project, project.path("metadata.json")) as path:
        path.write_text(json.dumps(about, indent=1))


# ---------------------------------------------------------------- what is said


class Progress:
    """On a terminal a bar with count, rate and time left, elsewhere a line per 100 runs. Quiet: neither."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()  # of runs and of histories: what came, over all projects
        self.totals: Counter[str] = Counter()  # and what is to come
        self.bars: Any = None
        if not quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = ["fetched", progress.MofNCompleteColumn(), "{task.description}", progress.BarColumn(20)]
            columns += ["{task.fields[rate]}", progress.TimeRemainingColumn()]
            self.bars = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self.tasks = {what: self.bars.add_task(what, rate="", visible=False) for what in ("runs", "histories")}
            self.bars.start()

    def stop(self) -> None:
        """Take the bar away."""
        if self.bars:
            self.bars.stop()

    def expect(self, number: int, what: str = "runs") -> None:
        """So many more are to come."""
        self.fetched(0, what, number)

    def fetched(self, number: int, what: str = "runs", more: int = 0) -> None:
        """So many came, of so many more."""
        with self.lock:
            before = self.counts[what]
            self.counts[what] += number
            self.totals[what] += more
            if self.bars and self.totals[what]:
                task, total = self.tasks[what], self.totals[what]
                speed = self.bars.tasks[task].speed
                rate = f"{speed:,.0f}/s" if speed else ""
                self.bars.update(task, completed=self.counts[what], total=total, rate=rate, visible=True)
            elif not self.quiet:
                for hundred in range(before // 100 + 1, self.counts[what] // 100 + 1):
                    say(f"... fetched {hundred * 100} {what}")

    def note(self, text: str) -> None:
        """A line that matters, but not to someone who asked for quiet."""
        if not self.quiet:
            say(text)


def show_outcomes(projects: list[Project]) -> None:
    """The closing table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    same_entity = len({project.entity for project in projects}) == 1
    columns = {name: [getattr(p, name) for p in projects] for name in ("runs", "new", "updated")}
    columns |= {name: [len(getattr(p, name)) for p in projects] for name in ("removed", "failed")}
    columns["history"] = [p.history_rows or 0 for p in projects]
    rare = [name for name in ("removed", "failed", "history") if not any(columns[name])]
    columns = {name: counts for name, counts in columns.items() if name not in rare}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("project", overflow="fold", min_width=12)
    for name in [*columns, "seconds", "size"]:
        table.add_column(name, justify="right", no_wrap=True)
    for p, counts in zip(projects, zip(*columns.values(), strict=True), strict=True):
        name = Text(plain(p.name if same_entity else p.title))
        cells = ["-"] * len(counts) if p.error else [f"{count:,}" for count in counts]
        table.add_row(name, *cells, f"{p.seconds:.1f}", "error" if p.error else decimal(p.size))
    Console().print(table)


# ---------------------------------------------------------------- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong ones end the script with exit code 2 before anything heavy is imported.

    To the options come `filters`, Mongo-style, all of which must hold, and `filters_shown` for the metadata.
    """
    about, _, story = (__doc__ or "").partition("\n\n")
    parser = Parser(description=f"{about}\n\nexamples:\n{story}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [-e NAME] [-p NAME] [--include-history] [options]"
    several: dict[str, Any] = {"action": "append", "default": []}
    switch: dict[str, Any] = {"action": "store_true"}
    add = parser.add_argument
    add("-e", "--entity", metavar="NAME", **several, help="user or team, or entity/project; default: yours; repeatable")
    add("-p", "--project", metavar="NAME", **several, help="exact name or glob; default: every project; repeatable")
    add("--offline", metavar="DIR", **several, help="read the run folders in DIR, such as wandb/, not W&B; repeatable")
    add("-o", "--output", metavar="DIR", type=Path, default=OUTPUT, help=f"output folder; default: {OUTPUT}/")
    add("--include-history", **switch, help="also every logged step, to {entity}_{project}_history.parquet")
    add = parser.add_argument_group("which runs are fetched (rows already on disk stay)").add_argument
    since_help = "created since 7d, 24h, 2w, 2025-10-01 or an ISO time (UTC)"
    add("-s", "--since", metavar="WHEN", type=parse_when, help=since_help)
    add("--until", metavar="WHEN", type=parse_when, help="created before")
    options = {"action": "extend", "type": parse_states, "default": []}
    add("--state", metavar="STATES", **options, help=f"any of {', '.join(STATES)}; commas, or repeated")
    add("--tag", metavar="TAG", **several, help="with this tag; repeatable: any of them")
    add("--full", **switch, help="fetch every run again; finds configs that were edited after a run ended")
    add("--keep-deleted", **switch, help="keep runs that were deleted on W&B")
    add("--dry-run", **switch, help="say what would be fetched; write nothing")
    add = parser.add_argument_group("what else is fetched").add_argument
    add("--history-keys", metavar="GLOBS", default="", help="only these keys, 'train/*,val/loss'; rows without any go")
    add("--system-metrics", **switch, help="also system_* columns (GPU, CPU, memory at the end of the run)")
    add = parser.add_argument_group("how").add_argument
    add("--api-key", metavar="KEY", help="default: WANDB_API_KEY, the team's key in .env, `wandb login`")
    add("--workers", metavar="N", type=positive, default=WORKERS, help=f"requests at a time; default: {WORKERS}")
    add("-q", "--quiet", **switch, help="no progress and no table; only what went wrong")
    args = parser.parse_args(arguments)
    if nameless := [name for name in args.entity if not name.split("/")[0].strip()]:
        parser.error(f"-e {nameless[0]!r} names no entity; name a user or a team")
    for name in args.project:
        if "/" in name:
            entity, project = name.split("/", 1)
            parser.error(f"-p {name}: a project's name holds no slash. Write -e {entity} -p {project}")
    if args.history_keys and not args.include_history:
        parser.error("--history-keys needs --include-history")
    if args.since and args.until and args.since >= args.until:
        parser.error(f"--since {args.since:%Y-%m-%d %H:%M} is not before --until {args.until:%Y-%m-%d %H:%M}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"-o {args.output} is a file; name a folder")
    args.offline = list(map(Path, args.offline))
    if missing := [folder for folder in args.offline if not folder.is_dir()]:
        parser.error(f"--offline {missing[0]}: there is no such folder")
    if args.offline:
        args.keep_deleted, args.workers = True, min(2, args.workers)  # they compute, and hold a batch of rows each
    args.history_keys = [glob.strip() for glob in args.history_keys.split(",") if glob.strip()]
    args.state = [] if "all" in args.state else list(dict.fromkeys(args.state))
    args.since, args.until = (at and at.replace(microsecond=0) for at in (args.since, args.until))  # as W&B takes them
    any_of = {"state": args.state, "tags": args.tag}
    args.filters = [{name: {"$in": wanted}} for name, wanted in any_of.items() if wanted]
    if bounds := created(*(at and int(at.timestamp()) for at in (args.since, args.until))):
        args.filters.insert(0, bounds)
    times = {name: at and at.isoformat() for name, at in (("since", args.since), ("until", args.until))}
    args.filters_shown = times | {"state": args.state, "tag": args.tag}
    return args


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def find_projects(
    server: Connection, entities: list[str], wanted: list[str]
) -> tuple[list[tuple[str, str]], list[Stop]]:
    """(entity, project) of every project asked for, and what is wrong with entities and globs that have none."""
    found: list[tuple[str, str]] = []
    problems: list[Stop] = []
    for place in dict.fromkeys(entities or visible_entities(server)[:1]):
        entity, _, project = place.partition("/")
        names: list[str] | None = None
        for glob in [*filter(None, [project]), *wanted] or ["*"]:
            if not set(glob) & set("*?["):
                found.append((entity, glob))
                continue
            names = visible_projects(server, entity) if names is None else names
            matching = [glob] if glob in names else [name for name in names if fnmatch.fnmatchcase(name, glob)]
            found += [(entity, name) for name in matching]
            if not matching:
                problems.append(unseen(server, entity, glob, names))
    return list(dict.fromkeys(found)), problems


def visible_projects(server: Connection, entity: str) -> list[str]:
    """`list_projects`, empty where W&B refuses to list the entity."""
    try:
        return list_projects(server, entity)
    except (Rejected, Unanswered):
        raise
    except Stop:
        return []


def unseen(server: Connection, entity: str, project: str, names: list[str] | None = None) -> Stop:
    """Why there is no such project, with the nearest names of projects (`names` has the entity's) or entities."""
    names = visible_projects(server, entity) if names is None else names
    if names:
        return Stop(f"no project of {plain(entity)} is or matches {project!r}.{nearest(project.strip('*'), names)}")
    visible = visible_entities(server)
    if entity in visible:
        return Stop(f"the entity {entity} has no projects", 1)
    return Stop(f"no entity {entity!r} that this key sees.{nearest(entity, visible)} It sees {', '.join(visible)}.")


def preview(project: Project) -> None:
    """Say what an export would fetch, from a listing without configs and summaries."""
    target = project.path("runs.parquet")
    paths = sorted(project.parts.glob("*.parquet")) if project.parts.is_dir() else []
    if target.exists() and not project.args.full:
        paths.insert(0, target)
    have = {print_ for path in paths for print_ in Runs(path, project).prints}
    if project.args.offline:
        listing = list_logs(project, Runs(target, project) if target.exists() else None)
    else:
        listing = list_runs(project, have, full=False)
    stale = sum(print_ not in have for print_ in listing.values())
    told = f"{plain(project.title)}: would fetch {stale} of {len(listing)} runs"
    requests = -(-stale // PAGE)
    if project.args.include_history:
        told += f", and the history of up to {len(listing)}"
        requests += -(-len(listing) // 25)
    if requests and not project.args.offline:
        told += f", in about {requests} request{'s'[: requests != 1]}"
    print(told)


def main() -> int:
    """Export the projects that the command line names; returns the exit code."""
    args = parse_arguments()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what each thread freed, here 100 MB
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX
    sys.setswitchinterval(0.05)  # pages are read one after another; a thread that waits for that only costs
    sys.setrecursionlimit(10_000)  # configs may be nested deeply,
    sys.set_int_max_str_digits(0)  # and configs may hold integers of any size
    server = Folders(args.offline) if args.offline else Connection(args.api_key)
    progress = Progress(args.quiet)
    progress.note(f"Using {server.account}")
    pool = ThreadPoolExecutor(args.workers)
    try:
        find = recorded_projects if args.offline else find_projects
        found, problems = find(server, args.entity or server.entities, args.project)
        for problem in problems:
            say(f"error: {problem}")
        if not found:
            return max(problem.code for problem in problems)
        projects = [Project(entity, name, args, server, pool, progress) for entity, name in found]
        if args.dry_run:
            for project in projects:
                preview(project)
            return 1 if problems or any(project.failed for project in projects) else 0
        args.output.mkdir(parents=True, exist_ok=True)
        export_all(projects)
    finally:
        progress.stop()
    if not args.quiet:
        show_outcomes(projects)
    if all(project.refused for project in projects):
        return 2
    some_failed = problems or any(project.error or project.failed or project.not_listed for project in projects)
    return 1 if some_failed or not any(project.runs for project in projects) else 0


def export_all(projects: list[Project]) -> None:
    """Export the projects, a few at a time. Of two that spell the same file the second is refused."""
    first: dict[Path, Project] = {}
    for project in projects:
        target = project.path("runs.parquet")
        owner = first.setdefault(target, project)
        if owner is not project:
            project.error = f"its file {target} is that of {owner.title}"
            say(f"error: {plain(project.title)}: {project.error}. Export it with another -o.")
    drivers = ThreadPoolExecutor(4)  # they only wait; the requests run in the export's own pool
    list(drivers.map(export_project, first.values()))


if __name__ == "__main__":
    finish(main)
