"""Check the hosts of a run: torchrun --nproc_per_node N tools/doctor.py FLAGS (--help lists them)."""

import sys

from megalora.cli import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
