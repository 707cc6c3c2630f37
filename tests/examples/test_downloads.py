"""The download code on a wheel made here; no network."""

import hashlib
import zipfile

import pytest

from text_classification.console import InputError
from text_classification.downloads import Wheel, fetch


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "fake-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake/data/part-a.txt", "a")
        archive.writestr("fake/data/other.txt", "b")
        archive.writestr("fake/code.py", "raise SystemExit")
    return path


def wheel_of(path, **changes):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"requirement": "fake==1.0", "sha256": digest, "folder": "fake/data"}
    return Wheel(**{**settings, **changes})


def downloader(source, calls):
    def download(requirement, folder):
        calls.append(requirement)
        (folder / source.name).write_bytes(source.read_bytes())

    return download


def test_unpacks_the_wanted_files_once(source, tmp_path):
    calls = []
    wheel = wheel_of(source, prefix="part-")
    for _ in range(2):
        folder = fetch(wheel, tmp_path / "cache", downloader(source, calls))
        assert (folder / "part-a.txt").read_text() == "a"
    assert [path.name for path in folder.iterdir()] == ["part-a.txt"]
    assert calls == ["fake==1.0"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_file_is_refused_and_nothing_kept(source, tmp_path):
    wheel = wheel_of(source, sha256="0" * 64)
    with pytest.raises(InputError, match="expected SHA-256 0000.*got " + wheel_of(source).sha256):
        fetch(wheel, tmp_path / "cache", downloader(source, []))
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_download_is_started_again(source, tmp_path):
    def fail(requirement, folder):
        (folder / source.name).write_bytes(b"half")
        raise InputError("no network")

    with pytest.raises(InputError, match="no network"):
        fetch(wheel_of(source), tmp_path / "cache", fail)
    folder = fetch(wheel_of(source), tmp_path / "cache", downloader(source, []))
    assert (folder / "part-a.txt").exists()


def test_a_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the cache"):
        fetch(wheel_of(source), tmp_path / "file", downloader(source, []))
