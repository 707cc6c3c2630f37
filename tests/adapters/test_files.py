"""The adapter file itself: what is damaged is refused, and a save is whole or did not happen."""

import hashlib
import json
import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from adapter_cases import assert_unchanged, perturb, small_model, values
from tolerances import EXACT, assert_close

import keras_loraplus as klp
from keras_loraplus.adapters import container, files

DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def test_any_safetensors_library_reads_the_file(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t/{dtype}": rng.normal(size=(3, 5)).astype(dtype) for dtype in DTYPES}
    tensors["scalar"] = np.asarray(2.5, "float32")
    tensors["transposed"] = rng.normal(size=(4, 3)).astype("float32").T
    path = tmp_path / "a.safetensors"
    files.write(path, files.AdapterFile({}, {}, "0", tensors, targets=["a", ".*b"]))
    theirs = safetensors.numpy.load_file(path)
    ours = files.read(path)
    assert ours.targets == ["a", ".*b"]
    assert theirs.keys() == ours.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        for found in (theirs[key], ours.tensors[key]):
            assert found.dtype == value.dtype and found.shape == value.shape
            assert_close(found, value, EXACT)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "keras_loraplus"
    with pytest.raises(ValueError, match="cannot be kept in an adapter file: .*complex128"):
        files.write(path, files.AdapterFile({}, {}, "0", {"c": np.ones(2, "complex128")}))
    assert files.read(path).tensors.keys() == tensors.keys()


def test_settings_and_samples_come_back(tmp_path):
    adapters = {f"layers.{i}": {"rank": 2 + i % 2, "alpha": 5, "init": "lora"} for i in range(6)}
    base = {f"layers.{i}/kernel": {"shape": [4, i % 2], "samples": f"s{i}"} for i in range(6)}
    path = tmp_path / "a.safetensors"
    files.write(path, files.AdapterFile(adapters, base, "0", {"a": np.ones(2)}))
    content = files.read(path)
    assert content.adapters == adapters and content.base == base


def truncated(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) - 10)


def a_pointer(path):
    with open(path, "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def empty(path):
    open(path, "w").close()


def somebody_elses(path):
    safetensors.numpy.save_file({"a": np.ones(2, "float32")}, path)


def a_later_format(path):
    content = files.read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "FORMAT_VERSION", 99)
        files.write(path, content)


def sealed(path, tensors, description):
    """Writes a file with a good seal, whatever it says."""
    metadata = {"format": files.FORMAT, "description": description}
    with open(path, "wb") as file:
        file.write(container.encoded(tensors, metadata))


def no_description(path):
    sealed(path, {"a": np.ones(2, "float32")}, '{"format_version": 2}')


def a_description_of_nothing(path):
    sealed(path, {"a": np.ones(2, "float32")}, "[")


def no_entries(path):
    content = files.read(path)
    content.tensors["layers.3/bias"] = np.ones((0,), "float32")
    with open(path, "wb") as file:
        file.write(container.encoded(content.tensors, files._metadata(content)))


def giant_shapes(path):
    """Claims 2**60 numbers and holds two."""
    header = {
        "__metadata__": {"sha256": "0" * 64},
        "a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    seal = hashlib.sha256(text).hexdigest().encode()
    text = text.replace(b"0" * 64, seal)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + bytes(8))


def a_flipped_payload_bit(path):
    flip(path, os.path.getsize(path) - 3, 1)


def another_alpha(path):
    with open(path, "rb") as file:
        data = file.read()
    place = re.search(rb"alpha[^0-9]*(5)", data).start(1)
    flip(path, place, 2)


def flip(path, place, bits):
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bits]))


WHOLE = "not a whole file of `keras_loraplus.save_adapter`: "


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncated, WHOLE + "its tensors are not those of its header"),
        (a_pointer, WHOLE + "it is cut off, or no safetensors file"),
        (empty, WHOLE + "it is cut off, or no safetensors file"),
        (somebody_elses, WHOLE + "it has no seal and was written by another program"),
        (a_later_format, "format version 99"),
        (a_flipped_payload_bit, "not what was written: layers.3/kernel. The file is damaged"),
        (another_alpha, WHOLE + "its header is not what was written"),
        (no_description, "lacks what one holds"),
        (a_description_of_nothing, "lacks what one holds"),
        (no_entries, "without entries: layers.3/bias; shape: layers.3/bias is .* damaged"),
        (giant_shapes, WHOLE + "its tensors are not those of its header"),
    ],
)
def test_what_is_not_an_adapter_file_is_said(saved, spoil, message):
    _, path = saved
    spoil(path)
    twin = small_model()
    before = values(twin)
    with pytest.raises(ValueError, match=message):
        klp.load_adapter(twin, path)
    assert_unchanged(twin, before)


def test_a_tensor_without_entries_is_refused(tmp_path):
    content = files.AdapterFile({}, {}, "0", {"a": np.zeros((0, 2), "float32")})
    with pytest.raises(ValueError, match="no tensors without entries"):
        files.write(tmp_path / "a.safetensors", content)
    assert not (tmp_path / "a.safetensors").exists()


def test_a_failed_save_leaves_the_old_file_and_no_other(saved, monkeypatch):
    model, path = saved
    with open(path, "rb") as file:
        old = file.read()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    perturb(model, seed=5)
    with pytest.raises(OSError, match="disk full"):
        klp.save_adapter(model, path)
    with open(path, "rb") as file:
        assert file.read() == old
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]


def test_the_file_has_the_rights_of_any_other(saved, tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert os.stat(saved[1]).st_mode == os.stat(plain).st_mode


def test_the_folder_is_flushed_after_the_file(saved, monkeypatch):
    """First the bytes, then the name; a folder that knows no fsync is no error."""
    model, path = saved
    events = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if folder else "file")
        if folder:
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    def rename(*names):
        events.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    klp.save_adapter(model, path)
    assert events == ["file", "rename", "folder"]
    klp.load_adapter(model, path)


def flipped(data, rng, other):
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]


def flipped_in_the_header(data, rng, other):
    end = 8 + int.from_bytes(data[:8], "little")
    return flipped(data[:end], rng, other) + data[end:]


def replaced(data, rng, other):
    place, count = int(rng.integers(len(data))), int(rng.integers(1, 30))
    return data[:place] + rng.bytes(count) + data[place + count :]


def cut(data, rng, other):
    return data[: int(rng.integers(len(data)))]


def appended(data, rng, other):
    return data + rng.bytes(int(rng.integers(1, 100)))


def zeroed(data, rng, other):
    place = int(rng.integers(len(data)))
    count = min(int(rng.integers(1, 100)), len(data) - place)
    return data[:place] + bytes(count) + data[place + count :]


def removed(data, rng, other):
    place = int(rng.integers(len(data)))
    return data[:place] + data[place + int(rng.integers(1, 50)) :]


def another_length(data, rng, other):
    return int(rng.integers(2**63)).to_bytes(8, "little") + data[8:]


def swapped_header(data, rng, other):
    """The header of one adapter on the numbers of another of the same shapes."""
    ends = [8 + int.from_bytes(whole[:8], "little") for whole in (data, other)]
    if rng.integers(2):
        return other[: ends[1]] + data[ends[0] :]
    return data[: ends[0]] + other[ends[1] :]


def swapped_tail(data, rng, other):
    place = int(rng.integers(1, min(len(data), len(other))))
    return data[:place] + other[place:]


DAMAGES = [
    flipped,
    flipped_in_the_header,
    replaced,
    cut,
    appended,
    zeroed,
    removed,
    another_length,
    swapped_header,
    swapped_tail,
]


def test_damage_and_misfit_are_one_error(saved):
    """Missing, unexpected, mis-shaped, not finite, without entries and damaged: one list."""
    _, path = saved
    content = files.read(path)
    content.tensors["layers.9/lora_kernel_a"] = content.tensors.pop("layers.0/lora_kernel_a")
    content.tensors["layers.1/lora_kernel_b"] = np.ones((2, 2), "float32")
    content.tensors["layers.3/bias"] = np.ones((0,), "float32")
    content.tensors["layers.1/bias"] = np.full((6,), np.inf, "float32")
    with open(path, "wb") as file:
        file.write(container.encoded(content.tensors, files._metadata(content)))
    flip(path, os.path.getsize(path) - 3, 1)
    for enabled in (False, True):
        twin = small_model()
        if enabled:
            klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
        before = values(twin)
        with pytest.raises(ValueError) as error:
            klp.load_adapter(twin, path)
        for fault in (
            "missing: layers.0/lora_kernel_a",
            "unexpected: layers.9/lora_kernel_a",
            "shape: layers.1/lora_kernel_b",
            "not finite: layers.1/bias",
            "without entries: layers.3/bias",
            "not what was written: ",
        ):
            assert fault in str(error.value)
        assert_unchanged(twin, before)
    with pytest.raises(ValueError, match="is damaged: without entries: layers.3/bias; not what"):
        klp.inspect_adapter(path)


@pytest.mark.timeout(120)
def test_each_of_5000_random_damages_is_the_documented_error(saved):
    model, path = saved
    with open(path, "rb") as file:
        whole = file.read()
    perturb(model, seed=8)
    klp.save_adapter(model, path)
    with open(path, "rb") as file:
        other = file.read()
    twin = small_model()
    klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
    before = values(twin)
    rng = np.random.default_rng(0)
    wholes, kinds = {whole, other}, dict.fromkeys(DAMAGES, 0)
    while sum(kinds.values()) < 5000:
        damage = DAMAGES[sum(kinds.values()) % len(DAMAGES)]
        data = damage(whole, rng, other)
        if data in wholes:
            continue  # zeroes written over zeroes
        kinds[damage] += 1
        with open(path, "wb") as file:
            file.write(data)
        with pytest.raises(ValueError, match="not a whole file of|file is damaged") as error:
            klp.load_adapter(twin, path)
        assert type(error.value) is ValueError, error.value
    assert set(kinds.values()) == {500}
    assert_unchanged(twin, before)
    for good in wholes:
        with open(path, "wb") as file:
            file.write(good)
        klp.load_adapter(twin, path)


KILLED_SAVES = """
import json, mmap, os, random, signal, sys, time, types

# The modules of the file alone, without the package's __init__ and so without Keras: a process
# without threads can be forked at will.
root, path, writer = sys.argv[1:]
for name in ("keras_loraplus", "keras_loraplus.adapters"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [os.path.join(root, *name.split("."))]
import numpy as np
from keras_loraplus.adapters import files
assert "keras" not in sys.modules
if writer == "in place":
    def write_in_place(path, data):
        with open(path, "wb") as file:
            file.write(data)
    files.write_atomically = write_in_place

def save(number):
    value = np.full((400, 400), number, "float32")
    files.write(path, files.AdapterFile({}, {}, str(number), {"a": value, "b": value + 1}))

def leftovers():
    return [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".tmp")]

random.seed(0)
progress = memoryview(mmap.mmap(-1, 16)).cast("q")  # shared: saves begun, saves done
found = {"kills": 0, "in_window": 0, "old": 0, "new": 0, "faults": []}
save(0)
# Where a disk is fast, the window is a small part of a save: more kills, until 100 have hit it.
enough = 0 if writer == "in place" else 100
longest = 0.012  # seconds; follows what a save takes on this machine, with its load
while found["kills"] < 200 or (found["in_window"] < enough and found["kills"] < 2000):
    child = os.fork()
    if child == 0:
        while True:
            progress[0] += 1
            save(progress[0])
            progress[1] = progress[0]
    before = progress[1]
    time.sleep(random.uniform(0.0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    begun, done = progress
    found["kills"] += 1
    # The temporary file stands from its opening to the rename.
    left = leftovers()
    found["in_window"] += len(left)
    too_early = done == before and not left
    longest = min(longest * 1.1, 0.5) if too_early else max(longest * 0.95, 0.003)
    try:
        content = files.read(path)
        number = int(content.library_version)
        same = (content.tensors["a"] == number).all() and (content.tensors["b"] == number + 1).all()
        if not same or number not in {done, begun} or (left and number != done) or len(left) > 1:
            found["faults"].append([number, begun, done, left])
        found["new" if number == begun else "old"] += 1
    except Exception as error:
        found["faults"].append(repr(error))
        number = done
    for name in left:
        os.remove(os.path.join(os.path.dirname(path), name))
    progress[0] = progress[1] = number
print(json.dumps(found))
"""


def killed_saves(tmp_path, writer):
    root = os.path.dirname(os.path.dirname(klp.__file__))
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SAVES, root, str(tmp_path / "a.safetensors"), writer],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path):
    found = killed_saves(tmp_path, "as it is")
    assert found["faults"] == []
    assert found["kills"] >= 200 and found["old"] + found["new"] == found["kills"]
    assert found["in_window"] >= 100, found


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")
def test_the_kills_break_a_save_in_place(tmp_path):
    """The control: the same kills do find a save that is not atomic."""
    assert killed_saves(tmp_path, "in place")["faults"]
