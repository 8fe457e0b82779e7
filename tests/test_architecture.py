"""The house rules that a machine can check: import directions, dependencies, what the wheel holds, file sizes."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kernels": "step128_kernels",
    "launcher": "step128_launcher",
    "checkpoint": "step128_checkpoint",
    "evals": "step128_evals",
}
# Which of our packages each room may import besides itself.
ALLOWED = {
    "step128_kernels": set(),
    "step128_launcher": set(),
    "step128_checkpoint": {"step128_kernels"},
    "step128_evals": set(),
}
HEAVY = {"torch", "triton", "vllm", "transformers"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room / ROOMS[room]).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {name for node in nodes for name in names_of(node)}


def names_of(node: ast.AST) -> set[str]:
    """What one import statement imports; nothing for any other node."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) and node.module and node.level == 0 else set()


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("room", ROOMS)
def test_import_directions(room: str) -> None:
    package = ROOMS[room]
    forbidden = set(ROOMS.values()) - ALLOWED[package] - {package}
    for path in sources(room):
        assert not top_level(path) & forbidden, path


# Inside the launcher: which packages each may import besides itself and the modules at the top.
LAUNCHER_LAYERS = {
    "machine": set(),
    "middleware": set(),
    "model": set(),
    "planning": {"machine", "model"},
    "stack": {"machine"},
    "telemetry": {"machine"},
    "supervisor": {"model", "planning"},
    "doctor": {"machine", "model", "planning"},
    "commands": {"machine", "model", "planning", "supervisor", "doctor", "telemetry", "stack"},
}


@pytest.mark.parametrize("layer", LAUNCHER_LAYERS)
def test_launcher_layers(layer: str) -> None:
    known = {f"step128_launcher.{name}" for name in LAUNCHER_LAYERS}
    allowed = {f"step128_launcher.{name}" for name in LAUNCHER_LAYERS[layer] | {layer}}
    for path in sorted((ROOT / "launcher/step128_launcher" / layer).rglob("*.py")):
        used = {".".join(name.split(".")[:2]) for name in imports(path)}
        assert used & known <= allowed, path


# `step128-eval ppl --local` is the one measurement without a server: through transformers, loaded when it is asked for.
LOCAL = ROOT / "evals/step128_evals/perplexity/local.py"


@pytest.mark.parametrize("room", ["launcher", "evals"])
def test_room_needs_no_heavy_library(room: str) -> None:
    for path in sources(room):
        assert not top_level(path) & HEAVY or path == LOCAL, path


def test_local_perplexity_loads_torch_only_when_asked() -> None:
    tree = ast.parse(LOCAL.read_text())
    guarded = [
        node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    at_import = [node for node in guarded if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {name.split(".")[0] for node in at_import for name in names_of(node)} & HEAVY


def test_only_the_plugin_imports_vllm() -> None:
    for room in ROOMS:
        for path in sources(room):
            if "vllm" in top_level(path):
                assert path.parent.name == "vllm_plugin", path


def test_format_is_numpy_only() -> None:
    codebook = ROOT / "kernels/step128_kernels/codebook.py"
    assert top_level(codebook) <= {"__future__", "typing", "numpy"}


def test_base_dependencies_stay_tiny() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[A-Za-z0-9_.-]+", entry)[0].lower() for entry in project["dependencies"]}
    assert names == {"docker", "numpy", "prometheus-client", "pyyaml", "rich", "safetensors"}


def test_rooms_are_not_packages() -> None:
    for room in ROOMS:
        assert not (ROOT / room / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_files_stay_small(room: str) -> None:
    long = {path.name: n for path in sources(room) if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_wheel_holds_the_packages_and_the_configs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build += ["--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("step128-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {name for name in tops if not re.search(r"\.(dist-info|data)$", name)}
    assert packages == set(ROOMS.values())
    data = next(name for name in tops if name.endswith(".data"))
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"{data}/data/share/step128/{config.relative_to(ROOT)}" in names
    assert any(name.endswith("chat_template.jinja") for name in names)
    assert any(name.endswith("tools/scenarios/parallel.yaml") for name in names)
    entry_points = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "step128_kernels.vllm_plugin:register" in entry_points


def test_nothing_tells_of_a_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listing.strip("\0").split("\0"):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".jinja", ""} and path.is_file() and name != "LICENSE":
            assert not re.search(r"/(root|home)/[a-z.]", path.read_text(errors="replace")), name
