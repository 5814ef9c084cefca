"""Adapters of experts, of every expert_lora, in one batch: each replies what `megalora generate` replies with it."""

from __future__ import annotations

import concurrent.futures
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from oracle import EXPERTS
from server import started
from talking import NEW, QUESTIONS, make_model, rows, run

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora, trained_shapes
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.layout import Layout
from megalora.errors import UserError
from megalora.models.config import read_config
from megalora.parallel.split import Split
from megalora.serving.adapters import AdapterReader, room_for

pytest.importorskip("starlette")
KINDS = ("per_expert", "shared_a", "shared")


@dataclass(frozen=True)
class Case:
    """replies: by name, to QUESTIONS."""

    model_type: str
    model: Path
    adapters: dict[str, Path]
    replies: dict[str, list[str]]


def make_adapter(folder: Path, config, kind: str) -> Path:
    """A random adapter as a user has it: of peft where each expert has its own, else of a run."""
    fields = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "expert_lora": kind}
    lora = resolve_lora(LoraConfig.from_dict(fields), config)
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    shapes = trained_shapes(lora, config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    if kind == "per_expert":
        write_peft(folder, tensors, lora.config.to_dict())
    else:
        splits = {name: Split.range(shape, 0, 0, shape[0]) for name, shape in shapes.items()}
        save_adapter(folder, tensors, splits, Layout(1, 1, 0, 0), lora.config.to_dict())
    return folder


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    model = folder / "model"
    make_model(EXPERTS[request.param] | {"num_hidden_layers": 2, "eos_token_id": 0}, model)
    config = read_config(str(model))
    adapters = {kind: make_adapter(folder / kind, config, kind) for kind in KINDS}
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    replies = {}
    for name in ("base", *KINDS):
        words = ["--model_path", model, "--max_new_tokens", NEW, "--prompts_file", folder / "questions.txt"]
        words += ["--output_file", folder / f"{name}.jsonl"]
        words += ["--resume_peft_from_checkpoint", adapters[name]] if name != "base" else []
        assert run(0, 1, [str(word) for word in words]) == [""]
        replies[name] = [row["response"] for row in rows(folder / f"{name}.jsonl")]
    assert len({tuple(some) for some in replies.values()}) == 4
    return Case(request.param, model, adapters, replies)


def serve(case, names, *more):
    named = [f"{name}={case.adapters[name]}" for name in names]
    words = ["--model_path", case.model, "--model_name", "base", "--port", 0, "--seq_length", 120, "--max_running", 8]
    return started("serve", *words, *(["--adapters", *named] if named else []), *more)


def check(server, case, names):
    """All models and questions at once."""

    def ask(one):
        name, number = one
        message = {"role": "user", "content": QUESTIONS[number]}
        body = {"model": name, "messages": [message], "max_tokens": NEW, "temperature": 0}
        status, answer, _ = server.ask("/v1/chat/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    asked = [(name, number) for number in range(len(QUESTIONS)) for name in names]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == [case.replies[name][number] for name, number in asked]


def test_replies_are_those_of_generate(case):
    with serve(case, KINDS) as server:
        check(server, case, ["base", *KINDS])


@pytest.mark.slow
def test_two_processes_and_adapters_that_come_later(case):
    """Over tensor or pipeline parallel ranks; there is room for them where one of the start is of experts."""
    axis = "pipeline" if case.model_type == "gpt_oss" else "tensor"
    with serve(case, KINDS[:1], "--nproc", 2, f"--{axis}_parallel_size", 2, "--max_adapters", 3) as server:
        for name in KINDS[1:]:
            body = {"lora_name": name, "lora_path": str(case.adapters[name])}
            assert server.ask("/v1/load_lora_adapter", body)[0] == 200
        check(server, case, ["base", *KINDS])


def test_room_for_experts_is_asked_for(case):
    config = read_config(str(case.model))
    read = AdapterReader(config, str(case.model), str(case.model), "dense").read("tuned", str(case.adapters["shared"]))
    with pytest.raises(UserError, match="a linear of experts.*: start the server with --room_for_experts true"):
        room_for(1, 2, config, of_experts=False).fit(read.lora, read.tensors)
    assert room_for(1, 2, config, of_experts=True).fit(read.lora, read.tensors).keys() == read.tensors.keys()
