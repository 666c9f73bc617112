"""The loss straight from hidden states against plain torch in fp64: gradients, precision, memory, kinds of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from eft.loss import linear, objectives
from eft.loss.linear import head_loss, plain_linear
from eft.loss.objectives import Objective
from tests.tiny_models import tiny_model

ROWS, HIDDEN, VOCABULARY = 150, 24, 320


@dataclass
class Case:
    """Tokens, and the loss written down in plain torch."""

    hidden: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def drawn(cls, rows: int = ROWS, hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> Case:
        generator = torch.Generator().manual_seed(0)
        return cls(
            2 * torch.randn(rows, hidden, generator=generator),
            torch.randint(0, vocabulary, (rows,), generator=generator),
            torch.rand(rows, generator=generator),
        )


def reference(
    head: Callable[[Tensor], Tensor],
    case: Case,
    *,
    weighted: bool = True,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """A dozen lines: Σ w · ((1 − ε)·nll − ε/V · Σ log p + ζ · log² Z)."""
    logits = scale * head(case.hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.double(), case.targets, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * logits.double().logsumexp(1).square()
    return (losses * case.weights).sum() if weighted else losses.sum()


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss / 7, inputs))


def assert_close(ours: list[Tensor], theirs: list[Tensor], limit: float = 1e-6) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert other.norm() > 0
        assert (one.double() - other.double()).norm() <= limit * other.double().norm()


@pytest.fixture(params=[1, 20_000, 1 << 29], ids=["row by row", "uneven chunks", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(linear, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(linear, "_FIRST_ROWS", 7)
    monkeypatch.setattr(linear, "_VOCABULARY_BLOCK", 100)
    monkeypatch.setattr(objectives, "_BLOCK_ELEMENTS_CPU", 1000)
    return int(request.param)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"weighted": False},
    "scale": {"scale": 0.25},
    "soft cap": {"softcap": 3.0},
    "scale and soft cap": {"scale": 2.0, "softcap": 5.0},
    "label smoothing": {"smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "all": {"scale": 1.5, "softcap": 5.0, "smoothing": 0.2, "z_loss": 0.01},
}


def ours(hidden: Tensor, head: nn.Module, case: Case, options: dict[str, Any]) -> Tensor:
    return head_loss(
        hidden,
        head,
        case.targets,
        case.weights if options.get("weighted", True) else None,
        objective=Objective(options.get("smoothing", 0.0), options.get("z_loss", 0.0)),
        scale=options.get("scale", 1.0),
        softcap=options.get("softcap"),
    )


class Doubtful(nn.Linear):
    """A linear layer whose class says nothing about what it computes."""


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_equals_plain_torch_in_fp64(name: str, kind: Any, bias: bool, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    case, head = Case.drawn(), kind(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    hidden = case.hidden.to(dtype).requires_grad_()
    loss = ours(hidden, head, case, OPTIONS[name])
    measured = gradients(loss, [hidden, *head.parameters()])
    exact = Case(hidden.detach().double().requires_grad_(), case.targets, case.weights)
    wide = nn.Linear(HIDDEN, VOCABULARY, bias=bias).double()
    wide.load_state_dict(head.state_dict())
    expected_loss = reference(wide, exact, **OPTIONS[name])
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected_loss.item(), rel=limit)
    assert_close(measured, gradients(expected_loss, [exact.hidden, *wide.parameters()]), limit)
    with torch.no_grad():
        assert ours(hidden, head, case, OPTIONS[name]).item() == pytest.approx(expected_loss.item(), rel=limit)


def test_smoothing_is_that_of_transformers() -> None:
    """Its `LabelSmoother`: (1 − ε) · mean nll + ε · mean over tokens and vocabulary of −log p."""
    from transformers.trainer_pt_utils import LabelSmoother

    case, head = Case.drawn(), nn.Linear(HIDDEN, VOCABULARY)
    logits = head(case.hidden)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits[None]}, case.targets[None])
    loss = head_loss(case.hidden, head, case.targets, objective=Objective(label_smoothing=0.1))
    assert loss.item() / ROWS == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("rows", [ROWS, 600])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
def test_bf16_is_no_further_from_fp64_than_torch_is(rows: int, weight_dtype: torch.dtype, kind: Any) -> None:
    """Under autocast with fp32 weights, and with bf16 weights: at most 1.5 times plain torch's own error."""
    torch.manual_seed(0)
    case, head = Case.drawn(rows), kind(HIDDEN, VOCABULARY, bias=False).to(weight_dtype)
    hidden = case.hidden.to(weight_dtype).requires_grad_()
    exact = Case(hidden.detach().double().requires_grad_(), case.targets, case.weights)
    wide = nn.Linear(HIDDEN, VOCABULARY, bias=False).double()
    wide.load_state_dict(head.state_dict())
    expected_loss = reference(wide, exact)
    expected = gradients(expected_loss, [exact.hidden, wide.weight])
    with torch.autocast("cpu", torch.bfloat16, enabled=weight_dtype == torch.float32):
        plain_loss = (F.cross_entropy(head(hidden).float(), case.targets, reduction="none") * case.weights).sum()
        loss = head_loss(hidden, head, case.targets, case.weights)
    plain = gradients(plain_loss, [hidden, head.weight])
    measured = gradients(loss, [hidden, head.weight])
    for one, other, wanted in zip(measured, plain, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.double() - wanted).norm() <= 1.5 * (other.double() - wanted).norm()
    assert abs(loss.item() - expected_loss.item()) <= 1.5 * abs(plain_loss.item() - expected_loss.item()) + 1e-5


class Products(TorchDispatchMode):
    """Records the dtypes of matrix products and the sizes of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.append(args[-1].dtype)
        if isinstance(result, Tensor) and not func.is_view:
            self.sizes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
def test_products_run_in_the_dtype_of_autocast(kind: Any) -> None:
    case, head = Case.drawn(), kind(HIDDEN, VOCABULARY)
    with Products() as record, torch.autocast("cpu", torch.bfloat16):
        head_loss(case.hidden.requires_grad_(), head, case.targets).backward()
    assert len(record.dtypes) >= 3
    assert set(record.dtypes) == {torch.bfloat16}


@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
@pytest.mark.parametrize("training", [True, False])
def test_the_logits_never_exist(kind: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK_BYTES", 50 * VOCABULARY * 4)
    monkeypatch.setattr(linear, "_FIRST_ROWS", 10)
    case, head = Case.drawn(), kind(HIDDEN, VOCABULARY)
    with Products() as record, torch.set_grad_enabled(training):
        loss = head_loss(case.hidden.requires_grad_(), head, case.targets)
        if training:
            loss.backward()
    rows = max(size[0] for size in record.sizes if size[-1:] == (VOCABULARY,) and len(size) == 2)
    assert rows <= 50
    limit = max(50, HIDDEN) * VOCABULARY
    assert max(torch.Size(size).numel() for size in record.sizes) <= limit < ROWS * VOCABULARY


@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
def test_no_rows_is_a_connected_zero(kind: Any) -> None:
    head = kind(HIDDEN, VOCABULARY)
    states = torch.randn(9, HIDDEN, requires_grad=True)
    hidden = states.index_select(0, torch.empty(0, dtype=torch.int64))
    loss = head_loss(hidden, head, torch.empty(0, dtype=torch.int64))
    assert loss.item() == 0.0
    loss.backward()
    for tensor in (states, head.weight, head.bias):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", [nn.Linear, Doubtful])
def test_a_frozen_head_has_no_gradient_and_costs_no_product(kind: Any) -> None:
    case, head = Case.drawn(), kind(HIDDEN, VOCABULARY).requires_grad_(False)
    hidden = case.hidden.requires_grad_()
    with Products() as record:
        head_loss(hidden, head, case.targets, case.weights).backward()
    assert head.weight.grad is None
    assert (HIDDEN, VOCABULARY) not in record.sizes
    assert (VOCABULARY, HIDDEN) not in record.sizes
    expected = torch.autograd.grad(reference(head, case), hidden)
    assert hidden.grad is not None
    assert_close([hidden.grad], list(expected))


def test_only_the_head_is_trained() -> None:
    case = Case.drawn()
    for kind in (nn.Linear, Doubtful):
        head = kind(HIDDEN, VOCABULARY)
        loss = head_loss(case.hidden, head, case.targets, case.weights)
        expected = gradients(reference(head, case), list(head.parameters()))
        assert_close(gradients(loss, list(head.parameters())), expected)


def test_tied_weights_add_up() -> None:
    torch.manual_seed(0)
    case, embedding = Case.drawn(), nn.Embedding(VOCABULARY, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight = embedding.weight
    tokens = torch.randint(0, VOCABULARY, (ROWS,))
    loss = head_loss(embedding(tokens), head, case.targets, case.weights)
    tied = Case(embedding(tokens), case.targets, case.weights)
    assert_close(gradients(loss, [embedding.weight]), gradients(reference(head, tied), [embedding.weight]))


def test_the_upstream_gradient_scales_all_and_is_asked_for_once() -> None:
    """As a loss scaler does (fp16)."""
    case, head = Case.drawn(), nn.Linear(HIDDEN, VOCABULARY)
    hidden = case.hidden.requires_grad_()
    loss = head_loss(hidden, head, case.targets)
    (65536.0 * loss).backward(retain_graph=True)
    expected = [
        65536.0 * 7 * value for value in gradients(reference(head, case, weighted=False), [hidden, head.weight])
    ]
    assert hidden.grad is not None
    assert head.weight.grad is not None
    assert_close([hidden.grad, head.weight.grad], expected)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.usefixtures("chunk")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_adapters_on_the_head(name: str, tied: bool) -> None:
    """Whatever the wrapped head computes with gets its gradient, also what other modules own."""
    torch.manual_seed(0)
    base = tiny_model("llama", tie_word_embeddings=tied)
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.0, **ADAPTERS[name]))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    head: Any = model.get_base_model().get_output_embeddings()
    case = Case.drawn(ROWS, base.config.hidden_size, base.config.vocab_size)
    hidden = case.hidden.requires_grad_()
    expected_loss = reference(head, case, scale=0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(expected_loss / 7, [hidden, *trained], allow_unused=True)
    loss = head_loss(hidden, head, case.targets, case.weights, scale=0.5)
    measured = torch.autograd.grad(loss / 7, [hidden, *trained], allow_unused=True)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    assert [value is None for value in measured] == [value is None for value in expected]
    pairs = [(one, other) for one, other in zip(measured, expected, strict=True) if other is not None]
    assert len(pairs) >= (2 if name != "trainable tokens" or tied else 1)
    assert_close([one for one, _ in pairs], [other for _, other in pairs])
    assert (plain_linear(head) is None) == (name in ("lora", "dora") or (name == "trainable tokens" and tied))


def test_a_head_that_fsdp2_has_gathered_is_multiplied() -> None:
    """FSDP2 gives modules a class of their own; one of a subclass of nn.Linear still computes something else."""
    for kind, expected in ((nn.Linear, True), (Doubtful, False)):
        head: Any = kind(HIDDEN, VOCABULARY)
        head.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
        assert (plain_linear(head) is head) == expected


def test_the_disabled_copy_is_not_multiplied() -> None:
    """peft's wrapper with its adapters off computes with the original head."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head: Any = model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        head.modules_to_save["default"].weight.zero_()
    case = Case.drawn(ROWS, head.original_module.in_features, head.original_module.out_features)
    on = head_loss(case.hidden, head, case.targets).item()
    with model.disable_adapter():
        off = head_loss(case.hidden, head, case.targets).item()
    assert off == pytest.approx(reference(head.original_module, case, weighted=False).item(), rel=1e-6)
    assert on != pytest.approx(off, rel=1e-3)


def test_dropout_in_a_lora_head_repeats_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_FIRST_ROWS", 10)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"], lora_dropout=0.5))
    head: Any = model.get_base_model().get_output_embeddings()
    nn.init.normal_(head.lora_B["default"].weight)
    model.train()
    case = Case.drawn(ROWS, head.in_features, head.out_features)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loss = head_loss(case.hidden, head, case.targets)
        runs.append((loss.item(), torch.autograd.grad(loss, head.lora_A["default"].weight)[0]))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_offloaded_activations_leave_the_chunks_alone() -> None:
    case, head = Case.drawn(), Doubtful(HIDDEN, VOCABULARY)
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head_loss(case.hidden.requires_grad_(), head, case.targets).backward()
    assert packed == []
