"""An encoder-decoder from its rows to its replies: a run, `megalora generate`, transformers and peft."""

import importlib
import json
import warnings

import peft
import pytest
import tiny
import torch
import transformers
from oracle import fields_of
from spawn import spawn
from talking import run

import megalora
from megalora import cli
from megalora.data.encode import EncodeSettings
from megalora.data.packing import Sides
from megalora.data.pairs import PairRows, read_pair
from megalora.data.readers import Chunk
from megalora.data.tokenizer import OpenedTokenizer
from megalora.errors import UserError
from megalora.tasks.rouge import rouge_l

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

WORDS = ("red", "green", "blue", "old", "new", "big", "small", "round")
ROWS = [{"input": f"{a} {b}", "output": f"{b} {a} {a}"} for a in WORDS for b in WORDS if a != b]
PREFIX = "turn: "
OTHERS = ("umt5", "mbart", "pegasus", "m2m_100")
PROBES = (0, 17, 40)  # rows whose replies are compared with transformers'


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for program in (tiny.program, importlib.import_module("megalora.generate")):
        monkeypatch.setattr(program, "choose_device", lambda: (torch.device("cpu"), None))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of each family, with a head of its own for Flan-T5's."""
    found = {}
    tokenizer = tiny.tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.eos_token_id
    for family in ("t5, version 1.1", "bart", *OTHERS):
        raw = fields_of(family, vocab_size=len(tokenizer), eos_token_id=end, pad_token_id=pad, bos_token_id=end)
        raw |= {"decoder_start_token_id": end, "forced_bos_token_id": None}
        raw |= {"pad_token_id": 1} if family == "m2m_100" else {}  # which its decoder does not count
        raw |= {"num_decoder_layers": 2} if "num_layers" in raw else {}  # transformers' cache has no room for more
        config = transformers.CONFIG_MAPPING[raw.pop("model_type")](**raw)
        torch.manual_seed(1)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if family == "pegasus" and "embed_positions" in name:  # sines and cosines
                    continue
                parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.fill_(name.endswith("weight"))
        if family == "bart":
            model.generation_config.forced_bos_token_id = 1  # special, as in practice
        elif family == "t5, version 1.1":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.4)
        folder = tmp_path_factory.mktemp("model") / family.replace(", ", "-")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[family] = folder
    return found


def tune(folder, model, more_lora=None, **flags) -> None:
    tiny.write_json(folder / "rows.json", ROWS)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
    tiny.write_json(folder / "lora.json", lora | (more_lora or {}))
    named = {"model_path": model, "data_path": folder / "rows.json", "lora_config": folder / "lora.json"}
    more = {"output_dir": folder / "run", "seq_length": 96, "source_length": 80, "source_prefix": PREFIX}
    more |= {"max_steps": 40, "learning_rate": 2e-2, "eval_fraction": 0.2, "base_dropout": False}
    megalora.finetune(**named | more | flags)


@pytest.mark.parametrize("family", ["t5, version 1.1", "bart"])
def test_from_rows_to_replies(family, models, tmp_path):
    model = models[family]
    tune(tmp_path, model)
    losses = tiny.column(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] and "loss" in tiny.metrics(tmp_path / "run", "eval_metrics.jsonl")[-1]
    said = {}
    for adapter, more in (("run", {}), ("run/peft", {"source_prefix": PREFIX}), (None, {"source_prefix": PREFIX})):
        file = tmp_path / "out.jsonl"
        named = {} if adapter is None else {"resume_peft_from_checkpoint": tmp_path / adapter}
        megalora.generate(
            model_path=model, prompts_file=tmp_path / "rows.json", output_file=file, max_new_tokens=9, **named, **more
        )
        said[adapter] = [json.loads(line)["response"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert said["run"] == said["run/peft"] != said[None] and any(said["run"][number].strip() for number in PROBES)
    export, merged = tmp_path / "run" / "peft", tmp_path / "merged"
    words = ["convert", "adapter", "merge", "--input", tmp_path / "run", "--base", model, "--output", merged]
    assert cli.main([str(word) for word in words]) == 0
    auto = transformers.AutoModelForSeq2SeqLM
    theirs = peft.PeftModel.from_pretrained(auto.from_pretrained(model), export).eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    whole = auto.from_pretrained(merged).eval()
    for number in PROBES:
        ids = tokenizer(PREFIX + ROWS[number]["input"], return_tensors="pt").input_ids
        for one in (theirs, whole):
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                reply = one.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9 + (family == "bart"),
                    do_sample=False, num_beams=1, forced_eos_token_id=None,
                )[0]  # fmt: skip
            text = tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert text.strip() == said["run"][number].strip(), (number, one is whole)


@pytest.mark.parametrize("family", ["t5, version 1.1", "bart", *OTHERS])
def test_an_adapter_of_peft_replies_alike_on_every_layout(family, models, tmp_path):
    """Greedy replies of an adapter that peft made are those of peft, on tensor and pipeline parallel ranks too; of
    OTHERS, whose decoding steps are the same code, on one process."""
    model, auto, adapter = models[family], transformers.AutoModelForSeq2SeqLM, tmp_path / "adapter"
    names = ["q", "v", "wo"] if "t5" in family else ["q_proj", "v_proj", "fc2"]
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(5)
    theirs = peft.get_peft_model(auto.from_pretrained(model), lora).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    theirs.save_pretrained(adapter)
    tokenizer, expected = transformers.AutoTokenizer.from_pretrained(model), []
    file, out = tmp_path / "asked.json", tmp_path / "out.jsonl"
    tiny.write_json(file, [ROWS[number] for number in PROBES])
    for number in PROBES:
        ids = tokenizer(ROWS[number]["input"], return_tensors="pt").input_ids
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            reply = theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9 + (family == "bart"),
                do_sample=False, num_beams=1, forced_eos_token_id=None,
            )[0]  # fmt: skip
        expected.append(tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip())
    assert len(set(expected)) > 1
    command = ["--model_path", model, "--resume_peft_from_checkpoint", adapter, "--prompts_file", file]
    command = [str(word) for word in (*command, "--output_file", out, "--max_new_tokens", 9, "--dtype", "float32")]
    for tp, pp in ((1, 1), (2, 2), (4, 1), (1, 4)) if family not in OTHERS else ((1, 1),):
        layout = ["--tensor_parallel_size", str(tp), "--pipeline_parallel_size", str(pp)]
        printed = [run(0, 1, command)] if tp * pp == 1 else spawn(run, 4, [*command, *layout])
        assert printed == [[""]] * (tp * pp)
        said = [json.loads(line)["response"].strip() for line in out.read_text(encoding="utf-8").splitlines()]
        assert said == expected, (tp, pp)


def test_replies_to_evaluation_rows_are_scored(models, tmp_path):
    """They are those of `megalora generate` to the first rows of each set, on every layout."""
    model, held = models["t5, version 1.1"], tmp_path / "held.json"
    rows = [row | {"output": "big red blue"} for row in ROWS[::3]]  # words that the model knows few others of
    tiny.write_json(held, rows)
    scored = {"eval_generate": 6, "eval_fraction": None, "eval_data_path": (f"held={held}",)}
    tune(tmp_path, model, max_steps=60, eval_steps=40, learning_rate=3e-2, **scored)
    found, run_folder = tiny.metrics(tmp_path / "run", "eval_metrics.jsonl"), tmp_path / "run"
    scores = [line["rouge_l"] for line in found]
    assert [line["held"]["rouge_l"] for line in found] == scores and len(scores) == 2
    asked = {"prompts_file": held, "max_new_tokens": 96, "resume_peft_from_checkpoint": run_folder}
    said = [row["response"] for row in megalora.generate(model_path=model, **asked)]
    rouge = [rouge_l(row["output"], reply) for row, reply in zip(rows, said, strict=True)]
    assert scores[-1] == pytest.approx(sum(rouge[:6]) / 6, abs=1e-12) and scores[-1] > 0
    given = {"model_path": model, "data_path": tmp_path / "rows.json"}
    given |= {"resume_peft_from_checkpoint": run_folder / "peft"}  # the run itself would be gone on with
    given |= {"output_dir": tmp_path / "cut", "seq_length": 96, "source_length": 80, "source_prefix": PREFIX}
    given |= {"base_dropout": "false", "max_steps": 1, "learning_rate": 1e-9, "eval_generate": 6}
    given |= {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": "true"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    tiny.tune(4, [*words, "--eval_data_path", f"held={held}"])
    cut = tiny.metrics(tmp_path / "cut", "eval_metrics.jsonl")[-1]
    assert cut["rouge_l"] == cut["held"]["rouge_l"] == pytest.approx(scores[-1], abs=1e-12)


def test_beams_that_the_model_asks_for_are_told(models, tmp_path, capfd):
    for file in models["bart"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    tiny.write_json(tmp_path / "generation_config.json", {"num_beams": 4, "no_repeat_ngram_size": 3})
    megalora.generate(model_path=tmp_path, prompt="red green", max_new_tokens=2)
    told = "not applied in generation, though generation_config.json of the model asks for it: num_beams 4, no_repeat"
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    ("lora", "flags", "told"),
    [
        ({"task_type": "CAUSAL_LM"}, {}, r"CAUSAL_LM \(the default\) does not fit model_type t5: give SEQ_2_SEQ_LM"),
        ({"modules_to_save": ["shared"]}, {}, "training the embedding or the head of t5 is not implemented"),
        ({"trainable_token_indices": [3]}, {}, "training the embedding or the head of t5 is not implemented"),
        ({}, {"template": "chatml"}, "template has no effect for task_type SEQ_2_SEQ_LM"),
        ({}, {"on_long_row": "split"}, "on_long_row split means nothing for SEQ_2_SEQ_LM"),
        ({}, {"source_length": 4}, "the source has .* tokens for --source_length 4: raise --source_length to at least"),
        ({}, {"columns": ("target=output",)}, "no known shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(lora, flags, told, models, tmp_path):
    with pytest.raises(UserError, match=told):
        tune(tmp_path, models["t5, version 1.1"], lora, **flags)


def test_rows_of_instructions_are_told_that_there_is_one_source():
    row = {"instruction": "a", "input": "", "output": "b"}
    with pytest.raises(UserError, match="row 7: has an instruction and an input, .* write both into one field"):
        read_pair(row, "row 7")


def test_what_replies_cannot_be_asked_for(models):
    model = models["t5, version 1.1"]
    with pytest.raises(UserError, match="system has no effect: t5 is an encoder-decoder"):
        megalora.generate(model_path=model, prompt="a", system="b")


def test_a_row_that_is_too_long_is_cut(models):
    """A source keeps the end that the tokenizer sets; a target that is cut has none."""
    opened = OpenedTokenizer(transformers.AutoTokenizer.from_pretrained(models["bart"]), models["bart"])
    rows = PairRows(opened, Sides(6, 0), "p")
    chunk = Chunk("rows", 0, [{"text": "a b c d e f g h", "summary": "h g f e d c b a"}])
    documents, report = rows.encoder(EncodeSettings(4, "truncate")).encode(chunk)
    sample = documents.sample(0)
    assert sample.input_ids.tolist() == rows.source("a b c d e f g h")[:6] + rows.target("h g f e d c b a")[:4]
    assert (sample.labels != -100).tolist() == [False] * 6 + [True] * 4 and report.seen["long truncated"] == 1
