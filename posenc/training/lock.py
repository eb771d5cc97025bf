"""A folder for one process at a time, by a lock of the operating system's.

It ends with the process that holds it, however that ends, so that nothing is left to clean up after
a kill. The file beside it only says who holds it: nobody is refused because of what it says.
"""

import errno
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)
_BEYOND = 1 << 20  # Windows locks bytes against reading too: not those of the note


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Be the only process that holds an existing folder.

    Where the file system has no locks, a warning says that nobody is kept out.

    Raises:
        ValueError: another process holds it; its pid, its host and since when are named.
        OSError: nothing can be written there.
    """
    path = folder / LOCK
    descriptor = _open_locked(path)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        note = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        os.ftruncate(descriptor, 0)
        os.write(descriptor, note.encode())
        yield
    finally:
        if sys.platform == "win32":  # which deletes no open file
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(descriptor, path):
                note = " ".join(os.read(descriptor, 1000).decode(errors="replace").split())
                raise ValueError(
                    f"{path.parent} is in use by {note or 'another process'}. "
                    "Wait for its end, stop it, or choose another folder."
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder deleted it in between: a lock on it keeps nobody out


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _BEYOND, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            os.lseek(descriptor, 0, os.SEEK_SET)
            return False
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}): "
            "see to it that no second process writes there.",
            stacklevel=4,
        )
    return True
