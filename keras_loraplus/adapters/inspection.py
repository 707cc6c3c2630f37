"""Shows what an adapter file holds, without a model."""

import dataclasses
from typing import Any

from keras_loraplus.adapters import files

_SETTINGS = ("rank", "alpha", "scaling", "init", "dropout")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The content of an adapter file; `print` shows it as a table.

    Attributes:
        path: The file.
        library_version: Version of keras_loraplus that wrote it.
        adapters: Dict from layer path to the settings of its adapter.
        targets: The `targets` that the model was enabled with; None for the default.
        tensors: Dict from key to (dtype, shape).
        parameters: Number of entries in all tensors.
    """

    path: str
    library_version: str
    adapters: dict
    targets: Any
    tensors: dict
    parameters: int

    def __str__(self):
        """Returns the tables of adapters and tensors."""
        lines = [f"{self.path}: written by keras_loraplus {self.library_version}"]
        for layer, spec in self.adapters.items():
            settings = ", ".join(f"{name} {spec[name]}" for name in _SETTINGS)
            lines.append(f"  {layer}: {settings}")
        if self.targets is not None:
            lines.append(f"  targets: {self.targets}")
        width = max(len(key) for key in self.tensors)
        for key, (dtype, shape) in self.tensors.items():
            lines.append(f"  {key.ljust(width)}  {dtype}  {' x '.join(map(str, shape))}")
        lines.append(f"{len(self.tensors)} tensors, {self.parameters:,} parameters")
        return "\n".join(lines)


def inspect_adapter(path):
    """Returns what an adapter file holds, without building a model.

    Args:
        path: A file of `save_adapter`.

    Returns:
        An `Inspection`; `print` shows it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another format.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> path = klp.save_adapter(model, os.path.join(tempfile.mkdtemp(), "a.safetensors"))
        >>> klp.inspect_adapter(path).adapters["layers.0"]["rank"]
        2

    Source: the safetensors format, version 0.4 and later.
    """
    content = files.read(path)
    return Inspection(
        path=str(path),
        library_version=content.library_version,
        adapters=content.adapters,
        targets=content.targets,
        tensors={
            key: (str(value.dtype), value.shape) for key, value in sorted(content.tensors.items())
        },
        parameters=sum(value.size for value in content.tensors.values()),
    )
