"""The older decoders, GPT-2 to Falcon: the same numbers on every layout, those of transformers, and with a cache.

transformers' own dropout draws other masks than ours, so that where it is applied is compared with both sides'
dropouts replaced by a factor. Its oracle is "eager" attention where it has no other; for Falcon with ALiBi it is
"sdpa", since eager adds the bias twice there. BLOOM is compared in float32 and 64 alone: in bfloat16 its bias is off by
whole units.
"""

from __future__ import annotations

import itertools
import os

import pytest
import test_field_parity as field
import torch
from oracle import CLASSIC, Run, check_runs, fields_of, whole_tensor

import megalora.models.blocks.ending
import megalora.models.blocks.ends
from megalora.generation.cache import Span
from megalora.generation.steps import Steps
from megalora.models.config import config_from_dict
from megalora.models.dropouts import base_dropouts, without_base_dropout
from megalora.models.inputs import Inputs, rope_tables
from megalora.models.stage import Stage
from megalora.ops.probability_dropout import ProbabilityDropout
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement, Tokens
from megalora.parallel.split import named_splits

SMALL = {"num_hidden_layers": 2}
PDROP = {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.15}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
RW = {
    "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None, "parallel_attn": False,
    "alibi": True,
}  # fmt: skip
NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
VARIANTS = {
    **{family: (family, {}) for family in CLASSIC if family != "internlm2"},
    "gpt2, scaled by layer": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_inner": 64},
    ),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False, "activation_function": "quick_gelu"}),
    "gpt_neo, narrow": ("gpt_neo", {"intermediate_size": 72}),
    "bloom, 6 heads": ("bloom", {"num_attention_heads": 6}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.3}}),
    "falcon, one norm": ("falcon", {"num_ln_in_parallel_attn": 1, "bias": True}),
    "falcon, one kv head": ("falcon", {"new_decoder_architecture": False}),
    "falcon, ALiBi": ("falcon", RW | {"bias": True}),
    "falcon, all heads": ("falcon", RW | {"alibi": False, "parallel_attn": True, "activation": "gelu_new"}),
    "opt, narrow, norms behind": ("opt", NARROW),
    "opt, no biases": ("opt", {"enable_bias": False, "_remove_final_layer_norm": True}),
    "phi, norms on the heads": ("phi", {"qk_layernorm": True, "num_key_value_heads": 8}),
    "internlm2": ("internlm2", {"bias": False}),
}  # fmt: skip
DROPPED = {
    "gpt2": ("gpt2", PDROP),
    "gpt_neo": ("gpt_neo", {"attention_dropout": 0.2, "embed_dropout": 0.1, "resid_dropout": 0.15}),
    "gptj": ("gptj", PDROP),
    "bloom": ("bloom", DROPOUT),
    "falcon": ("falcon", DROPOUT),
    "falcon, ALiBi": ("falcon", RW | {"bias": True} | DROPOUT),
    "opt": ("opt", {"dropout": 0.1, "attention_dropout": 0.2}),
    "phi": ("phi", {"attention_dropout": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.15}),
    "gpt_neox": ("gpt_neox", DROPOUT),
}
SAME_CUT = (
    "gpt2, scaled by layer", "gpt_neo, narrow", "RefinedWeb", "RefinedWebModel", "falcon, all heads", "opt, no biases",
)  # fmt: skip
CUT_DOCUMENTS = ("gpt2", "bloom", "falcon, ALiBi")
REMOTE = ("RefinedWeb", "RefinedWebModel", "chatglm", "btlm", "internlm2")  # transformers lacks them
EAGER = ("gpt_neo", "bloom", "mpt")  # of which it has no other attention


# ---- every layout


def layouts(every: bool = False) -> list[Run]:
    """Of four processes: each variant that is cut in a way of its own on one layout, and dropouts of the base; short.

    every: all variants, each on every layout, and longer
    """
    options = (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        {"tp": 4, "micro_batch_rows": 2},
        {"tp": 2, "sequence_parallel": True, "micro_batch_rows": 2},
        {"tp": 2, "pp": 2, "recompute": "selective"},
    )
    cut_documents = {"tp": 2, "cp": 2, "micro_batch_rows": 2}
    found = []
    cut = [case for name, case in VARIANTS.items() if every or name not in SAME_CUT]
    for number, (family, model) in enumerate((*cut, *DROPPED.values())):
        chosen = options if every else [options[number % 4]]
        found += [Run(family, model=SMALL | model, **layout) for layout in chosen]
    for family, model in (VARIANTS[name] for name in CUT_DOCUMENTS):
        found.append(Run(family, model=SMALL | model, **cut_documents))
    return found if every else [run.short(4) for run in found]


def test_every_layout_gives_the_numbers_of_one_process():
    """`make proof`: each variant on every one of the layouts."""
    runs = layouts(every=os.environ.get("MEGALORA_PROOF") == "all")
    check_runs(4, runs)


# ---- transformers


def compare(family: str, model: dict, dtype: torch.dtype, tolerance: float, monkeypatch, **lora) -> None:
    raw = fields_of(family, **SMALL | model)
    case, made = field.Case(family, raw, lora), field.peft_model

    def peft_model(case, attn_implementation):
        eager = family in EAGER
        return made(case, attn_implementation="eager" if eager else attn_implementation)

    monkeypatch.setattr(field, "peft_model", peft_model)
    monkeypatch.setattr(field.Case, "raw", property(lambda self: self.model))
    field.compare(case, dtype, tolerance)


@pytest.mark.parametrize("name", [name for name, (family, _) in VARIANTS.items() if family not in REMOTE])
def test_loss_and_gradients_are_those_of_transformers(name, monkeypatch):
    family, model = VARIANTS[name]
    # transformers computes scores in float32 in a float64 model too (GPT-J, ALiBi's slopes).
    lora = {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]} if model == NARROW else {}
    compare(family, model, torch.float64, 1e-6, monkeypatch, **lora)
    if family in CLASSIC and model == {}:
        compare(family, model, torch.float32, 2e-5, monkeypatch, **lora)


@pytest.mark.parametrize("name", DROPPED)
def test_dropouts_of_the_base_are_where_transformers_has_them(name, monkeypatch):
    """Each side's dropout is a factor 1 - p here, that of attention on the probabilities."""
    family, model = DROPPED[name]
    attend = torch.nn.functional.scaled_dot_product_attention

    def factor(x, p=0.5, training=True, inplace=False):
        return x * (1 - p) if training else x

    def attend_by_factor(*arrays, dropout_p=0.0, **how):
        return attend(*arrays, **how) * (1 - dropout_p)

    monkeypatch.setattr(torch.nn.functional, "dropout", factor)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_by_factor)
    for module in (megalora.models.blocks.ends, megalora.models.blocks.ending):
        monkeypatch.setattr(module, "drop", lambda x, index, draw: x if draw is None else x * (1 - draw.p))
    monkeypatch.setattr(ProbabilityDropout, "scale", property(lambda self: 1 - self.draw.p))
    monkeypatch.setattr(ProbabilityDropout, "keep", lambda *_: torch.ones(1, dtype=torch.bool).expand(1, 8, 1, 1))
    compare(family, model, torch.float64, 1e-6, monkeypatch)
    config = config_from_dict(fields_of(family, **SMALL | model))
    assert base_dropouts(config) and not base_dropouts(without_base_dropout(config))


# ---- with a cache


def stage_of(family: str, model: dict) -> Stage:
    config = config_from_dict(fields_of(family, **SMALL | model))
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, torch.float64, "cpu"))
    with torch.no_grad():
        parameters = dict(stage.named_parameters(remove_duplicate=False))
        for name, split in named_splits(stage).items():
            parameters[name].copy_(split.slice(whole_tensor(name, split.global_shape, 0.15)))
    stage.refresh_adapters()
    return stage


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_tokens_one_by_one_are_the_document_at_once(name):
    stage, count, known = stage_of(*VARIANTS[name]), 15, 9
    ids = torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(1))
    index = torch.arange(count)
    tables = rope_tables(stage.config, index, torch.float64, (0, count))
    tokens = Tokens(index, index, seed=None, step=0)
    whole = stage(None, Inputs(ids, None, None, (0, count), tables, tokens, position_ids=index))
    steps = Steps(stage, slots=2, capacity=32)
    found = [steps.prefill(None, ids[:known].tolist(), [Span(1, 0, known)]).clone()]
    found += [steps.decode(None, [int(ids[i])], [1], [i]).clone() for i in range(known, count)]
    assert (torch.cat(found) - whole).abs().max() <= 1e-12
    logits = stage.head(whole)
    assert logits.shape == (count, stage.config.vocab_size) and logits.isfinite().all()


def test_the_variants_are_of_every_older_decoder():
    assert {family for family, _ in VARIANTS.values()} == set(CLASSIC)
    assert len(list(itertools.chain(VARIANTS, DROPPED))) == 36
