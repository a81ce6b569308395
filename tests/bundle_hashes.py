"""Write SHA256SUMS and a hash-checked requirements.txt beside the wheels of `make bundle`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Hash every wheel in `folder`."""
    sums, requirements = [], []
    for wheel in sorted(folder.glob("*.whl")):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        name, version = wheel.name.split("-")[:2]
        sums.append(f"{digest}  {wheel.name}")
        requirements.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}")
    if not sums:
        raise SystemExit(f"{folder}: no wheels; run `make bundle`")
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    print(f"{len(sums)} wheels hashed in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
