"""Passwords and tokens, kept out of whatever is shown or written down.

A run repeats its config in a dozen files and messages, and libraries put addresses into their errors. So an address with a
secret in it is refused as an option, and every message of ours is cleaned once more, of the environment's secrets, too.
"""

import os
import re

SHOWN = "***"
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# `user:password@` of any address, and `token@` of a web server's. In `hf://datasets/org/name@commit` a slash comes first.
_USER = re.compile(
    r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)|(?<=http://)[^/\s@]+(?=@)|(?<=https://)[^/\s@]+(?=@)", re.IGNORECASE
)
_NAMES = (
    r"[\w.-]*(?:token|secret|passw|pwd|signature|credential|api[_-]?key|access[_-]?key|accesskeyid|auth)[\w.-]*|sig|key"
)
_PARAMETER = re.compile(rf"(?<=[?&;])({_NAMES})=[^&;\s'\"<>)]+", re.IGNORECASE)
_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_KEY|_KEY_ID)$")
_SHORTEST = 8  # characters of a variable's value that is a secret, and not a word that messages may need


def require_no_secret(address: str) -> str:
    """The address itself. Raises ValueError for one with a user name, a password or a token in it."""
    if _SCHEME.match(address) and (_USER.search(address) or _PARAMETER.search(address)):
        raise ValueError(
            "an address must not hold a password or token, which every file of the run would repeat; give it in the environment"
            " (HF_TOKEN, AWS_SECRET_ACCESS_KEY and their like), or download the file first"
        )
    return address


def without_secrets(text: str) -> str:
    """The text with *** for passwords and tokens of addresses, and for the values of variables that are called so."""
    for value in _secrets_of_environment():
        text = text.replace(value, SHOWN)
    return _PARAMETER.sub(rf"\1={SHOWN}", _USER.sub(SHOWN, text)) if "://" in text else text


def _secrets_of_environment() -> list[str]:
    """The longest first: one may be a part of another."""
    values = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST}
    return sorted(values, key=len, reverse=True)
