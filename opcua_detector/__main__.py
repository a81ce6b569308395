"""`python -m opcua_detector` is the command `opcua-detector`.

It imports nothing heavy before its guard stands, so that an interrupt at any moment ends quietly.
"""

import os
import sys

BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> None:
    """Run the command line."""
    for name in BLAS_THREADS:  # the matrices are small: on a busy machine more threads made a fit 5 times as slow
        os.environ.setdefault(name, "1")
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
