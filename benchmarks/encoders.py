"""One training step of an encoder or an encoder-decoder, megalora against transformers + peft, on the same tokens.

    python benchmarks/encoders.py bert-large --rows 32 --seq_length 512                        # GPU, bfloat16
    python benchmarks/encoders.py t5-3b --rows 8 --source_length 512 --seq_length 128
    OMP_NUM_THREADS=2 python benchmarks/encoders.py bert-large --rows 2 --seq_length 32 --dropout 0 \
        --base_dropout false --change '{"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}'    # CPU

The shapes are the published ones, with random weights that both contenders share; every row is one document, without
padding. BERT and DeBERTa are taggers (TOKEN_CLS, every token labelled, the head trained beside the adapters), T5 writes
its target (SEQ_2_SEQ_LM). Adapters are on all linears of the layers. transformers is given no mask, so that its
attention is sdpa without one where the model has that. Each contender has the memory to itself: it says its loss
without dropout (the script ends with an error where the two differ), then makes its steps, forward, backward, clipping
and AdamW, with the dropouts of the published config unless --base_dropout false.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import add_machine, machine, record, where_of
from train_step import COLUMNS, CONTENDERS, draw_b, filled, make_trainer, measure, peers, plain_weights, release, told

from megalora.data import Loader, Sample, build_rows
from megalora.data.packing import Sides
from megalora.models.config import config_from_dict
from megalora.models.dropouts import without_base_dropout
from megalora.models.spec import ModelSpec
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.planning.nodes import Workload
from megalora.training import StepData

LABELS = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for prefix in "BI")]
LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}  # of the loss, which transformers has in bfloat16


@dataclass(frozen=True)
class Shape:
    """A published config, its task, and what a step reads unless it is said otherwise.

    source_length  tokens of a row that the encoder of an encoder-decoder reads; seq_length are its decoder's then
    """

    fields: dict
    task: str
    rows: int
    seq_length: int
    source_length: int = 0


SHAPES = {
    "bert-large": Shape(
        LARGE | {"model_type": "bert", "vocab_size": 30522, "type_vocab_size": 2, "layer_norm_eps": 1e-12},
        "TOKEN_CLS", 32, 512,
    ),
    "deberta-v3-large": Shape(
        LARGE
        | {
            "model_type": "deberta-v2", "vocab_size": 128100, "type_vocab_size": 0, "layer_norm_eps": 1e-7,
            "relative_attention": True, "max_relative_positions": -1, "position_buckets": 256,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
            "position_biased_input": False,
        },
        "TOKEN_CLS", 16, 512,
    ),
    "t5-3b": Shape(
        {
            "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24,
            "num_decoder_layers": 24, "num_heads": 32, "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "relu", "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
        "SEQ_2_SEQ_LM", 8, 128, 512,
    ),
}  # fmt: skip
BASE_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate")


def spec_of(shape: Shape) -> ModelSpec:
    config = config_from_dict(shape.fields)
    config = config.for_task(shape.task, LABELS)
    dropped = any(shape.fields.get(name) for name in BASE_DROPOUTS)
    return config if dropped else without_base_dropout(config)


def tokens_of(shape: Shape, config: ModelSpec, device: torch.device) -> tuple[StepData, dict[str, torch.Tensor]]:
    """(our step, what transformers' model is given) of the same random tokens."""
    generator, source = torch.Generator().manual_seed(0), shape.source_length
    ids = torch.randint(2, config.vocab_size, (shape.rows, source + shape.seq_length), generator=generator)
    labels, columns = torch.full_like(ids, -100), {}
    if source:
        labels[:, source:] = ids[:, source:]
        read = {"input_ids": ids[:, :source].contiguous(), "labels": ids[:, source:].contiguous()}
    else:
        columns = {name: torch.zeros_like(ids) for name in config.columns}
        columns["classes"] = torch.randint(len(LABELS), ids.shape, generator=generator)
        read = {"input_ids": ids, "labels": columns["classes"]}

    def sample(row: int) -> Sample:
        own = {name: column[row].numpy().astype("int32") for name, column in columns.items()}
        return Sample(ids[row].numpy().astype("int32"), labels[row].numpy().astype("int32"), own)

    sides = None if config.encoder is None else Sides(source, config.encoder.start)
    documents = [sample(row) for row in range(shape.rows)]
    packed = build_rows(documents, [[row] for row in range(shape.rows)], shape.seq_length, 0, sides)
    loader = Loader(
        packed, micro_batch_rows=shape.rows, num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False
    )
    return loader.step(0), {name: tensor.to(device) for name, tensor in read.items()}


def build_peer(shape: Shape, config: ModelSpec, lora: dict, dtype, device: torch.device) -> torch.nn.Module:
    """The peft model, the same at every call, with a B that is not zero."""
    import peft
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if shape.source_length else transformers.AutoModelForTokenClassification
    fields = dict(shape.fields) if shape.source_length else shape.fields | {"num_labels": len(LABELS)}
    kind = transformers.CONFIG_MAPPING[fields.pop("model_type")]
    torch.manual_seed(0)
    with device:
        model = auto.from_config(kind(**fields), dtype=dtype, trust_remote_code=False)
        adapted = lora | {"target_modules": sorted(config.linears)}
        model = peft.get_peft_model(model, peft.LoraConfig(**adapted))
        draw_b(model)
    return model.train()


def ours(weights, shape: Shape, config: ModelSpec, lora: dict, data: StepData, dtype, device, options):
    """(the loss without dropout, a function that makes one step and returns its loss)"""
    mesh = ParallelMesh()
    work = Workload(
        shape.rows, shape.seq_length, element=dtype.itemsize, recompute=options.recompute,
        source_length=shape.source_length,
    )  # fmt: skip
    place = Placement(mesh.tp, False, dtype, device)
    trainer, _ = make_trainer(config, mesh, lora, place, work, filled(weights), cuda_graphs=options.cuda_graphs)
    count = iter(range(10**9))
    return trainer.evaluate([data]), lambda: trainer.step(next(count), data).loss


def theirs(model: torch.nn.Module, read: dict[str, torch.Tensor]) -> tuple[float, Callable[[], float]]:
    """As `ours`."""
    model.eval()
    with torch.no_grad():
        loss = model(**read).loss.item()
    attention = getattr(model.get_base_model().config, "_attn_implementation", "its own")
    print(f"transformers' attention: {attention}")
    return loss, peers(model.train(), read)


def compared(losses: dict[str, float], dtype: torch.dtype) -> None:
    """Print the losses without dropout; end the script where they differ."""
    if losses.keys() < {"ours", "peft"}:
        return
    apart = abs(losses["ours"] - losses["peft"]) / abs(losses["peft"])
    line = f"without dropout the losses are {losses['ours']:.6f} and {losses['peft']:.6f}: apart by {apart:.1e} of it"
    if not apart <= TOLERANCE[dtype]:
        raise SystemExit(f"error: {line}, more than {TOLERANCE[dtype]:.0e}: the contenders do not do the same")
    print(line)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=tuple(SHAPES))
    add_machine(parser)
    for name in ("rows", "seq_length", "source_length"):
        parser.add_argument(f"--{name}", type=int, help="default: that of the shape")
    parser.add_argument("--change", type=json.loads, default={}, help="fields of the config, as JSON")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapters")
    parser.add_argument("--base_dropout", type=lambda word: {"true": True, "false": False}[word], default=True)
    parser.add_argument("--recompute", choices=("none", "full"), default="none", help="of ours")
    parser.add_argument("--contenders", nargs="+", choices=("ours", "peft"), default=["ours", "peft"])
    parser.add_argument("--no_cuda_graphs", dest="cuda_graphs", action="store_const", const=False)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=4)
    return parser.parse_args()


def shape_of(options: argparse.Namespace) -> Shape:
    shape = SHAPES[options.shape]
    off = {} if options.base_dropout else {name: 0.0 for name in BASE_DROPOUTS if name in shape.fields}
    lengths: dict[str, Any] = {"rows": options.rows, "seq_length": options.seq_length}
    if options.source_length is not None:
        if not shape.source_length:
            raise SystemExit("error: --source_length is that of an encoder-decoder: leave it out")
        lengths["source_length"] = options.source_length
    given = {name: value for name, value in lengths.items() if value is not None}
    return replace(shape, fields=shape.fields | options.change | off, **given)


def main() -> None:
    options = parse()
    device, dtype = machine(options)
    shape = shape_of(options)
    config = spec_of(shape)
    lora = {
        "task_type": shape.task, "r": options.r, "lora_alpha": 2 * options.r, "lora_dropout": options.dropout,
    }  # fmt: skip
    data, read = tokens_of(shape, config, device)
    model = build_peer(shape, config, lora, dtype, device)
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in plain_weights(model).items()}
    del model
    release(device)
    make = {
        "ours": lambda: ours(
            weights, shape, config, lora | {"target_modules": "all-linear"}, data, dtype, device, options
        ),
        "peft": lambda: theirs(build_peer(shape, config, lora, dtype, device), read),
    }
    results, losses = {}, {}
    for name in options.contenders:
        try:
            losses[name], step = make[name]()
            results |= measure({name: step}, device, options.warmup, options.steps)
        except torch.OutOfMemoryError:
            print(f"{CONTENDERS[name]:26s} out of memory")
        step = None
        release(device)
    lengths = f"{options.shape}, {shape.rows} rows of "
    lengths += f"{shape.source_length} source and {shape.seq_length} target" if shape.source_length else ""
    lengths += "" if shape.source_length else f"{shape.seq_length}"
    print(f"{lengths} tokens, r {options.r} on {len(config.linears)} linears, {shape.task}")
    rows = told(results, shape.rows * (shape.seq_length + shape.source_length))
    where = where_of(device)
    print(f"{where}, {dtype}, torch {torch.__version__}")
    if options.output:
        dropouts = f"p {options.dropout}" + ("" if options.base_dropout else ", no dropout of the base")
        about = f"{lengths} tokens, {shape.task}, r {options.r} on all linears, {dropouts}, {dtype}."
        figures = {"options": vars(options), "results": results, "losses_without_dropout": losses}
        record(options.output, f"A training step of {options.shape}", about, where, COLUMNS, rows, figures)
    compared(losses, dtype)


if __name__ == "__main__":
    main()
