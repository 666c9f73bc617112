"""Rules that span the keys of rows with images."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig


def images_are_not_packed(config: TrainConfig) -> tuple[str, str] | None:
    if config.processor_type is None:
        return None
    for name, value in (
        ("sample_packing", config.sample_packing),
        ("eval_sample_packing", config.eval_sample_packing),
    ):
        if value:
            return (
                name,
                f"`{name}`: rows with images cannot be packed: these models number the positions of image tokens from "
                "the image sizes of a whole row, so documents in one row would not be those trained alone; set "
                f"`{name}: false`",
            )
    return None


def images_need_conversations(config: TrainConfig) -> tuple[str, str] | None:
    if config.processor_type is None:
        return None
    for entry in (*config.datasets, *(config.test_datasets or ())):
        if entry.type not in ("chat_template", "sharegpt"):
            return (
                "processor_type",
                f"`processor_type`: rows with images are conversations; `{entry.path}` needs `type: chat_template` "
                "(or `sharegpt`)",
            )
    return None


def what_images_do_not_go_with(config: TrainConfig) -> tuple[str, str] | None:
    if config.processor_type is None:
        return None
    wanted = {
        "streaming": (config.streaming, "images are counted before the training; remove it"),
        "generate_samples": (config.generate_samples, "sample answers are for prompts of text; remove it"),
        "preflight": (config.preflight is True, "it tries rows of text only; remove it"),
        "excess_length_strategy": (
            config.excess_length_strategy == "truncate",
            "an image cannot be cut; use `drop` or `raise`",
        ),
        "gguf_file": (config.gguf_file is not None, "a GGUF file holds no vision tower; use the model's own folder"),
    }
    for name, (is_on, advice) in wanted.items():
        if is_on:
            return name, f"`{name}` does not go with `processor_type`: {advice}"
    return None


def image_size_is_positive(config: TrainConfig) -> tuple[str, str] | None:
    size = config.image_size
    sizes = [size] if isinstance(size, int) else size or []
    if size is not None and (
        len(sizes) > 2 or not sizes or min(sizes) < 1 or (isinstance(size, list) and len(size) != 2)
    ):
        return "image_size", f"`image_size: {size}`: expected a number of pixels, or [width, height]"
    return None


MULTIMODAL_RULES: tuple[Rule, ...] = (
    images_are_not_packed,
    images_need_conversations,
    what_images_do_not_go_with,
    image_size_is_positive,
)
