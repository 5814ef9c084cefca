"""Print docs/models.md, or the table of README.md: python -m megalora.models [readme]"""

import sys

from megalora.models.supported import models_page, readme_table

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["readme"]):
        sys.exit("usage: python -m megalora.models [readme]")
    print(readme_table() if sys.argv[1:] else models_page())
