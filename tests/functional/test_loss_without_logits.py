"""E2 with the loss computed in the output head: families, adapters on the head, precision, more terms, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from eft.core.constants import IGNORE_INDEX
from eft.core.errors import ModelError
from eft.loss import linear, objectives
from eft.models.forward import TrainedLoss
from eft.trainer.trainer import EftTrainer
from tests.functional.conftest import MakeTrainer
from tests.functional.reference import (
    Row,
    assert_gradients_equal,
    gradients_of,
    masked,
    plain_step,
    token_rows,
)
from tests.functional.test_loss_equality import cut, train_one_step
from tests.tiny_models import VOCAB_SIZE, tiny_model

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma2, soft cap": ("gemma2", {"final_logit_softcapping": 3.0}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "smollm3, tied": ("smollm3", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "granite, scaled": ("granite", {"logits_scaling": 0.3}),
    "cohere2, scaled": ("cohere2", {"logit_scale": 1.7}),
    "gpt_oss": ("gpt_oss", {}),
    "olmoe": ("olmoe", {}),
}
TWO_MICRO_BATCHES = cut(4, 2, packed=True)


@pytest.fixture(params=["small chunks", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses in chunks of about 13 tokens, worked on in blocks of 3."""
    if request.param == "small chunks":
        monkeypatch.setattr(linear, "CHUNK_BYTES", 13 * VOCAB_SIZE * 4)
        monkeypatch.setattr(linear, "_FIRST_ROWS", 5)
        monkeypatch.setattr(linear, "_VOCABULARY_BLOCK", 50)
        monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", 3 * VOCAB_SIZE)


def needs_no_logits(trainer: EftTrainer) -> bool:
    losses = (trainer.parts.loss, trainer.parts.evaluation_loss)
    assert all(isinstance(loss, TrainedLoss) for loss in losses)
    return all(loss.head is not None for loss in losses if isinstance(loss, TrainedLoss))


def check(make_trainer: MakeTrainer, build: Callable[[], Any], rows: list[Row], keys: dict[str, Any]) -> None:
    """One step of the real trainer against plain transformers, one row at a time."""
    trainer = make_trainer(rows, model=build(), **keys)
    assert needs_no_logits(trainer)
    loss, gradients = train_one_step(trainer)
    expected_loss, expected = plain_step(build(), rows)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients, expected)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", FAMILIES)
def test_step_of_every_family(name: str, make_trainer: MakeTrainer) -> None:
    family, settings = FAMILIES[name]
    rows = token_rows(8, longest=38, weighted=True)
    rows[3] = masked(rows[3])
    check(make_trainer, lambda: tiny_model(family, **settings), rows, TWO_MICRO_BATCHES)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "dora on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "frozen head": {"target_modules": ["q_proj"]},
}


def adapted(name: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("gemma2", final_logit_softcapping=3.0), LoraConfig(r=4, **ADAPTERS[name]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.usefixtures("chunks")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ADAPTERS)
def test_step_with_adapters(name: str, make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    rows[0] = masked(rows[0])
    check(make_trainer, lambda: adapted(name), rows, cut(1, 8, packed=False))


class Shifted(LlamaForCausalLM):  # type: ignore[misc]  # untyped class
    """Logits that are more than the head's output: these must be computed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-3, 3, output.logits.shape[-1])
        return output


def shifted() -> Any:
    model = Shifted(tiny_model("llama").config)
    model.load_state_dict(tiny_model("llama").state_dict())
    return model.train()


def test_a_head_that_is_not_understood_is_right_all_the_same(make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    trainer = make_trainer(rows, rows[:3], model=shifted(), **TWO_MICRO_BATCHES)
    assert not needs_no_logits(trainer)
    loss, gradients = train_one_step(trainer)
    expected_loss, expected = plain_step(shifted(), rows)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients, expected)


TERMS = {"label_smoothing_factor": 0.1, "z_loss_weight": 0.01}


def step_with_terms(model: Any, rows: Sequence[Row]) -> tuple[float, dict[str, Tensor]]:
    """Label smoothing as torch has it, and ζ · log² Z, over the tokens of all rows."""
    count = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    loss = 0.0
    for row in rows:
        target = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        logits, target = logits[target != IGNORE_INDEX], target[target != IGNORE_INDEX]
        part = F.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
        part = (part + 0.01 * logits.logsumexp(1).square().sum()) / count
        part.backward()
        loss += part.item()
    return loss, gradients_of(model)


@pytest.mark.parametrize("build", [lambda: tiny_model("llama"), shifted], ids=["in the head", "from logits"])
def test_further_terms_of_the_objective(build: Callable[[], Any], make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    trainer = make_trainer(rows, rows, model=build(), **TWO_MICRO_BATCHES, **TERMS)
    plain, _ = plain_step(build(), rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6), "evaluation is the plain NLL"
    loss, gradients = train_one_step(trainer)
    expected_loss, expected = step_with_terms(build(), rows)
    assert expected_loss > plain
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients, expected)


def step_with_balance(model: Any, rows: Sequence[Row], coefficient: float) -> tuple[float, dict[str, Tensor]]:
    """Transformers' own auxiliary loss of each document alone, by its share of all tokens, and the NLL."""
    loss, _ = plain_step(model, rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    for row in rows:
        output = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False, output_router_logits=True)
        part = coefficient * output.aux_loss * len(row["input_ids"]) / tokens
        part.backward()
        loss += part.item()
    return loss, gradients_of(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("keys", [TWO_MICRO_BATCHES, cut(1, 8, packed=True), cut(2, 4, packed=False)])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_balance_of_experts_is_per_document(
    family: str, keys: dict[str, Any], checkpointing: bool, make_trainer: MakeTrainer
) -> None:
    """Whatever the packing and accumulation, with a row that trains nothing and still routes."""
    rows = token_rows(8, longest=38, weighted=True)
    rows[2] = masked(rows[2])
    keys = {**keys, "router_aux_loss_coef": 0.5, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(rows, rows, model=tiny_model(family), **keys)
    plain, _ = plain_step(tiny_model(family), rows)
    loss, gradients = train_one_step(trainer)
    expected_loss, expected = step_with_balance(tiny_model(family), rows, 0.5)
    assert expected_loss > plain + 0.5
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_gradients_equal(gradients, expected)


def test_a_dense_model_has_no_balance(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ModelError, match="router_aux_loss_coef: LlamaForCausalLM gives no router logits"):
        make_trainer(token_rows(4), router_aux_loss_coef=0.1)


def test_bf16_is_no_further_from_fp64_than_plain_transformers(make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    exact_loss, exact = plain_step(tiny_model("llama").double(), rows)
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss, plain = plain_step(tiny_model("llama"), rows)
    trainer = make_trainer(rows, model=tiny_model("llama"), **{**TWO_MICRO_BATCHES, "bf16": True})
    loss, gradients = train_one_step(trainer)

    def error(measured: dict[str, Tensor]) -> float:
        return float(torch.stack([(measured[name] - value).norm() for name, value in exact.items()]).norm())

    assert error(gradients) <= 1.5 * error(plain)
    assert abs(loss - exact_loss) <= 1.5 * abs(plain_loss - exact_loss) + 1e-5


class LargestTensor(TorchDispatchMode):
    """The most rows of anything as wide as the vocabulary, and whether it was half precision that was multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.head_products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.ndim >= 2 and result.shape[-1] == VOCAB_SIZE:
            self.rows = max(self.rows, result.numel() // VOCAB_SIZE)
            if func.overloadpacket == torch.ops.aten.mm:
                self.head_products.add(result.dtype)
        return result


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_logits_are_never_whole(
    bf16: bool, trained: bool, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and evaluation; the products of the head run under autocast, for the model is called through it."""
    rows_at_once = 40  # more than the hidden size: a product with the head's weight may be as large
    monkeypatch.setattr(linear, "CHUNK_BYTES", rows_at_once * VOCAB_SIZE * (2 if bf16 else 4))
    rows = token_rows(8, longest=32)  # of longer ones an attention tile may be as wide as this vocabulary
    trainer = make_trainer(rows, rows, **{**cut(8, 1, packed=True), "bf16": bf16})
    counts = [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in rows]
    assert sum(counts) > 2 * rows_at_once
    with LargestTensor() as record:
        if trained:
            trainer.train()
        else:
            trainer.evaluate()
    assert 0 < record.rows <= rows_at_once
    assert record.head_products == {torch.bfloat16 if bf16 else torch.float32}


def test_logits_are_there_where_they_are_asked_for(make_trainer: MakeTrainer) -> None:
    rows = token_rows(8, longest=38)
    trainer: Any = make_trainer(rows, **TWO_MICRO_BATCHES)
    batch = next(iter(trainer.parts.packing.train_loader(trainer.make_plan(), cursor=lambda: 0)))
    plain = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["step_weight"])
    loss, outputs = trainer.compute_loss(trainer.model, batch, True, batch["step_weight"])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert outputs["logits"].shape == (batch["num_trained"], VOCAB_SIZE)
