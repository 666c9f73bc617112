"""The quickstart, step by step: measure the base model, train it, measure it again, compare the speed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft import inputs, run
from eft.config.load import LoadedConfig
from eft.config.model import ModelConfig
from eft.config.root import TrainConfig
from eft.core.atomic import new_folder, write_json
from eft.core.constants import SUMMARY_FILE
from eft.data.dataset_meta import DatasetMeta
from eft.models.adapters import set_dtypes
from eft.models.generate import sample_texts
from eft.models.load import load_model
from eft.models.tokenizer import load_tokenizer
from eft.parallel.plan import batch_of
from eft.quickstart.material import GGUF_FILE, write_material
from eft.quickstart.measure import Score, score
from eft.quickstart.plain_loop import PlainTiming, time_plain_loop

RESULT_FILE = "quickstart.json"
MAX_ANSWER_TOKENS = 96
_PLAIN_STEPS = 6
_BATCH = 37


@dataclass(frozen=True)
class Result:
    """What the quickstart shows."""

    seed: int
    rows: int
    before: Score
    after: Score
    loss_before: float
    loss_after: float
    training_seconds: float
    tokens: int
    eft_over_plain: float
    """Seconds of training per real token, eft's over the plain loop's of the same minutes."""
    total_seconds: float
    answers: list[dict[str, str]]
    """Three held-out questions with reference, answer before and answer after."""

    @property
    def loss_fall(self) -> float:
        """Share of the held-out loss that the training took away."""
        return 1 - self.loss_after / self.loss_before


def run_demo(
    loaded: LoadedConfig,
    material: Path,
    console: Console,
    on_start: run.OnStart,
    on_finish: Callable[[Path], None],
) -> Result:
    """Train as `loaded` says, on the material laid out in `material`; print what happens."""
    started = time.monotonic()
    config = loaded.config
    _, held_out = write_material(material)
    console.print("Unpacking the model …")
    lay_out_model(material, Path(config.base_model))
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    tokenizer = inputs.prepare_tokenizer(config)
    meta = inputs.load_datasets(config, tokenizer)
    base = inputs.load_trainable_model(config, tokenizer)
    set_dtypes(base)
    console.print(f"The base model answers {len(rows)} held-out questions …")
    answers_before = _answers(base, tokenizer, rows)
    console.print("A plain PyTorch loop trains a few steps, for the speed …")
    timings = [_time_plain(base, meta, config, first_row=0)]

    model, _, _ = run.train(
        config, meta, overwrite=True, console=console, origins=loaded.origins, on_start=on_start, on_finish=on_finish
    )
    timings.append(_time_plain(base, meta, config, first_row=200))
    console.print(f"The trained model answers the {len(rows)} questions …")
    answers_after = _answers(model, tokenizer, rows)

    summary = json.loads((Path(config.output_dir) / SUMMARY_FILE).read_text())
    result = Result(
        seed=config.seed,
        rows=len(rows),
        before=score(answers_before, rows),
        after=score(answers_after, rows),
        loss_before=summary["eval_loss_first"],
        loss_after=summary["eval_loss"],
        training_seconds=summary["training_seconds"],
        tokens=int(summary["tokens"]),
        eft_over_plain=_ratio(summary, timings),
        total_seconds=time.monotonic() - started,
        answers=[
            {
                "question": row["messages"][1]["content"],
                "reference": row["messages"][2]["content"],
                "before": before,
                "after": after,
            }
            for row, before, after in list(zip(rows, answers_before, answers_after, strict=True))[:3]
        ],
    )
    write_json(Path(config.output_dir) / RESULT_FILE, asdict(result))
    # The report shows these as cards of their own.
    write_json(Path(config.output_dir) / SUMMARY_FILE, {**summary, "measures": _measures(result)})
    return result


def lay_out_model(material: Path, model: Path) -> None:
    """De-quantise the GGUF weights once into a plain folder: reading GGUF takes half a minute each time."""
    if (model / "config.json").is_file():
        return
    source = ModelConfig(base_model=str(material), gguf_file=GGUF_FILE)
    with new_folder(model) as folder:
        load_model(source, compute_dtype=torch.bfloat16, seed=0).save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[str]:
    prompts = [row["messages"][:-1] for row in rows]
    return sample_texts(model, tokenizer, prompts, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=_BATCH)


def _measures(result: Result) -> dict[str, dict[str, float | str]]:
    note = f"{result.rows} held-out rows"
    before, after = result.before, result.after
    return {
        "Answers of the right form": {"before": before.form_share, "after": after.form_share, "note": note},
        "Exactly right answers": {"before": before.exact_share, "after": after.exact_share, "note": note},
    }


def _time_plain(base: PreTrainedModel, meta: DatasetMeta, config: TrainConfig, first_row: int) -> PlainTiming:
    """A few plain steps of about as many rows as a step of ours holds."""
    tokens_per_step = batch_of(config, 1).global_batch_size * config.sequence_len
    rows_per_step = max(1, round(tokens_per_step / float(meta.train_dataset.lengths.mean())))
    return time_plain_loop(
        base,
        meta.train_dataset,
        rows_per_step=rows_per_step,
        steps=_PLAIN_STEPS,
        first_row=first_row,
        learning_rate=config.learning_rate,
    )


def _ratio(summary: dict[str, Any], timings: list[PlainTiming]) -> float:
    plain = statistics.mean(timing.seconds_per_token for timing in timings)
    return float(summary["training_seconds"] / summary["tokens"] / plain)
