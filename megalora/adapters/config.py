"""What is adapted and how: PEFT's LoraConfig, read strictly.

Every field that changes the numbers of a LoRA on a linear layer is honoured; any other that is set is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megalora.adapters.lora import Adapter
from megalora.adapters.targets import DEFAULT_TARGET_MODULES
from megalora.choices import TASKS
from megalora.errors import UserError
from megalora.files import read_json

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
    "modules_to_save": (None, []),
    "exclude_modules": (None, []),
    "layer_replication": (None,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False,),
    "layers_pattern": (None, [], "layers", ["layers"]),
}


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig, the fields that mean something for a linear layer, by the same names.

    target_modules    None: the default of the model_type; names (a module matches when its name is one of them or
                      ends in "." + one); "all-linear": every linear but the head; any other string: a regular
                      expression over the whole module name
    r, lora_alpha     rank and scale; rank_pattern and alpha_pattern map a pattern of module names to other values
    use_rslora        s = alpha / sqrt(r) instead of alpha / r
    bias              which biases are trained: "none", "all", or "lora_only", those of adapted modules
    init_lora_weights True: A uniform (Kaiming, a = sqrt 5), B zero; "gaussian": A normal with deviation 1 / r, B zero;
                      False: both uniform
    inference_mode    the adapter is for use, not for training
    fan_in_fan_out    adapted weights are [in, out] in the model's file (GPT-2): told by the model, it need not be given
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    bias: str = "none"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    init_lora_weights: bool | str = True
    inference_mode: bool = False
    task_type: str = "CAUSAL_LM"
    fan_in_fan_out: bool = False

    @classmethod
    def from_json(cls, path: str | Path) -> LoraConfig:
        """Reads lora_config.json or adapter_config.json. Raises UserError that names the file and the field."""
        data = read_json(Path(path), "name an existing file, or correct this one", what="lora_config")
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Mapping, where: str = "lora_config") -> LoraConfig:
        """From the fields of a PEFT file. Raises UserError for a field that is unknown, unsupported or out of range."""
        known = {f.name for f in fields(cls)}
        values = {}
        for name, value in data.items():
            if name in known:
                values[name] = value
            elif name in _NEUTRAL:
                if value not in _NEUTRAL[name]:
                    raise UserError(f"{where}: {name} = {value!r} is not supported: remove the field")
            elif name not in _IGNORED and value not in (None, False, [], {}):
                raise UserError(
                    f"{where}: unknown field {name!r}: megalora knows {', '.join(sorted(known))}; remove it"
                )
        if str(data.get("peft_type", "LORA")).upper() != "LORA":
            raise UserError(f"{where}: peft_type = {data['peft_type']!r}: only LORA adapters can be used")
        return cls._checked(values, where)

    @classmethod
    def _checked(cls, values: dict, where: str) -> LoraConfig:
        def need(name: str, good: bool, what: str) -> None:
            if name in values and not good:
                raise UserError(f"{where}: {name} = {values[name]!r}: must be {what}")

        def number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        def positive_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        v = values.get
        need("r", positive_int(v("r")), "a positive integer")
        need("lora_alpha", number(v("lora_alpha")) and 0 < v("lora_alpha") < math.inf, "a positive number")
        need("lora_dropout", number(v("lora_dropout")) and 0 <= v("lora_dropout") < 1, "a number in [0, 1)")
        need("bias", v("bias") in ("none", "all", "lora_only"), "none, all or lora_only")
        need(
            "init_lora_weights",
            v("init_lora_weights") in (True, False, "gaussian"),
            "true, false or gaussian",
        )
        for name in ("use_rslora", "inference_mode", "fan_in_fan_out"):
            need(name, isinstance(v(name), bool), "true or false")
        if isinstance(v("layers_to_transform"), int):
            values["layers_to_transform"] = [v("layers_to_transform")]
        layers = v("layers_to_transform")
        if layers is not None:
            good = (
                isinstance(layers, (list, tuple))
                and len(layers) > 0
                and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
            )
            need("layers_to_transform", good, "a layer index or a list of them")
            values["layers_to_transform"] = tuple(sorted(set(layers)))
        targets = v("target_modules")
        if isinstance(targets, (list, tuple, set)):
            need(
                "target_modules",
                len(targets) > 0 and all(isinstance(t, str) for t in targets),
                "a list of names",
            )
            values["target_modules"] = tuple(sorted(targets))
        elif targets is not None:
            need(
                "target_modules",
                isinstance(targets, str),
                "a list of names, all-linear or a regular expression",
            )
            if targets != "all-linear":
                _compiled(targets, f"{where}: target_modules")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = v(name)
            if pattern is None:
                values.pop(name, None)
                continue
            ok = isinstance(pattern, dict) and all(
                (positive_int(x) if name == "rank_pattern" else number(x) and x > 0) for x in pattern.values()
            )
            need(name, ok, "an object of positive numbers by module name pattern")
            for key in pattern:
                _compiled(key, f"{where}: {name}")
        task = v("task_type")
        if task is None:
            values.pop("task_type", None)
        else:  # the reference's documentation writes "CAUSAL LM"
            task = str(task).upper().replace(" ", "_")
            need("task_type", task in TASKS, f"{' or '.join(TASKS)} (what megalora trains)")
            values["task_type"] = task
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields of an adapter_config.json that PEFT reads back as the same adapter."""
        out: dict[str, Any] = {"peft_type": "LORA"}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = (
                list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
            )
        return out

    def resolve(self, model_type: str, linears: Mapping[str, int], ends: Sequence[str] = ()) -> ResolvedLora:
        """Return which linears of a model are adapted, and how.

        linears  the layer of each linear that can carry an adapter, by full name
        ends     names of the embedding and the head, which cannot
        Raises UserError where nothing matches, a name in the list matches nothing, or a layer index does not exist.
        """
        targets = self.target_modules
        if targets is None:
            if model_type not in DEFAULT_TARGET_MODULES:
                raise UserError(f"lora_config: no default target_modules for model_type {model_type!r}: name them")
            targets = DEFAULT_TARGET_MODULES[model_type]
        short = sorted({name.rsplit(".", 1)[-1] for name in linears})
        if isinstance(targets, str):
            pattern = None if targets == "all-linear" else _compiled(targets, "lora_config: target_modules")
            matched = [n for n in linears if pattern is None or pattern.fullmatch(n)]
            for name in ends:
                if pattern is not None and pattern.fullmatch(name):
                    raise UserError(
                        f"lora_config: target_modules {targets!r} matches {name}, which cannot carry an adapter: "
                        f"leave it out of the expression"
                    )
        else:
            matched = [n for n in linears if any(n == t or n.endswith("." + t) for t in targets)]
            for target in targets:
                if not any(n == target or n.endswith("." + target) for n in linears):
                    raise UserError(
                        f"lora_config: target_modules names {target!r}, which is no linear of this model: "
                        f"choose among {', '.join(short)}"
                    )
        if self.layers_to_transform is not None:
            layers = set(linears.values())
            missing = [i for i in self.layers_to_transform if i not in layers]
            if missing:
                raise UserError(
                    f"lora_config: layers_to_transform names layer {missing[0]}, but the model has layers "
                    f"0 to {max(layers)}: correct the index"
                )
            exactly = () if isinstance(targets, str) else targets  # as peft: a full name stands for itself
            matched = [n for n in matched if n in exactly or linears[n] in self.layers_to_transform]
        if not matched:
            raise UserError(
                f"lora_config: target_modules {self.target_modules!r} matches no linear of this model: "
                f"choose among {', '.join(short)}"
            )
        for field_name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field_name):
                if not any(_matches(pattern, name) for name in linears):  # one that is not adapted does no harm
                    said = f"{field_name} names {pattern!r}, which matches no linear of this model"
                    raise UserError(f"lora_config: {said}: correct it")
        return ResolvedLora(self, {name: self._adapter(name) for name in matched})

    def _adapter(self, name: str) -> Adapter:
        r = int(_by_pattern(self.rank_pattern, name, self.r))
        alpha = float(_by_pattern(self.alpha_pattern, name, self.lora_alpha))
        return Adapter(r, alpha / math.sqrt(r) if self.use_rslora else alpha / r, self.lora_dropout)


@dataclass(frozen=True)
class ResolvedLora:
    """A LoraConfig met with a model: the adapter of each adapted linear, by full module name."""

    config: LoraConfig
    adapters: Mapping[str, Adapter]

    def adapter(self, name: str) -> Adapter | None:
        return self.adapters.get(name)

    def trains_bias(self, name: str) -> bool:
        """Whether the bias of the linear `name` (adapted or not) is trained."""
        return self.config.bias == "all" or (self.config.bias == "lora_only" and name in self.adapters)


def _compiled(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression ({error}): mend it") from None


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule: a regular expression for the whole name, or for its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
