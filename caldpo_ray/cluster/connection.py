"""Joining the cluster this process belongs to, or starting one; and taking back what Ray keeps there for the dead."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from caldpo_ray.cluster.access import OWN_CLUSTER, lost_cluster, refusal
from caldpo_ray.errors import NotReady
from caldpo_ray.reporting.progress import say
from caldpo_ray.resilience.interrupts import own_signals_kept

# In Ray's table of jobs, of every driver of ours: what others keep is not ours to remove.
DRIVER_MARK = {"caldpo_ray": "driver"}
GCS_SECONDS = 60.0  # for Ray's table of jobs


def connect(verbose: bool) -> None:
    """Join the cluster this process belongs to, or start a local one."""
    import logging

    import ray
    from ray.job_config import JobConfig

    if not ray.is_initialized():
        level = logging.INFO if verbose else logging.ERROR
        start = partial(
            ray.init,
            log_to_driver=verbose,
            logging_level=level,
            include_dashboard=None if verbose else False,
            job_config=JobConfig(metadata=dict(DRIVER_MARK)),
        )
        try:
            with own_signals_kept():
                _join_or_start(start)
            removed = remove_groups_of_the_dead()
        except Exception as error:  # a node that is slow to start raises a plain Exception
            raise NotReady(refusal(error, os.environ.get("RAY_ADDRESS", "a local cluster"))) from None
        if removed:
            say(
                f"Ray: removed {removed} placement group(s) of caldpo_ray drivers that were killed; their room is free again"
            )
    if not verbose:
        for name in ("ray", "ray.data", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _join_or_start(start: Callable[..., Any]) -> None:
    """A cluster of our own has a label that says so; Ray refuses labels for one that `ray start` made, and then joins it."""
    if os.environ.get("RAY_ADDRESS"):
        start()
        return
    if (gone := lost_cluster()) is not None:
        say(f"Ray: the cluster at {gone} that `ray start` made is gone; starting one for this command")
        start(address="local", labels=OWN_CLUSTER)
        return
    try:
        start(labels=OWN_CLUSTER)
    except ValueError:
        start()


def remove_groups_of_the_dead() -> int:
    """Remove the placement groups of our drivers that are dead; returns how many there were.

    Ray removes them with their driver, but not one that the driver's actors ask for in the milliseconds in which it is killed:
    their deaths are told before the group is known, and its room is lost for as long as the cluster lives (Ray 2.60).
    """
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub is not whole
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    groups = [bytes.fromhex(key) for key, facts in placement_group_table().items() if facts["state"] != "REMOVED"]
    if not groups:
        return 0
    jobs = GcsClient(address=ray.get_runtime_context().gcs_address).get_all_job_info(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True, timeout=GCS_SECONDS
    )
    dead = {bytes(job) for job, facts in jobs.items() if facts.is_dead and _is_ours(facts.config.metadata)}
    kept = [group for group in groups if group[-4:] in dead]  # it ends with the id of its job
    for group in kept:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))
    return len(kept)


def _is_ours(metadata: Mapping[str, str]) -> bool:
    return all(metadata.get(key) == value for key, value in DRIVER_MARK.items())
