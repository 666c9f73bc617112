"""eft's preparation: from a JSONL file to a ready store, and opening a store that is there."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from eft.config.data import DataConfig
from eft.data.prepare import prepare_datasets
from eft.data.store import open_store


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def resident_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """One preparation, or with `open` one opening of what it made."""
    settings = json.loads(sys.argv[1])
    if "open" in settings:
        before, start = resident_mib(), time.perf_counter()
        store = open_store(Path(settings["open"]))
        tokens = int(store.lengths.sum())
        store.sample(len(store) - 1)
        seconds = time.perf_counter() - start
        print(json.dumps({"wall_s": seconds, "mib": resident_mib() - before, "rows": len(store), "tokens": tokens}))
        return
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer"])
    cfg = DataConfig.model_validate(
        {
            "datasets": [{"path": settings["rows"], "type": "chat_template"}],
            "sequence_len": 1 << 20,
            "dataset_prepared_path": settings["folder"],
            "dataset_processes": settings["processes"],
        }
    )
    start, used = time.perf_counter(), cpu_seconds()
    prepared = prepare_datasets(cfg, tokenizer)
    reply = {
        "wall_s": time.perf_counter() - start,
        "cpu_s": cpu_seconds() - used,
        "tokens": int(prepared.train.lengths.sum()),
        "trainable": int(prepared.train.trainable_counts.sum()),
        "note": prepared.cache_note,
        "store": str(prepared.train.bases[0].path),  # type: ignore[attr-defined]
    }
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
