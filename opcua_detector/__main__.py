"""`python -m opcua_detector` is the command `opcua-detector`.

It imports nothing heavy before its guard stands, so that an interrupt at any moment ends quietly.
"""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from .cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
