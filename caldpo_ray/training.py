"""The policy workers: a DeepSpeed engine around the shared forward pass, fed by the feed, one loop to read.

Each worker takes one dictionary, rebuilds the config and touches no globals. The loss of a micro-batch is its sum over the row
count of the global batch, so accumulation and sharding do not change it.
"""

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from caldpo_ray import checkpoint, metrics
from caldpo_ray.batching import Schedule, head_chunk_positions
from caldpo_ray.checkpoint import TrainerState
from caldpo_ray.compute.engine import build_engine, set_up_process, spoil_step, sum_over_ranks, take_step
from caldpo_ray.compute.flops import forward_cost, peak_flops_of_workers
from caldpo_ray.compute.optimizers import learning_rate
from caldpo_ray.config import Config, ModelSection
from caldpo_ray.errors import Diverged, InputError, Left, RunError, find_error, tell
from caldpo_ray.feed import MicroBatch, Request, Share, ShareQueue, SplitName, schedules, steps_per_call
from caldpo_ray.models import save_tokenizer
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.reference import probe_tolerance
from caldpo_ray.reporting.loggers import Logger, open_loggers, scalars
from caldpo_ray.reporting.progress import this_place
from caldpo_ray.reporting.ray_metrics import RunMetrics
from caldpo_ray.reporting.run_log import log_of_rank
from caldpo_ray.resilience.alarms import Alarms
from caldpo_ray.resilience.checkpoint_list import improves, scores
from caldpo_ray.resilience.faults import leave_out, of_all_ranks, rows_not_finite, tell_failure, within_memory
from caldpo_ray.resilience.leaving import Ended, Leave, Listener
from caldpo_ray.resilience.uploads import Cadence, Uploads
from caldpo_ray.resilience.waiting import DUMPED_AT, FEED_SECONDS, Watchdog, wait_for
from caldpo_ray.run_dir import RunDir, append_metrics, truncate_metrics
from caldpo_ray.settings.sweep_options import broken_rule
from caldpo_ray.storage import is_remote, make_folder, open_path, write_atomically

HELD_SECONDS = 10.0  # between two looks at whether this attempt still holds the run directory


class PolicyWorker:
    """State of one rank during one attempt: engine, position, and its line to the feed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config = Config.model_validate(settings["config"])
        self.settings = settings
        self.run = RunDir(open_path(settings["run_dir"]), settings["token"])
        self.feed = settings["feed"]
        self.device = set_up_process(self.config.train)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.schedules: dict[SplitName, Schedule] = schedules(
            self.config, settings["num_train"], settings["num_eval"], settings["num_report"]
        )
        self.objective: Objective = get_objective(**self.config.objective.model_dump())
        self.wait_seconds = self.config.train.wait_timeout_seconds
        self.watchdog = Watchdog(DUMPED_AT * self.wait_seconds, self._stands_still)
        self.attempt, self.micro_batch_tokens = self._agree_on_attempt()
        self.run = replace(self.run, group=self.attempt)
        self.feed.place.remote(this_place("policy worker", self.rank))
        self.rows_digest: str = wait_for(self.feed.rows_digest.remote(), "the feed to open the rows", self.wait_seconds)
        self.checkpoint = ray.train.get_checkpoint()
        self.state = self._read_checkpoint()
        self.policy = ModelSection.model_validate(settings["model"])
        self.engine = build_engine(self.config, self.policy, self.device)
        if self.engine.module.misfit and self.rank == 0:
            self.feed.note.remote(f"every response runs with a copy of its prompt: {self.engine.module.misfit}")
        self.cost = forward_cost(self.engine.module.model, self.config.model.gradient_checkpointing)
        self.peak_flops = peak_flops_of_workers(self.device, self.config.model.dtype)
        vocab_size = self.engine.module.model.config.get_text_config().vocab_size
        self.chunk_positions = head_chunk_positions(vocab_size)
        self.queues: dict[SplitName, ShareQueue] = {}
        self.evaluated: dict[str, float] = {}
        self.skipped_steps = 0 if self.state is None else self.state.skipped_steps
        self.alarms = Alarms()
        self.held_at = time.monotonic()
        self.listener = Listener(self.feed, self.attempt, self.rank)
        self.leave: Leave | None = None
        self.asked_to_save = False
        self.cadence = Cadence(math.inf if self.config.train.save_every else 60 * self.config.train.save_minutes)
        self.uploads = Uploads(self.run, self.rank, self.wait_seconds, partial(tell_failure, settings), self.cadence)
        self.waits = {"wait/reference_seconds": 0.0, "wait/feed_seconds": 0.0, "wait/checkpoint_seconds": 0.0}
        self.loggers: list[Logger] = []
        self.published = RunMetrics(self.run.path.name, settings["sweep"])
        self.log = log_of_rank(settings)
        if self.rank == 0:
            self.loggers = open_loggers(
                self.config.loggers, self.run.path, settings["config"], settings["identity"], settings["sweep"]
            )

    def _agree_on_attempt(self) -> tuple[int, int]:
        """(number, tokens of a micro-batch). Later groups get higher numbers, also after the feed was restarted."""
        facts = torch.zeros(2, dtype=torch.int64, device=self.device)
        if self.rank == 0:
            asked = self.config.train.micro_batch_tokens
            tokens = self.run.micro_batch_tokens(asked)
            facts += torch.tensor([self.run.begin_group(), tokens], device=self.device)
            if tokens != asked:
                self.feed.note.remote(
                    f"train.micro_batch_tokens = {tokens}: {asked} did not fit into memory before ({self.run.memory})"
                )
        dist.broadcast(facts, 0)
        number, tokens = facts.tolist()
        return number, tokens

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """All remaining steps, with evaluation, checkpoints and the final export; whether the run is to end before the last.

        Raises Left where another group is to go on.
        """
        num_steps = self.schedules["train"].num_steps
        step, best = self.resume()
        self.log("training", step, {"num_steps": num_steps, "world_size": self.world_size})
        while step < num_steps:
            evaluates, saves = self.due(step + 1)
            if evaluates:
                self.ask_ahead("eval", 0)  # cut while the step runs
            line = self.train_step(step)
            step += 1
            self._require_held()
            if line:
                self.write(line)
            if evaluates:
                best = self.evaluate(step, best)
            if saves or self.asked_to_save:
                self.save(step, best)
            if self.leave and step < num_steps:
                self._end_after(step, self.leave)
                return True
        self.export(self.run.model)
        self.watchdog.stop()
        self.uploads.finish_model()  # and Ray Train waits until the last checkpoint is committed
        return False

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether the held-out rows are evaluated and a checkpoint is saved after so many steps: one is ranked by the other.

        Checkpoints that the clock or a leave asks for are not evaluated: the lines of metrics do not depend on the clock.
        """
        train = self.config.train
        saves = step == self.schedules["train"].num_steps or (
            train.save_every is not None and step % train.save_every == 0
        )
        evaluates = train.eval_every is not None and step % train.eval_every == 0
        return bool(self.settings["num_eval"]) and (evaluates or saves), saves

    def resume(self) -> tuple[int, float | None]:
        """Load the newest checkpoint of this run, if there is one; (steps done, best metric so far)."""
        if self.checkpoint is not None:
            with self.checkpoint.as_directory() as folder:
                checkpoint.load(self.engine, Path(folder), copy_of_node=is_remote(self.run.checkpoints))
        state = self.state
        if self.rank == 0:
            self.run.require_held()
            truncate_metrics(self.run.metrics, state.step if state else 0)
        return (state.step, state.best_metric) if state else (0, None)

    def _read_checkpoint(self) -> TrainerState | None:
        """Where the newest checkpoint of this run stands, if there is one. Raises InputError when it is another run's."""
        if self.checkpoint is None:
            return None
        # Not from `as_directory`, which would download all of a remote checkpoint for it.
        state = checkpoint.read_state(self.run.checkpoints / Path(self.checkpoint.path).name)
        identity, reference_key = self.settings["identity"], self.settings["reference_key"]
        checkpoint.require_same_run(state, identity, reference_key, self.rows_digest, self.run.path)
        return state

    def train_step(self, step: int) -> dict[str, Any]:
        """One optimiser step over one global batch; the metrics line on rank 0 of logged steps."""
        started = time.monotonic()
        share = self.next_share("train", step)
        rate = learning_rate(self.config.train, step, self.schedules["train"].num_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        parts = []
        for number, micro_batch in enumerate(share.micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(share.micro_batches))
            losses, part, gap = self.forward(micro_batch)
            if wrong := rows_not_finite(micro_batch.rows, losses):
                self._leave_out(step, "the loss is not finite; the step was not applied. Rows", wrong)
                spoil_step(self.engine, losses)
                take_step(self.engine)
                return {}
            if step == 0:
                self._check_start(micro_batch, gap)
            with self._fitting(micro_batch):
                # DeepSpeed averages gradients over ranks, and the loss is a sum over the global batch.
                self.engine.backward(losses.sum() * (self.world_size / share.num_rows), scale_wrt_gas=False)
            parts.append(part)
        totals = sum_over_ranks(metrics.merge(parts) | self.listener.word(self.cadence.due()), self.device)
        self.asked_to_save, self.leave = self.listener.agreed(totals)
        if step == 0 and self.settings["num_eval"]:
            self._require_best_metric(totals)
        norm = take_step(self.engine)
        if norm is None:
            rows = of_all_ranks([row.row_id for part in share.micro_batches for row in part.rows])
            self._leave_out(step, "a gradient is not finite; the step was not applied. Rows of its global batch", rows)
            return {}
        if (step + 1) % self.config.train.log_every and step + 1 < self.schedules["train"].num_steps:
            return {}
        return self._line(step + 1, "train", totals, started) | {"grad_norm": norm, "learning_rate": rate}

    def forward(self, micro_batch: MicroBatch, evaluating: bool = False) -> tuple[Tensor, metrics.Metrics, Tensor]:
        """Weighted row losses [rows], metric sums, and log-ratios [rows, k] of one micro-batch."""
        with self._fitting(micro_batch):
            return self._forward(micro_batch, evaluating)

    def _fitting(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        asked = self.config.train.micro_batch_tokens
        return within_memory(micro_batch.rows, self.run, asked, self.micro_batch_tokens)

    def _forward(self, micro_batch: MicroBatch, evaluating: bool) -> tuple[Tensor, metrics.Metrics, Tensor]:
        batch = self.engine.module.batch(micro_batch.rows).to(self.device)
        logps = self.engine(batch, micro_batch.num_head_chunks)
        lengths, scores, weights, columns = metrics.row_tensors(micro_batch.rows, logps)
        known = micro_batch.reference_logps
        reference = None if known is None else torch.tensor(known, dtype=logps.dtype, device=logps.device)
        output = self.objective(logps, reference, lengths, response_scores=scores, **columns)
        with torch.no_grad():
            inputs = (reference, lengths, scores, (weights > 0).to(logps.dtype))
            factors = None if evaluating else weights
            part = metrics.preference_metrics(self.objective, output, logps.detach(), *inputs, factors)
            if evaluating:
                part |= metrics.calibration_bins(self.objective, logps, *inputs)
            compared = metrics.num_compared(self.objective, *inputs[1:])
            flops = self.cost.executed(batch, micro_batch.num_head_chunks, backward=not evaluating)
            counts = [torch.full_like(compared, count, dtype=torch.float64) for count in (batch.num_tokens, flops)]
            part["executed"] = (torch.stack([compared.double(), *counts]), compared)
            gap = logps.detach() - reference if reference is not None else torch.zeros_like(logps)
        return output.losses * weights, part, gap

    def evaluate(self, step: int, best: float | None) -> float | None:
        """Metrics over all held-out rows, exact for any number of workers; keeps the best model; the new best value."""
        if self.evaluated.get("step") == step:
            return best
        line = self._measure("eval", step)
        self.evaluated = line
        self.write(line)
        if self.settings["num_report"]:  # a sweep chooses by one half of the held-out rows and reports on the other
            self.write(self._measure("report", step))
        self._require_best_metric(line)
        value = float(line[self.config.best_metric])
        if not improves(self.config, value, best):
            return best
        self.export(self.run.best)
        return value

    def _measure(self, split: SplitName, step: int) -> dict[str, Any]:
        started = time.monotonic()
        self.engine.eval()
        parts = []
        with torch.no_grad():
            for number in range(self.schedules[split].num_steps):
                parts += [
                    self.forward(micro_batch, evaluating=True)[1]
                    for micro_batch in self.next_share(split, number).micro_batches
                ]
        return self._line(step, split, sum_over_ranks(metrics.merge(parts), self.device), started)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, step: int, best: float | None) -> None:
        """Checkpoint this step. Training goes on while the files go to storage, until the next call."""
        started = time.monotonic()
        self.asked_to_save = False
        schedule = self.schedules["train"]
        stage = self.engine.zero_optimization_stage()
        state = TrainerState(
            step, schedule.position(step)[0], schedule.rows_consumed(step), self.settings["identity"],
            self.settings["reference_key"], self.rows_digest, self.world_size, stage, best,
            self.skipped_steps,
        )  # fmt: skip
        evaluated = self.evaluated if self.evaluated.get("step") == step else {}
        self.uploads.checkpoint(self.engine, state, scores(self.config, evaluated))
        self.log("checkpoint", step)
        self.waits["wait/checkpoint_seconds"] += time.monotonic() - started

    def export(self, target: Path) -> None:
        """A plain Hugging Face folder (an adapter folder with LoRA), complete or absent, written while training goes on."""
        started = time.monotonic()
        model = self.engine.module.model
        weights = checkpoint.gather_state_dict(model, self.engine.zero_optimization_stage())

        def write(scratch: Path) -> None:
            model.save_pretrained(scratch, state_dict=weights)
            save_tokenizer(self.policy, self.config.data.chat_template, scratch)

        if self.rank == 0:
            self.uploads.model(target, write)
        self.waits["wait/checkpoint_seconds"] += time.monotonic() - started

    # -- small parts ---------------------------------------------------------------------------------------------

    def next_share(self, split: SplitName, step: int) -> Share:
        """This rank's share; the next ones are requested before it is used."""
        self.ask_ahead(split, step)
        share, waited = self.queues[split].take()
        self.watchdog.moved(f"{split}, step {step + 1}")
        if step + 1 == self.schedules[split].num_steps:
            del self.queues[split]
        reference = min(waited, share.waited_reference_seconds)
        self.waits["wait/reference_seconds"] += reference
        self.waits["wait/feed_seconds"] += waited - reference
        return share

    def ask_ahead(self, split: SplitName, step: int) -> None:
        """Have the feed cut the shares of this step and of those that follow, unless it was asked to."""
        if split not in self.queues:
            schedule, scorer = self.schedules[split], self.engine.module
            most_steps = steps_per_call(schedule.batch_size, self.world_size)
            first = Request(
                self.attempt, split, step, self.rank, self.world_size, most_steps, scorer.layout, self.chunk_positions,
                self.micro_batch_tokens, scorer.max_shared_tokens,
            )  # fmt: skip
            self.queues[split] = ShareQueue(self.feed, first, schedule.num_steps, self.wait_seconds)

    def _line(self, step: int, split: SplitName, totals: metrics.Metrics, started: float) -> dict[str, Any]:
        schedule = self.schedules["train"]
        waits = torch.tensor(list(self.waits.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(waits, dist.ReduceOp.MAX)
        seconds = time.monotonic() - started
        pairs, tokens, flops = totals.pop("executed")[0].tolist()
        line: dict[str, Any] = {
            "step": step,
            "epoch": schedule.rows_consumed(step) / schedule.num_rows,
            "rows": schedule.rows_consumed(step),
            "split": split,
        }
        line |= metrics.finalise(totals)
        line |= {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds, "wall_seconds": seconds}
        line |= {"mfu": flops / seconds / self.peak_flops} if self.peak_flops else {}
        line |= dict(zip(self.waits, waits.tolist(), strict=True))
        self.waits = dict.fromkeys(self.waits, 0.0)
        return line

    def write(self, line: dict[str, Any]) -> None:
        """Rank 0 writes. All ranks have the same line, and raise Diverged where it breaks a rule of the sweep."""
        if self.rank == 0:
            self.run.require_held()
            append_metrics(self.run.metrics, line)
            self.published.show_line(line)
            self.log(line["split"], line["step"], {"loss": line["loss"]})
            for log in self.loggers:
                log(line["step"], scalars(line))
            for warning in self.alarms.heard(line) if line["split"] == "train" else []:
                self.feed.note.remote(warning)
        if self.settings["sweep"] is not None and (broken := broken_rule(self.config.sweep.stop, line)):
            raise Diverged(broken)

    def _check_start(self, micro_batch: MicroBatch, gap: Tensor) -> None:
        """Before the first step the policy is the reference: every log-ratio is zero, or the two are not the same model."""
        if not self.settings["policy_is_reference"] or micro_batch.reference_logps is None:
            return
        for row, ratios in zip(micro_batch.rows, gap.tolist(), strict=False):
            tokens = np.array([len(ids) for ids in row.response_ids], np.int32)
            off = np.flatnonzero(np.abs(ratios[: len(tokens)]) > probe_tolerance(self.config.model.dtype, tokens))
            if len(off):
                raise RunError(
                    f"the policy before its first step must equal the reference, but row {row.row_id}, response {off[0]} differs by"
                    f" {ratios[off[0]]:.4f} nats; verify the store with `caldpo reference verify`, or set reference.store=null"
                )

    def _require_best_metric(self, found: Mapping[str, Any]) -> None:
        """Asked at the first step already, where only the calibration of held-out rows is still to come."""
        name = self.config.best_metric
        if name not in found and not (name.startswith("calibration/") and "split" not in found):
            known = ", ".join(sorted(each for each in found if each == "loss" or ("/" in each and "wait/" not in each)))
            raise InputError(f"train.best_metric = {name}: not among the evaluation metrics: {known}")

    # -- faults --------------------------------------------------------------------------------------------------

    def _leave_out(self, step: int, what: str, row_ids: list[str]) -> None:
        """A step that is not applied: metrics have a line that says so. Raises Diverged where the run is to stop at it."""
        self.skipped_steps += 1
        reason = f"step {step + 1}: {what}"
        told = leave_out(self.config.train, self.skipped_steps, reason, row_ids)
        if self.rank == 0:
            schedule = self.schedules["train"]
            rows = schedule.rows_consumed(step + 1)
            place = {"step": step + 1, "epoch": rows / schedule.num_rows, "rows": rows, "split": "skipped"}
            self.run.require_held()
            append_metrics(self.run.metrics, place | {"reason": reason, "row_ids": row_ids})
            self.feed.note.remote(f"warning: {told}")

    def _end_after(self, step: int, leave: Leave) -> None:
        """Commit what was saved. Raises Left where another group is to go on."""
        self.watchdog.stop()
        self.uploads.finish_model()
        self.uploads.finish_checkpoint()
        if self.rank == 0:
            self.feed.note.remote(f"a checkpoint of step {step} is saved: {leave.why}")
        if not leave.for_good:
            raise Left(f"left after step {step}")

    def _require_held(self) -> None:
        """Now and then between writes, too: a newer attempt wants what this one holds."""
        if self.rank == 0 and time.monotonic() - self.held_at > HELD_SECONDS:
            self.run.require_held()
            self.held_at = time.monotonic()

    def _stands_still(self, standing: str, stacks: str) -> None:
        """In the watchdog's thread."""
        file = self.run.path / "stacks" / f"rank-{self.rank}.txt"
        make_folder(file.parent)
        write_atomically(file, stacks)
        self.feed.note.remote(f"rank {self.rank} {standing}; its stacks: {file}")


def train_loop_per_worker(settings: dict[str, Any]) -> Ended:
    """Entry point of every Ray Train worker.

    What restarting would not cure goes to the feed and to the driver, which raises it, and every rank ends quietly. Anything else,
    a lost peer above all, is raised, and Ray Train starts the group again from the last checkpoint.
    """
    try:
        return Ended(asked=PolicyWorker(settings).train())
    except (InputError, RunError) as error:
        tell_failure(settings, error)
        dist.destroy_process_group()  # peers inside a collective wake up with an error
        return Ended(failure=tell(find_error(error) or error))
    except Left:
        raise
    except Exception as error:
        if tell_failure(settings, error):
            raise
        failure = wait_for(settings["feed"].progress.remote(), "the feed", FEED_SECONDS).failure
        if failure is None:  # the feed was started again since
            raise
        return Ended(failure=": ".join(failure))
