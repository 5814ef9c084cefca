"""What model_path may name besides a folder, and what is said of things that are taken for one."""

import sys
import types

import huggingface_hub
import pytest
import tiny
from huggingface_hub.errors import LocalEntryNotFoundError

from megalora import commands
from megalora.convert import read_base
from megalora.errors import UserError
from megalora.flags import parse_finetune, parse_generate, parse_plan
from megalora.model_paths import check_holds_base, model_folder, public_name


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The hub's client, which gives a folder; what it was asked for."""
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options["revision"]))
        folder = tmp_path / "hub/models--owner--name/snapshots/0123abcd"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_name_of_the_hub_is_fetched_where_no_folder_has_it(asked, tmp_path):
    assert model_folder("owner/name").endswith("0123abcd")
    model_folder("hf://owner/name@v1.2")
    (tmp_path / "owner/name").mkdir(parents=True)
    assert model_folder("owner/name") == "owner/name"
    assert model_folder("owner/nome") == "owner/nome", "a slip in the path of a folder asks no hub"
    assert model_folder("/nowhere/a/b") == "/nowhere/a/b"
    model_folder("hf://owner/name")
    assert asked == [("owner/name", None), ("owner/name", "v1.2"), ("owner/name", None)]
    with pytest.raises(UserError, match="is no model of the hub: write it like hf://OWNER/NAME"):
        model_folder("hf://name")


def test_a_run_begins_with_the_folder_that_was_fetched(asked, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(sys.modules, "megalora.finetune", types.SimpleNamespace(finetune=seen.append))
    (tmp_path / "rows.json").write_text("[]")
    commands.finetune(parse_finetune({"model_path": "owner/name", "data_path": "rows.json", "output_dir": "out"}))
    assert seen[0].model.model_path.endswith("snapshots/0123abcd")
    assert public_name(seen[0].model.model_path) == "owner/name"
    assert public_name(str(tmp_path)) == str(tmp_path)


def test_what_the_hub_does_not_give_is_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="model_path owner/name: is no folder here, and cannot be fetched"):
        model_folder("owner/name")

    def fails(kind):
        def snapshot_download(name, **options):
            raise kind("no")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    fails(type("GatedRepoError", (Exception,), {}))
    with pytest.raises(UserError, match="accept it at huggingface.co/owner/name and log in"):
        model_folder("hf://owner/name")
    fails(type("RepositoryNotFoundError", (Exception,), {}))
    with pytest.raises(UserError, match="no model of the Hugging Face hub: correct the name"):
        model_folder("owner/name")
    fails(LocalEntryNotFoundError)
    with pytest.raises(UserError, match="hf download OWNER/NAME --local-dir"):
        model_folder("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs the package huggingface_hub: pip install"):
        model_folder("owner/name")


def test_adapters_and_gguf_files_are_no_base(tmp_path):
    def made(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")

    made(
        "run/.megalora.json", "run/peft/adapter_config.json", "run/peft/adapter_model.safetensors", "m.gguf", "g/a.gguf"
    )
    made("g/adapter_config.json")
    made("run/checkpoints/iter_0000002/mp_rank_00_pp_rank_000/lora_partial_model_optim.pt")
    made(
        "hf/config.json",
        "hf/model.safetensors",
        "hf/model.gguf",
        "shards/mp_rank_00_pp_rank_000/partial_model_optim.pt",
    )
    for fine in ("hf", "shards", "nowhere"):
        check_holds_base(str(tmp_path / fine), "model_path")
    for name, what in (
        ("run", "is the output_dir of a run, and holds no base weights"),
        ("run/peft", "is a PEFT adapter"),
        ("run/checkpoints/iter_0000002", "is a checkpoint of an adapter"),
    ):
        with pytest.raises(UserError, match=f"{what}.*and the model it was trained on as model_path"):
            check_holds_base(str(tmp_path / name), "model_path")
        with pytest.raises(UserError, match=f"{what}.*and leave resume_from_checkpoint out"):
            check_holds_base(str(tmp_path / name), "resume_from_checkpoint")
        with pytest.raises(UserError, match=f"input .*{what}.*megalora convert adapter to-peft"):
            read_base(str(tmp_path / name))
    for name in ("m.gguf", "g"):
        with pytest.raises(UserError, match="is a GGUF file.*megalora convert from-gguf --input .*gguf --output DIR"):
            check_holds_base(str(tmp_path / name), "model_path")


def test_the_commands_look_before_they_begin(tmp_path):
    inputs = tiny.make_inputs(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.megalora.json").write_text("{}")
    run = {"model_path": tmp_path / "run"}
    with pytest.raises(UserError, match="is the output_dir of a run"):
        commands.generate(parse_generate(run | {"prompt": "a"}))
    given = {"model_path": inputs.model, "data_path": inputs.data, "output_dir": tmp_path / "out"}
    with pytest.raises(UserError, match="resume_from_checkpoint .*run: is the output_dir of a run"):
        commands.finetune(parse_finetune(given | {"resume_from_checkpoint": tmp_path / "run"}))


def test_nothing_is_written_into_the_folder_of_a_model(tmp_path):
    inputs = tiny.make_inputs(tmp_path)
    files = sorted(inputs.model.iterdir())
    (tmp_path / "link").symlink_to(inputs.model)
    other = tiny.save_model(tmp_path / "other")
    given = {"model_path": inputs.model, "data_path": inputs.data}
    for flag, folder, said in (
        ("output_dir", inputs.model, "is the folder that the model is read from: name another folder"),
        ("output_dir", tmp_path / "link", "is the folder that the model is read from"),
        ("output_dir", other, "holds a model"),
        ("log_dir", inputs.model / ".", "is the folder that the model is read from"),
    ):
        for more in ({}, {"overwrite_output_dir": True}):
            flags = given | {"output_dir": tmp_path / "out"} | {flag: folder} | more
            with pytest.raises(UserError, match=f"{flag} .*: {said}"):
                commands.check_finetune(parse_finetune(flags), 1)
    asked = {"model_path": inputs.model, "prompt": "a"}
    for flags, said in (
        (
            {"output_file": inputs.model / "config.json"},
            "output_file .*: lies in the folder that the model is read from",
        ),
        (
            {"return_logits": True, "logits_dir": tmp_path / "link"},
            "logits_dir .*: is the folder that the model is read",
        ),
    ):
        with pytest.raises(UserError, match=said):
            commands.check_generate(parse_generate(asked | flags), 1)
    drawn = {"model_path": inputs.model / "config.json", "gpus": 1, "draw": inputs.model / "tokenizer.json"}
    with pytest.raises(UserError, match="draw .*: lies in the folder that the model is read from: name another file"):
        commands.plan(parse_plan(drawn))
    config = tiny.write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(UserError, match="draw .*: is what the model is read from: name another file"):
        commands.plan(parse_plan({"model_path": config, "gpus": 1, "draw": config}))
    assert sorted(inputs.model.iterdir()) == files
    (other / ".megalora.json").write_text("{}")  # a run that began there goes on
    commands.check_finetune(parse_finetune(given | {"output_dir": other}), 1)
