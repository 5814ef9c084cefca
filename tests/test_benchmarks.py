"""benchmarks/: RESULTS.md is current, what `record` writes becomes a section of it, and what is timed is right."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import fields_of

from megalora.models.config import config_from_dict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a script of benchmarks/, as they import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def test_the_page_is_current(benchmark):
    results = benchmark("results")
    assert results.PAGE.read_text(encoding="utf-8") == results.page(), "run: python benchmarks/results.py"


def test_a_record_becomes_a_section(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/any.py", "--only", "a b"])
    file = tmp_path / "any.json"
    benchmark("common").record(file, "Any", "Of tests.", "a card", ("what", "ms"), [("this", 2)], {"ms": 2.0})
    section = benchmark("results").section(file)
    assert "## Any" in section and "Card: a card. torch: " + torch.__version__ in section
    assert "python benchmarks/any.py --only 'a b'" in section and "| this | 2 |" in section
    assert json.loads(file.read_text())["figures"] == {"ms": 2.0}


@pytest.mark.parametrize("change", [{"commit": ""}, {"card": None}, {"rows": [["one cell"]]}])
def test_a_result_without_commit_or_card_is_refused(benchmark, tmp_path, change):
    good = {"title": "t", "about": "a", "commands": ["c"], "card": "c", "torch": "2", "commit": "1"}
    good |= {"columns": ["a", "b"]}
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(good | {"rows": [["x", "y"]]} | change))
    with pytest.raises(ValueError, match="odd.json"):
        benchmark("results").section(file)


def test_the_linear_that_is_timed_is_right(benchmark):
    lora_linear = benchmark("lora_linear")
    case = lora_linear.Case(lora_linear.Shape(8, 16, 24, 4, 0.0), torch.device("cpu"), torch.float64)
    x, A, B = (t.clone().requires_grad_() for t in (case.x, case.A, case.B))
    y = x @ case.W.T + x @ A.T @ B.T * lora_linear.SCALING
    expected = [y.detach(), *torch.autograd.grad(y, (x, A, B), case.dy)]
    for ours, theirs in zip(lora_linear.megalora_linear(case, 4)(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 90}
SMALL_T5 = {"num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it
@pytest.mark.parametrize("shape", ["bert-large", "deberta-v3-large", "t5-3b"])
def test_both_contenders_of_encoders_do_the_same(shape, benchmark, monkeypatch, capsys, tmp_path):
    encoders, file = benchmark("encoders"), tmp_path / "it.json"
    change = json.dumps(SMALL_T5 | {"vocab_size": 90} if shape == "t5-3b" else SMALL)
    words = f"{shape} --rows 2 --seq_length 12 --steps 1 --warmup 1 --dropout 0 --base_dropout false --r 4".split()
    words += ["--source_length", "9"] if shape == "t5-3b" else []
    monkeypatch.setattr(
        sys, "argv", ["encoders.py", *words, "--device", "cpu", "--change", change, "--output", str(file)]
    )
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    encoders.main()
    assert "without dropout the losses are" in capsys.readouterr().out
    results = json.loads(file.read_text())["figures"]["results"]
    assert results["ours"]["loss"] == pytest.approx(results["peft"]["loss"], rel=1e-5)
    with pytest.raises(SystemExit, match="do not do the same"):
        encoders.compared({"ours": 2.0, "peft": 2.1}, torch.bfloat16)


@pytest.mark.parametrize("base_format", ["fp8", "nf4", "nf4_fp8"])
def test_a_quantised_base_is_filled_with_the_weights_of_every_expert(base_format, benchmark):
    generate, common = benchmark("generate"), benchmark("common")
    fields = fields_of("qwen3_moe")
    weights = {name: torch.randn(shape) for name, shape in config_from_dict(fields).tensors.items()}
    stage = generate.build_ours(weights, fields, None, base_format, torch.float32, torch.device("cpu"))
    linears = [one for one in stage.modules() if isinstance(one, common.ParallelLinear) and one.weight is None]
    assert sum(".experts." in linear.name for linear in linears) >= 2 * 3 * fields["num_experts"]
    for linear in linears:
        held, given = linear._matrix.weight(linear._rows), weights[f"{linear.name}.weight"]
        assert torch.nn.functional.cosine_similarity(held.flatten(), given.flatten(), dim=0) > 0.99, linear.name


def test_generation_without_transformers_model(benchmark, monkeypatch, tmp_path):
    generate, file = benchmark("generate"), tmp_path / "it.json"
    (tmp_path / "config.json").write_text(json.dumps(fields_of("llama")))
    words = "--prompts 2 --prompt_tokens 3 5 --new_tokens 2 --repeats 1 --bandwidth 9 --device cpu --peer none".split()
    words += ["--base_format", "nf4", "fp8", "--model", str(tmp_path / "config.json"), "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setattr(generate, "build_base", None)
    generate.main()
    assert {row[1] for row in json.loads(file.read_text())["rows"]} == {generate.OURS["nf4"], generate.OURS["fp8"]}


def test_what_quality_compares(benchmark):
    quality = benchmark("quality")
    one, other = ({"losses": losses, "evaluation": last} for losses, last in (([3, 2, 1], 1.5), ([3, 3, 0], 1.0)))
    assert quality.apart(one, other, 2) == {"steps": 2 / 3, "smoothed": 0.25, "last": 0.0, "evaluation": 0.5}
    exact = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([2.0])}
    found = quality.cosines({"a": torch.tensor([[0.6, 0.8]]), "b": torch.tensor([2.0])}, exact)
    assert found == {"a": pytest.approx(0.6), "b": pytest.approx(1.0), "": pytest.approx(4.6 / 5)}


TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_random_weights_is_a_whole_model(benchmark, tmp_path, tied):
    import transformers

    fields = TINY | {"tie_word_embeddings": tied}
    size = benchmark("random_folder").write_folder(tmp_path, fields, "bf16", torch.device("cpu"))
    assert size == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first, *others = (dict(layer.named_parameters()) for layer in model.model.layers)
    for other in others:
        assert all(torch.equal(first[name], weight) for name, weight in other.items())
    assert first["mlp.up_proj.weight"].dtype == torch.bfloat16
    assert 0.018 < first["mlp.up_proj.weight"].float().std() < 0.022
    assert first["input_layernorm.weight"].eq(1).all()
    # A loader that finds fewer tokens than rows may clear rows: zeros take less power, and are faster.
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == fields["vocab_size"]


def test_a_folder_of_unequal_layers_is_refused(benchmark):
    shapes = {"model.layers.0.w": (2, 2), "model.layers.1.w": (2, 3), "model.norm.weight": (2,)}
    with pytest.raises(ValueError, match="equal layers"):
        benchmark("random_folder")._split(shapes)


def test_a_write_that_takes_a_part_is_continued(benchmark):
    written = bytearray()

    def write(data):
        written.extend(data[:3])
        return len(data[:3])

    benchmark("random_folder").write_all(write, [b"12345", memoryview(b"678")])
    assert written == b"12345678"


def test_serving_is_timed(benchmark, monkeypatch, capsys):
    tiny = ["--tiny", "--clients", "4", "--prompt_tokens", "8", "--new_tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/serve.py", *tiny])
    benchmark("serve").main()
    out = capsys.readouterr().out
    assert "replies equal to those of all at once: 4 of 4" in out and "first token of a 8-token prompt" in out


def test_kernels_of_experts_are_summed_by_name(benchmark, capsys):
    experts, events = benchmark("experts"), {"wide_kernel": 4000.0, "outer_kernel": 300.0, "combine_kernel": 700.0}
    kernels = [SimpleNamespace(key=key, self_device_time_total=us, count=8) for key, us in events.items()]
    others = [SimpleNamespace(key="gate_kernel", self_device_time_total=50.0, count=4)]
    experts.of_profile(SimpleNamespace(key_averages=lambda: kernels + others), 2, 0.0)
    told = capsys.readouterr().out
    assert "500 us of the products' 2000, 0.250" in told and "4.0 launches" in told
    sources = "".join(file.read_text() for file in (ROOT / "megalora" / "ops").glob("*.py"))
    assert all(f"def {name}(" in sources for name in (*experts.PRODUCTS, *experts.BESIDE, *experts.OTHERS))
