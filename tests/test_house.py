# SPDX-License-Identifier: Apache-2.0
"""The house of the design: a file imports only from floors below its own, and every file is reached
by a test.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "main": 12,
    "benchmarks": 11,
    "jobs": 10,
    "applications": 9,
    "deploy": 9,
    "interpret": 9,
    "reports": 9,
    "api": 8,
    "train": 7,
    "objectives": 6,
    "models": 5,
    "finetune": 5,
    "nn": 4,
    "data": 4,
    "distributed": 3,
    "particles": 2,
    "losses": 2,
    "masks": 2,
    "config": 1,
    "core": 0,
}
FILES = sorted((ROOT / "particlejax").rglob("*.py"))


def room(path: Path) -> str:
    """The folder or lone file of particlejax/ that a file belongs to."""
    return path.relative_to(ROOT / "particlejax").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Rooms of particlejax that a file imports from, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "particlejax"
        ):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("particlejax.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if path == ROOT / "particlejax" / "__init__.py":
        return  # it imports when a name is used; test_api.py holds that
    own = room(path)
    assert own in FLOORS, f"{own} has no floor: give it one here and in the design"
    wrong = {other for other in imports(path) - {own} if FLOORS[other] >= FLOORS[own]}
    assert not wrong, f"{path} (floor {FLOORS[own]}) imports {wrong}"


def test_linen_stays_inside() -> None:
    for path in FILES:
        if room(path) not in ("nn", "models"):
            assert "import flax" not in path.read_text(), f"{path}: only nn/ and models/ know linen"


def test_every_file_is_reached_by_a_test() -> None:
    reached, fresh = (
        set(),
        {p for p in FILES if p.name == "main.py"} | set((ROOT / "tests").glob("*.py")),
    )
    while fresh:
        text = "\n".join(path.read_text() for path in fresh)
        reached |= fresh
        fresh = {
            p
            for p in FILES
            if p not in reached
            and f"{p.parent.name} import" in text + ""
            and p.stem in text
            or p not in reached
            and ".".join(p.relative_to(ROOT).with_suffix("").parts) in text
        }
    assert not {p for p in FILES if p not in reached and p.name != "__init__.py"}


def test_data_workers_hold_no_jax_arrays() -> None:
    for path in FILES:
        if room(path) == "data":
            assert "import jax" not in path.read_text(), path
