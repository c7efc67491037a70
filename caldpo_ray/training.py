"""The policy workers: a DeepSpeed engine around the shared forward pass, fed by the feed, one loop to read.

Each worker takes one dictionary, rebuilds the config and touches no globals. The loss of a micro-batch is its sum over the row
count of the global batch, so accumulation and sharding do not change it.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
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
from caldpo_ray.config import Config, ModelSection, TrainSection
from caldpo_ray.deepspeed_config import deepspeed_config
from caldpo_ray.errors import Diverged, InputError, RunError, find_error, last_line
from caldpo_ray.feed import MicroBatch, Request, Share, ShareQueue, SplitName, schedules, steps_per_call
from caldpo_ray.flops import forward_cost, peak_flops_of_workers
from caldpo_ray.imports import large_imports
from caldpo_ray.loggers import Logger, open_loggers, scalars
from caldpo_ray.models import save_tokenizer
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.optimizers import learning_rate, make_optimizer
from caldpo_ray.progress import this_place
from caldpo_ray.ray_metrics import RunMetrics
from caldpo_ray.reference import probe_tolerance
from caldpo_ray.run_dir import RunDir, append_metrics, truncate_metrics
from caldpo_ray.storage import open_path
from caldpo_ray.sweep_options import broken_rule
from caldpo_ray.uploads import Uploads


def set_up_process(train: TrainSection) -> torch.device:
    """Threads and device of this worker; before DeepSpeed is imported, which looks for its accelerator once."""
    context = ray.train.get_context()
    on_gpu = train.use_gpu and torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(train.num_threads_per_worker or max(1, cores // context.get_local_world_size()))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """ZeRO-3 splits parameters while the model loads: transformers does so as long as this object lives."""
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    partitioner = HfDeepSpeedConfig(settings)
    yield
    del partitioner


@contextlib.contextmanager
def without_compiler(device: torch.device) -> Iterator[None]:
    """DeepSpeed compiles a function of an optimiser (Muon) at import: that loads all of torch.compile, seconds of start-up.

    Not on a GPU: what torch.compile reads of the environment then holds for the process, and attention is compiled there.
    """
    if device.type == "cpu":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    yield
    os.environ.pop("TORCHDYNAMO_DISABLE", None)


@large_imports()
def build_engine(config: Config, model: ModelSection, device: torch.device) -> Any:
    """A DeepSpeed engine whose module is the shared `ResponseScorer`."""
    import deepspeed  # after set_up_process: DeepSpeed picks its accelerator at import

    from caldpo_ray.models import add_lora, load_model
    from caldpo_ray.scoring import ResponseScorer, choose_layout

    # DeepSpeed would compile an all-reduce that only inference calls: it needs a compiler, and seconds of every start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before anything is partitioned: DeepSpeed reads the world size from its own wrapper of the process group.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config(config, dist.get_world_size())
    with partitioned_loading(settings):
        policy = load_model(model, config.model.dtype)
        if config.model.lora is not None:
            policy = add_lora(policy, config.model.lora, config.run.seed)
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.enable_input_require_grads()
    policy.to(device)
    scorer = ResponseScorer(policy, pad_id=0)
    optimizer = make_optimizer(scorer, config.train)
    with without_compiler(device):
        engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=settings, dist_init_required=False)
    choice = choose_layout(scorer)
    scorer.layout, scorer.misfit = choice.layout, choice.reason
    return engine


class PolicyWorker:
    """State of one rank during one attempt: engine, position, and its line to the feed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config = Config.model_validate(settings["config"])
        self.settings = settings
        self.run = RunDir(open_path(settings["run_dir"]))
        self.feed = settings["feed"]
        self.device = set_up_process(self.config.train)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.schedules: dict[SplitName, Schedule] = schedules(
            self.config, settings["num_train"], settings["num_eval"], settings["num_report"]
        )
        self.objective: Objective = get_objective(**self.config.objective.model_dump())
        self.attempt = self._agree_on_attempt()
        self.feed.place.remote(this_place("policy worker", self.rank))
        self.rows_digest: str = ray.get(self.feed.rows_digest.remote())
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
        self.uploads = Uploads(self.run.path, self.rank, partial(tell_failure, settings))
        self.waits = {"wait/reference_seconds": 0.0, "wait/feed_seconds": 0.0, "wait/checkpoint_seconds": 0.0}
        self.loggers: list[Logger] = []
        self.published = RunMetrics(self.run.path.name)
        if self.rank == 0:
            self.loggers = open_loggers(
                self.config.loggers, self.run.path, settings["config"], settings["identity"], settings["sweep"]
            )

    def _agree_on_attempt(self) -> int:
        """Later groups get higher numbers, also after the feed was restarted."""
        number = torch.tensor([time.time_ns() if self.rank == 0 else 0], device=self.device)
        dist.broadcast(number, 0)
        return int(number.item())

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """All remaining steps, with evaluation, checkpoints and the final export."""
        num_steps = self.schedules["train"].num_steps
        step, best = self.resume()
        while step < num_steps:
            evaluates, saves = self.due(step + 1)
            if evaluates:
                self.ask_ahead("eval", 0)  # cut while the step runs
            line = self.train_step(step)
            step += 1
            if line:
                self.write(line)
            if evaluates:
                best = self.evaluate(step, best)
            if saves:
                self.save(step, best)
        self.export(self.run.model)
        self.uploads.finish_model()  # and Ray Train waits until the last checkpoint is committed

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether the held-out rows are evaluated and a checkpoint is saved after so many steps: one is ranked by the other."""
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
                checkpoint.load(self.engine, Path(folder))
        state = self.state
        if self.rank == 0:
            truncate_metrics(self.run.metrics, state.step if state else 0)
        return (state.step, state.best_metric) if state else (0, None)

    def _read_checkpoint(self) -> TrainerState | None:
        """Where the newest checkpoint of this run stands, if there is one. Raises InputError when it is another run's."""
        if self.checkpoint is None:
            return None
        # Not from `as_directory`, which would download all of a remote checkpoint for it.
        state = checkpoint.read_state(self.run.path / "checkpoints" / Path(self.checkpoint.path).name)
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
            if step == 0:
                self._check_start(micro_batch, gap)
            # DeepSpeed averages gradients over ranks, and the loss is a sum over the global batch.
            self.engine.backward(losses.sum() * (self.world_size / share.num_rows), scale_wrt_gas=False)
            parts.append(part)
        totals = self.reduce(metrics.merge(parts))
        self._require_finite(step, totals, share)
        if step == 0 and self.settings["num_eval"]:
            self._require_best_metric(totals)
        before = self._gradient_norm_of_stage_0()
        self.engine.step()
        if (step + 1) % self.config.train.log_every and step + 1 < self.schedules["train"].num_steps:
            return {}
        norm = before if before is not None else self.engine.get_global_grad_norm()
        return self._line(step + 1, "train", totals, started) | {"grad_norm": float(norm), "learning_rate": rate}

    def forward(self, micro_batch: MicroBatch, evaluating: bool = False) -> tuple[Tensor, metrics.Metrics, Tensor]:
        """Weighted row losses [rows], metric sums, and log-ratios [rows, k] of one micro-batch."""
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
        if best is not None and (value >= best if self.config.best_is_smallest else value <= best):
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
        return self._line(step, split, self.reduce(metrics.merge(parts)), started)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, step: int, best: float | None) -> None:
        """Checkpoint this step. Training goes on while the files go to storage, until the next call."""
        started = time.monotonic()
        schedule = self.schedules["train"]
        stage = self.engine.zero_optimization_stage()
        state = TrainerState(
            step, schedule.position(step)[0], schedule.rows_consumed(step), self.settings["identity"],
            self.settings["reference_key"], self.rows_digest, self.world_size, stage, best,
        )  # fmt: skip
        scores = {name: value for name, value in self.evaluated.items() if isinstance(value, float)}
        self.uploads.checkpoint(self.engine, state, scores)
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
        if step + 1 == self.schedules[split].num_steps:
            del self.queues[split]
        reference = min(waited, share.waited_reference_seconds)
        self.waits["wait/reference_seconds"] += reference
        self.waits["wait/feed_seconds"] += waited - reference
        return share

    def ask_ahead(self, split: SplitName, step: int) -> None:
        """Have the feed cut the shares of this step and of those that follow, unless it was asked to."""
        if split not in self.queues:
            schedule, layout = self.schedules[split], self.engine.module.layout
            most_steps = steps_per_call(schedule.batch_size, self.world_size)
            first = Request(
                self.attempt, split, step, self.rank, self.world_size, most_steps, layout, self.chunk_positions
            )
            self.queues[split] = ShareQueue(self.feed, first, schedule.num_steps)

    def reduce(self, totals: metrics.Metrics) -> metrics.Metrics:
        """Sums and counts over all ranks in one collective, in float64."""
        names = sorted(totals)
        flat = [tensor.to(torch.float64).reshape(-1).to(self.device) for name in names for tensor in totals[name]]
        joined = torch.cat(flat)
        dist.all_reduce(joined)
        pieces = iter(torch.split(joined, [len(piece) for piece in flat]))
        return {
            name: (next(pieces).reshape(totals[name][0].shape), next(pieces).reshape(totals[name][1].shape))
            for name in names
        }

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
            append_metrics(self.run.metrics, line)
            self.published.show_line(line)
            for log in self.loggers:
                log(line["step"], scalars(line))
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

    def _require_finite(self, step: int, totals: metrics.Metrics, share: Share) -> None:
        if not torch.isfinite(totals["loss"][0]).all():
            rows = [row.row_id for micro_batch in share.micro_batches for row in micro_batch.rows]
            names: list[Any] = [None] * self.world_size
            dist.all_gather_object(names, rows)
            listed = ", ".join(name for part in names for name in part)
            raise Diverged(
                f"step {step + 1}: the loss is not finite; the step was not applied. Rows of its batch: {listed};"
                " `caldpo preview CONFIG --row ID` shows file, line and tokens of one"
            )

    def _gradient_norm_of_stage_0(self) -> float | None:
        """DeepSpeed reports no norm for stage 0: its gradients are whole, so this is the plain norm before clipping."""
        if self.engine.zero_optimization_stage() > 0:
            return None
        grads = [p.grad.float() for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """Entry point of every Ray Train worker.

    What restarting would not cure goes to the feed, and every rank ends quietly: the driver raises it. Anything else, a
    lost peer above all, is raised, and Ray Train starts the group again from the last checkpoint.
    """
    try:
        PolicyWorker(settings).train()
    except (InputError, RunError) as error:
        tell_failure(settings, error)
        dist.destroy_process_group()  # peers inside a collective wake up with an error
    except Exception as error:
        if tell_failure(settings, error):
            raise


def tell_failure(settings: dict[str, Any], error: Exception) -> bool:
    """Tell the feed why this rank stops; whether starting the group again may cure it."""
    feed = settings["feed"]
    if isinstance(error, (InputError, RunError)):
        ours = find_error(error) or error  # without Ray's account of where it came from
        ray.get(feed.fail.remote(type(ours).__name__, str(ours)))
        return False
    if ray.get(feed.progress.remote()).failure is not None:
        return False
    restarts = settings["config"]["train"]["max_failures"]
    after = f"; Ray Train starts again from the last checkpoint, at most {restarts} times" if restarts else ""
    feed.note.remote(f"rank {dist.get_rank()} stopped ({type(error).__name__}: {last_line(error)}){after}")
    return True
