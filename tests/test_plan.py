"""`megalora plan`: what a user sees of it."""

import json
import re
from xml.etree import ElementTree

import pytest
from told import user_error

from megalora.cli import main
from megalora.errors import UserError
from megalora.flags import parse_finetune, parse_plan

FIELDS = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FIELDS))
    return str(path)


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    out, err = capsys.readouterr()
    return status, out, err


def test_it_ranks_layouts_and_gives_flags_that_finetune_takes(capsys, model):
    status, out, err = run(capsys, "--model_path", model, "--gpus", "4", "--global_batch_size", "16")
    assert status == 0 and err == ""
    ranked = [line.split() for line in out.splitlines() if line.rstrip().endswith(tuple("0123456789")) and "%" in line]
    speeds = [int(words[-1].replace(",", "")) for words in ranked if words[-2].endswith("%")]
    assert len(speeds) >= 3 and speeds == sorted(speeds, reverse=True)
    (flags,) = [line for line in out.splitlines() if line.startswith("  --")]
    arguments = parse_finetune(f"--model_path m --data_path d --output_dir o {flags}".split())
    sizes = arguments.parallel.tensor_parallel_size * arguments.parallel.pipeline_parallel_size
    assert 4 % sizes == 0
    rows = arguments.train.per_device_train_batch_size * arguments.train.gradient_accumulation_steps
    assert rows * (4 // sizes) == 16


def test_it_draws_the_step(capsys, model, tmp_path):
    words = "--gpus 4 --tensor_parallel_size 1 --pipeline_parallel_size 4 --schedule 1f1b --recompute full".split()
    words += "--per_device_train_batch_size 1 --gradient_accumulation_steps 6".split()
    file = tmp_path / "schedule.svg"
    status, out, _ = run(capsys, "--model_path", model, *words, "--draw", str(file))
    assert status == 0 and str(file) in out and "stage" in out
    titles = [title.text for title in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 * 4 * 6 and any(text.startswith("recompute") for text in titles)


def test_what_does_not_fit_is_named(capsys, model):
    status, _, err = run(capsys, "--model_path", model, "--gpus", "1", "--memory", "0.2", "--reserve", "0.1")
    assert status == 2
    for part in ("no layout fits", "0.2 GiB", "weights", "activations", "stage 0", "give more gpus"):
        assert part in err


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--gpus 2 --memory 3", ["reserve (4 GiB)", "memory (3 GiB)"]),
        ("--gpus 6 --tensor_parallel_size 4", ["tensor_parallel_size (4)", "gpus (6)"]),
        ("--gpus 2 --schedule 2f2b", ["--schedule", "interleaved_1f1b"]),
        ("--gpus 2 --tensor_parallel_size 2 --seq_length 63 --sequence_parallel true --per_device_train_batch_size 1 "
         "--gradient_accumulation_steps 8", ["the rows of a step", "2 tensor-parallel ranks"]),
        ("--gpus 2 --base_format nf4_fp8 --device a100", ["nf4_fp8", "device a100", "choose nf4"]),
        ("--gpus 2 --base_format nf4_fp8 --dtype float16", ["nf4_fp8", "dtype is float16"]),
        ("--gpus 2 --learning_rate 1", ["learning_rate", "megalora finetune"]),
        ("--gpus 2 --partition_method custom", ["custom_partition"]),
        ("--gpus 2 --draw /nowhere/at/all.svg", ["/nowhere/at/all.svg", "cannot be written"]),
        ("", ["--gpus must be given"]),
        ("--gpus 2 --longest true --seq_length 4096", ["seq_length has no effect with longest"]),
        ("--gpus 2 --longest true --global_batch_size 4", ["global_batch_size has no effect with longest"]),
        ("--gpus 2 --longest true --memory 0.2 --reserve 0.1", ["no layout fits", "0.2 GiB"]),
    ],
)
def test_errors_say_what_and_where(capsys, model, words, parts):
    status, _, err = run(capsys, "--model_path", model, *words.split())
    assert status == 2 and all(part in user_error(err) for part in parts), err


def test_any_number_of_gpus_may_hold_replicas(capsys, model):
    status, out, _ = run(capsys, "--model_path", model, "--gpus", "3", "--tensor_parallel_size", "1")
    assert status == 0 and re.search(r"^ *1 +1 +3 ", out, re.MULTILINE), out


def test_tokens_that_tensor_parallel_does_not_divide_are_not_split(capsys, model):
    words = "--gpus 2 --tensor_parallel_size 2 --per_device_train_batch_size 1 --gradient_accumulation_steps 8"
    for length, flag in ((63, True), (64, False)):
        status, out, _ = run(capsys, "--model_path", model, *words.split(), "--seq_length", str(length))
        assert status == 0 and ("--sequence_parallel false" in out) == flag


def test_help_and_values(capsys):
    assert main(["plan", "--help"]) == 0 and "--gpus_per_node N" in capsys.readouterr().out
    arguments = parse_plan(["--model_path", "m", "--gpus", "8", "--sequence_parallel", "false", "--memory", "40"])
    assert (arguments.sequence_parallel, arguments.memory, arguments.recompute) == (False, 40.0, None)
    with pytest.raises(UserError, match="pipeline_parallel_size"):
        parse_plan("--model_path m --gpus 8 --partition_method custom --custom_partition 4 4".split())


def test_it_says_where_rows_are_longer_than_the_model_is_made_for(capsys, model):
    status, out, _ = run(capsys, "--model_path", model, "--gpus", "2", "--seq_length", "8192")
    assert status == 0 and "seq_length (8192) is more than the 4096 tokens that the model is made for" in out


def test_the_longest_rows_come_with_their_flags(capsys, model):
    words = "--gpus 2 --longest true --memory 4.5 --recompute full".split()
    status, out, _ = run(capsys, "--model_path", model, *words)
    assert status == 0 and "one row in each microbatch" in out and "longest row" in out
    (flags,) = [line for line in out.splitlines() if line.startswith("  --")]
    arguments = parse_finetune(f"--model_path m --data_path d --output_dir o {flags}".split())
    first = next(line.split() for line in out.splitlines() if re.match(r"^ *\d.* s ", line))
    assert f"{arguments.data.seq_length:,}" in first and arguments.train.per_device_train_batch_size == 1
    assert "is more than the 4096 tokens that the model is made for" in out
