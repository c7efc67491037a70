"""Has anything changed since a run stopped with wrong input? A retry by a job controller should then be refused in seconds."""

import hashlib
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caldpo_ray.config import Config
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.reading.sources import list_sources
from caldpo_ray.storage import file_facts, open_path, reaching


def input_stamp(config: Config) -> str:
    """Digest of the config and of every file that it names, by size and time of change (remote files: by fingerprint)."""
    sources = [source for source in (config.data.train, config.data.eval) if isinstance(source, str)]
    paths = [config.model.name_or_path, config.reference.name_or_path, config.train.deepspeed.config]
    compared = [entry if isinstance(entry, str) else str(entry.get("name")) for entry in config.sweep.objectives]
    functions = [config.data.format, config.objective.name, *compared]
    facts = [
        version("caldpo-ray"),
        config.model_dump(mode="json"),
        [_listed(source) for source in sources],
        [_files(path) for path in paths if isinstance(path, str)],
        [file_facts(path) for name in functions if (path := _module_file(name)) is not None],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _listed(source: str) -> Any:
    try:
        return [(file.path, file.fingerprint) for file in list_sources(source)]
    except (InputError, RunError) as error:
        return str(error)


def _files(path: str) -> Any:
    try:
        with reaching("file", path):
            return file_facts(open_path(path))
    except InputError as error:
        return str(error)


def _module_file(name: str) -> Path | None:
    """The file behind `package.module:function`, where there is one."""
    module, colon, _ = name.partition(":")
    try:
        found = importlib.util.find_spec(module) if colon else None
    except (Exception, SystemExit):  # its packages are imported, and may do anything
        return None
    return Path(found.origin) if found is not None and found.origin else None
