"""Looks up the output nodes on a connection: are they there, may they be written, of which type are they?"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import NodeProblem
from ..nodes import RESULT_SIGNALS
from .nodes import ACCEPTS, NodeRef, read_facts, resolve
from .session import Session
from .wire_requests import WriteTo
from .write_outputs import NO_RIGHT, NOT_THERE, OUTSIDE, Output, ServerOutputs
from .write_rules import WriteRules


async def look_up(
    session: Session, outputs: ServerOutputs, chosen: Sequence[Output], rules: WriteRules
) -> tuple[list[Output], int]:
    """Take up the chosen outputs that can be written, and take out the others, each with its reason.

    Returns those that had missed what was offered meanwhile, and how many lie outside the allow-list.
    Raises ConnectionProblem where the server cannot be asked.
    """
    found = await resolve(session, [output.node for output in chosen])
    known: list[tuple[Output, NodeRef]] = []
    outside = 0
    for output in chosen:
        ref = found[output.node]
        if isinstance(ref, NodeProblem):
            outputs.fails(output, NOT_THERE if output.optional else ref.what)
        elif not rules.allows(ref.nsu):
            outside += 1
            outputs.fails(output, f"{ref.nsu} {OUTSIDE}")
        else:
            known.append((output, ref))
    facts = await read_facts(session, [ref for _, ref in known])
    missed = []
    for (output, ref), fact in zip(known, facts, strict=True):
        expected = RESULT_SIGNALS[output.signal]
        if not fact.is_variable:
            outputs.fails(output, NOT_THERE if output.optional else f"there is no such variable ({fact.read_status})")
        elif not fact.writable:
            outputs.fails(output, NO_RIGHT)
        elif fact.type not in ACCEPTS[expected.type]:
            outputs.fails(output, f"its type is {fact.type_name or 'unknown'}, {output.signal} is {expected.type}")
        elif outputs.found(output, WriteTo(ref.id, fact.type, expected.array)):
            missed.append(output)
    return missed, outside
