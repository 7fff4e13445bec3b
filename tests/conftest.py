"""What every test file shares: a clean environment, and a way to run a script as a user does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent
TOOLS = REPO / "wandb-tools"
HOME = Path.home()  # before a test moves it


def clean_env(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: no W&B settings, an empty home, no terminal, 80 columns; `extra` on top."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "GRAPH_DENOISE", "AWS_", "NETRC"))}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TERM"):
        kept.pop(name, None)
    # uv keeps its package cache although HOME moves, so that a `uv run` in a test downloads nothing twice.
    cache = os.environ.get("UV_CACHE_DIR") or str(HOME / ".cache" / "uv")
    return kept | {"HOME": str(home), "UV_CACHE_DIR": cache, "PYTHONUTF8": "1"} | extra


def run_script(
    script: str, *args: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 60, around: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `wandb-tools/SCRIPT ARGS` in `cwd` with the test environment's Python; stdout and stderr as text.

    `around` is what a shell does with it: `{} 2>&1 | head -1`.
    """
    command = [sys.executable, str(TOOLS / script), *map(str, args)]
    return subprocess.run(
        ["bash", "-c", around.replace("{}", shlex.join(command))] if around else command,
        cwd=cwd,
        env=clean_env(cwd) if env is None else env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
    )


def load_script(script: str) -> ModuleType:
    """Import `wandb-tools/SCRIPT` as a module, to test its functions."""
    import importlib.util

    name = script.removesuffix(".py")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TOOLS / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _nothing_of_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees or touches the W&B settings, keys and caches of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "GRAPH_DENOISE", "AWS_", "NETRC")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
