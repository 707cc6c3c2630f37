"""`python -m keras_loraplus sweep`: the learning rates of a text classifier, from a TOML file."""

import dataclasses
import importlib.util
import os
import pathlib
import tomllib
from typing import Any

from keras_loraplus.tuning import text
from keras_loraplus.tuning.cells import Cell, plan_axes
from keras_loraplus.tuning.suggestion import suggest


@dataclasses.dataclass(frozen=True)
class Config:
    """What a configuration file may say. Paths are relative to the working folder.

    Attributes:
        data: Folder with the texts, as of `text.read_task`.
        preset: A KerasHub preset, or a folder.
        storage: SQLite file that the sweep is kept in, by which it goes on where it stopped.
        output: JSON file that the result is written to.
        eta_a: Rates of A.
        eta_b: Rates of B; this or `lr_ratio`.
        lr_ratio: Rates of B over those of A.
        head_rate: Rate of the head, or rates; this or `head_ratio`.
        head_ratio: Rates of the head over those of A.
        lora: Whether plain LoRA is tuned as well, with as many cells.
        full: Rates for full fine-tuning, which is left out without them.
        rank: Rank of the adapters.
        targets: Layers to adapt, as of `enable_lora_plus`.
        init: `"loraplus"` or `"lora"`.
        seeds: Seeds that each cell is tried with.
        epochs: Epochs a cell.
        batch_size: Texts a step.
        sequence_length: Tokens a text is cut or padded to.
        schedule: `"linear"` or `"constant"`.
        dtype: Dtype policy of the model.
        train_texts: How many texts to train on at most; 0 for all.
        validation_texts: How many to select by at most.
        test_texts: How many to measure the selected cells with at most.
        name: Name of the task; None for that of the data's folder.
    """

    data: str
    preset: str
    storage: str
    output: str
    eta_a: Any
    eta_b: Any = None
    lr_ratio: Any = None
    head_rate: Any = None
    head_ratio: Any = None
    lora: bool = True
    full: Any = None
    rank: int = 8
    targets: Any = None
    init: str = "loraplus"
    seeds: Any = (0,)
    epochs: int = 1
    batch_size: int = 16
    sequence_length: int = 128
    schedule: str = "linear"
    dtype: str = "float32"
    train_texts: int = 0
    validation_texts: int = 0
    test_texts: int = 0
    name: str | None = None


_STRINGS = ("data", "preset", "storage", "output", "dtype", "name")
_COUNTS = ("rank", "epochs", "batch_size", "sequence_length")
_LIMITS = ("train_texts", "validation_texts", "test_texts")
_RATES = ("eta_a", "eta_b", "lr_ratio", "head_rate", "head_ratio")
_CHOICES = {"init": ("loraplus", "lora"), "schedule": ("linear", "constant"), "lora": (True, False)}


def read_config(path: Any) -> Config:
    """Returns the checked configuration in a file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no TOML, lacks a key, or has one that is unknown or of another type.
    """
    try:
        given = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no TOML: {error}") from error
    fields = dataclasses.fields(Config)
    known = [field.name for field in fields]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{path}: unknown keys {unknown}; the keys are {', '.join(known)}")
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{path}: missing keys {missing}")
    for key, value in given.items():
        expected = _expected(key, value)
        if expected:
            raise ValueError(f"{path}: {key!r} must be {expected}. Received: {value!r}")
    config = Config(**given)
    if config.head_rate is None and config.head_ratio is None:
        raise ValueError(
            f"{path}: the new head's rate is missing: give 'head_rate', or 'head_ratio' (over "
            "eta_a)"
        )
    try:
        plan_axes(**_axes(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _expected(key: str, value: Any) -> str | None:
    """Returns what a value should have been, or None if it is that; rates are left to the sweep."""
    if key in _STRINGS:
        return None if isinstance(value, str) and value else "a text that is not empty"
    if key in _COUNTS:
        return None if _is_whole(value, 1) else "a whole number >= 1"
    if key in _LIMITS:
        return None if _is_whole(value, 0) else "a whole number, 0 for all texts"
    if key in _CHOICES:
        choices = _CHOICES[key]
        fits = any(value is c or (isinstance(c, str) and value == c) for c in choices)
        return None if fits else f"one of {choices}"
    if key == "seeds":
        listed = value if isinstance(value, list) else []
        whole = [seed for seed in listed if _is_whole(seed, 0)]
        fits = bool(listed) and len(set(whole)) == len(listed)
        return None if fits else "a list of different whole numbers >= 0"
    if key == "targets":
        listed = value if isinstance(value, list) else [value]
        fits = bool(listed) and all(isinstance(target, str) and target for target in listed)
        return None if fits else "a text or a list of texts"
    return None


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _axes(config: Config) -> dict[str, Any]:
    full = None if config.full is None else {"eta_a": config.full}
    return {**{name: getattr(config, name) for name in _RATES}, "lora": config.lora, "full": full}


def run(path: Any, retry_failed: bool = False) -> None:
    """Sweeps as a file says, writes the result, and prints it with what to start from.

    Started again with the same file it goes on where it stopped; several processes may do so.

    Args:
        path: The configuration.
        retry_failed: Whether to try cells again that an earlier run recorded as failed.

    Raises:
        ImportError: If Optuna or KerasHub is not installed.
        OSError: If a file cannot be read or written.
        ValueError: If the configuration, the texts or the model do not fit; before the sweep. Or
            if each cell failed.
    """
    config = read_config(path)
    for package, extra in (("optuna", "tuning"), ("keras_hub", "hub")):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"This needs {package}: pip install 'keras-loraplus[{extra}]'.")
    for key in ("storage", "output"):
        folder = pathlib.Path(getattr(config, key)).parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: {key!r}: there is no folder '{folder}'")
    limits = {key: getattr(config, key) for key in _LIMITS}
    task = text.read_task(config.data, config.name, **limits)
    build = text.Builder(
        config.preset, len(task.classes), config.rank, config.targets, config.init, config.dtype
    )
    _try_out(task, build, config.sequence_length)
    names = ("epochs", "batch_size", "schedule", "storage")
    settings = {**{name: getattr(config, name) for name in names}, "seeds": list(config.seeds)}
    try:
        result = text.sweep_task(
            task,
            build,
            config.sequence_length,
            retry_failed=retry_failed,
            **_axes(config),
            **settings,
        )
    except RuntimeError as error:
        raise ValueError(f"{error} (--retry-failed tries them again)") from error
    result.save(config.output)
    print(result)
    if any(result.selected(arm) for arm in ("loraplus", "lora")):
        print(f"\nTo start from:\n{suggest(result)}")
    print(f"\nWritten: {os.fspath(config.output)}")


def _try_out(task: text.Task, build: text.Builder, sequence_length: int) -> None:
    """Builds one model and calls it, so that what does not fit is not found cell by cell.

    Raises:
        ValueError: If the preset, the targets, the dtype or the sequence length do not fit.
    """
    inputs, _ = text.encode(build.preset, task.train.take([0]), sequence_length)
    try:
        build(Cell("loraplus", 1.0, 1.0, 1.0, seed=0))(inputs)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # as many kinds as there are backends
        raise ValueError(
            f"The model of {build.preset!r} cannot be called with {sequence_length} tokens in "
            f"{build.dtype}: {str(error)[:300]}"
        ) from error
