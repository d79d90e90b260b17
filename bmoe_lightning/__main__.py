"""`python -m bmoe_lightning`, the same as the command `bmoe-lightning`."""

import sys

from bmoe_lightning.command.main import main

if __name__ == "__main__":
    sys.exit(main())
