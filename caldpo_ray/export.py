"""The model folder a run leaves behind: its manifest, and its copy as a plain Hugging Face folder.

`caldpo.json` beside the weights says what `caldpo evaluate` needs to know of the run once the folder has left it: the
objective with its parameters, how text became tokens, and which frozen model was the reference.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError
from caldpo_ray.models import ResolvedModel, holds_model, resolve_model, tell_of_code
from caldpo_ray.reporting.progress import say
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import (
    is_remote,
    local_copy,
    make_folder,
    open_path,
    publishing,
    reaching,
    write_atomically,
)

MODEL_MANIFEST = "caldpo.json"
TOKENISATION = ("max_length", "max_prompt_length", "truncation", "chat_template")
CARRIED = ("README.md", MODEL_MANIFEST)


def write_model_manifest(folder: Path, config: Config, reference: ResolvedModel | None) -> None:
    """Write `caldpo.json` into a model folder; `reference` is the frozen model of the run, None for objectives without."""
    data = config.data.model_dump(mode="json")
    frozen = None
    if reference is not None:
        dtype = config.reference.dtype or config.model.dtype
        path, revision, digest = reference.path, reference.revision, reference.weights
        frozen = {"name_or_path": path, "revision": revision, "dtype": dtype, "digest": digest}
    facts = {
        "objective": config.objective.model_dump(mode="json"),
        "model": {"dtype": config.model.dtype},
        "data": {name: data[name] for name in TOKENISATION},
        "reference": frozen,
    }
    write_atomically(folder / MODEL_MANIFEST, json.dumps(facts, indent=1))


def read_model_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_model_manifest` wrote; None for a folder that no run of ours left. Raises InputError for a broken one."""
    file = folder / MODEL_MANIFEST
    if not file.exists():
        return None
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {name: facts[name] for name in ("objective", "model", "data", "reference")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read ({type(error).__name__}: {error}); export the run again, or delete the file to treat the"
            " folder as any Hugging Face model"
        ) from None


def export(run: str | Path, output: str | Path) -> Path:
    """Copy the model of a finished run to `output` as a Hugging Face folder, a LoRA adapter merged into its base.

    Safetensors, tokenizer, card and `caldpo.json`; the folder appears whole or not at all. Raises InputError for a run
    that has not finished and for an output that holds something.
    """
    if is_remote(output):
        raise InputError(f"--output {output}: must be a folder; copy it to object storage from there")
    source, target = RunDir(open_path(run).absolute()), open_path(output).absolute()
    with reaching("run", run):
        _require_complete(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--output {output}: exists already and is never overwritten; give a new or an empty folder")
    try:
        _write_model(source, target)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error}); give a writable folder") from None
    say(f"model in {output}")
    return target


def _require_complete(run: RunDir) -> None:
    if not run.config.exists():
        raise InputError(
            f"run {run.path}: no run directory (no config.yaml in it); give the folder that `caldpo train` made"
        )
    state = run.read_status().get("state", "unknown")
    if state != "complete":
        raise InputError(f"run {run.path}: not finished (state: {state}); the same `caldpo train` command resumes it")
    if not holds_model(run.model):
        raise InputError(
            f"run {run.path}: model/ holds no whole model; the same `caldpo train` command writes it again from the last checkpoint"
        )


def _write_model(run: RunDir, target: Path) -> None:
    make_folder(target.parent)
    with reaching("run", run.path):
        model = local_copy(run.model)
    with publishing(target) as scratch:
        if (model / "adapter_config.json").exists():
            config = load_config(run.config)
            tell_of_code(config.model)
            digests = run.path.parent / ".cache" / "models.json"
            resolve_model(str(run.model), None, config.model.trust_remote_code, scratch, config.run.seed, digests)
            for name in CARRIED:
                shutil.copy2(model / name, scratch / name)
        else:
            shutil.copytree(model, scratch)
