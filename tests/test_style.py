"""The rules of the house that a machine can check: sizes, docstrings, types, and who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dtvla"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "tools").rglob("*.py")])
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
HEAVY = {"torch", "mujoco", "lightning", "pytorch_lightning", "transformers", "lerobot", "robosuite", "libero"}
FORBIDDEN_IMPORTS = {
    "dtvla.sim": {"torch", "lightning", "transformers", "lerobot"},
    "dtvla.policy": {"hydra", "lightning", "pytorch_lightning", "dtvla.sim", "dtvla.learning", "mujoco", "libero"},
}
ENTRY_POINTS = [
    "collect",
    "annotate",
    "review",
    "train",
    "evaluate",
    "compare",
    "report",
    "doctor",
    "export",
    "benchmark",
]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(module: ast.Module) -> set[str]:
    """Names of all modules that are imported anywhere in the file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def belongs_to(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def broken(rule: Callable[[Path], list[str]]) -> list[str]:
    """Every violation of a rule, as ``file: what``."""
    return [f"{path.relative_to(REPOSITORY)}: {what}" for path in SOURCES for what in rule(path)]


def test_files_and_functions_stay_small() -> None:
    def rule(path: Path) -> list[str]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        long = [f"{lines} lines"] if lines > MAX_FILE_LINES else []
        sizes = [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions(tree(path))]
        return long + [f"{name} has {size} lines" for name, size in sizes if size > MAX_FUNCTION_LINES]

    assert not broken(rule)


def test_modules_classes_and_public_functions_are_documented() -> None:
    """Constructors are documented by their class; what overrides a documented method of a library may stay bare."""

    def rule(path: Path) -> list[str]:
        module = tree(path)
        missing = [] if ast.get_docstring(module) else ["the module"]
        bodies = [module.body, *(n.body for n in module.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
        for node in (node for body in bodies for node in body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
                if not ast.get_docstring(node) and not decorators & {"setter", "overload", "override"}:
                    missing.append(node.name)
        return [f"no docstring on {name}" for name in missing]

    assert not broken(rule)


def test_functions_are_typed() -> None:
    def rule(path: Path) -> list[str]:
        untyped = []
        for function in functions(tree(path)):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            bare = any(a.annotation is None and a.arg not in ("self", "cls") for a in arguments)
            if bare or (function.returns is None and function.name != "__init__"):
                untyped.append(f"{function.name} is not typed")
        return untyped

    assert not broken(rule)


def test_nothing_from_outside_is_executed() -> None:
    """Weights come from safetensors; no pickle, eval or exec, and no remote code."""

    def rule(path: Path) -> list[str]:
        module = tree(path)
        found = sorted(imported(module) & {"cloudpickle", "dill", "joblib"})
        for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            unsafe = (
                name in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler")
                or keywords.get("trust_remote_code", "False") != "False"
                or (name == "torch.load" and keywords.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False")
            )
            if unsafe:
                found.append(f"line {call.lineno}: {name}")
        return found

    assert not broken(rule)


def test_rooms_import_only_what_they_may() -> None:
    def rule(path: Path) -> list[str]:
        room = ".".join(path.relative_to(REPOSITORY).parts[:-1])
        forbidden = FORBIDDEN_IMPORTS.get(room, set())
        return [f"imports {name}" for name in sorted(imported(tree(path))) if belongs_to(name, forbidden)]

    assert not broken(rule)


def test_no_token_id_is_written_in_code() -> None:
    """Every id comes from a Vocabulary. Published ids are 256000 and above."""

    def rule(path: Path) -> list[str]:
        numbers = [n.value for n in ast.walk(tree(path)) if isinstance(n, ast.Constant) and type(n.value) is int]
        return [str(number) for number in numbers if 256_000 <= number <= 260_000]

    assert not broken(rule)


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running ``code`` in a fresh process."""
    report = "import sys; print('\\nLOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_dtvla_costs_nothing() -> None:
    assert not loaded_by("import dtvla, dtvla.cli, dtvla.errors") & (HEAVY | {"hydra", "numpy"})


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_answers_without_heavy_imports(name: str) -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['{name}', '--help']\n"
        f"try:\n    runpy.run_module('dtvla.{name}', run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code"
    )
    assert not loaded_by(code) & HEAVY


def test_the_simulators_room_never_loads_torch() -> None:
    """Worker processes stay small: not even a library that the simulator uses may pull torch in."""
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in (PACKAGE / "sim").glob("*.py")]
    modules = ", ".join(name.removesuffix(".__init__") for name in names)
    loaded = loaded_by(f"import {modules}\nfrom dtvla.sim.backend import import_libero\nimport_libero()")
    assert "mujoco" in loaded
    assert not loaded & {"torch", "lightning", "transformers", "lerobot"}
