import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from caldpo_ray.config import LoraSection, ModelSection
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.models import ResolvedModel, add_lora, load_model, recall_model, resolve_model
from caldpo_ray.storage import is_complete, open_path, publishing


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
                parameter.normal_()
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
