"""The command `caldpo`: one verb per function, errors as one message, exit codes 0, 2, 3 and 130."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from caldpo_ray.errors import InputError, RunError
from caldpo_ray.resilience.interrupts import interrupts_answered

# The base of Typer's usage errors, which it exports under no name of its own.
USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

INTERRUPTED = 130

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
reference_app = typer.Typer(no_args_is_help=True, help="Fill or tend the reference store.")
cluster_app = typer.Typer(no_args_is_help=True, help="Look at a Ray cluster before a job is sent there.")
world_app = typer.Typer(no_args_is_help=True, help="The embedded task whose true reward is known.")
app.add_typer(reference_app, name="reference")
app.add_typer(cluster_app, name="cluster")
app.add_typer(world_app, name="world")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.learning_rate=1e-6")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Ray's and DeepSpeed's own log.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to resume or overwrite an existing run.")] = False,
    verbose: Verbose = False,
) -> None:
    """Align a model; resumes by itself when the run directory holds a checkpoint."""
    from caldpo_ray.pipeline import train as run

    run(config, overrides or [], fresh=fresh, verbose=verbose)


@app.command()
def sweep(config: ConfigPath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Compare objectives and their strengths by many runs over one reference; resumes by itself."""
    from caldpo_ray.sweeps import sweep as compare

    compare(config, overrides or [], verbose)


@app.command()
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", help="Rows to show.", min=1)] = 3,
    row: Annotated[list[str] | None, typer.Option(metavar="ID", help="Find this row instead; may be repeated.")] = None,
) -> None:
    """Show how rows become tokens and which tokens are scored."""
    from rich.console import Console

    from caldpo_ray.config import load_config
    from caldpo_ray.plan import find_rows, pinned, sample_rows
    from caldpo_ray.reading.preview import preview as render

    console, resolved = Console(soft_wrap=True), pinned(load_config(config, overrides or []))
    if row:
        found, tokenizer = find_rows(resolved, row)
        for each in found:
            typer.echo(each.place + (f": cannot be used: {each.reason}" if each.tokens is None else ""))
            console.print(render([each.tokens] if each.tokens else [], tokenizer), end="")
        return
    sample, tokenizer = sample_rows(resolved, count)
    console.print(render(sample.rows, tokenizer))
    for reason, number in sample.bad.most_common():
        typer.echo(f"{number} rows before the last one shown cannot be used: {reason}")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Try a few rows on the cluster: speeds and costs.")
    ] = False,
    on_paper: Annotated[
        str | None,
        typer.Option(
            metavar="GPU", help="Ask no cluster; the arithmetic of a run on this GPU, e.g. 'NVIDIA H100 80GB'."
        ),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Check config, a sample of the data, memory, resources and labels; start nothing."""
    from caldpo_ray.config import load_config
    from caldpo_ray.plan import plan as look

    for line in look(load_config(config, overrides or []), verbose, measure, on_paper):
        typer.echo(line)


@app.command()
def evaluate(
    run_or_model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Held-out rows; a run knows its own.")] = None,
    reference: Annotated[str | None, typer.Option(help="Reference model; default: the one trained against.")] = None,
    beta: Annotated[float | None, typer.Option(help="Default: the one trained with.")] = None,
    scores: Annotated[str | None, typer.Option(help="Write one implicit reward per response here.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for eval.json; default: the run or model.")] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Samples drawn from a model of the world.")] = 1000,
    generate: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Let policy and reference answer N held-out prompts, too.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who prefers one: package.module:function, or an OpenAI-compatible URL.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model to ask at that URL.")] = None,
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for an answer.")] = 60.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a generated answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token every time.")] = 1.0,
    verbose: Verbose = False,
) -> None:
    """Held-out metrics of a run or a model folder, written as eval.json."""
    from caldpo_ray.evaluation import evaluate as measure
    from caldpo_ray.held_out.generation import Generations

    if generate is None and judge is not None:
        raise InputError(f"--judge {judge}: judges generated answers; give --generate N as well")
    asked = None
    if generate is not None:
        asked = Generations(generate, judge, judge_model, judge_timeout, max_new_tokens, temperature)

    measure(
        run_or_model,
        overrides=overrides or [],
        data=data,
        reference=reference,
        beta=beta,
        scores=scores,
        output=output,
        num_samples=num_samples,
        generations=asked,
        verbose=verbose,
    )


@app.command()
def report(path: Annotated[str, typer.Argument(metavar="RUN_OR_SWEEP")]) -> None:
    """Write report.html, one file for phone and print, and figures/*.png."""
    from caldpo_ray.report import report as write

    write(path)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    output: Annotated[str, typer.Option(help="A new folder.")],
) -> None:
    """Copy a run's model as a Hugging Face folder, LoRA merged."""
    from caldpo_ray.export import export as write

    write(run, output)


Store = Annotated[str, typer.Option("--store", help="Folder or URL of the reference store.")]
DEFAULT_STORE = "runs/.cache/reference"


@reference_app.command("build")
def reference_build(config: ConfigPath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Score all rows of a config into its store, without training."""
    from caldpo_ray.config import load_config
    from caldpo_ray.reference_verbs import build_reference

    build_reference(load_config(config, overrides or []), verbose)


@reference_app.command("verify")
def reference_verify(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", help="Responses to score again.", min=1)] = 64,
    verbose: Verbose = False,
) -> None:
    """Check the store's checksums and score random rows again."""
    from caldpo_ray.config import load_config
    from caldpo_ray.reference_verbs import verify_reference

    verify_reference(load_config(config, overrides or []), count, verbose)


@reference_app.command("list")
def reference_list(store: Store = DEFAULT_STORE) -> None:
    """What the store holds: one line per reference."""
    from caldpo_ray.reporting.progress import describe_bytes
    from caldpo_ray.store import list_references

    found = list_references(store)
    for entry in found:
        size = f"{entry['entries']} responses, {describe_bytes(entry['bytes'])}"
        typer.echo(f"{entry['key']}  {size:28s} {entry['dtype']:9s} {entry['model']}")
    if not found:
        typer.echo(f"no reference in {store}")


@reference_app.command("remove")
def reference_remove(key: Annotated[str, typer.Argument(metavar="KEY")], store: Store = DEFAULT_STORE) -> None:
    """Delete one reference's log-probs."""
    from caldpo_ray.store import remove_reference

    remove_reference(store, key)
    typer.echo(f"removed {key} from {store}")


@cluster_app.command("check")
def cluster_check(
    address: Annotated[
        str | None, typer.Option(help="Of the dashboard; default: RAY_API_SERVER_ADDRESS, as for `ray job submit`.")
    ] = None,
) -> None:
    """Would `ray job submit` get through? Tells the cluster's nodes and labels, or what stands in the way."""
    from caldpo_ray.cluster.access import DEFAULT_ADDRESS, look

    for line in look(address or os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)):
        typer.echo(line)


@world_app.command("create")
def world_create(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same files.")] = 0,
) -> None:
    """Write sft.jsonl, train.jsonl, eval.jsonl and model/ (a tokenizer and a config without weights)."""
    from caldpo_ray.world import create_world

    create_world(directory, seed=seed)
    typer.echo(f"world in {directory}")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0 done, 2 wrong input, 3 failed and resumable, 130 interrupted."""
    if os.getcwd() not in sys.path:  # as `python -m` does it, for the user's own objective or row function
        sys.path.insert(0, os.getcwd())
    try:
        with interrupts_answered():
            code: Any = app(arguments, standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except InputError as error:
        code = _complain(error, 2)
    except RunError as error:
        code = _complain(error, 3)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except USAGE_ERROR as error:
        error.show()
        code = 2
    if code == INTERRUPTED:  # Typer, too, makes this code of the exception
        _complain(RuntimeError("interrupted; the same command resumes the run"), code)
    sys.exit(code or 0)


def _complain(error: BaseException, code: int) -> int:
    typer.echo(f"caldpo: {error}\ncaldpo: exit code {code}", err=True)
    return code
