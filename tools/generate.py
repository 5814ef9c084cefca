"""Reply to prompts: torchrun --nproc_per_node N tools/generate.py FLAGS (--help lists them)."""

import sys

from megalora.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
