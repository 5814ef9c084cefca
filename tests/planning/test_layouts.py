"""The search: what it finds is the best of all there is, and what it says of a stage is what the stage holds."""

from dataclasses import replace

import pytest
import torch

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora, stage_layers
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.models.graphs import BUSY
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.pipeline.schedule import SCHEDULES
from megalora.planning.calls import calls_of
from megalora.planning.devices import DEVICES
from megalora.planning.layouts import _OPTIMIZER_PASSES, Planner, _least_seconds
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Layout, Wanted
from megalora.planning.shapes import shape_of

FIELDS = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIG = config_from_dict(FIELDS)
LORA = resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear"}), CONFIG)
WORK = Workload(1, 64)


def planner(gpus: int = 4, usable: int = 2**33, lora=LORA, config=CONFIG) -> Planner:
    return Planner(config, lora, Cluster(gpus, 8, usable, DEVICES["h100"]))


def what_the_stage_holds(tp, pp, stage, tied, **lora_fields):
    config = config_from_dict({**FIELDS, "model_type": "qwen2", "tie_word_embeddings": tied})
    fields = {"r": 4, "target_modules": "all-linear", "bias": "all", **lora_fields}
    lora = resolve_lora(LoraConfig.from_dict(fields), config)
    layers = range(8 * stage // pp, 8 * (stage + 1) // pp)
    first, last = stage == 0, stage == pp - 1
    place = Placement(Axis(0, tuple(range(tp))), False, torch.bfloat16, "cpu")
    real = Stage(config, layers, place, lora, first=first, last=last)
    real.refresh_adapters()
    trained = sum(p.numel() * p.element_size() for p in real.parameters() if p.requires_grad)
    groups = real.groups
    aside = sum(x.nbytes for group in groups for x in (group.down, group.bias) if x is not None)
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in real.parameters()}

    shape = shape_of(config, lora, tp, "cpu")
    memory = stage_memory(shape, [layers], replace(WORK, element=2), first=first, last=last)
    assert memory.adapters == trained + aside
    assert memory.optimizer == 3 * trained
    assert memory.weights == sum(weights.values()) - trained


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp, pp, stage", [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 2, 1), (8, 2, 1)])
def test_what_stands_in_memory_is_what_the_stage_holds(tp, pp, stage, tied):
    what_the_stage_holds(tp, pp, stage, tied)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_trained_matrix_of_words_is_not_shared_with_the_other_end(saved, tied):
    for tp, pp, stage in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 2, 1)):
        what_the_stage_holds(tp, pp, stage, tied, modules_to_save=saved)


def test_the_update_counts_what_is_trained_at_the_ends():
    wanted = Wanted(WORK, step_rows=4, tp=1, pp=1)

    def update(fields=LORA, config=CONFIG) -> float:
        (plan,), _ = planner(gpus=1, lora=fields, config=config).search(wanted)
        return plan.seconds - plan.timeline.makespan

    def of(config=CONFIG, **fields):
        return resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear", **fields}), config)

    element = 4 * _OPTIMIZER_PASSES / DEVICES["h100"].memory
    assert update(of(modules_to_save=["lm_head"])) - update() == pytest.approx(512 * 64 * element)
    assert update(of(modules_to_save=["embed_tokens"])) - update() == pytest.approx(512 * 64 * element)
    classes = CONFIG.for_task("SEQ_CLS", tuple("abcdefgh"))
    scoring = update(of(classes, task_type="SEQ_CLS"), classes) - update()
    assert scoring == pytest.approx(8 * 64 * element)


@pytest.mark.parametrize("tp", [1, 4, 8])
def test_parameters_cut_a_plan_as_a_run(tp):
    """The layers of a rank are not in the proportions of the whole: norms and shared key heads are on every rank."""
    config = config_from_dict({**FIELDS, "num_key_value_heads": 1, "hidden_size": 128, "vocab_size": 800})
    lora = resolve_lora(LoraConfig.from_dict({"r": 4}), config)
    for pp in (2, 3, 4):
        wanted = Wanted(WORK, step_rows=16, tp=tp, pp=pp, schedule="1f1b", partition_method="parameters")
        (plan,), _ = planner(gpus=tp * pp, lora=lora, config=config).search(wanted)
        assert [stage.chunks[0] for stage in plan.stages] == stage_layers(config, pp, "parameters", None)


def test_more_in_flight_needs_more():
    shape = shape_of(CONFIG, LORA, 1)

    def total(**peak):
        return stage_memory(shape, [range(0, 4)], WORK, first=False, last=False, **peak).total

    assert total(in_flight=3) - total(in_flight=2) == total(in_flight=2) - total(in_flight=1) > 0
    assert 0 < total(inputs=3) - total(inputs=2) < total(in_flight=3) - total(in_flight=2)


def every_plan(wanted: Wanted, **options):
    one = planner(**options)
    layouts = [layout for sizes in one.sizes(wanted, []) for layout in one._layouts(sizes, wanted)]
    return one, [(layout, one.stages(layout, wanted)) for layout in layouts]


def test_the_search_finds_the_fastest_of_each_size():
    wanted = Wanted(WORK, step_rows=16)
    one, everything = every_plan(wanted)
    found, too_large = one.search(wanted)
    speeds: dict[tuple, float] = {}
    for layout, stages in everything:
        plan = one.plan(layout, stages)
        speeds[layout.tp, layout.pp] = max(speeds.get((layout.tp, layout.pp), 0.0), plan.tokens_per_second)
    assert {(p.layout.tp, p.layout.pp) for p in found} == speeds.keys() and not too_large
    for plan in found:
        assert plan.tokens_per_second == pytest.approx(speeds[plan.layout.tp, plan.layout.pp], rel=0.006)
    assert found[0].tokens_per_second == pytest.approx(max(speeds.values()), rel=0.006)


LLAMA_8B = {
    **FIELDS, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
SMALL = {**LLAMA_8B, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}


@pytest.mark.parametrize("fields", [SMALL, LLAMA_8B], ids=["small", "8B"])
@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("length", [8192])
def test_the_chosen_layout_is_within_5_percent_of_the_best_and_there_is_one_where_any_fits(fields, gpus, length):
    config = config_from_dict(fields)
    lora = resolve_lora(LoraConfig.from_dict({"r": 16, "target_modules": "all-linear"}), config)
    wanted = Wanted(Workload(1, length), step_rows=8, cp=1)
    met = set()
    for usable in (80 << 30, 20 << 30, 5 << 30):
        one, everything = every_plan(wanted, gpus=gpus, usable=usable, config=config, lora=lora)
        fitting = [each for each in everything if max(stage.memory.total for stage in each[1]) <= usable]
        found, _ = one.search(wanted)
        assert bool(found) == bool(fitting), usable
        met.add(bool(fitting))
        if fitting:
            best = min(one.plan(*each).seconds for each in fitting)
            assert found[0].seconds <= 1.05 * best, (usable, found[0].layout)
            assert found[0].memory <= usable
    assert True in met and (fields is SMALL or False in met), "both happen"


def test_no_schedule_is_faster_than_its_bound():
    wanted = Wanted(WORK, step_rows=16, tp=1)
    one, everything = every_plan(wanted)
    assert {layout.schedule for layout, _ in everything} == set(SCHEDULES)
    for layout, stages in everything:
        assert _least_seconds(layout, stages) <= one.plan(layout, stages).timeline.makespan * (1 + 1e-9)


def test_what_is_fixed_stays_so():
    wanted = Wanted(WORK, step_rows=16, tp=2, pp=2, schedule="gpipe", recompute="selective", rows=2)
    (plan,), _ = planner(gpus=8).search(wanted)
    layout = plan.layout
    assert (layout.tp, layout.pp, layout.dp, layout.schedule, layout.work.recompute) == (2, 2, 2, "gpipe", "selective")
    assert (layout.work.rows, layout.microbatches, layout.work.sequence_parallel) == (2, 4, True)


def test_rows_and_microbatches_may_stand_for_the_rows_of_a_step():
    plans, _ = planner().search(Wanted(WORK, step_rows=None, rows=2, microbatches=3))
    assert {(p.layout.work.rows, p.layout.microbatches) for p in plans} == {(2, 3)}
    assert {p.layout.tokens for p in plans} == {p.layout.dp * 2 * 3 * 64 for p in plans}


def test_where_memory_is_short_layers_are_computed_again_or_nothing_fits():
    wanted = Wanted(replace(WORK, rows=1), step_rows=64, tp=1, pp=1, rows=16)
    (roomy,), _ = planner().search(wanted)
    (tight,), _ = planner(usable=roomy.memory - 1).search(wanted)
    assert tight.memory < roomy.memory and tight.seconds > roomy.seconds
    assert roomy.stages[0].recompute != tight.stages[0].recompute and roomy.layout.recompute == "auto"
    none, (least,) = planner(usable=1000).search(wanted)
    assert not none and least.layout.recompute == "auto" and least.memory.total > 1000


@pytest.mark.parametrize(
    "wanted, reason",
    [
        (Wanted(WORK, 16, tp=3), "tensor_parallel_size"),
        (Wanted(WORK, 16, pp=3), "does not divide gpus"),
        (Wanted(WORK, 3, tp=1, pp=1), "3 rows of a step"),
        (Wanted(WORK, 16, pp=2, schedule="interleaved_1f1b", chunks=8), "do not fit"),
    ],
)
def test_no_layout_at_all_is_an_error_that_says_why(wanted, reason):
    with pytest.raises(UserError, match=reason):
        planner(gpus=4).search(wanted)


def test_adapters_in_the_upper_layers_alone_leave_the_lower_stages_without_activations():
    lora = resolve_lora(LoraConfig.from_dict({"r": 4, "layers_to_transform": [6, 7]}), CONFIG)
    wanted = Wanted(
        WORK, step_rows=16, tp=1, pp=4, schedule="1f1b", recompute="none", partition_method="uniform", rows=1
    )
    (plan,), _ = planner(lora=lora).search(wanted)
    below, above = plan.stages[0], plan.stages[3]
    assert below.seconds[0].backward == 0 < above.seconds[0].backward
    assert below.memory.optimizer == 0 and below.memory.activations < 0.2 * above.memory.activations


def test_a_run_without_graphs_or_overlap_is_slower():
    wanted = Wanted(replace(WORK, rows=8, sequence_parallel=True), 8, tp=2, pp=1)
    one = planner()
    layout = next(iter(one._layouts((2, 1, 1), wanted)))
    layout = replace(layout, work=replace(layout.work, seq_length=2048))

    def seconds(**flags) -> float:
        asked = replace(layout, **flags)
        return one.plan(asked, one.stages(asked, wanted)).seconds

    assert seconds() == seconds(cuda_graphs=True, tp_comm_overlap=True) < seconds(cuda_graphs=False)
    assert seconds() < seconds(tp_comm_overlap=False)
    apart = Planner(CONFIG, LORA, Cluster(4, 1, 2**33, DEVICES["h100"]))
    assert apart.plan(layout, apart.stages(layout, wanted)).seconds > seconds(tp_comm_overlap=False)


@pytest.mark.parametrize(
    "rows, pp, cp, asked, wanted",
    [
        (BUSY // 64 - 1, 1, 1, None, True), (BUSY // 64, 1, 1, None, False), (BUSY // 64, 1, 1, True, True),
        (1, 2, 1, None, False), (2, 1, 2, None, False), (1, 1, 1, False, False),
    ],
)  # fmt: skip
def test_graphs_are_counted_where_a_run_has_them(rows, pp, cp, asked, wanted):
    work = replace(WORK, rows=rows, seq_length=64, element=2, context_parallel=cp)
    assert Layout(1, pp, cp, "1f1b", 1, 1, work, cuda_graphs=asked).graphs == wanted


def test_long_documents_are_cut_into_calls_from_hopper_on_alone():
    """An A100's kernel needs its workspace for all heads at once, and copies of the keys of each piece."""
    assert DEVICES["h100"].merges and DEVICES["h200"].merges and not DEVICES["a100"].merges
    config = config_from_dict({
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 1 << 17,
    })  # fmt: skip
    layer = shape_of(config, resolve_lora(LoraConfig(), config), 1, "cuda").layers[0].steps[0].mixers[0]
    for cp in (1, 2):
        work = Workload(1, 131072, context_parallel=cp, merges=False)
        whole, called = (calls_of(layer, one, 131072 // cp, "cuda") for one in (work, replace(work, merges=True)))
        assert called.workspace < 0.6 * whole.workspace and called.seen == cp <= whole.seen


def test_context_parallel_is_tried_where_nothing_else_fits():
    """One row of a step on four GPUs: data parallelism has nothing to do."""
    work = replace(WORK, seq_length=4096)
    wanted = Wanted(work, step_rows=1, tp=1, pp=1, recompute="none", cp=None)
    with pytest.raises(UserError, match="1 rows of a step cannot be dealt"):
        planner().search(replace(wanted, cp=1))
    plans, _ = planner().search(wanted)
    assert [(plan.layout.cp, plan.layout.data) for plan in plans] == [(4, 1)] and plans[0].layout.tokens == 4096
    (alone,), _ = planner(gpus=1).search(replace(wanted, cp=1))
    assert plans[0].memory < 0.6 * alone.memory


def test_keys_and_values_that_ranks_share_take_time():
    wanted = Wanted(replace(WORK, seq_length=4096), step_rows=1, tp=1, pp=1, recompute="none", cp=2)
    (plan,), _ = planner(gpus=2).search(wanted)
    slow = Planner(CONFIG, LORA, Cluster(2, 1, 2**33, DEVICES["h100"]))
    (apart,), _ = slow.search(wanted)
    kv, layers = 2 * 4096 * 4 * 8 * WORK.element, 8
    seconds = layers * 2 * kv / 2 * (1 / DEVICES["h100"].network - 1 / DEVICES["h100"].collective)
    assert sum(s.total for s in apart.stages[0].seconds) - sum(s.total for s in plan.stages[0].seconds) == (
        pytest.approx(seconds)
    )
