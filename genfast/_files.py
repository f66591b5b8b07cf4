"""Files that are written whole or not at all, and that are known to be writable before the work that fills them."""

from __future__ import annotations

import contextlib
import errno
import io
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
    """Raises OSError where no file can be made in a folder, which may have to be made itself; leaves nothing behind.

    A file is made in it and removed: permissions alone do not show a read-only or a full disk.

    Args:
        what: the command and the option, for the message: "sample: --out".
    """
    missing: list[Path] = []
    try:
        for path in (folder, *folder.parents):
            if path.exists():
                break
            missing.append(path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".genfast-") as probe:
            probe.write(b"genfast")
            probe.flush()
    except OSError as error:
        raise OSError(f"{what}: the folder {str(folder)!r} cannot be written to: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


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

    Raises:
        ImportError: matplotlib is not installed.
    """
    known = _plots(path.suffix.lower()) if plot else _draws(path.suffix.lower())
    if not known:
        raise ValueError(
            f"{what}={str(path)!r} has the extension {path.suffix!r}, expected that of a picture, as .png or .jpg"
        )
    check_file(path, what)


def _plots(suffix: str) -> bool:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("points are drawn by matplotlib: pip install matplotlib") from error
    return suffix[1:] in set(FigureCanvasBase.get_supported_filetypes()) - {"pgf"}  # which needs TeX


def _draws(suffix: str) -> bool:
    """Whether Pillow writes what it has for this extension: some formats have no colours, and some need another
    library."""
    from PIL import Image

    name = Image.registered_extensions().get(suffix)
    try:
        for mode in ("L", "RGB"):
            Image.new(mode, (8, 8)).save(io.BytesIO(), format=name or "")
    except (KeyError, OSError, ValueError):
        return False
    return True
