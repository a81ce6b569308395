"""OPC UA values made from plain Python ones.

The library declares its own integer, text and time types but takes plain ones at run time; this is the
one place where that gap is crossed.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, cast

from asyncua import ua

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def status_code(code: int) -> ua.StatusCode:
    """Return a StatusCode."""
    return ua.StatusCode(cast(ua.UInt32, code))


def node_id(identifier: int | str, namespace: int = 0) -> ua.NodeId:
    """Return a numeric or string NodeId."""
    return ua.NodeId(cast(ua.Int32, identifier), cast(ua.Int16, namespace))


def data_value(
    value: ua.Variant,
    status: ua.StatusCode,
    source: datetime | None,
    server: datetime | None,
) -> ua.DataValue:
    """Return a DataValue with both timestamps."""
    return ua.DataValue(value, status, cast(ua.DateTime | None, source), cast(ua.DateTime | None, server))


def to_datetime(ns: int) -> datetime:
    """Return ns since the epoch as an aware UTC datetime; digits below 1 us are cut."""
    return _EPOCH + timedelta(microseconds=ns // 1000)


def to_ns(stamp: datetime) -> int:
    """Return a datetime as ns since the epoch; a naive one counts as UTC."""
    if stamp.tzinfo is None:
        stamp = stamp.replace(tzinfo=UTC)
    return (stamp - _EPOCH) // timedelta(microseconds=1) * 1000


def to_variant(value: float, variant_type: ua.VariantType, status: int) -> ua.Variant:
    """Return a value in the tag's type; null where the status is Bad (OPC UA Part 4, clause 7.11)."""
    if status & 0x8000_0000:
        return ua.Variant(None, ua.VariantType.Null)
    if variant_type == ua.VariantType.Int32:
        return ua.Variant(int(value), variant_type)
    if variant_type == ua.VariantType.Boolean:
        return ua.Variant(bool(value), variant_type)
    if variant_type == ua.VariantType.String:
        return ua.Variant(repr(value), variant_type)
    return ua.Variant(value, variant_type)
