"""What every variant of every family goes through: layouts, transformers' numbers from its own files, greedy replies.

A variant is a row of `oracle`, a config by name. To add one, add its row; to add a table of rows, call these functions
on it in a test module (tests/test_modern.py). Many variants share the processes of one `spawn`: to start them takes
longer than a run.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
import transformers
from oracle import TINY, Run, fields_of, in_file_order, whole_tensor
from test_field_parity import LORA, SEQ_LENGTH, documents, plain_name
from torch.nn.functional import layer_norm

from megalora.adapters.config import LoraConfig
from megalora.building import base_names, resolve_lora
from megalora.checkpoint.base.weights import load_base
from megalora.data import build_rows
from megalora.data.loader import Loader
from megalora.generation.cache import Span
from megalora.generation.steps import Steps
from megalora.models.config import config_from_dict, known_families
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

# Of four processes: every pair of values of (tp, pp, sequence parallelism, recompute) that is worth its time.
LAYOUTS = (
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
    {"tp": 4, "micro_batch_rows": 2},
    {"tp": 2, "sequence_parallel": True, "recompute": "selective", "micro_batch_rows": 2},
    {"tp": 2, "pp": 2, "recompute": "selective"},
    {"pp": 4, "recompute": "full", "micro_batch_rows": 2},
    {"tp": 4, "sequence_parallel": True, "micro_batch_rows": 2},
)


def layout_runs(names: Sequence[str], every: bool = False) -> list[Run]:
    """Each variant on the one of LAYOUTS that its name chooses, whatever the other rows, and short.

    every: on all of them, with more rows
    """
    runs = []
    for name in names:
        chosen = LAYOUTS if every else [LAYOUTS[zlib.crc32(name.encode()) % len(LAYOUTS)]]
        runs += [Run(name, steps=1, learning_rate=1e-4, **layout) for layout in chosen]
    return runs if every else [run.short(4).on(model=few_layers(run)) for run in runs]


def few_layers(run: Run) -> dict[str, int]:
    """Two layers where each is as the others and has a stage to be on: the fields of the model that say so."""
    by_layer = any("layer" in field or "pattern" in field for field in fields_of(run.family).keys() - TINY.keys())
    return {} if by_layer or run.pp > 2 else {"num_hidden_layers": 2}


# ---- transformers


def class_of(model_type: str) -> str:
    """The model type by which transformers knows a model of this one."""
    return known_families()[model_type].config_class or model_type


def model_class(model_type: str) -> type:
    """transformers' class of a model of this type that writes text, whether AutoModelForCausalLM names it or not."""
    config = transformers.CONFIG_MAPPING[class_of(model_type)]
    try:
        return transformers.AutoModelForCausalLM._model_mapping[config]
    except KeyError:  # of mistral4, which is published within mistral3 alone
        modeling = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        return getattr(modeling, config.__name__.removesuffix("Config") + "ForCausalLM")


def peer_of(name: str, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """transformers' model of the variant, with weights made from their names."""
    raw = fields_of(name)
    kind = raw.pop("model_type")
    config = transformers.CONFIG_MAPPING[class_of(kind)](**raw)
    model = model_class(kind)._from_config(config, attn_implementation=attention).to(dtype)
    tied = bool(config.tie_word_embeddings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            assert not (tied and key.startswith("lm_head")), "tied weights are one parameter"
            parameter.copy_(whole_tensor(key, tuple(parameter.shape), 0.15))
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):  # of gemma4
                buffer.copy_(whole_tensor(key, (1,), 0.15).abs() + 0.7)
    return model.eval()


def ours_of(name: str, folder: Path, dtype: torch.dtype, lora: dict | None = None) -> Stage:
    """Our model of the variant, loaded from the files that transformers wrote in `folder`."""
    config = config_from_dict(fields_of(name))
    resolved = resolve_lora(LoraConfig.from_dict(LORA | (lora or {})), config)
    place = Placement(build_mesh(0, 1).tp, False, dtype, "cpu")
    stage = Stage(config, range(config.num_hidden_layers), place, resolved)
    splits = named_splits(stage)
    load_base(stage, folder, splits=splits, names=base_names(config))
    with torch.no_grad():
        for key, parameter in stage.trainable().items():
            parameter.copy_(splits[key].slice(whole_tensor(key, splits[key].global_shape, 0.15)))
    stage.refresh_adapters()
    return stage


def check_parity(name: str, folder: Path, attention: str = "sdpa", tolerance: float = 2e-6) -> None:
    """Loss and gradients of the adapters of a packed batch are transformers' and peft's, document by document.

    In float64, but for what transformers computes in float32 whatever the model is in (angles, and Cohere's norms).
    """
    import peft

    model = peer_of(name, torch.float32, attention)
    model.save_pretrained(folder)
    stage = ours_of(name, folder, torch.float64)
    rows = documents(stage.config.vocab_size)
    members = list(itertools.accumulate(map(len, rows), initial=0))
    bins = [list(range(a, b)) for a, b in itertools.pairwise(members)]
    packed = build_rows([document for row in rows for document in row], bins, SEQ_LENGTH, pad_token_id=0)
    loader = Loader(packed, micro_batch_rows=len(rows), num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False)
    gradients = FlatGradients(stage.trainable(), named_splits(stage), build_mesh(0, 1))
    ours = stage(None, training_inputs(loader.step(0).microbatches[0], stage.config, stage.place, seed=1, step=0))
    ours.backward()
    gradients.reduce()

    in_float64(model)
    tuned = peft.get_peft_model(model.double(), peft.LoraConfig(task_type="CAUSAL_LM", **peft_fields(stage)))
    theirs = {plain_name(key): p for key, p in tuned.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in theirs.items():
            parameter.copy_(whole_tensor(key, tuple(parameter.shape), 0.15))
    total = torch.zeros((), dtype=torch.float64)
    for document in itertools.chain(*rows):
        ids, labels = (torch.from_numpy(x).long() for x in (document.input_ids, document.labels))
        logits = tuned(input_ids=ids[None]).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
    total.backward()
    assert abs(ours.item() - total.item()) <= tolerance * abs(total.item())
    trained, splits = stage.trainable(), named_splits(stage)
    assert trained and set(trained) == set(theirs)
    for key, parameter in trained.items():
        scale = theirs[key].grad.abs().max()
        assert scale > 1e-8, f"{key} has no gradient to compare"
        grad = in_file_order(splits[key], parameter.grad)
        assert (grad - theirs[key].grad).abs().max() <= tolerance * scale, key


def peft_fields(stage: Stage) -> dict:
    """LORA as peft takes it: by names, where it refuses some of all linears (out_proj of Falcon-H1)."""
    if stage.lora.adapters.keys() == stage.config.linears.keys() - stage.config.routers:
        return LORA
    return LORA | {"target_modules": sorted({name.rpartition(".")[2] for name in stage.lora.adapters})}


def in_float64(model: torch.nn.Module) -> None:
    """Let every RMSNorm, OLMo's LayerNorm and linear attention of transformers' `model` compute in the dtype of its
    input."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith(("GatedDeltaNet", "Mixer", "MambaLayer")):
            module.forward = functools.partial(with_float64, sys.modules[type(module).__module__], module.forward)
        if kind == "OlmoLayerNorm":
            module.forward = functools.partial(layer_norm, normalized_shape=module.normalized_shape, eps=1e-5)
        if not kind.endswith("RMSNorm"):
            continue
        offset = float(kind.startswith(("Gemma", "VaultGemma", "Qwen3_5", "Qwen3Next")) and "Gemma4" not in kind)
        eps = getattr(module, "variance_epsilon", None) or module.eps

        def forward(x, module=module, offset=offset, eps=eps):
            return (getattr(module, "weight", 1.0) + offset) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

        module.forward = forward


class _Wide:
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


def with_float64(names, forward, *given, **named):
    """What `forward` of the module `names` returns where it computes in float64 what it would in float32."""
    with (
        mock.patch.object(names, "torch", _Wide()),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        return forward(*given, **named)


def check_greedy(
    name: str, folder: Path, attention: str = "sdpa", lengths: tuple[int, ...] = (9, 5), new: int = 14
) -> None:
    """Greedy replies to prompts of these lengths at once, with a cache, are those of transformers' generate to each."""
    model = peer_of(name, torch.float32, attention)
    model.save_pretrained(folder)
    stage = ours_of(name, folder, torch.float32, {"target_modules": [_first_linear(name)], "r": 1})
    for parameter in stage.trainable().values():
        parameter.data.zero_()
    stage.refresh_adapters()
    model.generation_config.eos_token_id = None  # which it would not write before the last token
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1, 131, (length,), generator=generator).tolist() for length in lengths]
    theirs = []
    for prompt in prompts:
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        theirs.append(out[0, len(prompt) :].tolist())
    assert greedy(stage, prompts, new) == theirs


@torch.inference_mode()
def greedy(stage: Stage, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Our greedy replies of `new` tokens to all prompts at once."""
    steps = Steps(stage, slots=len(prompts) + 1, capacity=max(map(len, prompts)) + new)
    slots = list(range(1, len(prompts) + 1))
    spans = [Span(slot, 0, len(prompt)) for slot, prompt in zip(slots, prompts, strict=True)]
    hidden = steps.prefill(None, list(itertools.chain(*prompts)), spans)
    ends = [end - 1 for end in itertools.accumulate(map(len, prompts))]
    ids = stage.head(hidden[ends]).argmax(-1).tolist()
    replies = [[token] for token in ids]
    for step in range(new - 1):
        places = [len(prompt) + step for prompt in prompts]
        ids = stage.head(steps.decode(None, ids, slots, places)).argmax(-1).tolist()
        for reply, token in zip(replies, ids, strict=True):
            reply.append(token)
    return replies


def _first_linear(name: str) -> str:
    return next(iter(config_from_dict(fields_of(name)).linears))
