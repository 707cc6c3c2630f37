"""Reads, checks and writes PEFT's `adapter_config.json`."""

import dataclasses
import json
import math
import pathlib
import re

# Fields that say nothing of the adapter's product, or that the tensors themselves say.
_INFORMATIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_USED = {
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
# Of `init_lora_weights`: those that leave the base model as it is.
_INITS = (True, False, None, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What this library uses of a PEFT configuration.

    Attributes:
        rank: The rank of modules that no pattern matches.
        alpha: Their alpha.
        rank_pattern: Dict from pattern to rank.
        alpha_pattern: Dict from pattern to alpha.
        rslora: Whether the scale is alpha / sqrt(r), not alpha / r.
        dropout: Rate of the adapter's dropout.
        fan_in_fan_out: Whether the adapted matrices are (inputs, outputs).
        modules_to_save: Names of modules that are saved whole.
        bias: Which biases of the base model were trained: `"none"`, `"all"` or `"lora_only"`, those
            of the modules that have adapters.
        base: Name or folder of the base model, or None.
        all_targeted: Whether every module of a targeted name has an adapter: names are listed, and
            no layers are chosen or left out.
    """

    rank: int
    alpha: float
    rank_pattern: dict
    alpha_pattern: dict
    rslora: bool
    dropout: float
    fan_in_fan_out: bool
    modules_to_save: tuple
    bias: str
    base: str | None
    all_targeted: bool

    def rank_of(self, module):
        """Returns the rank of a module."""
        return _matching(self.rank_pattern, module, self.rank)

    def alpha_of(self, module):
        """Returns the alpha of a module."""
        return _matching(self.alpha_pattern, module, self.alpha)

    @property
    def scaling(self):
        """The name of the scaling, as `enable_lora_plus` has it."""
        return "rslora" if self.rslora else "standard"


def _matching(patterns, module, default):
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_config(folder):
    """Reads `adapter_config.json` and refuses what has no meaning here.

    Args:
        folder: A PEFT folder.

    Returns:
        A `PeftConfig`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it asks for something that this library does not do.
    """
    path = pathlib.Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}': '{folder}' is not a PEFT folder.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise ValueError(f"'{path}' is not a JSON object: {error}") from error
    faults = _faults(fields)
    if faults:
        raise ValueError(
            f"'{path}' cannot be used; nothing was loaded. " + "; ".join(faults) + ". Convert the "
            "adapter to a plain LoRA adapter with PEFT first, or merge it into its base model."
        )
    return PeftConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        rslora=bool(fields.get("use_rslora")),
        dropout=fields.get("lora_dropout") or 0.0,
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        bias=fields.get("bias", "none"),
        base=fields.get("base_model_name_or_path"),
        all_targeted=_all_targeted(fields),
    )


def _all_targeted(fields):
    targets = fields.get("target_modules")
    chosen = fields.get("layers_to_transform") or fields.get("exclude_modules")
    return isinstance(targets, list) and not chosen and all("." not in name for name in targets)


def _faults(fields):
    faults = []
    if fields.get("peft_type") != "LORA":
        faults.append(f"peft_type must be 'LORA', received {fields.get('peft_type')!r}")
    init = fields.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        faults.append(
            f"init_lora_weights={init!r} changed the base model's weights or is unknown; "
            f"known are {list(_INITS)}"
        )
    if fields.get("bias", "none") not in ("none", "all", "lora_only"):
        faults.append(f"bias must be 'none', 'all' or 'lora_only', received {fields.get('bias')!r}")
    for name in ("r", "lora_alpha"):
        if not _positive(fields.get(name), whole=name == "r"):
            faults.append(f"{name} must be a positive number, received {fields.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        faults += _pattern_faults(name, fields.get(name) or {})
    dropout = fields.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        faults.append(f"lora_dropout must be from 0 up to but not 1, received {dropout!r}")
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        faults.append(f"modules_to_save must be a list of names, received {saved!r}")
    for name, value in sorted(fields.items()):
        # None, False and what is empty switch a feature off.
        if name not in _USED | _INFORMATIVE and value not in (None, False, "", [], {}):
            faults.append(f"{name}={value!r} has no meaning here")
        elif name not in _USED | _INFORMATIVE and value is not False and value == 0:
            faults.append(f"{name}={value!r} has no meaning here")
    return faults


def _pattern_faults(name, patterns):
    if not isinstance(patterns, dict):
        return [f"{name} must be an object, received {patterns!r}"]
    faults = []
    for pattern, value in patterns.items():
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            faults.append(f"{name} holds {pattern!r}, which is no regular expression: {error}")
        if not _positive(value, whole=name == "rank_pattern"):
            faults.append(f"{name} has {value!r} for {pattern!r}")
    return faults


def _positive(value, whole):
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) and value > 0


def config_text(
    *, base, task_type, modules, scales, dropout, rslora, transposed, saved, targets, biases
):
    """Returns the text of an `adapter_config.json`.

    Args:
        base: `base_model_name_or_path`.
        task_type: PEFT's task type, or None.
        modules: Dict from module to rank.
        scales: Dict from module to the factor on B A.
        dropout: Rate of the adapters' dropout.
        rslora: Whether to say alpha for a scale of alpha / sqrt(r).
        transposed: `fan_in_fan_out`.
        saved: `modules_to_save`.
        targets: `target_modules`.
        biases: Whether the biases of the adapted modules are written.
    """
    alphas = {
        module: _plain(scales[module] * (math.sqrt(rank) if rslora else rank))
        for module, rank in modules.items()
    }
    rank, alpha = _most_common(modules.values()), _most_common(alphas.values())
    fields = {
        "alpha_pattern": {re.escape(m): a for m, a in alphas.items() if a != alpha},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(m): r for m, r in modules.items() if r != rank},
        "revision": None,
        "target_modules": sorted(targets),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": rslora,
    }
    return json.dumps(fields, indent=2)


def _plain(value):
    """Returns a number without the last bits that a product and a quotient leave."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) and near > 0 else value


def _most_common(values):
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)
