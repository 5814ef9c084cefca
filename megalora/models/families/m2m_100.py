"""NLLB-200 and M2M-100: PEGASUS's layers, with sines and cosines from behind the padding token's row on."""

import math

import torch

from megalora.models.barts import bart, bart_family
from megalora.models.family import Fields
from megalora.models.spec import ModelSpec, Positions


def read(hf: Fields) -> ModelSpec:
    half = hf.d_model // 2
    if half < 2:
        hf.fail(f"d_model = {hf.d_model} is too small for its positions", "correct it")
    waves = tuple(torch.exp(torch.arange(half).float() * (-math.log(10000) / (half - 1))).tolist())
    offset = (hf.pad_token_id or 0) + 1
    rows = hf.max_position_embeddings + offset
    return bart(hf, lambda name: Positions(name, rows, offset, waves=waves), bias_row=None)


FAMILY = bart_family(
    "m2m_100",
    read,
    {},
    ignored=("embed_positions.weights",),  # which are computed
    example={"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    published=("nllb-200-distilled-600M",),
)
