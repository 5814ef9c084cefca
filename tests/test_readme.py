"""What the README and the pages of docs/ name exists, and no page of docs/ is left unlinked."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def links(page: Path) -> list[tuple[str, str]]:
    """(path, heading) of each link within the repository."""
    found = re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    return [(path, heading) for path, heading in found if "://" not in path]


def test_named_paths_exist():
    text = README + DESIGN[: DESIGN.index("## A model is data")]
    named = set(re.findall(r"`((?:tests|megalora|examples|docs|benchmarks|tools|scripts)/[\w./-]*)`", text))
    named |= set(re.findall(r"^(megalora/[\w./]+|benchmarks/|scripts/slurm/)\s", text, flags=re.MULTILINE))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for path, heading in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} does not exist"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{path} has no heading {heading}"


def test_every_page_is_linked_from_the_readme():
    linked = {path for path, _ in links(ROOT / "README.md")}
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"docs/{page.name}" not in linked] == []


def test_files_that_the_design_names_exist():
    """In the table of what a change costs, paths are relative to the package; "new" files are to come."""
    table = DESIGN[DESIGN.index("## What a change should cost") : DESIGN.index("## What proves it")]
    named = re.findall(r"(new )?`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", table)
    assert len(named) > 15
    assert [path for new, path in named if not new and not (ROOT / "megalora" / path).exists()] == []


def test_the_floors_of_the_design_name_every_module():
    """Every module and package right below megalora/ is on a floor of the table."""
    table = DESIGN[DESIGN.index("## Floors") : DESIGN.index("## A model is data")]
    named = {name.rstrip("/") for name in re.findall(r"`([\w/]+)`", table)}
    found = {
        path.stem for path in (ROOT / "megalora").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__", "__main__"} <= named


def test_the_readme_is_short():
    assert README.count("\n") <= 170
