"""Tiny models that read images, rows with images, and adapters of peft for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import transformers
from oracle import fields_of
from PIL import Image

COLOURS = {"red": (220, 20, 30), "green": (20, 200, 40), "blue": (30, 20, 210)}
ASKED = "which colour"
PROCESSOR = {
    "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor", "do_resize": True,
    "size": {"height": 28, "width": 28}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True,
}  # fmt: skip


def make_model(kind: str, folder: Path) -> Path:
    """A BLIP-2 folder with the language model `kind` (opt, t5), whose embedding has a row for the token of images."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    end, words = tokenizer.eos_token_id, len(tokenizer)
    raw = fields_of(f"blip-2, {kind}", image_token_index=words)
    raw.pop("model_type")
    text = {"vocab_size": words + 3, "eos_token_id": end, "pad_token_id": end, "bos_token_id": end}
    raw["text_config"] = raw["text_config"] | text | ({"decoder_start_token_id": end} if kind == "t5" else {})
    torch.manual_seed(1)
    model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**raw))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.fill_(name.endswith("weight"))
        model.query_tokens.normal_(0, 1)
    if kind == "t5":  # a head of its own, as Flan-T5's
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight) * 0.4)
    tokenizer.add_tokens([transformers.AddedToken("<image>", special=True)], special_tokens=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny.write_json(folder / "preprocessor_config.json", PROCESSOR)
    return folder


def make_rows(folder: Path) -> Path:
    """A file of rows, whose images it puts beside it."""
    noise, rows = np.random.default_rng(1), []
    (folder / "images").mkdir()
    for number in range(18):
        name = list(COLOURS)[number % 3]
        pixels = np.array(COLOURS[name]) + noise.integers(-20, 20, (30, 40 + number, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        rows.append({"image": f"images/{number}.png", "prompt": ASKED, "response": name})
    return tiny.write_json(folder / "rows.json", rows)


def make_adapter(kind: str, model: Path, folder: Path, seed: int = 5) -> Any:
    """peft's model with a random adapter of the language model, which is saved to `folder`."""
    import peft

    names = r"language_model\..*\.(q_proj|v_proj|fc2)" if kind == "opt" else r"language_model\..*\.(q|v|wo)"
    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names)
    theirs = peft.get_peft_model(transformers.Blip2ForConditionalGeneration.from_pretrained(model), lora).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    theirs.save_pretrained(folder)
    return theirs
