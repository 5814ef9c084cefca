"""docs/models.md and the table in README.md: current, and every feature that they name is tested on every family."""

import dataclasses
from pathlib import Path

import pytest
from oracle import CLASSIC, ENCODERS, EXPERTS, FAMILIES, MODERN

from megalora.models.config import known_families
from megalora.models.supported import (
    FEATURES,
    MARKERS,
    RUN_ON_GPU,
    families,
    models_page,
    readme_table,
    summary,
    supports,
)

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page == models_page() + "\n", "run: python -m megalora.models > docs/models.md"


def test_the_table_of_the_readme_is_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = (readme.index(marker) for marker in MARKERS)
    assert readme[begin : end + len(MARKERS[1])] == readme_table(), "run: python -m megalora.models readme"


def test_the_tests_run_every_family():
    modern = {row["model_type"] for row in MODERN.values()}
    assert set(FAMILIES) | set(EXPERTS) | set(CLASSIC) | set(ENCODERS) | modern == set(known_families())
    assert RUN_ON_GPU <= set(FAMILIES)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_names_its_tests(feature):
    text = (ROOT / feature.tests).read_text(encoding="utf-8")
    kinds = ("qwen3", "phi3", "gpt_neox")  # of layers: what the plan counts is told by these
    assert "FAMILIES" in text or all(f'"{kind}"' in text for kind in kinds)


def test_a_family_that_no_gpu_has_run_is_untested():
    new = dataclasses.replace(known_families()["llama"], types=("new",))
    assert {supports(new, feature) for feature in FEATURES if feature.needs_gpu} == {"untested"}
    assert {supports(new, feature) for feature in FEATURES if not feature.needs_gpu} == {"yes"}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.types[0])
def test_every_family_says_which_models_it_is_for(family):
    models, apart = summary(family)
    assert models and apart
