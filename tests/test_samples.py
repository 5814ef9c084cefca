"""The rows that the board shows are those of the run: of its task and template, from the folder it was started in."""

from __future__ import annotations

import json

from tiny import make_inputs

from megalora.samples import sample_documents


def run_of(folder, **flags):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    lines = "".join(f"{name}: {value}\n" for name, value in flags.items())
    (run / "run.yaml").write_text(f"# megalora 0, started in {folder}; flags\n{lines}output_dir: run\n")
    return run


def test_rows_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    inputs = make_inputs(tmp_path / "inputs")
    flags = {"model_path": "inputs/model", "data_path": f"inputs/{inputs.data.name}"}
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shown = sample_documents(run_of(tmp_path, **flags, template="own.jinja"), 1)
    assert "".join(text for text, _ in shown[0].pieces).startswith("<user>")

    (tmp_path / "lora.json").write_text(json.dumps({"task_type": "SEQ_CLS", "r": 2}))
    (tmp_path / "classes.jsonl").write_text('{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n')
    flags |= {"data_path": "classes.jsonl", "lora_config": "lora.json"}
    shown = sample_documents(run_of(tmp_path, **flags), 5)
    assert [document.row for document in shown] == [0, 1]
    assert "".join(text for text, _ in shown[0].pieces).startswith("good")
