"""Pictures of any kind as RGB, and the photographs that scikit-learn ships."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np


def picture(file: str | Path, *, background: str = "white") -> Any:
    """A picture file as a PIL image of mode "RGB", whatever the file holds, upright as its EXIF orientation says.

    Grey levels of 16 bits become the nearest of 8 bits: white is 65535, as PNG, PGM, TIFF and JPEG 2000 have it. What
    is transparent shows ``background``, in palettes too. Of several frames it is the first.

    Args:
        file: its name.
        background: a colour that Pillow knows: "white", "black", "#20a0ff".

    Raises:
        FileNotFoundError: no such file.
        OSError: no picture, or a damaged one.
        ValueError: no regular file; more pixels than Pillow takes for a picture (twice ``PIL.Image.MAX_IMAGE_PIXELS``);
            numbers whose white nobody states, which are 32-bit integers and floats; another colour.

    Example:
        >>> import tempfile, genfast
        >>> from PIL import Image
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("LA", (2, 2), (0, 128)).save(file.name)
        ...     genfast.data.picture(file.name).getpixel((0, 0))
        (127, 127, 127)
    """
    from PIL import Image, ImageOps

    path, behind = Path(file), colour(background)
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise ValueError(f"picture: {str(path)!r} is no regular file")
    try:
        with Image.open(path) as opened:
            if opened.mode == "F" or (opened.mode == "I" and opened.format not in ("PNG", "PPM")):
                values = "32-bit integers" if opened.mode == "I" else "floats"
                raise ValueError(
                    f"picture: {str(path)!r} holds {values}, whose white is not stated; expected 8 or 16 bits"
                )
            bits = getattr(opened, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample of TIFF, which has 12 bits too
            image = ImageOps.exif_transpose(opened)
            image.load()
            return _rgb(image, 2**bits - 1, behind)
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture: {str(path)!r} has too many pixels: {error}") from error
    except Exception as error:  # readers of damaged files raise whatever they meet
        if str(error).startswith("picture:"):
            raise
        raise OSError(f"picture: {str(path)!r} cannot be read: {error}") from error


def colour(name: str) -> tuple[int, ...]:
    """Red, green and blue of a colour that Pillow knows, ValueError for another."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise ValueError(f"picture: background={name!r}, expected a colour: white, black, #20a0ff") from error


def _rgb(image: Any, white: int, background: tuple[int, ...]) -> Any:
    """Any PIL image in "RGB", over the background; ``white`` is that of grey levels of more than 8 bits."""
    from PIL import Image

    mask = None
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:  # of PNG: one grey level
            mask = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8))
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info or palette.endswith("A"):
        if image.mode in ("RGBa", "La"):  # premultiplied
            image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
        image = image.convert("RGBA")
        mask = image.getchannel("A")
    image = image.convert("RGB")
    if mask is None:
        return image
    return Image.composite(image, Image.new("RGB", image.size, background), mask)


def scikit_learn(what: str = "digits and photos need") -> Any:
    """The data sets of scikit-learn, or ImportError with ``what`` needs them."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"genfast.data: {what} scikit-learn: pip install scikit-learn") from error
    return datasets
