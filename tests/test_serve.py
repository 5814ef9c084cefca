"""What `megalora serve` refuses before it listens, in one line each."""

from __future__ import annotations

import json
import shutil
import socket
from unittest import mock

import pytest
from oracle import TINY
from talking import make_model
from told import user_error

from megalora import cli
from megalora.checkpoint.adapter.shards import AdapterCheckpoint
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.serving import adapters
from megalora.serving.adapters import check_shared

peft = pytest.importorskip("peft")
pytest.importorskip("starlette")


def test_what_is_not_of_a_linear_is_found_by_its_name():
    """Whatever kind of adapter comes to be: a tensor beside A and B of the layers' linears is refused."""
    config = config_from_dict(TINY | {"model_type": "llama"})
    linear = next(iter(config.linears))
    for name in ("lm_head.lora_A.weight", f"{linear}.lora_magnitude_vector.weight", f"{linear}.bias", "norm.weight"):
        adapter = AdapterCheckpoint({}, {f"{linear}.lora_A.weight": None, name: None}, where="here")
        with pytest.raises(UserError, match=f"adapter tuned .here. has {name}, which requests of several"):
            check_shared("tuned", adapter, config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and an adapter for it."""
    folder = tmp_path_factory.mktemp("serve")
    model = make_model({"model_type": "llama"}, folder / "model")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


def refused(capsys, *words):
    assert cli.main(["serve", *map(str, words)]) == 2
    return user_error(capsys.readouterr().err)


def test_flags(capsys, tmp_path):
    model = ["--model_path", tmp_path, "--port", 0]
    assert "adapters 'tuned' is not NAME=FOLDER" in refused(capsys, *model, "--adapters", "tuned")
    assert "two models are named a" in refused(capsys, *model, "--adapters", "a=x", "a=y")
    assert "'a b' cannot be the name" in refused(capsys, *model, "--adapters", "a b=x")
    assert "runs one copy of the model" in refused(capsys, *model, "--tensor_parallel_size", 2)
    assert "does not exist" in refused(capsys, "--model_path", tmp_path / "nowhere")
    assert "--temperature belongs to megalora generate" in refused(capsys, *model, "--temperature", 1)
    assert "max_adapters 1 is less than the 2" in refused(
        capsys, *model, "--max_adapters", 1, "--adapters", "a=x", "b=y"
    )
    for word, value in (("max_adapter_rank", 8), ("room_for_experts", "true")):
        assert f"{word} has no effect without max_adapters" in refused(capsys, *model, f"--{word}", value)
    assert "token must be 8 to 200 letters" in refused(capsys, *model, "--token", "a b c d e f")
    with mock.patch.dict("sys.modules", {"uvicorn": None}):
        assert "pip install 'megalora[serve]'" in refused(capsys, *model)


def test_what_cannot_be_served(capsys, folders, tmp_path):
    model = ["--model_path", folders / "model"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: cannot listen there" in refused(capsys, *model, "--port", port)
    model += ["--port", 0]
    room = refused(capsys, *model, "--max_adapters", 1, "--room_for_experts", "true")
    assert "room_for_experts has no effect: llama has no experts" in room
    assert "host nowhere.invalid is not an address" in refused(capsys, *model, "--host", "nowhere.invalid")
    assert "two models are named model" in refused(capsys, *model, "--adapters", f"model={folders / 'adapter'}")
    for fields, part in (
        ({"bias": "lora_only"}, "has bias = 'lora_only', which requests of several adapters"),
        ({"use_dora": True}, "has use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save = "),
        ({"target_modules": ["k_proj"]}, "adapter"),
        ({"task_type": "TOKEN_CLS"}, "is of task_type TOKEN_CLS, which writes no text"),
    ):
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folders / "adapter", other)
        config = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps(config | fields))
        assert part in refused(capsys, *model, "--adapters", f"tuned={other}"), fields
    elsewhere = UserError("was trained on another base")
    with mock.patch.object(adapters, "check_base", side_effect=elsewhere):
        assert "writes no text" in refused(capsys, *model, "--adapters", f"tuned={other}"), "not what its head does"
