"""What stands between this process and a cluster, each thing in one message: address, token, version."""

import http.client
import json
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caldpo_ray.errors import NotReady, last_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # of a dashboard on this machine, or at the end of a `kubectl port-forward`
SECONDS = 10.0  # for an answer
OTHER_SERVER = "is something else than Ray's dashboard, whose port is 8265; 6379 is for processes that join the cluster"
# On the one node of a cluster that was started for a process of ours alone.
OWN_CLUSTER = {"caldpo.io/cluster": "own"}
GIVE_TOKEN = (
    "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as the cluster has them (cluster/README.md)"
)


def lost_cluster() -> str | None:
    """The address of a cluster that `ray start` made on this machine and that is gone, where Ray would join it.

    A head that was killed leaves its address behind, and Ray tries it in silence for a quarter of an hour.
    """
    record = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if os.environ.get("RAY_ADDRESS") or not record.is_file():
        return None
    address = record.read_text().strip()
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, ValueError):
        return address
    return None


def is_our_own(labels: Iterable[dict[str, str]]) -> bool:
    """Whether a cluster whose nodes have these labels is one: nobody adds a node to it, or takes one away."""
    return any(OWN_CLUSTER.items() <= each.items() for each in labels)


def refusal(error: Exception, where: str) -> str:
    """What to tell of the error with which Ray would not let this process join the cluster `where`."""
    text = "\n".join(_chain(error))
    if "Version mismatch" in text:
        theirs, ours = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
        return (
            f"Ray: {where} runs Ray {theirs[0]} on Python {theirs[1]}, and this is Ray {ours[0]} on Python {ours[1]}; they must"
            " be the same: take the cluster's image, or install its versions here"
        )
    if (said := re.search(r"^.*(unauthenticated|authentication|\btoken\b).*$", text, re.I | re.M)) is not None:
        sentence, _, _ = said[0].partition(". ")  # Ray's own advice follows
        return f"Ray: {where} refuses this process ({sentence}); {GIVE_TOKEN}"
    return f"Ray: {where} cannot be used ({last_line(error)}); check RAY_ADDRESS, or unset it"


def _chain(error: BaseException | None) -> list[str]:
    """Of the error and of what it came from: Ray says of a wrong token that it failed to connect, and why in the cause."""
    found = []
    while error is not None:
        found.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return found


def look(address: str) -> list[str]:
    """Lines about the cluster that takes jobs at `address`: its version, and its nodes with what they have.

    Raises NotReady with the one thing that keeps `ray job submit` from it.
    """
    theirs, ours = _ask(address, "/api/version").get("ray_version"), version("ray")
    if theirs != ours:
        raise NotReady(
            f"{address}: runs Ray {theirs}, and this is Ray {ours}; they must be the same: pip install 'ray=={theirs}'"
        )
    nodes = _ask(address, "/api/v0/nodes?detail=true&limit=10000")["data"]["result"]["result"]
    return [
        f"{address}: Ray {theirs}, {len(nodes)} node{'s' * (len(nodes) != 1)}",
        *(_describe(node) for node in nodes),
    ]


def _ask(address: str, path: str) -> dict[str, Any]:
    token, source = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise NotReady(f"{address}: asks for a token and got none; {GIVE_TOKEN}") from None
        if error.code == 403:
            raise NotReady(f"{address}: refuses the token of {source}; {GIVE_TOKEN}") from None
        raise NotReady(f"{address}: answers {error.code} to {path}; is this Ray's dashboard?") from None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise NotReady(f"{address}: {OTHER_SERVER}") from None
        raise NotReady(
            f"{address}: no answer ({reason}); is the cluster up, and does `kubectl port-forward svc/NAME-head-svc 8265:8265` run?"
            " RAY_API_SERVER_ADDRESS or --address is another address"
        ) from None
    except http.client.HTTPException:  # of a server that does not speak HTTP, as the one whose port `ray start` prints
        raise NotReady(f"{address}: {OTHER_SERVER}") from None
    return found


def _token() -> tuple[str, str]:
    """(the token that `ray job submit` would send, where it comes from); empty where it would send none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "", ""
    token, source = os.environ.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        try:
            token, source = path.read_text(errors="replace").strip() if path.is_file() else "", str(path)
        except OSError as error:
            raise NotReady(f"{path}: the token in it cannot be read ({error.strerror}); {GIVE_TOKEN}") from None
    if not re.fullmatch("[!-~]*", token):  # the error of a header that cannot be sent would show it
        raise NotReady(f"{source}: holds no token, which is one word of ASCII; {GIVE_TOKEN}")
    return token, source


def _describe(node: dict[str, Any]) -> str:
    has, labels = node["resources_total"], node["labels"]
    own = {key: value for key, value in labels.items() if not key.startswith("ray.io/")}
    return f"  {node['node_ip']} ({node['state'].lower()}): {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU, labels {own}"
