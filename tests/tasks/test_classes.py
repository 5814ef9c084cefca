"""Classifiers: every layout gives the numbers of one process, and those are the numbers of transformers and peft.

transformers reads one document at a time, ours a packed batch. Heads are drawn from their names on both sides.
"""

import itertools
import os
from dataclasses import dataclass, field

import peft
import pytest
import torch
import transformers
from oracle import (
    ALL_LINEAR,
    ENCODERS,
    LABELS,
    Run,
    check_runs,
    classified,
    fields_of,
    in_file_order,
    reference,
    whole_tensor,
)

from megalora.adapters.config import LoraConfig
from megalora.adapters.words import WordsAdapter
from megalora.batch import Batch
from megalora.building import resolve_lora
from megalora.data import Sample, build_rows
from megalora.data.loader import Loader
from megalora.models.blocks.ends import EmbeddingBlock, words_of
from megalora.models.config import config_from_dict, known_families
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

CLASSES = {
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
}
LAYOUTS = (  # of 4 processes
    {"tp": 2, "pp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full", "schedule": "gpipe"},
    {"tp": 4, "sequence_parallel": True, "recompute": "selective", "micro_batch_rows": 2},
    {"pp": 2},
)
DECODERS = ("llama", "gpt_neox")
RUNS = [
    Run("llama", task="TOKEN_CLS"), Run("gpt_neox", task="SEQ_CLS"), Run("bert", task="TOKEN_CLS"),
    Run("bert", task="SEQ_CLS"), Run("roberta", task="SEQ_CLS"), Run("electra", task="TOKEN_CLS"),
    Run("deberta-v2", task="TOKEN_CLS"), Run("deberta-v2", task="SEQ_CLS"), Run("deberta-v2, apart", task="TOKEN_CLS"),
    Run("deberta", task="TOKEN_CLS"), Run("deberta", task="SEQ_CLS"), Run("deberta", task="TOKEN_CLS"),
    Run("layoutlm", task="TOKEN_CLS"), Run("layoutlm", task="TOKEN_CLS"), Run("distilbert", task="SEQ_CLS"),
    Run("distilbert", task="TOKEN_CLS"), Run("modernbert", task="SEQ_CLS"), Run("modernbert", task="SEQ_CLS"),
    Run("modernbert, biases", task="TOKEN_CLS"), Run("modernbert, biases", task="SEQ_CLS"),
    Run("mpnet", task="SEQ_CLS"), Run("mpnet", task="TOKEN_CLS"),
    Run("xlm-roberta-xl", task="TOKEN_CLS"), Run("ernie", task="SEQ_CLS"),
    Run("ernie", task="TOKEN_CLS"), Run("xlm-roberta-xl", task="SEQ_CLS"),
]  # fmt: skip


def layouts(every: bool = False) -> list[Run]:
    """Each run on one of LAYOUTS, in turn, and short; every: on all of them, with all layers and steps."""
    if every:
        return [run.on(**layout) for run in RUNS for layout in LAYOUTS]
    few = {"num_hidden_layers": 2}
    return [run.on(**layout, model=few).short(4) for run, layout in zip(RUNS, itertools.cycle(LAYOUTS), strict=False)]


def test_layouts_of_four_processes():
    """`make proof`: each on every one of the layouts, and longer."""
    runs = layouts(every=os.environ.get("MEGALORA_PROOF") == "all")
    check_runs(4, runs)


def test_the_head_is_trained_and_its_dropout_counts():
    run = RUNS[0]
    outcome = reference(run)
    assert {"score.weight", "score.bias"} <= outcome.adapters.keys()
    assert reference(run.on(model={"classifier_dropout": 0.0})).losses != outcome.losses


# ---- transformers and peft


@dataclass(frozen=True)
class Case:
    family: str
    task: str
    model: dict = field(default_factory=dict)


def off(family: str) -> dict[str, float]:
    """Without any of its dropouts, but for those that a decoder asks for."""
    reads = known_families()[fields_of(family)["model_type"]].reads
    return {name: 0.0 for name in reads if "dropout" in name and (family in ENCODERS or name == "classifier_dropout")}


PARITY = [
    Case(family, task, off(family))
    for family, task in itertools.product((*DECODERS, *ENCODERS), CLASSES)
    if (family, task) != ("layoutlm", "SEQ_CLS")
]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ALL_LINEAR["target_modules"]}


def documents(config, task: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in (17, 12, 8, 40, 5, 30, 2):
        ids = torch.randint(2, config.vocab_size, (length,), generator=generator)  # 0 and 1 are padding somewhere
        labels = torch.where(torch.arange(length) >= length // 3, ids, -100)
        found.append(classified(Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32")), config, task))
    return found


def ours(case: Case, dtype: torch.dtype):
    """(loss sum, gradients, scores of the labelled tokens in the order of documents)"""
    config = config_from_dict(fields_of(case.family, **case.model)).for_task(case.task, LABELS)
    lora = resolve_lora(LoraConfig.from_dict(LORA | {"task_type": case.task}), config)
    place, task = Placement(Axis(), False, dtype, "cpu"), TASKS[case.task]
    stage = Stage(config, range(config.num_hidden_layers), place, lora, loss=task.loss, sums=task.sums)
    parameters = dict(stage.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, split in named_splits(stage).items():
            parameters[name].copy_(split.slice(whole_tensor(name, split.global_shape, 0.15)))
    stage.refresh_adapters()
    packed = build_rows(documents(config, case.task), [[0, 1, 2], [3], [4, 5], [6]], 40, pad_token_id=0)
    loader = Loader(packed, micro_batch_rows=4, num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False)
    step = loader.step(0)
    inputs = training_inputs(step.microbatches[0], config, place, seed=1, step=0)
    loss = stage(None, inputs)
    loss.backward()
    with torch.no_grad():
        stage.loss = lambda hidden, head, inputs: head(hidden, inputs)
        scores = stage(None, inputs)
    splits = named_splits(stage)
    return loss.item(), {name: in_file_order(splits[name], p.grad) for name, p in stage.trainable().items()}, scores


def theirs(case: Case, dtype: torch.dtype):
    spec = config_from_dict(fields_of(case.family, **case.model)).for_task(case.task, LABELS)
    # A decoder reads the last token of a text, unless that is padding.
    raw = fields_of(case.family, **case.model) | {"num_labels": len(LABELS)}
    raw |= {"pad_token_id": None} if spec.causal else {}
    kind = raw.pop("model_type")
    config = transformers.CONFIG_MAPPING[kind](**raw)
    eager = kind.startswith(("deberta", "mpnet"))
    trained = [name.partition(".")[0] for name in spec.head.trained]  # "classifier" peft saves by itself
    model = CLASSES[case.task].from_config(config, attn_implementation="eager" if eager else "sdpa")
    more = {"target_modules": sorted(spec.linears), "modules_to_save": sorted({*trained} - {"classifier", "score"})}
    lora = peft.LoraConfig(task_type=case.task, **LORA | more)
    model = peft.get_peft_model(model, lora).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.copy_(whole_tensor(plain_name(name), tuple(parameter.shape), 0.15))
    model.train()
    total, scores = 0.0, []
    for document in documents(spec, case.task):
        ids, classes = torch.from_numpy(document.input_ids).long(), torch.from_numpy(document.columns["classes"]).long()
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "token_types" in document.columns:
            read["token_type_ids"] = torch.from_numpy(document.columns["token_types"]).long()
        if "boxes" in document.columns:
            read["bbox"] = torch.from_numpy(document.columns["boxes"]).long()
        logits = model(**{name: values[None] for name, values in read.items()}).logits
        logits = logits[0][classes != -100] if case.task == "TOKEN_CLS" else logits
        classes = classes[classes != -100]
        scores.append(logits)
        total = total + torch.nn.functional.cross_entropy(logits, classes, reduction="sum")
    total.backward()
    gradients = {plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return total.item(), gradients, torch.cat(scores)


def plain_name(name: str) -> str:
    """peft's name of a parameter -> ours."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    return name.replace(".modules_to_save", "").replace(".original_module", "")


@pytest.mark.parametrize("case", PARITY, ids=lambda case: f"{case.family}-{case.task}")
def test_the_numbers_of_transformers_and_peft(case):
    # In float64, for in float32 the rounding of one CPU's products is 1e-5 of a small gradient from that of another's.
    # Parts of transformers are float32 whatever the dtype: DeBERTa's scale, norms and rotations of decoders.
    loss, gradients, scores = ours(case, torch.float64)
    their_loss, their_gradients, their_scores = theirs(case, torch.float64)
    assert gradients.keys() == their_gradients.keys()
    assert abs(loss - their_loss) <= 1e-5 * abs(their_loss)
    assert (scores - their_scores).abs().max() <= 1e-5 * their_scores.abs().max()
    for name, gradient in gradients.items():
        scale = their_gradients[name].abs().max()
        assert scale > 1e-6 and (gradient - their_gradients[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize(
    "family, fields",
    [
        ("llama", {}), ("llama", {"classifier_dropout": 0.3}), ("stablelm", {"hidden_dropout": 0.2}),
        ("bloom", {"hidden_dropout": 0.2}), ("falcon", {"hidden_dropout": 0.0}), ("mpt", {}), ("gpt_neox", {}),
    ],
)  # fmt: skip
def test_the_dropout_before_the_head_is_that_of_transformers(family, fields):
    raw = fields_of(family) | fields
    (head,) = (found.head for found in config_from_dict(raw).task_heads if found.task == "TOKEN_CLS")
    with torch.device("meta"):
        theirs = CLASSES["TOKEN_CLS"].from_config(transformers.AutoConfig.for_model(**raw))
    assert head.dropout == theirs.dropout.p


def test_classifier_dropout_of_chatglm_counts():
    """Its own code, which transformers lacks, applies it to what its classifier of sequences reads."""
    for given, expected in ((None, (0.2, 0.0)), (0.3, (0.3, 0.3))):
        raw = fields_of("chatglm") | {"hidden_dropout": 0.2, "classifier_dropout": given}
        heads = {found.task: found.head.dropout for found in config_from_dict(raw).task_heads}
        assert (heads["TOKEN_CLS"], heads["SEQ_CLS"]) == expected


def test_the_embedding_of_electra_is_dropped_before_it_is_projected():
    config = config_from_dict(fields_of("electra", hidden_dropout_prob=0.5))
    place, root = Placement(Axis(), False, torch.float64, "cpu"), torch.nn.Module()
    words = words_of(root, config.embedding, place, WordsAdapter(False, (), None))
    block = EmbeddingBlock(root, config.embedding, place, words)
    with torch.no_grad():
        for name, parameter in root.named_parameters():
            parameter.copy_(whole_tensor(name, tuple(parameter.shape), 0.3))
    ids = torch.arange(20)
    columns = {"token_types": torch.zeros(20, dtype=torch.int64)}
    batch = Batch(ids, ids, ids, torch.tensor([0, 20], dtype=torch.int32), ids, columns=columns)
    dropped, whole = (block(training_inputs(batch, config, place, seed=seed, step=0)) for seed in (1, None))
    assert not dropped.equal(whole) and (dropped != 0).all()
