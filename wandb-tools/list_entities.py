#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "urllib3>=2.5,<3",
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
import configparser
import contextlib
import difflib
import json
import netrc
import os
import random
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit

# What a copier may want to change.
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"  # the name of the team's service-account key in .env
DEFAULT_BASE_URL = "https://api.forge.coreweave.com"  # W&B's hosted service, as the client 0.31 spells it
# W&B's hosted services and the address of the API behind each.
FORGE_HOSTS = {"forge.coreweave.com": "api.wandb.ai", "qa.forge.coreweave.com": "api.qa.wandb.ai"}
TRIES = 6  # times that a request is sent before it counts as unanswered

WORKERS = 8  # requests at a time
BATCH = 8  # projects per request; each costs W&B four counts
COUNTS = {  # the runs that each count takes, as W&B filters them
    "run_count": {},
    "finished_count": {"state": "finished"},
    "running_count": {"state": "running"},
    "failed_count": {"state": {"$in": ["crashed", "failed"]}},
}


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


def visible_entities(server: Server) -> list[str]:
    """The key's own entity, then its teams."""
    viewer = find_viewer(server)
    return list(dict.fromkeys(name for name in (viewer["entity"], *viewer["teams"]) if name))


def find_projects(
    server: Server, entities: Sequence[str], pool: ThreadPoolExecutor
) -> tuple[dict[str, list[str]], dict[str, Trouble]]:
    """entity -> names of its projects, and entity -> what went wrong instead. Raises `Rejected`."""

    def find(entity: str) -> list[str] | Trouble:
        try:
            return list_projects(server, entity)
        except Rejected:
            raise
        except Trouble as trouble:
            return trouble

    found = dict(zip(entities, pool.map(find, entities), strict=True))
    troubles = {entity: projects for entity, projects in found.items() if isinstance(projects, Trouble)}
    return {entity: projects for entity, projects in found.items() if not isinstance(projects, Trouble)}, troubles


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


def count_runs(server: Server, projects: Sequence[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
    """What `--json` says about each (entity, project), and what went wrong with it, if anything. Raises `Rejected`.

    A request that stays unanswered is cut in two: one project that is too much for W&B should not cost the others.
    """
    try:
        data = server.ask(*count_query(projects), tries=TRIES if len(projects) == 1 else 2)
    except Rejected:
        raise
    except Trouble as trouble:
        if len(projects) > 1:
            middle = len(projects) // 2
            yield from count_runs(server, projects[:middle])
            yield from count_runs(server, projects[middle:])
            return
        data, problem = {}, str(trouble)
    else:
        problem = "W&B shows no such project any more"
    for number, (_, name) in enumerate(projects):
        answer = data.get(f"p{number}")
        counts = {count: answer[count] if answer else None for count in COUNTS}
        last = answer["runs"]["edges"] if answer else []
        facts = {"name": name, **counts, "last_run_at": last[0]["node"]["createdAt"] if last else None}
        yield facts, "" if answer else problem


def count_all(
    server: Server, found: dict[str, list[str]], pool: ThreadPoolExecutor
) -> tuple[list[Listing], dict[str, str]]:
    """A `Listing` per entity, and `entity/project` -> what went wrong with it."""
    from rich.console import Console
    from rich.progress import track

    projects = [(entity, name) for entity, names in found.items() for name in names]
    size = max(1, min(BATCH, -(-len(projects) // WORKERS)))  # few projects: still all workers at once
    batches = [projects[start : start + size] for start in range(0, len(projects), size)]
    answers = pool.map(lambda batch: list(count_runs(server, batch)), batches)
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


def list_entities(server: Server, args: argparse.Namespace) -> int:
    """Ask for everything, print it, and name on stderr what cannot be shown; returns the exit code."""
    pool = ThreadPoolExecutor(WORKERS)
    asked = [name.strip() for name in args.entity] or ([] if args.discover else server.account.entities)
    visible = visible_entities(server) if args.discover or not asked else []
    entities = list(dict.fromkeys([*asked, *(visible if args.discover or asked else visible[:1])]))
    if not entities:
        raise Stop("this key has no entity of its own. Name one with -e.")
    found, troubles = find_projects(server, entities, pool)
    # W&B answers alike for an entity that is empty, hidden or misspelt; only the key's own list tells them apart.
    doubtful = [entity for entity in entities if not found.get(entity)]
    if doubtful and not visible:
        visible = visible_entities(server)
    unknown = [e for e in doubtful if e not in visible and not isinstance(troubles.get(e), Unanswered)]
    for entity in unknown:
        found.pop(entity, None)
        say(f"error: no entity {entity!r} that this key sees.{nearest(entity, visible)} It sees: {', '.join(visible)}.")
    if unknown == entities:
        return 2
    failures = {entity: str(trouble) for entity, trouble in troubles.items() if entity not in unknown}
    listings, uncounted = count_all(server, found, pool)
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
    account = find_account()
    say(f"Using the key from {account.source} at {account.base_url}")
    try:
        return list_entities(Server(account, WORKERS), args)
    except Rejected:
        raise rejected(account) from None
    except Trouble as trouble:
        raise Stop(f"{account.base_url}: {trouble}", 1) from None


if __name__ == "__main__":
    finish(main)
