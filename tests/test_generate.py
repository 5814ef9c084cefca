"""Generation against transformers' generate and peft, and every layout against one process."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import pytest
import torch
from oracle import FAMILIES
from safetensors.torch import load_file
from spawn import spawn
from talking import END, NEW, PROMPT_TOKENS, QUESTIONS, Case, flags, make, rows, run, tokenizer

from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, load_adapter, load_base_weights, resolve_lora
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.layout import Layout
from megalora.generation import choosing, dialogue, output, replica, sequences
from megalora.generation import text as text_module
from megalora.generation.cache import Span
from megalora.generation.steps import Steps
from megalora.models.config import read_config
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits


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


@pytest.mark.parametrize("world_size", [1, 2])
def test_base_beside_tuned(case, asked, tmp_path, world_size):
    """From one loaded model, on each of two replicas too; and the adapter comes back."""
    case, out = case("qwen2"), tmp_path / "replies.jsonl"
    command = flags(case, "--prompts_file", asked, "--output_file", out, "--compare_base", "true")
    printed = [run(0, 1, command)] if world_size == 1 else spawn(run_in_rounds, 2, command)
    assert world_size == 2 or printed == [[""]]
    assert [row["response"] for row in rows(out)] == case.tuned
    assert [row["base_response"] for row in rows(out)] == case.base
    assert {"prompt", "response", "finish_reason", "base_response", "base_finish_reason"} == rows(out)[0].keys()
    (shown,) = run(0, 1, flags(case, "--prompt", QUESTIONS[0], "--compare_base", "true"))
    assert shown == f"tuned:\n{case.tuned[0]}\n\nbase:\n{case.base[0]}\n"


def test_the_base_comes_back_whole(case):
    """Its biases and its embedding too, where the adapter brings others."""
    model = case("qwen2").model
    mesh, config = build_mesh(0, 1), read_config(model)
    fields = {"r": 3, "target_modules": "all-linear", "bias": "all", "modules_to_save": ["embed_tokens"]}
    lora = resolve_lora(LoraConfig.from_dict(fields), config)
    stage, _ = build_stage(config, mesh, lora, Placement(mesh.tp, False, torch.float32, "cpu"))
    load_base_weights(stage, model)
    stage.keep_base()
    stage.reset_adapters(1)

    def hidden() -> torch.Tensor:
        with torch.inference_mode():
            return Steps(stage, 1, 8).prefill(None, [5, 9, 7], [Span(0, 0, 3)])

    stage.refresh_adapters()
    base = hidden()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(stage.trainable().items())):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(i))
            assert "lora" in name or name.endswith("bias") or "embed_tokens" in name
    stage.refresh_adapters()
    tuned = hidden()
    assert not torch.allclose(tuned, base)
    for on, expected in ((False, base), (True, tuned), (False, base)):
        stage.switch_adapters(on)
        assert hidden().equal(expected)


def stop_of(case: Case) -> str:
    """Two characters of the middle of a reply."""
    text = max(case.tuned, key=len)
    return text[len(text) // 2 :][:2]


@pytest.mark.parametrize(("world_size", "tp", "pp"), [(1, 1, 1), (4, 2, 2), (2, 1, 1)])
def test_stop_strings(case, asked, tmp_path, world_size, tp, pp):
    case, out = case("llama"), tmp_path / "replies.jsonl"
    stops = [stop_of(case), "nowhere"]
    command = flags(case, "--prompts_file", asked, "--output_file", out, "--stop", *stops)
    command += ["--tensor_parallel_size", str(tp), "--pipeline_parallel_size", str(pp)]
    assert [run(0, 1, command)] if world_size == 1 else spawn(run_in_rounds, world_size, command)
    cut = [text.partition(stops[0])[0] for text in case.tuned]
    assert [row["response"] for row in rows(out)] == cut != case.tuned
    for row, whole, text in zip(rows(out), case.tuned, cut, strict=True):
        assert text == whole or row["finish_reason"] == "stop"


def test_stop_strings_with_escapes(case):
    case = case("llama")
    with mock.patch.object(text_module, "Until", side_effect=text_module.Until) as until:
        run(0, 1, flags(case, "--prompt", QUESTIONS[0], "--stop", r"\n\n", r"a\tb", r"\\n"))
    assert until.call_args_list and all(call.args[0] == ("\n\n", "a\tb", r"\n") for call in until.call_args_list)


def test_streaming_gives_the_same_text(case):
    """Piece by piece, a character at a time here; up to a stop string."""
    case = case("llama")
    text, question = max(zip(case.tuned, QUESTIONS, strict=True), key=lambda pair: len(pair[0]))
    for more, expected in ([], text), (["--stop", stop_of(case)], text.partition(stop_of(case))[0]):
        with mock.patch.object(output.Voice, "say", autospec=True) as say:
            run(0, 1, flags(case, "--prompt", question, *more))
        pieces = [piece.text for call in say.call_args_list for piece in call.args[1]]
        assert "".join(pieces) == expected and len(pieces) > len(expected) / 2


def test_repetition_penalty_is_transformers(case, asked, tmp_path):
    """Also with slots that are used again, and sampled ones beside it stay what the seed makes them."""
    from transformers import AutoModelForCausalLM

    case, out = case("qwen2"), tmp_path / "replies.jsonl"
    command = flags(case, "--prompts_file", asked, "--output_file", out, "--repetition_penalty", 1.7, adapter=False)
    run(0, 1, command, MAX_RUNNING=2)
    model = AutoModelForCausalLM.from_pretrained(case.model).eval()
    expected = []
    for ids in case.prompt_ids:
        ids = torch.tensor([ids])
        reply = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=[0, END], pad_token_id=1, repetition_penalty=1.7,
        )  # fmt: skip
        expected.append(tokenizer().decode(reply[0, ids.shape[1] :], skip_special_tokens=True))
    assert [row["response"] for row in rows(out)] == expected != case.base


@pytest.mark.parametrize(("world_size", "tp", "pp"), [(1, 1, 1), (4, 2, 2)])
def test_logits_of_the_prompts(case, asked, tmp_path, world_size, tp, pp):
    import peft
    from transformers import AutoModelForCausalLM

    case, folder = case("qwen3"), tmp_path / "logits"
    command = flags(case, "--prompts_file", asked, "--return_logits", "true", "--logits_dir", folder)
    command += ["--tensor_parallel_size", str(tp), "--pipeline_parallel_size", str(pp), "--dtype", "float32"]
    printed = [run(0, 1, command)] if world_size == 1 else spawn(run, world_size, command)
    assert case.tuned[0] in printed[0][0]
    base = AutoModelForCausalLM.from_pretrained(case.model)
    model = peft.PeftModel.from_pretrained(base, case.adapter).eval()
    assert len(list(folder.iterdir())) == len(QUESTIONS)
    for number, ids in enumerate(case.prompt_ids):
        found = load_file(folder / f"prompt_{number:05d}.safetensors")
        assert found["input_ids"].tolist() == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found["logits"], expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_goes_on_from_what_its_slot_holds(case):
    """A dialogue feeds what is new of it: the turns before are in the cache."""
    case, fed = case("llama"), []
    feed = replica.Steps.prefill

    def prefill(steps, hidden, token_ids, *others):
        fed.append(len(token_ids))
        return feed(steps, hidden, token_ids, *others)

    said = "\n".join([QUESTIONS[0], QUESTIONS[1]])
    with mock.patch.object(replica.Steps, "prefill", prefill):
        (printed,) = run(0, 1, flags(case, "--seq_length", 200), stdin=said.encode(), WORTH_KEEPING=1)
    assert printed.replace(" ...\n", "\n") == f"{case.tuned[0]}\n{case.follow_up}\n"
    assert fed[0] == len(case.prompt_ids[0]) and fed[1] < PROMPT_TOKENS + len(QUESTIONS[1]) + 5


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


def test_a_cache_in_8_bits_by_flag(case, asked):
    """The kinds of cache that are asked for; the replies of a short chat may be the same."""
    case, kinds = case("llama"), []
    steps = replica.Steps

    def made(*rest):
        kinds.append(rest[-1])
        return steps(*rest)

    with mock.patch.object(replica, "Steps", made):
        words = [flags(case, "--prompt", QUESTIONS[1], *more) for more in ((), ("--kv_cache", "fp8"))]
        dense, fp8 = run(0, 1, *words)
    assert kinds == [False, True] and dense == case.tuned[1] + "\n" and fp8.strip()


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

    with mock.patch.object(sequences, "draw", draw):
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


def test_commands_of_a_dialogue(case, capfd):
    """Who replies changes in the middle; a reset forgets; a command that is none is told."""
    case = case("llama")
    said = ["/base", QUESTIONS[0], "/reset", "/tuned", QUESTIONS[0], "/unknown", QUESTIONS[1], "/quit", QUESTIONS[2]]
    (printed,) = run(0, 1, flags(case), stdin="\n".join(said).encode())
    replies = [case.base[0], case.tuned[0], case.follow_up]
    assert printed.replace(" ...\n", "\n") == "".join(f"{reply}\n" for reply in replies)
    told = capfd.readouterr().err
    assert "unknown command /unknown" in told and "starts anew" in told and "base model replies" in told
    (printed,) = run(0, 1, flags(case, adapter=False), stdin=f"/tuned\n{QUESTIONS[0]}".encode())
    assert "there is no adapter" in capfd.readouterr().err and printed.startswith(case.base[0])
    command = flags(case, "--compare_base", "true")
    (printed,) = run(0, 1, command, stdin=f"{QUESTIONS[0]}\n{QUESTIONS[1]}".encode())
    printed = printed.replace(" ...\n", "\n")
    assert printed.startswith(f"tuned: {case.tuned[0]}\nbase: {case.base[0]}\ntuned: {case.follow_up}\nbase: ")


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
        chosen = usual(logits, sampling, draws)
        if rank == 1:
            chosen[1] = -1  # the second prompt of this replica: number 4 of all
        return chosen

    usual = choosing.choose
    with mock.patch.object(choosing, "choose", choose):
        return run(rank, world_size, command)


@pytest.mark.parametrize(
    ("asks", "switch_off"),
    [({"temperature": 0.8, "top_p": 0.9}, 1), ({"temperature": 0.9, "top_k": 2}, 0),
     ({"temperature": 0.7, "repetition_penalty": 1.6}, 1)],
    ids=["top_p", "top_k", "repetition_penalty"],
)  # fmt: skip
def test_sampling_is_the_models_own_where_no_flag_says_otherwise(case, asked, tmp_path, capsys, asks, switch_off):
    """generation_config.json: read, said, and overridden by flags. switch_off: the value without the second field."""
    case, models_own = case("llama"), {"do_sample": True, **asks, "eos_token_id": [0, END]}
    second = list(asks)[1]
    told = ", ".join(f"{name} {value}" for name, value in asks.items())
    same = [word for name, value in asks.items() for word in (f"--{name}", value)]
    model = tmp_path / "model"
    shutil.copytree(case.model, model)
    (model / "generation_config.json").write_text(json.dumps(models_own))
    out = [tmp_path / f"{i}.jsonl" for i in range(4)]

    def reply(file, folder, *more):
        named = ["--prompts_file", asked, "--output_file", file, "--resume_peft_from_checkpoint", case.adapter]
        words = ["--model_path", folder, "--max_new_tokens", NEW, *named, *more]
        run(0, 1, [str(word) for word in words])
        return [row["response"] for row in rows(file)]

    own = reply(out[0], model)
    assert f"generation_config.json of the model says {told}: flags go on top" in capsys.readouterr().err
    assert own == reply(out[1], case.model, *same) != case.tuned
    if second != "repetition_penalty":
        assert reply(out[2], model, "--temperature", 0) == case.tuned
        assert "generation_config.json of the model says" not in capsys.readouterr().err
    without = reply(out[3], model, f"--{second}", switch_off)
    assert without == reply(out[1], case.model, "--temperature", asks["temperature"]) != own
