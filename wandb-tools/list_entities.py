#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "wandb>=0.31,<0.32",
# ]
# ///
"""See which W&B entities and projects your key can reach, and how many runs each project holds.

    uv run wandb-tools/list_entities.py                     # WANDB_ENTITY, else your own
    uv run wandb-tools/list_entities.py -e my_team -e me    # these
    uv run wandb-tools/list_entities.py --discover          # your own and all your teams
    uv run wandb-tools/list_entities.py --discover --json | jq -r '.entities[].name'

"crashed or failed" are the runs in these two states; killed, pending, preempting
and preempted runs are counted under "runs" alone. "done" is the share of all runs
that finished. Dates are in UTC. W&B does the counting, so a project of 50,000 runs
is listed as fast as one of ten.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

# What a copier may want to change.
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"  # the name of the team's service-account key in .env
PATIENCE = 90  # seconds for which a request is tried again before it counts as unanswered
LONGEST_PAUSE = 300  # seconds that W&B's client may wait in one go because of a rate limit
LARGEST_ANSWER = 256 << 20  # characters

WORKERS = 8  # requests at a time
BATCH = 8  # projects per request; each costs W&B four counts
COUNTS = {  # the runs that each count takes, as W&B filters them
    "run_count": {},
    "finished_count": {"state": "finished"},
    "running_count": {"state": "running"},
    "failed_count": {"state": {"$in": ["crashed", "failed"]}},
}

T = TypeVar("T")


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
            setattr(sys, name, open(number, "r+" if number == 0 else "w", closefd=False))  # noqa: SIM115
    try:
        code = main()
        sys.stdout.flush()
    except Stop as stop:
        say(f"error: {stop}")
        code = stop.code
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except (BrokenPipeError, SystemExit) as error:  # the reader of our stdout, `head` for example, has seen enough
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):  # which rich turns so
            raise
        code = 0
    except MemoryError:
        say("error: there is not enough memory for this. Take fewer runs at once, or allow more.")
        code = 1
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # at once: worker threads may still wait for a server, and there is nothing left to clean up


# --- end console ---


# --- connection: the same in list_entities.py and export_runs.py ---
class Unanswered(Stop):
    """No usable answer: the request timed out, the server failed, or the connection broke. A smaller one may pass."""


class Rejected(Stop):
    """The server does not accept the key."""


class Connection:
    """W&B through its own client, for any number of threads, which wait together when W&B limits requests.

    `account` says whose key is used at which address. `base_url` and `app_url` are the server's (without a password),
    `entities` those of WANDB_ENTITY, `version` is the client's. `service` sends what is asked of it within `answer`.
    """

    def __init__(self, api_key: str | None = None) -> None:
        """Log in with the first key there is: the argument, WANDB_API_KEY, the team's, what the client itself finds.

        Raises `Stop` with the four places where there is none, and where the key or the address is wrong.
        """
        settings, origin = read_settings()
        name = next((name for name in ("WANDB_API_KEY", TEAM_KEY, "WANDB_IDENTITY_TOKEN_FILE") if name in settings), "")
        self.source = "--api-key" if api_key else f"{name} in {origin[name]}" if name else "`wandb login`"
        self.key = api_key or ("" if name == "WANDB_IDENTITY_TOKEN_FILE" else settings.get(name, "").strip())
        self.entities = [entity.strip() for entity in settings.get("WANDB_ENTITY", "").split(",") if entity.strip()]
        seconds = settings.get("WANDB_HTTP_TIMEOUT", "25")
        if not re.fullmatch("0*[1-9][0-9]{0,3}", seconds):
            raise Stop(f"WANDB_HTTP_TIMEOUT {seconds!r} is no whole number of seconds. Write it like 25.")
        self.seconds = int(seconds)  # that each of the client's two attempts may take
        self.lock, self.slots = threading.Lock(), threading.BoundedSemaphore(10)  # what the client sends at a time
        self.under_way: list[float] = []  # when each request began
        self.heard = self.told = self.resume_at = self.limits = 0.0  # last answer, last word, end of the pause
        for name in ("WANDB_API_KEY", "WANDB_SERVICE"):  # the key is handed over, the sidecar is to be our own
            os.environ.pop(name, None)
        for name in ("WANDB_BASE_URL", "WANDB_APP_URL", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_HTTP_TIMEOUT"):
            if name in settings:
                os.environ[name] = settings[name].strip()
        api = self.start_client()
        self.service, self.key = api._service_api, api.api_key or self.key  # nothing public takes a query of one's own
        self.app_url = without_secrets(self.service.app_url).rstrip("/")
        self.account = f"the key from {self.source} at {self.base_url}"
        place = origin.get("WANDB_BASE_URL")
        if place and not self.source.endswith(f" in {place}"):
            self.account += f" (WANDB_BASE_URL in {place})"

    def start_client(self) -> Any:
        """A `wandb.Api` that is logged in, silent, without telemetry, and fails instead of waiting for minutes."""
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            Path.home()
        except RuntimeError:  # nothing is found there, nothing is written there
            os.environ["HOME"] = os.devnull
        import wandb

        self.version = wandb.__version__
        retries = {"retry_max": 1, "retry_wait_min_seconds": 1, "retry_wait_max_seconds": 1}
        options = {
            f"x_{kind}_{name}": value for kind in ("graphql", "file_transfer") for name, value in retries.items()
        }
        try:
            settings = wandb.Settings(silent=True, x_graphql_timeout_seconds=self.seconds, **options)
            with ThreadPoolExecutor(1) as pool, silent_stderr():  # the sidecar starts while the rest is imported
                setup = pool.submit(wandb.setup, settings=settings)
                from wandb.apis.public import Api

                address = os.environ.get("WANDB_BASE_URL") or setup.result().settings.base_url
                self.base_url = without_secrets(address).rstrip("/")
                setup.result()
            threading.Thread(target=self.watch, daemon=True).start()
            api = self.answer(lambda seconds: Api(api_key=self.key or None, timeout=seconds))
        except wandb.errors.UsageError:
            raise Stop(
                f"no W&B API key for {self.base_url}. Looked for --api-key (export_runs.py), for WANDB_API_KEY in the\n"
                f"environment or in .env, for {TEAM_KEY} in .env, and for what `wandb login` stores in ~/.netrc.\n"
                "Set one of them; your key is shown at https://wandb.ai/authorize."
            ) from None
        except ValueError as error:
            wrong = [f"{each['loc'][0]} {each['input']!r}: {each['msg']}" for each in getattr(error, "errors", list)()]
            raise Stop(f"the W&B client refuses {without_secrets('; '.join(wrong) or error)}") from None
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # Polars takes Ctrl-C away
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return api

    def ask(self, query: str, variables: dict[str, Any], tries: int = 0) -> dict[str, Any]:
        """The `data` of one GraphQL query. Raises as `answer` does, and `Stop` where the answer is no data."""

        def parse(text: str) -> Any:
            if len(text) > LARGEST_ANSWER:
                raise Unanswered(f"W&B's answer has {len(text) >> 20} MB, more than {LARGEST_ANSWER >> 20}", 1)
            return json.loads(text)

        send = self.service.execute_graphql
        data = self.answer(lambda seconds: send(query, variables, timeout=seconds, parse=parse), tries)
        if not isinstance(data, dict):
            raise Stop(f"{self.base_url} answers with no data. Is it the address of W&B's API?", 1)
        return data

    def answer(self, send: Callable[[float], T], tries: int = 0) -> T:
        """What `send`, given the seconds that it may take, returns. Raises `Rejected`, `Unanswered`, or another `Stop`.

        `Unanswered` comes after `tries` tries, or where that is 0 after 90 to 120 seconds of trying. A rate limit (429)
        is waited out for as long as it lasts and uses up neither.
        """
        from wandb.errors import AuthenticationError
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError

        tried, spent = 0, 0.0
        while True:
            while (pause := self.resume_at - time.monotonic()) > 0:
                time.sleep(pause)
            # The client waits for as long as a rate limit asks, but not for ever.
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
                finally:
                    self.under_way.remove(began)
            if stop is None:
                self.slow_down(began)
                continue
            tried, spent = tried + 1, spent + time.monotonic() - began
            if not isinstance(stop, Unanswered) or tried == tries or (not tries and spent >= PATIENCE):
                raise stop
            self.word(f"... {stop}; trying again")
            time.sleep(wait := min(16, 2**tried))
            spent += wait

    def explain(self, error: BaseException, limited: bool) -> Stop | None:
        """What the client's error means; None for a rate limit, which a time-out is too where it may be (`limited`)."""
        response = getattr(error, "response", None)
        text = str(error).rpartition("while retrying: ")[2].strip()
        status = int(getattr(response, "http_status", 0) or (re.match(r"HTTP (\d{3})", text) or [0, 0])[1])
        words = without_secrets(re.sub(r'^(HTTP \d+: |input: |\w+ "[^"]*": )', "", text), self.key)
        late = response is None and "in time" in text
        if status == 429 or (late and limited):
            return None
        if status in (401, 403) or text.startswith("invalid credentials"):
            return Rejected(f"{self.base_url} rejects the API key from {self.source}. Check it, or use another one.")
        if status:
            kind = Unanswered if status >= 500 or status in (408, 413, 425) else Stop
            return kind(f"W&B answers HTTP {status}: {words}", 1)
        if text.startswith("input: "):
            kind = Unanswered if re.search("deadline exceeded|timed? ?out", words, re.IGNORECASE) else Stop
            return kind(f"W&B answers: {words}", 1)
        if late or re.search("deadline exceeded|Timeout|timeout", text):
            return Unanswered(f"W&B does not answer within {self.seconds} seconds", 1)
        if re.search("connection refused|no such host", text):
            kind = Unanswered if self.heard else Stop  # at the start it is rather the address
            return kind(f"{self.base_url}: {'no such host' if 'host' in words else 'the connection is refused'}", 1)
        if re.search(r": EOF$|unexpected EOF|reset by peer|broken pipe|connection lost", text):
            return Unanswered("the connection to W&B broke", 1)
        if re.search("^EOF$|invalid character|cannot unmarshal", text):
            return Stop(f"{self.base_url}: the answer is no JSON. Is it the address of W&B's API?", 1)
        if type(error).__name__ == "AuthenticationError":
            return Stop(f"the API key from {self.source} is none: {words}")
        return Stop(f"{self.base_url}: {words}", 1)

    def slow_down(self, began: float) -> None:
        """Make every thread wait, longer each time, after a request that began then met a rate limit."""
        with self.lock:
            if began < self.resume_at:  # before the pause that another thread's request brought
                return
            self.limits += 1
            pause = min(60, 2**self.limits)
            self.resume_at = time.monotonic() + pause
        self.word(f"... W&B limits requests; waiting {pause:.0f} s")

    def watch(self) -> None:
        """Say so while W&B does not answer."""
        while True:
            time.sleep(0.5)
            silence = time.monotonic() - max(self.heard, min(self.under_way, default=math.inf))
            if silence > 4:
                self.word(f"... no answer from {self.base_url} for {silence:.0f} s; still waiting")

    def word(self, message: str) -> None:
        """Say why nothing happens; many threads and tries have the same to say, which is said every 15 seconds."""
        with self.lock:
            if time.monotonic() - self.told < 15:
                return
            self.told = time.monotonic()
        say(message)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """What starts meanwhile has no stderr: the client's sidecar logs there when it cannot write to a file."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def without_secrets(text: object, key: str = "") -> str:
    """A server's text as it may be shown: at most 200 characters, no part of the key, no address's secret part."""
    line = plain(text)[:5000]
    line = re.sub(r"(?<=://)[^/\s@]*@|(?i:(?<=basic )|(?<=bearer )|(?<=eyJ))[\w.~+/=-]+", "", line)
    line = re.sub(r"""(?<=://)([^\s?"'<>]+)\?[^\s"'<>]*""", r"\1", line)
    key = key.removeprefix("wandb_v1_")
    spelled = [key, key.encode().hex(), *(base64.b64encode(b"api"[:n] + key.encode()).decode() for n in range(3))]
    pieces = {word[n : n + 5].lower() for word in spelled for n in range(len(word) - 4)}
    hidden = {n + m for n in range(len(line)) if line[n : n + 5].lower() in pieces for m in range(5)}
    return "".join(char for n, char in enumerate(line) if n not in hidden)[:200]


def read_settings() -> tuple[dict[str, str], dict[str, str]]:
    """The environment, then `.env` of the working directory or its parents, then `.env` beside the script or above.

    Returns name -> value and name -> where it stood. The first place that has a non-empty value wins.
    """
    from dotenv import dotenv_values, find_dotenv

    settings = {name: value for name, value in os.environ.items() if value.strip()}
    origin = dict.fromkeys(settings, "the environment")
    script = Path(__file__).resolve().parent
    beside = next((folder / ".env" for folder in (script, *script.parents) if (folder / ".env").is_file()), "")
    for path in filter(None, dict.fromkeys((find_dotenv(usecwd=True), str(beside)))):
        with Path(path).open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if os.name == "posix" and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o002):
                say(f"{path} is not read: it belongs to another user, or anyone may write to it")
                continue
            try:
                values = dotenv_values(stream=file)
            except UnicodeDecodeError:
                raise Stop(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
        for name, value in values.items():
            if value and value.strip() and name not in settings:
                settings[name], origin[name] = value, path
    return settings, origin


@contextlib.contextmanager
def expected(what: str) -> Iterator[None]:
    """An answer that is not of the form W&B's schema promises ends in a `Stop` that says so."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Stop(f"W&B's answer about {what} is malformed ({type(error).__name__}: {error})", 1) from error


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
    viewer = connection.ask("query Viewer { viewer { entity teams { edges { node { name } } } } }", {})["viewer"]
    with expected("the key's entities"):
        return list(dict.fromkeys([viewer["entity"], *(edge["node"]["name"] for edge in viewer["teams"]["edges"])]))


def list_projects(connection: Connection, entity: str) -> list[str]:
    """The names of all projects of an entity, newest first as W&B lists them; empty if it cannot be seen."""
    query = """query Projects($entity: String!, $after: String) {
      models(entityName: $entity, first: 500, after: $after) {
        edges { node { name } } pageInfo { endCursor hasNextPage } } }"""
    names: list[str] = []
    seen: set[str] = set()
    after = None
    while True:
        page = connection.ask(query, {"entity": entity, "after": after}).get("models")
        if page is None:
            return names
        with expected(f"the projects of {entity}"):
            names += [edge["node"]["name"] for edge in page["edges"]]
            if (after := next_cursor(page, seen)) is None:
                return names


# --- end connection ---


class Listing(NamedTuple):
    """The projects of one entity, most runs first, as `--json` shows them; a count that did not come is None."""

    entity: str
    projects: list[dict[str, Any]]

    def total(self, count: str) -> int:
        """The sum of a count over all projects."""
        return sum(project[count] or 0 for project in self.projects)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong ones end the script with exit code 2 before anything heavy is imported."""
    about, examples, notes = (__doc__ or "").split("\n\n")
    parser = Parser(
        description=about,
        epilog=f"examples:\n{examples}\n\n{notes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-e",
        "--entity",
        action="append",
        default=[],
        metavar="NAME",
        help="entity (user or team); repeatable. Default: WANDB_ENTITY (comma-separated), else the key's own entity",
    )
    parser.add_argument("--discover", action="store_true", help="the key's own entity and all its teams (besides -e)")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, and nothing else")
    args = parser.parse_args(arguments)
    if not all(name.strip() for name in args.entity):
        parser.error("-e needs the name of an entity, not an empty one")
    return args


def find_projects(
    connection: Connection, entities: Sequence[str], pool: ThreadPoolExecutor
) -> tuple[dict[str, list[str]], dict[str, Stop]]:
    """entity -> names of its projects, and entity -> what went wrong instead. Raises `Rejected`."""

    def find(entity: str) -> list[str] | Stop:
        try:
            return list_projects(connection, entity)
        except Rejected:
            raise
        except Stop as stop:
            return stop

    found = dict(zip(entities, pool.map(find, entities), strict=True))
    troubles = {entity: projects for entity, projects in found.items() if isinstance(projects, Stop)}
    return {entity: projects for entity, projects in found.items() if not isinstance(projects, Stop)}, troubles


def count_query(projects: Sequence[tuple[str, str]]) -> tuple[str, dict[str, str]]:
    """One GraphQL query, and its variables, for the counts and the last run of several (entity, project)."""
    variables = {name: json.dumps(runs) for name, runs in COUNTS.items()}
    declared = [f"${name}: JSONString" for name in COUNTS]
    fields = []
    for number, (entity, project) in enumerate(projects):
        variables |= {f"e{number}": entity, f"p{number}": project}
        declared.append(f"$e{number}: String!, $p{number}: String!")
        fields.append(f"p{number}: project(entityName: $e{number}, name: $p{number}) {{ ...counts }}")
    counts = " ".join(f"{name}: runCount(filters: ${name})" for name in COUNTS)
    last = 'runs(first: 1, order: "-created_at") { edges { node { createdAt } } }'
    query = f"""query CountRuns({", ".join(declared)}) {{ {" ".join(fields)} }}
      fragment counts on Project {{ {counts} {last} }}"""
    return query, variables


def count_runs(connection: Connection, projects: Sequence[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """What `--json` says about each (entity, project), and what went wrong with it, if anything. Raises `Rejected`.

    A request that stays unanswered is cut in two: one project that is too much for W&B should not cost the others.
    """
    try:
        data = connection.ask(*count_query(projects), tries=0 if len(projects) == 1 else 1)
    except Rejected:
        raise
    except Stop as stop:
        if len(projects) > 1:
            middle = len(projects) // 2
            yield from count_runs(connection, projects[:middle])
            yield from count_runs(connection, projects[middle:])
            return
        data, problem = {}, str(stop)
    else:
        problem = "W&B shows no such project any more"
    for number, (_, name) in enumerate(projects):
        answer = data.get(f"p{number}")
        counts = {count: answer[count] if answer else None for count in COUNTS}
        last = answer["runs"]["edges"] if answer else []
        facts = {"name": name, **counts, "last_run_at": last[0]["node"]["createdAt"] if last else None}
        yield facts, "" if answer else problem


def count_all(
    connection: Connection, found: dict[str, list[str]], pool: ThreadPoolExecutor
) -> tuple[list[Listing], dict[str, str]]:
    """A `Listing` per entity, and `entity/project` -> what went wrong with it."""
    from rich.console import Console
    from rich.progress import track

    projects = [(entity, name) for entity, names in found.items() for name in names]
    size = max(1, min(BATCH, -(-len(projects) // WORKERS)))  # few projects: still all workers at once
    batches = [projects[start : start + size] for start in range(0, len(projects), size)]
    answers = pool.map(lambda batch: list(count_runs(connection, batch)), batches)
    shown = track(
        answers,
        description="counting runs",
        total=len(batches),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    listings = {entity: Listing(entity, []) for entity in found}
    failures = {}
    for (entity, name), (facts, problem) in zip(projects, [each for batch in shown for each in batch], strict=True):
        listings[entity].projects.append(facts)
        if problem:
            failures[f"{entity}/{name}"] = problem
    for listing in listings.values():
        listing.projects.sort(key=lambda facts: (-(facts["run_count"] or 0), facts["name"]))
    return list(listings.values()), failures


def to_json(listings: Sequence[Listing]) -> str:
    """The listings as the JSON that `--json` prints."""
    entities = [
        {
            "name": listing.entity,
            "total_projects": len(listing.projects),
            "total_runs": listing.total("run_count"),
            "total_finished": listing.total("finished_count"),
            "projects": listing.projects,
        }
        for listing in listings
    ]
    return json.dumps({"entities": entities}, indent=2, ensure_ascii=False)


def share(part: int | None, whole: int | None) -> str:
    """`98.1%`; `-` of nothing."""
    return f"{part / whole:.1%}" if whole and part is not None else "-"


def show(listings: Sequence[Listing]) -> None:
    """Print a table per entity to stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    for place, listing in enumerate(listings):
        if place:
            console.print()
        projects = listing.projects
        console.print(
            f"{listing.entity}: {len(projects):,} project{'s'[: len(projects) != 1]}, "
            f"{listing.total('run_count'):,} runs",
            style="bold",
            soft_wrap=True,
        )
        if not projects:
            continue
        frame = {"box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "collapse_padding": True}
        table = Table(**frame, show_footer=len(projects) > 1)
        table.add_column("project", "total", overflow="fold")
        for count, title in zip(COUNTS, ("runs", "finished", "running", "crashed\nor failed"), strict=True):
            table.add_column(title, f"{listing.total(count):,}", justify="right")
        done = share(listing.total("finished_count"), listing.total("run_count"))
        table.add_column("done", done, justify="right")
        latest = max((project["last_run_at"] or "" for project in projects), default="")
        table.add_column("last run", latest[:10] or "-")
        for project in projects:
            counts = ["-" if project[count] is None else f"{project[count]:,}" for count in COUNTS]
            done = share(project["finished_count"], project["run_count"])
            table.add_row(project["name"], *counts, done, (project["last_run_at"] or "-")[:10])
        console.print(table)


def list_entities(connection: Connection, args: argparse.Namespace) -> int:
    """Ask for everything, print it, and name on stderr what cannot be shown; returns the exit code."""
    pool = ThreadPoolExecutor(WORKERS)
    asked = [name.strip() for name in args.entity] or ([] if args.discover else connection.entities)
    visible = visible_entities(connection) if args.discover or not asked else []
    entities = list(dict.fromkeys([*asked, *(visible if args.discover or asked else visible[:1])]))
    if not entities:
        raise Stop("this key has no entity of its own. Name one with -e.")
    found, troubles = find_projects(connection, entities, pool)
    # W&B answers alike for an entity that is empty, hidden or misspelt; only the key's own list tells them apart.
    doubtful = [entity for entity in entities if not found.get(entity)]
    if doubtful and not visible:
        visible = visible_entities(connection)
    unknown = [e for e in doubtful if e not in visible and not isinstance(troubles.get(e), Unanswered)]
    for entity in unknown:
        found.pop(entity, None)
        say(f"error: no entity {entity!r} that this key sees.{nearest(entity, visible)} It sees: {', '.join(visible)}.")
    if unknown == entities:
        return 2
    failures = {entity: str(trouble) for entity, trouble in troubles.items() if entity not in unknown}
    listings, uncounted = count_all(connection, found, pool)
    failures |= uncounted
    for name, problem in failures.items():
        say(f"error: {name}: {problem}")
    if args.json:
        print(to_json(listings))
    else:
        show(listings)
    return 1 if unknown or failures else 0


def main() -> int:
    """List the entities that the command line names; returns the exit code."""
    args = parse_arguments()
    connection = Connection()
    say(f"Using {connection.account}")
    return list_entities(connection, args)


if __name__ == "__main__":
    finish(main)
