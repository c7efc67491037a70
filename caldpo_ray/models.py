"""Models as this project needs them: resolved to one place and one digest, loaded frozen or trainable, saved for Hugging Face.

The policy before its first step is the reference, so both are loaded from the same files by `load_model`. A folder with only
a config, or a LoRA adapter, is turned into plain weights once (`<run>/init/`), and both sides read those.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from caldpo_ray.compute.imports import large_imports
from caldpo_ray.config import LoraSection, ModelSection
from caldpo_ray.errors import InputError, NotReady, RunError, last_line
from caldpo_ray.reporting.progress import say
from caldpo_ray.storage import (
    file_facts,
    is_complete,
    is_remote,
    local_copy,
    local_name,
    make_folder,
    open_path,
    publishing,
    reaching,
    read_bytes,
    write_atomically,
)
from caldpo_ray.tokenization import check_tokenizer

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
# Masks and positions that old versions of transformers saved with the weights; they are computed now.
NO_WEIGHTS = re.compile(r"(^|\.)(attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids)$")
NO_CAUSAL_LM = "cannot be loaded as a causal language model"
NO_MERGE = "its LoRA adapter cannot be merged into the base that adapter_config.json names"
VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is and what it is: `path` and `revision` for from_pretrained, and digests of what they hold."""

    path: str
    revision: str | None
    weights: str
    tokenizer: str
    """Digest of what the tokenizer does with text."""
    vocabulary: str
    """Digest of its token ids alone."""


@large_imports()
def resolve_model(
    name_or_path: str, revision: str | None, trust_remote_code: bool, init_dir: Path, seed: int, cache: Path
) -> ResolvedModel:
    """Find a model's weights, drawing or merging them into `init_dir` where the folder has none of its own.

    Raises InputError for a folder without config, an unreadable file, weights that are not those the config describes, or a
    tokenizer that is missing or has no EOS, and NotReady for a hub that cannot be reached or does not give the model out.
    """
    folder = open_path(name_or_path)
    if not folder.is_dir():
        commit = _hub_commit(name_or_path, revision)
        digests = _tokenizer_digests(name_or_path, commit, trust_remote_code)
        return ResolvedModel(name_or_path, commit, f"hub:{name_or_path}@{commit}", *digests)
    if (recalled := recall_model(name_or_path, init_dir, cache)) is not None:
        return recalled
    given, is_adapter = folder, (folder / "adapter_config.json").exists()
    if not is_adapter and not (folder / "config.json").exists():
        raise InputError(f"model.name_or_path {folder}: no config.json; give a Hugging Face model folder or a hub id")
    digests = _tokenizer_digests(name_or_path, None, trust_remote_code)
    if is_adapter:
        _write_once(init_dir, lambda target: _merge_adapter(name_or_path, target, trust_remote_code))
        folder = init_dir
    elif not _weight_files(folder):
        _write_once(init_dir, lambda target: _draw_weights(name_or_path, target, seed, trust_remote_code))
        folder = init_dir
    empty_model(str(folder), None, trust_remote_code)
    found = ResolvedModel(str(folder.resolve()), None, _digest_folder(local_copy(folder)), *digests)
    _remember(found, cache, *([given] if folder == given else [given, init_dir]))
    return found


def _tokenizer_digests(path: str, revision: str | None, trust_remote_code: bool) -> tuple[str, str]:
    """(what the tokenizer does with text, its token ids alone)."""
    tokenizer = load_tokenizer(path, revision, trust_remote_code)
    check_tokenizer(tokenizer, needs_chat_template=False)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    steps = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else vocabulary
    text = json.dumps([steps, str(tokenizer.chat_template), sorted(map(str, tokenizer.special_tokens_map.items()))])
    return _digest(text), _digest(vocabulary)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pinned_revision(name_or_path: str, revision: str | None) -> str | None:
    """The commit of a hub model, None for a folder; no file is read. Raises InputError or NotReady where there is neither."""
    return None if open_path(name_or_path).is_dir() else _hub_commit(name_or_path, revision)


def _hub_commit(name: str, revision: str | None) -> str | None:
    """The commit a hub id stands for now, or, without network, the one downloaded earlier."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if name.startswith(("/", ".", "~")) or is_remote(name):
        raise InputError(f"model.name_or_path {name}: no such folder")
    try:
        commit = model_info(name, revision=revision, timeout=20).sha
    except HFValidationError:
        raise InputError(
            f"model.name_or_path {name}: neither a folder nor a hub id of the form organisation/name"
        ) from None
    except HfHubHTTPError as error:
        raise NotReady(f"model.name_or_path {name}: the hub has no such model or refuses access: {error}") from None
    except Exception as error:  # no network: the exception is that of the HTTP library this hub client happens to use
        commit = _cached_commit(name, revision)
        if commit is None:
            reason = f"{type(error).__name__}: {last_line(error)}"
            raise NotReady(
                f"model.name_or_path {name}: no such folder here, and the hub cannot be reached ({reason}); give a local folder"
            ) from None
    return str(commit) if commit is not None else None


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model downloaded earlier, for hosts without network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))


def _digest_folder(folder: Path) -> str:
    """Digest of config and weights by content, whatever the folder is called."""
    settings = {
        k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in VOLATILE_CONFIG_KEYS
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in _weight_files(folder):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def recall_model(name_or_path: str, init_dir: Path, cache: Path) -> ResolvedModel | None:
    """What `resolve_model` found for this folder before, if no file has changed since; it loads nothing."""
    known, folder = _remembered(cache), open_path(name_or_path)
    with reaching("model.name_or_path", name_or_path):
        entry = known.get(_signature(folder)) or known.get(_signature(folder, init_dir))
    return None if entry is None else ResolvedModel(**entry)


def _remember(found: ResolvedModel, cache: Path, *folders: Path) -> None:
    make_folder(cache.parent)
    write_atomically(cache, json.dumps(_remembered(cache) | {_signature(*folders): asdict(found)}, indent=1))


def _signature(*folders: Path) -> str:
    """Digest of names, sizes and times of change of the files in these folders."""
    return _digest(json.dumps([[str(folder.absolute()), *file_facts(folder)] for folder in folders]))


def _remembered(cache: Path) -> dict[str, Any]:
    """What `_remember` wrote; what somebody else made of the file counts as nothing, and is written over."""
    try:
        known = json.loads(read_bytes(cache))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    names = {field.name for field in fields(ResolvedModel)}
    return (
        {key: v for key, v in known.items() if isinstance(v, dict) and v.keys() == names}
        if isinstance(known, dict)
        else {}
    )


def _write_once(target: Path, write: Any) -> None:
    """Fill a folder completely or not at all; a finished one is kept."""
    if not is_complete(target):
        with publishing(target) as scratch:
            write(scratch)


def _draw_weights(path: str, target: Path, seed: int, trust_remote_code: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _reading(path, NO_CAUSAL_LM), _quiet():
        config = AutoConfig.from_pretrained(local_name(path), trust_remote_code=trust_remote_code)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    _save(model, path, target, trust_remote_code)


def _merge_adapter(path: str, target: Path, trust_remote_code: bool) -> None:
    empty_model(path, None, trust_remote_code)
    with _reading(path, NO_MERGE), _quiet(), _with_local_base(local_copy(open_path(path))) as (adapter, _):
        from peft import AutoPeftModelForCausalLM

        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be drawn at random
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=trust_remote_code)
        merged = model.merge_and_unload()
    _save(merged, path, target, trust_remote_code)


def _save(model: Any, path: str, target: Path, trust_remote_code: bool) -> None:
    with _quiet():
        model.save_pretrained(target)
    load_tokenizer(path, None, trust_remote_code).save_pretrained(target)


@contextmanager
def _with_local_base(adapter: Path) -> Iterator[tuple[Path, str]]:
    """The adapter's folder, or a copy of it that names the copy on this node of a base on object storage; and the base."""
    settings = json.loads(read_bytes(adapter / "adapter_config.json"))
    base = settings["base_model_name_or_path"]
    if not isinstance(base, str):
        raise ValueError(f"base_model_name_or_path is {base!r}")
    if not is_remote(base):
        yield adapter, base
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        here = local_name(base)
        (Path(folder) / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": here}))
        yield Path(folder), here


def tell_of_code(model: ModelSection) -> None:
    """Said by every command that is about to load a model, before it runs what came with that."""
    if model.trust_remote_code:
        say(
            "model.trust_remote_code is on: Python code that comes with the model runs wherever it is loaded, with your permissions"
        )


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder or hub id. Raises InputError when there is none (NotReady: the hub has none)."""
    from transformers import AutoConfig, AutoTokenizer

    if (open_path(path) / "config.json").exists():  # which the tokenizer's class depends on, too
        with _reading(path, "its config.json describes no model; mend it"):
            AutoConfig.from_pretrained(local_name(path), trust_remote_code=trust_remote_code)
    with _reading(path, "no usable tokenizer; save one beside the model"):
        return AutoTokenizer.from_pretrained(local_name(path), revision=revision, trust_remote_code=trust_remote_code)


def save_tokenizer(model: ModelSection, chat_template: str | None, folder: Path) -> None:
    """Write the tokenizer of a model into a folder; with the template of the data where they named one."""
    tokenizer = load_tokenizer(model.name_or_path, model.revision, model.trust_remote_code)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def holds_model(folder: Path) -> bool:
    """Whether a folder that a run published is there with a config (or that of an adapter) and weights in it."""
    has_config = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    return is_complete(folder) and has_config and bool(_weight_files(folder))


@contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Whatever libraries raise at a model that they cannot read comes out as one message that names it, and that pickles.

    Passed on is what a retry may cure: too little memory, or a peer that died inside a collective operation.
    """
    try:
        yield
    except (InputError, RunError, MemoryError):
        raise
    except Exception as error:
        import torch

        among_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and among_ranks):
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise _model_error(path)(
                f"model.name_or_path {path}: it comes with Python code of its own, which runs only with model.trust_remote_code ="
                " true; read that code before you set it"
            ) from None
        raise _model_error(path)(
            f"model.name_or_path {path}: {what} ({type(error).__name__}: {reason[:300]})"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and progress bars: what is wrong with a model comes out as our own message."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def _model_error(path: str) -> type[InputError]:
    """A folder stays broken until somebody mends it; what the hub does not give out now it may give out later."""
    return InputError if is_remote(path) or Path(path).is_dir() else NotReady


def empty_model(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The causal LM without memory for its weights (meta tensors); of a LoRA adapter its base.

    Raises InputError for a config that describes none, and for weights in the folder that are damaged or not those that the
    config describes (quantised ones apart: their format is read on a GPU).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_utils import load_state_dict

    if (open_path(path) / "adapter_config.json").exists():
        return _empty_base(path, trust_remote_code)
    with _reading(path, NO_CAUSAL_LM), _quiet():
        name = local_name(path)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        files = _weight_files(Path(name))
        if not files or "quantization_config" in config.to_dict():
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        for file in files:
            with _reading(path, f"{file.name} is damaged; put it there again"):
                load_state_dict(str(file), map_location="meta")
        model, found = _from_pretrained(name, {"device_map": "meta", "trust_remote_code": trust_remote_code})
    _require_all_weights(path, found)
    return model


def _empty_base(path: str, trust_remote_code: bool) -> Any:
    with _reading(path, NO_MERGE), _with_local_base(local_copy(open_path(path))) as (_, base):
        try:
            return empty_model(base, None, trust_remote_code)
        except InputError as error:
            raise type(error)(f"model.name_or_path {path}: {NO_MERGE}: {error}") from None


def _from_pretrained(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and what of its weights was missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        name, ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    return loaded[0], loaded[1]


def _require_all_weights(path: str, found: dict[str, Any]) -> None:
    """transformers draws at random what is missing or of another shape, and leaves out what is unexpected."""
    unexpected = [name for name in found["unexpected_keys"] if not NO_WEIGHTS.search(name)]
    mismatched = [f"{name} {tuple(has)} instead of {tuple(wants)}" for name, has, wants in found["mismatched_keys"]]
    for what, names in (
        ("missing", found["missing_keys"]),
        ("of another shape", mismatched),
        ("unknown to it", unexpected),
    ):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise _model_error(path)(
                f"model.name_or_path {path}: its weights are not those that its config.json describes; {len(names)} {what}:"
                f" {listed}; give the config and the weights of one model"
            )


def load_model(model: ModelSection, dtype: str, over_gpus: bool = False) -> Any:
    """The causal LM in eval mode with dropout off, LoRA not applied; `over_gpus` spreads its layers over all visible GPUs.

    Raises InputError or NotReady naming what is broken.
    """
    import torch

    from caldpo_ray.scoring import disable_dropout

    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if over_gpus:
        options["device_map"] = "balanced"
    with _reading(model.name_or_path, NO_CAUSAL_LM):
        loaded, found = _from_pretrained(local_name(model.name_or_path), {"revision": model.revision, **options})
    _require_all_weights(model.name_or_path, found)
    loaded.name_or_path = model.name_or_path  # an adapter writes it down as its base: never the copy on this node
    if over_gpus and any(parameter.device.type != "cuda" for parameter in loaded.parameters()):
        raise InputError(
            f"reference {model.name_or_path}: does not fit the {torch.cuda.device_count()} GPUs of an actor; raise"
            " reference.num_gpus_per_actor"
        )
    loaded.config.use_cache = False
    disable_dropout(loaded)
    return loaded.eval()


def add_lora(model: Any, lora: LoraSection, seed: int) -> Any:
    """Wrap the model with a fresh adapter that has no effect yet, so that the base stays the reference."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        init_lora_weights=True if lora.init == "default" else lora.init,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, settings)
        except ValueError as error:
            raise InputError(f"model.lora.target_modules = {lora.target_modules!r}: {error}") from None
