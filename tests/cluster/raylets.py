"""Ray's own stand-in for a cloud, whose nodes are raylets on this machine; imported by the autoscaler of a test's cluster."""

from functools import partial
from typing import Any
from unittest.mock import patch

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class RayletProvider(FakeMultiNodeProvider):
    """Each node unpacks a job's working directory for itself, as on hosts of its own: by themselves raylets of one machine
    share that folder, and the one that comes later replaces it under the processes of the others.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        own = partial(RayParams, runtime_env_dir_name=f"runtime_resources_{self._next_node_id + 1}")
        with patch("ray._private.parameter.RayParams", own):
            super()._create_node_with_resources_and_labels(*arguments)
