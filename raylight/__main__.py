"""`python -m raylight` is the command `raylight`."""

import sys

from raylight.command import main

if __name__ == "__main__":
    sys.exit(main())
