"""What may never happen: foreign code run, foreign pickles loaded, secrets told."""

import ast
import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import caldpo_ray
from caldpo_ray.config import ModelSection, load_config, save_config
from caldpo_ray.errors import InputError, NotReady, RunError, last_line
from caldpo_ray.evaluation import evaluate
from caldpo_ray.models import load_model, resolve_model
from caldpo_ray.plan import sample_rows
from caldpo_ray.reading.sources import list_sources
from caldpo_ray.redaction import require_no_secret, without_secrets
from caldpo_ray.storage import open_path
from tests.unit.tiny_models import byte_tokenizer, tiny_model

PACKAGE = Path(caldpo_ray.__file__).parent
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "pty.spawn",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "joblib.load", "numpy.load", "np.load",
    "dill.loads", "cloudpickle.loads", "pickle.Unpickler", "torch.hub.load",
}  # fmt: skip
MODULES = {"subprocess", "marshal", "shelve", "dill", "joblib", "cloudpickle", "pty", "commands"}
# The bytes are our own, from one of our processes to another through Ray.
PICKLES = {"data.py": 2, "feed.py": 1}
# Our own checkpoint, whose checksums `checkpoint.load` compared.
LOADS = {"resharding.py": 1}


def dotted(node: ast.expr) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "?")


def what_runs_code(tree: ast.AST) -> list[str]:
    """Calls and imports that run what a file or a string says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        options = {option.arg: option.value for option in node.keywords}
        weights_only = options.get("weights_only")
        safe = isinstance(weights_only, ast.Constant) and weights_only.value is True
        if (
            name in FORBIDDEN
            or "shell" in options
            or "allow_pickle" in options
            or name in ("pickle.loads", "pickle.load")
            or (name == "torch.load" and not safe)
        ):
            found.append(name)
        trusted = options.get("trust_remote_code")
        if isinstance(trusted, ast.Constant) and trusted.value is not False:
            found.append(f"{name}(trust_remote_code={trusted.value})")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_runs_what_a_file_says(file: Path) -> None:
    allowed = ["pickle.loads"] * PICKLES.get(file.name, 0) + ["torch.load"] * LOADS.get(file.name, 0)
    assert what_runs_code(ast.parse(file.read_text())) == allowed


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "import subprocess", "from subprocess import run", "os.system('x')", "f(shell=True)", "pickle.loads(x)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "m.from_pretrained(x, trust_remote_code=True)", "yaml.load(x)",
        "np.load(x, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_scan_sees(code: str) -> None:
    assert what_runs_code(ast.parse(code))


def test_the_scan_lets_pass_what_is_safe() -> None:
    code = "torch.load(x, weights_only=True); m.from_pretrained(x, trust_remote_code=trusted); model.eval(); yaml.safe_load(x)"
    assert not what_runs_code(ast.parse(code))


# --- Models ---


class Runs:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.pwned = True",))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_weights_in_a_pickle_are_read_as_weights_alone(model: Path, tmp_path: Path) -> None:
    """Files of torch are still common; what else is pickled in one is refused by name and never run."""
    (model / "model.safetensors").unlink()
    weights = tiny_model("llama").state_dict()
    torch.save(weights, model / "pytorch_model.bin")
    found = resolve_model(str(model), None, False, tmp_path / "init", 0, tmp_path / "models.json")
    assert found.path == str(model)
    torch.save({**weights, "more": Runs()}, model / "pytorch_model.bin")
    for read in (
        lambda: resolve_model(str(model), None, False, tmp_path / "init", 0, tmp_path / "models.json"),
        lambda: load_model(ModelSection(name_or_path=str(model)), "float32"),
    ):
        with pytest.raises(InputError, match=r"model\.name_or_path .*"):
            read()
    assert "pwned" not in vars(builtins)


def test_code_that_comes_with_a_model_runs_only_on_request(model: Path, tmp_path: Path) -> None:
    (model / "modeling_own.py").write_text("import builtins\nbuiltins.pwned = True\n")
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"trust_remote_code"):
        resolve_model(str(model), None, False, tmp_path / "init", 0, tmp_path / "models.json")
    assert "pwned" not in vars(builtins)


def test_that_such_code_may_run_is_said_before(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whatever loads a model in its own process; runs say it in `tests/ray/test_live.py`."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{name_or_path: {model}}}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nobjective: {{name: dpo}}\n"
    )
    for trusted in (False, True):
        options = [f"model.trust_remote_code={trusted}", f"run.output_dir={tmp_path}"]
        sample_rows(load_config(path, options), 1)
        with pytest.raises(InputError, match="holds no weights"):
            evaluate(tmp_path, data=str(tmp_path / "rows.jsonl"), overrides=options)
        assert capsys.readouterr().out.count("model.trust_remote_code is on: Python code") == 2 * trusted


# --- Secrets ---

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{SECRET}@host/a.jsonl", f"https://{SECRET}@host/a.jsonl", f"s3://key:{SECRET}@bucket/a.jsonl",
        f"https://host/a.jsonl?token={SECRET}", f"https://host/a.jsonl?x=1&X-Amz-Signature={SECRET}", f"https://host/a?sig={SECRET}&se=1",
        f"https://host/a.parquet?api_key={SECRET}", f"HTTPS://{SECRET}@host/a.jsonl", f"hf://datasets/org/name?access-key={SECRET}",
        f"https://host/a?X-Amz-Credential={SECRET}%2Fus-east-1", f"https://host/a?password={SECRET}",
    ],
)  # fmt: skip
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\n")
    for key in (
        "data.train",
        "data.eval",
        "model.name_or_path",
        "run.output_dir",
        "reference.store",
        "train.deepspeed.config",
    ):
        with pytest.raises(
            InputError, match=rf"{key} = .*\*\*\*.*: an address must not hold a password or token"
        ) as caught:
            load_config(path, {key: address})
        assert SECRET not in str(caught.value)
    for use in (list_sources, open_path):
        with pytest.raises(InputError, match=r"\*\*\*") as caught:
            use(address)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://host/a.parquet?download=true", "s3://bucket/a@b/c:d.jsonl", "hf://datasets/org/name@0123456789/a.jsonl",
        "hub:org/name:train", "/data/user:name@host/tokens.jsonl", "https://host:8080/tokens/a.jsonl?split=train&key_=1",
        "file:///a?b=token=c",
    ],
)  # fmt: skip
def test_other_addresses_stay(address: str) -> None:
    assert require_no_secret(address) == without_secrets(address) == address


def test_no_message_of_ours_tells_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    monkeypatch.setenv("SHORT_TOKEN", "dev")
    told = f"key {SECRET} for https://u:p4ss@host/a?token=abc&b=1, dev is false-false"
    clean = "key *** for https://***@host/a?token=***&b=1, dev is false-false"
    assert last_line(ValueError(f"first\n{told}")) == clean
    for kind in (InputError, NotReady, RunError):
        error = pickle.loads(pickle.dumps(kind(told)))
        assert type(error) is kind and str(error) == clean and error.args == (clean,)


def test_what_a_file_holds_does_not_steer_the_terminal(tmp_path: Path) -> None:
    from caldpo_ray.config import DataSection
    from caldpo_ray.data import make_row
    from caldpo_ray.reading.preview import preview

    steering = "\x1b]0;title\x07\x9b2J\r"
    tokenizer = byte_tokenizer()
    found = make_row(
        {"prompt": f"q{steering}", "completion": f"a{steering}"}, DataSection(train="x"), tokenizer, "id", 1
    )
    with pytest.raises(ValueError, match="columns fit no known format") as caught:
        make_row({steering: 1}, DataSection(train="x"), tokenizer, "id", 1)
    for shown in (preview([found], tokenizer).plain, str(caught.value), str(InputError(f"{steering}: no such file"))):
        assert "x1b" in shown and not any(character in shown for character in "\x1b\x07\x9b\r")


def test_a_token_in_the_environment_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (tmp_path / "c.yaml").write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\n")
    assert SECRET not in save_config(load_config(tmp_path / "c.yaml"))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "c.yaml", [f"data.token={SECRET}"])
    assert SECRET not in str(caught.value)
