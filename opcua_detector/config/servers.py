"""How to reach an OPC UA server and log in; secrets are read from where they are kept, never written here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ..errors import ConfigError
from .units import Bytes, DurationNs, Name, Section, Wrong
from .writing import WritingConfig


class ServerConfig(Section):
    """One OPC UA server and how to log in.

    endpoints : further servers of the same redundant set; their ServiceLevel decides which one is used
    server_certificate : pinned, in place of the trust list `<pki>/trusted`
    expected_host : host name or address that the server's certificate must carry, where a gateway makes the endpoint
        another one
    max_message_size : of one answer of the server; one that sends more is dropped, counted and connected to again
    require_crl : refuse a certificate signed by a CA of which no current CRL lies in `<pki>/crl`
    """

    name: Name
    endpoint: str
    endpoints: tuple[str, ...] = ()
    policy: Literal["None", "Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss"] = "Basic256Sha256"
    mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    insecure: bool = False
    user: str = ""
    password_env: str = Field(default="", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    password_file: Path | None = None
    user_certificate: Path | None = None
    user_key: Path | None = None
    user_key_password_env: str = Field(default="", pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")
    server_certificate: Path | None = None
    expected_host: str = Field(default="", pattern=r"^\S*$")
    require_crl: bool = False
    pki: Path = Path("pki")
    timeout: DurationNs = 4 * 10**9
    max_message_size: Bytes = 64_000_000
    writing: WritingConfig = WritingConfig()

    @field_validator("max_message_size")
    @classmethod
    def _room(cls, value: int) -> int:
        if not 10**6 <= value <= 2 * 10**9:
            raise ValueError("'1 MB' to '2 GB'")
        return value

    @field_validator("endpoint", "endpoints")
    @classmethod
    def _endpoint(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, tuple):
            for one in value:
                cls._endpoint(one)
            return value
        if not re.match(r"^opc\.tcp://[^/\s:]+(:\d+)?(/\S*)?$|^opc\.tcp://\[[0-9a-fA-F:]+\](:\d+)?(/\S*)?$", value):
            raise ValueError("an endpoint such as 'opc.tcp://192.0.2.10:4840/'")
        return value

    @model_validator(mode="after")
    def _secure(self) -> ServerConfig:
        if len({self.endpoint, *self.endpoints}) <= len(self.endpoints):
            raise Wrong("servers that differ from each other and from 'endpoint'", ("endpoints",))
        if self.policy == "None" and not self.insecure:
            raise Wrong("policy Basic256Sha256, or 'insecure: true' typed beside 'policy: None'", ("policy",), "None")
        if self.user and self.policy == "None":
            raise Wrong("a policy other than None beside a user name: a password never travels in clear",
                         ("policy",), "None")
        if self.user and not (self.password_env or self.password_file):
            raise Wrong("password_env (a variable's name) or password_file beside it; never the password itself",
                         ("user",), self.user)
        if self.password_env and self.password_file:
            raise Wrong("password_env or password_file, not both", ("password_file",))
        if (self.user_certificate is None) != (self.user_key is None):
            raise Wrong("user_certificate and user_key side by side", ("user_certificate",))
        if self.user and self.user_certificate is not None:
            raise Wrong("either a user name or a user_certificate, not both", ("user",), self.user)
        if self.user_certificate is not None and self.policy == "None":
            raise Wrong("a policy other than None beside user_certificate: its signature could be taken over",
                        ("policy",), "None")
        return self

    def password(self) -> str:
        """Return the password from its variable or file; ConfigError where it is not there."""
        return self._secret("password_env", self.password_env, "password_file", self.password_file)

    def user_key_password(self) -> str | None:
        """Return the pass phrase of `user_key`, or None where it has none."""
        return self._secret("user_key_password_env", self.user_key_password_env, "", None) \
            if self.user_key_password_env else None

    def _secret(self, env_key: str, variable: str, file_key: str, file: Path | None) -> str:
        """Return a secret from its variable or its 0600 file; no error ever carries any part of it."""
        key = f"servers.{self.name}"
        if variable:
            if not os.environ.get(variable):
                raise ConfigError("the variable with the password is not set", key=f"{key}.{env_key}",
                                  value=variable, next_step=f"set {variable} in the environment")
            return os.environ[variable]
        assert file is not None
        try:
            with file.open("rb") as opened:
                if os.name == "posix" and os.fstat(opened.fileno()).st_mode & 0o077:
                    raise ConfigError("the password file is readable by others", key=f"{key}.{file_key}",
                                      value=str(file), expected="mode 0600", next_step=f"chmod 600 {file}")
                raw = opened.read(65_536)
        except OSError as error:
            raise ConfigError("the password file cannot be read", key=f"{key}.{file_key}", value=str(file),
                              next_step=f"check the path: {error.strerror}") from error
        try:
            text = raw.decode("utf-8").strip("\r\n")
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise ConfigError("the password file is empty or no UTF-8 text", key=f"{key}.{file_key}",
                              value=str(file), next_step="write the password into it, nothing else") from None
        return text
