"""docs/models.md and the table in README.md: current, and what they say is tested is what the tests' tables run."""

import importlib
import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest
from oracle import CLASSIC, ENCODERS, EXPERTS, FAMILIES, IMAGES, MODERN, SEQ2SEQ, fields_of

from megalora.models.config import known_families
from megalora.models.supported import MARKERS, families, models_page, readme_table, summary
from megalora.models.tested import CELLS, FEATURES, cell

ROOT = Path(__file__).resolve().parents[2]
# With which the tests of CUDA graphs (tests/test_gpu_step.py) have passed on a GPU; of an H200, at 3d5f12b.
ON_GPU = {*FAMILIES, "deberta", "deberta-v2", "gemma2", "granite", "starcoder2"}
ON_GPU |= {"deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"}
ALL_AXES = {"TP", "SP", "PP", "DP", "recompute"}


def module(path: str):
    """The test module at tests/`path`."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def kind(family: str) -> str:
    """The first model type of the family of a row of `oracle`."""
    return known_families()[fields_of(family)["model_type"]].types[0]


def axes(runs) -> dict[str, set[str]]:
    """Model type -> features that these runs of 4 processes have."""
    found = defaultdict(set)
    for run in runs:
        dp = 4 // (run.tp * run.pp * run.cp)
        has = {"TP": run.tp > 1, "SP": run.sequence_parallel, "PP": run.pp > 1, "DP": dp > 1}
        has["recompute"] = run.recompute != "none"
        found[kind(run.family)] |= {name for name, it_has in has.items() if it_has}
    return found


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
    runs += [run for family in EXPERTS for run in experts.layouts(family)]
    runs += classes.layouts() + pairs.layouts() + images.layouts()
    every = [*variants.layout_runs(list(MODERN), every=True), *classic.layouts(every=True)]
    in_suite, in_proof = axes(runs), axes([*every, *classes.layouts(every=True), *pairs.layouts(every=True)])
    for family in FAMILIES:  # test_the_cases_cover_what_they_promise
        in_suite[family] |= ALL_AXES
    found = {name: {"yes": {k for k, has in in_suite.items() if name in has}} for name in ALL_AXES}
    for name in ALL_AXES:
        found[name]["proof"] = {k for k, has in in_proof.items() if name in has} - found[name]["yes"]
    modern, six = set(map(kind, MODERN)), set(FAMILIES)
    packed = six | modern | set(map(kind, {case.family for case in classes.PARITY}))
    packed |= set(map(kind, SEQ2SEQ | IMAGES))
    packed |= {family for family, _ in classic.VARIANTS.values() if family not in classic.REMOTE}
    packed |= {"btlm", "chatglm", "internlm2"}
    found["packing"] = {"yes": packed}
    found["parity"] = {"yes": packed | set(EXPERTS)}
    found["CUDA graphs"] = {"yes": ON_GPU}
    replies = six | modern | set(map(kind, SEQ2SEQ | IMAGES)) | set(EXPERTS) | {"gpt2", "bloom", "falcon", "gptj"}
    replies |= multimodal.REPLIES
    by_token = {family for family, _ in classic.VARIANTS.values()} | set(experts.CACHED)
    found["generate"] = {"yes": replies, "cache": by_token - replies, "labels": set(map(kind, ENCODERS))}
    counted = {nodes.FIELDS["model_type"], "qwen3", *nodes.OLDER}
    counted |= {
        fields["model_type"] for fields in (*nodes.DORAS.values(), *nodes.FUSED.values()) if "model_type" in fields
    }
    counted |= {kind(name) for name in MODERN if "phi3" not in name and name not in nodes.NO_KERNEL}
    found["plan"] = {"yes": counted}
    found["convert"] = {"yes": six | {"gpt2", "falcon", "blip-2", *fused.STACKED, *multimodal.MODELS}}
    read = {"blip-2", *multimodal.MODELS, *fused.STACKED, *fused.APART}
    read |= {family for family, _ in files.MODELS.values()}
    found["PEFT files"] = {"yes": six | read}
    return found


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_the_table_says_what_is_tested(feature, tested):
    said, wanted = {}, {}
    other = "untested" if feature.needs_gpu else "shared"
    for family in families():
        name = family.types[0]
        said[name] = cell(feature, name)
        wanted[name] = next((c for c, kinds in tested[feature.name].items() if name in kinds), other)
    assert said == wanted and set(said.values()) <= set(CELLS)
    assert all((ROOT / file).exists() for file in feature.tests)


def test_the_page_is_current():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert page == models_page() + "\n", "run: python -m megalora.models > docs/models.md"


def test_the_table_of_the_readme_is_current():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = (readme.index(marker) for marker in MARKERS)
    assert readme[begin : end + len(MARKERS[1])] == readme_table(), "run: python -m megalora.models readme"


def test_the_tests_run_every_family():
    modern = {row["model_type"] for row in (MODERN | SEQ2SEQ | ENCODERS | IMAGES).values()}
    around = {kind for kind, family in known_families().items() if family.inner}  # tests/test_multimodal.py
    assert set(FAMILIES) | set(EXPERTS) | set(CLASSIC) | modern | around == set(known_families())


@pytest.mark.parametrize("family", families(), ids=lambda family: family.types[0])
def test_every_family_says_which_models_it_is_for(family):
    models, apart = summary(family)
    assert models and apart
