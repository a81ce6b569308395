"""Entry point of ``python -m sim_server``."""

import sys

from sim_server.cli import main

sys.exit(main())
