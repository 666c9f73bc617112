"""A tokenizer trained on the spot: a few hundred tokens, no download, the same ids on every machine."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "The capital of France is Paris. What is the capital of Italy? It is Rome.",
    "You are a helpful assistant. Answer the question in one short sentence.",
    "system user assistant tool name arguments function call result",
    "hello world, hello there, how are you today? I am fine, thank you.",
    "one two three four five six seven eight nine ten, 0 1 2 3 4 5 6 7 8 9",
    '{"name": "get_weather", "arguments": {"city": "Rome", "unit": "celsius"}}',
] * 3


def tiny_tokenizer(
    chat_template: str | None = CHATML, *, add_bos: bool = False, specials: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens.

    `<|endoftext|>` is BOS and padding, `<|im_end|>` is EOS. `add_bos`: plain calls put BOS in front, as Llama's
    tokenizer does. `specials`: further special tokens, for templates that use them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (*SPECIALS, *specials)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", *specials],
        chat_template=chat_template,
    )
