"""Generation against transformers' generate and peft, and every layout against one process.

The models are tiny and random. Their tokenizer has a token for each ASCII character, so that replies compare as tokens.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from oracle import FAMILIES, TINY
from spawn import spawn

from megalora import generate as program
from megalora.arguments import parse_generate
from megalora.building import build_stage, load_adapter, resolve_lora
from megalora.checkpoint.adapter import open_adapter
from megalora.checkpoint.shards import Layout, save_adapter
from megalora.data import ChatTemplate, load_tokenizer
from megalora.errors import UserError
from megalora.generation import dialogue, replica
from megalora.lora import LoraConfig
from megalora.models.config import read_config
from megalora.parallel.linear import Placement
from megalora.parallel.mesh import build_mesh
from megalora.parallel.split import named_splits

NEW = 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = 2
QUESTIONS = ["Hi", "What is the capital of France?", "x + y", "Name a colour.", "7"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT_TOKENS = len("ssuser\ne\nsassistant\n") - 1  # of the template around a question; s, e: a special token
FORMS = FAMILIES | {
    # Shorter than any prompt, but through four layers it sees past the template's last 13 tokens to the question.
    "mistral": {"model_type": "mistral", "sliding_window": 9, "head_dim": 10},
    # We read both forms of the rope fields; this one is read by transformers 4 and 5.
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6},
}


@dataclass(frozen=True)
class Case:
    """A model folder, a peft folder of an adapter for it, and what transformers replies to QUESTIONS."""

    model: Path
    adapter: Path
    base: list[str]
    tuned: list[str]
    tuned_ids: list[list[int]]  # of `tuned`, with the token that ends it
    follow_up: str  # after QUESTIONS[0] and its tuned reply, to QUESTIONS[1]


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [split.pre_tokenize_str(chr(byte))[0][0] for byte in range(TINY["vocab_size"] - len(SPECIAL))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


def make(family: str, folder: Path) -> Case:
    import peft
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = TINY | FORMS[family] | {"eos_token_id": [0, END], "bos_token_id": 1, "pad_token_id": None}
    config = CONFIG_MAPPING[fields["model_type"]](**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")

    template = ChatTemplate(load_tokenizer(folder / "model"))

    def reply(model, *texts: str) -> list[int]:
        roles = ["user", "assistant"] * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        ids = torch.tensor([template.prompt(messages)])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                eos_token_id=[0, END], pad_token_id=1,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    def text(token_ids: list[int]) -> str:
        return template.tokenizer.decode(token_ids, skip_special_tokens=True)

    base = [text(reply(model, question)) for question in QUESTIONS]
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    lora = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    tuned.save_pretrained(folder / "adapter")
    replies = [reply(tuned, question) for question in QUESTIONS]
    follow_up = text(reply(tuned, QUESTIONS[0], text(replies[0]), QUESTIONS[1]))
    return Case(folder / "model", folder / "adapter", base, [*map(text, replies)], replies, follow_up)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """family -> its Case, made once."""
    pytest.importorskip("peft")
    made: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in made:
            made[family] = make(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture
def asked(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS))
    return file


def run(rank: int, world_size: int, *commands: list[str], stdin: bytes = b"", **limits: int) -> list[str]:
    """`megalora generate` of each command on this rank: what it prints, or "error: " and the message.

    stdin is rank 0's; limits are sizes of the program and of the replica, made small.
    """

    @contextlib.contextmanager
    def mesh(device, tp, pp, clock=None):
        yield build_mesh(rank, world_size, tp, pp)

    printed = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(program, "distributed", mesh))
        patches.enter_context(mock.patch.object(program, "choose_device", lambda: (torch.device("cpu"), None)))
        for name, value in limits.items():
            owner = program if hasattr(program, name) else replica
            patches.enter_context(mock.patch.object(owner, name, value))
        reader, writer = os.pipe()
        os.write(writer, stdin if rank == 0 else b"never read")
        os.close(writer)
        patches.callback(os.close, reader)
        patches.enter_context(mock.patch.object(sys, "stdin", mock.Mock(fileno=lambda: reader)))
        for command in commands:
            out = patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
            try:
                program.generate(parse_generate(command))
                printed.append(out.getvalue())
            except UserError as error:
                printed.append(f"error: {error}")
    return printed


def flags(case: Case, *more: object, adapter: bool = True) -> list[str]:
    named = ["--resume_peft_from_checkpoint", case.adapter] if adapter else []
    return [str(word) for word in ("--model_path", case.model, "--max_new_tokens", NEW, *named, *more)]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_greedy_is_transformers(case, asked, tmp_path, family, tp, pp):
    case, out = case(family), tmp_path / "out" / "replies.jsonl"
    layout = ["--tensor_parallel_size", tp, "--pipeline_parallel_size", pp]
    command = flags(case, "--prompts_file", asked, "--output_file", out, *layout)
    printed = spawn(run, tp * pp, command) if tp * pp > 1 else [run(0, 1, command)]
    assert printed == [[""]] * (tp * pp)
    assert [row["prompt"] for row in rows(out)] == QUESTIONS
    assert [row["response"] for row in rows(out)] == case.tuned
    assert case.tuned != case.base
    assert len({reply[:3] for reply in case.tuned}) > 1, "replies that do not depend on the prompt"
    assert list(out.parent.iterdir()) == [out]


def test_base(case, asked, tmp_path):
    case, out = case("llama"), tmp_path / "replies.jsonl"
    for more in ([], ["--resume_peft_from_checkpoint", str(case.adapter), "--disable_adapter"]):
        run(0, 1, [*flags(case, "--prompts_file", asked, "--output_file", out, adapter=False), *more])
        assert [row["response"] for row in rows(out)] == case.base


def test_the_terminal(case, asked):
    case = case("llama")
    one, all_of_them = run(0, 1, flags(case, "--prompt", QUESTIONS[1]), flags(case, "--prompts_file", asked))
    assert one == case.tuned[1] + "\n"
    assert all_of_them == "".join(f"> {q}\n{r}\n\n" for q, r in zip(QUESTIONS, case.tuned, strict=True))


@pytest.mark.parametrize("limits", [{"MAX_RUNNING": 1}, {"MAX_RUNNING": 2}, {"STEP_TOKENS": 50}, {"CACHE_TOKENS": 199}])
def test_whoever_runs_together(case, asked, tmp_path, limits):
    """mistral: its window is shorter than the prompts, and slots are used again."""
    case, out = case("mistral"), tmp_path / "replies.jsonl"
    run(0, 1, flags(case, "--prompts_file", asked, "--output_file", out), **limits)
    assert [row["response"] for row in rows(out)] == case.tuned


def test_shards_of_another_layout(case, tmp_path):
    case = case("qwen3")
    folder = tmp_path / "shards"
    spawn(write_shards, 4, str(case.model), str(case.adapter), str(folder))
    command = flags(case, "--resume_peft_from_checkpoint", folder, "--prompt", QUESTIONS[1], adapter=False)
    assert run(0, 1, command) == [case.tuned[1] + "\n"]


def write_shards(rank: int, world_size: int, model: str, adapter: str, folder: str) -> None:
    """The adapter as a run at tp2·pp2 saves it."""
    mesh, config, opened = build_mesh(rank, world_size, 2, 2), read_config(model), open_adapter(adapter)
    lora = resolve_lora(LoraConfig.from_dict(opened.lora_config), config)
    stage, _ = build_stage(config, mesh, lora, Placement(mesh.tp, False, torch.float32, "cpu"))
    load_adapter(stage, opened.tensors, opened.where)
    layout = Layout(2, 2, mesh.tp.rank, mesh.pp.rank)
    fields = lora.config.to_dict() | {"inference_mode": False}
    save_adapter(folder, stage.trainable(), named_splits(stage), layout, fields)


SAMPLED = ["--temperature", 0.9, "--top_k", 60, "--top_p", 0.95]


def test_a_seed_gives_one_text_on_every_layout(case, asked, tmp_path):
    """Seven prompts over dp too, in rounds of two a replica: numbers and order do not depend on who replies."""
    case, out = case("qwen2"), tmp_path / "replies.jsonl"
    asked.write_text("\n".join([*QUESTIONS, *QUESTIONS[:2]]))
    command = flags(case, "--prompts_file", asked, "--output_file", out, *SAMPLED, "--seed", 1)
    found = []
    for world_size, tp, pp in ((1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 2)):
        layout = ["--tensor_parallel_size", str(tp), "--pipeline_parallel_size", str(pp)]
        if world_size == 1:
            run(0, 1, command)
        else:
            spawn(run_in_rounds, world_size, [*command, *layout])
        found.append(rows(out))
    assert found[1:] == found[:1] * 3
    replies = [row["response"] for row in found[0]]
    assert replies[:2] != replies[5:], "the same prompt again draws other numbers"
    run(0, 1, [*command[:-1], "2"])
    assert not {row["response"] for row in rows(out)} & set(replies)


def test_each_token_draws_a_number_of_its_own(case, asked):
    case, drawn = case("qwen2"), []

    def draw(seed: int, prompt: int, place: int) -> float:
        drawn.append((seed, prompt, place))
        return 0.5

    with mock.patch.object(replica, "draw", draw):
        run(0, 1, flags(case, "--prompts_file", asked, "--temperature", 1, "--seed", 8))
    places = {prompt: [at for _, number, at in drawn if number == prompt] for prompt in range(len(QUESTIONS))}
    assert len(drawn) == sum(map(len, places.values())) > len(QUESTIONS)
    assert all(found == list(range(len(found))) for found in places.values())
    assert {seed for seed, _, _ in drawn} == {8}


def run_in_rounds(rank: int, world_size: int, command: list[str]) -> None:
    run(rank, world_size, command, ROUND=2)


def test_ends(case, asked, tmp_path):
    """Each of several eos ends a reply and is no part of it; so does the end of the context."""
    case, out = case("llama"), tmp_path / "replies.jsonl"
    model = tmp_path / "model"
    model.mkdir()
    for file in case.model.iterdir():
        (model / file.name).symlink_to(file)
    stops = [case.tuned_ids[0][5], case.tuned_ids[1][3]]
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    command = ["--prompts_file", asked, "--output_file", out]
    run(0, 1, flags(case, *command, "--model_path", model)[2:])
    decode, found = tokenizer().decode, rows(out)
    for row, ids in zip(found, case.tuned_ids, strict=True):
        at = next((i for i, token in enumerate(ids) if token in (*stops, END)), None)
        assert row["response"] == decode(ids[:at], skip_special_tokens=True)
        assert row["finish_reason"] == ("length" if at is None else "stop")
    assert {row["finish_reason"] for row in found} == {"stop", "length"}

    asked.write_text(QUESTIONS[1])
    run(0, 1, flags(case, *command, "--seq_length", PROMPT_TOKENS + len(QUESTIONS[1]) + 4))
    (row,) = rows(out)
    assert row["response"] == decode(case.tuned_ids[1][:4], skip_special_tokens=True)
    assert row["finish_reason"] == "length"


@pytest.mark.parametrize("world_size", [1, 2])
def test_dialogue(case, world_size, capfd):
    """Blank lines are passed over, a message too long forgets what was said, the last line needs no end."""
    case = case("llama")
    said = "\n".join([QUESTIONS[0], " ", QUESTIONS[1], "long" * 40, QUESTIONS[0]])
    command = flags(case, "--pipeline_parallel_size", world_size, "--seq_length", 150)
    if world_size == 1:
        printed = [run(0, 1, command, stdin=said.encode())]
        assert "the dialogue starts anew" in capfd.readouterr().err
    else:
        printed = spawn(run_with_input, 2, command, said.encode())
    replies = [case.tuned[0], case.follow_up, case.tuned[0]]
    assert printed[0][0].replace(" ...\n", "\n") == "".join(f"{reply}\n" for reply in replies)
    assert printed[1:] == [[""]] * (world_size - 1)


def run_with_input(rank: int, world_size: int, command: list[str], stdin: bytes) -> list[str]:
    # Patience of no time at all: rank 0 says again and again that there is nothing yet.
    with mock.patch.object(dialogue, "KEEP_ALIVE", 0.0):
        return run(rank, world_size, command, stdin=stdin)


def test_errors_stop_all_ranks_with_one_line(case, asked, tmp_path):
    llama, other = case("llama"), case("qwen2")
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"fine\n\xff\n")
    empty.write_text("\n")
    taken = tmp_path / "taken"
    taken.mkdir()
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in llama.adapter.iterdir():
        (narrow / file.name).symlink_to(file)
    fields = json.loads((llama.adapter / "adapter_config.json").read_text())
    (narrow / "adapter_config.json").unlink()
    (narrow / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["c_attn"]}))
    asking = ["--prompt", "Hi"]
    cases = [
        (flags(llama, "--prompts_file", empty), "empty.txt holds no prompts"),
        (flags(llama, "--prompts_file", bad), "bad.txt line 2: byte 5 is not UTF-8"),
        (flags(llama, "--prompts_file", tmp_path / "none.txt"), "none.txt: cannot be read"),
        (flags(llama, "--prompt", "long" * 80), f"prompt: {320 + PROMPT_TOKENS} tokens leave no room"),
        (flags(llama, *asking, "--seq_length", 300), "seq_length (300) is more than the model's"),
        (flags(llama, *asking, "--output_file", taken), "taken: cannot be written (it is a folder)"),
        (flags(llama, *asking, "--resume_peft_from_checkpoint", tmp_path, adapter=False), "holds neither"),
        (flags(llama, *asking, "--resume_peft_from_checkpoint", other.adapter, adapter=False), "has shape"),
        (flags(llama, *asking, "--resume_peft_from_checkpoint", narrow, adapter=False), "is of another model"),
        (flags(llama, *asking, "--template", "nonesuch"), "nonesuch is no built-in template"),
    ]
    commands = [command for command, _ in cases]
    printed = [run(0, 1, *commands), *spawn(run_commands, 2, [*map(with_pp, commands)])]
    for on_rank in printed:
        for (command, part), text in zip(cases, on_rank, strict=True):
            assert text.startswith("error: ") and part in text and "\n" not in text, (command, text)


def with_pp(command: list[str]) -> list[str]:
    return [*command, "--pipeline_parallel_size", "2"]


def run_commands(rank: int, world_size: int, commands: list[list[str]]) -> list[str]:
    return run(rank, world_size, *commands)


def test_logits_that_are_not_finite(case, asked):
    """On one replica of two: both stop."""
    case = case("llama")
    command = flags(case, "--prompts_file", asked)
    for text in spawn(run_broken, 2, command):
        assert "logits of prompt 4 are not finite" in text[0]


def run_broken(rank: int, world_size: int, command: list[str]) -> list[str]:
    def choose(logits, sampling, draws):
        chosen = replica_choose(logits, sampling, draws)
        if rank == 1:
            chosen[1] = -1  # the second prompt of this replica: number 4 of all
        return chosen

    replica_choose = replica.choose
    with mock.patch.object(replica, "choose", choose):
        return run(rank, world_size, command)
