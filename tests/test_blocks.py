"""The shared blocks are identical in every script that their header names, and the dependency bounds are equal."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from conftest import REPO, TOOLS

BLOCK = re.compile(
    r"^# --- (?P<name>[\w ]+): the same in (?P<scripts>[^\n]+) ---\n.*?^# --- end (?P=name) ---\n", re.M | re.S
)
SCRIPTS = sorted(TOOLS.glob("*.py"))


def blocks(script: Path) -> dict[str, str]:
    return {match["name"]: match[0] for match in BLOCK.finditer(script.read_text())}


def named(block: str) -> set[str]:
    """The scripts that a block's first line names."""
    return set(re.findall(r"\w+\.py", block.splitlines()[0]))


def header(script: Path) -> dict:
    """The PEP 723 metadata of a script."""
    lines = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.M | re.S)[1]
    return tomllib.loads(re.sub(r"^# ?", "", lines, flags=re.M))


def test_four_scripts_and_nothing_else_stand_in_the_folder():
    assert [path.name for path in SCRIPTS] == [
        "aggregate_runs.py",
        "analyze_runs.py",
        "export_runs.py",
        "list_entities.py",
    ]


def test_every_marker_belongs_to_a_whole_block():
    for script in SCRIPTS:
        text = script.read_text()
        assert len(blocks(script)) == len(re.findall(r"^# --- ", text, re.M)) / 2, script.name


def test_copies_are_identical_and_where_the_block_says():
    found: dict[str, dict[str, str]] = {}
    for script in SCRIPTS:
        for name, text in blocks(script).items():
            found.setdefault(name, {})[script.name] = text
    assert {"console", "connection"} <= set(found)
    for name, copies in found.items():
        assert len(set(copies.values())) == 1, f"the copies of block {name} differ: {sorted(copies)}"
        assert named(next(iter(copies.values()))) == set(copies), f"block {name} names scripts that lack it"


def test_dependency_bounds_equal_the_dev_environment():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for script in SCRIPTS:
        metadata = header(script)
        assert metadata["requires-python"] == project["requires-python"]
        assert set(metadata["dependencies"]) <= set(project["dependencies"]), script.name


def test_no_script_imports_a_sibling_or_what_it_does_not_declare():
    import ast
    import sys

    modules = {"python-dotenv": "dotenv", "vl-convert-python": "vl_convert"}
    for script in SCRIPTS:
        declared = {re.match(r"[\w-]+", d)[0] for d in header(script)["dependencies"]}
        allowed = {modules.get(d, d) for d in declared} | set(sys.stdlib_module_names)
        allowed |= {"google"} if "wandb" in declared else set()  # protobuf, which the client's own definitions are in
        for node in ast.walk(ast.parse(script.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or "."]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                assert name.split(".")[0] in allowed, f"{script.name} imports {name}"


def test_the_clients_private_name_stands_in_one_place_and_the_version_that_has_it_is_bounded():
    for script in SCRIPTS:
        wandb = [bound for bound in header(script)["dependencies"] if bound.startswith("wandb")]
        assert len(re.findall(r"\._service_api\b", script.read_text())) == len(wandb), script.name
        assert wandb in ([], ["wandb>=0.31,<0.32"])
        assert bool(wandb) == ("connection" in blocks(script)), script.name
