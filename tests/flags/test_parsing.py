"""Flags, YAML and their errors: what is accepted, where it goes, and what each mistake says."""

import dataclasses
import os
import re
import shlex
from pathlib import Path

import pytest
from fuzz import examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from snapshots import assert_snapshot

from megalora.errors import UserError
from megalora.flags import (
    FINETUNE_SECTIONS,
    GENERATE_SECTIONS,
    CompatibilityArguments,
    DataArguments,
    ModelArguments,
    ParallelArguments,
    TrainArguments,
    parse_convert,
    parse_doctor,
    parse_finetune,
    parse_generate,
    parse_plan,
    split_convert,
    validate_world,
)
from megalora.flags.flag import flags_of

REFERENCE = """--output_dir ./output/medi --per_device_train_batch_size 1 --gradient_accumulation_steps 1
--wall_clock_breakdown True --logging_steps 1 --partition_method 'uniform_floor' --num_train_epochs 100
--no_tie_modules true --input_names 'input_ids' 'attention_mask' --split_method 'layer_split' --fp16 false
--save true --save_steps 10 --seq_length 2048 --lora_config './lora_config.json' --model_path DIR
--resume_from_checkpoint DIR --resume_peft_from_checkpoint './lora_checkpoint'"""

BASE = "--model_path m --data_path d.json --output_dir o"


def finetune(text: str):
    return parse_finetune(shlex.split(text))


def generate(text: str):
    return parse_generate(shlex.split(text))


def tune(more: str):
    return finetune(f"{BASE} {more}")


def message(parse, text: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reference_launch():
    arguments = finetune(REFERENCE + " --data_path rows.json")
    assert arguments.model == ModelArguments(
        model_path="DIR",
        resume_from_checkpoint="DIR",
        resume_peft_from_checkpoint="./lora_checkpoint",
        lora_config="./lora_config.json",
        dtype="auto",
    )
    assert arguments.parallel == ParallelArguments(partition_method="uniform_floor")
    assert arguments.data == DataArguments("rows.json", seq_length=2048)
    assert arguments.train == TrainArguments(
        "./output/medi", num_train_epochs=100.0, wall_clock_breakdown=True, save_steps=10
    )


def test_reference_launch_says_what_it_lacks():
    assert message(finetune, REFERENCE).startswith("--data_path must be given")


def test_reference_generation():
    arguments = generate(REFERENCE + " --return_logits true --text_generation true")
    assert arguments.model.resume_peft_from_checkpoint == "./lora_checkpoint"
    assert arguments.generation.seq_length == 2048
    assert set(arguments.not_applied) == {
        "output_dir",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "wall_clock_breakdown",
        "logging_steps",
        "num_train_epochs",
        "save",
        "save_steps",
        "lora_config",
    }


# One value for each flag that differs from the default, and what it must become.
SAMPLES = {bool: ("true", True), int: ("3", 3), float: ("0.5", 0.5), str: ("some text", "some text")}
NEEDS = {  # flags that have an effect only with others
    "custom_partition": "--partition_method custom",
    "sequence_parallel": "--tensor_parallel_size 2",
    "virtual_pipeline_size": "--schedule interleaved_1f1b --pipeline_parallel_size 2",
    "recompute_layers": "--recompute full",
    "eval_steps": "--eval_data_path e.json",
    "eval_generate": "--eval_data_path e.json",
    "early_stopping_patience": "--eval_data_path e.json --eval_steps 2",
    "sample_max_new_tokens": "--sample_prompts p.txt",
    "logging_first_step": "--logging_steps 2",
    "keep_best": "--eval_data_path e.json --eval_steps 2",
    "min_lr_rate": "--lr_scheduler_type cosine_with_min_lr",
    "lr_decay_ratio": "--lr_scheduler_type warmup_stable_decay",
    "lr_power": "--lr_scheduler_type polynomial",
    "warmup_steps": "--max_steps 9",
    "profile_steps": "--profile true",
    "profile_file": "--partition_method cost",
    "top_k": "--temperature 0.7",
    "top_p": "--temperature 0.7",
    "min_p": "--temperature 0.7",
    "logits_dir": "--return_logits true",
    "compare_base": "--resume_peft_from_checkpoint a",
    "output_file": "--prompt hello",
    "disable_adapter": "--resume_peft_from_checkpoint a",
}


def sample(flag):
    text, value = SAMPLES[flag.type]
    if flag.type is bool and flag.default is True:
        text, value = "false", False
    limits = flag.definition
    if limits.choices:
        text = value = next(one for one in limits.choices if one not in (flag.default, "custom"))
    if flag.name == "chat_template_kwargs":
        text = value = '{"enable_thinking": false}'
    if flag.name == "columns":
        text = value = "output=some text"
    if flag.name == "push_to_hub":
        text = value = "some/text"
    if (limits.at_least or 0) > 1:
        text, value = str(limits.at_least), limits.at_least
    return (text, (value,)) if flag.many else (text, value)


@pytest.mark.parametrize(
    ("command", "section", "flag"),
    [
        pytest.param(command, section, flag, id=f"{command.__name__}-{flag.name}")
        for command, sections in ((finetune, FINETUNE_SECTIONS), (generate, GENERATE_SECTIONS))
        for section in sections
        if section is not CompatibilityArguments
        for flag in flags_of(section)
    ],
)
def test_every_flag_reaches_its_field(command, section, flag):
    text, value = sample(flag)
    needs = f"{BASE if command is finetune else '--model_path m'} {NEEDS.get(flag.name, '')}"
    needs = re.sub(rf"--{flag.name} \S+", "", needs)
    arguments = command(f"{needs} --{flag.name} '{text}'")
    if command is generate and flag.definition.training_only:
        assert arguments.not_applied[-1:] == (flag.name,), "besides what it needs"
        return
    parts = [getattr(arguments, one.name) for one in dataclasses.fields(arguments)]
    (part,) = (one for one in parts if type(one) is section)
    assert getattr(part, flag.name) == value != flag.default


def test_a_warmup_ratio_of_zero_is_no_warmup_ratio():
    """As the HF Trainer, whose default it is: recipes made from its configs name both."""
    train = finetune(BASE + " --warmup_ratio 0 --warmup_steps 3 --max_steps 9").train
    assert train.warmup(9) == 3


@pytest.mark.parametrize("name", [flag.name for flag in flags_of(CompatibilityArguments)])
def test_every_compatibility_flag_is_covered(name):
    covered = {
        "fp16",
        "bf16",
        "split_method",
        "input_names",
        "no_tie_modules",
        "return_logits",
        "text_generation",
    }
    assert name in covered


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("", "auto"),
        ("--fp16 true", "float16"),
        ("--fp16", "float16"),
        ("--bf16 1", "bfloat16"),
        ("--fp16 no --bf16 yes", "bfloat16"),
        ("--fp16 false", "auto"),
        ("--bf16 false", "float32"),
        ("--fp16 false --dtype float64", "float64"),
        ("--fp16 true --dtype float16", "float16"),
    ],
)
def test_dtype(flags, dtype):
    assert tune(flags).model.dtype == dtype


@pytest.mark.parametrize(
    "flags",
    [
        "--fp16 true --bf16 true",
        "--fp16 true --dtype bfloat16",
        "--fp16 true --dtype auto",
        "--fp16 false --dtype float16",
        "--bf16 false --dtype bfloat16",
    ],
)
def test_contradicting_dtypes(flags):
    assert "leave out one" in message(tune, flags) or "give one" in message(tune, flags)


MISTAKES = [
    ("--split_method nearest", ["split_method nearest", "layer_split", "partition_method"]),
    ("--input_names attention_mask", ["lacks input_ids"]),
    ("--input_names input_ids pixels", ["--input_names", "pixels", "position_ids"]),
    ("--no_tie_modules false", ["no_tie_modules false", "frozen"]),
    ("--return_logits true", ["--return_logits", "megalora generate"]),
    ("--text_generation", ["--text_generation", "megalora generate"]),
    ("--temperature 1", ["--temperature", "megalora generate"]),
    ("--learning_rat 1", ["unknown flag --learning_rat", "learning_rate"]),
    ("--tensor 2", ["unknown flag --tensor"]),
    ("--xyzzy", ["unknown flag --xyzzy", "--help lists all"]),
    ("-seed 1", ["unknown flag -seed", "did you mean --seed?"]),
    ("--seed 1 2", ["unexpected argument '2'"]),
    ("--seed", ["--seed has no value", "whole number"]),
    ("--template --seed 1", ["--template has no value", "--template=VALUE"]),
    ("--seed 1 --seed 2", ["--seed is given twice, as 1 and as 2"]),
    ("--seed 1.5", ["--seed '1.5'", "whole number"]),
    ("--seed -1", ["--seed -1", "at least 0"]),
    ("--packing maybe", ["--packing 'maybe'", "true or false"]),
    ("--learning_rate fast", ["--learning_rate 'fast'", "number"]),
    ("--learning_rate nan", ["--learning_rate 'nan'", "number"]),
    ("--learning_rate 1e999", ["--learning_rate inf", "finite"]),
    ("--adam_beta1 1", ["--adam_beta1 1.0", "below 1"]),
    ("--tensor_parallel_size 0", ["--tensor_parallel_size 0", "at least 1"]),
    ("--schedule zigzag", ["--schedule zigzag", "gpipe, 1f1b"]),
    ("--lora_config ''", ["--lora_config ''", "is empty"]),
    ("--schedule interleaved_1f1b", ["interleaved_1f1b needs", "virtual_pipeline_size (it is 1)"]),
    ("--schedule pre_recompute_1f1b --recompute full", ["recompute full", "three times"]),
    ("--partition_method custom", ["needs custom_partition", "--custom_partition 8"]),
    ("--partition_method custom --custom_partition 4 4", ["4 4 names 2 stages", "is 1"]),
    ("--warmup_steps 10 --max_steps 10", ["warmup_steps (10)", "steps of the run (10)"]),
    ("--config a.yaml --config b.yaml", ["--config takes one"]),
    ("--config nowhere.yaml", ["nowhere.yaml: cannot be read"]),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_mistakes(flags, words):
    said = message(tune, flags)
    assert all(word in said for word in words), said


IDLE = [
    (tune, "--save_steps 5 --save false", "--save_steps 5", "save false"),
    (tune, "--save_total_limit 5 --save false", "--save_total_limit 5", "save false"),
    (tune, "--eval_steps 5", "--eval_steps 5", "without eval_data_path"),
    (tune, "--sequence_parallel", "--sequence_parallel true", "tensor_parallel_size 1"),
    (tune, "--virtual_pipeline_size 2", "--virtual_pipeline_size 2", "schedule 1f1b"),
    (tune, "--custom_partition 4", "--custom_partition 4", "partition_method cost"),
    (generate, "--model_path m --top_p 0.9 --temperature 0", "--top_p 0.9", "temperature 0.0"),
    (generate, "--model_path m --top_k 9 --temperature 0", "--top_k 9", "temperature 0.0"),
    (generate, "--model_path m --output_file f", "--output_file f", "without prompt"),
    (
        generate,
        "--model_path m --disable_adapter",
        "--disable_adapter true",
        "resume_peft_from_checkpoint",
    ),
]


@pytest.mark.parametrize(("parse", "flags", "name", "because"), IDLE)
def test_a_flag_without_effect_is_an_error(parse, flags, name, because):
    said = message(parse, flags)
    assert said.startswith(f"{name} has no effect") and because in said


def test_defaults_and_off_states_are_no_error():
    assert tune("--save false").train.save_steps == 500
    assert tune("--sequence_parallel false").parallel.sequence_parallel is False
    assert tune("--return_logits false --text_generation false").parallel.sequence_parallel is None


@pytest.mark.parametrize(
    "flags, tokens, splits",
    [
        ("", 64, False),
        ("--tensor_parallel_size 4", 64, True),
        ("--tensor_parallel_size 4", 66, False),
        ("--tensor_parallel_size 4 --sequence_parallel false", 64, False),
        ("--tensor_parallel_size 4 --sequence_parallel", 66, True),  # refused where the run begins
    ],
)
def test_tensor_parallel_splits_activations_where_nothing_else_is_said(flags, tokens, splits):
    assert tune(flags).parallel.for_tokens(tokens).sequence_parallel is splits


def test_values_from_python_are_checked_too():
    with pytest.raises(UserError, match="tensor_parallel_size 0 is out of range: give a whole number of at least 1"):
        ParallelArguments(tensor_parallel_size=0)
    with pytest.raises(UserError, match="sequence_parallel true has no effect"):
        ParallelArguments(sequence_parallel=True)
    with pytest.raises(UserError, match="custom_partition"):
        ParallelArguments(partition_method="custom", custom_partition=())
    with pytest.raises(UserError, match="max_steps"):
        TrainArguments("o", max_steps=True)


def test_spellings():
    for flags in ("--output-dir o", "--output_dir=o", "--output-dir=o"):
        assert finetune(f"--model_path m --data_path d {flags}").train.output_dir == "o"
    assert tune("--template=--odd").data.template == "--odd"
    custom = "--partition_method custom --pipeline_parallel_size 3 --custom_partition"
    assert tune(f"{custom} 4,5 6").parallel.custom_partition == (4, 5, 6)
    assert tune("--packing --seed 1").data.packing is True


def test_all_missing_flags_are_named():
    said = message(finetune, "")
    assert all(f"--{name}" in said for name in ("model_path", "data_path", "output_dir"))
    assert "--model_path must be given" in message(generate, "")
    with pytest.raises(UserError) as caught:
        parse_convert("adapter combine", ["--input", "a", "--output", "b"])
    assert "others is the other adapters" in str(caught.value)


def test_generation():
    arguments = generate("--model_path m --prompt hi --system '' --temperature 0.7 --top_p 0.9 --seed 1")
    assert arguments.generation.system == "" and arguments.not_applied == ()
    assert generate("--model_path m --temperature 0 --seed 1").not_applied == ("seed",)  # greedy draws nothing
    assert "prompts_file" in message(generate, "--model_path m --prompt a --prompts_file b")
    assert "false is not supported" in message(generate, "--model_path m --text_generation false")
    assert generate("--model_path m").generation.stop is None
    assert generate("--model_path m --stop '\n' 'a, b' --seed 3").generation.stop == ("\n", "a, b")
    assert "--stop '' is empty" in message(generate, "--model_path m --stop ''")
    words = "--model_path m --resume_peft_from_checkpoint a --compare_base true --disable_adapter true"
    assert "give one of them" in message(generate, words)
    assert "--save_steps 0" in message(generate, "--model_path m --save_steps 0")  # still checked


@pytest.mark.parametrize(
    ("more", "per_epoch", "steps"),
    [
        ("", 10, 30),
        ("--num_train_epochs 2", 10, 20),
        ("--num_train_epochs 0.25", 10, 3),
        ("--num_train_epochs 1.1", 100, 110),
        ("--num_train_epochs 2.2", 50, 110),
        ("--max_steps 50", 10, 50),
        ("--max_steps 5 --num_train_epochs 100", 10, 5),
        ("--max_steps 500 --num_train_epochs 2", 10, 20),
    ],
)
def test_total_steps(more, per_epoch, steps):
    assert tune(more).train.total_steps(per_epoch) == steps


def test_a_run_that_ends_inside_its_warmup():
    with pytest.raises(UserError, match=r"warmup_steps \(30\)"):
        tune("--warmup_steps 30").train.total_steps(10)


# ------------------------------------------------------------------------------------------------------ YAML


@pytest.fixture
def yaml(tmp_path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


GOOD = "model_path: m\ndata_path: d\noutput_dir: o\n"


def test_yaml_stands_for_flags(yaml):
    text = GOOD + "learning_rate: 2e-4\nseed: 7\npacking: no\ninput_names: [input_ids, labels]\neval_steps: null\n"
    text += "partition_method: custom\npipeline_parallel_size: 2\ncustom_partition: [3, 4]\nmax_grad_norm: 2\n"
    for words in ([yaml(text)], ["--config", yaml(text, "run.yml")], [f"--config={yaml(text)}"]):
        arguments = parse_finetune(words)
        assert arguments.train.learning_rate == 2e-4 and arguments.train.seed == 7
        assert arguments.train.max_grad_norm == 2.0 and isinstance(arguments.train.max_grad_norm, float)
        assert arguments.data.packing is False
        assert arguments.parallel.custom_partition == (3, 4)


def test_flags_go_before_the_file(yaml):
    path = yaml(GOOD + "seed: 7\nsave_steps: 9\nfp16: true\nsequence_parallel: true\ntensor_parallel_size: 2\n")
    arguments = parse_finetune([path, "--seed", "8", "--dtype", "float32"])
    assert arguments.train.seed == 8 and arguments.model.dtype == "float32"
    # A flag may switch off what depends on it in the file.
    arguments = parse_finetune([path, "--save", "false", "--tensor_parallel_size", "1"])
    assert not arguments.train.save and not arguments.parallel.sequence_parallel


YAML_MISTAKES = [
    ("learnin_rate: 1\n", ["unknown key learnin_rate", "learning_rate"]),
    ("config: other.yaml\n", ["config is not allowed"]),
    ("1: 2\n", ["unknown key 1"]),
    ("seed: 1\nseed: 2\n", ["run.yaml: seed", "twice"]),
    ("seed: true\n", ["run.yaml: seed", "true is not a whole number"]),
    ("seed: 1.5\n", ["run.yaml: seed", "1.5 is not a whole number"]),
    ("seed: [1]\n", ["run.yaml: seed", "not a whole number"]),
    ("seed: ten\n", ["run.yaml: seed", "'ten'", "whole number"]),
    ("seed: -1\n", ["run.yaml: seed", "at least 0"]),
    ("seed:\n", ["run.yaml: seed", "no value"]),
    ("packing: 2\n", ["run.yaml: packing", "2 is not true or false"]),
    ("learning_rate: .nan\n", ["run.yaml: learning_rate", "not a number"]),
    ("template: 12\n", ["run.yaml: template", "12 is not text: give text, in quotes"]),
    ("template: {a: b}\n", ["run.yaml: template", "not text"]),
    ("template: 2024-13-45\n", ["not valid YAML"]),
    ("save_steps: 4\nsave: false\n", ["run.yaml: save_steps", "has no effect with save false"]),
    ("temperature: 1\n", ["temperature", "megalora generate"]),
    ("a: b: c\n", ["line 4", "not valid YAML"]),
    ("a: [1\n", ["not valid YAML"]),
    ("<<: {seed: 1}\n", ["not valid YAML"]),
]


@pytest.mark.parametrize(("text", "words"), YAML_MISTAKES)
def test_yaml_mistakes(yaml, text, words):
    path = yaml(GOOD + text)
    with pytest.raises(UserError) as caught:
        parse_finetune([path])
    said = str(caught.value)
    assert path in said and "\n" not in said and all(word in said for word in words), said


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "text",
    ["[" * 50_000, "a: " * 50_000, "{a: " * 20_000, LAUGHS, "a: &a [*a]\n", "a: b\n" * 40_000,
     "[1]: 2\n", "? {a: 1}\n: 2\n", "seed: 2001-02-30\n", f"seed: {'1' * 5000}\n", "seed: 0b\n", "<<: 1\n",
     "seed: !!python/object/apply:os.system [ls]\n", "seed: !!int x\n", "seed: !!binary é\n", "a: \x00\n"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_yaml_of_a_stranger(yaml, text):
    with pytest.raises(UserError, match="run.yaml") as caught:
        parse_finetune([yaml(GOOD + text if text[0] not in "[{?" else text)])
    assert len(str(caught.value)) < 1000


@examples(60)
@given(text=st.text(alphabet="ab0123456789:&*[]{}!?|>-<, \n'\"#%@~.", max_size=40))
def test_any_yaml(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(GOOD + text)
    ours_only(lambda: parse_finetune([str(file)]))


def test_yaml_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    for path in (tmp_path / "run.yaml", tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            parse_finetune(["--config", str(path)])


def test_yaml_that_is_not_a_mapping(yaml):
    for text, words in (("- a\n- b\n", "holds no flags"), (b"\xff\xfe\x00", "UTF-8"), ("{", "not valid YAML")):
        with pytest.raises(UserError, match=words):
            parse_finetune([yaml(text)])
    with pytest.raises(UserError, match="must be given"):
        parse_finetune([yaml("# nothing\n")])


# ------------------------------------------------------------------------------------------------ properties


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_whole_numbers(number):
    assert tune(f"--seed {number}").train.seed == number


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_numbers(number):
    assert tune(f"--weight_decay {number!r}").train.weight_decay == number


@given(st.sampled_from(["true", "false", "1", "0", "yes", "no"]), st.lists(st.booleans(), min_size=5, max_size=5))
def test_booleans_in_any_case(word, upper):
    spelled = "".join(c.upper() if up else c for c, up in zip(word, upper + [False], strict=False))
    assert tune(f"--packing {spelled}").data.packing == (word in ("true", "1", "yes"))


@given(st.lists(st.text(max_size=12), max_size=6))
def test_anything_is_sections_or_one_line(words):
    try:
        parse_finetune([*shlex.split(BASE), *words])
    except UserError as error:
        assert "\n" not in str(error) and str(error)


@given(
    st.sampled_from([flag for section in FINETUNE_SECTIONS for flag in flags_of(section)]),
    st.text(max_size=8),
)
def test_any_value_is_taken_or_one_line(flag, text):
    try:
        parse_finetune([f"--{flag.name}={text}"])
    except UserError as error:
        assert "\n" not in str(error) and str(error)


# ----------------------------------------------------------------------------------------- world, help, table


def test_world():
    parallel = ParallelArguments(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert validate_world(parallel, 8) == 2
    with pytest.raises(UserError) as caught:
        validate_world(parallel, 6)
    assert str(caught.value).startswith(
        "World size (6) is not a multiple of tensor_parallel_size (2) * pipeline_parallel_size (2) = 4: "
        "start 4 or 8 processes, or"
    )
    with pytest.raises(UserError, match="start 4 processes"):
        validate_world(parallel, 1)


# ------------------------------------------------------------------------------------------------------- Python


def test_python_names_are_flags():
    values = {"model_path": Path("m"), "data_path": "d.json", "output_dir": "o", "learning_rate": 1, "seed": 3}
    more = {"partition_method": "custom", "pipeline_parallel_size": 2, "custom_partition": [3, 5], "eval_steps": None}
    arguments = parse_finetune(values | more)
    said = "--learning_rate 1 --seed 3 --partition_method custom --pipeline_parallel_size 2 --custom_partition 3 5"
    assert arguments == finetune(f"--model_path m --data_path d.json --output_dir o {said}")


def test_python_may_name_a_file_of_more(yaml):
    arguments = parse_finetune({"config": yaml(GOOD + "seed: 7\nsave_steps: 9\n"), "seed": 8, "save": False})
    assert arguments.train.seed == 8 and arguments.data.data_path == "d"


KEYWORD_MISTAKES = [
    {"learning_rat": 1},
    {"prompt": "Hi"},
    {"seed": "7"},
    {"seed": True},
    {"seed": None},
    {"seed": 1.0},
    {"packing": 1},
    {"dtype": "float8"},
    {"template": 3},
    {"custom_partition": "4 4"},
    {"learning_rate": float("nan")},
    {"eval_steps": 5},
    {"output_dir": ""},
    {"config": "nowhere.yaml"},
]


@pytest.mark.parametrize("values", KEYWORD_MISTAKES, ids=str)
def test_python_values_are_checked(values):
    with pytest.raises(UserError) as caught:
        parse_finetune({"model_path": "m", "data_path": "d", "output_dir": "o", **values})
    (name,) = values
    assert name in str(caught.value) and "--" not in str(caught.value).replace("--help", "")


# ----------------------------------------------------------------------------------------------------- wording


OTHERS = [
    (generate, "--prompt Hi"),
    (generate, "--model_path m --text_generation false"),
    (generate, "--model_path m --prompt a --prompts_file b"),
    (generate, "--model_path m --resume_peft_from_checkpoint a --compare_base --disable_adapter"),
    (parse_plan, "--model_path m"),
    (parse_plan, "--model_path m --gpus 0"),
    (parse_plan, "--model_path m --gpus 2 --learning_rate 1"),
    (parse_plan, "--model_path m --gpus 2 --partition_method custom"),
    (parse_plan, "--model_path m --gpus 2 --partition_method custom --custom_partition 4"),
    (parse_doctor, "--free_space -1"),
    (split_convert, ""),
    (split_convert, "hf-to-shards"),
    (split_convert, "adapter to-hf"),
    (parse_convert, "to-hf --input a --output b --base c"),
    (parse_convert, "to-hf --input a"),
    (parse_convert, "reshard --input a --output b --custom_partition 4"),
]


def printed(what: str, parse, *arguments) -> str:
    """A mistake and the lines that it is told in."""
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    hint = f"\nhint: {caught.value.hint}" if caught.value.hint else ""
    return f"$ {what}\nerror: {caught.value.message}{hint}\n"


COMMAND = {
    tune: "finetune ...",
    generate: "generate",
    parse_plan: "plan",
    parse_doctor: "doctor",
    split_convert: "convert",
    parse_convert: "convert",
}


def test_wording_of_mistakes():
    told = [printed(f"megalora finetune ... {flags}", tune, flags) for flags, _ in MISTAKES]
    told.append(printed("megalora finetune", finetune, ""))
    told += [printed(f"megalora {COMMAND[parse]} {flags}", parse, flags) for parse, flags, _, _ in IDLE]
    for parse, flags in OTHERS:
        words = shlex.split(flags)
        arguments = (flags,) if parse is generate else (words[0], words[1:]) if parse is parse_convert else (words,)
        told.append(printed(f"megalora {COMMAND[parse]} {flags}".strip(), parse, *arguments))
    world = ParallelArguments(tensor_parallel_size=2, pipeline_parallel_size=2)
    told.append(printed("torchrun --nproc_per_node 6", validate_world, world, 6))
    assert_snapshot("mistakes", "\n".join(told))


def test_wording_of_mistakes_in_yaml(yaml, tmp_path):
    told = [printed(f"cat run.yaml: {text!r}", parse_finetune, [yaml(GOOD + text)]) for text, _ in YAML_MISTAKES]
    for text in ("- a\n- b\n", "{", b"\xff\xfe\x00"):
        told.append(printed(f"cat run.yaml: {text!r}", parse_finetune, [yaml(text)]))
    assert_snapshot("mistakes_yaml", "\n".join(told).replace(f"{tmp_path}/", ""))


def test_wording_of_mistakes_in_python():
    good = {"model_path": "m", "data_path": "d", "output_dir": "o"}
    told = [
        printed(f"megalora.finetune(..., **{values})", parse_finetune, good | values) for values in KEYWORD_MISTAKES
    ]
    assert_snapshot("mistakes_python", "\n".join(told))
