"""Files that are written whole or not at all, and that are known to be writable before the work that fills them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk, so that a rename which follows cannot outlive what it renames."""
    if path.is_dir() and os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, waits for the disk, then renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


# ---- checked before the work ----


def check_folder(folder: Path, what: str) -> None:
    """Makes the folder where it is missing, and raises OSError where no file can be made in it.

    A file is made in it and removed: permissions alone do not show a read-only or a full disk.

    Args:
        what: the command and the option, for the message: "sample: --out".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".genfast-") as probe:
            probe.write(b"genfast")
            probe.flush()
    except OSError as error:
        raise OSError(f"{what}: the folder {str(folder)!r} cannot be written to: {error.strerror or error}") from error


def check_file(path: Path, what: str) -> None:
    """Raises OSError where a file of this name could not be written.

    Raises:
        IsADirectoryError: it is a folder. FileExistsError: it is neither a file nor a folder, a device or a pipe.
        OSError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{what}={str(path)!r} is a folder, expected the name of a file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{what}={str(path)!r} is no regular file, and would be replaced by one")
    check_folder(path.parent, what)


def check_picture(path: Path, what: str, *, plot: bool = False) -> None:
    """Raises ValueError where no picture can be written under this name for its extension; else as :func:`check_file`.

    Args:
        plot: matplotlib writes it, else Pillow.
    """
    if plot:
        from matplotlib.backend_bases import FigureCanvasBase

        known = {f".{suffix}" for suffix in FigureCanvasBase.get_supported_filetypes()}
    else:
        from PIL import Image

        Image.init()
        known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise ValueError(
            f"{what}={str(path)!r} has the extension {path.suffix!r}, expected that of a picture: .png, .jpg, .webp"
        )
    check_file(path, what)
