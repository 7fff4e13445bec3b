#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pyarrow>=26,<27",
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "urllib3>=2.5,<3",
# ]
# ///
"""Export the runs of W&B projects to Parquet, one file per project: complete, typed, lossless.

    uv run wandb-tools/export_runs.py -e my_team -p my_project
    uv run wandb-tools/export_runs.py -e my_team                  # every project
    uv run wandb-tools/export_runs.py -e my_team -p 'sweep_*' --since 7d
    uv run wandb-tools/export_runs.py -e my_team --include-history \\
        --history-keys 'train/*,val/loss'
    uv run wandb-tools/export_runs.py -e my_team --dry-run

The files are wandb_export/{entity}_{project}_runs.parquet and so on. Run it
again at any time: only runs that are new or changed are fetched. Kill it at
any time: the next run goes on from what is on disk. A file is replaced only
when its successor is whole.
"""

# How it works: the runs of a project are fetched as pages, several at a time, and each page becomes a small Parquet
# file (a part) in a hidden folder. An export is the merge of its sources: the parts and the export before. Which row
# of which source stands for a run, and which type each column has, is decided first, from light columns and from
# counts that each file keeps in its footer; then the rows are copied in order, a block at a time. History is fetched
# run by run into the same hidden folder, exported files as they are, and merged in the same way.

from __future__ import annotations

import argparse
import base64
import configparser
import contextlib
import ctypes
import difflib
import fnmatch
import hashlib
import importlib
import itertools
import json
import netrc
import os
import random
import re
import shutil
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    import pyarrow as pa

# What a copier may want to change.
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"  # the name of the team's service-account key in .env
DEFAULT_BASE_URL = "https://api.forge.coreweave.com"  # W&B's hosted service, as the client 0.31 spells it
# W&B's hosted services and the address of the API behind each.
FORGE_HOSTS = {"forge.coreweave.com": "api.wandb.ai", "qa.forge.coreweave.com": "api.qa.wandb.ai"}
TRIES = 6  # times that a request is sent before it counts as unanswered
OUTPUT = Path("wandb_export")
WORKERS = 8  # requests in flight, over all projects
FIRST_PAGE, LARGEST_PAGE = 100, 1000  # runs per request: the first, and the most
PAGE_SECONDS, PAGE_BYTES = 2.0, 4_000_000  # what a page should take at the most, to arrive and in memory
BLOCK = 1000  # runs per row group, and held at once when the file is built
HISTORY_BATCH = 20_000  # history rows converted at once
HISTORY_CELLS = 4_000_000  # history values per row group

LIGHT_FIELDS = """name displayName state createdAt heartbeatAt tags group jobType notes sweepName commit
  historyLineCount user { username name }"""
# A key of a run's data: the column's prefix (config, metric or system), then the path of keys as W&B spells them.
Key = tuple[str, ...]

WANDB_VERSION = "0.31.0"  # the client whose protocol this speaks


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
    except (MemoryError, RuntimeError, ImportError) as error:
        if not isinstance(error, MemoryError) and not re.search("new thread|map segment|allocate", str(error)):
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


# --- auth: the same in list_entities.py and export_runs.py ---
class Account(NamedTuple):
    """Whom we ask and as whom. `source` says where the key stood; the key itself is never printed or stored."""

    base_url: str
    app_url: str
    key: str
    source: str
    entities: list[str]  # WANDB_ENTITY, comma-separated


def find_account(api_key: str | None = None) -> Account:
    """Find the server and the key: the argument, WANDB_API_KEY, the team's key, then what `wandb login` stored.

    Raises `Stop` with the four places when there is no key in any of them, or when the address is none.
    """
    settings, origin = read_settings()
    base_url = (settings.get("WANDB_BASE_URL") or stored_base_url() or DEFAULT_BASE_URL).rstrip("/")
    if not re.match(r"https?://[^/\s]+", base_url):
        raise Stop(f"WANDB_BASE_URL {base_url!r} is no address. Write it like {DEFAULT_BASE_URL}.")
    if api_key:
        key, source = api_key, "--api-key"
    elif name := next((name for name in ("WANDB_API_KEY", TEAM_KEY) if settings.get(name)), None):
        key, source = settings[name], f"{name} in {origin[name]}"
    else:
        key, source = login_key(base_url), f"`wandb login` for {urlsplit(base_url).netloc}"
    if not key:
        raise Stop(
            f"no W&B API key for {base_url}. Looked for --api-key (export_runs.py), for WANDB_API_KEY in the\n"
            f"environment or in .env, for {TEAM_KEY} in .env, and for what `wandb login` stores in ~/.netrc.\n"
            "Set one of them; your key is shown at https://wandb.ai/authorize."
        )
    app_url = (settings.get("WANDB_APP_URL") or app_address(base_url)).rstrip("/")
    entities = [name.strip() for name in settings.get("WANDB_ENTITY", "").split(",") if name.strip()]
    return Account(base_url, app_url, key.strip(), source, entities)


def read_settings() -> tuple[dict[str, str], dict[str, str]]:
    """The environment, then `.env` of the working directory or its parents, then `.env` beside the script or above.

    Returns name -> value and name -> where it stood. The first place that has a non-empty value wins.
    """
    from dotenv import dotenv_values, find_dotenv

    settings = {name: value for name, value in os.environ.items() if value.strip()}
    origin = dict.fromkeys(settings, "the environment")
    script = Path(__file__).resolve().parent
    beside = next((folder / ".env" for folder in (script, *script.parents) if (folder / ".env").is_file()), "")
    for path in (find_dotenv(usecwd=True), str(beside)):
        try:
            values = dotenv_values(path) if path else {}
        except UnicodeDecodeError:
            raise Stop(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
        for name, value in values.items():
            if value and value.strip() and name not in settings:
                settings[name], origin[name] = value, path
    return settings, origin


def stored_base_url() -> str | None:
    """The address that `wandb login --host` stored in W&B's settings file, if any."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        say(f"{folder / 'settings'} cannot be read and is passed over: {error}")
    return parser.get("default", "base_url", fallback=None)


def login_key(base_url: str) -> str | None:
    """The key that `wandb login` stored for the server, or None."""
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    path = next((path for place in places if place and (path := Path(place).expanduser()).is_file()), None)
    if path is None:
        return None
    # One login serves several addresses: W&B's own client falls back in the same way.
    hosts = [urlsplit(base_url).netloc, FORGE_HOSTS.get(forge_host(base_url) or "")]
    try:
        entries = [netrc.netrc(path).authenticators(host) for host in hosts if host]
    except (netrc.NetrcParseError, OSError) as error:
        say(f"{path} cannot be read and is passed over: {error}")
        return None
    return next((entry[2] for entry in entries if entry and entry[2]), None)


def forge_host(base_url: str) -> str | None:
    """The host of W&B's hosted service behind an API address; None for a server of one's own."""
    host = urlsplit(base_url).hostname
    return next((forge for forge, api in FORGE_HOSTS.items() if host in (forge, f"api.{forge}", api)), None)


def app_address(base_url: str) -> str:
    """The address of the pages that belong to an API address (the rule of `wandb.util.api_to_app_url`)."""
    if forge := forge_host(base_url):
        return f"https://{forge}/wandb"
    if "://api.wandb." in base_url and "://api.wandb.test" not in base_url:
        return base_url.replace("://api.", "://")
    return base_url.replace("://api.", "://app.")


# --- end auth ---


# --- graphql: the same in list_entities.py and export_runs.py ---
class Trouble(Exception):
    """W&B did not give what it was asked for; the message says why."""


class Unanswered(Trouble):
    """No usable answer: the request timed out, the server failed, or the connection broke. A smaller one may pass."""


class Rejected(Trouble):
    """The server does not accept the key."""


class Server:
    """W&B's GraphQL endpoint for any number of threads, which slow down together when it limits requests.

    The scripts speak the protocol of W&B's own client themselves: importing the client and starting its sidecar
    costs more than most exports, and the sidecar hides the time-outs and rate limits that a fast export adapts to.
    """

    def __init__(self, account: Account, connections: int) -> None:
        import urllib3

        self.account = account
        self.requests = 0
        self.lock = threading.Lock()
        self.resume_at = 0.0  # monotonic; no request starts earlier
        self.gap = 0.0  # seconds between the starts of two requests
        seconds = os.environ.get("WANDB_HTTP_TIMEOUT") or "30"
        if not re.fullmatch(r"\d+(\.\d+)?", seconds) or not float(seconds):
            raise Stop(f"WANDB_HTTP_TIMEOUT {seconds!r} is no number of seconds. Write it like 30.")
        timeout = urllib3.Timeout(connect=10, read=float(seconds))
        options = {"maxsize": connections, "timeout": timeout, "retries": False}
        options["ca_certs"] = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        address = urlsplit(account.base_url)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(address.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
            proxy = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
            if proxy.scheme not in ("http", "https"):
                raise Stop(f"the proxy for {account.base_url} is of the kind {proxy.scheme}. Set an http or https one.")
            proxy_login = urllib3.make_headers(proxy_basic_auth=unquote(proxy.auth)) if proxy.auth else {}
            self.pool = urllib3.ProxyManager(proxy._replace(auth=None).url, proxy_headers=proxy_login, **options)
        else:
            self.pool = urllib3.PoolManager(**options)
        login = base64.b64encode(f"api:{account.key}".encode()).decode()
        self.headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}

    def ask(self, query: str, variables: dict[str, Any], tries: int = TRIES) -> dict[str, Any]:
        """The `data` of one GraphQL query. Raises `Rejected`, `Unanswered` after `tries` tries, or `Trouble`.

        A rate limit (429) is waited out for as long as it lasts and uses up no try.
        """
        body = json.dumps({"query": query, "variables": variables}).encode()
        text = self.send("POST", f"{self.account.base_url}/graphql", body, self.headers, tries)
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            start = text[:60].decode(errors="replace").strip()
            raise Trouble(f"the answer is no JSON but {start!r}. Is WANDB_BASE_URL the address of W&B's API?")
        if reply.get("data") is None or reply.get("errors"):
            errors = [str(error.get("message", error)) for error in reply.get("errors") or [{"message": "no data"}]]
            timed_out = re.search("deadline exceeded|timed? ?out", " ".join(errors), re.IGNORECASE)
            raise (Unanswered if timed_out else Trouble)("; ".join(errors))
        return reply["data"]

    def send(self, method: str, url: str, body: bytes | None, headers: dict[str, str], tries: int = TRIES) -> bytes:
        """The body of the answer to one request; the rules for errors are those of `ask`."""
        import urllib3

        headers = {"Accept-Encoding": "gzip", "User-Agent": "wandb-tools", **headers}
        attempt = limited = 0
        while True:
            self.wait_for_turn()
            try:
                reply = self.pool.request(method, url, body=body, headers=headers)
                if reply.status == 200:
                    self.gap *= 0.8
                    return reply.data
                trouble = f"HTTP {reply.status} {reply.data[:200].decode(errors='replace').strip()}"
            except urllib3.exceptions.HTTPError as error:
                reply, trouble = None, f"{type(error).__name__}: {str(error).split('Caused by')[-1].strip(' ()')}"
            if reply is not None and reply.status == 429:
                limited += 1
                self.slow_down(reply.headers.get("Retry-After"), limited)
                continue
            if reply is not None and reply.status in (401, 403):
                raise Rejected(trouble)
            if reply is not None and reply.status < 500 and reply.status not in (408, 425):
                raise Trouble(trouble)
            attempt += 1
            if attempt >= tries:
                raise Unanswered(trouble)
            time.sleep(min(8, 0.25 * 2**attempt) * random.uniform(0.75, 1.25))

    def wait_for_turn(self) -> None:
        """Hold this thread until the server may be asked again."""
        while True:
            with self.lock:
                now = time.monotonic()
                if now >= self.resume_at:
                    self.resume_at = now + self.gap
                    self.requests += 1
                    return
                wait = self.resume_at - now
            time.sleep(wait)

    def slow_down(self, retry_after: str | None, limited: int) -> None:
        """Make every thread wait as long as W&B asks, and spread the requests that follow."""
        pause = float(retry_after) if (retry_after or "").replace(".", "", 1).isdigit() else min(60, 2.0**limited)
        with self.lock:
            if time.monotonic() + pause > self.resume_at + 1:  # not once more for every thread that hit the same limit
                say(f"... W&B limits requests; waiting {pause:.0f} s")
            self.resume_at = max(self.resume_at, time.monotonic() + pause)
            self.gap = min(2.0, max(0.05, self.gap * 2))


def find_viewer(server: Server) -> dict[str, Any]:
    """The user whose key it is: `entity` (their default) and `teams` (names). Raises `Rejected` or `Trouble`."""
    query = "query Viewer { viewer { username entity teams { edges { node { name } } } } }"
    viewer = server.ask(query, {}).get("viewer")
    if not viewer:
        raise Rejected("the key belongs to no user")
    return {"entity": viewer["entity"], "teams": [edge["node"]["name"] for edge in viewer["teams"]["edges"]]}


def list_projects(server: Server, entity: str) -> list[str]:
    """The names of all projects of an entity, newest first as W&B lists them; empty if it cannot be seen."""
    query = """query Projects($entity: String!, $after: String) {
      models(entityName: $entity, first: 500, after: $after) {
        edges { node { name } } pageInfo { endCursor hasNextPage } } }"""
    names: list[str] = []
    after = None
    while True:
        page = server.ask(query, {"entity": entity, "after": after}).get("models")
        if page is None:
            return names
        names += [edge["node"]["name"] for edge in page["edges"]]
        after = page["pageInfo"]["endCursor"]
        if not page["pageInfo"]["hasNextPage"]:
            return names


def rejected(account: Account) -> Stop:
    """The end of a script whose key the server rejects."""
    return Stop(f"{account.base_url} rejects the API key from {account.source}. Check it, or use another one.")


# --- end graphql ---


# --- naming: the same in export_runs.py and analyze_runs.py ---
def column_name(key: str) -> str:
    """The column spelling of a W&B key: every character but letters, digits and `_` becomes `_`, one for one."""
    return re.sub(r"\W", "_", key)


# --- end naming ---


# ---------------------------------------------------------------- a run's data, flattened

DECODER = json.JSONDecoder(strict=False)  # control characters in strings occur,
CONTROL = re.compile(r"[\x00-\x1f]")  # which other JSON parsers reject
NAMED_FLOATS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def parse_json(text: str | None) -> dict[str, Any]:
    """A JSON object as W&B sends it; null is empty. Bare NaN and Infinity occur and are kept."""
    value = DECODER.decode(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text[:50]!r}")
    return value


def dump_json(value: Any) -> str:
    """JSON text that gives back the same value, readable unless it holds lone surrogates, which no file can store."""
    text = json.dumps(value, ensure_ascii=False)
    return text if is_storable(text) else json.dumps(value)


def is_storable(text: str) -> bool:
    """Whether the text is valid Unicode: JSON may spell lone surrogates, Arrow and Parquet cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unwrap_config(text: str | None) -> dict[str, Any]:
    """The config without W&B's `{"value": ..}` wrappers, `_wandb` included."""
    return {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in parse_json(text).items()}


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
        names[keeper] = column
        suffix = 2
        for key in same:
            if key != keeper:
                while f"{column}__{suffix}" in taken:
                    suffix += 1
                names[key] = f"{column}__{suffix}"
                taken.add(names[key])
    return dict(sorted(names.items(), key=lambda item: (item[0][0], item[1])))


# ---------------------------------------------------------------- runs as tables


@dataclass
class Export:
    """What is asked for, and whom: the same for every project."""

    server: Server
    folder: Path
    pool: ThreadPoolExecutor  # requests run here, at most `workers` at a time over all projects
    workers: int
    filters: list[dict[str, Any]]  # Mongo-style, all must hold
    filters_shown: dict[str, Any]
    system: bool
    history: bool
    history_keys: list[str]
    full: bool
    keep_deleted: bool
    progress: Progress


@dataclass
class Project:
    """One project on its way to disk, and what became of it."""

    export: Export
    entity: str
    name: str
    pace: Pace = field(default_factory=lambda: Pace(FIRST_PAGE))
    light_pace: Pace = field(default_factory=lambda: Pace(LARGEST_PAGE))  # of pages without config and summary
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # run id -> id, name, error
    lock: threading.RLock = field(default_factory=threading.RLock)
    part_number: Iterator[int] = field(default_factory=itertools.count)

    @property
    def title(self) -> str:
        return f"{self.entity}/{self.name}"

    def path(self, ending: str) -> Path:
        return self.export.folder / f"{self.entity}_{self.name}_{ending}"

    @property
    def parts(self) -> Path:
        """Where fetched pages wait for the merge; there only while an export is under way or was interrupted."""
        return self.export.folder / f".{self.entity}_{self.name}.parts"


FINGERPRINT = ["id", "name", "state", "created_at", "heartbeat_at", "tags", "user", "group", "job_type", "sweep"]
FINGERPRINT += ["notes", "commit", "history_rows"]
CREATED = FINGERPRINT.index("created_at")


def fixed_fields(node: dict[str, Any]) -> dict[str, Any]:
    """The columns that need no config or summary, in the order of FINGERPRINT. Times are microseconds since 1970."""
    user = node["user"] or {}
    row = {
        "id": node["name"],
        "name": node["displayName"],
        "state": node["state"],
        "created_at": microseconds(node["createdAt"]),
        "heartbeat_at": microseconds(node["heartbeatAt"]),
        "tags": list(node["tags"] or []),
        "user": user.get("username") or user.get("name"),
        "group": node["group"],
        "job_type": node["jobType"],
        "sweep": node["sweepName"],
        "notes": node["notes"],
        "commit": node["commit"],
        "history_rows": node["historyLineCount"],
    }
    return {name: clean_text(value) for name, value in row.items()}


def fingerprint(row: dict[str, Any]) -> tuple[Any, ...]:
    """What of a run's fixed columns shows that it changed: all of them."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in row.values())


def microseconds(text: str | None) -> int | None:
    """An ISO time of W&B, which is UTC where it names no zone, in microseconds since 1970."""
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


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


def tabulate(project: Project, nodes: list[dict[str, Any]]) -> pa.Table:
    """The runs of a page as a table of the contract's columns; a run whose data is no JSON is noted as failed."""
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    data: list[tuple[dict[str, Any], ...]] = []  # config, summary and system metrics of each
    account = project.export.server.account
    base = "/".join([account.app_url, quote(project.entity, safe=""), quote(project.name, safe=""), "runs"])
    for node in nodes:
        try:
            row, *parsed = read_run(node, project.export.system)
        except (ValueError, RecursionError) as error:
            note_failure(project, node, f"its config or summary cannot be read: {error}")
            continue
        url = f"{base}/{quote(row['id'], safe='')}"
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
    return pa.table(columns).replace_schema_metadata(footer(project, kinds))


def read_run(node: dict[str, Any], system: bool) -> tuple[dict[str, Any], ...]:
    """A run's fixed columns and JSON columns; its config, its summary and its system metrics, if asked for."""
    config, summary = unwrap_config(node["config"]), parse_json(node["summaryMetrics"])
    raw = node["summaryMetrics"] or "{}"
    own = summary.get("_wandb")
    runtime = own.get("runtime") if isinstance(own, dict) else None
    row = fixed_fields(node) | {
        "last_step": whole(summary.get("_step")),
        "runtime_seconds": finite(summary.get("_runtime") if runtime is None else runtime),
        "_config_json": dump_json(config),
        "_summary_json": raw if is_storable(raw) and not CONTROL.search(raw) else dump_json(summary),
    }
    metrics = parse_json(node["systemMetrics"]) if system else {}  # spelled system.gpu.0.temp; one prefix suffices
    return row, config, summary, {name.removeprefix("system."): value for name, value in metrics.items()}


def whole(value: Any) -> int | None:
    """A step as Int64, or null if it is none."""
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 2**63 else None


def finite(value: Any) -> float | None:
    """Seconds as Float64, or null if it is no number."""
    return float(value) if isinstance(value, int | float) and abs(value) < 2**1023 else None


def to_array(values: list[Any], kind: pa.DataType | str) -> pa.Array:
    """An Arrow array; for `string`, values that are no text yet become their JSON text."""
    import pyarrow as pa

    if kind == "string":
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        kind = pa.string()
    elif kind == "double":
        values = [None if value is None else float(value) for value in values]
    try:
        return pa.array(values, pa.type_for_alias(kind) if isinstance(kind, str) else kind)
    except UnicodeEncodeError:  # lone surrogates, which the JSON columns keep, are shown as ?
        return pa.array([clean_text(value) for value in values], kind)


def clean_text(value: Any) -> Any:
    """Text, or a list of texts, with lone surrogates replaced by `?`."""
    if isinstance(value, list):
        return [clean_text(item) for item in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def footer(project: Project, kinds: dict[Key, Counter[str]]) -> dict[str, str]:
    """What a file of runs says of itself: whose it is, and how many values of which kind each key has."""
    about = {
        "entity": project.entity,
        "project": project.name,
        "exported_at": now(),
        "system": project.export.system,
        "keys": [[list(key), +kinds[key], column] for key, column in name_columns(kinds).items()],
    }
    return {"wandb_tools": json.dumps(about)}


def read_footer(path: Path, project: Project, metadata: dict[bytes, bytes] | None, what: str) -> dict[str, Any]:
    """What a file says of itself. Raises `Trouble` for one that is not ours, or another project's."""
    about = json.loads((metadata or {}).get(b"wandb_tools", b"null"))
    if not about or what not in about:
        raise Trouble(f"{path} is no export of this tool. It is left alone; move it away, or use another -o")
    if (about["entity"], about["project"]) != (project.entity, project.name):
        owner = f"{about['entity']}/{about['project']}"
        raise Trouble(f"{path} is that of {owner}, whose name spells the same file. Use another -o")
    return about


def now() -> str:
    """The time in UTC, as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def note_failure(project: Project, node: dict[str, Any], error: str) -> None:
    """Remember a run that could not be fetched, for the report and the metadata."""
    with project.lock:
        project.failed[node["name"]] = {"id": node["name"], "name": node["displayName"] or "", "error": error}
    say(f"... {project.title}: run {node['displayName']} ({node['name']}) failed: {error}")


# ---------------------------------------------------------------- sources and their merge


class Source:
    """A file of runs in the contract's form: a part, or an earlier export."""

    def __init__(self, path: Path, project: Project) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with pq.ParquetFile(path) as file:
            about = read_footer(path, project, file.schema_arrow.metadata, "keys")
            self.has_system: bool = about["system"]
            self.kinds: dict[Key, Counter[str]] = {tuple(key): Counter(kinds) for key, kinds, _ in about["keys"]}
            self.types = {key: column_type(kinds) for key, kinds in self.kinds.items()}
            self.columns: dict[Key, str] = {tuple(key): column for key, _, column in about["keys"]}
            if set(file.schema_arrow.names) != {*self.columns.values(), *fixed_schema()} - {"*"}:
                raise ValueError("its columns are not those that its footer tells of")
            light = file.read(columns=FINGERPRINT)
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self.starts = list(itertools.accumulate(groups, initial=0))
        lists = [as_integers(light.column(name)).to_pylist() for name in FINGERPRINT]
        self.prints = [
            tuple(tuple(value) if isinstance(value, list) else value for value in row)
            for row in zip(*lists, strict=True)
        ]
        self.cached: tuple[int, pa.Table] | None = None

    def has_values(self, key: Key) -> bool:
        """Whether a key has any value but null here."""
        return key in self.kinds and self.kinds[key].total() > self.kinds[key]["null"]

    def group(self, number: int, columns: list[str] | None) -> pa.Table:
        """One row group. The last whole one is kept: the merge reads each source from its start to its end."""
        import pyarrow.parquet as pq

        if columns or self.cached is None or self.cached[0] != number:
            with pq.ParquetFile(self.path) as file:
                table = file.read_row_group(number, columns)
            if columns:
                return table
            self.cached = number, table
        return self.cached[1]

    def take(self, rows: Sequence[int], columns: list[str] | None = None) -> pa.Table:
        """The rows with these numbers, ascending."""
        import pyarrow as pa

        pieces, at = [], 0
        for number, (start, end) in enumerate(itertools.pairwise(self.starts)):
            first = at
            while at < len(rows) and rows[at] < end:
                at += 1
            if at > first:
                table = self.group(number, columns)
                picked = [row - start for row in rows[first:at]]
                if rows[at - 1] == end - 1 and not columns:
                    self.cached = None  # its last row: the merge will not come back
                if picked[-1] - picked[0] + 1 == len(picked):
                    pieces.append(table.slice(picked[0], len(picked)))
                else:
                    pieces.append(table.take(picked))
        return pa.concat_tables(pieces)


def as_integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times as microseconds; other columns as they are."""
    import pyarrow as pa

    return column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column


def count_kinds(source: Source, rows: Sequence[int], system: bool) -> dict[Key, Counter[str]]:
    """How many values of which kind each key has in these rows of a source, from as few rows' JSON as possible."""
    total = source.starts[-1]
    dropped = sorted(set(range(total)) - set(rows))
    if not dropped:
        return source.kinds
    subtract = len(dropped) <= len(rows)
    counts: dict[Key, Counter[str]] = {}
    number_columns = {key: column for key, column in source.columns.items() if key[0] == "system" and system}
    chosen = dropped if subtract else list(rows)
    for block in batched(chosen, BLOCK):
        table = source.take(block, ["_config_json", "_summary_json", *number_columns.values()])
        data = [[parse_json(text) for text in table[f"_{name}_json"].to_pylist()] for name in ("config", "summary")]
        for key, (_, kinds) in gather(*data).items():
            counts.setdefault(key, Counter()).update(kinds)
        for key, column in number_columns.items():
            counts.setdefault(key, Counter())["float"] += len(table) - table[column].null_count
    if not subtract:
        return {key: kinds for key, kinds in counts.items() if kinds.total()}
    left = {key: kinds - counts.get(key, Counter()) for key, kinds in source.kinds.items()}
    return {key: kinds for key, kinds in left.items() if kinds}


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Slices of at most `size` items (itertools.batched came with Python 3.12)."""
    return (items[i : i + size] for i in range(0, len(items), size))


def merge(project: Project, sources: list[Source], winners: dict[str, tuple[int, int]], target: Path) -> None:
    """Write the file of all runs from the rows that stand for them, oldest first, a block at a time.

    `winners` maps a run id to its source (by number) and the row there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = sorted((sources[s].prints[row][CREATED] or 0, run, s, row) for run, (s, row) in winners.items())
    kinds: dict[Key, Counter[str]] = {}
    for number, source in enumerate(sources):
        rows = sorted(row for _, _, s, row in order if s == number)
        for key, counts in count_kinds(source, rows, project.export.system).items() if rows else ():
            if key[0] != "system" or project.export.system:
                kinds.setdefault(key, Counter()).update(counts)
    columns = name_columns(kinds)
    types = {key: column_type(kinds[key]) for key in columns}
    fields: list[tuple[str, Any]] = []
    for name, kind in fixed_schema().items():
        fields += [(columns[key], pa.type_for_alias(types[key])) for key in columns] if name == "*" else [(name, kind)]
    schema = pa.schema(fields, metadata=footer(project, kinds))
    small = [name for name in schema.names if not name.endswith("_json")]
    options = {"compression": "zstd", "compression_level": 3, "write_statistics": small}
    options["use_dictionary"] = [name for name in small if schema.field(name).type == pa.string()]
    with written_beside(project, target) as path, pq.ParquetWriter(path, schema, **options) as writer:
        for block in batched(order, BLOCK):
            pieces, places = [], []
            for number in sorted({s for _, _, s, _ in block}):
                picked = sorted((row, place) for place, (_, _, s, row) in enumerate(block) if s == number)
                table = sources[number].take([row for row, _ in picked])
                pieces.append(conform(table, sources[number], columns, types, schema))
                places += [place for _, place in picked]
            table = pa.concat_tables(pieces)
            if places != sorted(places):
                table = table.take(sorted(range(len(places)), key=places.__getitem__))
            writer.write_table(table)


def conform(
    table: pa.Table, source: Source, columns: dict[Key, str], types: dict[Key, str], schema: pa.Schema
) -> pa.Table:
    """Rows of a source in the final schema; a column of another type is cast if that is exact, else read from JSON."""
    import pyarrow as pa

    again = {
        key
        for key, own in source.types.items()
        if key in types and own != types[key] and (own, types[key]) != EXACT_CAST and source.has_values(key)
    }
    texts = table["_config_json"].to_pylist() if again else []
    cells = gather([parse_json(text) for text in texts])
    arrays = {name: table[name] for name in fixed_schema() if name != "*"}
    for key, column in columns.items():
        kind = schema.field(column).type
        if key in again and key in cells:
            arrays[column] = to_array(cells[key][0], types[key])
        elif key in again or not source.has_values(key):
            arrays[column] = pa.nulls(len(table), kind)
        else:
            values = table[source.columns[key]]
            arrays[column] = values if values.type == kind else values.cast(kind, safe=False)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


EXACT_CAST = ("int64", "double")  # rounds as Python's float() does; every other change of type needs the JSON


@contextlib.contextmanager
def written_beside(project: Project, target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's place when the block ends well. Leftovers go with the parts."""
    path = project.parts / f"{target.name}.tmp"
    yield path
    with path.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)


# ---------------------------------------------------------------- fetching runs


@dataclass
class Pace:
    """How many runs the next page asks for: more while pages arrive quickly, half when one does not arrive."""

    size: int
    good: int = 0  # pages that came since the last change
    patience: int = 1  # pages that must come before the size doubles again

    def arrived(self, runs: int, seconds: float, size_in_bytes: int) -> None:
        """Grow after a page of this many runs; `patience` keeps the size from climbing into the same wall again."""
        self.good += 1
        if self.good >= self.patience and runs:
            self.good = 0
            roof = min(PAGE_SECONDS / seconds, PAGE_BYTES / max(1, size_in_bytes)) * runs
            growth = 4 if self.patience == 1 else 2
            self.size = max(1, min(LARGEST_PAGE, self.size * growth, int(max(roof, self.size / 2))))

    def missed(self, asked: int) -> None:
        """Halve after a page that did not arrive."""
        if asked <= self.size:  # not once more for each page that was under way at the old size
            self.size = max(1, asked // 2)
            if self.good or self.patience == 1:  # a way down of several steps is one wall
                self.patience = min(32, self.patience * 2)
            self.good = 0


class Missing(Trouble):
    """There is no such project, or the key does not see it."""


def all_of(filters: Iterable[dict[str, Any]]) -> str:
    """One Mongo-style filter of several, as the JSON text that W&B takes."""
    parts = [part for part in filters if part]
    return json.dumps({"$and": parts} if len(parts) > 1 else dict(*parts))


def created(start: int | None, end: int | None) -> dict[str, Any]:
    """The filter for runs created in [start, end), in seconds since 1970; None is open."""
    bounds = {op: iso_second(at) for op, at in (("$gte", start), ("$lt", end)) if at is not None}
    return {"createdAt": bounds} if bounds else {}


def iso_second(seconds: int) -> str:
    """A time as W&B's filters take it, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def fetch_page(
    project: Project, window: dict[str, Any], first: int, after: str | None, light: bool, tries: int, probe: bool
) -> dict[str, Any]:
    """One page of runs, oldest first: `edges`, `pageInfo`; with `probe` also `total` and `newest` of the window."""
    server = project.export.server
    fields = LIGHT_FIELDS if light else f"{LIGHT_FIELDS} config summaryMetrics"
    fields += " systemMetrics" if project.export.system and not light else ""
    extra = """total: runCount(filters: $filters)
      newest: runs(filters: $filters, first: 1, order: "-created_at") { edges { node { createdAt } } }"""
    query = f"""query {"ListRuns" if light else "ExportRuns"}(
        $entity: String!, $project: String!, $filters: JSONString, $first: Int!, $after: String) {{
      project(name: $project, entityName: $entity) {{
        {extra if probe else ""}
        runs(filters: $filters, first: $first, after: $after, order: "+created_at") {{
          edges {{ node {{ {fields} }} cursor }}
          pageInfo {{ endCursor hasNextPage }} }} }} }}"""
    filters = all_of([*project.export.filters, window])
    names = {"entity": project.entity, "project": project.name}
    reply = server.ask(query, {**names, "filters": filters, "first": first, "after": after}, tries)["project"]
    if reply is None:
        raise Missing(f"W&B shows no project {project.name!r} of entity {project.entity!r} to this key")
    return {**reply.pop("runs"), **reply}


def fetch_window(
    project: Project,
    window: dict[str, Any],
    light: bool,
    take: Callable[[list[dict[str, Any]]], None],
    probe: bool = False,
) -> dict[str, Any]:
    """Fetch the runs of a window page by page and give each page to `take`; with `probe` only the first page.

    A page that does not arrive is asked for again at half its size; a run that does not even arrive alone is noted
    as failed and passed over. Returns the last page. Raises `Trouble`.
    """
    after: str | None = None
    pace = project.light_pace if light else project.pace
    misses = 0
    while True:
        size = pace.size
        started = time.monotonic()
        try:
            if size == 1 and not light:
                page = fetch_alone(project, window, after, probe)
            else:
                page = fetch_page(project, window, size, after, light, TRIES if size == 1 else 1, probe)
        except Unanswered:
            if size == 1:
                raise
            pace.missed(size)
            misses += 1
            time.sleep(min(2, 0.1 * 2**misses))  # where the server is down, a smaller page does not help
            continue
        misses = 0
        nodes = [edge["node"] for edge in page["edges"]]
        weight = sum(len(node.get("config") or "") + len(node.get("summaryMetrics") or "") for node in nodes)
        pace.arrived(len(nodes), time.monotonic() - started, weight)
        take(nodes)
        after = page["pageInfo"]["endCursor"]
        if probe or not page["pageInfo"]["hasNextPage"]:
            return page


def fetch_alone(project: Project, window: dict[str, Any], after: str | None, probe: bool) -> dict[str, Any]:
    """A page of one run; without it, and with the run noted as failed, when not even that can be fetched."""
    with contextlib.suppress(Unanswered):
        return fetch_page(project, window, 1, after, False, 3, probe)
    light = fetch_page(
        project, window, 1, after, True, TRIES, probe
    )  # raises where the server is at fault, not the run
    try:
        return fetch_page(project, window, 1, after, False, 2, probe)
    except Unanswered as error:
        for edge in light["edges"]:
            note_failure(project, edge["node"], f"too heavy to fetch: {error}")
        return light | {"edges": []}


def keep_page(project: Project, nodes: list[dict[str, Any]]) -> None:
    """Turn a page of runs into a part on disk. One page at a time: what is held then is what memory is used for."""
    import pyarrow.parquet as pq

    if not nodes:
        return
    with project.lock:
        table = tabulate(project, nodes)
        number = next(project.part_number)
    path = project.parts / f"{number:07}.parquet"
    pq.write_table(table, path.with_suffix(".tmp"), compression="lz4", use_dictionary=False, write_statistics=False)
    os.replace(path.with_suffix(".tmp"), path)
    project.export.progress.fetched(len(table))


def in_parallel(project: Project, jobs: Iterable[Callable[[], Any]]) -> list[Any]:
    """The results of the jobs, run on the export's workers. The first error ends it; what has begun still ends well."""
    futures: list[Future[Any]] = [project.export.pool.submit(job) for job in jobs]
    wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        future.cancel()
    wait(futures)
    errors = [future.exception() for future in futures if not future.cancelled() and future.exception()]
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def fetch_everything(project: Project, light: bool, take: Callable[[list[dict[str, Any]]], None]) -> None:
    """Fetch all runs that the filters let through: the first page alone, then windows of time in parallel."""
    first: list[dict[str, Any]] = []

    def first_page(nodes: list[dict[str, Any]]) -> None:
        first.extend(nodes)
        take(nodes)

    [page] = in_parallel(project, [lambda: fetch_window(project, {}, light, first_page, probe=True)])
    project.export.progress.expect(page["total"])
    if not page["pageInfo"]["hasNextPage"]:
        return
    start = (microseconds(first[-1]["createdAt"]) or 0) // 1_000_000 if first else 0
    end = (microseconds(page["newest"]["edges"][0]["node"]["createdAt"]) or 0) // 1_000_000 + 1
    already = {node["name"] for node in first}

    def rest(nodes: list[dict[str, Any]]) -> None:
        take([node for node in nodes if node["name"] not in already])

    left = page["total"] - len(first)
    target = max(FIRST_PAGE, min(2 * LARGEST_PAGE, -(-left // project.export.workers)))
    windows = plan_windows(project, start, max(start + 1, end), target)
    in_parallel(project, [lambda w=window: fetch_window(project, w, light, rest) for window in windows])


def plan_windows(project: Project, start: int, end: int, target: int) -> list[dict[str, Any]]:
    """Filters that split the runs created from `start` on (seconds) into windows of about `target` runs each.

    Counts 32 slices of time in one request, splits those that hold too many once more, and joins neighbours. Windows
    are half-open and meet, so that no run is in two or in none; the last has no end. Runs of one second stay together.
    """
    slices = count_slices(project, cut(start, end, 32))
    for _ in range(2):
        heavy = [(a, b) for a, b, runs in slices if runs > 1.5 * target and b - a > 1]
        if not heavy:
            break
        finer = count_slices(project, [s for a, b in heavy for s in cut(a, b, max(4, 32 // len(heavy)))])
        slices = sorted([s for s in slices if s[:2] not in heavy] + finer)
    edges, held = [start], 0
    for a, _, runs in slices:
        if held and held + runs > 1.2 * target:
            edges.append(a)
            held = 0
        held += runs
    return [created(a, b) for a, b in itertools.zip_longest(edges, edges[1:])]


def cut(start: int, end: int, pieces: int) -> list[tuple[int, int]]:
    """At most `pieces` half-open slices of whole seconds that make up [start, end)."""
    edges = sorted({start + (end - start) * i // pieces for i in range(pieces + 1)})
    return list(itertools.pairwise(edges))


def count_slices(project: Project, slices: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start, end, runs) of each slice of time, counted by W&B in one request."""
    names = [f"s{i}" for i in range(len(slices))]
    declared = ", ".join(f"${name}: JSONString" for name in names)
    asked = " ".join(f"{name}: runCount(filters: ${name})" for name in names)
    query = f"""query CountRuns($entity: String!, $project: String!, {declared}) {{
      project(name: $project, entityName: $entity) {{ {asked} }} }}"""
    variables: dict[str, Any] = {"entity": project.entity, "project": project.name}
    for name, (start, end) in zip(names, slices, strict=True):
        variables[name] = all_of([*project.export.filters, created(start, end)])
    counts = project.export.server.ask(query, variables)["project"]
    return [(start, end, counts[name]) for name, (start, end) in zip(names, slices, strict=True)]


def list_runs(project: Project, known: set[tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Run id -> fingerprint of every run that the filters let through; what is known already tells where to cut."""
    prints: dict[str, tuple[Any, ...]] = {}

    def take(nodes: list[dict[str, Any]]) -> None:
        rows = [fixed_fields(node) for node in nodes]
        prints.update({row["id"]: fingerprint(row) for row in rows})

    times = sorted((print_[CREATED] or 0) // 1_000_000 for print_ in known)
    pieces = min(project.export.workers, -(-len(times) // 450))
    edges = sorted({times[len(times) * i // pieces] for i in range(1, pieces)})
    windows = [created(a, b) for a, b in itertools.zip_longest([None, *edges], edges)]
    in_parallel(project, [lambda w=window: fetch_window(project, w, True, take) for window in windows])
    return prints


def fetch_some(project: Project, ids: list[str]) -> None:
    """Fetch the runs with these ids in full."""
    size = max(FIRST_PAGE, min(500, -(-len(ids) // project.export.workers)))
    project.export.progress.expect(len(ids))

    def job(some: Sequence[str]) -> Callable[[], Any]:
        window = {"name": {"$in": list(some)}}
        return lambda: fetch_window(project, window, False, lambda nodes: keep_page(project, nodes))

    in_parallel(project, [job(some) for some in batched(ids, size)])


# ---------------------------------------------------------------- history


HISTORY_FIXED = {"run_id": "string", "run_name": "string", "entity": "string", "project": "string"}
HISTORY_FIXED |= {"_step": "int64", "_timestamp": "double", "_runtime": "double"}
LIVE_STEPS = 1000  # the span of one history call; W&B's client pages so too, and wider ones may be sampled


class Expired(Trouble):
    """A pre-signed download address that is no longer good; asking again gives a new one."""


@dataclass
class Logged:
    """The fetched history of one run: the files that hold it, and what they were found to hold.

    `kinds` says of each logged key with values whether they are all numbers or (also) text; `mark` is the run's state,
    heartbeat and row count at the time, `confirmed` whether row count and last step agree with what W&B says.
    """

    files: list[str]
    globs: list[str]
    kinds: dict[str, str]
    mark: list[Any]
    ordered: bool
    confirmed: bool
    rows: int


def fetch_history(project: Project, runs: list[dict[str, Any]]) -> dict[str, Logged]:
    """Fetch the history of these runs (rows of the runs file) into files of the parts folder; run id -> what came."""
    folder = project.parts / "history"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Logged] = {}
    for run in runs:  # what an interrupted export left behind
        with contextlib.suppress(FileNotFoundError):
            logged = Logged(**json.loads((folder / f"{file_stem(run['id'])}.json").read_text()))
            same = (logged.mark, logged.globs) == (history_mark(run), project.export.history_keys)
            if same and all((folder / name).exists() for name in logged.files):
                done[run["id"]] = logged
    if done:
        project.export.progress.note(f"... {project.title}: going on from the history of {len(done)} runs on disk")
    todo = [run for run in runs if run["id"] not in done]
    project.export.progress.expect(len(todo), "histories")
    size = max(10, min(25, -(-len(todo) // project.export.workers)))

    def job(some: Sequence[dict[str, Any]]) -> Callable[[], None]:
        return lambda: done.update(fetch_histories(project, list(some)))

    in_parallel(project, [job(some) for some in batched(todo, size)])
    return done


def file_stem(run: str) -> str:
    """A file name for a run id; ids that are none get a digest."""
    return run if re.fullmatch(r"[\w-]{1,100}", run, re.ASCII) else hashlib.sha256(run.encode()).hexdigest()


def history_mark(run: dict[str, Any]) -> list[Any]:
    """What of a run shows that its history grew."""
    return [run["state"], run["heartbeat_at"], run["history_rows"]]


def fetch_histories(project: Project, runs: list[dict[str, Any]]) -> dict[str, Logged]:
    """Fetch some runs' histories, whose addresses one request asks for. A run that fails is noted and left out."""
    done: dict[str, Logged] = {}
    addresses = ask_addresses(project, runs)
    for run in runs:
        node = {"name": run["id"], "displayName": run["name"]}
        found = addresses.get(run["id"])
        for attempt in range(3):
            try:
                if found is None:
                    raise Trouble("W&B does not show this run any more")
                done[run["id"]] = fetch_one_history(project, run, found["parquetUrls"] or [], found["liveData"] or [])
                project.export.progress.fetched(1, "histories")
                break
            except Expired as error:
                if attempt == 2:
                    note_failure(project, node, f"history: {error}")
                else:
                    found = ask_addresses(project, [run]).get(run["id"])
            except Rejected:
                raise
            except (Trouble, ValueError, KeyError) as error:  # the latter two: a file that is not as W&B writes it
                note_failure(project, node, f"history: {error}")
                break
    return done


def ask_addresses(project: Project, runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run id -> `parquetUrls` of the exported files and `liveData`, the steps that are in none yet; in one request."""
    names = [f"r{i}" for i in range(len(runs))]
    asked = " ".join(
        f'{name}: run(name: ${name}) {{ parquetHistory(liveKeys: ["_step"]) {{ parquetUrls liveData }} }}'
        for name in names
    )
    declared = ", ".join(f"${name}: String!" for name in names)
    query = f"""query HistoryAddresses($entity: String!, $project: String!, {declared}) {{
      project(name: $project, entityName: $entity) {{ {asked} }} }}"""
    variables = {"entity": project.entity, "project": project.name}
    variables |= {name: run["id"] for name, run in zip(names, runs, strict=True)}
    try:
        reply = project.export.server.ask(query, variables, tries=TRIES if len(runs) == 1 else 2)["project"] or {}
    except Unanswered:
        if len(runs) == 1:
            raise
        half = len(runs) // 2
        return ask_addresses(project, runs[:half]) | ask_addresses(project, runs[half:])
    return {run["id"]: reply[n]["parquetHistory"] for n, run in zip(names, runs, strict=True) if reply.get(n)}


def fetch_one_history(project: Project, run: dict[str, Any], urls: list[str], live: list[Any]) -> Logged:
    """Download a run's exported files as they are, fetch its live rows into files beside them, and look them over."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    folder, stem = project.parts / "history", file_stem(run["id"])
    files = [f"{stem}.{number}.parquet" for number in range(len(urls))]
    for name, url in zip(files, urls, strict=True):
        download(project, url, folder / name)
    exported = max((pc.max(read_steps(folder / name)).as_py() or 0 for name in files), default=-1)
    for number, rows in enumerate(filter(None, fetch_live_rows(project, run, live, exported))):
        files.append(f"{stem}.live{number}.parquet")
        pq.write_table(live_table(rows), folder / files[-1], compression="lz4")
    kinds: dict[str, str] = {}
    for name in files:
        for key, kind in key_kinds(folder / name, project.export.history_keys).items():
            kinds[key] = "text" if "text" in (kind, kinds.get(key)) else "number"
    steps = pa.chunked_array(
        [c for name in files for c in read_steps(folder / name).chunks], pa.int64()
    ).combine_chunks()
    ordered = pc.all(pc.greater(steps[1:], steps[:-1])).as_py() is not False
    rows = len(steps) if ordered else pc.count_distinct(steps).as_py()
    last = pc.max(steps).as_py()
    confirmed = rows == (run["history_rows"] or 0) and run["last_step"] in (None, last)
    logged = Logged(files, project.export.history_keys, kinds, history_mark(run), ordered, confirmed, rows)
    marker = folder / f"{stem}.json"
    marker.with_suffix(".tmp").write_text(json.dumps(vars(logged)))
    os.replace(marker.with_suffix(".tmp"), marker)
    return logged


def download(project: Project, url: str, path: Path) -> None:
    """Stream a file of exported history to disk. Raises `Expired`, or `Unanswered` after `TRIES` tries."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import urllib3

    server = project.export.server
    attempt = limited = 0
    while True:
        server.wait_for_turn()
        try:
            reply = server.pool.request("GET", url, preload_content=False)
            try:
                if reply.status == 200:
                    with path.with_suffix(".tmp").open("wb") as file:
                        shutil.copyfileobj(reply, file, 1 << 20)
                    pq.ParquetFile(path.with_suffix(".tmp")).close()  # whole? its footer comes last
                    os.replace(path.with_suffix(".tmp"), path)
                    return
            finally:
                reply.release_conn()
            if reply.status in (401, 403, 404, 410):
                raise Expired(f"its download address is no longer good (HTTP {reply.status})")
            if reply.status == 429:
                limited += 1
                server.slow_down(reply.headers.get("Retry-After"), limited)
                continue
            trouble = f"HTTP {reply.status}"
        except (urllib3.exceptions.HTTPError, pa.ArrowInvalid) as error:
            trouble = str(error)
        attempt += 1
        if attempt == TRIES:
            raise Unanswered(f"its exported file does not arrive: {trouble}")
        time.sleep(min(8, 0.25 * 2**attempt))


def read_steps(path: Path) -> pa.ChunkedArray:
    """The `_step` column of a history file, as Int64."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["_step"])["_step"].cast(pa.int64())


def fetch_live_rows(
    project: Project, run: dict[str, Any], live: list[Any], exported: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows that are in no exported file yet, in lists of a few thousand, from steps as `liveData` gives them."""
    items = [json.loads(item) if isinstance(item, str) else item for item in live]
    steps = sorted({int(item["_step"]) for item in items if isinstance(item, dict) and item.get("_step") is not None})
    if items and not steps:  # live rows of which W&B does not say the steps
        steps = list(range(exported + 1, (run["last_step"] or exported) + 1))
    windows: list[tuple[int, int]] = []
    for step in steps:
        if not windows or step >= windows[-1][0] + LIVE_STEPS:
            windows.append((step, step + 1))
        windows[-1] = (windows[-1][0], step + 1)
    wanted = set(steps)
    for some in batched(windows, 10):
        calls = " ".join(
            f"h{i}: history(minStep: {a}, maxStep: {b}, samples: {b - a})" for i, (a, b) in enumerate(some)
        )
        query = f"""query LiveHistory($entity: String!, $project: String!, $run: String!) {{
          project(name: $project, entityName: $entity) {{ run(name: $run) {{ {calls} }} }} }}"""
        names = {"entity": project.entity, "project": project.name, "run": run["id"]}
        reply = (project.export.server.ask(query, names)["project"] or {}).get("run") or {}
        texts = [text for i in range(len(some)) for text in reply.get(f"h{i}") or []]
        rows = [json.loads(text, strict=False) if isinstance(text, str) else text for text in texts]
        yield [row for row in rows if row.get("_step") in wanted]


def live_table(rows: list[dict[str, Any]]) -> pa.Table:
    """History rows as a table: `_step` Int64, keys whose values are all numbers Float64, others their JSON text."""
    import pyarrow as pa

    rows = [dotted(row) for row in rows]
    columns: dict[str, pa.Array] = {"_step": pa.array([int(row["_step"]) for row in rows], pa.int64())}
    for key in dict.fromkeys(key for row in rows for key in row if key != "_step"):
        values = [row.get(key) for row in rows]
        numbers = [NAMED_FLOATS.get(value, value) if isinstance(value, str) else value for value in values]
        if all(value is None for value in values):
            continue
        if all(value is None or isinstance(value, int | float) for value in numbers):
            columns[clean_text(key)] = to_array(numbers, "double")
        else:
            columns[clean_text(key)] = to_array([as_text(value) for value in values], "string")
    return pa.table(columns)


def dotted(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row without nested dicts: their keys are joined with dots, as in exported files. Media stay what they are."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and "_type" not in value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_text(value: Any) -> str | None:
    """A logged value in a column of text: numbers as Float64 holds them (3, 0.5, NaN), lists and dicts as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else json.dumps(number)
    return dump_json(value)


def key_kinds(path: Path, globs: list[str]) -> dict[str, str]:
    """Of each logged key of a history file that matches a glob, if there are any: whether it is number or text."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kinds: dict[str, str] = {}
    with pq.ParquetFile(path) as file:
        for key, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True):
            if key in ("_step", "_timestamp", "_runtime", "_wandb") or not matches(key, globs):
                continue
            if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
                kinds[history_column(key)] = "number"
                continue
            values = file.read(columns=[key])[key].drop_null()
            if len(values):
                texts = pc.unique(values.cast(pa.string()))[:4].to_pylist() if is_text(kind) else [None]
                kinds[history_column(key)] = "number" if set(texts) <= NAMED_FLOATS.keys() else "text"
    return kinds


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def history_column(key: str) -> str:
    """The column of a logged key: the key itself, but for the names of the run's own columns."""
    return f"{key}__2" if key in ("run_id", "run_name", "entity", "project") else key


def matches(key: str, globs: list[str]) -> bool:
    """Whether a key matches one of the globs; without globs every key does."""
    return not globs or any(fnmatch.fnmatchcase(key, glob) for glob in globs)


class PreviousHistory:
    """An earlier export of a project's history, whose runs' rows stand one after another."""

    def __init__(self, path: Path, project: Project) -> None:
        import pyarrow.parquet as pq

        self.path = path
        with pq.ParquetFile(path) as file:
            about = read_footer(path, project, file.metadata.metadata, "schemas")
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            names = {*HISTORY_FIXED, *(key for kinds in about["schemas"] for key in kinds)}
            rows = sum(run["rows"] for run in about["runs"].values())
            if (set(file.schema_arrow.names), file.metadata.num_rows) != (names, rows):
                raise ValueError("its rows or columns are not those that its footer tells of")
        self.globs: list[str] = about["history_keys"]
        self.runs: dict[str, dict[str, Any]] = about["runs"]  # run id -> name, rows, mark, confirmed, schema
        self.schemas: list[dict[str, str]] = about["schemas"]  # key -> number or text
        self.starts = list(itertools.accumulate(groups, initial=0))
        ends = itertools.accumulate((run["rows"] for run in self.runs.values()), initial=0)
        self.first_row = dict(zip(self.runs, ends, strict=False))
        self.cached: tuple[int, pa.Table] | None = None

    def batches(self, run: str) -> Iterator[pa.Table]:
        """The rows of a run, in order."""
        import pyarrow.parquet as pq

        first = self.first_row[run]
        last = first + self.runs[run]["rows"]
        for number, (start, end) in enumerate(itertools.pairwise(self.starts)):
            if start < last and end > first:
                if self.cached is None or self.cached[0] != number:
                    with pq.ParquetFile(self.path) as file:
                        self.cached = number, file.read_row_group(number)
                a, b = max(first, start) - start, min(last, end) - start
                for at in range(a, b, HISTORY_BATCH):
                    yield self.cached[1].slice(at, min(HISTORY_BATCH, b - at))


def merge_history(
    project: Project, fresh: dict[str, Logged], previous: PreviousHistory | None, names: dict[str, str | None]
) -> int:
    """Write the history file of the runs in `names` (run id -> name), from what was fetched and what was there.

    A run's rows are converted in small batches and gathered into row groups, so that no run is ever held whole (one
    whose rows are out of order or doubled excepted). Returns the number of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = sorted(run for run in names if run in fresh or (previous and run in previous.runs))
    kinds: dict[str, str] = {}
    for run in ids:
        own = fresh[run].kinds if run in fresh else previous.schemas[previous.runs[run]["schema"]]
        for key, kind in own.items():
            kinds[key] = "text" if "text" in (kind, kinds.get(key)) else "number"
    keys = sorted(kinds)
    types = HISTORY_FIXED | {key: "string" if kinds[key] == "text" else "double" for key in keys}
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in types.items()])
    schemas: dict[str, int] = {}
    runs: dict[str, dict[str, Any]] = {}
    held: list[pa.Table] = []
    target = project.path("history.parquet")
    text = [name for name, kind in types.items() if kind == "string"]
    with (
        written_beside(project, target) as path,
        pq.ParquetWriter(path, schema, compression="zstd", compression_level=1, use_dictionary=text) as writer,
    ):
        for run in ids:
            rows = 0
            for table in run_tables(project, run, fresh.get(run), previous, schema):
                constants = {"run_id": run, "run_name": clean_text(names[run]), "entity": project.entity}
                constants["project"] = project.name
                for place, (name, value) in enumerate(constants.items()):
                    table = table.set_column(
                        place, schema.field(name), pa.repeat(pa.scalar(value, pa.string()), len(table))
                    )
                rows += len(table)
                held.append(table)
                if sum(map(len, held)) * len(schema) >= HISTORY_CELLS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            about = fresh[run] if run in fresh else previous.runs[run]
            own = about.kinds if run in fresh else previous.schemas[about["schema"]]
            mark, confirmed = (about.mark, about.confirmed) if run in fresh else (about["mark"], about["confirmed"])
            if run not in fresh and previous.globs != project.export.history_keys:
                confirmed = False  # its rows hold other keys, and could not be fetched again this time
            number = schemas.setdefault(json.dumps(own, sort_keys=True), len(schemas))
            runs[run] = {"name": names[run], "rows": rows, "mark": mark, "confirmed": confirmed, "schema": number}
        if held:
            writer.write_table(pa.concat_tables(held))
        about = {"entity": project.entity, "project": project.name, "exported_at": now(), "runs": runs}
        about |= {"history_keys": project.export.history_keys, "schemas": [json.loads(text) for text in schemas]}
        writer.add_key_value_metadata({"wandb_tools": json.dumps(about)})
    return sum(run["rows"] for run in runs.values())


def run_tables(
    project: Project, run: str, logged: Logged | None, previous: PreviousHistory | None, schema: pa.Schema
) -> Iterator[pa.Table]:
    """A run's history in the final schema, ordered by `_step`, one row per step, without rows that have no key."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if logged is None:
        for table in previous.batches(run):
            yield to_history_schema(table, schema)
        return
    own = list(logged.kinds)

    def tables() -> Iterator[pa.Table]:
        for name in logged.files:
            with pq.ParquetFile(project.parts / "history" / name) as file:
                names = file.schema_arrow.names
                wanted = [key for key in names if history_column(key) in (*schema.names[4:7], *own)]
                for batch in file.iter_batches(HISTORY_BATCH, columns=wanted):
                    table = pa.Table.from_batches([batch])
                    table = to_history_schema(
                        table.rename_columns([history_column(key) for key in table.column_names]), schema
                    )
                    if project.export.history_keys:
                        filled = [pc.is_valid(table[key]) for key in own]
                        keep = filled[0] if filled else pa.chunked_array([pa.nulls(len(table), pa.bool_())])
                        for more in filled[1:]:
                            keep = pc.or_(keep, more)
                        table = table.filter(keep)
                    yield table

    if logged.ordered:
        yield from tables()
        return
    table = pa.concat_tables([schema.empty_table(), *tables()])
    table = table.append_column("__order", pa.array(range(len(table)))).sort_by(
        [("_step", "ascending"), ("__order", "ascending")]
    )
    steps = table["_step"].combine_chunks()
    first = pa.concat_arrays([pa.array([True] * min(1, len(steps))), pc.not_equal(steps[1:], steps[:-1])])
    yield table.drop_columns("__order").filter(first)


def to_history_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of any history file with the final columns and types; what a file lacks is null."""
    import pyarrow as pa

    arrays = [
        to_kind(table[name], kind) if name in table.column_names else pa.nulls(len(table), kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(arrays, schema=schema)


def to_kind(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as numbers or as text; numbers in text are spelled as `as_text` does, whatever type W&B stored."""
    import pyarrow as pa

    if column.type == kind:
        return column
    if is_text(kind):
        return pa.chunked_array([to_array([as_text(value) for value in column.to_pylist()], "string")])
    if is_text(column.type):  # NaN and the infinities, or numbers that stood beside text in an earlier export
        return pa.chunked_array([to_array(column.to_pylist(), "double")])
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.cast(kind, safe=False)


# ---------------------------------------------------------------- one project, from W&B to its files


@dataclass
class Outcome:
    """What the export of one project came to; a row of the closing table."""

    project: str
    runs: int = 0
    new: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: list[dict[str, str]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    history_rows: int | None = None
    seconds: float = 0.0
    size: int = 0
    error: str | None = None
    refused: bool = False  # there is no such project, or the key is rejected


def export_project(project: Project) -> Outcome:
    """Export one project. Whatever goes wrong is in the outcome; files that were good before are so still."""
    started = time.monotonic()
    outcome = Outcome(project.title)
    kept = False
    try:
        with locked(project):
            try:
                listed = export_runs(project, outcome)
                if outcome.runs:
                    write_metadata(project, outcome)
                if outcome.runs and project.export.history:
                    export_history(project, outcome, listed)
                    write_metadata(project, outcome)
            finally:
                outcome.failed = list(project.failed.values())
                kept = any(project.parts.rglob("*.parquet")) or full_marker(project, "history").exists()
                if not kept:
                    shutil.rmtree(project.parts, ignore_errors=True)
    except (Trouble, OSError, ValueError) as error:  # ValueError: pyarrow's for a file that it cannot read
        outcome.error = str(error)
        outcome.refused = isinstance(error, Missing | Rejected) and not (kept or outcome.runs)
        if isinstance(error, Rejected):
            outcome.error = str(rejected(project.export.server.account))
        elif isinstance(error, Missing):
            server = project.export.server
            with contextlib.suppress(Unanswered, Rejected):  # the near names are a courtesy
                names = visible_projects(server, project.entity)
                outcome.error = str(unseen(server, project.entity, project.name, names))
        advice = " What was fetched is kept; run the command again to go on." if kept else ""
        say(f"error: {project.title}: {outcome.error.rstrip('.')}.{advice}")
    outcome.seconds = time.monotonic() - started
    return outcome


@contextlib.contextmanager
def locked(project: Project) -> Iterator[None]:
    """Keep other exports away from this project's files while the block runs. Raises `Trouble` if one is at work."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = project.export.folder / f".{project.entity}_{project.name}.lock"
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Trouble("another export of this project is under way; wait for it, or stop it") from None
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its last holder has just removed it: what we hold is no longer the lock
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def readable(path: Path, opened: Callable[[], Any]) -> Any:
    """The opened export before. Raises `Trouble` where it cannot be read: it is the user's, and left alone."""
    try:
        return opened()
    except (ValueError, OSError, KeyError) as error:
        raise Trouble(f"{path} cannot be read ({error}). It is left alone; move it away, or use another -o") from None


def full_marker(project: Project, phase: str = "runs") -> Path:
    """A file that is there while a `--full` export is under way: an interrupted one goes on as such."""
    return project.parts / f"full_{phase}"


def open_sources(project: Project) -> tuple[Source | None, list[Source]]:
    """The export before, if any, and the parts that an interrupted one left. Raises if the former is not ours."""
    target = project.path("runs.parquet")
    previous = readable(target, lambda: Source(target, project)) if target.exists() else None
    project.parts.mkdir(parents=True, exist_ok=True)
    if project.export.full and not (full_marker(project).exists() or full_marker(project, "history").exists()):
        shutil.rmtree(project.parts)
        project.parts.mkdir()
        full_marker(project).touch()
    parts = []
    for path in sorted(project.parts.glob("*.parquet")):
        try:
            parts.append(Source(path, project))
        except (ValueError, OSError, KeyError):  # the machine went down while it was written: as if never fetched
            path.unlink()
    last = max((int(part.path.stem) for part in parts), default=-1)
    project.part_number = itertools.count(last + 1)
    return previous, parts


def export_runs(project: Project, outcome: Outcome) -> set[str]:
    """Bring the project's runs file up to date; returns the ids of the runs that the filters let through."""
    export = project.export
    previous, parts = open_sources(project)
    fresh = [source for source in [None if full_marker(project).exists() else previous, *parts] if source]
    fresh = [source for source in fresh if source.has_system or not export.system]
    listing: dict[str, tuple[Any, ...]] = {}
    if fresh:
        if parts:
            held = sum(len(part.prints) for part in parts)
            export.progress.note(
                f"... {project.title}: going on from {held} runs that an interrupted export left on disk"
            )
        have = {print_ for source in fresh for print_ in source.prints}
        listing = list_runs(project, have)
        fetch_some(project, [run for run, print_ in listing.items() if print_ not in have])
    else:

        def take(nodes: list[dict[str, Any]]) -> None:
            keep_page(project, nodes)
            rows = [fixed_fields(node) for node in nodes]
            listing.update({row["id"]: fingerprint(row) for row in rows})

        fetch_everything(project, False, take)
    parts = [Source(path, project) for path in sorted(project.parts.glob("*.parquet"))]
    sources = ([previous] if previous else []) + parts
    winners: dict[str, tuple[int, int]] = {}
    for number, source in enumerate(sources):  # later ones are newer; one that agrees with the listing beats them
        for row, print_ in enumerate(source.prints):
            run = print_[0]
            standing = winners.get(run)
            agrees = standing and sources[standing[0]].prints[standing[1]] == listing.get(run)
            if not agrees or print_ == listing.get(run):
                winners[run] = number, row
    before = {p[0]: p for p in previous.prints} if previous else {}
    gone = [] if export.filters or export.keep_deleted else [run for run in winners if run not in listing]
    gone = [run for run in gone if run not in project.failed]
    for run in gone:
        del winners[run]
    outcome.removed = [{"id": run, "name": before[run][1] or ""} for run in gone if run in before]
    from_before = {run for run, (number, _) in winners.items() if previous and number == 0}
    outcome.runs = len(winners)
    outcome.new = len(winners.keys() - before.keys())
    outcome.unchanged = len(from_before)
    outcome.updated = len(winners) - outcome.new - outcome.unchanged
    target = project.path("runs.parquet")
    if not winners:
        what = "no runs that match" if export.filters else "no runs"
        say(f"{project.title}: {what}; nothing is written" + (f", {target} is left as it is" if previous else ""))
        return set()
    same = previous and previous.has_system == export.system and from_before == before.keys() == winners.keys()
    if not same:
        merge(project, sources, winners, target)
    outcome.size = target.stat().st_size
    for path in project.parts.glob("*.parquet"):
        path.unlink()
    if full_marker(project).exists() and export.history:
        full_marker(project).replace(full_marker(project, "history"))
    full_marker(project).unlink(missing_ok=True)
    removed = (
        f" Removed {len(outcome.removed)} that W&B no longer has: {named(outcome.removed)}." if outcome.removed else ""
    )
    some = f"{len(winners)} run{'s'[: len(winners) != 1]}"
    done = f"Up to date: {some} in {target}." if same else f"Saved {some} to {target}."
    export.progress.note(done + removed)
    return set(listing)


def named(runs: list[dict[str, str]]) -> str:
    """The first few runs by name and id."""
    shown = ", ".join(f"{run['name']} ({run['id']})" for run in runs[:5])
    return shown + (f" and {len(runs) - 5} more" if len(runs) > 5 else "")


def export_history(project: Project, outcome: Outcome, listed: set[str]) -> None:
    """Bring the project's history file up to date, after its runs file. Only the `listed` runs are fetched."""
    import pyarrow.parquet as pq

    target = project.path("history.parquet")
    previous = readable(target, lambda: PreviousHistory(target, project)) if target.exists() else None
    columns = ["id", "name", "state", "history_rows", "last_step", "heartbeat_at"]
    table = pq.read_table(project.path("runs.parquet"), columns=columns)
    table = table.set_column(5, "heartbeat_at", as_integers(table["heartbeat_at"]))
    runs = {run["id"]: run for run in table.to_pylist()}
    again = previous is None or previous.globs != project.export.history_keys
    known = {} if again or full_marker(project, "history").exists() else previous.runs
    stale = [
        run
        for run in runs.values()
        if run["id"] in listed and run["history_rows"] != 0
        if not (known.get(run["id"], {}).get("mark") == history_mark(run) and known[run["id"]]["confirmed"])
    ]
    left_out = set(runs) - {run["id"] for run in stale}
    if previous and previous.globs != project.export.history_keys and left_out & set(previous.runs):
        raise Trouble(
            f"{target} holds the keys {previous.globs or 'all'}, also of runs that this export leaves out. "
            "Export without filters, with the same --history-keys, or to another -o"
        )
    fresh = fetch_history(project, stale)
    names = {run["id"]: run["name"] for run in runs.values()}
    same = previous and not fresh and {r: about["name"] for r, about in previous.runs.items()}.items() <= names.items()
    if same:
        outcome.history_rows = sum(run["rows"] for run in previous.runs.values())
    elif fresh or previous:
        outcome.history_rows = merge_history(project, fresh, previous, names)
        project.export.progress.note(f"Saved {outcome.history_rows} history rows to {target}.")
    else:
        outcome.history_rows = 0
    shutil.rmtree(project.parts / "history", ignore_errors=True)
    full_marker(project, "history").unlink(missing_ok=True)
    unsure = [{"id": run, "name": names[run] or ""} for run, logged in fresh.items() if not logged.confirmed]
    if unsure:
        say(f"... {project.title}: history not confirmed by W&B's row count and last step: {named(unsure)}")


def write_metadata(project: Project, outcome: Outcome) -> None:
    """Write the metadata file, which describes the runs and history files as they now stand."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(project.path("runs.parquet"), columns=["state"])
    keys = read_footer(project.path("runs.parquet"), project, table.schema.metadata, "keys")["keys"]
    states = pc.value_counts(table["state"]).to_pylist()
    history = project.path("history.parquet")
    logged = None
    if history.exists():
        with contextlib.suppress(Trouble):  # which is reported where history is asked for
            logged = readable(history, lambda: PreviousHistory(history, project))
    unsure = (
        [{"id": run, "name": about["name"]} for run, about in logged.runs.items() if not about["confirmed"]]
        if logged
        else []
    )
    done = {name: getattr(outcome, name) for name in ("new", "updated", "unchanged", "removed")}
    done["failed"] = list(project.failed.values())
    about = {
        "entity": project.entity,
        "project": project.name,
        "exported_at": now(),
        "wandb_version": WANDB_VERSION,
        "base_url": project.export.server.account.base_url,
        "total_runs": outcome.runs,
        "runs_by_state": {item["values"]: item["counts"] for item in sorted(states, key=lambda item: -item["counts"])},
        "history_rows": sum(run["rows"] for run in logged.runs.values()) if logged else outcome.history_rows,
        "history_unconfirmed": unsure,
        "filters": project.export.filters_shown,
        "export": done,
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
        with self.lock:
            self.totals[what] += number
            if self.bars:
                self.bars.update(self.tasks[what], total=self.totals[what], visible=True)

    def fetched(self, number: int, what: str = "runs") -> None:
        """So many more came."""
        with self.lock:
            before = self.counts[what]
            self.counts[what] += number
            if self.bars:
                speed = self.bars.tasks[self.tasks[what]].speed
                rate = f"{speed:,.0f}/s" if speed else ""
                self.bars.update(self.tasks[what], completed=self.counts[what], rate=rate, visible=True)
            elif not self.quiet:
                for hundred in range(before // 100 + 1, self.counts[what] // 100 + 1):
                    say(f"... fetched {hundred * 100} {what}")

    def note(self, text: str) -> None:
        """A line that matters, but not to someone who asked for quiet."""
        if not self.quiet:
            say(text)


def show_outcomes(outcomes: list[Outcome]) -> None:
    """The closing table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    same_entity = len({outcome.project.split("/")[0] for outcome in outcomes}) == 1
    columns = {
        "runs": [o.runs for o in outcomes],
        "new": [o.new for o in outcomes],
        "updated": [o.updated for o in outcomes],
        "removed": [len(o.removed) for o in outcomes],
        "failed": [len(o.failed) for o in outcomes],
        "history": [o.history_rows or 0 for o in outcomes],
    }
    rare = [name for name in ("removed", "failed", "history") if not any(columns[name])]
    columns = {name: counts for name, counts in columns.items() if name not in rare}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("project", overflow="fold", min_width=12)
    for name in [*columns, "seconds", "size"]:
        table.add_column(name, justify="right", no_wrap=True)
    for o, counts in zip(outcomes, zip(*columns.values(), strict=True), strict=True):
        name = o.project.split("/", 1)[1] if same_entity else o.project
        cells = ["-"] * len(counts) if o.error else [f"{count:,}" for count in counts]
        table.add_row(name, *cells, f"{o.seconds:.1f}", "error" if o.error else human_size(o.size))
    Console().print(table)


def human_size(size: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


# ---------------------------------------------------------------- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong ones end the script with exit code 2 before anything heavy is imported."""
    about, _, story = (__doc__ or "").partition("\n\n")
    parser = Parser(description=f"{about}\n\nexamples:\n{story}", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "-e",
        "--entity",
        action="append",
        default=[],
        metavar="NAME",
        help="entity (user or team); repeatable. Default: WANDB_ENTITY, else the key's own entity",
    )
    add(
        "-p",
        "--project",
        action="append",
        default=[],
        metavar="NAME",
        help="project, by exact name or glob; repeatable. Default: every project of the entity",
    )
    add("-o", "--output", type=Path, default=OUTPUT, metavar="DIR", help=f"output folder (default: {OUTPUT}/)")
    group = parser.add_argument_group("which runs are fetched (rows already on disk stay)")
    add = group.add_argument
    add(
        "-s",
        "--since",
        type=parse_when,
        metavar="WHEN",
        help="created since: 7d, 24h, 2w, 2025-10-01, or an ISO time (UTC)",
    )
    add("--until", type=parse_when, metavar="WHEN", help="created before")
    add(
        "--state",
        action="append",
        default=[],
        choices=STATES,
        metavar="STATE",
        help=f"in this state; repeatable. One of {', '.join(STATES)}",
    )
    add("--tag", action="append", default=[], metavar="TAG", help="with this tag (any of them); repeatable")
    add("--full", action="store_true", help="fetch every run again; finds configs that were edited after a run ended")
    add("--keep-deleted", action="store_true", help="keep runs that were deleted on W&B")
    add("--dry-run", action="store_true", help="say what would be fetched; write nothing")
    group = parser.add_argument_group("what else is fetched")
    add = group.add_argument
    add("--include-history", action="store_true", help="also every logged step, to {entity}_{project}_history.parquet")
    add(
        "--history-keys",
        default="",
        metavar="GLOBS",
        help="only these keys, such as 'train/*,val/loss'; rows that have none of them are left out",
    )
    add("--system-metrics", action="store_true", help="also system_* columns (GPU, CPU, memory at the end of the run)")
    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--api-key", metavar="KEY", help="W&B API key. Default: WANDB_API_KEY, the team's key in .env, `wandb login`")
    add(
        "--workers",
        type=positive,
        default=WORKERS,
        metavar="N",
        help=f"requests at a time, over all projects (default: {WORKERS})",
    )
    add("-q", "--quiet", action="store_true", help="no progress and no table; only what went wrong")
    args = parser.parse_args(arguments)
    for name in args.project:
        if "/" in name:
            entity, project = name.split("/", 1)
            parser.error(f"-p {name}: a project's name holds no slash. Did you mean -e {entity} -p {project}?")
    if args.history_keys and not args.include_history:
        parser.error("--history-keys needs --include-history")
    if args.since and args.until and args.since >= args.until:
        parser.error(f"--since {args.since:%Y-%m-%d %H:%M} is not before --until {args.until:%Y-%m-%d %H:%M}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"-o {args.output} is a file; name a folder")
    for name in ("since", "until"):  # W&B's filters take whole seconds
        if moment := getattr(args, name):
            setattr(args, name, moment.replace(microsecond=0))
    return args


def positive(text: str) -> int:
    """A whole number of at least 1, as an argument's type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def find_projects(
    server: Server, entities: list[str], wanted: list[str]
) -> tuple[list[tuple[str, str]], list[Trouble]]:
    """(entity, project) of every project asked for, and what is wrong with entities and globs that have none."""
    entities = entities or [find_viewer(server)["entity"]]
    found: list[tuple[str, str]] = []
    problems: list[Trouble] = []
    exact = [name for name in wanted if not set(name) & set("*?[")]
    globs = [name for name in wanted if name not in exact] or ([] if exact else ["*"])
    for entity in dict.fromkeys(entities):
        found += [(entity, name) for name in exact]
        if globs:
            names = visible_projects(server, entity)
            matching = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
            found += [(entity, name) for name in matching]
            if not matching:
                problems.append(unseen(server, entity, globs[0], names))
    return list(dict.fromkeys(found)), problems


def visible_projects(server: Server, entity: str) -> list[str]:
    """`list_projects`, empty where W&B refuses to list the entity."""
    try:
        return list_projects(server, entity)
    except (Rejected, Unanswered):
        raise
    except Trouble:
        return []


def unseen(server: Server, entity: str, project: str, names: list[str]) -> Trouble:
    """Why there is no such project, with the nearest names of projects (`names` has the entity's) or entities."""
    if names:
        return Missing(f"no project of {entity} is or matches {project!r}.{nearest(project.strip('*'), names)}")
    viewer = find_viewer(server)
    visible = list(dict.fromkeys([viewer["entity"], *viewer["teams"]]))
    if entity in visible:
        return Trouble(f"the entity {entity} has no projects")
    return Missing(f"no entity {entity!r} that this key sees.{nearest(entity, visible)} It sees {', '.join(visible)}.")


def preview(project: Project) -> None:
    """Say what an export would fetch, from a listing without configs and summaries."""
    paths = sorted(project.parts.glob("*.parquet")) if project.parts.is_dir() else []
    if project.path("runs.parquet").exists() and not project.export.full:
        paths.insert(0, project.path("runs.parquet"))
    have = {print_ for path in paths for print_ in readable(path, lambda p=path: Source(p, project)).prints}
    listing = list_runs(project, have)
    stale = [print_ for print_ in listing.values() if print_ not in have]
    requests = -(-len(stale) // 250)
    history = ""
    if project.export.history:
        history = f", and the history of up to {len(listing)} in about {-(-len(listing) // 25)}"
    print(f"{project.title}: would fetch {len(stale)} of {len(listing)} runs in about {requests} requests{history}")


def import_ahead() -> None:
    """Import what will be needed while W&B is asked for the first page."""
    for name in ("pyarrow.parquet", "rich.console", "rich.table"):
        importlib.import_module(name)


def main() -> int:
    """Export the projects that the command line names; returns the exit code."""
    args = parse_arguments()
    threading.Thread(target=import_ahead, daemon=True).start()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what each thread freed, here 100 MB
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX
    sys.setswitchinterval(0.05)  # one page is read at a time; the threads that wait for it only cost when they try
    sys.setrecursionlimit(10_000)  # configs may be nested deeply,
    sys.set_int_max_str_digits(0)  # and configs may hold integers of any size
    account = find_account(args.api_key)
    server = Server(account, args.workers)
    shown = {
        "since": args.since.isoformat() if args.since else None,
        "until": args.until.isoformat() if args.until else None,
        "state": args.state,
        "tag": args.tag,
    }
    filters = [
        {"createdAt": {"$gte": f"{args.since:%Y-%m-%dT%H:%M:%S}"}} if args.since else {},
        {"createdAt": {"$lt": f"{args.until:%Y-%m-%dT%H:%M:%S}"}} if args.until else {},
        {"state": {"$in": args.state}} if args.state else {},
        {"tags": {"$in": args.tag}} if args.tag else {},
    ]
    progress = Progress(args.quiet)
    progress.note(f"Using the key from {account.source} at {account.base_url}")
    export = Export(
        server=server,
        folder=args.output,
        pool=ThreadPoolExecutor(args.workers),
        workers=args.workers,
        filters=[each for each in filters if each],
        filters_shown=shown,
        system=args.system_metrics,
        history=args.include_history,
        history_keys=[glob.strip() for glob in args.history_keys.split(",") if glob.strip()],
        full=args.full,
        keep_deleted=args.keep_deleted,
        progress=progress,
    )
    try:
        found, problems = find_projects(server, args.entity or account.entities, args.project)
        for problem in problems:
            say(f"error: {problem}")
        if not found:
            return 2 if any(isinstance(problem, Missing) for problem in problems) else 1
        projects = [Project(export, entity, name) for entity, name in found]
        if args.dry_run:
            for project in projects:
                preview(project)
            return 1 if problems else 0
        args.output.mkdir(parents=True, exist_ok=True)
        outcomes = export_all(projects)
    except Rejected:
        raise rejected(account) from None
    except Missing as error:
        raise Stop(str(error)) from None
    except Trouble as error:
        raise Stop(str(error), 1) from None
    finally:
        progress.stop()
    if not args.quiet:
        show_outcomes(outcomes)
    if all(outcome.refused for outcome in outcomes):
        return 2
    some_failed = problems or any(outcome.error or outcome.failed for outcome in outcomes)
    return 1 if some_failed or not any(outcome.runs for outcome in outcomes) else 0


def export_all(projects: list[Project]) -> list[Outcome]:
    """Export the projects, a few at a time. Of two that spell the same file the second is refused."""
    first: dict[Path, str] = {}
    drivers = ThreadPoolExecutor(4)  # they only wait; the requests run in the export's own pool

    def start(project: Project) -> Future[Outcome]:
        owner = first.setdefault(project.path("runs.parquet"), project.title)
        if owner == project.title:
            return drivers.submit(export_project, project)
        outcome = Outcome(project.title, error=f"its file {project.path('runs.parquet')} is that of {owner}")
        say(f"error: {project.title}: {outcome.error}. Export it with another -o.")
        future: Future[Outcome] = Future()
        future.set_result(outcome)
        return future

    return [future.result() for future in [start(project) for project in projects]]


if __name__ == "__main__":
    finish(main)
