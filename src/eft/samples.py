"""Some held-out prompts, answered before and after the training, side by side in samples.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eft.config.root import TrainConfig
from eft.core.atomic import write_text
from eft.core.constants import SAMPLES_FILE
from eft.core.errors import DataError
from eft.core.records import Message
from eft.data.dataset_meta import DatasetMeta
from eft.models.generate import sample_texts

_BATCH = 8


@dataclass(frozen=True)
class SampleAnswers:
    """The prompts of one run and where their answers go."""

    conversations: list[list[Message]]
    """Each ends with the reference answer of the assistant."""
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    path: Path

    @classmethod
    def of(
        cls, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, meta: DatasetMeta, folder: Path
    ) -> SampleAnswers:
        """The first held-out conversations that end with an answer; raises DataError when there is none."""
        ending = [turns for turns in meta.eval_conversations if turns and turns[-1]["role"] == "assistant"]
        if not ending:
            raise DataError(
                "generate_samples: the held-out rows hold no conversation that ends with an answer of the assistant. "
                "Set `generate_samples: false`."
            )
        chosen = ending[: config.num_generation_samples]
        return cls(chosen, tokenizer, config.generation_max_new_tokens, folder / SAMPLES_FILE)

    def start(self, model: PreTrainedModel, *, resumed: bool) -> None:
        """Answer with the untrained model; a resumed run has these answers already, if its prompts are the same."""
        if not (resumed and self._asked() == [turns[:-1] for turns in self.conversations]):
            self._write(self._answers(model), [""] * len(self.conversations))

    def finish(self, model: PreTrainedModel) -> None:
        """Answer with the trained model, beside the earlier answers."""
        before = [json.loads(line)["before"] for line in self.path.read_text(encoding="utf-8").splitlines()]
        self._write(before, self._answers(model))

    def _asked(self) -> list[list[Message]] | None:
        """The prompts that the file holds answers to; None where it is missing or broken."""
        try:
            return [json.loads(line)["prompt"] for line in self.path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _answers(self, model: PreTrainedModel) -> list[str]:
        prompts = [turns[:-1] for turns in self.conversations]
        return sample_texts(model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=_BATCH)

    def _write(self, before: list[str], after: list[str]) -> None:
        rows = [
            {"prompt": turns[:-1], "reference": turns[-1].get("content", ""), "before": old, "after": new}
            for turns, old, new in zip(self.conversations, before, after, strict=True)
        ]
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
