"""A classifier from its rows to its labels: a run, its evaluation, `megalora generate`, and peft with the head."""

import importlib
import json

import peft
import pytest
import tiny
import torch
import transformers

import megalora
from megalora import cli
from megalora.errors import UserError
from megalora.models.config import check_writes_text, config_from_dict

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

NAMES, PLACES = ("Ada", "Bob", "Cleo", "Dan"), ("Rome", "Oslo", "Lima")
TAGGED = [
    {"tokens": [name, "lives", "in", place, "."], "tags": ["B-PER", "O", "O", "B-LOC", "O"]}
    for name in NAMES for place in PLACES
]  # fmt: skip
WORDS = {"good": "pos", "bad": "neg"}
TEXTS = [{"text": f"{name} is {word}", "label": label} for name in NAMES for word, label in WORDS.items()]
CASES = {
    "TOKEN_CLS": (TAGGED, transformers.AutoModelForTokenClassification, peft.PeftModelForTokenClassification),
    "SEQ_CLS": (TEXTS, transformers.AutoModelForSequenceClassification, peft.PeftModelForSequenceClassification),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for program in (tiny.program, importlib.import_module("megalora.generate")):
        monkeypatch.setattr(program, "choose_device", lambda: (torch.device("cpu"), None))


def tune(folder, model, task: str, rows: list, **flags) -> None:
    tiny.write_json(folder / "rows.json", rows)
    tiny.write_json(folder / "lora.json", tiny.LORA | {"task_type": task})
    named = {"model_path": model, "data_path": folder / "rows.json", "lora_config": folder / "lora.json"}
    more = {"output_dir": folder / "run", "seq_length": 64, "max_steps": 24, "learning_rate": 1e-2}
    megalora.finetune(**named | more | {"eval_fraction": 0.25} | flags)


@pytest.mark.parametrize("task", CASES)
def test_from_rows_to_labels(task, model, tmp_path):
    rows, auto, wrapped = CASES[task]
    tune(tmp_path, model, task, rows)
    evaluation = tiny.metrics(tmp_path / "run", "eval_metrics.jsonl")[-1]
    assert evaluation["accuracy"] > 0.7 and {"loss", "f1"} <= evaluation.keys()
    said = []
    for adapter in ("run", "run/peft"):
        file = tmp_path / "out.jsonl"
        megalora.generate(
            model_path=model, resume_peft_from_checkpoint=tmp_path / adapter, prompts_file=tmp_path / "rows.json",
            output_file=file,
        )  # fmt: skip
        said.append([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    assert said[0] == said[1] and len(said[0]) == len(rows)
    first = said[0][0]
    export = tmp_path / "run" / "peft"
    base = auto.from_pretrained(model, config=transformers.AutoConfig.from_pretrained(export))
    theirs = peft.PeftModel.from_pretrained(base, export).eval()
    assert isinstance(theirs, wrapped)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    merged = tmp_path / "merged"
    words = ["convert", "adapter", "merge", "--input", tmp_path / "run", "--base", model, "--output", merged]
    assert cli.main([str(word) for word in words]) == 0
    whole = auto.from_pretrained(merged).eval()
    assert list(whole.config.id2label.values()) == list(theirs.config.id2label.values())
    probe = torch.tensor([[7, 8, 9]])
    for one in (whole, theirs):
        one.config.pad_token_id = None
    assert (whole(input_ids=probe).logits - theirs(input_ids=probe).logits).abs().max() < 1e-5
    if task == "SEQ_CLS":
        theirs.config.pad_token_id = None
        ids = tokenizer(rows[0]["text"], return_tensors="pt").input_ids
        probabilities = theirs(input_ids=ids).logits.softmax(-1)[0]
        expected = dict(zip(("neg", "pos"), probabilities.tolist(), strict=True))
        assert first["scores"] == pytest.approx(expected, abs=2e-6)
        return
    encoded = tokenizer([f" {word}" for word in rows[0]["tokens"]], is_split_into_words=True, return_tensors="pt")
    words = encoded.word_ids()
    starts = [place for place, word in enumerate(words) if place == 0 or word != words[place - 1]]
    best = theirs(input_ids=encoded.input_ids).logits.softmax(-1)[0].max(-1)
    assert first["scores"] == pytest.approx(best.values[starts].tolist(), abs=2e-6)
    assert first["tags"] == [theirs.config.id2label[number] for number in best.indices[starts].tolist()]
    assert all({"label", "text", "start", "end", "score"} == entity.keys() for entity in first["entities"])


def test_a_run_goes_on_with_its_labels(model, tmp_path):
    tune(tmp_path, model, "SEQ_CLS", TEXTS, max_steps=4, save_steps=2)
    whole = tiny.exported(tmp_path / "run")
    assert {"base_model.model.score.weight"} <= whole.keys()
    with pytest.raises(UserError, match="label 'maybe' is none of the 2 labels"):
        tune(tmp_path, model, "SEQ_CLS", [*TEXTS, {"text": "x", "label": "maybe"}], max_steps=8)


@pytest.mark.parametrize(
    ("task", "rows", "flags", "told"),
    [
        ("TOKEN_CLS", [{"tokens": ["a", "b"], "tags": ["O"]}, *TAGGED], {}, "row 0: 2 tokens but 1 tags"),
        ("TOKEN_CLS", TAGGED, {"template": "chatml"}, "template has no effect for task_type TOKEN_CLS"),
        ("SEQ_CLS", TEXTS, {"on_long_row": "split"}, "on_long_row split"),
        ("SEQ_CLS", TEXTS[:1], {}, "its rows have 1 label"),
    ],
)
def test_what_does_not_fit_is_told(task, rows, flags, told, model, tmp_path):
    with pytest.raises(UserError, match=told):
        tune(tmp_path, model, task, rows, **flags)


def test_a_classifier_is_of_the_base_that_is_asked_for(model, tmp_path, capfd):
    tune(tmp_path, model, "SEQ_CLS", TEXTS, max_steps=2, base_format="nf4")
    capfd.readouterr()
    adapter = {"model_path": model, "resume_peft_from_checkpoint": tmp_path / "run", "prompt": "Ada is good"}
    (nf4,) = megalora.generate(**adapter, base_format="nf4")
    assert "is used on it in" not in capfd.readouterr().err
    (dense,) = megalora.generate(**adapter)
    assert "was trained on the base in nf4, and is used on it in dense" in capfd.readouterr().err
    assert nf4["scores"] != dense["scores"]


def test_a_length_beyond_the_model_is_told(model, tmp_path, capfd):
    tune(tmp_path, model, "SEQ_CLS", TEXTS, max_steps=1)
    adapter = {"model_path": model, "resume_peft_from_checkpoint": tmp_path / "run", "prompt": "Ada is good"}
    for length, beyond in ((256, False), (100_000, True)):
        capfd.readouterr()
        megalora.generate(**adapter, seq_length=length)
        assert (f"seq_length ({length}) is more than the" in capfd.readouterr().err) == beyond


def test_an_encoder_alone_is_told_what_it_lacks():
    fields = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = config_from_dict(fields | {"model_type": "bert", "num_attention_heads": 2})
    with pytest.raises(UserError, match="bert writes no text"):
        check_writes_text(config, "dir", "name another")
    check_writes_text(config_from_dict(tiny.FIELDS), "dir", "name another")


def test_a_classifier_does_not_chat(model, tmp_path):
    tune(tmp_path, model, "SEQ_CLS", TEXTS, max_steps=1)
    adapter = {"model_path": model, "resume_peft_from_checkpoint": tmp_path / "run"}
    with pytest.raises(UserError, match="a chat needs a terminal"):
        megalora.generate(**adapter)
    with pytest.raises(UserError, match="temperature has no effect"):
        megalora.generate(**adapter, prompt="x", temperature=0.5)
