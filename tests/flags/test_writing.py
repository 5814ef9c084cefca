"""run.yaml gives the arguments that it was made from."""

import dataclasses
import shlex

import pytest

from megalora.flags import parse_finetune
from megalora.flags.writing import run_yaml


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--bf16 true --lr_scheduler_type polynomial --min_lr_rate 0.1 --max_steps 5 --save false",
        "--columns 'output=my reply' instruction=ask --chat_template_kwargs '{\"enable_thinking\": false}'",
        "--pipeline_parallel_size 2 --partition_method custom --custom_partition 3 4 --nproc 2 --learning_rate 1e-5",
        "--data_path 'a b.json:2,c.json' --seed 0 --num_train_epochs 1.1 --template 'no: \"1\"'",
    ],
)
def test_run_yaml_gives_the_same_arguments(tmp_path, more):
    words = shlex.split(f"--model_path m --output_dir 'ö: #1' {more}")
    if "--data_path" not in words:
        words += ["--data_path", "d.json"]
    arguments = parse_finetune(words)
    file = tmp_path / "run.yaml"
    file.write_text(run_yaml(arguments, "/somewhere", "1.0"), encoding="utf-8")
    assert dataclasses.asdict(parse_finetune([str(file)])) == dataclasses.asdict(arguments)
