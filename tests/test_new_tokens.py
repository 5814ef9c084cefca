"""--new_special_tokens: tokenizer and model grow, on every layout alike, and what is written carries both."""

import json

import pytest
import tiny
import torch

from megalora import cli
from megalora.samples import sample_documents

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

TOKENS = ["<tool>", "</tool>", "|sep|"]
ROWS = [
    {"instruction": f"Who are you{' |sep| now' * (i % 3)}? {i}", "output": f"<tool>I am{', yes' * (i % 5)}</tool>."}
    for i in range(16)
]
FLAGS = {
    "dtype": "float64", "lr_scheduler_type": "constant", "max_steps": 3, "new_special_tokens": TOKENS,
    "global_batch_size": 4, "seq_length": 128,
}  # fmt: skip
WORDS = ["embed_tokens", "lm_head"]
MODELS = {  # the model's fields, what lora_config.json says beside the usual, and layouts
    "untied": (
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        [{"tensor_parallel_size": 4}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}],
    ),
    "tied": (
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
        [{"tensor_parallel_size": 2}],
    ),
    "in full": (
        {"tie_word_embeddings": True},
        {"target_modules": ["v_proj"], "modules_to_save": WORDS},
        [{"tensor_parallel_size": 2, "pipeline_parallel_size": 2}],
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name: (its model's folder, the run of one process, the runs of four)."""
    root, found, alone, together = tmp_path_factory.mktemp("runs"), {}, [], []
    data = tiny.write_json(root / "rows.json", ROWS)
    for name, (fields, lora, layouts) in MODELS.items():
        words = len(tiny.tokenizer())  # no row to spare
        model = tiny.save_model(root / name, **fields, vocab_size=words)
        inputs = tiny.Inputs(model, data, tiny.write_json(root / f"{name}.json", tiny.LORA | lora))
        alone.append(inputs.flags(root / f"{name} 0", **FLAGS))
        others = []
        for number, layout in enumerate(layouts, 1):
            out = root / f"{name} {number}"
            steps = [FLAGS | {"max_steps": 2}, FLAGS | {"new_special_tokens": None}]  # gone on with, without the flag
            together += [inputs.flags(out, **layout, **flags) for flags in (steps if number == 1 else [FLAGS])]
            others.append(out)
        found[name] = model, root / f"{name} 0", others
    tiny.tune(1, *alone)
    tiny.tune(4, *together)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_one_process_and_files_those_of_peft(name, runs, tmp_path, capsys):
    model, run, others = runs[name]
    for other in others:
        assert tiny.largest_difference(tiny.exported(run), tiny.exported(other)) <= 1e-12
        losses = (tiny.column(one, "loss") for one in (run, other))
        assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-12
    before, tokenizer = (transformers.AutoTokenizer.from_pretrained(at) for at in (model, run / "peft"))
    ids = [len(before) + i for i in range(len(TOKENS))]
    assert tokenizer.convert_tokens_to_ids(TOKENS) == ids and len(tokenizer) == len(before) + len(TOKENS)
    assert tokenizer("I <tool>am").input_ids == [*before("I ").input_ids, ids[0], *before("am").input_ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    base.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(base, run / "peft").eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who |sep| are you?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert ids[2] in asked["input_ids"][0]
    for adapter, out in ((run, "of the run"), (run / "peft", "of peft")):
        convert = ["convert", "adapter", "merge", "--input", str(adapter), "--base", str(model)]
        assert cli.main([*convert, "--output", str(tmp_path / out)]) == 0, capsys.readouterr().err
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / out, dtype=torch.float64)
        assert merged.config.vocab_size == len(tokenizer)
        with torch.no_grad():
            ours, of_peft = (one(**asked).logits for one in (merged, theirs))
        assert (ours - of_peft).abs().max() < 1e-5
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / out).get_vocab() == tokenizer.get_vocab()
    if name == "tied":
        assert merged.lm_head.weight is merged.model.embed_tokens.weight

    wanted = theirs.generate(**asked, max_new_tokens=12, do_sample=False, eos_token_id=2)[0]
    wanted = tokenizer.decode([i for i in wanted[asked["input_ids"].shape[1] :] if i > 2])
    for number, of in enumerate((run, others[0] / "peft")):
        said = tmp_path / f"{number}.jsonl"
        command = [
            "generate", "--model_path", str(model), "--resume_peft_from_checkpoint", str(of), "--dtype", "float64",
            "--prompt", "Who |sep| are you?", "--max_new_tokens", "12", "--output_file", str(said),
        ]  # fmt: skip
        assert cli.main(command) == 0, capsys.readouterr().err
        assert json.loads(said.read_text())["response"].strip() == wanted.strip()
    pieces = [text for text, _ in sample_documents(run, 1)[0].pieces]
    assert "|sep|" in pieces or "<tool>" in pieces, "the rows are shown with the tokens that the run added"
    status = cli.main(["serve", "--model_path", str(model), "--adapters", f"a={run}", "--port", "0"])
    said = capsys.readouterr().err
    assert status != 0 and ("merge it" in said), said


def test_the_first_loss_is_that_of_a_resized_model(tmp_path):
    """transformers draws new rows around the mean of the others, with a variance of a billionth of theirs.

    Its norms are in float32.
    """
    model = tiny.save_model(tmp_path / "model", vocab_size=len(tiny.tokenizer()))
    lora = tiny.write_json(tmp_path / "lora.json", {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.0})
    inputs = tiny.Inputs(model, tiny.write_json(tmp_path / "rows.json", ROWS[:4]), lora)
    tiny.tune(1, inputs.flags(tmp_path / "out", **FLAGS | {"max_steps": 1, "packing": False, "seq_length": 96}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out/peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for words in (base.model.embed_tokens.weight, base.lm_head.weight):
            words[-len(TOKENS) :] = words[: -len(TOKENS)].mean(0)
    total = count = 0
    for row in ROWS[:4]:
        asked = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before, reply = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, row["output"]))
        ids = torch.tensor([[*before, *reply, tokenizer.convert_tokens_to_ids("<|im_end|>")]])
        logits = base(ids).logits[0, len(before) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(before) :], reduction="sum").item()
        count += len(reply) + 1
    assert tiny.column(tmp_path / "out", "loss")[0] == pytest.approx(total / count, abs=1e-6)


PEFT = {  # rows of the base beyond its tokens; what peft trains
    "rows": (0, {"trainable_token_indices": {"embed_tokens": [320, 321, 322], "lm_head": [320, 321, 322]}}),
    "rows of one end": (0, {"trainable_token_indices": [320, 321, 322]}),
    "in full": (0, {"modules_to_save": WORDS}),
    "nothing of the ends": (0, {}),
    "of fewer rows": (64, {"modules_to_save": WORDS}),
}


@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_adapters_that_peft_made_of_a_resized_model(tmp_path, capsys):
    """peft saves all of the resized matrices, by several names, beside what it trains."""
    for name, (spare, lora) in PEFT.items():
        model = tiny.save_model(tmp_path / f"{name} base", vocab_size=len(tiny.tokenizer()) + spare)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.resize_token_embeddings(len(tokenizer))
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **lora)
        theirs = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for at, parameter in enumerate(p for n, p in theirs.named_parameters() if p.requires_grad):
                parameter.normal_(0, 0.15, generator=torch.Generator().manual_seed(at))
        tokenizer.save_pretrained(tmp_path / name)
        theirs.save_pretrained(tmp_path / name)
        convert = ["convert", "adapter", "merge", "--input", str(tmp_path / name), "--base", str(model)]
        assert cli.main([*convert, "--output", str(tmp_path / f"{name} merged")]) == 0, capsys.readouterr().err
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} merged", dtype=torch.float32)
        ids = torch.tensor([[5, 320, 9, 322, 321, 40]])
        assert merged.config.vocab_size == len(tokenizer)
        with torch.no_grad():
            assert (merged(ids).logits - theirs(ids).logits).abs().max() < 1e-5, name
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name} merged").encode(TOKENS[1]) == [321]


MISTAKES = {
    "a token that is there": (["<|im_end|>"], {}, "'<|im_end|>' is a token of .* already .id 2."),
    "one end in full": (["<x>"], {"modules_to_save": ["lm_head"]}, "modules_to_save lacks embed_tokens"),
    "an adapter beside": (["<x>"], {"target_modules": ["lm_head"]}, "lm_head is in trainable_token_indices, and in"),
    "twice": (["<x>", "<x>"], {}, "names a token twice"),
    "blank": ([" <x>"], {}, "begins or ends with a blank"),
}


def test_mistakes_are_told(tmp_path, capsys):
    inputs = tiny.make_inputs(tmp_path / "inputs")
    for tokens, lora, said in MISTAKES.values():
        file = tiny.write_json(tmp_path / "lora.json", tiny.LORA | lora)
        command = inputs.flags(tmp_path / "out", lora_config=file, new_special_tokens=tokens)
        [done] = tiny.run(0, 1, [command])
        assert done.status != 0
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(done.err)
