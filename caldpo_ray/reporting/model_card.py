"""The README.md of an exported model: what it was trained on, against and by."""

import re
from pathlib import Path
from typing import Any

import yaml

from caldpo_ray.config import Config

SHOWN = (
    "rewards/accuracies",
    "logratios/chosen",
    "logratios/rejected",
    "logratios/margins",
    "calibration/error",
    "loss",
)
HUB_DATASET = re.compile(r"(?:hub:|hf://datasets/)([^/:@]+/[^/:@]+)")
USAGE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(name{options})
model = AutoModelForCausalLM.from_pretrained(name{options})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


def write_model_card(folder: Path, config: Config, manifest: dict[str, Any], evaluation: dict[str, Any] | None) -> None:
    """Write `README.md` in the Hugging Face form: a YAML head, then prose. No path of this machine is in it."""
    base = _base_name(config, manifest)
    sources = [source for source in (config.data.train, config.data.eval) if isinstance(source, str)]
    datasets = [match[1] for source in dict.fromkeys(sources) if (match := HUB_DATASET.match(source))]
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        **({"datasets": list(dict.fromkeys(datasets))} if datasets else {}),
        "tags": ["caldpo-ray", config.objective.name, "preference-alignment"],
    }
    parameters = [f"{key} = {value}" for key, value in manifest["objective"].items() if key != "name"]
    lines = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n# {config.run.name}\n",
        f"Aligned from `{base}` with **{config.objective.name}** by caldpo_ray.\n",
        f"- objective: {', '.join([config.objective.name, *parameters])}",
        f"- loss of a row: `{config.objective.formula}`",
        f"- data: {', '.join(f'`{_source_name(source)}`' for source in sources)}",
        f"- training rows: {manifest['train_rows']}, held out: {manifest['eval_rows']}",
        f"- weights of the base: `{manifest['policy']['digest']}`",
        f"- reference: {_reference(config, manifest)}",
        f"- identity of the run: `{manifest['identity']}`",
        f"- versions: {', '.join(f'{name} {number}' for name, number in manifest['versions'].items())}",
        USAGE.format(name=config.run.name, options=", trust_remote_code=True" * config.model.trust_remote_code),
    ]
    if evaluation is not None:
        lines.append(f"\n## Held-out metrics at step {evaluation['step']} (log-ratios in nats)\n")
        lines += [f"- `{name}`: {evaluation[name]:.4f}" for name in SHOWN if name in evaluation]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _base_name(config: Config, manifest: dict[str, Any]) -> str:
    on_hub = manifest["policy"]["digest"].startswith("hub:")
    return config.model.name_or_path if on_hub else _folder_name(config.model.name_or_path)


def _folder_name(path: str) -> str:
    """The last part of a folder or URL; of a run's model the name of the run."""
    *around, last = path.rstrip("/").split("/")
    return around[-1] if last in ("model", "best") and around and around[-1].strip(".") else last


def _source_name(source: str) -> str:
    """A dataset's name on the hub; of files the last part of their path, of a pattern with its folder."""
    if HUB_DATASET.match(source):
        return source
    parts = source.rstrip("/").split("/")
    return "/".join(parts[-2:] if "*" in parts[-1] else parts[-1:])


def _reference(config: Config, manifest: dict[str, Any]) -> str:
    """The frozen model by the name that people know it by, and by the key of its log-probs."""
    if manifest["reference"] is None:
        return "none"
    given = config.reference.name_or_path
    if given is None:
        name = "the base"
    else:
        on_hub = given.count("/") == 1 and given[0] not in "/." and not Path(given).exists()
        name = f"`{given if on_hub else _folder_name(given)}`"
    return f"{name} (log-probs under `{manifest['reference']['key']}`)"
