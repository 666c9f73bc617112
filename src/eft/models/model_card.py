"""The model card of an export: README.md in the hub's form, with the run's receipt; receipt.json holds it as data.

Neither is among the manifest's checksums, so a card may be edited; one that was is not overwritten. Both are redacted:
no secrets, no absolute paths.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from ruamel.yaml import YAML
from yaml import YAMLError  # type: ignore[import-untyped]  # PyYAML, by which the hub's client reads cards

from eft.config.section import Section
from eft.core.atomic import write_json, write_text
from eft.core.hashing import hash_bytes
from eft.core.records import PromiseResult
from eft.core.redaction import redact, redacted
from eft.models.empty_base import AdapterFacts
from eft.models.location import is_local

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
RECEIPT_FILE = "receipt.json"
OTHER_CARD_FILE = "README.eft.md"
"""Where the card goes beside a README.md that somebody else wrote or edited."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MARK = re.compile(r"\n<!-- written by eft, sha256 (\w{64}); an edited card is left alone -->\n\Z")
_HUB_TIMEOUT_S = 5.0

Receipt = dict[str, Any]
"""JSON-able. `title`, `content` (adapter or model), `adapter` (its method), `auto_class`, `versions`, `code`, and
`base_model` {name, gguf_file, revision, license, rows, resized, quantization}; of a run also `config` (YAML), `data`
{sources, hub, sha256, gates}, `results` {label: text}, `promises`; of a merge `merge` and `dtype`."""


def is_hub_id(name: str) -> bool:
    """Whether `name` is an `owner/name` of the hub, and no folder here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def keys_set(section: Section) -> dict[str, Any]:
    """The keys that were written down, or that differ from their defaults; does not count as reading them."""
    chosen = section.model_fields_set | section.changed_keys().keys()
    return {name: _plain(value) for name, value in section.__dict__.items() if name in chosen and value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return keys_set(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def config_yaml(section: Section) -> str:
    """`keys_set` as YAML, redacted."""
    yaml, text = YAML(), StringIO()
    yaml.width = 10_000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(redact(keys_set(section)), text)
    return text.getvalue()


@cache
def source_digest() -> str:
    """SHA-256 over eft's own source files: which code ran, also between releases."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    return hash_bytes(*(part for file in files for part in (str(file.relative_to(root)).encode(), file.read_bytes())))


def license_of(base: str | None, gguf_file: str | None = None, revision: str | None = None) -> str | None:
    """The licence that a base model's own card or GGUF file names; None when neither does, or it cannot be had."""
    if base is None:
        return None
    card = Path(base, CARD_FILE)
    try:
        if not is_local(base):
            card = Path(hf_hub_download(base, CARD_FILE, revision=revision, etag_timeout=_HUB_TIMEOUT_S))
        if card.is_file():
            found = ModelCard.load(card).data.license
            if isinstance(found, str):
                return found
    except (OSError, ValueError, YAMLError) as error:  # of the network, or of a card that is not in the hub's form
        logger.debug("the card of %s could not be read: %s", base, error)
    return _license_of_gguf(Path(base, gguf_file)) if gguf_file is not None and is_local(base) else None


def _license_of_gguf(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return None if field is None else str(field.contents())


def write_card(folder: Path, receipt: Receipt) -> Path:
    """Write the card and the receipt into `folder`; returns where the card went.

    A README.md that is no card of eft's, or was edited since, stays; the card then lies beside it.
    """
    receipt = redact(receipt)
    write_json(folder / RECEIPT_FILE, receipt)
    path = folder / CARD_FILE
    if path.is_file() and not _is_own(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s is not as eft wrote it and stays; the model card is in %s", path, OTHER_CARD_FILE)
        path = folder / OTHER_CARD_FILE
    body = redacted(card_text(receipt))
    write_text(path, f"{body}\n<!-- written by eft, sha256 {_digest(body)}; an edited card is left alone -->\n")
    return path


def _is_own(text: str) -> bool:
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hash_bytes(text.encode())


def read_receipt(folder: Path) -> Receipt:
    """What `write_card` left in `folder`; empty where it left nothing that can be read."""
    try:
        return cast("Receipt", json.loads((folder / RECEIPT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def merged_receipt(
    facts: AdapterFacts, dtype: str, promises: Sequence[PromiseResult], versions: Mapping[str, str]
) -> Receipt:
    """What the card of a merge says: the receipt of the adapter's run, where there is one, and of the merge."""
    run = read_receipt(facts.folder)
    base = {
        "name": facts.base,
        "gguf_file": facts.gguf_file,
        "revision": facts.revision,
        "license": license_of(facts.base, facts.gguf_file, facts.revision),
    }
    return {
        "adapter": "lora",
        "auto_class": "AutoModelForCausalLM",
        "versions": dict(versions),
        "code": source_digest(),
        **run,
        "title": f"{facts.folder.resolve().name}, merged",
        "content": "model",
        "base_model": base,
        "dtype": dtype,
        "merge": [asdict(promise) for promise in promises],
    }


def card_text(receipt: Receipt) -> str:
    """The card, without its last line."""
    parts = [
        f"---\n{_front_matter(receipt)}\n---",
        f"# {receipt['title']}",
        _what(receipt),
        f"## How to load\n\n```python\n{_loading(receipt)}\n```",
    ]
    if "results" in receipt:
        parts.append(f"## Results\n\n{_table(('', ''), receipt['results'].items())}")
    if "data" in receipt:
        parts.append(f"## Data\n\n{_data(receipt['data'])}")
    for key, title in (("merge", "The merge, checked"), ("promises", "The run, checked")):
        if receipt.get(key):
            rows = [(f"{p['promise']} {p['title']}", p["status"], p["detail"]) for p in receipt[key]]
            parts.append(f"## {title}\n\n{_table(('what', 'result', ''), rows)}")
    if "config" in receipt:
        parts.append(f"## Config\n\nThe keys that were set.\n\n```yaml\n{receipt['config'].rstrip()}\n```")
    parts.append(f"## Code\n\n{_code(receipt)}")
    return "\n\n".join(parts) + "\n"


def _front_matter(receipt: Receipt) -> str:
    base, hub = receipt["base_model"], receipt.get("data", {}).get("hub", [])
    name = base["name"] if base["name"] and is_hub_id(base["name"]) else None
    data = ModelCardData(
        library_name="peft" if receipt["content"] == "adapter" else "transformers",
        pipeline_tag="text-generation",
        license=base.get("license"),
        base_model=name,
        base_model_relation=None if name is None else ("adapter" if receipt["content"] == "adapter" else "finetune"),
        datasets=hub or None,
        tags=["eft", "sft", *([receipt["adapter"]] if receipt.get("adapter") else [])],
    )
    return data.to_yaml().rstrip()


def _what(receipt: Receipt) -> str:
    base = receipt["base_model"]
    name = f"`{base['name']}`" if base["name"] else "a model that was handed over in memory"
    if base.get("gguf_file"):
        name += f" (`{base['gguf_file']}`)"
    if base.get("revision"):
        name += f", revision `{base['revision']}`"
    kind = {"adapter": "An adapter for", "model": "A model fine-tuned from"}[receipt["content"]]
    if receipt.get("merge"):
        kind = f"Merged, saved in {receipt['dtype']}: an adapter in its base,"
    licence = f"Licence of the base: `{base['license']}`." if base.get("license") else "The base names no licence here."
    return (
        f"{kind} {name}; supervised fine-tuning with eft (Exact Fine-Tuning). {licence}\n\n"
        "Absolute paths are cut to their last part and what looks like a secret is left out. "
        f"`{RECEIPT_FILE}` holds the same as data."
    )


def _loading(receipt: Receipt) -> str:
    folder = 'folder = "."  # or where this file lies'
    if receipt["content"] == "model":
        return (
            f"from transformers import {receipt['auto_class']}, AutoTokenizer\n\n{folder}\n"
            f"model = {receipt['auto_class']}.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)"
        )
    base, imports = receipt["base_model"], [receipt["auto_class"], "AutoTokenizer"]
    options = [f'"{(base["name"] or "…/base").replace("…/", "path/to/")}"']
    if base.get("revision"):
        options.append(f'revision="{base["revision"]}"')
    if base.get("gguf_file"):
        imports.append("GgufConfig")
        options += [f'gguf_file="{base["gguf_file"]}"', "quantization_config=GgufConfig(dequantize=True)"]
    elif base.get("quantization"):
        imports.append("BitsAndBytesConfig")
        options.append(f"quantization_config=BitsAndBytesConfig.from_dict({base['quantization']})")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(sorted(imports))}",
        "",
        folder,
        f"base = {receipt['auto_class']}.from_pretrained({', '.join(options)})",
    ]
    if base.get("resized"):
        lines.append(f"base.resize_token_embeddings({base['rows']}, mean_resizing=False)")
    return "\n".join(
        [
            *lines,
            "model = PeftModel.from_pretrained(base, folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    )


def _data(data: Mapping[str, Any]) -> str:
    columns = ("rows", "samples", "trainable", "context", "dropped")
    rows = [
        (s["name"] if s["split"] == "train" else f"{s['name']} (evaluation)", *(f"{s[column]:,}" for column in columns))
        for s in data["sources"]
    ]
    table = _table(("data set", "rows", "samples", "trained tokens", "context tokens", "dropped rows"), rows)
    digests = [f"Prepared {name}: sha256 `{digest}`." for name, digest in data["sha256"].items()]
    gates = [f"Gates: {data['gates']}."] if data.get("gates") else []
    return "\n".join([*([f"{table}\n"] if rows else []), *digests, *gates])


def _code(receipt: Receipt) -> str:
    versions = receipt["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "eft-trainer")
    return f"eft {versions.get('eft-trainer', '')}, source sha256 `{receipt['code']}`; {listed}."


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cells = ((" ".join(str(cell).split()).replace("|", r"\|") for cell in row) for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])
