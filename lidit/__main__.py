"""`python -m lidit` is the command `lidit`."""

import sys

from lidit.cli import main

if __name__ == "__main__":
    sys.exit(main())
