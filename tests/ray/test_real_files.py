"""Preference files as people have them, through `preview` and `reference build`. None of them is part of the project."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from caldpo_ray.cli import main
from caldpo_ray.rows import RowCache

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# What runs together: files, overrides, usable rows, responses of a row. The format of the first three is recognised row by row.
SOURCES: dict[str, tuple[list[str], list[str], int, int]] = {
    "recognised": (
        [
            "llama-factory/dpo_en_demo.json.gz",
            "llama-factory/dpo_zh_demo.json.gz",
            "llms-from-scratch/instruction-data-with-preference.json",
        ],
        ["data.max_length=2048"],
        300 + 300 + 1094,
        2,
    ),
    "by a row function": (
        ["fine-grained-rlhf/qa_feedback_dev.json.gz"],
        ["data.format=examples.row_functions:fine_grained_rlhf"],
        488,
        4,
    ),
}


def texts(file: Path) -> Iterator[str]:
    yield gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that can write any text, with a chat template, and a model small enough to score all rows in seconds."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    files = [DATA / name for names, *_ in SOURCES.values() for name in names]
    found = [text for file in files if file.exists() for text in texts(file)]
    tokenizer.train_from_iterator(found, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("source", SOURCES)
def test_preview_and_reference_build(
    source: str,
    model: Path,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, overrides, num_rows, k = SOURCES[source]
    folder = tmp_path / "files"
    folder.mkdir()
    for name in files:
        if not (DATA / name).exists():
            pytest.skip(f"needs {name}, which is not part of the project")
        (folder / Path(name).name).symlink_to(DATA / name)
    values = {
        "run": {"output_dir": str(tmp_path)}, "model": {"name_or_path": str(model)}, "data": {"train": str(folder)},
        "objective": {"name": "cal_dpo", "beta": 0.1},
    }  # fmt: skip
    config = tmp_path / "real.yaml"
    config.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(ROOT)  # where `examples.row_functions` is found
    for command in (
        ["preview", str(config), *overrides, "-n", "2"],
        ["reference", "build", str(config), *overrides, "reference.num_cpus_per_actor=2"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        output = capsys.readouterr()
        assert stopped.value.code == 0, output.err
    said = output.out.splitlines()
    assert "reference: complete in" in said[-1]
    (cache,) = (path.parent for path in tmp_path.glob(".cache/rows/*/manifest.json"))
    rows = RowCache([cache])
    assert len(rows) == num_rows, said
    assert rows.response_counts().tolist() == [k] * num_rows
