"""`megalora convert adapter` combine, extract, compare, init and to-lora: against peft's own, and against the sums."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import done, refused
from test_convert_adapter import base_model, logits_of, train_with_peft

from megalora.adapters.config import LoraConfig
from megalora.adapters.deltas import Branch, nearest, norm, side_by_side, truncated
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.layout import Layout
from megalora.parallel.split import Split
from megalora.recombine import _branches

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it
ALL = {"target_modules": "all-linear"}
SOME = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 5}}


def deltas(folder) -> dict[str, torch.Tensor]:
    return {name: branch.sB @ branch.A for name, branch in _branches(open_adapter(folder)).items()}


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    """As `close`, for what went through float32 singular values on both sides."""
    assert (a - b).abs().max() <= 2e-4 * b.abs().max()


def load(base, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of keys that it misses
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def test_branches_are_summed_cut_and_measured():
    torch.manual_seed(0)
    one, other = (Branch(torch.randn(r, 30).double(), torch.randn(20, r).double()) for r in (4, 6))
    whole = side_by_side([one, other.times(-2.0)])
    exact = one.sB @ one.A - 2 * other.sB @ other.A
    torch.testing.assert_close(whole.sB @ whole.A, exact)
    assert abs(norm(whole) - exact.norm().item()) < 1e-9
    for near, lost, size in (truncated(whole, 3), nearest(exact, 3)):
        assert abs((near.sB @ near.A - exact).norm().item() - lost) < 1e-9 and abs(size - exact.norm().item()) < 1e-9
        assert abs(lost - torch.linalg.svdvals(exact)[3:].norm().item()) < 1e-9


def test_adapters_are_combined_as_peft_combines_them(tmp_path, capsys):
    base = base_model(tmp_path / "base")
    train_with_peft(base, tmp_path / "a", ALL)
    train_with_peft(base, tmp_path / "b", ALL | {"use_rslora": True})
    for method, weights in (("cat", (0.5, 2.0)), ("svd", (0.5, 2.0)), ("linear", (0.7, 0.3))):
        flags = ["--input", tmp_path / "a", "--others", tmp_path / "b", "--output", tmp_path / method]
        done(capsys, "adapter", "combine", *flags, "--method", method, "--weights", *weights)
        theirs = load(base, tmp_path / "a")
        theirs.load_adapter(tmp_path / "b", "b")
        rank = {"svd_rank": 3} if method == "svd" else {}
        theirs.add_weighted_adapter(["default", "b"], list(weights), "c", combination_type=method, **rank)
        theirs.set_adapter("c")
        near(logits_of(load(base, tmp_path / method)), logits_of(theirs))
    exact = {n: 0.5 * d + 2.0 * deltas(tmp_path / "b")[n] for n, d in deltas(tmp_path / "a").items()}
    for name, delta in deltas(tmp_path / "cat").items():
        torch.testing.assert_close(delta, exact[name], rtol=1e-5, atol=1e-5)
    train_with_peft(base, tmp_path / "c", SOME)
    flags = ["--input", tmp_path / "a", "--others", tmp_path / "c"]
    done(capsys, "adapter", "combine", *flags, "--output", tmp_path / "ac")
    assert {n.rpartition(".")[2] for n in deltas(tmp_path / "ac")} == {n.rpartition(".")[2] for n in exact}
    load(base, tmp_path / "ac")  # ranks by linear
    train_with_peft(base, tmp_path / "dora", ALL | {"use_dora": True})
    flags = ["--input", tmp_path / "a", "--others", tmp_path / "dora", "--output", tmp_path / "no"]
    refused(capsys, "merge it into the model", "adapter", "combine", *flags)


def test_adapters_of_runs_on_other_models_are_not_combined(tmp_path, capsys):
    base = base_model(tmp_path / "base")
    train_with_peft(base, tmp_path / "plain", SOME)
    found = open_adapter(tmp_path / "plain")
    splits = {name: Split(tuple(tensor.shape)) for name, tensor in found.tensors.items()}
    fields = LoraConfig.from_dict(found.lora_config, "here").to_dict()
    for name in ("first", "second", "first again"):
        trainer = {"step": 1, "identity": {"model": name.split()[0]}}
        save_adapter(tmp_path / name, found.tensors, splits, Layout(), fields, trainer=trainer)
    flags = ["adapter", "combine", "--output", tmp_path / "out", "--input", tmp_path / "first", "--others"]
    refused(capsys, "were trained on different models", *flags, tmp_path / "plain", tmp_path / "second")
    done(capsys, *flags, tmp_path / "plain", tmp_path / "first again")


def test_an_adapter_comes_back_out_of_a_merged_model(tmp_path, capsys):
    base = base_model(tmp_path / "base")
    train_with_peft(base, tmp_path / "a", SOME)
    done(capsys, "adapter", "merge", "--input", tmp_path / "a", "--output", tmp_path / "merged")
    extract = ["adapter", "extract", "--input", tmp_path / "merged", "--base", base]
    told = done(capsys, *extract, "--output", tmp_path / "out", "--rank", 5)
    assert float(told.split("relative error ")[1].split()[0]) < 1e-4
    mine, theirs = deltas(tmp_path / "out"), deltas(tmp_path / "a")
    assert mine.keys() == theirs.keys()
    for name, delta in mine.items():
        torch.testing.assert_close(delta, theirs[name], rtol=1e-3, atol=1e-4)
    told = done(capsys, "adapter", "compare", "--adapter", tmp_path / "a", "--other", tmp_path / "out")
    assert float(told.splitlines()[-2].split()[0]) < 1e-3 and "all 8 linears" in told
    told = done(capsys, "adapter", "compare", "--adapter", tmp_path / "a", "--other", tmp_path / "a")
    assert [line.split()[0] for line in told.splitlines()[:-1]] == ["0"] * 9
    told = done(capsys, *extract, "--output", tmp_path / "less", "--rank", 1)
    assert float(told.split("relative error ")[1].split()[0]) > 0.1


def test_heads_that_one_model_alone_has_are_counted(tmp_path, capsys):
    """As of an encoder and the classifier that was made of it."""
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.BertConfig(**fields, num_attention_heads=2, max_position_embeddings=32)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    tuned.bert.encoder.layer[0].output.dense.weight.data += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    flags = ["--input", tmp_path / "tuned", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    told = done(capsys, "adapter", "extract", *flags, "--rank", 1)
    assert "over 1 linears" in told and "2 tensors that are no linears differ too" in told


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_pefts_and_becomes_plain_lora(tmp_path, capsys, kind):
    base = base_model(tmp_path / "base")
    fields = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    (tmp_path / "lora.json").write_text(json.dumps(fields | {"init_lora_weights": kind}))
    flags = ["--input", base, "--lora_config", tmp_path / "lora.json"]
    done(capsys, "adapter", "init", *flags, "--output", tmp_path / "made")
    bare = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = logits_of(bare)
    near(logits_of(load(tmp_path / "made", tmp_path / "made/initial")), plain)
    theirs = peft.get_peft_model(bare, peft.LoraConfig(**fields | {"init_lora_weights": kind}))
    residual = theirs.state_dict()["base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"]
    ours = load_file(tmp_path / "made/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    torch.testing.assert_close(ours, residual, rtol=1e-4, atol=1e-5)

    trained = load_file(tmp_path / "made/initial/adapter_model.safetensors")
    torch.manual_seed(0)
    trained = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in trained.items()}
    (tmp_path / "tuned").mkdir()
    save_file(trained, tmp_path / "tuned/adapter_model.safetensors", {"format": "pt"})
    config = (tmp_path / "made/initial/adapter_config.json").read_text()
    (tmp_path / "tuned/adapter_config.json").write_text(config)
    flags = ["--input", tmp_path / "tuned", "--initial", tmp_path / "made/initial", "--base", base]
    done(capsys, "adapter", "to-lora", *flags, "--output", tmp_path / "plain")
    near(logits_of(load(base, tmp_path / "plain")), logits_of(load(tmp_path / "made", tmp_path / "tuned")))
