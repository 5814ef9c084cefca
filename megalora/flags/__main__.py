"""Print docs/flags.md: python -m megalora.flags > docs/flags.md"""

from megalora.flags.help import flags_page

if __name__ == "__main__":
    print(flags_page())
