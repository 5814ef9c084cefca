"""Several GPUs of one host through NCCL: the same run on every layout, and a rank that is killed."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny import column, exported, largest_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason="multi-GPU test: fewer than 2 CUDA devices here; nothing over NCCL is run"
    ),
]

ROWS = 4
# bfloat16: sums round to 2^-8 of their value, in another order on each layout; a high rate makes much of it.
RATES = {"float32": 5e-3, "bfloat16": 1e-3}
TP2, PP2, SP = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"sequence_parallel": True}
LAYOUTS = {  # name: (data-parallel size, flags)
    "tp2": (1, TP2 | {"sequence_parallel": False}),
    "tp2, sequence parallel": (1, TP2 | SP),
    "tp2, sequence parallel, by NCCL": (1, TP2 | SP | {"tp_comm_overlap": False}),
    "tp2, sequence parallel, recompute": (1, TP2 | SP | {"recompute": "full"}),
    "pp2": (1, PP2),
    "dp2": (2, {}),
    "pp2, interleaved": (1, PP2 | {"schedule": "interleaved_1f1b", "virtual_pipeline_size": 2}),
    "pp2, eager": (1, PP2 | {"schedule": "eager_1f1b"}),
    "tp2 pp2": (1, TP2 | PP2),
    "tp2 pp2 dp2, sequence parallel": (2, TP2 | PP2 | SP),
}
CP2, TP4 = {"context_parallel_size": 2}, {"tensor_parallel_size": 4}
WIDE = {  # on four GPUs and more, of a model with eight heads: (data-parallel size, flags)
    "cp2": (1, CP2),
    "tp4, sequence parallel": (1, TP4 | SP),
    "pp4": (1, {"pipeline_parallel_size": 4}),
    "cp4": (1, {"context_parallel_size": 4}),
    "tp2 cp2, sequence parallel": (1, TP2 | CP2 | SP),
    "tp8": (1, {"tensor_parallel_size": 8, "sequence_parallel": False}),
    "tp8, sequence parallel": (1, {"tensor_parallel_size": 8} | SP),
    "tp4 dp2, sequence parallel": (2, TP4 | SP),
    "tp2 pp2 cp2, sequence parallel": (1, TP2 | PP2 | CP2 | SP),
}
HEADS = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 4}
MODELS = {
    "dense": HEADS | {"intermediate_size": 256},
    "experts": HEADS
    | {"model_type": "qwen3_moe", "intermediate_size": 256, "moe_intermediate_size": 64}
    | {"num_experts": 16, "num_experts_per_tok": 2, "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    # Heads of 16: the sizes that the kernels take.
    folder = tmp_path_factory.mktemp("inputs")
    made = tiny.make_inputs(folder)
    tiny.save_model(folder / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    return made


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request, inputs, tmp_path_factory):
    """(the dtype, the folder of the run on one GPU)."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    flags = {"dtype": request.param, "learning_rate": RATES[request.param]}
    _run(1, inputs.flags(folder, gradient_accumulation_steps=ROWS, **flags))
    return request.param, folder


def _start(processes: int, flags: list[str]) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {"NCCL_NVLS_ENABLE": "0"} | dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.Popen(
        [*launcher, str(tiny.ROOT / "tools/finetune.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def _run(processes: int, flags: list[str]) -> str:
    """What the run has printed."""
    process = _start(processes, [*flags, "--hang_timeout", "30"])  # a hang says where its ranks stand
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"not done in two minutes:\n{output}")
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_logs_the_same(inputs, alone, tmp_path, name):
    dtype, reference = alone
    dp, layout = LAYOUTS[name]
    processes = dp * layout.get("tensor_parallel_size", 1) * layout.get("pipeline_parallel_size", 1)
    if processes > torch.cuda.device_count():
        pytest.skip(f"{processes} GPUs are needed, {torch.cuda.device_count()} are here")
    flags = layout | {"gradient_accumulation_steps": ROWS // dp, "dtype": dtype, "learning_rate": RATES[dtype]}
    _run(processes, inputs.flags(tmp_path / "run", **flags))
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    assert column(tmp_path / "run", "loss") == pytest.approx(column(reference, "loss"), abs=tolerance)
    if dtype == "float32":
        assert largest_difference(exported(tmp_path / "run"), exported(reference)) < 1e-3


@pytest.fixture(scope="module", params=MODELS)
def wide(request, tmp_path_factory):
    """(inputs of a model that eight ranks can share, the folder of its run on one GPU)."""
    folder = tmp_path_factory.mktemp("wide")
    made = tiny.make_inputs(folder)
    tiny.save_model(folder / "model", **MODELS[request.param])
    _run(1, made.flags(folder / "run", gradient_accumulation_steps=ROWS, dtype="float32", learning_rate=1e-3))
    return made, folder / "run"


@pytest.mark.parametrize("name", WIDE)
def test_more_gpus_log_the_same(wide, tmp_path, name):
    (inputs, reference), (dp, layout) = wide, WIDE[name]
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
    processes = dp * math.prod(layout.get(size, 1) for size in sizes)
    if processes > torch.cuda.device_count():
        pytest.skip(f"{processes} GPUs are needed, {torch.cuda.device_count()} are here")
    flags = layout | {"gradient_accumulation_steps": ROWS // dp, "dtype": "float32", "learning_rate": 1e-3}
    _run(processes, inputs.flags(tmp_path / "run", **flags))
    assert column(tmp_path / "run", "loss") == pytest.approx(column(reference, "loss"), abs=1e-4)
    assert largest_difference(exported(tmp_path / "run"), exported(reference)) < 1e-3


def test_a_stage_with_nothing_to_train(inputs, tmp_path):
    lora = tiny.write_json(tmp_path / "lora.json", tiny.LORA | {"layers_to_transform": [3]})
    flags = {"gradient_accumulation_steps": ROWS, "lora_config": lora, "dtype": "float32", "learning_rate": 5e-3}
    _run(1, inputs.flags(tmp_path / "alone", **flags))
    assert "no backward" in _run(2, inputs.flags(tmp_path / "run", **flags, **PP2, partition_method="uniform"))
    assert column(tmp_path / "run", "loss") == pytest.approx(column(tmp_path / "alone", "loss"), abs=1e-4)
    assert largest_difference(exported(tmp_path / "run"), exported(tmp_path / "alone")) < 1e-3


def test_graphs_change_no_bit_where_tokens_travel_beside_products(inputs, tmp_path):
    flags = TP2 | SP | {"deterministic": True, "dtype": "bfloat16", "tp_comm_overlap": True}
    for graphs in (True, False):
        folder = tmp_path / f"graphs {graphs}"
        said = _run(2, inputs.flags(folder, gradient_accumulation_steps=ROWS, cuda_graphs=graphs, **flags))
        assert "TP communication overlapped" in said and (", CUDA graphs" in said) == graphs, said
    assert column(tmp_path / "graphs True", "loss") == column(tmp_path / "graphs False", "loss")
    assert largest_difference(exported(tmp_path / "graphs True"), exported(tmp_path / "graphs False")) == 0


@pytest.mark.parametrize("layout", [PP2, TP2 | SP], ids=["pp2", "tp2"])
def test_a_profile_is_drawn_beside_the_plan(inputs, tmp_path, layout):
    _run(2, inputs.flags(tmp_path / "run", **layout, gradient_accumulation_steps=ROWS, max_steps=4, profile=True))
    folder = tmp_path / "run" / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    computes = [event for event in events if event["ph"] == "X" and event["name"].startswith(("forward", "backward"))]
    assert len(computes) >= 2 * 2 * ROWS * 2  # ranks, kinds, microbatches, steps
    assert all(event["dur"] > 0 for event in computes)
    assert "<svg" in (folder / "schedule.svg").read_text()


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(inputs, tmp_path):
    run = {"gradient_accumulation_steps": 2, "max_steps": 100_000, "save_steps": 5}
    flags = inputs.flags(tmp_path / "run", **TP2, **SP, **run)  # graphs, and copies between the GPUs
    process = _start(2, flags)
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 12):
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                pytest.fail(process.communicate(timeout=30)[0])
            time.sleep(0.2)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=60)
        print(f"ended {time.monotonic() - killed:.1f} s after the kill")
    finally:
        process.kill()
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output, output
    said = r"megalora: rank 1 on \S+ has died, last heard of in step \d+.*; the run ends here"
    assert re.search(said, output), output
    reached = column(tmp_path / "run", "step")[-1]
    flags[flags.index("--max_steps") + 1] = str(reached + 5)
    _run(2, flags)
    assert column(tmp_path / "run", "step") == [*range(1, reached + 6)]
