"""Kinds of adapters through the commands: trained, gone on with, exported, read by peft and by generate."""

import json

import pytest
import tiny
import torch

from megalora import cli

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

KINDS = {
    "dora": {"use_dora": True, "init_lora_weights": "orthogonal"},
    "words": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [5, 9, 300]},
    "adapters on words": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]},
}
FLAGS = {"tensor_parallel_size": 2, "lr_scheduler_type": "constant", "save_steps": 2, "loraplus_lr_ratio": 4.0}


def test_trained_gone_on_with_exported_and_generated(tmp_path, capsys):
    inputs = tiny.make_inputs(tmp_path / "inputs")
    commands = []
    for name, kind in KINDS.items():
        file = tiny.write_json(tmp_path / f"{name}.json", tiny.LORA | kind)
        for out, steps in (("whole", 4), ("half", 2), ("half", 4)):
            commands.append(inputs.flags(tmp_path / f"{name} {out}", lora_config=file, max_steps=steps, **FLAGS))
    tiny.tune(2, *commands)
    for name in KINDS:
        whole, half = tmp_path / f"{name} whole", tmp_path / f"{name} half"
        assert tiny.largest_difference(tiny.exported(whole), tiny.exported(half)) == 0
        assert tiny.column(whole, "loss")[2:] == tiny.column(half, "loss")[-2:]
        config = json.loads((whole / "peft/adapter_config.json").read_text())
        assert isinstance(config["target_modules"], list) and config["base_model_name_or_path"] == str(inputs.model)
        base = transformers.AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
        plain = base.generate(torch.tensor([[5, 9, 20]]), max_new_tokens=12, do_sample=False)
        theirs = peft.PeftModel.from_pretrained(base, whole / "peft").eval()
        tuned = theirs.generate(input_ids=torch.tensor([[5, 9, 20]]), max_new_tokens=12, do_sample=False)
        assert plain.tolist() != tuned.tolist(), "the adapter changes nothing"
        prompt = "Who are you now?"
        capsys.readouterr()
        status = cli.main([
            "generate", "--model_path", str(inputs.model), "--resume_peft_from_checkpoint", str(whole / "peft"),
            "--prompt", prompt, "--max_new_tokens", "12", "--output_file", str(tmp_path / f"{name}.jsonl"),
        ])  # fmt: skip
        assert status == 0, capsys.readouterr().err
        tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.model)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        wanted = theirs.generate(**asked, max_new_tokens=12, do_sample=False, eos_token_id=stops)[0]
        wanted = tokenizer.decode(wanted[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        reply = json.loads((tmp_path / f"{name}.jsonl").read_text())
        assert wanted.strip() == reply["response"].strip(), name
