"""Takes secrets out of text and out of configurations, for logs and support bundles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from ..config import Config
from ..errors import ConfigError

MASK = "***"
LEAST_SECRET = 4  # characters: a shorter one cannot be told from ordinary text
_SECRET_KEY = re.compile(r"passw|pwd|secret|token|credential|private|passphrase|api_?key", re.IGNORECASE)
# These name where a secret is kept; the name tells nothing.
_NO_SECRET = ("password_env", "password_file", "user_key_password_env")
_IN_URL = re.compile(r"//[^/@\s]*@")
_ASSIGNED = re.compile(
    r"""(?i)\b(pass(?:word|wd|phrase)?|pwd|secret|token)\b(\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;'"]+)""")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


class Redactor:
    """Replaces secrets; with `names` and `hosts` also what points at people and machines.

    Parameters
    ----------
    secrets : passwords in clear, to be found wherever they turn up
    names : user names; each becomes a short hash, the same everywhere, so that one user can be told from another
    hosts : host names and addresses of endpoints; each becomes a short hash likewise
    """

    def __init__(self, secrets: Iterable[str] = (), names: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        found: dict[str, str] = {name: f"user-{hashed(name)}" for name in names if name}
        found |= {host: f"host-{hashed(host)}" for host in hosts if host}
        found |= {secret: MASK for secret in secrets if len(secret) >= LEAST_SECRET}
        self._found = found
        every = sorted(found, key=len, reverse=True)  # the longest first: a password may begin with a user's name
        self._pattern = re.compile("|".join(_word(one, found[one] != MASK) for one in every)) if every else None

    @classmethod
    def of(cls, config: Config) -> Redactor:
        """Return the redactor for the secrets that a configuration points at."""
        return cls(secrets=passwords(config))

    @staticmethod
    def hosts_of(config: Config) -> list[str]:
        """Return the hosts of all endpoints of a configuration."""
        return [host for server in config.servers if (host := host_of(server.endpoint))]

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        clean = _PEM.sub(MASK, _IN_URL.sub(f"//{MASK}@", text))
        clean = _ASSIGNED.sub(lambda match: f"{match[1]}{match[2]}{MASK}", clean)
        if self._pattern is None:
            return clean
        return self._pattern.sub(lambda match: self._found[match[0]], clean)

    def content(self, value: Any, key: str = "") -> Any:
        """Return nested mappings and lists without secrets: values by their key, texts by what they hold."""
        if _SECRET_KEY.search(key) and key not in _NO_SECRET and value not in (None, "", False):
            return MASK
        if isinstance(value, Mapping):
            return {self.content(str(k)): self.content(v, str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.content(one, key) for one in value]
        return self.text(value) if isinstance(value, str) else value


def passwords(config: Config) -> list[str]:
    """Return the secrets that this process could read; those that cannot be read cannot leak either."""
    found: list[str] = []
    for server in config.servers:
        for secret in (*((server.password,) if server.user else ()), server.user_key_password):
            with suppress(ConfigError):
                found.append(secret() or "")
    return [one for one in found if one]


def host_of(endpoint: str) -> str:
    """Return the host of an endpoint as it is written, without brackets; empty where there is none."""
    match = re.match(r"[a-z.]+://(?:[^/@]*@)?(\[[^\]]*\]|[^/:]+)", endpoint)
    return match[1].strip("[]") if match else ""


def hashed(text: str) -> str:
    """Return eight hex digits of the SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _word(text: str, whole: bool) -> str:
    """Return the pattern of a text; a name is replaced as a whole word only, a secret anywhere."""
    escaped = re.escape(text)
    return rf"(?<![\w.]){escaped}(?!\w)" if whole else escaped
