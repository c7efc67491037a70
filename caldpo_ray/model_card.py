"""The README.md of an exported model: what it was trained on, against and by."""

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


def write_model_card(folder: Path, config: Config, manifest: dict[str, Any], evaluation: dict[str, Any] | None) -> None:
    """Write `README.md` in the Hugging Face form: a YAML head, then prose."""
    head = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["caldpo-ray", config.objective.name, "preference-alignment"]}
    )
    objective = ", ".join(f"{key} = {value}" for key, value in manifest["objective"].items() if key != "name")
    lines = [
        f"---\n{head}---\n\n# {config.run.name}\n",
        f"Aligned from `{config.model.name_or_path}` with **{config.objective.name}** ({objective}) by caldpo_ray.\n",
        f"- training rows: {manifest['train_rows']}, held out: {manifest['eval_rows']}",
        f"- weights of the base: `{manifest['policy']['digest']}`",
        f"- reference: `{(manifest['reference'] or {}).get('key')}`",
        f"- identity of the run: `{manifest['identity']}`",
        f"- versions: {', '.join(f'{name} {number}' for name, number in manifest['versions'].items())}",
    ]
    if evaluation is not None:
        lines.append(f"\n## Held-out metrics at step {evaluation['step']} (log-ratios in nats)\n")
        lines += [f"- `{name}`: {evaluation[name]:.4f}" for name in SHOWN if name in evaluation]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
