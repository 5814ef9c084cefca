"""docs/models.md is current, and says what the tests' tables run; the models that README.md names are there."""

import importlib
import importlib.util
import re
from collections import defaultdict
from pathlib import Path

import classic_configs
import dense_configs
import expert_configs
import published_configs
import pytest
from oracle import CLASSIC, ENCODERS, EXPERTS, FAMILIES, IMAGES, MODERN, SEQ2SEQ, fields_of

from megalora.models.config import known_families
from megalora.models.supported import families, kind_of, models_page, summary
from megalora.models.tested import CELLS, FEATURES, cell

ROOT = Path(__file__).resolve().parents[2]
# With which the tests of CUDA graphs (tests/test_gpu_step.py) have passed on a GPU: an H200, with transformers 5.17,
# which does not know sarvam_mla.
ON_GPU = {*FAMILIES, "deberta", "deberta-v2", "gemma2", "granite", "qwen3_5_text", "starcoder2"}
ON_GPU |= {run.split(",")[0] for run in EXPERTS} - {"gemma4_text", "llama4_text"}
ON_GPU -= {"sarvam_mla", "granitemoehybrid", "nemotron_h", "phimoe"}
README = re.search(r"^## What is supported$(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]


def module(path: str):
    """The test module at tests/`path`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def kind(family: str) -> str:
    """The first model type of the family of a row of `oracle`."""
    return known_families()[fields_of(family)["model_type"]].types[0]


@pytest.fixture(scope="module")
def tested() -> dict[str, dict[str, set[str]]]:
    """Feature -> cell -> model types, as the tables of the tests have them."""
    pytest.importorskip("peft")
    variants, classic, experts, files, classes, nodes, pairs, fused, images, multimodal = map(
        module,
        ("variants.py", "test_classic.py", "test_experts.py", "test_classic_files.py", "tasks/test_classes.py")
        + ("planning/test_nodes.py", "tasks/test_seq2seq.py", "test_fused_experts.py", "tasks/test_images.py")
        + ("test_multimodal.py",),
    )
    runs = variants.layout_runs(list(MODERN)) + classic.layouts()
    runs += experts.layouts() + classes.layouts() + pairs.layouts() + images.layouts()
    in_suite, in_proof = ({kind(run.family) for run in some} for some in (runs, classic.layouts(every=True)))
    found = {"layouts": {"all": {*FAMILIES}, "yes": in_suite, "proof": in_proof}}
    modern, six = set(map(kind, MODERN)), set(FAMILIES)
    packed = six | modern | set(map(kind, {case.family for case in classes.PARITY}))
    packed |= set(map(kind, SEQ2SEQ | IMAGES))
    packed |= {family for family, _ in classic.VARIANTS.values() if family not in classic.REMOTE}
    packed |= {"btlm", "chatglm", "internlm2"}
    found["packing"] = {"yes": packed}
    found["parity"] = {"yes": packed | set(map(kind, EXPERTS))}
    found["CUDA graphs"] = {"yes": ON_GPU}
    replies = six | modern | set(map(kind, SEQ2SEQ | IMAGES | EXPERTS)) | {"gpt2", "bloom", "falcon", "gptj"}
    replies |= multimodal.REPLIES
    by_token = {family for family, _ in classic.VARIANTS.values()} | set(experts.CACHED)
    found["generate"] = {"yes": replies, "cache": by_token - replies, "labels": set(map(kind, ENCODERS))}
    counted = {nodes.FIELDS["model_type"], "qwen3", *nodes.OLDER}
    counted |= {
        fields["model_type"] for fields in (*nodes.DORAS.values(), *nodes.FUSED.values()) if "model_type" in fields
    }
    counted |= {kind(name) for name in MODERN if "phi3" not in name and name not in nodes.NO_KERNEL}
    found["plan"] = {"yes": counted}
    stacked = set(map(kind, fused.STACKED))
    found["convert"] = {"yes": six | stacked | {"gpt2", "falcon", "blip-2", *multimodal.MODELS}}
    read = stacked | {"blip-2", *multimodal.MODELS, *fused.APART}
    read |= {family for family, _ in files.MODELS.values()}
    found["PEFT files"] = {"yes": six | read}
    return found


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_the_table_says_what_is_tested(feature, tested):
    said, wanted = {}, {}
    other = "untested" if feature.needs_gpu else "shared"
    for family in families():
        name = family.types[0]
        said[name] = cell(feature, name, kind_of(family))
        wanted[name] = next((c for c, kinds in tested[feature.name].items() if name in kinds), other)
    assert said == wanted and set(said.values()) <= set(CELLS)
    assert all((ROOT / file).exists() for file in feature.tests)


def test_the_page_is_current():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page == models_page() + "\n", "run: python -m megalora.models > docs/models.md"


def test_models_that_the_readme_names_are_those_of_a_family():
    """Each line of its list names a kind and models, as the first lines of that kind's families do."""
    named = re.findall(r"^- \*\*(.+?)\*\*: (.+?)\.$", re.sub(r"\n  +", " ", README), re.M)
    assert len(named) == len({kind_of(family) for family in families()})
    for kind, models in named:
        of_kind = " | ".join(summary(family)[0] for family in families() if kind_of(family) == kind.lower())
        assert [model for model in models.split(", ") if model not in of_kind] == [], kind


def test_published_models_that_families_name_are_those_of_the_tests():
    encoders = module("models/test_encoder_configs.py")
    wanted, refused = defaultdict(set), defaultdict(set)
    for tables, found in (
        ((dense_configs.CONFIGS, expert_configs.CONFIGS, classic_configs.CONFIGS, published_configs.CONFIGS), wanted),
        ((encoders.CONFIGS, encoders.PAIRS), wanted),
        ((dense_configs.REFUSED,), refused),
    ):
        for name, row in (item for table in tables for item in table.items()):
            fields = row[0] if isinstance(row, tuple) else row
            found[known_families()[fields["model_type"]].types[0]].add(name)
    for family in families():
        assert {*family.published} == wanted[family.types[0]] and len({*family.published}) == len(family.published)
        assert {*family.refused} == refused[family.types[0]]


def test_the_tests_run_every_family():
    modern = {row["model_type"] for row in (MODERN | EXPERTS | SEQ2SEQ | ENCODERS | IMAGES).values()}
    around = {kind for kind, family in known_families().items() if family.inner}  # tests/test_multimodal.py
    assert set(FAMILIES) | set(CLASSIC) | modern | around == set(known_families())


@pytest.mark.parametrize("family", families(), ids=lambda family: family.types[0])
def test_every_family_says_which_models_it_is_for(family):
    models, apart = summary(family)
    assert models and apart
