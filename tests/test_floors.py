"""Imports go down the floors only: kernels < actors < pipeline < jobs. Read from the source, and tried for real."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FLOORS = ["kernels", "actors", "pipeline", "jobs"]
ROOT = Path(__file__).resolve().parents[1]
MODULES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_no_floor_above_its_own(path):
    own = FLOORS.index(path.relative_to(ROOT).parts[0])
    above = set(FLOORS[own + 1 :]) | ({"ray"} if own < FLOORS.index("pipeline") else set())
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert not tops & above


def test_only_the_graph_and_the_endpoints_deployment_speak_ray():
    speakers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.split(".")[0] == "ray" for name in imported_modules(path))
    }
    graph = {f"pipeline/{name}.py" for name in ("graph", "corpus/corpus_graph", "corpus/corpus_planner")}
    assert speakers <= {*graph, "jobs/serve.py"}


@pytest.mark.parametrize("floor", FLOORS[:3])
def test_a_floor_can_be_imported_with_those_above_it_blocked(floor):
    blocked = FLOORS[FLOORS.index(floor) + 1 :] + (["ray"] if floor in ("kernels", "actors") else [])
    # Triton is for CUDA tensors only: everything imports without it.
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / floor).rglob("*.py"))]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import importlib, sys\n"
        f"for name in {[*blocked, 'triton']!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
