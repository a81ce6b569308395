"""Who may enter the simulated plant, and what a session may write there."""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from asyncua import ua
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.address_space import AddressSpace, AttributeService
from asyncua.server.user_managers import UserManager

from sim_server.ua_types import status_code

_ADMIN = User(role=UserRole.Admin)


class PlantUsers(UserManager):
    """Lets in whom the config names, never as administrator.

    Parameters
    ----------
    passwords
        User name -> password.
    anonymous
        Whether sessions without a user name are let in.

    Notes
    -----
    The library's default manager takes any name with any password and makes ``admin`` an administrator.
    """

    def __init__(self, passwords: Mapping[str, str], anonymous: bool) -> None:
        self._passwords = {name: password.encode() for name, password in passwords.items()}
        self._anonymous = anonymous

    def get_user(
        self,
        iserver: Any,
        username: str | None = None,
        password: str | None = None,
        certificate: Any = None,
    ) -> User | None:
        """Return the session's user, or None, which the server answers with BadUserAccessDenied."""
        if username is None:
            # the library refuses everything to its Anonymous role
            return User(role=UserRole.User) if self._anonymous else None
        known = self._passwords.get(username)
        given = (password or "").encode()
        # compared even for an unknown name, so that the answer takes equally long
        right = hmac.compare_digest(known if known is not None else b"\0", given)
        return User(role=UserRole.User, name=username) if known is not None and right else None


class PlantAttributes(AttributeService):
    """The write service of the plant: fault factors are cast and checked, timestamps may be refused.

    Parameters
    ----------
    aspace
        The address space.
    set_factor
        Called with (parameter, factor) before a fault node is written; returns the status to answer.
    """

    def __init__(self, aspace: AddressSpace, set_factor: Callable[[str, float], ua.StatusCode]) -> None:
        super().__init__(aspace)
        self._set_factor = set_factor
        self._factors: dict[ua.NodeId, str] = {}
        self._value_only: frozenset[ua.NodeId] = frozenset()

    def serve_factors(self, nodes: Mapping[ua.NodeId, str]) -> None:
        """Name the fault nodes: NodeId -> parameter."""
        self._factors = dict(nodes)

    def refuse_timestamps_on(self, nodes: Iterable[ua.NodeId]) -> None:
        """Name the nodes where a write with a status or timestamp gets BadWriteNotSupported."""
        self._value_only = frozenset(nodes)

    async def write(self, params: ua.WriteParameters, user: User = _ADMIN) -> list[ua.StatusCode]:
        """Answer a Write request item by item."""
        results = []
        for item in params.NodesToWrite:
            refused = self._refusal(item)
            if refused is None:
                one = ua.WriteParameters()
                one.NodesToWrite = [item]
                refused = (await super().write(one, user))[0]
            results.append(refused)
        return results

    def _refusal(self, item: ua.WriteValue) -> ua.StatusCode | None:
        if item.AttributeId != ua.AttributeIds.Value:
            return None
        value = item.Value
        if item.NodeId in self._value_only and (
            value.SourceTimestamp is not None
            or value.ServerTimestamp is not None
            or (value.StatusCode is not None and value.StatusCode.value != ua.StatusCodes.Good)
        ):
            return status_code(ua.StatusCodes.BadWriteNotSupported)
        parameter = self._factors.get(item.NodeId)
        if parameter is None:
            return None
        # HMIs guess types: a Float or Int32 written into the Double is meant well
        raw = value.Value.Value if value.Value is not None else None
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
            return status_code(ua.StatusCodes.BadTypeMismatch)
        status = self._set_factor(parameter, float(raw))
        if not status.is_good():
            return status
        item.Value = ua.DataValue(
            ua.Variant(float(raw), ua.VariantType.Double),
            SourceTimestamp=value.SourceTimestamp,
        )
        return None
