"""The oracle everywhere is the unmodified Hugging Face model: its logits on [prompt | response], full log-softmax."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from caldpo_ray import scoring
from caldpo_ray.errors import InputError
from caldpo_ray.logprobs import TokenBatch, concatenated_batch, packed_batch, shared_prefix_batch
from caldpo_ray.schema import Row
from caldpo_ray.scoring import (
    PACKED_ATTENTION,
    ResponseScorer,
    attention_window,
    choose_layout,
    disable_dropout,
    score_rows,
)
from tests.unit.tiny_models import (
    FAMILIES,
    PACKABLE,
    PAD_ID,
    SHAREABLE,
    UNSHAREABLE,
    VOCAB_SIZE,
    random_rows,
    tiny_model,
)

LAYOUTS = [packed_batch, shared_prefix_batch, concatenated_batch]
MIXED_K = [(5, 4, 7), (1, 2, 6, 3, 1), (9, 2)]


def layouts_of(family: str) -> list[Callable[..., TokenBatch]]:
    return LAYOUTS if family in PACKABLE else LAYOUTS[1:] if family in SHAREABLE else LAYOUTS[2:]


def layout_model(family: str, layout: Callable[..., TokenBatch], **settings: Any) -> PreTrainedModel:
    """With the attention that the layout needs."""
    model = tiny_model(family, **settings)
    if layout is packed_batch:
        model.set_attn_implementation(PACKED_ATTENTION)
    return model


def oracle_sums(model: PreTrainedModel, rows: Sequence[Row], k: int) -> Tensor:
    """[rows, k] from one unpadded forward pass per response."""
    sums = []
    for row in rows:
        for response in row.response_ids:
            ids = torch.tensor(np.concatenate([row.prompt_ids, response]), dtype=torch.long)
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            logps = logits[:-1].float().log_softmax(-1).gather(-1, ids[1:, None])
            sums.append(logps[len(row.prompt_ids) - 1 :].sum())
        sums += [torch.tensor(0.0)] * (k - len(row.response_ids))
    return torch.stack(sums).view(len(rows), k)


def values_and_gradients(model: torch.nn.Module, sums: Tensor) -> dict[str, Tensor]:
    """The sums, and the gradient of a curved function of them by parameter name."""
    model.zero_grad()
    (sums / 10).sin().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"sums": sums.detach(), **grads}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Equal up to rounding, each tensor at its own scale."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        scale = max(want.abs().max().item(), 1e-3)
        assert (actual[name] - want).abs().max().item() <= tolerance * scale, name


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_and_gradients_equal_those_of_the_unmodified_model(family: str) -> None:
    model, rows = tiny_model(family), random_rows(*MIXED_K)
    expected = values_and_gradients(model, oracle_sums(model, rows, k=4))
    assert expected.keys() == {"sums", *(name for name, _ in model.named_parameters())}
    for layout in layouts_of(family):
        model = layout_model(family, layout)
        assert_same(values_and_gradients(model, ResponseScorer(model, PAD_ID)(layout(rows, PAD_ID), 1)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_and_gradient_checkpointing_change_nothing(family: str, layout: Callable[..., Any]) -> None:
    if layout not in layouts_of(family):
        pytest.skip("this family cannot be packed")
    model, batch = layout_model(family, layout, use_cache=False), layout(random_rows(*MIXED_K), PAD_ID)
    disable_dropout(model)
    scorer = ResponseScorer(model, PAD_ID)
    expected = values_and_gradients(model, scorer(batch, 1))
    scorer.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forwards: list[None] = []
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    first_leaf = next(module for module in layers[0].modules() if not list(module.children()))
    first_leaf.register_forward_pre_hook(lambda *_: forwards.append(None))
    assert_same(values_and_gradients(model, scorer(batch, 3)), expected)
    assert len(forwards) == 2  # backward ran the layer again, so checkpointing was really on


def test_logits_of_more_positions_than_a_chunk_never_exist() -> None:
    model, batch = tiny_model("llama"), shared_prefix_batch(random_rows(*MIXED_K), PAD_ID)
    rows_of_logits: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, logits: rows_of_logits.append(len(logits)))
    ResponseScorer(model, PAD_ID)(batch, 5).sum().backward()
    assert sum(rows_of_logits) == 2 * len(batch.target)  # only positions that predict a response, forward and backward
    assert max(rows_of_logits) <= -(-len(batch.target) // 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_scores_the_same_alone_and_in_a_batch(layout: Callable[..., Any]) -> None:
    rows, scorer = (
        random_rows((3, 2, 4), (20, 11, 9, 30), (1, 1)),
        ResponseScorer(layout_model("qwen3", layout), PAD_ID),
    )
    together = scorer(layout(rows, PAD_ID), 1)
    for row, sums in zip(rows, together, strict=True):
        alone = scorer(layout([row], PAD_ID), 1)[0]
        torch.testing.assert_close(alone, sums[: len(row.response_ids)], rtol=1e-6, atol=1e-5)
        assert not sums[len(row.response_ids) :].any()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "opt", "mamba"])
@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_rows_gives_every_parameter_a_zero_gradient(
    family: str, num_chunks: int, layout: Callable[..., TokenBatch]
) -> None:
    if layout not in layouts_of(family):
        pytest.skip("this family has no such layout")
    model = layout_model(family, layout)
    sums = ResponseScorer(model, PAD_ID)(layout([], PAD_ID), num_chunks)
    loss = torch.nn.functional.softplus(sums[:, 1] - sums[:, 0]).sum()
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# -- LoRA --------------------------------------------------------------------------------------------------------------


def with_lora(model: PreTrainedModel, targets: str | list[str]) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_fresh_adapter_scores_exactly_as_its_base(family: str) -> None:
    for layout in layouts_of(family):
        batch = layout(random_rows(*MIXED_K), PAD_ID)
        base = ResponseScorer(layout_model(family, layout), PAD_ID)(batch, 1)
        policy = with_lora(layout_model(family, layout), "all-linear")
        assert torch.equal(ResponseScorer(policy, PAD_ID)(batch, 1), base)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_trained_adapter_scores_as_the_peft_model_itself(targets: str | list[str]) -> None:
    torch.manual_seed(0)
    policy = with_lora(tiny_model("llama"), targets)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    scorer, rows = ResponseScorer(policy, PAD_ID), random_rows(*MIXED_K)
    expected = values_and_gradients(policy, oracle_sums(policy, rows, k=4))
    assert len(expected) > 1
    assert all("lora_" in name for name in expected.keys() - {"sums"})
    base = ResponseScorer(tiny_model("llama"), PAD_ID)(concatenated_batch(rows, PAD_ID), 1)
    assert (expected["sums"] - base).abs().max() > 0.1
    assert choose_layout(scorer).layout == "packed"  # from here on with the attention for it
    for layout in LAYOUTS:
        assert_same(values_and_gradients(policy, scorer(layout(rows, PAD_ID), 2)), expected)


# -- the self-check ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHAREABLE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_the_self_check_finds_that_a_prompt_can_be_shared(family: str, dtype: torch.dtype, bound: float) -> None:
    choice = choose_layout(ResponseScorer(tiny_model(family).to(dtype), PAD_ID))
    assert (choice.layout, choice.reason) == ("packed" if family in PACKABLE else "shared_prefix", "")
    assert choice.max_difference < bound


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "mamba has layers that do not go by the mask alone (linear_attention)"),
        ("bloom", "BloomModel cannot run this layout (ValueError"),
        ("mpt", "log-probs of MptModel differ from the model's own logits by"),
    ],
)
def test_the_self_check_falls_back_and_says_why(family: str, reason: str) -> None:
    assert family in UNSHAREABLE
    choice = choose_layout(ResponseScorer(tiny_model(family), PAD_ID))
    assert choice.layout == "concatenated"
    assert choice.reason.startswith(reason)
    assert choice.max_difference < 1e-5


def test_attention_without_dense_masks_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "DENSE_MASK_ATTENTION", {"eager"})  # as if SDPA were one of those that need a GPU
    choice = choose_layout(ResponseScorer(tiny_model("llama"), PAD_ID))
    assert (choice.layout, choice.reason) == ("concatenated", "attention implementation 'sdpa' takes no 4-D mask")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_self_check_sees_a_leak_between_responses(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(segment_ids: Tensor) -> Tensor:
        return torch.ones(segment_ids.shape[1], segment_ids.shape[1], dtype=torch.bool).tril().expand(2, 1, -1, -1)

    def one_response(pieces: Tensor, by_blocks: bool) -> Tensor:
        return torch.stack([pieces[:, 0], pieces[:, 1:].sum(1)], 1)[None, None]

    monkeypatch.setattr(scoring, "packed_mask", one_response)
    assert choose_layout(ResponseScorer(tiny_model(family), PAD_ID)).layout == "shared_prefix"
    monkeypatch.setattr(scoring, "shared_prefix_mask", leaky)
    assert "differ from the model's own logits" in choose_layout(ResponseScorer(tiny_model(family), PAD_ID)).reason


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere", "granite", "hyperclovax"])
def test_the_self_check_refuses_a_model_whose_logit_transform_is_missed(family: str) -> None:
    scorer = ResponseScorer(tiny_model(family), PAD_ID)
    scorer.logit_transform = lambda logits: logits
    with pytest.raises(InputError, match=r"log-probs of \w+Model differ from the model's own logits by [\d.]+ nats"):
        choose_layout(scorer)


def test_the_self_check_refuses_an_unknown_head_and_broken_weights() -> None:
    class Sharpened(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    with pytest.raises(InputError, match="LlamaModel"):
        choose_layout(ResponseScorer(Sharpened(tiny_model("llama").config).eval(), PAD_ID))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="nan"):
        choose_layout(ResponseScorer(broken, PAD_ID))


# -- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
def test_rows_beyond_a_sliding_window_are_concatenated(family: str) -> None:
    alternating = {} if family == "mistral" else {"layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model(family, sliding_window=12, **alternating)
    scorer = ResponseScorer(model, PAD_ID)
    scorer.layout = choose_layout(scorer).layout
    assert scorer.layout == ("packed" if family in PACKABLE else "shared_prefix")
    fitting, too_long = random_rows((5, 7, 7), (4, 2, 8)), random_rows((5, 7, 7), (4, 2, 9))
    for rows, shared in [(fitting, True), (too_long, False)]:
        batch = scorer.batch(rows)
        assert (batch.position_ids is not None) == shared
        torch.testing.assert_close(scorer(batch, 1), oracle_sums(model, rows, k=2), rtol=1e-5, atol=1e-5)
    far_too_long = random_rows((9, 8, 12))
    wrong = scorer(shared_prefix_batch(far_too_long, PAD_ID), 1)
    assert (wrong - oracle_sums(model, far_too_long, k=2)).abs().max() > 0.01  # the routing is needed


def test_a_row_with_nothing_to_share_and_a_scorer_that_must_not_share_concatenate() -> None:
    pair, single = random_rows((3, 2, 2), (4, 5))
    scorer = ResponseScorer(tiny_model("llama"), PAD_ID)
    assert scorer.batch([pair]).position_ids is None
    scorer.layout = "shared_prefix"
    assert scorer.batch([single]).position_ids is None
    assert scorer.batch([pair, single]).position_ids is not None
    scorer.layout = "packed"
    assert scorer.batch([single]).pieces is not None, "which pads nothing even so"


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 64}, 64),
        ("qwen2", {"sliding_window": 64}, None),  # off unless use_sliding_window
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("gemma3_text", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ("gemma3_text", {"sliding_window": 64, "layer_types": ["full_attention", "full_attention"]}, None),
    ],
)
def test_attention_window(family: str, settings: dict[str, Any], window: int | None) -> None:
    assert attention_window(tiny_model(family, **settings).config) == window


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_score_rows_returns_plain_numbers() -> None:
    scorer, rows = ResponseScorer(tiny_model("llama"), PAD_ID, "shared_prefix"), random_rows(*MIXED_K)
    sums = score_rows(scorer, rows, 3)
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, oracle_sums(scorer.model, rows, k=4).detach(), rtol=1e-5, atol=1e-5)


DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "residual_dropout",
    "dropout",
)


@pytest.mark.parametrize("family", SHAREABLE)
def test_without_dropout_train_mode_scores_as_eval_mode(family: str) -> None:
    settings = dict.fromkeys(DROPOUTS, 0.5)
    if family == "opt":
        settings["layerdrop"] = 0.5
    model = tiny_model(family, **settings)
    kept = model.config.to_dict()
    scorer, batch = ResponseScorer(model, PAD_ID), concatenated_batch(random_rows(*MIXED_K), PAD_ID)
    expected = scorer(batch, 1)
    scorer.train()
    before = scorer(batch, 1)
    disable_dropout(model)
    assert not torch.equal(before, expected)  # there was dropout to switch off
    assert torch.equal(scorer(batch, 1), expected)
    assert model.config.to_dict() == kept  # an exported model keeps the user's settings


# -- one model over several devices --------------------------------------------------------------------------------------


def device_map(model: PreTrainedModel, first: Any, last: Any) -> dict[str, Any]:
    """The second layer and what comes after it on another device; a tied head stays with the embedding."""
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    places: dict[str, Any] = {}
    for name, child in model.get_decoder().named_children():
        if isinstance(child, torch.nn.ModuleList):
            places |= {f"{decoder}.{name}.{number}": (first, last)[number] for number in range(len(child))}
        else:
            places[f"{decoder}.{name}"] = last if name in ("norm", "ln_f", "final_layer_norm") else first
    return places | {"lm_head": first if model.config.tie_word_embeddings else last}


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_model_of_which_parts_are_elsewhere_scores_the_same(family: str, num_chunks: int, tmp_path: Path) -> None:
    """Their weights are on disk until accelerate's hook of the module runs: nothing may read one outside of its module."""
    whole, rows = tiny_model(family), random_rows(*MIXED_K)
    whole.save_pretrained(tmp_path)
    options = {"device_map": device_map(whole, "cpu", "disk"), "offload_folder": tmp_path / "offload"}
    parted = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=whole.config._attn_implementation, **options
    ).eval()
    assert {parameter.device.type for parameter in parted.parameters()} == {"cpu", "meta"}
    scorers = [ResponseScorer(model, PAD_ID) for model in (whole, parted)]
    for scorer in scorers:
        scorer.layout = choose_layout(scorer).layout
        assert scorer.layout == ("packed" if family in PACKABLE else "shared_prefix")
    for batch in ([rows[0]], rows):
        np.testing.assert_array_equal(*(score_rows(scorer, batch, num_chunks) for scorer in scorers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_layers_on_two_devices(family: str) -> None:
    from accelerate import dispatch_model

    whole, parted, rows = tiny_model(family), tiny_model(family), random_rows(*MIXED_K)
    dispatch_model(parted, device_map(parted, "cpu", 0), main_device="cpu")
    assert {parameter.device.type for parameter in parted.parameters()} == {"cpu", "cuda"}
    scorers = [ResponseScorer(model, PAD_ID) for model in (whole, parted)]
    for scorer in scorers:
        scorer.layout = choose_layout(scorer).layout
        assert scorer.layout == ("packed" if family in PACKABLE else "shared_prefix")
    np.testing.assert_allclose(*(score_rows(scorer, rows, 3) for scorer in scorers), atol=1e-3)


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    scorer = ResponseScorer(tiny_model("llama"), PAD_ID)
    rows = random_rows((3, 2, 2))
    rows[0].response_ids[1][0] = VOCAB_SIZE - 1
    score_rows(scorer, rows, 1)
    rows[0].response_ids[1][0] = VOCAB_SIZE
    with pytest.raises(InputError, match=rf"token id {VOCAB_SIZE}, but its vocabulary has {VOCAB_SIZE} tokens"):
        score_rows(scorer, rows, 1)
