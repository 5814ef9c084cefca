"""What is adapted and how: PEFT's LoraConfig, read strictly.

Every field that changes the numbers of a LoRA on a linear layer is honoured; any other that is set is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalora.adapters.lora import Adapter
from megalora.adapters.patterns import Patterns, check_pattern, ends_of, named
from megalora.adapters.sharing import check_field
from megalora.adapters.targets import DEFAULT_TARGET_MODULES, check_stacks
from megalora.adapters.words import Tokens, WordsAdapter, checked_tokens, saved_modules, trained_tokens
from megalora.choices import CLASSIFICATION, TASKS
from megalora.errors import UserError
from megalora.files import read_json, unique_fields

# Fields of a PEFT file that say nothing about the numbers.
_IGNORED = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
}
# Fields that would change the numbers, with the values at which they do not.
_NEUTRAL: Mapping[str, tuple] = {
    "layer_replication": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "megatron_config": (None,),
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False,),
    "layers_pattern": (None, [], "layers", ["layers"]),
}
_INITS = ("gaussian", "orthogonal")
PREPARED = ("pissa", "olora")  # inits that change the base, which `megalora convert adapter init` makes
_CHANGE_BASE = (*PREPARED, "corda", "loftq")


MOST_RANK, MOST_ALPHA = 1 << 16, 1e9
_MOST_LAYERS = 1 << 12
HEADS = ("classifier", "score")  # peft's modules_to_save of a classifier: its head, which is trained in full


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, the fields that mean something for a linear layer, by the same names.

    target_modules    None: the default of the model_type; names (a module matches when its name is one of them or
                      ends in "." + one); "all-linear": every linear but the head and those `apart` (see `resolve`);
                      any other string: a regular expression over the whole module name
    target_parameters names of tensors that hold the weights of all experts of a layer (gpt_oss): their linears are
                      adapted too, each by itself. peft's way to name what it has no modules for
    r, lora_alpha     rank and scale; rank_pattern and alpha_pattern map a pattern of module names to other values
    use_rslora        s = alpha / sqrt(r) instead of alpha / r
    bias              which biases are trained: "none", "all", or "lora_only", those of adapted modules
    exclude_modules   names, or a regular expression over the whole module name, of targets that are not adapted
    modules_to_save   names of modules that are trained in full: the embedding, the head
    trainable_token_indices  ids of tokens whose rows of the embedding, and of a head that is tied to it, are trained;
                      or an object of such lists by module name
    use_dora          train magnitudes beside A and B (see megalora.adapters.dora)
    lora_bias         train a bias of B
    init_lora_weights True: A uniform (Kaiming, a = sqrt 5), B zero; "gaussian": A normal with deviation 1 / r, B zero;
                      False: both uniform; "orthogonal": neither zero, but B A
    inference_mode    the adapter is for use, not for training
    expert_lora       factors that all experts of a layer share (see megalora.adapters.sharing): "per_expert": none,
                      "shared_a": A, "shared": both. expert_count: how many do, told by the model
    fan_in_fan_out    adapted weights are [in, out] in the model's file (GPT-2): told by the model, it need not be given
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: Tokens | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    init_lora_weights: bool | str = True
    inference_mode: bool = False
    task_type: str = "CAUSAL_LM"
    fan_in_fan_out: bool = False
    expert_lora: str = "per_expert"
    expert_count: int | None = None

    @classmethod
    def from_json(cls, path: str | Path) -> LoraConfig:
        """Read lora_config.json or adapter_config.json. Raises UserError that names the file and the field.

        path  of the file, or its contents: a JSON object
        """
        return cls.from_dict(*lora_fields(path))

    @classmethod
    def from_dict(cls, data: Mapping, where: str = "lora_config", *, trained: bool = False) -> LoraConfig:
        """Build it from the fields of a PEFT file. Raises UserError for a field that is unknown, unsupported or out of
        range.

        trained  they are of an adapter that exists: how it was initialised does not matter, what it is does
        """
        data = {**data}
        saved = data.get("modules_to_save")
        if _task(data.get("task_type")) in CLASSIFICATION and isinstance(saved, (list, tuple)):
            data["modules_to_save"] = [name for name in saved if name not in HEADS]  # the head is trained in any case
        known = {f.name for f in fields(cls)}
        values = {}
        remedy = "the adapter cannot be used" if trained else "remove the field"
        for name, value in data.items():
            if name in known:
                values[name] = value
            elif name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    raise UserError(f"{where}: {name} = {value!r} is not implemented", remedy)
            elif name not in _IGNORED and value not in (None, False, [], {}):
                raise UserError(f"{where}: unknown field {name!r}: megalora knows {', '.join(sorted(known))}", remedy)
        if str(data.get("peft_type", "LORA")).upper() != "LORA":
            raise UserError(
                f"{where}: peft_type = {data['peft_type']!r} is not implemented", "use an adapter of peft_type LORA"
            )
        _settle_init(values, where, trained)
        return cls(**_checked(values, where))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of an adapter_config.json that PEFT reads back as the same adapter."""
        out: dict[str, Any] = {"peft_type": "LORA"}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = (
                list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            )
        if self.expert_lora == "per_expert":
            del out["expert_lora"], out["expert_count"]
        if self.task_type in CLASSIFICATION:
            out["modules_to_save"] = [*HEADS, *(self.modules_to_save or ())]
        return out

    def resolve(
        self,
        model_type: str,
        linears: Mapping[str, int],
        ends: Sequence[str] = (),
        vocab_size: int = 0,
        without: Sequence[str] = (),
        apart: Collection[str] = (),
        stacks: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> ResolvedLora:
        """Return which linears of a model are adapted, and how.

        linears  the layer of each linear of the layers, by full name
        ends     full names of the head and the embedding
        without  full names of linears that cannot carry an adapter
        apart    full names of those of `linears` that "all-linear" leaves out: routers, and what peft refuses to adapt
        stacks   full name of each tensor that holds the weights of several linears -> their names
        Raises UserError where nothing matches, a name in the list matches nothing, or a layer index does not exist.
        """
        targets = () if self.target_modules is None and self.target_parameters else self.target_modules
        if targets is None:
            if model_type not in DEFAULT_TARGET_MODULES:
                said = f"lora_config: no default target_modules for model_type {model_type!r}"
                raise UserError(said, 'name them, or all: --lora_config \'{"target_modules": "all-linear"}\'')
            targets = DEFAULT_TARGET_MODULES[model_type]
            met = {name.rpartition(".")[2] for name in linears}
            targets = tuple(t for t in targets if t in met) or targets  # some are of another language model within it
        names = (*linears, *ends)
        short = sorted({name.rsplit(".", 1)[-1] for name in names})
        patterns = Patterns()
        if targets == "all-linear":
            matched = [n for n in linears if n not in apart]
        elif isinstance(targets, str):
            for name in without:
                if patterns.fits(targets, name):
                    raise UserError(
                        f"lora_config: target_modules {targets!r} matches {name}, which cannot carry an adapter",
                        "leave it out of the expression",
                    )
            matched = [n for n in names if patterns.fits(targets, n)]
        else:
            matched, ends_of_names = named(names, targets), set[str]().union(*map(ends_of, names))
            for target in targets:
                if target not in ends_of_names:
                    raise UserError(
                        f"lora_config: target_modules names {target!r}, which is no linear of this model",
                        f"choose among {', '.join(short)}",
                    )
        if self.layers_to_transform is not None:
            exactly = set() if isinstance(targets, str) else {*targets}  # as peft: a full name stands for itself
            chosen = self._check_layers(self.layers_to_transform, set(linears.values()))
            matched = [n for n in matched if n in exactly or linears.get(n) in chosen]
        stacked = self._of_parameters(model_type, stacks)
        matched = [*dict.fromkeys([*matched, *(n for n in linears if n in stacked)])]
        check_stacks(matched, stacks)
        excluded = self._excluded(matched, patterns)
        matched = [n for n in matched if n not in excluded]
        if not matched:
            raise UserError(
                f"lora_config: target_modules {self.target_modules!r} matches no linear of this model",
                f"choose among {', '.join(short)}",
            )
        self._check_patterns(names, patterns)
        saved = saved_modules(self.modules_to_save, ends)
        tokens = trained_tokens(self.trainable_token_indices, ends, vocab_size) if ends else {}
        matched = [n for n in matched if n not in saved]  # as peft: what is trained in full has no branch
        self._check_ends(set(matched) & set(ends), saved, tokens)
        return ResolvedLora(self, {name: self._adapter(name, patterns) for name in matched}, saved, tokens)

    @staticmethod
    def _check_layers(chosen: Collection[int], layers: Collection[int]) -> Collection[int]:
        """Return the layers that layers_to_transform names. Raises UserError for one that the model lacks."""
        missing = [i for i in chosen if i not in layers]
        if missing:
            raise UserError(
                f"lora_config: layers_to_transform names layer {missing[0]}, but the model has layers 0 to "
                f"{max(layers)}",
                "correct the index",
            )
        return chosen

    def _check_patterns(self, names: Sequence[str], patterns: Patterns) -> None:
        for field_name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field_name):
                if not any(patterns.fits_end(pattern, name) for name in names):  # one that is not adapted does no harm
                    said = f"{field_name} names {pattern!r}, which matches no linear of this model"
                    raise UserError(f"lora_config: {said}", "correct or remove the name")

    def _of_parameters(self, model_type: str, stacks: Mapping[str, Sequence[str]]) -> set[str]:
        """Return the linears whose weights the tensors of `target_parameters` hold."""
        found: set[str] = set()
        for target in self.target_parameters or ():
            named = [parts for name, parts in stacks.items() if name == target or name.endswith(f".{target}")]
            if not named:
                known = ", ".join(sorted({name.partition(".experts.")[2] for name in stacks}))
                choose = f"choose among experts.{known.replace(', ', ', experts.')}" if known else (
                    "name the linears of its experts in target_modules"
                )  # fmt: skip
                said = f"target_parameters names {target!r}, which holds no weights of experts of {model_type}"
                raise UserError(f"lora_config: {said}", choose)
            found |= {name for parts in named for name in parts}
        return found

    def _check_ends(self, adapted: Collection[str], saved: Collection[str], tokens: Collection[str]) -> None:
        for field_name in ("use_dora", "lora_bias"):
            if adapted and getattr(self, field_name):
                raise UserError(
                    f"lora_config: {field_name} = true is not implemented for {min(adapted)}",
                    "leave it out of target_modules, or train it in full with modules_to_save",
                )
        twice = (set(adapted) | set(saved)) & set(tokens)
        if twice:
            raise UserError(
                f"lora_config: {min(twice)} is in trainable_token_indices, and in target_modules or modules_to_save "
                "too",
                "train it in one of these ways",
            )

    def of_names(self, names: Sequence[str]) -> dict[str, Adapter]:
        """Return the adapter of each of `names`, which are adapted: where the model is not known."""
        patterns = Patterns()
        return {name: self._adapter(name, patterns) for name in names}

    def _adapter(self, name: str, patterns: Patterns) -> Adapter:
        r = int(patterns.value(self.rank_pattern, name, self.r))
        alpha = float(patterns.value(self.alpha_pattern, name, self.lora_alpha))
        scaling = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        return Adapter(r, scaling, self.lora_dropout, self.lora_bias, self.use_dora)

    def _excluded(self, names: Sequence[str], patterns: Patterns) -> set[str]:
        """Return which of these names exclude_modules means."""
        if isinstance(self.exclude_modules, str):
            return {name for name in names if patterns.fits(self.exclude_modules, name)}
        return set(named(names, self.exclude_modules or ()))


@dataclass(frozen=True)
class ResolvedLora:
    """A LoraConfig met with a model: the adapter of each adapted module, by full name.

    saved   names of modules that are trained in full; tokens: ids of tokens whose rows are, by name
    """

    config: LoraConfig
    adapters: Mapping[str, Adapter]
    saved: frozenset[str] = frozenset()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def words(self, name: str) -> WordsAdapter:
        """Return what is trained of the embedding or the head `name`."""
        return WordsAdapter(name in self.saved, self.tokens.get(name, ()), self.adapters.get(name))

    def adapter(self, name: str) -> Adapter | None:
        return self.adapters.get(name)

    def trains_bias(self, name: str) -> bool:
        """Return whether the bias of the linear `name` (adapted or not) is trained."""
        return self.config.bias == "all" or (self.config.bias == "lora_only" and name in self.adapters)


def _task(name: object) -> str:
    """Return a task as peft names it: the reference's documentation writes "CAUSAL LM"."""
    return str(name).upper().replace(" ", "_")


def _object(text: str) -> dict:
    try:
        found = json.loads(text, object_pairs_hook=unique_fields)
    except (ValueError, RecursionError) as error:
        remedy = 'write it like {"r": 16}, or name a file'
        raise UserError(f"lora_config {text:.200} is not JSON ({error})", remedy) from None
    return found  # an object: it begins with a brace


def lora_fields(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return (the fields of a lora_config.json, where they are from). path: of the file, or its contents."""
    if str(path).lstrip().startswith("{"):
        return _object(str(path)), "lora_config"
    return read_json(Path(path), "name an existing file, or correct this one", what="lora_config"), str(path)


def _settle_init(values: dict[str, Any], where: str, trained: bool) -> None:
    """Raise UserError for an init that is not implemented; one that has no effect on a trained adapter becomes True."""
    init = values.get("init_lora_weights")
    if not isinstance(init, str) or init in _INITS:
        return
    if init.lower().startswith(_CHANGE_BASE):
        if trained:
            raise UserError(
                f"{where}: init_lora_weights = {init!r}: the adapter is relative to a base that its start has changed",
                "convert it to a plain LoRA (megalora convert adapter to-lora with its initial adapter, or peft's "
                "save_pretrained with path_initial_model_for_weight_conversion)",
            )
        if init.lower().startswith(PREPARED):
            raise UserError(
                f"{where}: init_lora_weights = {init!r} changes the base weights",
                "make base and adapter with megalora convert adapter init, and train from these",
            )
    elif trained and init == "eva":
        values["init_lora_weights"] = True


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MOST_ALPHA


def _checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields as LoraConfig takes them. Raises UserError for a value out of range."""

    def need(name: str, good: bool, what: str) -> None:
        if name in values and not good:
            raise UserError(f"{where}: {name} = {values[name]!r:.200} is not valid", f"give {what}")

    v = values.get
    need("r", _is_rank(v("r")), f"a positive integer, at most {MOST_RANK}")
    need("lora_alpha", _is_alpha(v("lora_alpha")), f"a positive number, at most {MOST_ALPHA:g}")
    need("lora_dropout", _is_number(v("lora_dropout")) and 0 <= v("lora_dropout") < 1, "a number in [0, 1)")
    need("bias", v("bias") in ("none", "all", "lora_only"), "none, all or lora_only")
    init = v("init_lora_weights")
    need("init_lora_weights", isinstance(init, bool) or init in _INITS, f"true, false or {' or '.join(_INITS)}")
    for name in ("use_rslora", "inference_mode", "fan_in_fan_out", "use_dora", "lora_bias"):
        need(name, isinstance(v(name), bool), "true or false")
    check_field(values, need)
    _check_layers(values, need)
    _check_modules(values, need, where)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = v(name)
        if pattern is None:
            values.pop(name, None)
            continue
        whole = name == "rank_pattern"
        ok = isinstance(pattern, dict) and all(map(_is_rank if whole else _is_alpha, pattern.values()))
        most = MOST_RANK if whole else MOST_ALPHA
        need(name, ok, f"an object of positive numbers, at most {most:g}, by module name pattern")
        for key in pattern:
            check_pattern(key, f"{where}: {name}")
    odd = [r for r in (v("r") or LoraConfig.r, *(v("rank_pattern") or {}).values()) if r % 2]
    if init == "orthogonal" and odd:
        raise UserError(
            f"{where}: init_lora_weights = 'orthogonal' needs even ranks, and {odd[0]} is odd", "give an even rank"
        )
    if v("lora_bias") and (v("use_dora") or isinstance(init, str)):
        raise UserError(
            f"{where}: lora_bias = true goes with neither use_dora nor an init_lora_weights other than true and false, "
            "as in peft",
            "leave one out",
        )
    task = v("task_type")
    if task is None:
        values.pop("task_type", None)
    else:
        task = _task(task)
        need("task_type", task in TASKS, f"{' or '.join(TASKS)} (what megalora trains)")
        values["task_type"] = task
    return values


def _check_layers(values: dict[str, Any], need: Callable[[str, bool, str], None]) -> None:
    layers = values.get("layers_to_transform")
    if layers is None:
        return
    if isinstance(layers, int):
        layers = values["layers_to_transform"] = [layers]
    good = isinstance(layers, (list, tuple)) and 0 < len(layers) <= _MOST_LAYERS
    good = good and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < _MOST_LAYERS for i in layers)
    need("layers_to_transform", good, "a layer index or a list of them")
    values["layers_to_transform"] = tuple(sorted(set(layers)))


def _check_modules(values: dict[str, Any], need: Callable[[str, bool, str], None], where: str) -> None:
    if "trainable_token_indices" in values:
        values["trainable_token_indices"] = checked_tokens(values["trainable_token_indices"], where)
    for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
        modules = values.get(name)
        if isinstance(modules, (list, tuple, set)):
            empty = name != "target_modules" or bool(values.get("target_parameters"))
            good = (empty or len(modules) > 0) and all(isinstance(t, str) for t in modules)
            need(name, good, "a list of names")
            values[name] = tuple(sorted(modules)) or None
        elif modules is not None:
            good = isinstance(modules, str) and name not in ("modules_to_save", "target_parameters")
            need(name, good, "a list of names, all-linear or a regular expression")
            if modules != "all-linear" or name == "exclude_modules":
                check_pattern(modules, f"{where}: {name}")
