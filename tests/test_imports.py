"""The rooms of the package and the one way in which they may know each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd_megatron

PACKAGE = Path(opd_megatron.__file__).parent
LEVELS = [
    {"errors"},
    {"types", "system", "tasks"},
    {"losses"},
    {"config"},
    {"data", "metrics", "command", "weights", "rewards"},
    {"models", "places", "weight_sync"},
    {"mcore", "rollout"},
    {"teacher", "doctor", "evaluation"},
    {"run", "world_check"},
    {"planning", "convert", "trainer"},
    {"train"},
    {"evaluate"},
    {"cli"},
]
"""From the ground up. A room knows those below it and none beside it."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("opd_megatron", *(part for part in parts if part != "__init__")))


def room_of(name: str) -> str | None:
    return name.split(".")[1] if name.startswith("opd_megatron.") else None


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports; with `at_import_time` those outside functions only."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if not (at_import_time and lazy):
            pending.extend(ast.iter_child_nodes(node))


def uses(path: Path, library: str, *, at_import_time: bool = False) -> bool:
    return any(name.split(".")[0] == library for name in imports(path, at_import_time=at_import_time))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_of_the_levels_below(path: Path) -> None:
    room = room_of(name_of(path))
    assert room in LEVEL, f"{room} has no place in LEVELS: decide which rooms it may know"
    others = [(name, other) for name in imports(path) if (other := room_of(name)) in LEVEL and other != room]
    wrong = [name for name, other in others if LEVEL[other] >= LEVEL[room]]
    assert not wrong, f"{name_of(path)} knows {wrong}, which are not below {room}"


def test_every_room_exists_and_no_two_modules_import_each_other() -> None:
    assert set(LEVEL) == {room_of(name_of(path)) for path in FILES}
    modules = {name_of(path): path for path in FILES}
    edges = {
        name: {known for used in imports(path) if (known := _module(used, modules)) != name}
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for known in sorted(edges.get(name, ())):
                visit(known, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def _module(name: str, modules: dict[str, Path]) -> str:
    """The module that a name is imported from."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def test_only_the_mcore_room_imports_megatron() -> None:
    outside = [name_of(path) for path in FILES if room_of(name_of(path)) != "mcore" and uses(path, "megatron")]
    assert not outside
    assert any(uses(path, "megatron") for path in FILES)


def test_only_the_rollout_room_imports_vllm() -> None:
    assert not [name_of(path) for path in FILES if room_of(name_of(path)) != "rollout" and uses(path, "vllm")]


def test_transformer_engine_is_never_imported_at_module_level() -> None:
    assert not [name_of(path) for path in FILES if uses(path, "transformer_engine", at_import_time=True)]


def test_importing_every_module_of_the_trainer_process_pulls_in_no_vllm() -> None:
    engine_side = {name_of(path) for path in FILES if uses(path, "vllm", at_import_time=True)}
    assert all(room_of(name) == "rollout" for name in engine_side)
    modules = [name_of(path) for path in FILES if name_of(path) not in engine_side]
    code = f"import sys, {', '.join(modules)}; print([n for n in ('vllm', 'transformer_engine') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Megatron itself imports Transformer Engine where it is installed; nothing may import vLLM.
    assert "vllm" not in result.stdout


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, opd_megatron.cli; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
