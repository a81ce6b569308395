"""`python -m opcua_detector` is the command `opcua-detector`."""

from .cli import main

if __name__ == "__main__":
    main()
