"""What a Hugging Face checkpoint folder says of its tensors, read from headers alone."""

import dataclasses
import json
import pathlib
import struct


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The configuration and the tensor shapes of a Hugging Face checkpoint.

    Attributes:
        config: The content of `config.json`.
        shapes: Dict from key to shape.
    """

    config: dict
    shapes: dict


def read_checkpoint(folder):
    """Reads `config.json` and the headers of the safetensors files of a folder.

    Args:
        folder: A folder in the format of `transformers`' `save_pretrained`.

    Returns:
        A `Checkpoint`.

    Raises:
        ValueError: If it is not such a folder. KerasHub's own converters read safetensors only.
    """
    path = pathlib.Path(folder)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise ValueError(
            f"Expected a Hugging Face checkpoint folder with config.json and safetensors files. "
            f"Received: {str(folder)!r}. Pass checkpoint='FOLDER', the one that the backbone was "
            "loaded from; only its headers are read."
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        shapes: dict = {}
        for file in _files(path):
            shapes.update(_header(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"The checkpoint '{folder}' cannot be read: {error}") from error
    return Checkpoint(config, shapes)


def _files(path):
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    single = path / "model.safetensors"
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


def _header(file):
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is not a whole safetensors file")
        header = json.loads(stream.read(length))
    return {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
