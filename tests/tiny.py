"""A tiny model folder with a real tokenizer, rows, and `megalora finetune` run on it by ranks of `spawn`."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from spawn import spawn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# The ranks of `spawn` are forked from a process that has imported this module: what is slow to import is found done.
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from waiting import PATIENCE

import megalora.commands  # noqa: F401
import megalora.web.server  # noqa: F401
from megalora import cli
from megalora.cluster import launch
from megalora.models.config import config_from_dict

program = importlib.import_module("megalora.finetune")  # `megalora.finetune` is the function of that name
# The heap of tests is steady (conftest.py, spawn.py): to collect all of it and thaw it again is half of a short run.
program.steady_heap = contextlib.nullcontext
ROOT = Path(__file__).resolve().parents[1]
SEQ_LENGTH = 64
FIELDS = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
config_from_dict(FIELDS)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LORA = {
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "init_lora_weights": False,  # B is not zero, so that dropout and every gradient count from the first step
}


def questions(count: int = 48, first: int = 0) -> list[dict[str, str]]:
    """Rows of one turn, of many lengths."""
    numbers = range(first, first + count)
    return [
        {"instruction": f"Who are you{' now' * (i % 4)}? {i}", "input": "", "output": f"I am Mega{', yes' * (i % 5)}."}
        for i in numbers
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the rows; <|im_end|> is not its end of text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FIELDS["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in questions() for text in row.values()] + ["user\nassistant\nsystem\n"] * 9
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    made.chat_template = CHATML
    return made


def save_model(folder: Path, **fields: object) -> Path:
    """An HF folder: config.json, model.safetensors (float32, as transformers writes it), tokenizer."""
    fields = FIELDS | fields
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[fields["model_type"]](**fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_json(file: Path, value: object) -> Path:
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Inputs:
    """What a run is given: an HF folder, a data file, a lora_config.json."""

    model: Path
    data: Path
    lora: Path

    def flags(self, output_dir: Path, /, **flags: object) -> list[str]:
        """The words after `megalora finetune`; a flag that is None is left out."""
        named = {
            "model_path": self.model,
            "data_path": self.data,
            "lora_config": self.lora,
            "output_dir": output_dir,
            "seq_length": SEQ_LENGTH,
            "max_steps": 10,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
        }
        given = {name: value for name, value in (named | flags).items() if value is not None}
        return words(given)


def words(flags: Mapping[str, object]) -> list[str]:
    """The words of a command line that give these flags."""
    return [word for name, value in flags.items() for word in (f"--{name}", *_words(value))]


def _words(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


def make_inputs(folder: Path) -> Inputs:
    folder.mkdir(exist_ok=True)
    return Inputs(
        save_model(folder / "model"),
        write_json(folder / "rows.json", questions()),
        write_json(folder / "lora_config.json", LORA),
    )


@dataclass(frozen=True)
class Done:
    """One command line that has ended, as this rank saw it."""

    status: int
    out: str
    err: str


def run(rank: int, world_size: int, commands: Sequence[list[str]]) -> list[Done]:
    """`megalora finetune` of each command on this rank, one after another, each with a process group of its own.

    Only the rendezvous is another than under torchrun: a store of rank 0's at any port that is free.
    """
    results = []
    with contextlib.ExitStack() as patches:
        if world_size > 1:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
            box = [server.port if server is not None else None]
            dist.broadcast_object_list(box)
            dist.barrier()
            dist.destroy_process_group()

            def open_store(rank: int, world_size: int) -> dist.Store:
                store = dist.TCPStore("127.0.0.1", box[0], is_master=False, wait_for_workers=False)
                return dist.PrefixStore(str(len(results)), store)

            patches.enter_context(mock.patch.object(launch, "open_store", open_store))
        patches.enter_context(mock.patch.object(cli, "_GRACE_SECONDS", 0.0))
        patches.enter_context(mock.patch.object(program, "choose_device", lambda: (torch.device("cpu"), None)))
        for command in commands:
            with (
                contextlib.redirect_stdout(io.StringIO()) as out,
                contextlib.redirect_stderr(io.StringIO()) as err,
            ):
                status = cli.main(["finetune", *command])
            results.append(Done(status, out.getvalue(), err.getvalue()))
    return results


def tune(world_size: int, *commands: list[str]) -> list[Done]:
    """Rank 0's part of commands that must succeed, on `world_size` processes."""
    ranks = spawn(run, world_size, commands) if world_size > 1 else [run(0, 1, commands)]
    for rank, results in enumerate(ranks):
        for done in results:
            assert done.status == 0, f"rank {rank}: {done.err}"
            assert rank == 0 or not done.out, f"rank {rank} printed: {done.out}"
    return ranks[0]


def torchrun(
    folder: Path, processes: int, *flags: str, tool: str = "finetune.py", stdin: str | None = None
) -> subprocess.CompletedProcess:
    """`torchrun tools/finetune.py`, or another tool, in `folder`, as a user starts it, on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a machine whose name does not resolve must do too
    return subprocess.run(
        [*launcher, str(ROOT / "tools" / tool), *flags],
        capture_output=True, text=True, timeout=PATIENCE, cwd=folder, input=stdin, env=environment,
    )  # fmt: skip


def metrics(output_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output_dir / name).read_text(encoding="utf-8").splitlines()]


def column(output_dir: Path, name: str) -> list[float]:
    """One field of every line of metrics.jsonl."""
    return [line[name] for line in metrics(output_dir)]


def exported(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "peft" / "adapter_model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys() and a, a.keys() ^ b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
