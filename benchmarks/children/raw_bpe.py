"""Nothing but byte-pair encoding of ready texts: tiktoken built from the tokenizer's own JSON, and tokenizers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer

GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tiktoken_of(facts: dict[str, Any]) -> tiktoken.Encoding:
    """The same vocabulary and added tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
    added = {token["content"]: token["id"] for token in facts["added_tokens"]}
    ranks = {
        bytes(byte_of[sign] for sign in token): number
        for token, number in facts["model"]["vocab"].items()
        if token not in added
    }
    return tiktoken.Encoding("same", pat_str=GPT2_RULE, mergeable_ranks=ranks, special_tokens=added)


def timed(call: Callable[[], Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Seconds of one call and the tokens that it gave."""
    start, used = time.perf_counter(), time.process_time()
    ids = call()
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    return {"wall_s": wall, "cpu_s": cpu, "tokens": sum(map(len, ids))}


def main() -> None:
    """tiktoken and, where asked for, tokenizers, one after the other, on texts that are JSON strings line by line."""
    settings = json.loads(sys.argv[1])
    texts = [json.loads(line) for line in Path(settings["texts"]).read_text().splitlines()]
    path = str(Path(settings["tokenizer"]) / "tokenizer.json")
    encoding = tiktoken_of(json.loads(Path(path).read_text()))
    tokenizer = Tokenizer.from_file(path)
    encoding.encode(texts[0], allowed_special="all")
    threads = settings["processes"]
    reply: dict[str, Any] = {
        "tiktoken": timed(lambda: encoding.encode_batch(texts, num_threads=threads, allowed_special="all")),
    }
    if settings["tokenizers"]:
        reply["tokenizers"] = timed(
            lambda: [each.ids for each in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        )
    sample = texts[: settings["compared"]]
    ours = [encoding.encode(text, allowed_special="all") for text in sample]
    theirs = [each.ids for each in tokenizer.encode_batch_fast(sample, add_special_tokens=False)]
    reply |= {"equal": sum(a == b for a, b in zip(ours, theirs, strict=True)), "compared": len(sample)}
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
