"""Rows with images, for models that look at them."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class MultimodalConfig(Section):
    """The size of the images that a processor is given (`processor_type`)."""

    image_size: int | list[int] | None = key(
        None,
        "Size that every image is given before the processor sees it: a number pads it to a square, `[width, height]` "
        "stretches it. Default: left to the processor.",
        used_when="processor_type",
    )
    image_resize_algorithm: Literal["bilinear", "bicubic", "lanczos"] = key(
        "bilinear", "How images are resized to `image_size`.", used_when="image_size"
    )
