"""Sampling from a policy: after any prompt, and on the embedded world, where every response can be judged by its true reward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from caldpo_ray.batching import head_chunk_positions, plan_batch
from caldpo_ray.config import ModelSection
from caldpo_ray.models import load_model, load_tokenizer
from caldpo_ray.schema import Example, Row, Tokens
from caldpo_ray.scoring import ResponseScorer, score_rows
from caldpo_ray.tokenization import tokenise
from caldpo_ray.world import PROMPTS, judge, mean_and_standard_error, optimum_at_kl
from caldpo_ray.world.automaton import Doubles

MAX_RESPONSE_TOKENS = 40  # the longest review has 18 words; a policy that cannot stop is cut here
BATCH_TOKENS = 16384


def sample_world(
    model_path: str, reference_path: str | None, *, num_samples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Judge `num_samples` (at least 2) responses that the policy gives to prompts of the world.

    `true_reward` and `grammatical` (a share) are means over the samples, `kl` is KL(policy || reference) in nats per response,
    estimated as the mean of log p_policy - log p_reference of the samples; each has a standard error `<name>_se`.
    `optimum_reward` is the reward of the best policy at that KL. Mind the two bases: the optimum starts from the true base
    distribution of the world, and `kl` is to the reference given here, which only approximates it. Without a reference
    there is neither. Paths are folders with weights and tokenizer.
    """
    tokenizer = load_tokenizer(model_path, None, False)
    policy = _load(model_path)
    prompts = np.random.default_rng(seed).choice(list(PROMPTS), num_samples).tolist()
    rows = sample_responses(policy, tokenizer, prompts, seed)
    judgement = judge(prompts, [response_text(row.response_ids[0], tokenizer) for row in rows])
    values = {"true_reward": judgement.rewards, "grammatical": judgement.grammatical}
    if reference_path is not None:
        values["kl"] = response_logps(policy, rows) - response_logps(_load(reference_path), rows)
    facts: dict[str, float] = {"num_samples": num_samples}
    for name, samples in values.items():
        facts[name], facts[f"{name}_se"] = mean_and_standard_error(samples)
    if reference_path is not None:
        facts["optimum_reward"] = optimum_at_kl([facts["kl"]])[0].reward
    return facts


def _load(path: str) -> PreTrainedModel:
    model: PreTrainedModel = load_model(ModelSection(name_or_path=path), "float32")
    return model


@torch.no_grad()
def sample_responses(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], seed: int) -> list[Row]:
    """One response per prompt as rows with k = 1, drawn from the model's full distribution at temperature 1.

    A response ends with EOS, or without it after MAX_RESPONSE_TOKENS. The same seed gives the same samples.
    """
    prompt_ids = {prompt: _prompt_ids(prompt, tokenizer) for prompt in set(prompts)}
    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_RESPONSE_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        responses = continue_prompts(model, [prompt_ids[prompt] for prompt in prompts], plain)
    unscored = np.full(1, np.nan, np.float32)
    return [
        Row(str(at), prompt_ids[prompt], [ids], unscored)
        for at, (prompt, ids) in enumerate(zip(prompts, responses, strict=True))
    ]


def _prompt_ids(prompt: str, tokenizer: Any) -> Tokens:
    """The prompt as training tokenises it; the response beside it is not used."""
    row, _ = tokenise(
        Example(prompt, [" ."]), tokenizer, max_length=1024, max_prompt_length=None, truncation="error", row_id=""
    )
    return row.prompt_ids


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel, prompts: Sequence[Tokens], how: GenerationConfig, processors: Sequence[LogitsProcessor] = ()
) -> list[Tokens]:
    """What the model says after each prompt, up to and with the first of `how.eos_token_id`, on the model's own device.

    The model's own generation settings count for nothing: they may cut the tail of its distribution.
    """
    ends: list[int] = [how.eos_token_id] if isinstance(how.eos_token_id, int) else how.eos_token_id
    width = max(map(len, prompts))
    context = np.full((len(prompts), width), ends[0])
    mask = np.zeros_like(context)
    for at, ids in enumerate(prompts):
        context[at, width - len(ids) :], mask[at, width - len(ids) :] = ids, 1
    model.generation_config = GenerationConfig()
    how.pad_token_id, how.use_cache = ends[0], True
    texts = model.generate(
        torch.tensor(context, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
        generation_config=how, logits_processor=LogitsProcessorList(processors),
    )  # fmt: skip
    return [_until_end(ids, ends) for ids in texts[:, width:].cpu().numpy().astype(np.int32)]


def _until_end(ids: Tokens, ends: list[int]) -> Tokens:
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0] + 1] if len(found) else ids


class SeededNoise(LogitsProcessor):  # type: ignore[misc]
    """Noise that makes the most likely token a sample: argmax(logits / temperature + Gumbel) is distributed as the softmax.

    Every row has a seed, so that what it gets depends neither on the rows beside it nor on how often it was asked before, and
    two models that are asked with the same seeds differ by what they are, as little by chance as can be.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waits = torch.empty_like(scores)
        for wait, generator in zip(waits, self._generators, strict=True):
            wait.exponential_(generator=generator)
        return scores / self._temperature - waits.log()


def response_text(ids: Tokens, tokenizer: Any) -> str:
    """The words of a response; only its EOS is left out, because any other special token in it is a mistake."""
    text: str = tokenizer.decode(ids[ids != tokenizer.eos_token_id], clean_up_tokenization_spaces=False)
    return text


def response_logps(model: PreTrainedModel, rows: Sequence[Row]) -> Doubles:
    """Log-probs [rows] in nats of the first response of each row."""
    scorer = ResponseScorer(model, pad_id=0)
    lengths, scored = [row.num_tokens for row in rows], [len(row.response_ids[0]) for row in rows]
    chunk = head_chunk_positions(model.config.get_text_config().vocab_size)
    logps = np.empty(len(rows))
    for plan in plan_batch(lengths, scored, 1, BATCH_TOKENS, chunk, padded=True)[0]:
        logps[plan.places] = score_rows(scorer, [rows[at] for at in plan.places], plan.num_head_chunks)[:, 0]
    return logps
