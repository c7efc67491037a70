"""The arithmetic of machines that are not here, against a few lines worked out by hand."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.cli import main
from caldpo_ray.cluster.paper import UTILISATION, one_step, paper_lines
from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError
from caldpo_ray.schema import Row

HIDDEN, INNER, LAYERS, VOCAB = 256, 512, 4, 1000
MATRICES = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)  # of a Llama with as many heads of keys as of queries
GPU = "NVIDIA H100 80GB"
PEAK = 989.4e12
ROWS = [
    Row("a", np.zeros(100, np.int32), [np.zeros(50, np.int32), np.zeros(50, np.int32)], np.full(2, np.nan, np.float32))
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    shape = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{name_or_path: {tmp_path}/model, dtype: bfloat16}}\ndata: {{train: d}}\nobjective: {{name: dpo}}\n"
        "train: {num_workers: 8, batch_size: 64, micro_batch_tokens: 400, deepspeed: {zero_stage: 3}, save_every: 10}\n"
    )
    return load_config(path)


def test_a_step_is_forward_and_backward_of_its_rows(config: Config) -> None:
    step = one_step(config, PEAK, ROWS)
    pairs = 100**2 + 2 * 50 * 150
    forward = 2 * MATRICES * 200 + 4 * HIDDEN * LAYERS * pairs
    head = 2 * HIDDEN * VOCAB * 100
    assert step.reference_flops == pytest.approx(64 * (forward + head))
    assert step.policy_flops == pytest.approx(64 * 3 * (forward + head)), "backward is twice the forward"
    assert (step.rows, step.tokens, step.micro_batches) == (64, 64 * 200, 4)
    assert step.seconds == pytest.approx(step.policy_flops / (8 * PEAK * UTILISATION))


def lines(config: Config, *overrides: str, rows: int | None = 640) -> str:
    values: dict[str, Any] = config.model_dump(mode="json")
    for override in overrides:
        key, _, value = override.partition("=")
        values["train"]["deepspeed"][key] = json.loads(value)
    return "\n".join(paper_lines(Config.model_validate(values), GPU, ROWS, rows))


def test_network_and_storage_are_counted_in_weights(config: Config) -> None:
    weights = MATRICES + 2 * HIDDEN * VOCAB + (2 * LAYERS + 1) * HIDDEN
    moved = 2 * weights * 7 / 8  # bfloat16, all but a worker's own eighth
    for stage, times in ((3, 4 * 3), (2, 4 + 1), (1, 2)):
        found = lines(config, f"zero_stage={stage}")
        assert f"ZeRO-{stage}: {times * moved / 2**20:.1f} MiB in and out of each worker" in found, found
    state = weights * (2 + 12)  # as it is trained, and in float32 with Adam's two
    assert f"a checkpoint {state / 2**20:.1f} MiB" in lines(config) and "every 0 min" in lines(config)
    by_the_clock = config.model_copy(update={"train": config.train.model_copy(update={"save_every": None})})
    assert f"every 10 min, {state / 600 / 1e9:.2f} GB/s on average" in lines(by_the_clock)


def test_the_reference_needs_a_third_or_a_quarter_of_the_policys_gpus(config: Config) -> None:
    assert "keeps up with 3.0 policy GPUs" in (found := lines(config)) and "so 3 for 8, 3 actors of 1 each" in found
    assert "10 steps for 640 rows" in found and "keep" in found


def test_a_gpu_that_nobody_knows_is_refused(config: Config) -> None:
    with pytest.raises(InputError, match=r"--on-paper Tricorder: no bfloat16 speed is known of it; known are B200"):
        list(paper_lines(config, "Tricorder", ROWS, None))


def test_plan_on_paper_asks_no_cluster(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{name_or_path: {world}/model}}\ndata: {{train: {world}/train.jsonl}}\nobjective: {{name: dpo}}\n"
        f"run: {{output_dir: {tmp_path}/runs}}\ntrain: {{num_workers: 512, batch_size: 512}}"
    )
    monkeypatch.setattr("caldpo_ray.plan.connect", lambda verbose: pytest.fail("a cluster was asked"))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(path), "--on-paper", GPU])
    assert stopped.value.code == 0 and "512 policy GPUs" in capsys.readouterr().out


def test_the_page_of_limits_is_what_plan_says() -> None:
    file = Path(__file__).parents[2] / "examples" / "limits" / "make_page.py"
    spec = importlib.util.spec_from_file_location("make_page", file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.page() == made.PAGE.read_text(), "run python examples/limits/make_page.py"
