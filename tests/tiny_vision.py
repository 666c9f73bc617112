"""Tiny random vision-language models with their processors, made on the spot: no download, no torchvision."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.tiny import tiny_tokenizer

IMAGE_SIDE, PATCH = 28, 14
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
PARTS_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LISTS_TEMPLATE = PARTS_TEMPLATE.replace("{% if message['content'] is string %}{{ message['content'] }}{% else %}", "")
LISTS_TEMPLATE = LISTS_TEMPLATE.replace("{% endfor %}{% endif %}{{ '<|im_end|>", "{% endfor %}{{ '<|im_end|>")
"""As PARTS_TEMPLATE, of the kind that insists on lists of parts."""


def tiny_processor(template: str = PARTS_TEMPLATE) -> LlavaProcessor:
    """LLaVA's, over the tiny tokenizer: an image is four tokens."""
    tokenizer = tiny_tokenizer(template, specials=("<image>",))
    pixels: Any = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


IDEFICS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)


def tiny_idefics_processor() -> Idefics3Processor:
    """Idefics3's: large images are cut into a grid, with tokens for rows and columns and line breaks between them."""
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    specials = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *grid)
    tokenizer = tiny_tokenizer(IDEFICS_TEMPLATE, specials=specials)
    pixels: Any = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return Idefics3Processor(
        image_processor=pixels, tokenizer=tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )


def tiny_llava(processor: LlavaProcessor, seed: int = 0) -> LlavaForConditionalGeneration:
    """Random weights, fp32; wide enough that pixels move the logits."""
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        initializer_range=0.15,
        initializer_factor=1.0,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()
