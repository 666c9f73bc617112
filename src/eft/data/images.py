"""Images of a row: where they stand in it, where their bytes are, and how they are opened.

In the text of a turn each image is one character, MARK, so that text and images stay in order on the way to the chat
template.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse

from PIL import Image, ImageOps, UnidentifiedImageError

from eft.config.data import DatasetConfig
from eft.core import atomic
from eft.core.errors import DataError
from eft.data.formats.example import MARK
from eft.data.readers import Row

COLUMNS = ("images", "image")
PLACEHOLDER = "<image>"
"""What rows with a column of images often have in their text where an image belongs."""

_IMAGE_TYPES = ("image", "image_url", "input_image")
_SOURCES = ("path", "url", "base64", "bytes", "image", "image_url")
_EXPECTED = "a path, a file: or data: URL, base64 text, or bytes"
_ALGORITHMS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageRef:
    """One image of a row: its file, and what to call it in messages."""

    path: str
    where: str
    """`data.jsonl row 17, turn 2, image 1`."""


@dataclass(frozen=True)
class ImageSize:
    """What every image is resized to; `size` None: nothing."""

    size: int | tuple[int, int] | None = None
    algorithm: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"

    def apply(self, image: Image.Image) -> Image.Image:
        """Padded to a square of `size`, or stretched to (width, height)."""
        method = _ALGORITHMS[self.algorithm]
        if self.size is None:
            return image
        if isinstance(self.size, int):
            return ImageOps.pad(image, (self.size, self.size), method=method)
        return image.resize(self.size, method)


def open_image(ref: ImageRef, size: ImageSize) -> Image.Image:
    """The image in RGB, upright. Raises DataError naming the row and what is wrong with the file."""
    try:
        with Image.open(ref.path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{ref.where}: there is no file {ref.path}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{ref.where}: {ref.path} is no image that can be read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{ref.where}: {ref.path} cannot be read as an image ({error})") from error
    return size.apply(upright)


class ImageFinder:
    """Takes the images out of the rows of one data set."""

    def __init__(self, spec: DatasetConfig, spool: Path) -> None:
        """`spool`: the folder for images that come as bytes; each is written there once, by its hash."""
        sharegpt = spec.type == "sharegpt"
        mapping = spec.message_property_mappings
        self._column = "conversations" if sharegpt else spec.field_messages
        self._content = mapping.get("content", "value" if sharegpt else "content")
        self._spool = spool

    def __call__(self, row: Row) -> tuple[Row, list[ImageRef]]:
        """The row with MARK in each image's place, and the images in order.

        Raises DataError with row, turn and field: an image that is given in no known way or is not there; more or fewer
        images in the column than the turns ask for; a text that holds MARK.
        """
        turns = row.data.get(self._column)
        if not isinstance(turns, list):
            return row, []  # the format says what is wrong
        column = self._from_column(row)
        has_parts = any(isinstance(part, dict) and _is_image(part) for turn in turns for part in self._parts(turn))
        refs: list[ImageRef] = []
        changed = [self._turn(row, number, turn, column, has_parts, refs) for number, turn in enumerate(turns, 1)]
        left = sum(1 for _ in column)
        if left:
            raise DataError(
                f"{row.where}: {left} of its images stand in no turn; expected a part {{'type': 'image'}} (or the text "
                f"{PLACEHOLDER}) for each"
            )
        return replace(row, data={**row.data, self._column: changed}), refs

    def _parts(self, turn: Any) -> list[Any]:
        content = turn.get(self._content) if isinstance(turn, dict) else None
        return content if isinstance(content, list) else []

    def _from_column(self, row: Row) -> Iterator[Any]:
        name = next((name for name in COLUMNS if row.data.get(name) is not None), None)
        if name is None:
            return iter(())
        value = row.data[name]
        return iter(value if isinstance(value, list | tuple) else [value])

    def _turn(
        self, row: Row, number: int, turn: Any, column: Iterator[Any], has_parts: bool, refs: list[ImageRef]
    ) -> Any:
        content = turn.get(self._content) if isinstance(turn, dict) else None
        if isinstance(content, str):
            _refuse_mark(row, number, content)
            if has_parts or PLACEHOLDER not in content or not any(row.data.get(name) is not None for name in COLUMNS):
                return turn
            for _ in range(content.count(PLACEHOLDER)):
                refs.append(self._next(row, number, column, len(refs) + 1))
            return {**turn, self._content: content.replace(PLACEHOLDER, MARK)}
        if not isinstance(content, list):
            return turn
        parts: list[Any] = []
        for part in content:
            if isinstance(part, dict) and _is_image(part):
                value = _value_of(part)
                where = f"{row.where}, turn {number}, image {len(refs) + 1}"
                refs.append(
                    self._next(row, number, column, len(refs) + 1)
                    if value is None
                    else ImageRef(self._path(value, where, Path(row.file).parent), where)
                )
                parts.append({"type": "text", "text": MARK})
            else:
                text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
                _refuse_mark(row, number, text if isinstance(text, str) else "")
                parts.append(part)
        return {**turn, self._content: parts}

    def _next(self, row: Row, turn: int, column: Iterator[Any], number: int) -> ImageRef:
        where = f"{row.where}, turn {turn}, image {number}"
        missing = object()
        value = next(column, missing)
        if value is missing:
            raise DataError(
                f"{where}: names no file and the row's column `images` has no more; expected {_EXPECTED} in the part, "
                "or one image in the column for each part"
            )
        return ImageRef(self._path(value, where, Path(row.file).parent), where)

    def _path(self, value: Any, where: str, folder: Path) -> str:
        """The file of an image, made here for one that comes as bytes."""
        if isinstance(value, dict):
            inner = _value_of(value)
            if inner is None:
                raise DataError(f"{where}: has {', '.join(map(repr, value)) or 'no fields'}; expected {_EXPECTED}")
            return self._path(inner, where, folder)
        if isinstance(value, bytes):
            return self._spooled(value)
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}: is a {type(value).__name__}; expected {_EXPECTED}")
        scheme = urlparse(value).scheme.lower()
        if scheme == "data":
            return self._spooled(_decoded(value.partition(",")[2], where))
        if scheme in ("http", "https"):
            raise DataError(f"{where}: {value[:80]} is on the network; download it first, nothing is fetched in a run")
        name = unquote(urlparse(value).path) if scheme == "file" else value
        path = Path(name).expanduser()
        path = path if path.is_absolute() else folder / path
        if not path.is_file():
            raise DataError(f"{where}: there is no file {path}")
        return str(path)

    def _spooled(self, content: bytes) -> str:
        path = self._spool / hashlib.sha256(content).hexdigest()
        if not path.exists():
            self._spool.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(path, content)
        return str(path)


def _is_image(part: dict[str, Any]) -> bool:
    return part.get("type") in _IMAGE_TYPES


def _value_of(part: dict[str, Any]) -> Any:
    """What the part says about where its image is; None where it says nothing."""
    for name in _SOURCES:
        value = part.get(name)
        if value is None:
            continue
        if name == "base64" and isinstance(value, str):
            return "data:;base64," + value
        return value
    return None


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: is not base64 ({error})") from error


def _refuse_mark(row: Row, turn: int, text: str) -> None:
    if MARK in text:
        raise DataError(f"{row.where}, turn {turn}: has the character U+FDD0, which no text may hold")


def image_hash(path: str) -> bytes:
    """SHA-256 of an image file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
