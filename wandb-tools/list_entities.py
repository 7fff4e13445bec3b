#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "python-dotenv>=1.1,<2",
#     "rich>=15,<16",
#     "urllib3>=2.5,<3",
#     "wandb>=0.31,<0.32",
# ]
# ///
"""To be written."""

from __future__ import annotations

import argparse
import base64
import configparser
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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

# What a copier may want to change.
TEAM_KEY = "GRAPH_DENOISE_TEAM_SERVICE"  # the name of the team's service-account key in .env
DEFAULT_BASE_URL = "https://api.forge.coreweave.com"  # W&B's hosted service, as the client 0.31 spells it
TRIES = 5  # times that a request is sent before it counts as unanswered


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
            f"no W&B API key for {base_url}. Looked for --api-key (export_runs.py), for WANDB_API_KEY in the environment\n"
            f"or in .env, for {TEAM_KEY} in .env, and for what `wandb login` stores in ~/.netrc.\n"
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
        for name, value in dotenv_values(path).items() if path else ():
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
    try:
        entry = netrc.netrc(path).authenticators(urlsplit(base_url).netloc)
    except (netrc.NetrcParseError, OSError) as error:
        say(f"{path} cannot be read and is passed over: {error}")
        return None
    if entry and entry[2]:
        return entry[2]
    # One login can serve several addresses, which only W&B's own client knows. Importing it takes 1.5 s, so it is
    # asked last; nothing else here needs it.
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    try:
        return read_netrc_auth(host=base_url)
    except Exception as error:  # the client raises its own errors for a malformed key or address
        raise Stop(f"the key that `wandb login` stored in {path} cannot be used: {error}") from None


def app_address(base_url: str) -> str:
    """The address of the pages that belong to an API address (the rule of `wandb.util.api_to_app_url`)."""
    host = urlsplit(base_url).hostname
    if host in ("api.wandb.ai", "forge.coreweave.com", "api.forge.coreweave.com"):
        return "https://forge.coreweave.com/wandb"
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
        timeout = urllib3.Timeout(connect=10, read=float(os.environ.get("WANDB_HTTP_TIMEOUT") or 30))
        options = {"maxsize": connections, "timeout": timeout, "retries": False}
        options["ca_certs"] = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
        address = urlsplit(account.base_url)
        proxy = urllib.request.getproxies().get(address.scheme)
        if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
            self.pool = urllib3.ProxyManager(proxy, **options)
        else:
            self.pool = urllib3.PoolManager(**options)
        login = base64.b64encode(f"api:{account.key}".encode()).decode()
        self.headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}

    def ask(self, query: str, variables: dict[str, Any], tries: int = TRIES) -> dict[str, Any]:
        """The `data` of one GraphQL query. Raises `Rejected`, `Unanswered` after `tries` tries, or `Trouble`.

        A rate limit (429) is waited out for as long as it lasts and uses up no try.
        """
        body = json.dumps({"query": query, "variables": variables}).encode()
        reply = json.loads(self.send("POST", f"{self.account.base_url}/graphql", body, self.headers, tries))
        if reply.get("data") is None or reply.get("errors"):
            errors = [str(error.get("message", error)) for error in reply.get("errors") or [{"message": "no data"}]]
            raise Trouble("; ".join(errors))
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
    """The user whose key it is: `entity` (their default) and `teams` (names). Raises `Stop` for a rejected key."""
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


def main() -> int:
    """Parse the arguments and do the work; returns the exit code."""
    raise Stop("not written yet")


if __name__ == "__main__":
    finish(main)
