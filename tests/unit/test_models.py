import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from caldpo_ray.config import LoraSection, ModelSection
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.models import (
    ResolvedModel,
    add_lora,
    empty_model,
    holds_model,
    load_model,
    load_tokenizer,
    recall_model,
    resolve_model,
    save_tokenizer,
)
from caldpo_ray.storage import is_complete, open_path, publishing
from tests.unit.tiny_models import FAMILIES, tiny_model


@pytest.fixture(scope="module")
def drawn(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, drawn from the world's config."""
    root = tmp_path_factory.mktemp("drawn")
    return Path(resolve(world / "model", root).path)


def resolve(folder: Path, root: Path, seed: int = 0) -> ResolvedModel:
    return resolve_model(str(folder), None, False, root / "init", seed, root / "models.json")


def test_a_config_alone_is_drawn_once_from_the_seed(world: Path, tmp_path: Path) -> None:
    found = [resolve(world / "model", tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert found[0].weights == found[1].weights != found[2].weights
    assert found[0].path != found[1].path
    before = (tmp_path / "a" / "init" / "model.safetensors").stat().st_mtime_ns
    assert resolve(world / "model", tmp_path / "a") == found[0]
    assert (tmp_path / "a" / "init" / "model.safetensors").stat().st_mtime_ns == before


def test_a_model_is_its_content_not_its_path(drawn: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drawn, copy)
    assert resolve(copy, tmp_path).weights == resolve(drawn, tmp_path / "other").weights
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert resolve(copy, tmp_path).weights != resolve(drawn, tmp_path / "other").weights


def test_what_is_recalled_forgets_a_changed_file(drawn: Path, tmp_path: Path) -> None:
    copy, cache = tmp_path / "copy", tmp_path / "models.json"
    shutil.copytree(drawn, copy)
    assert recall_model(str(copy), tmp_path / "init", cache) is None
    found = resolve(copy, tmp_path)
    assert recall_model(str(copy), tmp_path / "init", cache) == found
    (copy / "tokenizer_config.json").touch()
    assert recall_model(str(copy), tmp_path / "init", cache) is None


def published(folder: Path, url: str) -> str:
    with publishing(open_path(url)) as scratch:
        shutil.copytree(folder, scratch)
    return url


def test_a_model_on_object_storage_is_the_same_model(
    world: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = open_path(f"memory://{tmp_path.name}")
    config = published(world / "model", f"{root}/config")
    found = [resolve_model(config, None, False, root / "init", 0, root / "models.json") for _ in range(2)]
    assert found[0] == found[1] and found[0].path == f"{root}/init" and is_complete(root / "init")
    assert found[0].weights == resolve(drawn, tmp_path).weights
    assert recall_model(config, root / "init", root / "models.json") == found[0]
    with pytest.raises(InputError, match=r"model\.name_or_path memory://nothing: no such folder"):
        resolve(open_path("memory://nothing"), tmp_path)


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "object storage"])
def test_an_adapter_is_merged_first(drawn: Path, tmp_path: Path, remote: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    section = ModelSection(name_or_path=published(drawn, f"memory://{tmp_path.name}/base") if remote else str(drawn))
    adapted = add_lora(load_model(section, "float32"), LoraSection(r=2), seed=0)
    plain = load_model(section, "float32")
    ids = torch.arange(5, 12)[None]
    assert torch.equal(adapted(ids).logits, plain(ids).logits), "a fresh adapter has no effect"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    shutil.copy(drawn / "tokenizer.json", tmp_path / "adapter")
    shutil.copy(drawn / "tokenizer_config.json", tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == section.name_or_path, "never the copy on this node"
    adapter = open_path(
        published(tmp_path / "adapter", f"memory://{tmp_path.name}/adapter") if remote else tmp_path / "adapter"
    )
    found = resolve(adapter, tmp_path)
    merged = load_model(ModelSection(name_or_path=found.path), "float32")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_initialisations_that_change_the_base_are_refused() -> None:
    with pytest.raises(ValueError, match="init"):
        LoraSection.model_validate({"init": "pissa"})


def test_unknown_models_and_targets_are_named(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/nowhere: no such folder"):
        resolve(Path("/nowhere"), tmp_path)
    with pytest.raises(InputError, match="target_modules"):
        add_lora(
            load_model(ModelSection(name_or_path=str(drawn)), "float32"), LoraSection(target_modules=["nothing"]), 0
        )


def test_a_hub_that_cannot_be_reached_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(NotReady, match="no/such-model: no such folder here, and the hub cannot be reached"):
        resolve(Path("no/such-model"), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine on which no layer finds a GPU")
def test_a_reference_that_spills_over_its_gpus_is_refused(drawn: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit the 0 GPUs of an actor; raise reference\.num_gpus_per_actor"):
        load_model(ModelSection(name_or_path=str(drawn)), "float32", over_gpus=True)


# -- folders that no model can be read from: one message that names the folder and crosses Ray ----------------------


def _set(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Tensors replaced, added, or with None taken away; dots are written as two underscores."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in changed.items()}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _as_bin(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "its config.json describes no model"),
    "config is cut off": (lambda f: (f / "config.json").write_text('{"model_type": "ll'), "its config.json describes"),
    "no causal model": (lambda f: (f / "config.json").write_text('{"model_type": "t5"}'), "T5Config"),
    "sizes that do not fit": (lambda f: _set(f, hidden_size=97), r"hidden size \(97\) is not a multiple"),
    "a size that is text": (lambda f: _set(f, hidden_size="big"), "expected int, got str"),
    "more layers than weights": (lambda f: _set(f, num_hidden_layers=5), r"\d+ missing: model\.layers\.\d"),
    "fewer layers than weights": (lambda f: _set(f, num_hidden_layers=1), r"\d+ unknown to it: model\.layers\.\d"),
    "another width": (lambda f: _set(f, intermediate_size=24), r"\d+ of another shape: .*instead of"),
    "a tensor too few": (lambda f: _rewrite(f, lm_head__weight=None), "1 missing: lm_head.weight"),
    "a tensor too many": (lambda f: _rewrite(f, v_head__weight=torch.zeros(3)), "1 unknown to it: v_head.weight"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "damaged",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"junk" * 99), "model.safetensors is damaged"),
    "no torch file": (lambda f: _as_bin(f, b"junk" * 99), "pytorch_model.bin is damaged"),
    "an empty torch file": (lambda f: _as_bin(f, b""), "pytorch_model.bin is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_message(name: str, drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(drawn, folder)
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(InputError, match=rf"^model\.name_or_path {folder}: .*{message}") as found:
        resolve(folder, tmp_path)
    assert "\n" not in str(found.value) and pickle.loads(pickle.dumps(found.value)).args == found.value.args
    assert not isinstance(found.value, NotReady), "it stays wrong until somebody changes the folder"
    with pytest.raises(InputError):
        load_model(ModelSection(name_or_path=str(folder)), "float32")


@pytest.mark.parametrize("settings", [{"hidden_size": 97}, {"hidden_size": "big"}, {"model_type": "t5"}])
def test_a_config_alone_that_describes_no_model(world: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(world / "model", folder)
    _set(folder, **settings)
    with pytest.raises(InputError, match=rf"^model\.name_or_path {folder}: "):
        resolve(folder, tmp_path)
    assert not (tmp_path / "init").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_leaves_out_of_its_files_is_not_missing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    empty = empty_model(str(tmp_path), None, False)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters())


def test_tied_weights_and_masks_of_old_checkpoints_are_not_missing(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(drawn, folder)
    _set(folder, tie_word_embeddings=True)
    _rewrite(folder, lm_head__weight=None, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(3))
    resolve(folder, tmp_path)
    model = load_model(ModelSection(name_or_path=str(folder)), "float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


ADAPTERS: dict[str, tuple[dict[str, object] | str, str]] = {
    "its base is gone": ({"base_model_name_or_path": "/gone"}, "cannot be merged into the base .*/gone"),
    "it names no base": ({"base_model_name_or_path": None}, "cannot be merged into the base"),
    "it names no kind": ({"peft_type": "nothing"}, "cannot be merged into the base"),
    "it is a list": ("[]", "cannot be merged into the base"),
    "it is cut off": ('{"peft_type": "LO', "cannot be merged into the base"),
    "it has other targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "Found missing adapter keys"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_one_message(name: str, drawn: Path, tmp_path: Path) -> None:
    settings, message = ADAPTERS[name]
    section = ModelSection(name_or_path=str(drawn))
    folder = tmp_path / "adapter"
    add_lora(load_model(section, "float32"), LoraSection(r=2, target_modules=["q_proj"]), 0).save_pretrained(folder)
    load_tokenizer(str(drawn), None, False).save_pretrained(folder)
    file = folder / "adapter_config.json"
    text = settings if isinstance(settings, str) else json.dumps(json.loads(file.read_text()) | settings)
    file.write_text(text)
    with pytest.raises(InputError, match=rf"^model\.name_or_path {folder}: .*{message}") as found:
        resolve(folder, tmp_path)
    assert pickle.loads(pickle.dumps(found.value)).args == found.value.args
    assert not (tmp_path / "init").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": {}, "b": []}'])
def test_a_damaged_memory_of_models_is_written_anew(drawn: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "models.json"
    cache.write_text(content)
    assert recall_model(str(drawn), tmp_path / "init", cache) is None
    found = resolve(drawn, tmp_path)
    assert recall_model(str(drawn), tmp_path / "init", cache) == found


def test_the_template_of_the_data_is_saved_with_the_tokenizer(drawn: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    save_tokenizer(ModelSection(name_or_path=str(drawn)), template, tmp_path / "with")
    assert load_tokenizer(str(tmp_path / "with"), None, False).chat_template == template
    save_tokenizer(ModelSection(name_or_path=str(tmp_path / "with")), None, tmp_path / "kept")
    assert load_tokenizer(str(tmp_path / "kept"), None, False).chat_template == template


def test_whether_a_folder_holds_a_model(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert not holds_model(folder)
    shutil.copytree(drawn, folder)
    assert holds_model(folder)
    (folder / "model.safetensors").unlink()
    assert not holds_model(folder)
    (folder / "adapter_model.safetensors").touch()
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert holds_model(folder)
