"""The rules that a reader relies on: imports point one way, files stay short, every module says what it is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP_LEVEL = ("nd_jax", "converters", "experiments")
MAX_LINES = 400

# A package of nd_jax imports only itself and packages of an earlier row; packages of one row do not know each other.
ROWS = (
    ("errors",),
    ("files",),
    ("models",),
    ("pyramid", "weights"),
    ("data",),
    ("distill",),
    ("train",),
    ("generate",),
    ("evals",),
    ("report",),
)
RANK = {package: rank for rank, row in enumerate(ROWS) for package in row}

# nd_jax trains without any conversion package, and nothing below knows what is above.
FORBIDDEN = {
    "nd_jax": (
        "converters",
        "experiments",
        "tests",
        "torch",
        "diffusers",
        "tensorflow",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxruntime_qnn",
        "onnxscript",
        "tf2onnx",
    ),
    "converters": ("experiments", "tests"),
    "experiments": ("tests",),
}


def module_name(path: Path) -> str:
    """Dotted name of a source file below the root, `nd_jax/models/__init__.py` -> `nd_jax.models`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names that a module imports anywhere, inside functions too, by statement or by a literal name.

    `from a import b` counts as both `a` and `a.b`, since `b` may be a module.
    """
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def file_imports(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


def violations(module: str, imported: set[str]) -> list[str]:
    """Imports of `module` that point against the walk, as sentences."""
    top, _, rest = module.partition(".")
    wrong = [
        f"{module} imports {name}: {top} may not"
        for name in sorted(imported)
        if name.partition(".")[0] in FORBIDDEN.get(top, ())
    ]
    own = rest.partition(".")[0]
    if top != "nd_jax" or not own:
        return wrong
    for name in sorted(imported):
        other = name.split(".")[1] if name.startswith("nd_jax.") else None
        if other in RANK and other != own and RANK[other] >= RANK[own]:
            wrong.append(f"{module} imports {name}: {own} comes before {other} or beside it")
    return wrong


@pytest.mark.parametrize("path", sources(*TOP_LEVEL), ids=module_name)
def test_imports_point_one_way(path):
    assert violations(module_name(path), file_imports(path)) == []


def defined(path: Path) -> set[str]:
    """Names that a module has: what its statements outside functions and classes bind, and modules of its folder."""
    found = {entry.stem for entry in path.parent.iterdir()} if path.name == "__init__.py" else set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(child.name)
            elif isinstance(child, (ast.Import, ast.ImportFrom)):
                found.update((alias.asname or alias.name).partition(".")[0] for alias in child.names)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                found.add(child.id)
            elif not isinstance(child, ast.Lambda):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def unknown_names(source: str, modules: dict[str, set[str]]) -> list[str]:
    """What a source names of our modules and they do not have: by `from module import name`, or as `module.name`.

    A name that the source also binds itself is not looked at.
    """
    tree, aliases, unknown = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif alias.name not in modules[node.module]:
                    unknown.append(f"{node.module}.{alias.name}")
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in bound:
            module = aliases.get(node.value.id)
            if module is not None and node.attr not in modules[module] and not node.attr.startswith("__"):
                unknown.append(f"{module}.{node.attr}")
    return unknown


def test_every_name_of_another_module_is_there():
    paths = sources(*TOP_LEVEL, "tests")
    modules = {module_name(path): defined(path) for path in paths}
    unknown = {module_name(path): unknown_names(path.read_text(encoding="utf-8"), modules) for path in paths}
    assert {name: names for name, names in unknown.items() if names} == {}


def test_the_check_of_names_itself():
    modules = {"converters": {"graphs"}, "converters.graphs": {"encode"}}
    source = "from converters import graphs\nfrom converters.graphs import encode, decode\ngraphs.encode(graphs.gone)"
    assert unknown_names(source, modules) == ["converters.graphs.decode", "converters.graphs.gone"]
    assert unknown_names(source.replace("decode", "encode as e") + "\ndef f(graphs): ...", modules) == []


def test_every_package_of_nd_jax_has_a_rank():
    modules = {module_name(path).split(".")[1] for path in sources("nd_jax") if module_name(path) != "nd_jax"}
    assert modules, "no sources found: the paths of this test are wrong"
    assert modules <= set(RANK), f"give {sorted(modules - set(RANK))} a place in ROWS"


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("nd_jax.models.t5", "import torch", True),
        ("nd_jax.models.t5", "def f():\n    import torch.nn as nn", True),
        ("nd_jax.models.t5", "def f():\n    importlib.import_module('onnx.helper')", True),
        ("nd_jax.models.t5", "from nd_jax.train import loop", True),
        ("nd_jax.models.t5", "from nd_jax import weights", True),
        ("nd_jax.models.t5", "from ..weights import table", True),
        ("nd_jax.distill.base", "from nd_jax.report import html", True),
        ("converters.onnx", "def f():\n    from experiments import configs", True),
        ("nd_jax.weights.table", "from nd_jax.models import t5\nfrom nd_jax.errors import UserError", False),
        ("nd_jax.models.clip_text", "from . import t5\nfrom jax import numpy", False),
        ("converters.onnx", "import onnx\nfrom nd_jax.weights import table", False),
        ("nd_jax.models.t5", "import torchlike", False),
    ],
)
def test_the_import_check_itself(module, source, wrong):
    assert bool(violations(module, imports(source, module, is_package=False))) is wrong


def test_no_file_is_too_long():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in sources(*TOP_LEVEL, "tests")}
    assert {name: count for name, count in lengths.items() if count > MAX_LINES} == {}


def test_no_module_is_a_drawer_for_everything():
    drawers = ("utils", "util", "helpers", "misc")
    assert [str(path) for path in sources(*TOP_LEVEL, "tests") if path.stem in drawers] == []


@pytest.mark.parametrize("path", sources(*TOP_LEVEL, "tests"), ids=module_name)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_bazel_runs_every_test_file():
    """A file that the table does not name would be left out without a word."""
    table = (ROOT / "tests" / "BUILD.bazel").read_text(encoding="utf-8")
    assert not [path.name for path in (ROOT / "tests").glob("test_*.py") if f'"{path.stem}": [' not in table]
