"""Convert weights and adapters: python tools/convert_hf.py COMMAND --input IN --output OUT (--help lists all)."""

import sys

from megalora.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
