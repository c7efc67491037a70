"""What is arithmetic in the benchmark; the oracle of TRL's work is torch's own counter around TRL's own head."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from caldpo_ray.compute.flops import ForwardCost, forward_cost
from caldpo_ray.logprobs import concatenated_batch
from tests.benchmarks.inputs import RATIOS, mixed_world_pairs, world_rows
from tests.benchmarks.report import compare_losses, compare_threads, markdown, summarise, systems_table
from tests.benchmarks.systems import (
    OURS,
    OURS_COLD,
    TRL,
    TRL_BOTH,
    TRL_PRECOMPUTED,
    Measured,
    Setting,
    step_seconds,
    with_precompute,
)
from tests.benchmarks.throughput import parse
from tests.benchmarks.watch import Watched, note_lines, watch, whole_mib
from tests.benchmarks.work import our_flops, trl_flops
from tests.unit.tiny_models import PAD_ID, random_rows, tiny_model

# Of equal lengths: nothing is padded, and torch counts padding.
ROWS = random_rows((30, 20, 20), (30, 20, 20))


def product(_: Any, left: Any, right: Any, **__: Any) -> int:
    """FLOPs of `addmm_` by its shapes: torch counts `addmm` alone."""
    return 2 * left[0] * left[1] * right[1]


def test_trl_executes_what_we_say_it_does() -> None:
    """Two whole sequences per pair, every logit computed twice, and the reference's forward pass."""
    utils = pytest.importorskip("trl.trainer.utils")
    model: Any = tiny_model("llama", attn_implementation="eager", use_cache=False)
    cost = forward_cost(model, False)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    batch = concatenated_batch(ROWS, PAD_ID)
    mask = (batch.segment_ids >= 0).long()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        model(
            input_ids=batch.input_ids, attention_mask=mask, labels=batch.input_ids, fused_lm_head=True
        ).loss.backward()
    trained = counter.get_total_flops()
    assert trl_flops(cost, ROWS, False, every_position=True) * len(ROWS) == pytest.approx(trained, rel=0.01)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=batch.input_ids, attention_mask=mask, labels=batch.input_ids, fused_lm_head=True)
    both = trl_flops(cost, ROWS, True, every_position=True) * len(ROWS)
    assert both == pytest.approx(trained + counter.get_total_flops(), rel=0.01)


def test_head_on_responses_alone_costs_less_by_the_prompts() -> None:
    cost = forward_cost(tiny_model("llama"), False)
    saved = trl_flops(cost, ROWS, False, every_position=True) - trl_flops(cost, ROWS, False, every_position=False)
    assert saved == 4 * cost.per_scored_token * 2 * (
        30 - 1
    )  # forward, again, and both gradients; two copies of a prompt


def test_the_reference_is_one_more_forward_pass() -> None:
    cost = forward_cost(tiny_model("llama"), False)
    assert our_flops(cost, ROWS, with_reference=True) == pytest.approx(4 / 3 * our_flops(cost, ROWS, False))


@pytest.mark.parametrize("wrong", [0.7, float("nan")])
@pytest.mark.parametrize("step", [0, 9])
def test_losses_that_differ_stop_the_benchmark(wrong: float, step: int) -> None:
    losses = [0.69] * 12
    names = ("caldpo_ray, cold store", "TRL, precomputed")
    found = compare_losses(names, [*losses[:10], 9, 9], [0.69 * 1.0005] * 12, 1e-3)
    assert found == {"steps": 10, "largest_difference": pytest.approx(5e-4, rel=1e-2), "tolerance": 1e-3}
    with pytest.raises(SystemExit, match="cold store and of TRL, precomputed differ by more than 1e-03") as stopped:
        compare_losses(names, [*losses[:step], wrong, *losses[step + 1 :]], losses, 1e-3)
    assert isinstance(stopped.value.code, str)  # which Python prints before it exits with code 1


def test_threads_that_differ_stop_the_benchmark() -> None:
    compare_threads(("ours", "theirs"), 2, 2)
    with pytest.raises(SystemExit, match="ours computes with 2 threads, theirs with 1"):
        compare_threads(("ours", "theirs"), 2, 1)


def test_trl_accumulates_to_the_same_batch() -> None:
    def micro_batch(batch_size: int, gpu: bool) -> int:
        return Setting(Path(), Path(), Path(), batch_size, gpu=gpu).trl_micro_batch

    assert [micro_batch(size, True) for size in (4, 8, 12, 32)] == [4, 8, 4, 8]
    assert micro_batch(32, False) == 32


def measured(step_seconds: list[float], first: int, other_seconds: float = 0.0, **mib: float) -> Measured:
    whole = 10 + sum(mib.values())
    return Measured([0.69] * len(step_seconds), step_seconds, 2, first, 5.0, 9.0, mib, whole, None, other_seconds)


def test_rates() -> None:
    assert measured([9, 9, 1, 3], 2).rows_per_second == 1  # two steps of two rows in four seconds
    assert measured([1, 1, 1, 1], 0, other_seconds=4).rows_per_second == 1
    precomputed = measured([9, 9, 1, 1], 2)
    precomputed.extra["precompute_seconds"] = 4.0
    assert (
        with_precompute(precomputed).rows_per_second == 1
    )  # half of the rows are timed, and half of the pass with them


HOST = {"processor": "a CPU", "cores": 2, "memory_gib": 8.0, "gpus": [], "python": "3.11", "versions": {"trl": "1.16"}}
SETTING = {
    "data": "rows", "pairs": 6, "prompt_tokens": 4.0, "chosen_tokens": 2.0, "rejected_tokens": 3.0, "batch_size": 2,
    "dtype": "bfloat16", "parameters": 17e6, "gpu": False, "trl_micro_batch": 2, "trl_attention": "sdpa", "workers": 1,
    "repetitions": 2,
}  # fmt: skip
PAGE = {"machine": HOST, "setting": SETTING}


def test_summary_and_table() -> None:
    cost = ForwardCost(100.0, 100.0, 0.0, 10.0, True, False)
    rows = random_rows(*[(4, 2, 3)] * 6)
    runs = {
        TRL: [measured([9, 4, 4], 1, driver=3000), measured([9, 8, 8], 1, driver=3000)],
        TRL_PRECOMPUTED: [measured([9, 2, 2], 1, driver=2000), measured([9, 4, 4], 1, driver=2000)],
        TRL_BOTH: [measured([9, 2, 2], 1, 4, driver=2000), measured([9, 4, 4], 1, 8, driver=2000)],
        OURS_COLD: [measured([1, 1, 1], 0, 3, policy=1, driver=9), measured([2, 2, 2], 0, 6, policy=3, driver=9)],
        OURS: [measured([9, 1, 1], 1, policy=1000, driver=9), measured([9, 2, 2], 1, policy=1000, driver=9)],
    }
    peaks = [20_000.0, 10_000.0]  # the machine was half as fast in the second repetition
    found = summarise(runs, peaks, rows, {False: cost}, gpu=False)
    assert found[OURS.name]["all_pairs_per_second"] == [2, 1]
    assert found[OURS.name]["pairs_per_second"] == 1.5
    assert found[OURS.name]["against_trl"] == 4 and found[OURS.name]["against_trl_precomputed"] == 2
    assert found[TRL_BOTH.name]["against_trl_precomputed"] == pytest.approx(0.5)
    # 9 tokens of layers and 5 of the head, forward and twice that backward; two pairs a second where the peak is 20 000.
    assert found[OURS.name]["share_of_peak"] == pytest.approx(3 * (900 + 50) * 2 / 20_000)
    assert found[TRL.name]["needed_share_of_peak"] == pytest.approx(3 * (900 + 50) * 0.5 / 20_000)
    # TRL: 13 tokens; 11 logits, which it computes twice; and forward once more.
    assert found[TRL.name]["share_of_peak"] == pytest.approx((4 * 1300 + 5 * 110) * 0.5 / 20_000)
    assert found[TRL.name]["training_mib"] == 3000 and found[OURS_COLD.name]["training_mib"] == 2
    assert found[TRL.name]["whole_mib"] == 3010 and found[OURS_COLD.name]["whole_mib"] == 21
    head, _, *lines = systems_table(found, gpu=False).splitlines()
    assert head.split(" | ")[:4] == ["| system", "pairs/s", "× TRL", "× TRL precomputed"]
    assert lines[-1].split(" | ")[:5] == [f"| {OURS.name}", "1.50", "4.00", "2.00", "14"]
    memory = next(at for at, title in enumerate(head.split(" | ")) if title.startswith("peak memory of training"))
    assert lines[-1].split(" | ")[memory : memory + 2] == ["1000", "1019"]
    check = {"steps": 3, "largest_difference": 2e-3, "tolerance": 3e-2, "systems": [TRL.name, OURS.name]}
    page = markdown(PAGE | {"check": check, "peak_flops": peaks, "systems": found})
    assert head in page and "micro-batches" not in page
    assert f"agree to 2.0e-03 between TRL; {OURS.name}. Allowed in bfloat16 is 3e-02: bfloat16 keeps 8 bits" in page


def test_page_without_the_systems() -> None:
    head = {"system": "TRL", "tokens": 4096, "all_logits_mib": 1.0, "above_mib": 2.0, "peak_mib": 3.0}
    page = markdown(PAGE | {"head_memory": [head]})
    assert "| TRL | 4096 |" in page and "× TRL" not in page and "Scaling" not in page


def test_every_part_runs_unless_it_is_left_out() -> None:
    assert parse([]).skip == [] and parse([]).rows == [10_000, 100_000, 1_000_000]
    assert parse(["--skip", "systems", "rows"]).skip == ["systems", "rows"]


def test_steps_last_from_the_end_of_the_one_before() -> None:
    """The first one as long as the workers say, so that what was scored before it was asked for is known."""
    lines = [{"wall_seconds": seconds} for seconds in (3.0, 1.0, 1.0)]
    seconds = step_seconds(lines, [103.5, 105.0, 106.25])
    assert seconds == [3.0, 1.5, 1.25]
    asked = 103.5 - seconds[0]
    assert asked + sum(seconds) == 106.25
    with pytest.raises(AssertionError):
        step_seconds(lines, [103.5, 105.0])


def test_lines_of_metrics_are_noted_when_they_are_written(tmp_path: Path) -> None:
    seen, metrics = Watched(0.0), tmp_path / "metrics.jsonl"
    note_lines(metrics, seen)
    assert seen.line_times == []
    for text, moment in (("first\n", 5), ("", 6), ("second\nthird\n", 9)):
        with metrics.open("a") as file:
            file.write(text)
        os.utime(metrics, (moment, moment))
        note_lines(metrics, seen)
    assert seen.line_times == [5, 9, 9]


def test_lines_written_at_the_very_end_are_noted(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write('first\\nsecond\\n')"
    metrics = tmp_path / "metrics.jsonl"
    seen = watch([sys.executable, "-c", code, str(metrics)], metrics, tmp_path / "log")
    assert len(seen.line_times) == 2 and seen.started - 1 < seen.line_times[0] <= seen.ended


def test_seconds_scored_before_training_began() -> None:
    seen = Watched(0.0, scoring=[(1.0, 2.0), (2.5, 3.5), (4.0, 5.0)])
    assert seen.scored_before(3.0) == 1.5 and seen.scored_before(0.5) == 0 and seen.scored_before(9.0) == 3


def test_a_command_that_fails_ends_the_benchmark_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ended with code 7(.|\n)*the reason"):
        watch([sys.executable, "-c", "print('the reason'); raise SystemExit(7)"], None, tmp_path / "log")


def test_memory_of_a_command_is_its_peak(tmp_path: Path) -> None:
    """Not what it holds when somebody looks: it gives its memory back and then counts for a while."""
    code = "held = bytearray(200 * 2**20); del held; sum(range(50_000_000))"
    seen = watch([sys.executable, "-c", code], None, tmp_path / "log")
    assert 200 < seen.mib()["driver"] < 260
    assert 0 < seen.whole_mib < 260


def test_shared_memory_counts_once() -> None:
    code = """
import os, sys
shared = bytearray(os.urandom(2**20) * 100)
if os.fork() == 0:
    own = bytearray(os.urandom(2**20) * 50)
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        root = psutil.Process(process.pid)
        members = [root, *root.children(recursive=True)]
        assert len(members) == 2 and 150 < whole_mib(members) < 200
        process.communicate()
    assert whole_mib(members) == 0  # they ended


def test_world_rows_have_the_lengths_asked_for() -> None:
    for prompt, response in RATIOS.values():
        rows = world_rows(60, prompt, response, 3, seed=0)
        assert rows == world_rows(60, prompt, response, 3, seed=0)
        words = [[len(text.split()) for text in (row["prompt"], *row["responses"])] for row in rows]
        assert all(len(each) == 4 for each in words)
        assert sum(each[0] for each in words) / 60 == pytest.approx(prompt, rel=0.1)
        assert sum(sum(each[1:]) for each in words) / 180 == pytest.approx(response, rel=0.1)
    pairs = mixed_world_pairs(10)
    assert len(pairs) == 10 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
