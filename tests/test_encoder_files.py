"""Encoders with files that transformers and peft write and read: base, adapter with its head, shards, merged model."""

import importlib
import json

import peft
import pytest
import tiny
import torch
import transformers
from oracle import fields_of
from safetensors.torch import load_file
from test_classify import TAGGED, TEXTS

import megalora
from megalora import cli
from megalora.errors import UserError
from megalora.models.config import config_from_dict

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

AUTO = {
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}
PLACED = [row | {"bbox": [[90 * i, 40, 90 * i + 80, 60] for i in range(len(row["tokens"]))]} for row in TAGGED]
CASES = (
    *(("layoutlm", "TOKEN_CLS"), ("deberta", "TOKEN_CLS"), ("deberta-v2", "SEQ_CLS"), ("roberta", "SEQ_CLS")),
    *(("distilbert", "SEQ_CLS"), ("modernbert", "SEQ_CLS")),
)
# Of which peft has no defaults.
TARGETS = {"distilbert": {"target_modules": ["q_lin", "v_lin"]}, "modernbert": {"target_modules": ["Wqkv", "Wi"]}}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for program in (tiny.program, importlib.import_module("megalora.generate")):
        monkeypatch.setattr(program, "choose_device", lambda: (torch.device("cpu"), None))


def base_of(family: str, folder):
    """The folder of a bare encoder, as transformers saves it; with the head of pretraining that ModernBERT reads."""
    fields = fields_of(family, vocab_size=320)
    auto = transformers.AutoModelForMaskedLM if family == "modernbert" else transformers.AutoModel
    model = auto.from_config(transformers.CONFIG_MAPPING[fields.pop("model_type")](**fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.lower().endswith("norm.weight") else 0.0, 0.15, generator=generator)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def tune(folder, model, task: str, rows: list, **flags):
    tiny.write_json(folder / "rows.json", rows)
    lora = {"task_type": task, "r": 4, "init_lora_weights": False}  # target_modules: the defaults
    tiny.write_json(folder / "lora.json", lora | flags.pop("lora", {}))
    named = {"model_path": model, "data_path": folder / "rows.json", "lora_config": folder / "lora.json"}
    more = {"output_dir": folder / "run", "seq_length": 64, "max_steps": 3, "learning_rate": 1e-2}
    megalora.finetune(**named | more | flags)


def said_of(folder, model, adapter) -> list[dict]:
    file = folder / "out.jsonl"
    megalora.generate(
        model_path=model, resume_peft_from_checkpoint=adapter, prompts_file=folder / "rows.json", output_file=file
    )
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_peft_reads_what_was_trained_and_megalora_what_peft_saves(family, task, tmp_path):
    model = base_of(family, tmp_path / "model")
    rows = TEXTS if task == "SEQ_CLS" else PLACED if family == "layoutlm" else TAGGED
    tune(tmp_path, model, task, rows, lora=TARGETS.get(family, {}))
    export, merged, again = (tmp_path / name for name in ("run/peft", "merged", "again"))
    theirs = peft.PeftModel.from_pretrained(
        AUTO[task].from_pretrained(model, config=transformers.AutoConfig.from_pretrained(export)), export
    ).eval()
    words = ["convert", "adapter", "merge", "--input", tmp_path / "run", "--base", model, "--output", merged]
    assert cli.main([str(word) for word in words]) == 0
    ours = said_of(tmp_path, model, tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    read = {"text": rows[0]["text"]} if task == "SEQ_CLS" else {"text": [f" {word}" for word in rows[0]["tokens"]]}
    encoded = tokenizer(**read, is_split_into_words=task == "TOKEN_CLS", return_tensors="pt")
    given = {"input_ids": encoded.input_ids}
    if family == "layoutlm":  # whose tokenizer here sets no special tokens
        given["bbox"] = torch.tensor([[rows[0]["bbox"][word] for word in encoded.word_ids()]])
    for one in (theirs, AUTO[task].from_pretrained(merged).eval()):
        best = one(**given).logits.softmax(-1)[0]
        if task == "SEQ_CLS":
            assert list(ours[0]["scores"].values()) == pytest.approx(best.tolist(), abs=2e-6)
        else:
            assert ours[0]["scores"][0] == pytest.approx(best[0].max().item(), abs=2e-6)
    theirs.save_pretrained(again)
    theirs.config.save_pretrained(again)
    assert said_of(tmp_path, model, again) == ours
    assert load_file(again / "adapter_model.safetensors").keys() == tiny.exported(tmp_path / "run").keys()


def test_an_adapter_that_lacks_its_pooler_says_so(tmp_path):
    model = base_of("deberta-v2", tmp_path / "model")
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    config = transformers.AutoConfig.from_pretrained(model, **labels)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4)
    theirs = peft.get_peft_model(AUTO["SEQ_CLS"].from_pretrained(model, config=config), lora)
    for part in (theirs, config):
        part.save_pretrained(tmp_path / "adapter")
    tiny.write_json(tmp_path / "rows.json", TEXTS)
    with pytest.raises(UserError, match="lacks pooler.dense, which the classifier reads: peft saves it only where"):
        said_of(tmp_path, model, tmp_path / "adapter")


@pytest.mark.parametrize("family", ["deberta", "deberta-v2, apart", "layoutlm"])
def test_shards_keep_every_bit(family, tmp_path):
    model, shards, back = base_of(family, tmp_path / "model"), tmp_path / "shards", tmp_path / "back"
    to = ["convert", "to-shards", "--input", model, "--output", shards, "--tensor_parallel_size", 2]
    assert cli.main([str(word) for word in (*to, "--pipeline_parallel_size", 2)]) == 0
    assert cli.main([str(word) for word in ("convert", "to-hf", "--input", shards, "--output", back)]) == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (model, back))
    for name, tensor in theirs.items():
        if name.startswith("pooler."):  # no part of a model until its task reads it
            continue
        assert ours[f"{family.partition('-')[0]}.{name}"].equal(tensor), name


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size = 3 is not implemented"),
        ({"pos_att_type": ["p2p"]}, "pos_att_type = .'p2p'. is not implemented"),
        ({"norm_rel_ebd": "batch"}, "norm_rel_ebd = 'batch' is not implemented"),
        ({"position_buckets": 3}, "position_buckets = 3 does not fit"),
        ({"embedding_size": 24}, "embedding_size = 24 is not implemented"),
        ({"talking_head": True}, "talking_head = True is not implemented"),
    ],
)
def test_what_a_deberta_may_not_have(fields, told):
    with pytest.raises(UserError, match=told):
        config_from_dict(fields_of("deberta-v2", **fields))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not implemented"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"classifier_pooling": "max"}, "classifier_pooling"),
        ({"hidden_size": 44}, "num_attention_heads .8. does not divide hidden_size .44."),
    ],
)
def test_what_a_modernbert_may_not_have(fields, told):
    with pytest.raises(UserError, match=told):
        config_from_dict(fields_of("modernbert", **fields))
