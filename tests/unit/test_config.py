import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

import caldpo_ray
from caldpo_ray.config import Config, Section, known_keys, load_config, save_config
from caldpo_ray.errors import InputError
from caldpo_ray.settings.options import ALIASES, NO_ALIAS

BASE = """
model: {name_or_path: m}
data: {train: d.jsonl}
objective: {name: dpo, beta: 0.1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "my-run.yaml"
    file.write_text(BASE)
    return file


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_that_depend_on_others(path: Path) -> None:
    config = load_config(path, ["run.output_dir=/shared/runs"])
    assert config.run.name == "my-run"
    assert config.reference.store == "/shared/runs/.cache/reference"
    assert load_config(path, ["reference.store=null"]).reference.store is None


def test_a_saved_config_is_the_same_run(path: Path, tmp_path: Path) -> None:
    overrides = ["train.learning_rate=3e-4", "model.lora.r=4", "data.eval=0.1", "objective.label_smoothing=0.1"]
    config = load_config(path, overrides)
    saved = tmp_path / "config.yaml"
    saved.write_text(save_config(config))
    assert load_config(saved) == config
    assert config.train.learning_rate == 3e-4


def test_all_mistakes_at_once_with_key_value_rule_and_nearest_key(path: Path) -> None:
    text = complaint(path, "train.epochs=0", "train.lerning_rate=1", "data.eval=2.0", "objective.beta=-1", "nonsense")
    assert "train.epochs = 0: must be greater than 0" in text
    assert "train.lerning_rate = 1: unknown key; did you mean train.learning_rate?" in text
    assert "data.eval" in text
    assert "beta" in text and "-1" in text
    assert "'nonsense': must be key=value" in text


def test_required_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("train: {epochs: 1}")
    text = complaint(file)
    for key in ("model", "data", "objective"):
        assert f"{key}: required" in text


@pytest.mark.parametrize(
    ("content", "expected"), [("[1, 2]", "must be a mapping"), ("a: [", "not valid YAML"), ("", "must be a mapping")]
)
def test_files_that_are_no_config(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert expected in complaint(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in complaint(tmp_path / "nowhere.yaml")


def test_fewer_rows_than_workers_and_bf16_at_stage_0_are_refused(path: Path) -> None:
    assert "every worker needs a row" in complaint(path, "train.batch_size=2", "train.num_workers=4")
    assert "data.train = '': must have at least 1 character" in complaint(path, "data.train=''")
    assert "hidden Adam step" in complaint(path, "model.dtype=bfloat16", "train.deepspeed.zero_stage=0")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.dtype=bfloat16", "train.deepspeed.zero_stage=0"], "hidden Adam step"),
        (["train.batch_size=2", "train.num_workers=4"], "train.batch_size = 2: smaller than train.num_workers = 4"),
        (["train.num_workers=65"], "train.batch_size = 64: smaller than train.num_workers = 65"),
        (["reference.revision=v2"], "reference.revision = 'v2': names a revision of another reference"),
        (["reference.num_actors=[4, 1]"], "a range is [lowest, highest]"),
        (["train.num_workers=[2, 1]"], "train.num_workers = [2, 1]: a range is [lowest, highest]"),
        (["train.num_workers=[1, 65]"], "train.batch_size = 64: smaller than train.num_workers = 65"),
        (["train.num_workers=[1, 2]", "train.num_gpus_per_worker=0.5"], "needs num_workers 1: NCCL refuses"),
        (
            ["reference.num_gpus_per_actor=1.5"],
            "num_gpus_per_actor = 1.5: a fraction of one GPU (below 1) or a whole number",
        ),
        (["train.deepspeed.offload_param=true"], "train.deepspeed.offload_param = True: needs zero_stage 3"),
        (
            ["train.deepspeed.offload_optimizer=true", "train.deepspeed.zero_stage=0"],
            "stage 0 has no partitioned optimizer",
        ),
    ],
)
def test_rules_between_options_are_told_once_and_with_every_other_mistake(
    path: Path, overrides: list[str], expected: str
) -> None:
    assert complaint(path, *overrides).count(expected) == 1
    others = ("train.epochs=0", "reference.batch_tokens=0", "model.lora.r=0", "nonsense=1")
    text = complaint(path, *overrides, *others)
    assert text.count(expected) == 1
    assert all(other.partition("=")[0] in text for other in others)


def test_rules_between_options_refuse_no_more_than_they_name(path: Path) -> None:
    config = load_config(path, ["reference.revision=v2", "reference.name_or_path=other", "reference.num_actors=[2, 2]"])
    assert (config.reference.revision, config.reference.num_actors) == ("v2", (2, 2))
    train = load_config(path, ["train.num_workers=[1, 64]"]).train
    assert (train.fewest_workers, train.most_workers) == (1, 64)
    load_config(path, ["train.deepspeed.offload_param=true", "train.deepspeed.zero_stage=3"])
    load_config(path, ["model.dtype=float32", "train.deepspeed.zero_stage=0"])
    text = complaint(path, "reference.name_or_path=[1]", "reference.revision=v2", "train.num_workers=x")
    assert "names a revision" not in text and "smaller" not in text, "what a rule compares with is wrong itself"


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_mean_their_key(path: Path, alias: str) -> None:
    key = ALIASES[alias]
    values: dict[str, Any] = {"train.lr_scheduler": "cosine", "train.optimizer": "rmsprop", "data.truncation": "error"}
    values |= {"objective.name": "slic", "loggers": ["wandb"], "train.best_metric": "loss", "run.name": "x"}
    values |= {"model.lora.target_modules": "all-linear", "model.name_or_path": "other", "data.train": "other"}
    config = load_config(path, {alias: values.get(key, 3)})
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == values.get(key, 3)


@pytest.mark.parametrize("name", NO_ALIAS)
def test_names_with_another_meaning_are_explained(path: Path, name: str) -> None:
    assert NO_ALIAS[name] in complaint(path, f"{name}=1")


def test_identity_leaves_execution_out(path: Path) -> None:
    base = load_config(path).identity()
    same = ["train.num_workers=4", "train.deepspeed.zero_stage=3", "run.name=other", "train.micro_batch_tokens=1"]
    assert load_config(path, same).identity() == base
    for other in (
        "train.learning_rate=1e-3",
        "run.seed=1",
        "objective.beta=0.2",
        "data.train=e",
        "model.dtype=bfloat16",
    ):
        assert load_config(path, [other]).identity() != base, other


def test_importing_config_costs_nothing() -> None:
    code = (
        "import sys, caldpo_ray.config; print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Section class -> its fields, and for those that are sections themselves their class.
SECTIONS: dict[str, dict[str, str | None]] = {
    kind.__name__: {
        name: next((word for word in re.findall(r"\w+", str(field.annotation)) if word.endswith("Section")), None)
        for name, field in kind.model_fields.items()
    }
    for kind in (Config, *Section.__subclasses__())
}
SECTIONS["Config"]["objective"] = "ObjectiveParameters"
SECTIONS["ObjectiveParameters"] = {"name": None}


def section_in(annotation: ast.expr | None) -> str | None:
    """The section that an annotation names, as in `"Config"`, `Config | str`."""
    words = re.findall(r"\w+", ast.unparse(annotation)) if annotation else []
    return next((word for word in words if word in SECTIONS), None)


class Reads(ast.NodeVisitor):
    """Collects `SectionClass.field` for every attribute read of an expression that is known to hold a section.

    Known are annotated parameters, variables and attributes (by their name), calls of functions with an annotated result,
    `SectionClass...(...)`, copies, and what is assigned from any of these.
    """

    def __init__(self, trees: Iterable[ast.Module]) -> None:
        self.found: set[str] = set()
        self.names: dict[str, str | None] = {}
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.results = {n.name: section_in(n.returns) for n in nodes if isinstance(n, ast.FunctionDef)}
        members = [
            item for n in nodes if isinstance(n, ast.ClassDef) for item in n.body if isinstance(item, ast.AnnAssign)
        ]
        self.members = {ast.unparse(item.target): section_in(item.annotation) for item in members}

    def holds(self, node: ast.expr) -> str | None:
        match node:
            case ast.Name():
                return self.names.get(node.id, node.id if node.id in SECTIONS else None)
            case ast.Attribute():
                section = self.holds(node.value)
                return SECTIONS[section].get(node.attr) if section else self.members.get(node.attr)
            case ast.Call(func=ast.Attribute(attr="model_copy" | "model_validate") as function):
                return self.holds(function.value)
            case ast.Call(func=ast.Name() as function):
                return self.results.get(function.id) or self.holds(function)
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        around, self.names = self.names, dict(self.names)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            self.names[argument.arg] = section_in(argument.annotation)
        self.generic_visit(node)
        self.names = around

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for left, right in pairs:
                if isinstance(left, ast.Name):
                    self.names[left.id] = self.holds(right)
                elif isinstance(left, ast.Attribute):
                    self.members[left.attr] = self.holds(right)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and (section := self.holds(node.value)):
            self.found.add(f"{section}.{node.attr}")


def unread(sources: Iterable[str]) -> list[str]:
    """The options of the schema that these sources never read as a field of their section."""
    trees = [ast.parse(source) for source in sources]
    reads = Reads(trees)
    for tree in trees:
        reads.visit(tree)
    missing = []
    for key in known_keys():
        *sections, last = key.split(".")
        kind: str | None = "Config"
        for name in sections:
            kind = SECTIONS[str(kind)][name]
        if f"{kind}.{last}" not in reads.found:
            missing.append(key)
    return missing


def package_sources() -> dict[str, str]:
    """Every module; of the config itself only the properties, since a rule about an option does not use it."""
    package = Path(caldpo_ray.__file__).parent
    sources = {file.name: file.read_text() for file in package.rglob("*.py")}
    config = next(n for n in ast.parse(sources["config.py"]).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    properties = [
        n for n in config.body if isinstance(n, ast.FunctionDef) and "property" in map(ast.unparse, n.decorator_list)
    ]
    sources["config.py"] = "\n".join(ast.unparse(n).replace("(self)", "(self: Config)") for n in properties)
    return sources


def test_every_option_is_read_outside_the_config() -> None:
    assert unread(package_sources().values()) == []


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("reference.revision", "settings|reference"),
        ("data.label_selector", "data"),
        ("reference.dtype", "settings|reference"),
    ],
)
def test_an_option_that_loses_its_readers_is_noticed(key: str, section: str) -> None:
    """Other sections have a field of the same name."""
    reader = re.compile(rf"\b({section})\.{key.partition('.')[2]}\b")
    assert unread(reader.sub(r"\1.removed", source) for source in package_sources().values()) == [key]


def test_overrides_are_yaml(path: Path) -> None:
    config = load_config(path, ["reference.num_actors=[1, 3]", "data.label_selector={a: b}", "data.shuffle=false"])
    assert config.reference.num_actors == (1, 3)
    assert config.data.label_selector == {"a": "b"}
    assert config.data.shuffle is False
    assert yaml.safe_load(save_config(config))["reference"]["num_actors"] == [1, 3]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.output_dir=''", "run.output_dir = '': must have at least 1 character"),
        ("reference.store=''", "reference.store = '': must have at least 1 character"),
        *(
            (f"run.name={name}", "begin with none of . and -")
            for name in ("..", ".", ".cache", "a/b", "-x", "'a\n'", 201 * "a")
        ),
        ("run.name=7", "run.name = 7: must be text; put it in quotes"),
        ("run.name=1e5", "must be text; put it in quotes, on a command line in both kinds: run.name='\"...\"'"),
        ("run.output_dir=", "run.output_dir = None: must have a value"),
        ("train.learning_rate=.inf", "train.learning_rate = inf: must be a finite number"),
        ("train.max_grad_norm=.nan", "train.max_grad_norm = nan: must be a finite number"),
        ("train.weight_decay=.inf", "train.weight_decay = inf: must be a finite number"),
        ("data.eval=.nan", "data.eval = nan: must be a source of rows like data.train, a fraction of it"),
        ("data.eval=1", "data.eval = 1: must be a source of rows like data.train, a fraction of it"),
        ("data.eval=true", "data.eval = True: must not be true or false"),
        ("train.batch_size=true", "train.batch_size = True: must not be true or false"),
        ("objective.beta=true", "beta = True: must not be true or false"),
        ("reference.num_actors=[true, 2]", "reference.num_actors = [True, 2]: must not be true or false"),
        ("reference.num_actors=[1]", "[1]: must be a whole number above 0, or [lowest, highest], two of them"),
        ("reference.num_actors=[1, x]", "must be a whole number above 0, or [lowest, highest], two of them"),
        ("train.deepspeed.config=[1]", "must be a mapping or the path of a JSON file"),
        ("train.batch_size=1:30", "train.batch_size = '1:30': must be a valid integer"),
        ("train.batch_size=99999999999999999999", "must be less than 2147483648"),
        (f"train.batch_size={'9' * 5000}", "exceeded maximum size"),
        ("loggers=[wandb, wandb]", "names a logger twice"),
        ("reference=[]", "reference = []: must be a section with options, found list"),
        ("train=5", "train = 5: must be a section with options, found int"),
        ("data.train=[a", "'data.train=[a': not valid YAML"),
        ("data.label_selector={a: 1, a: 2}", "a is given twice"),
        ("objective.name=:", "name = ':': must be package.module:function"),
        ("objective.name=sft", "objective='{name: sft}'"),
    ],
)
def test_one_mistake_is_one_line_that_says_the_rule(path: Path, override: str, expected: str) -> None:
    text = complaint(path, override)
    assert expected in text and text.count("\n") == 1 and "1 mistake\n" in text
    assert "Traceback" not in text and "constrained" not in text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("beta", "objective.beta"),
        ("lr", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("TRAIN.BATCH_SIZE", "train.batch_size"),
        ("trian.epochs", "train.epochs"),
        ("reference.name", "reference.name_or_path"),
        ("num_train_epochs", "train.epochs"),
        ("output_dir", "run.output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest_one_of_any_section(path: Path, given: str, meant: str) -> None:
    assert f"{given} = 3: unknown key; did you mean {meant}?" in complaint(path, f"{given}=3")


def test_an_unknown_key_like_none_names_what_there_is(path: Path) -> None:
    assert "known: run, model, data, reference, objective, train, sweep, loggers" in complaint(path, "nonsense=1")
    assert "known: train.batch_size, train.best_metric" in complaint(path, "train.nonsense=1")
    assert "counts rows per device" in complaint(path, "per_device_train_batch_size=3")


def test_an_objective_given_whole_replaces_that_of_the_file(path: Path) -> None:
    assert load_config(path, ["objective={name: sft}"]).objective.model_dump() == {"name": "sft"}


def test_empty_sections_have_every_default(path: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty" / "my-run.yaml"
    empty.parent.mkdir()
    empty.write_text(f"{BASE}\nrun:\nreference:\ntrain: {{deepspeed: }}")
    assert load_config(empty) == load_config(path)
    empty.write_text(f"{BASE}\ntrain:")
    assert load_config(empty) == load_config(path)
    empty.write_text("model:\ndata:\nobjective:")
    text = complaint(empty)
    assert "model.name_or_path: required" in text and "data.train: required" in text and "no objective is named" in text


def test_the_home_folder_is_meant_wherever_a_path_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    keys = ("run.output_dir", "model.name_or_path", "reference.name_or_path", "data.train", "data.eval")
    config = load_config(path, [f"{key}=~/x" for key in (*keys, "train.deepspeed.config")])
    values = {key: value for key, value, _ in config.items()}
    assert {values[key] for key in (*keys, "train.deepspeed.config")} == {"/home/ada/x"}
    assert config.reference.store == "/home/ada/x/.cache/reference"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.train=*.jsonl", "*.jsonl"),
        ("data.train=@rows", "@rows"),
        ("data.train={{ rows }}", "{{ rows }}"),
        ("data.train=2026-02-30", "2026-02-30"),
        ("data.train='12e34'", "12e34"),
        ("data.train=no", "no"),
        ("data.train=1:30", "1:30"),
    ],
)
def test_text_needs_no_quotes_of_its_own_where_it_can_mean_nothing_else(path: Path, text: str, expected: str) -> None:
    config = load_config(path, [text])
    assert config.data.train == expected
    path.write_text(save_config(config))
    assert load_config(path) == config


def test_numbers_are_those_of_yaml_1_2(path: Path) -> None:
    overrides = ["train.learning_rate=5e-7", "train.max_steps=1e3", "train.batch_size=010", "train.use_gpu=yes"]
    train = load_config(path, overrides).train
    assert (train.learning_rate, train.max_steps, train.batch_size, train.use_gpu) == (5e-7, 1000, 10, True)
    path.write_text(f"{BASE}\ntrain: {{learning_rate: 5e-7}}\nrun: {{name: '1e5'}}")
    config = load_config(path)
    assert (config.train.learning_rate, config.run.name) == (5e-7, "1e5")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("train: {num_train_epochs: 1, epochs: 2}", "train.epochs: given 2 times, once per spelling"),
        ("train.epochs: 1\ntrain: {epochs: 2}", "train.epochs: given 2 times, once per spelling"),
        ("train: {epochs: 1}\ntrain: {batch_size: 2}", "line 6: train is given twice, first in line 5; keep one"),
    ],
)
def test_an_option_is_in_a_file_once(path: Path, added: str, expected: str) -> None:
    path.write_text(f"{BASE}{added}")
    assert expected in complaint(path)


def test_what_is_no_section_is_not_mended_by_an_override(path: Path) -> None:
    path.write_text(f"{BASE}train: 5")
    assert "train = 5: must be a section with options" in complaint(path, "train.epochs=2")
