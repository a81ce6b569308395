"""Lets asyncua read a message forwards only.

asyncua takes the length of a text or a ByteString as the message has it. All that is negative but -1 moves its place in
the message back, so that an array can be read from the same bytes without end: five bytes of a hostile server take all
memory. Everything of a connection that asyncua decodes (answers without values, handshake, what is encrypted) goes
through its `Buffer`, which is mended here for the process, since it is made in many places.

Source: OPC UA Part 6, 5.2.2.4 (a null String has the length -1; nothing else is negative).
"""

from __future__ import annotations

from asyncua.common.utils import Buffer, NotEnoughData

_read, _skip = Buffer.read, Buffer.skip


def _forwards(size: int) -> None:
    if size < 0:
        raise NotEnoughData(f"a length of {size}")


def _read_forwards(self: Buffer, size: int) -> bytes:
    _forwards(size)
    return _read(self, size)


def _skip_forwards(self: Buffer, size: int) -> None:
    _forwards(size)
    _skip(self, size)


def mend() -> None:
    """Refuse negative lengths from now on; more than once is no matter."""
    Buffer.read, Buffer.skip = _read_forwards, _skip_forwards  # type: ignore[method-assign]
