"""`python -m megalora`, and `torchrun -m megalora`."""

import sys

from megalora.cli import main

if __name__ == "__main__":
    sys.exit(main())
