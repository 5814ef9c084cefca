"""Whole steps on a GPU against the float64 oracle on the CPU: same model, same rows, same dropout masks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from gpu_sizes import SIZES, sizes
from oracle import EXPERTS, FAMILIES, IMAGES, LABELS, TINY, Run, fields_of, train

from megalora import cli
from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import EngineSettings, build_stage, build_trainer, resolve_lora
from megalora.cluster.launch import fix_order_of_sums
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import ParallelMesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.planning.nodes import Workload

pytestmark = pytest.mark.gpu

# Of chunks and Mamba's states there are none.
NO_GRAPHS = {"llama4_text", "granitemoehybrid", "nemotron_h, experts"}
Q_AND_V = r".*\.(q_proj|v_proj|qkv_proj|query_key_value|kv_b_proj)"


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS, "qwen3_5_text"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_step_on_the_gpu(family, dtype, tolerance):
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    # After a step of the oracle's high rate so small a model of linear attention is chaos in 16 bits: on a CPU too its
    # gradients are 0.9 off in the second step, and 0.2 in the first, as llama's are.
    steps = 1 if config_from_dict(fields_of(family)).recurrent else 2
    run = Run(family=family, model=sizes(family), lora=lora, steps=steps, seq_length=64)
    wanted = train(0, 1, run)
    ours = train(0, 1, run.on(dtype=dtype, device="cuda"))
    for a, b in zip(ours.losses, wanted.losses, strict=True):
        assert abs(a - b) <= tolerance * b
    # In 16 bits tokens of so small a model choose other experts: on a CPU a factor is up to 0.92 off (gpt_oss), all
    # together 0.61. What is not related is 1 off, or more.
    all_off, whole = 0.0, 0.0
    for name, (_, grad) in wanted.gradients.items():
        off = (ours.gradients[name][1].double().cpu() - grad).norm()
        assert off <= (2e-3 if dtype == torch.float32 else 1.3) * grad.norm(), (name, off / grad.norm())
        all_off, whole = all_off + off**2, whole + grad.norm() ** 2
    assert all_off**0.5 <= (10 * tolerance if dtype == torch.float32 else 0.9) * whole**0.5
    again = train(0, 1, run.on(dtype=dtype, device="cuda"))
    assert again.losses == ours.losses
    assert all(torch.equal(p, ours.adapters[n][1]) for n, (_, p) in again.adapters.items())


@pytest.mark.parametrize("family", IMAGES)
def test_a_step_behind_images_on_the_gpu(family):
    """The tower of vision runs there too; its convolution in TF32, as torch has it, and OPT's ReLU makes much of it."""
    run = Run(family, steps=1)
    wanted, found = train(0, 1, run), train(0, 1, run.on(dtype=torch.float32, device="cuda"))
    for a, b in zip(found.losses, wanted.losses, strict=True):
        assert abs(a - b) <= 1e-4 * b
    for name, (_, grad) in wanted.gradients.items():
        assert (found.gradients[name][1].double().cpu() - grad).norm() <= 3e-2 * grad.norm(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_step_with_magnitudes_on_the_gpu(dtype, tolerance):
    """DoRA: the gradients of magnitudes too, and every bit of a repetition."""
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear", "use_dora": True}
    for family in ("llama", "qwen2", "gpt_neox"):
        run = Run(family=family, model=sizes(family), lora=lora, steps=2, seq_length=64)
        wanted = train(0, 1, run)
        found = train(0, 1, run.on(dtype=dtype, device="cuda"))
        for name, (_, grad) in wanted.gradients.items():
            error = (found.gradients[name][1].double().cpu() - grad).norm() / grad.norm()
            assert error <= 10 * tolerance, (family, name, error)
        again = train(0, 1, run.on(dtype=dtype, device="cuda"))
        assert again.losses == found.losses
        assert all(torch.equal(p, found.adapters[n][1]) for n, (_, p) in again.adapters.items())


@pytest.mark.parametrize("base_format, most", [("nf4", 0.1), ("fp8", 0.45), ("nf4_fp8", 0.45)])
def test_a_step_on_a_quantised_base_on_the_gpu(base_format, most):
    """Its weights are the CPU's; products in e4m3 round the other factor to 4 bits."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU does not multiply e4m3")
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    run = Run(family="llama", model=sizes("llama"), lora=lora, steps=1, seq_length=64, base_format=base_format)
    wanted, ours = train(0, 1, run), train(0, 1, run.on(dtype=torch.bfloat16, device="cuda"))
    for a, b in zip(ours.losses, wanted.losses, strict=True):
        assert abs(a - b) <= 0.01 * b
    pairs = [(ours.gradients[name][1].double().cpu(), grad) for name, (_, grad) in wanted.gradients.items()]
    found, exact = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
    assert (found - exact).norm() <= most * exact.norm()
    again = train(0, 1, run.on(dtype=torch.bfloat16, device="cuda"))
    assert again.losses == ours.losses


def test_heads_that_no_kernel_of_packed_documents_takes(tmp_path, capsys):
    inputs = tiny.make_inputs(tmp_path)
    tiny.save_model(inputs.model, hidden_size=80, num_attention_heads=4, num_key_value_heads=2)
    assert cli.main(["finetune", *inputs.flags(tmp_path / "run", dtype="bfloat16", max_steps=3)]) == 0
    assert "attention with heads of 20 is another call" in capsys.readouterr().out
    assert all(loss > 0 for loss in tiny.column(tmp_path / "run", "loss"))


# ---- CUDA graphs: the same numbers to the bit

ROWS, LENGTH = 2, 256


class StepOf:
    """Microbatches of ROWS rows; `lengths` cuts each row into documents; labels on what `labelled` says."""

    def __init__(self, lengths: list[list[int]], labelled: slice = slice(None)):
        self.microbatches, self.label_count, self.token_count = [], 0, 0
        for m, cut in enumerate(lengths):
            ids = torch.randint(0, 264, (ROWS * LENGTH,), generator=torch.Generator().manual_seed(m))
            labels = torch.full_like(ids, -100)
            labels[labelled] = ids.roll(-1)[labelled]
            bounds = torch.tensor([0, *(cut * ROWS)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            positions = torch.cat([torch.arange(n) for n in cut * ROWS])
            places = torch.arange(m * ROWS * LENGTH, (m + 1) * ROWS * LENGTH)
            self.microbatches.append(Batch(ids, labels, positions, bounds, places))
            self.label_count += int((labels != -100).sum())
            self.token_count += ids.numel()


EVEN, CUT, OTHER_CUT = [LENGTH], [100, 90, 66], [40, 16, 200]


class TaggedStepOf(StepOf):
    """The same tokens, each with a class as its label."""

    def __init__(self, lengths: list[list[int]]):
        super().__init__(lengths)
        for number, batch in enumerate(self.microbatches):
            columns = {"token_types": torch.zeros_like(batch.input_ids)}
            self.microbatches[number] = replace(batch, labels=batch.input_ids % len(LABELS), columns=columns)


def run_steps(
    steps,
    graphs: bool,
    family="llama",
    recompute="none",
    targets="all-linear",
    dtype=torch.bfloat16,
    task="CAUSAL_LM",
    model=None,
    **again,
):
    """(losses, adapters) of these steps, in microbatches."""
    fields, mesh = fields_of(family, **sizes(family, **({"head_dim": 64} | (model or {})))), ParallelMesh()
    config = config_from_dict(fields).for_task(task, LABELS)
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": targets, "task_type": task}
    place = Placement(mesh.tp, False, dtype, torch.device("cuda"))
    resolved = resolve_lora(LoraConfig.from_dict(lora), config)

    @torch.no_grad()
    def fill(stage):
        torch.manual_seed(0)
        for name, p in stage.named_parameters():
            p.normal_(std=0.1) if p.dim() == 2 else p.fill_(0.0 if name.endswith("bias") else 1.0)

    settings = EngineSettings(
        Workload(ROWS, LENGTH, element=dtype.itemsize, recompute=recompute, **again), lambda step: 1e-2, seed=5,
        cuda_graphs=graphs,
    )  # fmt: skip
    engine = build_trainer(config, mesh, resolved, place, settings, fill)
    trainer, stage, parameters = engine.trainer, engine.stage, engine.parameters
    results = [trainer.step(number, data) for number, data in enumerate(steps)]
    losses = [(result.loss, result.grad_norm) for result in results]
    losses.append(trainer.evaluate(steps[:1]))
    losses.append(trainer.step(len(steps), steps[-1]).loss)  # after an evaluation too
    assert not graphs or any(graph is not None for graph in stage._graphs._graphs.values())
    return losses, {name: p.detach().clone() for name, p in parameters.items()}


@pytest.fixture
def deterministic(monkeypatch):
    """As --deterministic: else the backward passes of cuDNN's and FlashAttention's kernels sum in no fixed order."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fix_order_of_sums(torch.device("cuda"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", [*sorted((FAMILIES | EXPERTS).keys() - NO_GRAPHS), "qwen3_5_text"])
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("targets", [Q_AND_V, "all-linear"], ids=["qv", "all"])
def test_graphs_give_the_same_bits(family, recompute, targets, deterministic):
    steps = [
        StepOf([EVEN, EVEN]), StepOf([EVEN, CUT]), StepOf([CUT, OTHER_CUT], slice(0, 77)),
        StepOf([OTHER_CUT, EVEN], slice(30, 300)), StepOf([EVEN, OTHER_CUT]),
    ]  # fmt: skip
    wanted, adapters = run_steps(steps, False, family, recompute, targets)
    ours, ours_adapters = run_steps(steps, True, family, recompute, targets)
    assert ours == wanted
    assert all(torch.equal(p, ours_adapters[name]) for name, p in adapters.items())


@pytest.mark.parametrize("family", ["gemma2", "granite", "starcoder2"])
def test_graphs_with_softcap_and_base_dropouts_give_the_same_bits(family, deterministic):
    steps = [StepOf([EVEN, CUT]), StepOf([CUT, EVEN]), StepOf([EVEN, CUT]), StepOf([OTHER_CUT, EVEN])]
    wanted, adapters = run_steps(steps, False, family)
    ours, ours_adapters = run_steps(steps, True, family)
    assert ours == wanted
    assert all(torch.equal(p, ours_adapters[name]) for name, p in adapters.items())


def test_graphs_of_documents_that_grow_beyond_the_window_give_the_same_bits(deterministic):
    """By our own kernels on Hopper: what a graph launches was compiled for the shorter documents before it."""
    steps = [StepOf([CUT, CUT]), StepOf([OTHER_CUT, CUT]), StepOf([CUT, OTHER_CUT])]
    model = {"head_dim": 128, "sliding_window": 150}
    wanted, adapters = run_steps(steps, False, "mistral", model=model)
    ours, ours_adapters = run_steps(steps, True, "mistral", model=model)
    assert ours == wanted
    assert all(torch.equal(p, ours_adapters[name]) for name, p in adapters.items())


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_graphs_of_states_of_more_documents_give_the_same_bits(family, deterministic):
    """A graph of few documents, then more, down to one token each; what is empty behind them changes nothing."""
    short = [1] * 40 + [216]
    steps = [StepOf([CUT, OTHER_CUT]), StepOf([short, CUT]), StepOf([OTHER_CUT, short]), StepOf([CUT, EVEN])]
    wanted, adapters = run_steps(steps, False, family)
    ours, ours_adapters = run_steps(steps, True, family)
    assert ours == wanted
    assert all(torch.equal(p, ours_adapters[name]) for name, p in adapters.items())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "deberta-v2, apart"])
def test_graphs_with_scores_of_positions_give_the_same_bits(family, recompute, deterministic):
    """Documents that grow too: a graph is captured for longer ones than those it was readied with."""
    steps = [TaggedStepOf([OTHER_CUT, CUT]), TaggedStepOf([CUT, EVEN]), TaggedStepOf([EVEN, OTHER_CUT])]
    wanted, adapters = run_steps(steps, False, family, recompute, task="TOKEN_CLS")
    ours, ours_adapters = run_steps(steps, True, family, recompute, task="TOKEN_CLS")
    assert ours == wanted and all(loss > 0 and norm > 0 for loss, norm in wanted[:3])
    assert all(torch.equal(p, ours_adapters[name]) for name, p in adapters.items())


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "deberta-v2, apart"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_step_with_scores_of_positions_on_the_gpu(family, dtype, tolerance):
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    run = Run(family=family, model=sizes(family), lora=lora, steps=2, seq_length=64, task="TOKEN_CLS")
    wanted, ours = train(0, 1, run), train(0, 1, run.on(dtype=dtype, device="cuda"))
    for a, b in zip(ours.losses, wanted.losses, strict=True):
        assert abs(a - b) <= tolerance * b
    for name, (_, grad) in wanted.gradients.items():
        error = (ours.gradients[name][1].double().cpu() - grad).norm() / grad.norm()
        assert error <= 10 * tolerance, (name, error)


@pytest.mark.parametrize("cut", [EVEN, CUT], ids=["even", "cut"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parts_computed_again_on_the_gpu(family, cut, deterministic):
    """The same first loss to the bit. Gradients of the stream are rounded once more than in a fused norm."""
    steps = [StepOf([cut, cut]), StepOf([cut, OTHER_CUT]), StepOf([cut, cut])]
    wanted, adapters = run_steps(steps, False, family)
    for recompute in ("norms", "mlp", "layer", "full"):
        for graphs, again in [(True, {}), (False, {"tile": 200}), (False, {"offloaded": frozenset({0, 1})})]:
            ours, ours_adapters = run_steps(steps, graphs, family, recompute, **again)
            assert ours[0][0] == wanted[0][0], (recompute, again)
            assert ours[0][1] == pytest.approx(wanted[0][1], rel=1e-2), (recompute, again)
            assert ours[2][0] == pytest.approx(wanted[2][0], rel=5e-3), (recompute, again)
            assert all(p.isfinite().all() for p in ours_adapters.values()) and adapters.keys() == ours_adapters.keys()


def test_twenty_repeats_of_a_run_give_the_same_bits(deterministic):
    steps = [StepOf([EVEN, CUT]), StepOf([CUT, EVEN]), StepOf([OTHER_CUT, EVEN])]
    losses, adapters = run_steps(steps, True)
    for _ in range(19):
        again, again_adapters = run_steps(steps, True)
        assert again == losses and all(torch.equal(p, again_adapters[name]) for name, p in adapters.items())


def test_a_pipeline_that_fills_before_it_drains_has_no_more_graphs_than_one(deterministic):
    """Two microbatches in flight: the second runs without a graph, and its numbers stay."""
    mesh, config = ParallelMesh(), config_from_dict(TINY | FAMILIES["llama"] | SIZES)
    place = Placement(mesh.tp, False, torch.bfloat16, torch.device("cuda"))
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}
    stage, _ = build_stage(config, mesh, resolve_lora(LoraConfig.from_dict(lora), config), place)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in stage.parameters():
            p.normal_(std=0.1)
    parameters = stage.trainable()
    gradients = FlatGradients(parameters, named_splits(stage), mesh)
    batches = StepOf([EVEN, EVEN]).microbatches

    def gradient() -> torch.Tensor:
        stage.refresh_adapters()
        gradients.zero()
        losses = [stage(None, training_inputs(b, config, place, seed=1, step=3)) for b in batches]
        for loss in losses:
            loss.backward()
        return gradients.buffer.clone()

    wanted = gradient()
    stage.use_graphs()
    assert all(torch.equal(gradient(), wanted) for _ in range(3))
