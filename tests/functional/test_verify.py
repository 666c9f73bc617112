"""`eft verify`: it holds for every data format, and finds what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typer.testing import CliRunner

from eft.cli import verify as command
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.config.section import key
from eft.core.constants import MANIFEST_NAME
from eft.core.hashing import hash_file
from eft.core.records import PromiseResult
from eft.data.dataset_meta import DatasetMeta
from eft.data.plan import Plan, StepPlan, build_plan
from eft.data.store import as_token_dataset
from eft.inputs import load_trainable_model
from eft.models.attention import install_attention
from eft.models.export import export_model
from eft.models.verify_child import main as verify_child
from eft.trainer.trainer import EftTrainer
from eft.verify.data import check_plan, check_store
from eft.verify.exact import GradientGap, compare_gradients, exact_arithmetic
from eft.verify.excerpt import cut
from eft.verify.keys import CALLBACK_KEYS
from eft.verify.loss import check_loss
from eft.verify.packing import check_packing
from eft.verify.promises import check_promises
from eft.verify.rehearsal import rehearse
from eft.verify.saves import check_checkpoint
from eft.verify.schedule import check_rehearsal
from eft.verify.verification import LEFT_OUT, Verification, assemble
from tests.functional.reference import token_rows
from tests.tiny_models import tiny_model

Plant = Callable[[EftTrainer], None]

app = typer.Typer()
app.command()(command.verify)

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "hello", "world", "Rome", "Paris", "France"]


def own_format(row: dict[str, Any]) -> dict[str, Any]:
    """A user's own format: two columns to segments."""
    return {
        "segments": [{"text": row["asked"], "label": False}, {"text": row["told"], "label": True}],
        "add_eos": True,
    }


def _text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words)) + f" {number}"


def _rows(kind: str) -> list[dict[str, Any]]:
    """14 rows of uneven length in one of the formats."""
    pairs = [(_text(n, 1 + n % 5), _text(n + 50, 2 + (n * 3) % 9)) for n in range(14)]
    match kind:
        case "chat_template":
            roles = ("user", "assistant")
            return [{"messages": [{"role": r, "content": t} for r, t in zip(roles, p, strict=True)]} for p in pairs]
        case "alpaca":
            return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
        case "completion":
            return [{"text": f"{question} {answer}"} for question, answer in pairs]
        case "input_output":
            return [{"segments": [{"text": q, "label": False}, {"text": a, "label": True}]} for q, a in pairs]
        case "pretokenized":
            return token_rows(14, weighted=True)
        case _:
            return [{"asked": question, "told": answer} for question, answer in pairs]


LORA: dict[str, Any] = {"adapter": "lora", "lora_target_linear": True, "lora_dropout": 0.1, "lora_r": 4}

FORMATS: dict[str, dict[str, Any]] = {
    "chat_template": {**LORA, "val_set_size": 3},
    "alpaca": {"sample_packing": False, "micro_batch_size": 2, "weight_decay": 0.1},
    "completion": {"num_epochs": 1.5, "gradient_checkpointing": True},
    "input_output": {**LORA, "pad_to_sequence_len": True, "lora_modules_to_save": ["embed_tokens"]},
    "pretokenized": {"optimizer": "schedule_free_adamw", "warmup_steps": 2, "num_epochs": 4},
    "own": {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 6}, "max_steps": 9},
}
"""Format to the further keys that its run is verified with."""


@pytest.fixture
def write_config(tmp_path: Path, model_folder: Callable[[str], Path], prepared_path: Path) -> Callable[..., Path]:
    """Format and keys to a YAML file, as a user would write it."""

    def write(kind: str, **keys: Any) -> Path:
        rows = tmp_path / f"{kind}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in _rows(kind)))
        format_name = {"own": f"{__name__}:own_format"}.get(kind, kind)
        values = {
            "base_model": str(model_folder("llama")),
            "datasets": [{"path": str(rows), "type": format_name}],
            "dataset_prepared_path": str(prepared_path),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 384,
            "sample_packing": True,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "bf16": False,
            **keys,
        }
        path = tmp_path / "run.yaml"
        with path.open("w") as file:
            YAML().dump(values, file)
        return path

    return write


@pytest.mark.usefixtures("warm_child")
def test_data_over_a_gate_are_found(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A held-out row that training has, too; and prompts that a server would write otherwise."""
    rows = _rows("chat_template")
    rows[3]["messages"] = [{**turn, "content": turn["content"].upper()} for turn in rows[3]["messages"]]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[3:5]))
    config = write_config("chat_template", test_datasets=[{"path": str(held_out), "type": "chat_template"}])
    code, results = run_command(config, "datasets[0].chat_template=zephyr", "test_datasets[0].chat_template=zephyr")
    assert code == 1
    assert failed(results) == {"data gates"}
    limits, template = [result for result in results if result["promise"] == "data gates"]
    assert "leaks: eval: 1 of 2 held-out samples" in limits["detail"]
    assert "chat_template.jsonl row 4: a row of eval has the same text" in limits["detail"]
    assert "another template than the one that is saved with the model" in template["detail"]
    assert limits["status"] == template["status"] == "fail"


@pytest.fixture
def warm_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export is loaded in this process: a fresh one costs ten seconds of imports, and one test pays for it."""

    def run_child(folder: Path, ids: list[int]) -> tuple[dict[str, Tensor], str]:
        out = folder.parent / "child.safetensors"
        verify_child(folder, ids, out)
        return load_file(out), ""

    monkeypatch.setattr("eft.models.verify_export._run_child", run_child)


@pytest.fixture(autouse=True)
def _quiet_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets up logging for a whole process, which is not this one's business."""
    monkeypatch.setattr(command, "set_up_logging", lambda: None)


def run_command(config: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and results of `eft verify CONFIG --json`."""
    result = CliRunner().invoke(app, [str(config), "--json", *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def failed(results: list[dict[str, Any]]) -> set[str]:
    return {result["promise"] for result in results if result["status"] == "fail"}


# ---- it holds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("warm_child")
def test_every_format_is_verified(kind: str, write_config: Callable[..., Path], tmp_path: Path) -> None:
    code, results = run_command(write_config(kind, **FORMATS[kind]))
    assert [result for result in results if result["status"] != "pass"] == []
    assert code == 0
    assert {result["promise"] for result in results} == {
        *("E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8"),
        *("dtypes", "trained tensors", "data gates"),
    }
    assert not (tmp_path / "out").exists(), "nothing is written into the user's output_dir"


def test_the_table_and_a_fresh_process(write_config: Callable[..., Path]) -> None:
    result = CliRunner().invoke(
        app, [str(write_config("chat_template", **LORA)), "max_steps=5"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "E2" in result.stdout
    assert "fail" not in result.stdout
    assert "VERIFIED" in result.stdout
    assert "checks hold" in result.stdout


FAMILIES = {
    "qwen3": {},
    "gemma2": {},
    "gpt_oss": {},
    "qwen3_moe": {},
    "bloom": {"sample_packing": False, "micro_batch_size": 3},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_exact(family: str, tmp_path: Path, tokenizer: Any) -> None:
    verification = _verification(tmp_path, tokenizer, family, **FAMILIES[family])
    with exact_arithmetic(verification.model):
        trainer = verification.build_exact_trainer()
        results = [check_packing(verification, trainer), check_loss(verification, trainer)]
    assert [result.status for result in results] == ["pass", "pass"], results
    assert all(result.detail.endswith("fp64") for result in results)
    assert all(result.numbers["gradients"] < 1e-6 for result in results)


def _verification(tmp_path: Path, tokenizer: Any, family: str = "llama", **keys: Any) -> Verification:
    """Made of parts: a tiny model of a family, token rows, no files."""
    config = _config(tmp_path, **keys)
    dataset = as_token_dataset(token_rows(14))
    plan = build_plan(
        dataset,
        capacity=config.sequence_len,
        packed=config.sample_packing,
        sequential=False,
        shuffle=True,
        global_batch_size=2,
        num_epochs=config.num_epochs,
        max_steps=None,
        seed=0,
    )
    meta = DatasetMeta(dataset, None, plan.total_steps)
    return Verification(config, tmp_path / "work", tokenizer, meta, tiny_model(family), plan)


def _config(tmp_path: Path, **keys: Any) -> TrainConfig:
    values = {
        "base_model": "in memory",
        "datasets": [{"path": "rows.jsonl"}],
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 64,
        "sample_packing": True,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
    }
    return config_from_mapping({**values, **keys})


def test_the_model_comes_out_as_it_went_in() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with exact_arithmetic(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
        assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
        model.eval()
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    assert [module.training for module in model.modules()] == modes
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.3}


# ---- it finds what is wrong, and says so by the exit code ------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], None]:
    """Change every trainer that the verification builds."""

    def planted(change: Plant) -> None:
        build = Verification.build_trainer

        def build_and_change(self: Verification, *args: Any, **kwargs: Any) -> EftTrainer:
            trainer = build(self, *args, **kwargs)
            change(trainer)
            return trainer

        monkeypatch.setattr(Verification, "build_trainer", build_and_change)

    return planted


def _leaky_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """One causal row, whatever the boundaries say."""
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(name, None)
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


@pytest.fixture
def leaky_name() -> Iterator[str]:
    AttentionInterface.register("leaky_for_tests", _leaky_attention)
    AttentionMaskInterface.register("leaky_for_tests", sdpa_mask)
    yield "leaky_for_tests"
    AttentionInterface._global_mapping.pop("leaky_for_tests")
    AttentionMaskInterface._global_mapping.pop("leaky_for_tests")


@pytest.mark.usefixtures("warm_child")
def test_a_leaky_mask_is_found(
    write_config: Callable[..., Path], plant: Callable[[Plant], None], leaky_name: str
) -> None:
    plant(lambda trainer: install_attention(trainer.model, leaky_name))
    code, results = run_command(write_config("chat_template"))
    assert code == 1
    assert failed(results) == {"E1", "E2", "E4"}
    assert "documents see each other" in next(r for r in results if r["promise"] == "E1")["detail"]


def _mean_of_micro_batch(loss: Any) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: loss(model, batch) / max(1, batch["num_trained"])


@pytest.mark.usefixtures("warm_child")
def test_a_wrong_normalisation_is_found(write_config: Callable[..., Path], plant: Callable[[Plant], None]) -> None:
    def normalise_wrongly(trainer: EftTrainer) -> None:
        trainer.parts.loss = _mean_of_micro_batch(trainer.parts.loss)

    plant(normalise_wrongly)
    code, results = run_command(write_config("alpaca"))
    assert code == 1
    assert failed(results) == {"E2", "E4"}


def _freeze_half(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".layers.1." in name:
            parameter.requires_grad_(False)


def _freeze_all(model: Any) -> None:
    model.requires_grad_(False)


def _detach_one(model: Any) -> None:
    module = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))
    module.register_forward_hook(lambda module, inputs, output: output.detach())


@pytest.mark.parametrize(
    ("freeze", "also"),
    [(_freeze_half, set()), (_freeze_all, {"E1", "E2", "E4", "E6", "E7"}), (_detach_one, set())],
    ids=["half", "all", "detached"],
)
@pytest.mark.usefixtures("warm_child")
def test_a_frozen_adapter_is_found(
    freeze: Callable[[Any], None],
    also: set[str],
    write_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_and_freeze(config: TrainConfig, tokenizer: Any) -> Any:
        model = load_trainable_model(config, tokenizer)
        freeze(model)
        return model

    monkeypatch.setattr("eft.verify.verification.load_trainable_model", load_and_freeze)
    code, results = run_command(write_config("chat_template", **LORA))
    assert code == 1
    assert "trained tensors" in failed(results)
    assert failed(results) - {"trained tensors"} <= {*also, "E7"}


def _flip_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def _other_weights(folder: Path) -> None:
    """Wrong from the start: the manifest fits, the weights are not the live ones."""
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, file, metadata=metadata)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"][file.name] = {"sha256": hash_file(file), "size": file.stat().st_size}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.mark.parametrize("alter", [_flip_a_byte, _other_weights])
@pytest.mark.usefixtures("warm_child")
def test_an_altered_save_is_found(
    alter: Callable[[Path], None], write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_and_alter(model: Any, tokenizer: Any, folder: Path, **options: Any) -> dict[str, Any]:
        manifest = export_model(model, tokenizer, folder, **options)
        alter(folder)
        return manifest

    monkeypatch.setattr("eft.verify.saves.export_model", export_and_alter)
    code, results = run_command(write_config("completion"))
    assert code == 1
    assert failed(results) == {"E6"}
    assert [r["status"] for r in results if r["promise"] == "E6"] == ["fail", "fail", "pass"]


class WiderConfig(TrainConfig):
    """A config with a key that no component knows."""

    sharpness: float = key(1.0, "Read by nobody.")


@pytest.mark.parametrize(("sharpness", "status"), [(1.0, "pass"), (2.0, "fail")])
@pytest.mark.usefixtures("warm_child")
def test_a_key_that_nothing_reads_is_found(
    sharpness: float, status: str, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    values = YAML(typ="safe").load(write_config("completion", save_dtype="float32", val_set_size=2))
    config = WiderConfig(**values, sharpness=sharpness)
    config.forget_reads()
    results = list(check_promises(assemble(config, tmp_path / "work")))
    assert {result.promise: result.status for result in results if result.promise in ("E6", "E7", "E8")} == {
        "E6": "pass",
        "E7": "pass",
        "E8": status,
    }
    assert ("sharpness" in results[-1].detail) == (status == "fail")


# ---- single checks ---------------------------------------------------------------------------------------------------


class _RepeatingPlan(Plan):
    """Trains the first sample twice in the first step and forgets another one."""

    def step(self, step: int) -> StepPlan:
        planned = super().step(step)
        if step == 0:
            planned.bins[0] = planned.bins[0].copy()
            planned.bins[0][-1] = planned.bins[0][0]
        return planned


def _plan(rows: int, plan_class: type[Plan] = Plan, num_epochs: float = 2.0) -> Plan:
    dataset = as_token_dataset(token_rows(rows))
    plan = build_plan(
        dataset,
        capacity=64,
        packed=True,
        sequential=False,
        shuffle=True,
        global_batch_size=3,
        num_epochs=num_epochs,
        max_steps=None,
        seed=0,
    )
    return plan_class(dataset, plan.options, num_epochs=num_epochs, max_steps=None, total_num_steps=None)


@pytest.mark.parametrize("num_epochs", [1.0, 2.0, 1.4, 0.3])
def test_every_sample_once_per_epoch(num_epochs: float) -> None:
    assert check_plan(_plan(31, num_epochs=num_epochs), micro_batch_size=1).status == "pass"


def test_a_repeated_sample_is_found() -> None:
    result = check_plan(_plan(31, _RepeatingPlan), micro_batch_size=1)
    assert result.status == "fail"
    assert result.numbers["faults"] >= 2


def test_wrong_counts_in_the_store_are_found() -> None:
    dataset = as_token_dataset(token_rows(9))
    dataset.weight_sums = dataset.weight_sums.copy()
    dataset.weight_sums[4] += 1.0
    result = check_store(DatasetMeta(dataset, None, 1), 128)
    assert result.status == "fail"
    assert "training sample 4" in result.detail


def test_a_rate_off_the_closed_form_is_found(tmp_path: Path, tokenizer: Any, plant: Callable[[Plant], None]) -> None:
    def warm_up_late(trainer: EftTrainer) -> None:
        trainer.parts.scheduler = lambda optimizer, total: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (step + 2) / (total + 2)
        )

    plant(warm_up_late)
    verification = _verification(tmp_path, tokenizer)
    result = check_rehearsal(verification, rehearse(verification))
    assert result.status == "fail"
    assert "by the closed form" in result.detail


def test_a_checkpoint_that_forgets_the_optimizer_is_found(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verification = _verification(tmp_path, tokenizer)
    rehearsal = rehearse(verification)
    assert check_checkpoint(verification, rehearsal.trainer).status == "pass"
    rehearsal.trainer.state.global_step += 1
    monkeypatch.setattr(rehearsal.trainer, "_load_optimizer_and_scheduler", lambda checkpoint: None)
    result = check_checkpoint(verification, rehearsal.trainer)
    assert result.status == "fail"
    assert "optimizer" in result.detail


@pytest.mark.usefixtures("warm_child")
def test_a_check_that_breaks_off_hides_no_other(tmp_path: Path, tokenizer: Any, plant: Callable[[Plant], None]) -> None:
    def break_forward(trainer: EftTrainer) -> None:
        trainer.parts.loss = lambda model, batch: torch.ones(2) @ torch.ones(3)

    plant(break_forward)
    results: list[PromiseResult] = list(check_promises(_verification(tmp_path, tokenizer)))
    assert [r.promise for r in results if "RuntimeError" in r.detail] == ["E2", "E4", "E7", "trained tensors"]
    assert next(r for r in results if r.promise == "E1").status == "pass"


def test_documents_are_cut_around_what_is_trained() -> None:
    sample = as_token_dataset([{"input_ids": list(range(40)), "labels": [-100] * 30 + list(range(30, 40))}]).sample(0)
    for length in (2, 3, 8, 20):
        window = cut(sample, length)
        assert len(window.input_ids) == length
        assert np.any(window.labels[1:] != -100)
    assert cut(sample, 64) is sample


def test_gradients_are_measured_per_tensor() -> None:
    expected = {"large": torch.tensor([1.0, 0.0]), "small": torch.tensor([1e-9])}
    assert compare_gradients(expected, expected) == GradientGap(0.0, "", 1.0)
    measured = replace(compare_gradients({**expected, "small": torch.tensor([2e-3])}, expected), share=0.0)
    assert measured.tensor == "small"
    assert np.isclose(compare_gradients({"large": torch.tensor([0.5, 0.0])}, expected).share, 0.5)
    poisoned = compare_gradients({**expected, "large": torch.tensor([float("nan"), 0.0])}, expected)
    assert np.isnan(poisoned.share)


def test_what_the_rehearsal_leaves_out_are_keys() -> None:
    assert set(TrainConfig.model_fields) >= CALLBACK_KEYS | set(LEFT_OUT)
