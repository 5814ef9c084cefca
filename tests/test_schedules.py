"""Schedules from the command line: an interleaved run saves, goes on elsewhere and exports the same adapter."""

import pytest
import tiny
from spawn import spawn
from tiny import column, exported, largest_difference, tune

INTERLEAVED = {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "schedule": "interleaved_1f1b"}
STEPS = {"max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 3, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    found = tiny.make_inputs(folder)
    tiny.save_model(folder / "model", num_hidden_layers=4)
    return found


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    tune(1, inputs.flags(folder, **STEPS))
    return folder


def test_an_interleaved_run_is_that_of_one_process(inputs, alone, tmp_path):
    folder = tmp_path / "run"
    done = tune(2, inputs.flags(folder, **STEPS, **INTERLEAVED, eval_data_path=inputs.data))[0]
    assert "layers 0 to 0 and 2 to 2, embedding, " in done.out
    assert "interleaved_1f1b, 3 microbatches a step, stages wait" in done.out
    assert column(folder, "loss") == pytest.approx(column(alone, "loss"), rel=1e-5)
    assert largest_difference(exported(folder), exported(alone)) < 1e-5


def test_it_goes_on_from_one_process_and_on_one_process(inputs, alone, tmp_path):
    def run(processes: int, steps: int, **layout) -> str:
        return tune(processes, inputs.flags(tmp_path / "run", **STEPS | layout | {"max_steps": steps}))[0].out

    run(1, 2)
    assert "continuing after step 2" in run(2, 4, **INTERLEAVED)
    assert "continuing after step 4" in run(1, 6)
    assert largest_difference(exported(tmp_path / "run"), exported(alone)) < 1e-5


EVENLY = {"pipeline_parallel_size": 2, "partition_method": "uniform"}


@pytest.mark.parametrize("layers", [[0], [2, 3]], ids=str)
def test_stages_without_an_adapter_need_no_care(inputs, tmp_path, layers):
    """Whether they stand above the adapters or below; with checkpoints, evaluation and a resume."""
    lora = tiny.write_json(tmp_path / "lora.json", tiny.LORA | {"layers_to_transform": layers})
    adapters = []
    for name, processes, layout in (("one", 1, {}), ("cut", 2, EVENLY), ("v", 2, INTERLEAVED)):
        flags = STEPS | layout | {"lora_config": lora, "eval_data_path": inputs.data, "max_steps": 4}
        out = tune(processes, inputs.flags(tmp_path / name, **flags | {"max_steps": 2}))[0].out
        assert ("no backward" in out) == (name == "cut" and 0 not in layers)
        tune(processes, inputs.flags(tmp_path / name, **flags))
        adapters.append(exported(tmp_path / name))
    assert all(largest_difference(adapters[0], other) < 1e-5 for other in adapters[1:])


def test_more_chunks_than_layers(inputs, tmp_path):
    flags = INTERLEAVED | {"virtual_pipeline_size": 3}
    done = spawn(tiny.run, 2, [inputs.flags(tmp_path / "run", **flags)])[0][0]
    assert done.status == 2 and "* virtual_pipeline_size (3) = 6 is more than num_hidden_layers (4)" in done.err
