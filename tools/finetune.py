"""Train an adapter: torchrun --nproc_per_node N tools/finetune.py FLAGS (--help lists them)."""

import sys

from megalora.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
