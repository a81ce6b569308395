"""How to reach an OPC UA server and log in; secrets are read from where they are kept, never written here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError
from .units import DurationNs, Name, Section, Wrong


class ServerConfig(Section):
    """One OPC UA server and how to log in."""

    name: Name
    endpoint: str
    policy: Literal["None", "Basic256Sha256"] = "Basic256Sha256"
    mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    insecure: bool = False
    user: str = ""
    password_env: str = Field(default="", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    password_file: Path | None = None
    server_certificate: Path | None = None
    pki: Path = Path("pki")
    timeout: DurationNs = 4 * 10**9

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, value: str) -> str:
        if not re.match(r"^opc\.tcp://[^/\s:]+(:\d+)?(/\S*)?$|^opc\.tcp://\[[0-9a-fA-F:]+\](:\d+)?(/\S*)?$", value):
            raise ValueError("an endpoint such as 'opc.tcp://192.0.2.10:4840/'")
        return value

    @model_validator(mode="after")
    def _secure(self) -> ServerConfig:
        if self.policy == "None" and not self.insecure:
            raise Wrong("policy Basic256Sha256, or 'insecure: true' typed beside 'policy: None'", ("policy",), "None")
        if self.policy != "None" and self.server_certificate is None and not self.insecure:
            raise Wrong("the file of the certificate this client trusts, or 'insecure: true'", ("server_certificate",))
        if self.user and self.policy == "None":
            raise Wrong("a policy other than None beside a user name: a password never travels in clear",
                         ("policy",), "None")
        if self.user and not (self.password_env or self.password_file):
            raise Wrong("password_env (a variable's name) or password_file beside it; never the password itself",
                         ("user",), self.user)
        return self

    def password(self) -> str:
        """Return the password from its variable or file; ConfigError where it is not there."""
        key = f"servers.{self.name}"
        if self.password_env:
            if self.password_env not in os.environ:
                raise ConfigError("the variable with the password is not set", key=f"{key}.password_env",
                                  value=self.password_env, next_step=f"set {self.password_env} in the environment")
            return os.environ[self.password_env]
        assert self.password_file is not None
        try:
            if os.name == "posix" and self.password_file.stat().st_mode & 0o077:
                raise ConfigError("the password file is readable by others", key=f"{key}.password_file",
                                  value=str(self.password_file), expected="mode 0600",
                                  next_step=f"chmod 600 {self.password_file}")
            return self.password_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError("the password file cannot be read", key=f"{key}.password_file",
                              value=str(self.password_file), next_step=f"check the path: {error}") from error
