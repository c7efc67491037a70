"""`report.html` and `figures/*.png` of a run or a sweep: what happened, how sure that is, and what it cost.

One file that needs no network, for reading on a phone, sending around and printing; the same figures as PNG for a paper.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError, NotReady, last_line
from caldpo_ray.reporting import report_page as page
from caldpo_ray.reporting.drawing import Picture
from caldpo_ray.reporting.progress import say
from caldpo_ray.reporting.run_figures import RunFacts, draw_run
from caldpo_ray.reporting.sweep_figures import SweepFacts, Trial, draw_sweep
from caldpo_ray.run_dir import RunDir, read_metrics
from caldpo_ray.storage import make_folder, open_path, reaching, read_bytes, read_json, write_atomically

MEANINGS = {
    "loss": "mean loss of a row; not comparable between objectives",
    "nll": "negative log-prob of chosen responses, nats per token",
    "rewards/accuracies": "share of pairs whose chosen response has the higher implicit reward",
    "rewards/chosen": "implicit reward β·h of chosen responses",
    "rewards/rejected": "implicit reward β·h of rejected responses",
    "rewards/margins": "implicit reward, chosen minus rejected",
    "logratios/chosen": "h_w: log-ratio policy / reference of chosen responses, nats",
    "logratios/rejected": "h_l: the same of rejected responses, nats",
    "logratios/margins": "h_w − h_l, nats",
    "logratios/chosen_positive": "share of chosen responses that are likelier than under the reference",
    "logps/chosen": "log-prob of chosen responses, nats",
    "logps/rejected": "log-prob of rejected responses, nats",
    "calibration/error": "mean distance of h from its target, nats",
    "calibration/reachable": "share of rows that can reach the target at all",
    "calibration/ece": "expected calibration error of σ(reward margin)",
    "length_bias/accuracy_chosen_longer": "accuracy where the chosen response has more tokens",
    "length_bias/accuracy_chosen_shorter": "accuracy where the chosen response has fewer tokens",
    "length_bias/difference": "the first minus the second",
    "response_tokens/chosen": "length of chosen responses, tokens",
    "response_tokens/rejected": "length of rejected responses, tokens",
    "scores/correlation": "of reward margins with gaps of the data's scores",
    "judge/win_rate": "how often the judge prefers the policy's response to the reference's, ties half, both orders",
    "judge/consistent": "share of pairs that the judge decides alike in both orders",
    "judge/first_preferred": "how often it prefers the response shown first; 0.5: the order does not matter",
    "generated/tokens_policy": "length of the policy's generated responses, tokens",
    "generated/tokens_reference": "the same of the reference",
    "generated/ended_policy": "share of the policy's generated responses that came to an end",
    "generated/ended_reference": "the same of the reference",
    "world/true_reward": "true reward of sampled responses",
    "world/grammatical": "share of sampled responses that are grammatical",
    "world/kl": "KL(policy || reference) per response, nats, from samples",
}
FINDINGS = {
    "both_wrong": "pairs that reference and policy both order the other way: the label may be wrong",
    "near_tie": "pairs with |h_w − h_l| below 0.1 nats",
    "duplicate": "rows that repeat an earlier one",
    "contradiction": "rows that repeat an earlier one with the order reversed",
    "train_overlap": "rows whose prompt, or more, is also in the training rows",
}
Z = 1.959964


def report(path: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run or sweep directory (a folder or a URL); the path of the page.

    Raises InputError where the folder is neither, or has nothing to show yet, and NotReady naming a damaged file.
    """
    folder = open_path(path).absolute()
    with reaching("report", path):
        if (folder / "sweep.json").exists():
            text, pictures = _sweep_page(folder)
        elif (folder / "trials").is_dir():
            raise InputError(
                f"report {folder}: this sweep has no results yet (sweep.json); ask again at its end, or for the run of one trial"
            )
        elif (folder / "config.yaml").exists():
            text, pictures = _run_page(RunDir(folder))
        else:
            raise InputError(
                f"report {folder}: neither a run (config.yaml) nor a sweep (sweep.json) is there; give the directory of one"
            )
        try:
            make_folder(folder / "figures")
            for picture in pictures:
                write_atomically(folder / "figures" / f"{picture.name}.png", picture.png)
            write_atomically(folder / "report.html", text)
        except OSError as error:
            raise InputError(
                f"report {folder}: cannot be written ({error.strerror or last_line(error)}); copy the folder to a place that can"
            ) from None
    say(f"report in {folder / 'report.html'}, {len(pictures)} figures in {folder / 'figures'}")
    return folder / "report.html"


def _footer() -> str:
    return f"Written by caldpo_ray {version('caldpo-ray')}. This file fetches nothing."


# -- a run ---------------------------------------------------------------------------------------------------------


def _run_page(run: RunDir) -> tuple[str, list[Picture]]:
    lines = read_metrics(run.metrics)
    if not lines:
        state = run.read_status().get("state", "never started")
        raise InputError(
            f"report {run.path}: the run has no metrics yet (state: {state}); ask again after its first step"
        )
    config = load_config(run.config)
    manifest = run.read_manifest() if run.manifest.exists() else {}
    way_out = "delete it; `caldpo evaluate` writes it again"
    evaluation = read_json(run.eval, way_out) if run.eval.exists() else {}
    trained, evaluated = ([line for line in lines if line["split"] == split] for split in ("train", "eval"))
    facts = RunFacts(
        trained, evaluated, evaluation or (evaluated[-1] if evaluated else {}), config.objective.calibration_target,
        manifest.get("eval_rows", 0), config.train.max_grad_norm,
    )  # fmt: skip
    pictures = draw_run(facts)
    parts = [
        page.section("Run", page.facts_table(_run_facts(config, manifest, run.read_status(), lines[-1]))),
        page.section("Held-out rows", *_evaluation_parts(run, facts.evaluation)),
        page.section("Figures", page.figures(pictures)),
        page.section("Rows worth a look", *_audit_parts(facts.evaluation)),
        page.section("Cost", page.facts_table(_cost(config, trained, evaluated))),
        page.section("Origin", page.facts_table(_origin(manifest))),
        page.folded("All options (config.yaml)", page.verbatim(read_bytes(run.config).decode())),
    ]
    subtitle = f"{config.objective.name} · one run"
    return page.page(config.run.name, subtitle, parts, _footer()), pictures


def _run_facts(
    config: Config, manifest: Mapping[str, Any], status: Mapping[str, Any], last: Mapping[str, Any]
) -> dict[str, Any]:
    parameters = ", ".join(f"{key} = {page.show(value)}" for key, value in _parameters(config).items())
    held_out = config.data.eval if isinstance(config.data.eval, str) else f"{config.data.eval} of train"
    settings, state = config.train, status.get("state", "unknown")
    lora = config.model.lora
    return {
        "State": f"{state}: {status['reason']}" if status.get("reason") else state,
        "Objective": f"{config.objective.name}{f' ({parameters})' if parameters else ''}",
        "Loss of a row": config.objective.formula,
        "Model": f"{config.model.name_or_path}, {config.model.dtype}{f', LoRA rank {lora.r}' if lora else ', all weights'}",
        "Reference": config.reference.name_or_path or "the policy before its first step"
        if config.objective.needs_reference
        else "none",
        "Training data": f"{config.data.train} ({page.show(manifest.get('train_rows'))} rows)",
        "Held-out data": None
        if config.data.eval is None
        else f"{held_out} ({page.show(manifest.get('eval_rows'))} rows)",
        "Trained": f"{last['step']:,} steps, {last['rows']:,} rows, {last['epoch']:.2f} epochs",
        "Optimisation": f"{settings.optimizer}, learning rate {settings.learning_rate:g} ({settings.lr_scheduler}),"
        f" {settings.batch_size} rows per step, seed {config.run.seed}",
        "Workers": f"{_range(settings.fewest_workers, settings.most_workers)} ({'GPU' if settings.use_gpu else 'CPU'}),"
        f" ZeRO stage {settings.deepspeed.zero_stage}",
    }


def _range(lowest: int, highest: int) -> str:
    return str(lowest) if lowest == highest else f"{lowest} to {highest}"


def _parameters(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.objective.model_dump(mode="json").items() if key != "name"}


def _origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    if not manifest:
        return {}
    rows = ", ".join(
        f"{each['cache']} ({each['rows']:,} rows, {each['bad']:,} bad)" for each in manifest.get("rows", [])
    )
    versions = ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
    nodes = sorted({place["node"] for place in manifest.get("places", [])})
    return {
        "Versions": versions or None,
        "Digest of the policy's weights": manifest["policy"].get("digest"),
        "Key of the reference's log-probs": (manifest.get("reference") or {}).get("key"),
        "Digests of the rows": rows or None,
        "Identity of the run": manifest.get("identity"),
        "Nodes": ", ".join(nodes) or None,
    }


def _cost(
    config: Config, trained: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A logged step stands for those since the line before it."""
    facts: dict[str, Any] = {}
    if trained and all("wall_seconds" in line for line in trained):
        before = [0, *(line["step"] for line in trained[:-1])]
        seconds = sum(
            line["wall_seconds"] * (line["step"] - start) for line, start in zip(trained, before, strict=True)
        )
        facts["Training steps"] = f"{seconds:,.0f} s"
        if config.train.use_gpu:
            facts["GPU-hours of the policy"] = f"{seconds * config.train.most_workers / 3600:,.2f}"
    if evaluated and all("wall_seconds" in line for line in evaluated):
        facts["Evaluations"] = f"{sum(line['wall_seconds'] for line in evaluated):,.0f} s in {len(evaluated)}"
    for name in ("reference", "feed"):
        facts[f"Waited for the {name}"] = f"{sum(line.get(f'wait/{name}_seconds', 0) for line in trained):,.1f} s"
    if trained:
        pairs, tokens = (sorted(line[f"{unit}_per_second"] for line in trained) for unit in ("pairs", "tokens"))
        middle = len(trained) // 2
        facts["Throughput (median)"] = f"{page.show(pairs[middle])} pairs/s, {page.show(tokens[middle])} tokens/s"
        if all("mfu" in line for line in trained):
            facts["Model FLOPs utilisation (median)"] = f"{sorted(line['mfu'] for line in trained)[middle]:.1%}"
    return facts


def _evaluation_parts(run: RunDir, found: Mapping[str, Any]) -> list[str]:
    if not found:
        return [page.paragraph("This run held no rows out, so nothing says how it does on others (option data.eval).")]
    rows = []
    for name in (*MEANINGS, *sorted(name for name in found if name.startswith("objective/"))):
        if isinstance(found.get(name), int | float):
            count = found.get("counts", {}).get(name)
            if name.startswith("length_bias/accuracy_"):
                count = found[name.replace("accuracy", "rows")]
            label = page.Named(name, MEANINGS.get(name, "term of the loss"))
            rows.append([label, found[name], _interval(found, name), count])
    parts = [page.table(["metric", "value", "95 % interval", "rows"], rows)]
    if "rewards/accuracies" in found and "counts" not in found:
        parts.append(
            page.paragraph(
                "These are the numbers of the training's last evaluation, without intervals. `caldpo evaluate"
                f" {run.path}` adds them, the calibration plot, length bias and the audit; then ask for the report again.",
                "quiet",
            )
        )
    if "audit" in found:
        source = f"{found.get('eval_rows', 0):,} rows of {found.get('data')}"
        parts.append(page.paragraph(f"Measured on {source}; `nll` counts tokens instead of rows.", "quiet"))
    return parts


def _interval(found: Mapping[str, Any], name: str) -> page.Interval | None:
    if f"{name}_interval" in found:
        return page.Interval(found[f"{name}_interval"])
    if f"{name}_se" in found:
        return page.Interval((found[name] - Z * found[f"{name}_se"], found[name] + Z * found[f"{name}_se"]))
    return None


def _audit_parts(found: Mapping[str, Any]) -> list[str]:
    counts = found.get("audit")
    if counts is None:
        return []
    rows = [[page.Named(name, meaning), counts.get(name)] for name, meaning in FINDINGS.items()]
    ending = (
        "" if counts.get("train_overlap") is not None else " Overlap was not checked: the training rows are not known."
    )
    return [
        page.table(["finding", "rows"], rows),
        page.paragraph(
            f"Listed by row id in audit.jsonl; `caldpo preview CONFIG --row ID` shows one.{ending}", "quiet"
        ),
    ]


# -- a sweep -------------------------------------------------------------------------------------------------------


def _sweep_page(folder: Path) -> tuple[str, list[Picture]]:
    way_out = "the same `caldpo sweep` command writes it again"
    found = read_json(folder / "sweep.json", way_out, "name", "metric", "leader_board")
    trials = _read_trials(folder / "trials.parquet")
    seen = [_trial(line, _world_metrics(folder / "trials" / line["trial"] / "eval.json")) for line in trials]
    facts = SweepFacts(found["metric"], found.get("mode", "max"), seen, found["leader_board"])
    pictures = draw_sweep(facts)
    parts = [
        page.paragraph(found["verdict"], "verdict") if found.get("verdict") else "",
        page.section("Leader board", *_leader_board(found)),
        page.section("Against DPO", *_differences(found)),
        page.section("Figures", page.figures(pictures)),
        page.section("Cost", *_sweep_cost(found, trials)),
        page.section("What was searched", _spaces(found)),
        page.folded(f"All {len(trials)} trials", _trial_table(facts.metric, trials), printed=False),
    ]
    seeds = found.get("seeds", len({line["seed"] for line in trials}))
    num_seeds = len(seeds) if isinstance(seeds, list) else seeds
    better = "higher is better" if facts.mode == "max" else "lower is better"
    subtitle = f"Sweep over {', '.join(facts.objectives)} · {num_seeds} seeds · {facts.metric}, {better}"
    return page.page(found["name"], subtitle, parts, _footer()), pictures


def _read_trials(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    way_out = "the same `caldpo sweep` command writes it again"
    try:
        lines: list[dict[str, Any]] = pq.read_table(io.BytesIO(read_bytes(path))).to_pylist()
        for line in lines:
            line["parameters"] = json.loads(line["parameters"])
        if not lines:
            raise InputError(f"report {path.parent}: the sweep has no finished trial yet; ask again when one is")
        lacking = {"trial", "objective", "point", "seed", "state"} - lines[0].keys()
        if lacking:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise NotReady(f"{path}: cannot be read ({last_line(error)}); {way_out}") from None
    return lines


def _world_metrics(evaluation: Path) -> dict[str, float]:
    """Of a trial on the embedded world that `caldpo evaluate` has sampled; nothing of others."""
    if not evaluation.exists():
        return {}
    found = read_json(evaluation, "delete it; `caldpo evaluate` writes it again")
    return {name: value for name, value in found.items() if name.startswith("world/")}


def _trial(line: Mapping[str, Any], world: Mapping[str, float]) -> Trial:
    metrics = {
        name.removeprefix("report/"): float(value)
        for name, value in line.items()
        if name.startswith("report/") and value is not None
    }
    names = (line["trial"], line["objective"], line["point"], line["seed"])
    return Trial(*names, line["parameters"], line["state"], metrics | dict(world))


def _leader_board(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [place, page.Named(line["objective"], _describe(line.get("parameters", {}))), line["mean"],
         _ends(line), line.get("standard_error"), line.get("seeds")]
        for place, line in enumerate(found["leader_board"], start=1)
    ]  # fmt: skip
    header = ["", "objective", found["metric"], "95 % interval", "standard error", "seeds"]
    note = "The best point of each objective was chosen on the selection half of the held-out rows; these are the report half."
    return [page.table(header, rows), page.paragraph(note, "quiet") if rows else ""]


def _ends(line: Mapping[str, Any]) -> page.Interval | None:
    """A single seed has no interval."""
    ends = line.get("interval")
    return None if ends is None or None in ends else page.Interval(ends)


def _describe(parameters: Mapping[str, Any]) -> str:
    """Settings in a line; without the section that a key stands in."""
    shown = {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else page.show(value)
        for key, value in parameters.items()
    }
    return ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in shown.items())


def _differences(found: Mapping[str, Any]) -> list[str]:
    differences: Iterable[Mapping[str, Any]] = found.get("differences_to_dpo") or []
    rows = [[page.Named(each["objective"], each.get("text", "")), each["mean"], _ends(each)] for each in differences]
    return [page.table(["objective", f"{found['metric']}, minus that of DPO", "95 % interval"], rows)]


def _sweep_cost(found: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> list[str]:
    def line(name: str, of: Sequence[Mapping[str, Any]]) -> list[Any]:
        states = [sum(trial["state"] == state for trial in of) for state in ("completed", "stopped", "failed")]
        sums = [
            round(sum(trial.get(key) or 0 for trial in of), 1)
            for key in ("rows", "policy_seconds", "reference_seconds", "wait_seconds")
        ]
        return [name, len(of), *states, int(sums[0]), *sums[1:]]

    objectives = list(dict.fromkeys(trial["objective"] for trial in trials))
    rows = [line(name, [trial for trial in trials if trial["objective"] == name]) for name in objectives]
    header = ["objective", "trials", "completed", "stopped", "failed", "rows", "policy s", "reference s", "waiting s"]
    return [page.table(header, [*rows, line("all", trials)]), _describe_reference(found.get("reference") or {})]


def _describe_reference(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    saved = facts.get("seconds_saved")
    return page.paragraph(
        f"The reference scored {page.show(facts.get('rows_scored'))} rows, once for all trials;"
        f" {page.show(facts.get('rows_joined'))} were known before."
        + ("" if saved is None else f" Scoring for every trial would have taken {page.show(saved)} s more.")
    )


def _spaces(found: Mapping[str, Any]) -> str:
    """Per objective what was held fixed, and what was searched."""
    shown = {}
    for name, space in (found.get("objectives") or {}).items():
        fixed, searched = space.get("objective", {}), ", ".join(space.get("searched", []))
        shown[name] = f"searched: {searched}; default: {_describe(fixed)}" if searched or fixed else _describe(space)
    return page.facts_table(shown)


def _trial_table(metric: str, trials: Sequence[Mapping[str, Any]]) -> str:
    header = ["trial", "objective", "parameters", "seed", "state", "reason", metric, "rows", "policy s"]
    rows = [
        [each["trial"], each["objective"], _describe(each["parameters"]), each["seed"], each["state"], each.get("reason"),
         each.get(f"report/{metric}"), each.get("rows"), each.get("policy_seconds")]
        for each in trials
    ]  # fmt: skip
    return page.table(header, rows)
