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
import gc
import importlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

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
IMPORTED_AHEAD = ("rich.console", "rich.table", "rich.progress")  # while the client starts

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


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong ones end the script with exit code 2 before anything heavy is imported."""
    about, examples, notes = (__doc__ or "").split("\n\n")
    epilog = f"examples:\n{examples}\n\n{notes}"
    parser = Parser(description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"action": "append", "default": [], "metavar": "NAME", "type": str.strip}
    parser.add_argument("-e", "--entity", **several, help="user or team; default: WANDB_ENTITY, else yours; repeatable")
    parser.add_argument("--discover", action="store_true", help="the key's own entity and all its teams (besides -e)")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout, and nothing else")
    args = parser.parse_args(arguments)
    for name in args.entity:
        if not name or "/" in name:
            parser.error(f"-e {name!r} is no entity; name a user or a team, all of its projects are listed")
    return args


def count_query(projects: Sequence[tuple[str, str]]) -> tuple[str, dict[str, str]]:
    """One GraphQL query, and its variables, for the counts and the last run of several (entity, project)."""
    variables = {name: json.dumps(runs) for name, runs in COUNTS.items()}
    declared = [f"${name}: JSONString" for name in COUNTS]
    fields = [f"{name}: runCount(filters: ${name})" for name in COUNTS]
    query = f"""fragment counts on Project {{
      {" ".join(fields)} runs(first: 1, order: "-created_at") {{ edges {{ node {{ createdAt }} }} }} }}"""
    fields = []
    for number, (entity, project) in enumerate(projects):
        variables |= {f"e{number}": entity, f"p{number}": project}
        declared.append(f"$e{number}: String!, $p{number}: String!")
        fields.append(f"p{number}: project(entityName: $e{number}, name: $p{number}) {{ ...counts }}")
    return f"query CountRuns({', '.join(declared)}) {{ {' '.join(fields)} }} {query}", variables


def count_runs(connection: Connection, projects: Sequence[tuple[str, str]]) -> list[dict[str, Any] | Stop]:
    """What `--json` says about each (entity, project), or what went wrong with it. Raises `Rejected`.

    A request that stays unanswered is cut in two: one project that is too much for W&B should not cost the others.
    """

    def facts(name: str, answer: dict[str, Any] | None) -> dict[str, Any] | Stop:
        if not answer:
            return Stop("W&B shows no such project any more")
        dates = [str(edge["node"]["createdAt"]) for edge in answer["runs"]["edges"]]
        counts = {count: int(answer[count]) for count in COUNTS}
        return {"name": name, **counts, "last_run_at": max(dates, default=None)}

    try:
        data = connection.ask(*count_query(projects), tries=len(projects) > 1)
        with expected("the counts of runs"):
            return [facts(name, data[f"p{number}"]) for number, (_, name) in enumerate(projects)]
    except Rejected:
        raise
    except Stop as stop:
        if len(projects) == 1:
            return [stop]
        middle = len(projects) // 2
        return count_runs(connection, projects[:middle]) + count_runs(connection, projects[middle:])


def summed(projects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `count_runs` says about a project, for all of these together; what could not be counted counts nothing."""
    counts = {count: sum(project[count] or 0 for project in projects) for count in COUNTS}
    return {"name": "total", **counts, "last_run_at": max((p["last_run_at"] or "" for p in projects), default="")}


def count_all(connection: Connection, found: dict[str, list[str]], pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """What `--json` says about each entity, most runs first; what cannot be counted is named on stderr, counts None."""
    from rich.console import Console
    from rich.progress import track

    pairs = [(entity, name) for entity, names in found.items() for name in names]
    size = max(1, min(BATCH, -(-len(pairs) // WORKERS)))  # few projects: still all workers at once
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    answers = pool.map(lambda batch: count_runs(connection, batch), batches)
    bar = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    answers = track(answers, "counting runs", total=len(batches), **bar)
    counted = {entity: [] for entity in found}
    for (entity, name), facts in zip(pairs, [facts for batch in answers for facts in batch], strict=True):
        if isinstance(facts, Stop):
            say(f"error: {entity}/{name}: {facts}")
            facts = {"name": name} | dict.fromkeys([*COUNTS, "last_run_at"])
        counted[entity].append(facts)
    listings = []
    for entity, projects in counted.items():
        projects.sort(key=lambda facts: (-(facts["run_count"] or 0), facts["name"]))
        sums = summed(projects)
        totals = {"total_runs": sums["run_count"], "total_finished": sums["finished_count"]}
        listings.append({"name": entity, "total_projects": len(projects), **totals, "projects": projects})
    return listings


def show(entities: Sequence[dict[str, Any]]) -> None:
    """Print a table per entity to stdout; in a pipe no name is folded, however wide the table gets."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def cells(facts: dict[str, Any]) -> list[str]:
        counts = ["-" if facts[count] is None else f"{facts[count]:,}" for count in COUNTS]
        done = f"{facts['finished_count'] / facts['run_count']:.1%}" if facts["run_count"] else "-"
        return [plain(facts["name"]), *counts, done, plain(facts["last_run_at"] or "-")[:10]]

    width = None if sys.stdout.isatty() else 10_000
    console = Console(markup=False, emoji=False, highlight=False, width=width)
    for place, entity in enumerate(entities):
        projects, runs = entity["projects"], entity["total_runs"]
        title = f"{plain(entity['name'])}: {len(projects):,} project{'s'[: len(projects) != 1]}, {runs:,} runs"
        console.print("\n" * (place > 0) + title, style="bold", soft_wrap=True)
        if not projects:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        table.show_footer = len(projects) > 1
        titles = ("project", "runs", "finished", "running", "crashed\nor failed", "done", "last run")
        for title, footer in zip(titles, cells(summed(projects)), strict=True):
            numeric = title not in ("project", "last run")
            table.add_column(title, footer, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
        for project in projects:
            table.add_row(*cells(project))
        console.print(table)


def list_entities(connection: Connection, args: argparse.Namespace) -> int:
    """Ask for everything, print it, and name on stderr what cannot be shown; returns the exit code."""
    pool = ThreadPoolExecutor(WORKERS)

    def find(entity: str) -> list[str] | Stop:
        try:
            return list_projects(connection, entity)
        except Rejected:
            raise
        except Stop as stop:
            return stop

    asked = args.entity or ([] if args.discover else connection.entities)
    visible = visible_entities(connection) if args.discover or not asked else []
    entities = list(dict.fromkeys([*asked, *(visible if args.discover else visible[:1])]))
    if not entities:
        raise Stop("this key has no entity of its own. Name one with -e.")
    found = dict(zip(entities, pool.map(find, entities), strict=True))
    # W&B answers alike for an entity that is empty, hidden or misspelt; only the key's own list tells them apart.
    doubtful = [entity for entity, names in found.items() if not names or isinstance(names, Stop)]
    if doubtful and not visible:
        visible = visible_entities(connection)
    for entity in doubtful:
        if entity not in visible and not isinstance(found[entity], Unanswered):
            hint = f"{nearest(entity, visible)} It sees {', '.join(visible)}."
            found[entity] = Stop(f"no entity {entity!r} that this key sees.{hint}")
    problems = {entity: stop for entity, stop in found.items() if isinstance(stop, Stop)}
    for entity, stop in problems.items():
        say(f"error: {stop}" if stop.code == 2 else f"error: {entity}: {stop}")
    if len(problems) == len(found) and all(stop.code == 2 for stop in problems.values()):
        return 2
    listings = count_all(connection, {e: names for e, names in found.items() if e not in problems}, pool)
    if args.json:  # characters that act on a terminal are escaped, as JSON can
        text = json.dumps({"entities": listings}, indent=2, ensure_ascii=False)
        print(re.sub(r"[^\n -~]", lambda m: m[0] if plain(m[0]) == m[0] else json.dumps(m[0])[1:-1], text))
    else:
        show(listings)
    whole = all(project["run_count"] is not None for entity in listings for project in entity["projects"])
    return 0 if whole and not problems else 1


def main() -> int:
    """List the entities that the command line names; returns the exit code."""
    args = parse_arguments()
    connection = Connection()
    say(f"Using {connection.account}")
    return list_entities(connection, args)


if __name__ == "__main__":
    finish(main)
