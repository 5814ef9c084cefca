"""Families whose code transformers lacks, against plain torch written from their published code: loss and gradients.

BTLM (modeling_btlm.py of cerebras/btlm-3b-8k-base), ChatGLM2 and 3 (modeling_chatglm.py of THUDM/chatglm3-6b),
InternLM2 (modeling_internlm2.py of internlm/internlm2_5-7b). Their `auto_map` names that code: it is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from oracle import fields_of, whole_tensor
from torch.nn import functional

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

Weights = Mapping[str, torch.Tensor]
LENGTHS = (13, 9)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """q [N, H, D], k, v [N, K, D] -> [N, H D]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    scores = scores if bias is None else scores + bias
    mask = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).flatten(1)


def btlm(w: Weights, f: Mapping, ids: torch.Tensor) -> torch.Tensor:
    heads, size = f["num_attention_heads"], f["hidden_size"]
    distance = (torch.arange(len(ids))[:, None] - torch.arange(len(ids))).abs()
    slopes = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)  # a power of two

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (size,), w[f"{name}.weight"], w[f"{name}.bias"], f["layer_norm_epsilon"])

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] * f["mup_embeddings_scale"]
    for i in range(f["num_hidden_layers"]):
        at = f"transformer.h.{i}"
        q, k, v = conv(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").split(size, dim=-1)
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        x = x + conv(attend(q, k, v, heads / size, -slopes[:, None, None] * distance), f"{at}.attn.c_proj")
        h = norm(x, f"{at}.ln_2")
        x = x + conv(conv(h, f"{at}.mlp.c_fc") * functional.silu(conv(h, f"{at}.mlp.c_fc2")), f"{at}.mlp.c_proj")
    logits = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
    return logits * (f["mup_output_alpha"] * f["mup_width_scale"])


def chatglm(w: Weights, f: Mapping, ids: torch.Tensor) -> torch.Tensor:
    heads, groups, dim = f["num_attention_heads"], f["multi_query_group_num"], f["kv_channels"]
    turned = dim // 2
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    cos, sin = (table.double().unsqueeze(1) for table in (angles.cos(), angles.sin()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + f["layernorm_epsilon"]) * w[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[..., :turned:2], x[..., 1:turned:2]
        pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([pairs, x[..., turned:]], dim=-1)

    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(f["num_hidden_layers"]):
        at = f"transformer.encoder.layers.{i}"
        name = f"{at}.self_attention.query_key_value"
        mixed = norm(x, f"{at}.input_layernorm") @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        q, k, v = (y.unflatten(-1, (-1, dim)) for y in mixed.split([heads * dim, groups * dim, groups * dim], dim=-1))
        x = x + attend(turn(q), turn(k), v, dim**-0.5, None) @ w[f"{at}.self_attention.dense.weight"].T
        gate, up = (norm(x, f"{at}.post_attention_layernorm") @ w[f"{at}.mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ w[f"{at}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ w["transformer.output_layer.weight"].T


def internlm2(w: Weights, f: Mapping, ids: torch.Tensor) -> torch.Tensor:
    heads, groups = f["num_attention_heads"], f["num_key_value_heads"]
    dim = f["hidden_size"] // heads
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    cos, sin = (table.double().unsqueeze(1) for table in (angles.cos(), angles.sin()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + f["rms_norm_eps"]) * w[f"{name}.weight"]

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = w["model.tok_embeddings.weight"][ids]
    for i in range(f["num_hidden_layers"]):
        at = f"model.layers.{i}"
        mixed = linear(norm(x, f"{at}.attention_norm"), f"{at}.attention.wqkv").unflatten(-1, (groups, -1, dim))
        q, k, v = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        x = x + linear(attend(turn(q), turn(k), v, dim**-0.5, None), f"{at}.attention.wo")
        h = norm(x, f"{at}.ffn_norm")
        gated = functional.silu(linear(h, f"{at}.feed_forward.w1")) * linear(h, f"{at}.feed_forward.w3")
        x = x + linear(gated, f"{at}.feed_forward.w2")
    return linear(norm(x, "model.norm"), "output")


def batch(vocab_size: int) -> Batch:
    tokens = sum(LENGTHS)
    ids = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(2))
    labels, bounds = ids.roll(-1), torch.tensor([0, LENGTHS[0], tokens], dtype=torch.int32)
    labels[bounds[1:].long() - 1] = -100
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return Batch(ids, labels, positions, bounds, torch.arange(tokens))


@pytest.mark.parametrize("family, logits", [("btlm", btlm), ("chatglm", chatglm), ("internlm2", internlm2)])
def test_loss_and_gradients_are_those_of_the_published_code(family: str, logits: Callable[..., torch.Tensor]):
    fields = fields_of(family)
    config = config_from_dict(fields)
    lora = resolve_lora(LoraConfig.from_dict({"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}), config)
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, torch.float64, "cpu"), lora)
    values = {name: whole_tensor(name, split.global_shape, 0.15) for name, split in named_splits(stage).items()}
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(named_splits(stage)[name].slice(values[name]))
    stage.refresh_adapters()
    data = batch(config.vocab_size)
    loss = stage(None, training_inputs(data, config, stage.place, seed=1, step=0))
    loss.backward()

    wanted = {name: values[name].clone().requires_grad_() for name in values if ".lora_" in name}
    weights = dict(values)
    for name, placed in config.linears.items():
        a, b = (wanted[f"{name}.lora_{factor}.weight"] for factor in "AB")
        branch = 2.0 * b @ a
        weights[f"{name}.weight"] = values[f"{name}.weight"] + (branch.T if placed.linear.transposed else branch)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in zip(data.input_ids.split(LENGTHS), data.labels.split(LENGTHS), strict=True):
        total = total + functional.cross_entropy(logits(weights, fields, ids), labels, reduction="sum")
    total.backward()
    assert abs(loss.item() - total.item()) <= 1e-9 * abs(total.item())
    splits = named_splits(stage)
    for name, parameter in stage.trainable().items():
        ours = torch.empty_like(wanted[name])
        splits[name].put(ours, parameter.grad)
        scale = wanted[name].grad.abs().max()
        assert scale > 1e-9 and (ours - wanted[name].grad).abs().max() <= 1e-8 * scale, name
