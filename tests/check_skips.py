"""Fail when a test was skipped that is not on the list of allowed skips with their reasons."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def main(allowed_file: Path, reports: list[Path]) -> int:
    """Return 1 and print every skipped test that is not allowed."""
    lines = allowed_file.read_text(encoding="utf-8").splitlines()
    allowed = [line.split("\t")[0] for line in lines if line and not line.startswith("#")]
    bad, seen = [], 0
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            seen += 1
            skipped = case.find("skipped")
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            if skipped is not None and not any(name.startswith(a) for a in allowed):
                bad.append(f"{name}: {skipped.get('message')}")
    print(f"{seen} tests in {len(reports)} reports, {len(bad)} skipped without leave")
    for line in bad:
        print("  skipped:", line)
    return 1 if bad or seen == 0 else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]))
