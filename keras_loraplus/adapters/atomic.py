"""Writes a file whole or not at all, whatever happens to the process or the machine."""

import contextlib
import errno
import os
import secrets

# What file systems answer that know no fsync of a folder, or that forbid to open it for reading.
_NO_FOLDER_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


def write_atomically(path, data):
    """Writes bytes to a file that is the old one or the new one at every moment.

    They go to a temporary file in the same folder, which is flushed to the disk and renamed; then
    the folder is flushed, so that the new name outlives a power failure. A process that is killed
    meanwhile leaves a file `.adapter-*.tmp` behind. Nothing ever reads such a file, and once no
    save is running it can be deleted; a save does not do that itself, because it cannot tell a
    leftover from what another process is writing.

    Args:
        path: Where to write.
        data: What to write.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If writing fails; the old file is as it was.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"The folder of '{path}' does not exist: '{folder}'. Make it first."
        )
    # Not `tempfile`, whose files only their owner may read: an adapter is a file like any other.
    temporary = os.path.join(folder, f".adapter-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _flush_folder(folder)


def _flush_folder(folder):
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
