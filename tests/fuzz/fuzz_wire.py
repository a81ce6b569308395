"""Feeds hostile bytes to the decoders of `client.wire`: they answer with our error, in time, and fill no memory.

    python tests/fuzz/fuzz_wire.py [--seconds 60] [--rounds N] [--seed 0] [--findings FOLDER] [--engine own|atheris]
    python tests/fuzz/fuzz_wire.py --replay FILE

An input is one byte that chooses the decoder, one for the number of values asked for, and the message. Allowed is an
answer, ConnectionProblem, or the UaStatusCodeError that a ServiceFault means. A finding is any other exception, an
index outside an array (the kernels are compiled with bounds checks, into a cache of their own), an answer that
contradicts itself, more than a second of CPU for one input, or memory beyond a gigabyte. It is written to FOLDER, with
the exit code 1; a decoder that does not come back ends the process after 30 s, its input then lies in FOLDER/last.bin.

The engine of our own mutates messages that asyncua encoded and keeps what brought a new outcome; the same seed gives
the same inputs. With `--engine atheris` (pip install atheris) libFuzzer searches by coverage, the kernels as plain
Python.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import mmap
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SLOW_S = 1.0
STUCK_S = 30.0
MEMORY = 2**30
LONGEST = 1 << 18
POOL = 3000
INTERESTING = [
    struct.pack("<i", number)
    for number in (-(2**31), -2, -1, 0, 1, 2, 3, 127, 255, 256, 65535, 65536, 10**6, 2**24, 2**30, 2**31 - 1)
]

Decoder = Callable[[bytes, int], object]


def decoders(wire: Any, ua: Any, buffer: Any, elements: Any) -> list[Decoder]:
    """Everything that takes bytes of a server; the number is how many values were asked for."""
    columns = wire.Columns(16)

    def consistent(samples: Any, raw: bytes) -> object:
        if samples is None:
            return None
        n = len(samples.value)
        lengths = {len(getattr(samples, name)) for name in ("handle", "source_ns", "server_ns", "status", "text_at")}
        if lengths != {n} or n > len(raw):
            raise AssertionError(f"{n} values of {len(raw)} bytes, columns of {lengths}")
        texts = [samples.text(row) is not None for row in range(min(n, 50))]
        return n.bit_length(), sum(texts), int((samples.value != samples.value).sum()).bit_length()

    def publish(raw: bytes, count: int) -> object:
        answer = wire.decode_publish(buffer(raw), columns if count & 1 else None, elements)
        return consistent(answer.samples, raw), answer.status_change is None, answer.other_blocks, answer.refused_acks

    def republish(raw: bytes, count: int) -> object:
        return consistent(wire.read_message(wire.open_republish(buffer(raw), count), columns, elements).samples, raw)

    def history(raw: bytes, count: int) -> object:
        pages = wire.decode_history(buffer(raw))
        pages += wire.decode_history(buffer(raw), [(2, -1, 0)] * len(pages))
        return [consistent(samples, raw) for page in pages for samples in (page.samples, *page.further)]

    return [
        publish,
        lambda raw, count: consistent(wire.decode_read(buffer(raw), count, columns, elements), raw),
        history,
        republish,
        lambda raw, count: len(wire.write_results(buffer(raw))).bit_length(),
        lambda raw, count: wire.check(buffer(raw)),
        lambda raw, count: len(wire.decode(buffer(raw), ua.CreateMonitoredItemsResponse).Results),
        lambda raw, count: wire.decode(buffer(raw), ua.CreateSubscriptionResponse) and None,
    ]


def seeds(ua: Any, encode: Callable[[Any], bytes]) -> list[bytes]:
    """Messages of all kinds, as inputs."""
    kinds = ua.VariantType
    now = datetime(2026, 1, 1, tzinfo=UTC)
    info = ua.DiagnosticInfo(SymbolicId=1, AdditionalInfo="more", InnerStatusCode=ua.StatusCode(5))
    variants = [
        ua.Variant(1.5, kinds.Double), ua.Variant(2.5, kinds.Float), ua.Variant(True, kinds.Boolean),
        ua.Variant(-3, kinds.Int16), ua.Variant(7, kinds.UInt64), ua.Variant("running", kinds.String),
        ua.Variant(now, kinds.DateTime), ua.Variant([1.0, 2.0, 3.0], kinds.Double), ua.Variant(b"xy", kinds.ByteString),
        ua.Variant(["a", "bc"], kinds.String), ua.Variant([[1, 2], [3, 4]], kinds.Int32, [2, 2]),
        ua.Variant([ua.Variant("a", kinds.String), ua.Variant(4, kinds.Byte)], kinds.Variant),
        ua.Variant(ua.DataValue(ua.Variant([1], kinds.Int32), ua.StatusCode(5), now), kinds.DataValue),
        ua.Variant(ua.NodeId("name", 2), kinds.NodeId), ua.Variant(ua.LocalizedText("t", "en"), kinds.LocalizedText),
        ua.Variant(ua.QualifiedName("q", 2), kinds.QualifiedName), ua.Variant(info, kinds.DiagnosticInfo),
        ua.Variant(ua.Range(0.0, 1.0), kinds.ExtensionObject), ua.Variant(ua.StatusCode(5), kinds.StatusCode),
        ua.Variant(None, kinds.Null), ua.Variant(ua.ExpandedNodeId("x", 3, NamespaceUri="urn:a"), kinds.ExpandedNodeId),
    ]
    values = [ua.DataValue(one, ua.StatusCode(0x480), now, now) for one in variants]
    same = [ua.DataValue(ua.Variant(float(i), kinds.Double), None, now, now) for i in range(30)]

    def change(some: list[Any], infos: list[Any]) -> Any:
        items = [ua.MonitoredItemNotification(i, one) for i, one in enumerate(some)]
        return ua.DataChangeNotification(items, infos)

    def published(blocks: list[Any]) -> bytes:
        response = ua.PublishResponse()
        response.Parameters.AvailableSequenceNumbers = [1, 2]
        response.Parameters.NotificationMessage.NotificationData = blocks
        response.Parameters.Results = [ua.StatusCode(), ua.StatusCode(0x807A0000)]
        return encode(response)

    events = ua.EventNotificationList([ua.EventFieldList(1, [ua.Variant("text", kinds.String)])])
    found = [
        b"\x00\x01" + published(blocks)
        for blocks in (
            [], [change(same, [])], [change(values, [info])], [change(values[:1], []), change(same[:2], [info])],
            [events, ua.StatusChangeNotification(ua.StatusCode(0x800A0000), info)], [change(values * 40, [])],
        )
    ]
    read = ua.ReadResponse()
    read.ResponseHeader.ServiceDiagnostics, read.ResponseHeader.StringTable = info, ["a", "b"]
    read.Results = values
    found.append(bytes([1, len(values)]) + encode(read))
    read.Results = same
    found.append(bytes([1, len(same)]) + encode(read))
    history = ua.HistoryReadResponse()
    for some in (same, values, []):
        result = ua.HistoryReadResult()
        result.ContinuationPoint, result.HistoryData = b"point", ua.HistoryData()
        result.HistoryData.DataValues = some
        history.Results.append(result)
    history.Results.append(ua.HistoryReadResult())
    found.append(b"\x02\x00" + encode(history))
    again = ua.RepublishResponse()
    again.NotificationMessage.NotificationData = [change(values, [])]
    found.append(b"\x03\x00" + encode(again))
    write = ua.WriteResponse()
    write.Results, write.DiagnosticInfos = [ua.StatusCode()] * 5, [info]
    found.append(b"\x04\x00" + encode(write))
    fault = ua.ServiceFault()
    fault.ResponseHeader.ServiceResult = ua.StatusCode(ua.StatusCodes.BadNoSubscription)
    fault.ResponseHeader.AdditionalHeader = ua.ExtensionObject(ua.NodeId(1, 1), b"body")
    found += [bytes([number, 0]) + encode(fault) for number in range(8)]
    monitored = ua.CreateMonitoredItemsResponse(DiagnosticInfos=[info])
    fields = ua.EventFieldList(1, variants[:12])  # asyncua reads whatever structure stands here
    monitored.Results = [ua.MonitoredItemCreateResult(FilterResult=one) for one in (ua.Range(0.0, 1.0), fields, None)]
    found.append(b"\x06\x00" + encode(monitored))
    found.append(b"\x07\x00" + encode(ua.CreateSubscriptionResponse()))
    return found


def nested(rng: random.Random) -> bytes:
    """A Variant of Variants, deep or wide."""
    inner = rng.choice(
        [
            b"\x00", b"\x0b" + bytes(8), b"\x0c" + struct.pack("<i", 2) + b"ab", b"\x17\x00", b"\x19\x00",
            bytes([0x80 | rng.randrange(32)]) + rng.choice(INTERESTING),
        ]
    )
    if rng.random() < 0.3:
        return inner
    for _ in range(rng.choice([1, 2, 5, 98, 99, 100, 101, 150, 3000])):
        n = rng.choice([1, 1, 1, 2, 3])
        form = rng.choice([b"\x98" + struct.pack("<i", n), b"\x98" + struct.pack("<i", 1), b"\x18", b"\x17\x01"])
        inner = form + inner * (n if len(inner) < 2000 and form[0] == 0x98 and n > 1 else 1)
    return inner


def mutate(rng: random.Random, pool: list[bytes]) -> bytes:
    """Change an input of the pool in one to eight places."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5, 8])):
        head = 30 if len(data) > 30 and rng.random() < 0.9 else 0  # the header is soon searched through
        at = rng.randrange(head, len(data)) if data else 0
        what = rng.randrange(10) if rng.random() < 0.9 else 8
        if what == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1 and data:
            data[at] = rng.randrange(256)
        elif what in (2, 3):
            data[at : at + 4] = rng.choice(INTERESTING)
        elif what == 4:
            del data[at : at + rng.choice([1, 2, 4, 8, rng.randrange(1, 200)])]
        elif what == 5:
            data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.choice([1, 1, 2, 50])
        elif what == 6:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
        elif what == 7:
            other = rng.choice(pool)
            cut = rng.randrange(len(other) + 1)
            data[at:] = other[cut:]
        elif what == 8 and rng.random() < 0.3:
            del data[at:]
        elif what == 9:
            data[at : at + rng.randrange(1, 12)] = nested(rng)
    return bytes(data[:LONGEST])


class Target:
    """Runs one input and says what came of it."""

    def __init__(self) -> None:
        from asyncua import ua
        from asyncua.common.utils import Buffer
        from asyncua.ua.ua_binary import struct_to_binary

        package = importlib.import_module("opcua_detector")
        client = types.ModuleType("opcua_detector.client")  # without its __init__: only what is fuzzed is compiled
        client.__path__ = [str(Path(package.__path__[0]) / "client")]
        sys.modules.setdefault("opcua_detector.client", client)
        wire = importlib.import_module("opcua_detector.client.wire")
        errors = importlib.import_module("opcua_detector.errors")
        numpy = importlib.import_module("numpy")
        self.allowed = (errors.ConnectionProblem, ua.UaStatusCodeError)
        self.decoders = decoders(wire, ua, Buffer, numpy.array([-1, 0, 1, 2, -1, 5] * 5, numpy.int32))
        self.seeds = seeds(ua, lambda message: bytes(struct_to_binary(message)))

    def __call__(self, data: bytes) -> str:
        """Return the outcome in words without numbers; what is not allowed is raised."""
        if len(data) < 2:
            return "too short"
        number = data[0] % len(self.decoders)
        try:
            seen = self.decoders[number](data[2:], data[1])
        except self.allowed as error:
            return f"{number}: {re.sub('[0-9]+', '#', str(error).partition(chr(10))[0])}"
        return f"{number}: decoded {seen}"


def own_engine(target: Target, seconds: float, rounds: int, seed: int, findings: Path) -> int:
    """Mutate until the time is over; return the exit code."""
    rng = random.Random(seed)
    pool = list(target.seeds)
    outcomes: Counter[str] = Counter()
    findings.mkdir(parents=True, exist_ok=True)
    last = findings / "last.bin"
    last.write_bytes(bytes(LONGEST + 4))
    done = 0
    with last.open("r+b") as file, mmap.mmap(file.fileno(), LONGEST + 4) as shown:
        for data in pool:
            outcomes[target(data)] += 1
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end = time.monotonic() + seconds
        while (time.monotonic() < end) if rounds == 0 else (done < rounds):
            if done % 2000 == 0:
                faulthandler.dump_traceback_later(STUCK_S, exit=True)
            data = mutate(rng, pool)
            shown[: len(data) + 4] = struct.pack("<I", len(data)) + data
            begin = time.process_time()
            try:
                outcome = target(data)
                took = time.process_time() - begin
                if took > SLOW_S:
                    raise AssertionError(f"one input took {took:.1f} s of CPU")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                place = findings / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
                place.write_bytes(data)
                print(f"FOUND after {done} inputs: {error!r}\n  again: python {sys.argv[0]} --replay {place}")
                return 1
            new = outcome not in outcomes
            outcomes[outcome] += 1
            if new or rng.random() < 0.01:
                if len(pool) < POOL:
                    pool.append(data)
                else:  # the messages of asyncua stay
                    pool[rng.randrange(len(target.seeds), POOL)] = data
            done += 1
        faulthandler.cancel_dump_traceback_later()
    last.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    decoded = sum(count for name, count in outcomes.items() if ": decoded " in name)
    print(f"{done} inputs (seed {seed}), {decoded} decoded, {len(outcomes)} outcomes, pool {len(pool)}, "
          f"memory +{grown:.0f} MiB: nothing found")
    if grown > 256:
        print("FOUND: the memory grew")
        return 1
    return 0


def atheris_engine(target: Target, seconds: float, seed: int, findings: Path) -> int:
    """Let libFuzzer search by coverage."""
    import atheris

    findings.mkdir(parents=True, exist_ok=True)
    corpus = findings / "corpus"
    corpus.mkdir(exist_ok=True)
    for data in target.seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    options = [
        f"-max_total_time={int(seconds)}", "-timeout=20", "-rss_limit_mb=3000", f"-seed={seed + 1}",
        f"-artifact_prefix={findings}/", str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], lambda data: target(bytes(data)) and None)
    atheris.Fuzz()
    return 0


def main() -> int:
    """Run one engine, or one input again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=0, help="inputs instead of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "opcua-detector-fuzz")
    parser.add_argument("--replay", type=Path)
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    with tempfile.TemporaryDirectory(prefix="opcua-detector-fuzz-") as cache:
        os.environ["NUMBA_BOUNDSCHECK"], os.environ["NUMBA_CACHE_DIR"] = "1", cache
        if chosen.engine == "atheris":
            import atheris

            os.environ["NUMBA_DISABLE_JIT"] = "1"
            with atheris.instrument_imports(include=["opcua_detector"]):
                target = Target()
            return atheris_engine(target, chosen.seconds, chosen.seed, chosen.findings)
        target = Target()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        if chosen.replay is not None:
            print(target(chosen.replay.read_bytes()))
            return 0
        return own_engine(target, chosen.seconds, chosen.rounds, chosen.seed, chosen.findings)


if __name__ == "__main__":
    sys.exit(main())
