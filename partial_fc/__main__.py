"""`python -m partial_fc`, as launchers that start modules want it: the command `partial-fc`."""

import sys

from partial_fc.training.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
