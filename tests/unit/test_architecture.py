"""What a reader of the code may rely on, checked on its syntax tree."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import caldpo_ray

PACKAGE = Path(caldpo_ray.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    ".".join(("caldpo_ray", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): f for f in FILES
}
# Packages but for objectives and world are folders: what they hold is in their modules.
MODULES = {
    name: file
    for name, file in NAMES.items()
    if file.name != "__init__.py" or name in ("caldpo_ray.objectives", "caldpo_ray.world")
}

LAYERS = [
    {
        "redaction",
        "errors",
        "interrupts",
        "schema",
        "imports",
        "yaml_text",
        "options",
        "dotted",
        "objective_parameters",
        "sweep_options",
        "config",
    },
    {
        "objectives",
        "alarms",
        "allocator",
        "attention",
        "bfloat16",
        "logprobs",
        "metrics",
        "formats",
        "tokenization",
        "batching",
        "deepspeed_config",
        "optimizers",
        "flops",
        "preview",
        "user_code",
        "world",
        "drawing",
        "run_figures",
        "sweep_figures",
        "report_page",
        "search_space",
        "comparison",
    },
    {
        "readers",
        "sources",
        "storage",
        "rows",
        "store",
        "models",
        "scoring",
        "footprint",
        "checkpoint",
        "checkpoint_list",
        "resharding",
        "run_dir",
        "run_log",
        "sweep_dir",
        "loggers",
        "judging",
        "model_card",
        "progress",
        "ray_metrics",
        "trainer",
        "uploads",
        "waiting",
        "engine",
        "faults",
        "input_stamp",
        "leaving",
        "regroup",
        "access",
        "connection",
    },
    {"data", "reference", "feed", "training", "sampling"},
    {
        "placement",
        "unscored",
        "node_check",
        "held_out_rows",
        "pair_analysis",
        "generation",
        "timing",
        "pipeline",
        "reference_verbs",
        "sweep_trial",
        "sweep_plan",
        "sweep_search",
        "sweep_run",
        "sweep_results",
        "sweeps",
        "evaluation",
        "export",
        "paper",
        "plan",
        "report",
        "cli",
        "__main__",
    },
]
# A stage never imports another, but for records: the feed joins the reference's answers, and workers read what the feed cuts.
BETWEEN_STAGES = {("feed", "reference"), ("training", "feed"), ("training", "reference")}


def layer(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def short(name: str) -> str:
    """Of a module of this package; objectives and world are one to all others."""
    _, first, *_ = parts = name.split(".")
    return first if first in ("objectives", "world") else parts[-1]


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports, by their short names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {short(name) for name in found & MODULES.keys()}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_the_layers(name: str) -> None:
    module = short(name)
    for other in imports(MODULES[name]) - {module}:
        assert layer(other) <= layer(module), f"{module} imports {other}, which lies above it"
        if layer(other) == layer(module) == 3:
            assert (module, other) in BETWEEN_STAGES, f"stage {module} imports stage {other}"


def test_the_layers_name_what_is_there() -> None:
    """Each once: two modules of one name could not be told apart."""
    names = [short(name) for name in MODULES if not name.startswith(("caldpo_ray.objectives.", "caldpo_ray.world."))]
    assert sorted(names) == sorted(name for names in LAYERS for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_every_module_imports(name: str) -> None:
    if not name.endswith("__main__"):
        assert importlib.import_module(name).__doc__, "a module says what it is for"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("caldpo_ray", {"torch", "ray", "transformers", "pydantic"}),
        ("caldpo_ray.cli", {"torch", "ray", "transformers"}),
        ("caldpo_ray.pipeline", {"torch", "ray", "transformers", "deepspeed"}),
        ("caldpo_ray.tuning.sweep_run", {"torch", "transformers", "deepspeed"}),
        ("caldpo_ray.objectives", {"ray", "transformers", "deepspeed"}),
        ("caldpo_ray.logprobs", {"ray", "transformers", "deepspeed"}),
    ],
)
def test_importing_costs_no_more_than_it_must(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_deepspeed_comes_without_mlflow_which_stays_importable() -> None:
    code = (
        "import sys; from caldpo_ray.compute.imports import import_deepspeed; import_deepspeed(); print('mlflow' in sys.modules);"
        " import mlflow; print(mlflow.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "mlflow"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_small_files_and_functions_and_no_tricks(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 450
    assert "ray._private" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None and node.end_lineno - node.lineno < 62, node.name
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            literal = isinstance(node.args[1], ast.Constant)
            assert not literal, f"{node.func.id} with a literal name at line {node.lineno}"


def test_every_shipped_config_loads() -> None:
    from caldpo_ray.config import load_config

    examples = PACKAGE.parent / "examples"
    configs = [path for path in examples.rglob("*.yaml") if "objective" in path.read_text()]
    assert configs
    for path in configs:
        load_config(path)


def test_tests_that_promises_point_to_exist() -> None:
    root = PACKAGE.parent
    named = set(re.findall(r"`(test_\w+)", (root / "docs" / "faults.md").read_text()))
    tests = [path for path in (root / "tests").rglob("test_*.py") if path != Path(__file__)]
    known = {path.stem for path in tests} | {
        name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert {name for name in named if not any(each.startswith(name) for each in known)} == set()
