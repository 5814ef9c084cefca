"""Print docs/models.md: python -m megalora.models"""

import sys

from megalora.models.supported import models_page

if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("usage: python -m megalora.models")
    print(models_page())
