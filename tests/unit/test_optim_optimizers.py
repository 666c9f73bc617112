"""The contract of every optimizer in the table: it learns, it resumes bit for bit, it respects groups and config."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eft.config.load import load_config
from eft.config.optim import OptimConfig, OptimizerName
from eft.core.errors import CheckpointError, ConfigError, ModelError
from eft.optim.averaging import TrainingIterate, averaged_parameters
from eft.optim.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    evaluation_state_dict,
    evaluation_weights,
    is_schedule_free,
)
from eft.optim.schedulers import build_scheduler, learning_rates
from eft.optim.state_size import optimizer_state_bytes
from eft.runtime.optimizer_state import load_optimizer, load_scheduler, save_optimizer, save_scheduler
from tests.optimizer_names import AVERAGED, ELSEWHERE, MISSING, RUNNABLE, rate_of


class Small(nn.Module):
    """Matrices, one large enough for 8 bits, a norm, a tied embedding, a frozen layer, a matrix without gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 64)
        self.large = nn.Linear(64, 64, bias=False)
        self.back = nn.Linear(64, 6)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 2, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(
            self.norm(self.frozen(self.back(torch.tanh(self.large(self.mix(self.embed(ids)))))))
        )
        return logits


def config(name: str, **keys: Any) -> OptimConfig:
    return OptimConfig(**{"learning_rate": rate_of(name), "optimizer": name, "weight_decay": 0.01, **keys})


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step % 3))
    return nn.functional.cross_entropy(model(ids), (ids + 1) % 11)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.named_parameters()}


def full_state(optimizer: torch.optim.Optimizer) -> Any:
    """State in the order of the groups, and the groups' settings."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [dict(optimizer.state.get(parameter, {})) for parameter in parameters], groups


def assert_same_state(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    (left_state, left_groups), (right_state, right_groups) = full_state(left), full_state(right)
    assert left_groups == right_groups
    for entries, others in zip(left_state, right_state, strict=True):
        assert entries.keys() == others.keys()
        for key, value in entries.items():
            other = others[key]
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype
                assert value.shape == other.shape
                assert torch.equal(
                    value.view(torch.uint8) if value.ndim else value, other.view(torch.uint8) if value.ndim else other
                )
            else:
                assert value == other


def test_the_table_has_exactly_the_names_of_the_config() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimizerName))


@pytest.mark.parametrize("name", RUNNABLE)
def test_it_learns(name: str) -> None:
    model, steps = Small(), 60
    cfg = config(name)
    optimizer = build_optimizer(cfg, model)
    before = loss_of(model).item()
    train(model, optimizer, build_scheduler(cfg, optimizer, steps), range(steps))
    with evaluation_weights(optimizer):
        assert loss_of(model).item() < 0.7 * before


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_resume_is_bit_equal(name: str, cut: int, tmp_path: Path) -> None:
    cfg, total = config(name, warmup_steps=None), 9
    straight = Small()
    optimizer = build_optimizer(cfg, straight)
    scheduler = build_scheduler(cfg, optimizer, total)
    train(straight, optimizer, scheduler, range(cut))
    save_optimizer(tmp_path, optimizer, straight)
    save_scheduler(tmp_path, scheduler)
    weights = copy.deepcopy(straight.state_dict())
    train(straight, optimizer, scheduler, range(cut, total))

    resumed = Small()
    resumed.load_state_dict(weights)
    second = build_optimizer(cfg, resumed)
    second_scheduler = build_scheduler(cfg, second, total)
    load_optimizer(tmp_path, second, resumed)
    load_scheduler(tmp_path, second_scheduler)
    train(resumed, second, second_scheduler, range(cut, total))

    assert bits(resumed) == bits(straight)
    assert_same_state(second, optimizer)
    assert second_scheduler.get_last_lr() == scheduler.get_last_lr()
    assert second_scheduler.last_epoch == scheduler.last_epoch


@pytest.mark.parametrize("name", RUNNABLE)
def test_resume_through_torchs_state_dict_is_bit_equal(name: str) -> None:
    cfg = config(name, lr_scheduler="constant")
    straight = Small()
    optimizer = build_optimizer(cfg, straight)
    train(straight, optimizer, build_scheduler(cfg, optimizer, 6), range(3))
    weights, saved = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, build_scheduler(cfg, optimizer, 6), range(3, 6))
    resumed = Small()
    resumed.load_state_dict(weights)
    second = build_optimizer(cfg, resumed)
    second.load_state_dict(saved)
    train(resumed, second, build_scheduler(cfg, second, 6), range(3, 6))
    assert bits(resumed) == bits(straight)
    assert_same_state(second, optimizer)


DTYPES = {
    "none": set(),
    "fp32": {torch.float32},
    "factored fp32": {torch.float32},
    "8-bit": {torch.uint8, torch.float32},
    "4-bit": {torch.uint8, torch.float32},
    "fp8": {torch.float8_e4m3fn, torch.float32},
}


@pytest.mark.parametrize("name", RUNNABLE)
def test_state_is_what_the_table_promises(name: str) -> None:
    """dtypes, and bytes per parameter of a large matrix, within 5 %."""
    row = OPTIMIZERS[name]
    layer = nn.Linear(256, 256, bias=False)
    optimizer = build_optimizer(config(name), layer)
    for _ in range(2):
        layer.weight.grad = torch.full_like(layer.weight, 0.01)
        optimizer.step()
    states = [value for value in optimizer.state[layer.weight].values() if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in states if value.ndim} == DTYPES[row.state]
    held = sum(value.nbytes for value in states if value.ndim)
    assert held == optimizer_state_bytes(partial(build_optimizer, config(name)), layer) - sum(
        value.nbytes for value in states if not value.ndim
    )
    assert held / layer.weight.numel() == pytest.approx(row.state_bytes, rel=0.05)


@pytest.mark.parametrize("name", RUNNABLE)
def test_groups_and_frozen_weights(name: str) -> None:
    model = Small()
    optimizer = build_optimizer(config(name, weight_decay=0.5), model)
    assert [(group["name"].split(" · ")[0], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("matrices", 0.5),
        ("norms, biases, embeddings", 0.0),
    ]
    frozen = model.frozen.weight.detach().clone()
    train(model, optimizer, build_scheduler(config(name), optimizer, 3), range(3))
    assert torch.equal(model.frozen.weight, frozen)


@pytest.mark.parametrize("name", RUNNABLE)
def test_weight_decay_pulls_matrices_only(name: str) -> None:
    moved = {}
    for decay in (0.0, 0.9):
        model = Small()
        cfg = config(name, weight_decay=decay, lr_scheduler="constant")
        optimizer = build_optimizer(cfg, model)
        scheduler = build_scheduler(cfg, optimizer, 8)
        for _ in range(8):  # zero gradients: what moves is the decay alone
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            scheduler.step()
        moved[decay] = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert moved[0.9]["mix.weight"].norm() < moved[0.0]["mix.weight"].norm()
    for unchanged in ("mix.bias", "norm.weight", "embed.weight"):
        assert torch.equal(moved[0.9][unchanged], moved[0.0][unchanged])


@pytest.mark.parametrize("name", [name for name in RUNNABLE if OPTIMIZERS[name].is_decoupled])
def test_weight_decay_is_decoupled(name: str) -> None:
    """With zero gradients a matrix shrinks by the factor 1 - rate · decay in every step, and nothing else happens."""
    model, steps = Small(), 5
    before = model.mix.weight.detach().clone()
    optimizer = build_optimizer(config(name, learning_rate=0.1, weight_decay=0.5), model)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    torch.testing.assert_close(model.mix.weight, before * (1 - 0.1 * 0.5) ** steps)


@pytest.mark.parametrize("name", RUNNABLE)
def test_config_keys_reach_the_optimizer_or_are_refused(name: str) -> None:
    row = OPTIMIZERS[name]
    for key, value in (("adam_beta1", 0.7), ("adam_beta2", 0.8), ("adam_beta3", 0.6), ("adam_epsilon", 1e-4)):
        cfg = config(name, **{key: value})
        if key in row.keys:
            group = build_optimizer(cfg, Small()).param_groups[-1]
            assert value in (*group["betas"], group.get("eps"))
            assert key in cfg.keys_read()
        else:
            with pytest.raises(ConfigError, match=f"{key}: not used by optimizer {name}"):
                build_optimizer(cfg, Small())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"momentun": 0.9}, r"optim_args.momentun: optimizer sgd has no such option. Did you mean 'momentum'"),
        ("adamw_torch", {"lr": 1.0}, r"optim_args.lr: set `learning_rate` instead"),
        ("adamw_torch", {"betas": [0.9, 0.99]}, r"set `adam_beta1` and `adam_beta2` instead"),
        ("sgd", {"momentum": "0.9"}, r"expected a number, got '0.9'. Write numbers and true/false without quotes"),
        ("adamw_torch", {"amsgrad": "False"}, r"expected true or false, got 'False'"),
        ("adafactor", {"eps": 1e-6}, r"expected a list of two numbers"),
        ("adafactor", {"relative_step": True}, r"no such option"),
        ("sgd", {"nesterov": True}, r"optim_args: optimizer sgd refuses .*Nesterov"),
        ("sgd", {"momentum": -1}, r"must be at least 0"),
        ("schedule_free_adamw", {"warmup_steps": 3}, r"set `warmup_steps` instead"),
        ("schedule_free_sgd", {"momentum": 0}, r"optimizer schedule_free_sgd refuses"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(config(name, optim_args=options), Small())


def test_right_options_arrive_in_the_right_type() -> None:
    group = build_optimizer(config("sgd", optim_args={"momentum": 1, "nesterov": True}), Small()).param_groups[0]
    assert group["momentum"] == 1.0
    assert isinstance(group["momentum"], float)
    assert group["nesterov"] is True
    group = build_optimizer(config("adafactor", optim_args={"eps": [1e-20, 1e-2]}), Small()).param_groups[0]
    assert group["eps"] == (1e-20, 1e-2)


def test_zero_beta1_cannot_be_averaged() -> None:
    with pytest.raises(ConfigError, match="adam_beta1: optimizer schedule_free_adamw needs more than 0"):
        build_optimizer(config("schedule_free_adamw", adam_beta1=0.0), Small())


def test_nothing_trainable() -> None:
    with pytest.raises(ModelError, match="No parameter of the model is trainable"):
        build_optimizer(config("sgd"), Small().requires_grad_(False))


@pytest.mark.parametrize("name", [name for name in MISSING if "cpu" in OPTIMIZERS[name].devices])
def test_every_missing_package_says_what_to_install(name: str) -> None:
    row = OPTIMIZERS[name]
    with pytest.raises(
        ConfigError, match=rf"{name} needs the package {row.package}; pip install 'eft-trainer\[{row.extra}\]'"
    ):
        build_optimizer(config(name), Small())


@pytest.mark.parametrize("name", ELSEWHERE)
def test_refused_by_name_where_it_cannot_run(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer: {name} runs on cuda only, but the weights are on cpu; use "):
        build_optimizer(config(name), Small())
    assert "cpu" in OPTIMIZERS[OPTIMIZERS[name].instead].devices


def test_numbers_keep_their_type_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-5` as text; here it is a number, in quotes it is refused."""
    (tmp_path / "rows.jsonl").write_text("{}")
    head = "base_model: x\nlearning_rate: 1e-5\ndatasets: [{path: rows.jsonl, type: alpaca}]\noptimizer: rmsprop\n"
    path = tmp_path / "run.yaml"
    path.write_text(head + "optim_args: {eps: 1e-5, centered: true}\n")
    loaded = load_config(path).config
    assert loaded.optim_args == {"eps": 1e-5, "centered": True}
    group = build_optimizer(loaded, Small()).param_groups[0]
    assert (group["eps"], group["centered"]) == (1e-5, True)
    path.write_text(head + "optim_args: {eps: '1e-5'}\n")
    with pytest.raises(ConfigError, match="expected a number, got '1e-5'. Write numbers and true/false without quotes"):
        build_optimizer(load_config(path).config, Small())


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eft.optim.schedule_free", raising=False)
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ConfigError, match=r"schedule_free_sgd needs the package schedulefree; pip install"):
        build_optimizer(config("schedule_free_sgd"), Small())


# Saved state that does not fit ------------------------------------------------------------------------------------


def saved_adamw(folder: Path, **keys: Any) -> None:
    model = Small()
    cfg = config("adamw_torch", **keys)
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, build_scheduler(cfg, optimizer, 2), range(2))
    save_optimizer(folder, optimizer, model)


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved_adamw(tmp_path)
    model = Small()
    with pytest.raises(CheckpointError, match="written by AdamW; this run's optimizer is Lion"):
        load_optimizer(tmp_path, build_optimizer(config("lion_pytorch"), model), model)


def test_other_parameters_are_named(tmp_path: Path) -> None:
    saved_adamw(tmp_path)
    model = Small()
    model.mixer = model.mix
    del model.mix
    with pytest.raises(CheckpointError, match=r"lacks 1 parameter: mixer\.weight \(nearest: mix\.weight\)"):
        load_optimizer(tmp_path, build_optimizer(config("adamw_torch"), model), model)


def test_other_settings_are_refused_unless_allowed(tmp_path: Path) -> None:
    saved_adamw(tmp_path)
    model = Small()
    optimizer = build_optimizer(config("adamw_torch", weight_decay=0.3), model)
    with pytest.raises(CheckpointError, match=r"weight_decay 0.01 in group 'matrices', but this run has 0.3"):
        load_optimizer(tmp_path, optimizer, model)
    load_optimizer(tmp_path, optimizer, model, allow_change=True)
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.state[model.mix.weight]["step"] == 2


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    model = Small()
    optimizer = build_optimizer(config("adamw_torch"), model)
    with pytest.raises(CheckpointError, match=r"optimizer\.json: missing"):
        load_optimizer(tmp_path, optimizer, model)
    saved_adamw(tmp_path)
    (tmp_path / "optimizer.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: broken"):
        load_optimizer(tmp_path, optimizer, model)
    (tmp_path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: missing"):
        load_optimizer(tmp_path, optimizer, model)


def test_loading_replaces_all_earlier_state(tmp_path: Path) -> None:
    """Rolled back to before the first step: nothing of the later steps may stay."""
    model, cfg = Small(), config("adamw_torch")
    optimizer = build_optimizer(cfg, model)
    save_optimizer(tmp_path, optimizer, model)
    train(model, optimizer, build_scheduler(cfg, optimizer, 2), range(2))
    assert optimizer.state[model.mix.weight]
    load_optimizer(tmp_path, optimizer, model)
    assert not optimizer.state


def test_the_schedule_and_the_rates_are_back_at_once(tmp_path: Path) -> None:
    model, cfg = Small(), config("adamw_torch", lr_scheduler="linear")
    optimizer = build_optimizer(cfg, model)
    scheduler = build_scheduler(cfg, optimizer, 10)
    train(model, optimizer, scheduler, range(4))
    save_scheduler(tmp_path, scheduler)
    fresh = build_optimizer(cfg, model)
    resumed = build_scheduler(cfg, fresh, 10)
    load_scheduler(tmp_path, resumed)
    assert resumed.get_last_lr() == scheduler.get_last_lr() == [group["lr"] for group in fresh.param_groups]
    assert fresh.param_groups[0]["lr"] == learning_rates(cfg, 10)[4]
    (tmp_path / "scheduler.json").write_text('{"step": -1}')
    with pytest.raises(CheckpointError, match=r"scheduler\.json: `step` must be a whole number of at least 0, got -1"):
        load_scheduler(tmp_path, resumed)


def test_state_keeps_a_dtype_that_differs_from_the_parameters(tmp_path: Path) -> None:
    """`Optimizer.load_state_dict` would cast it: Adafactor keeps fp32 moments of bf16 parameters."""
    model = Small().to(torch.bfloat16)
    cfg = config("adafactor")
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, build_scheduler(cfg, optimizer, 3), range(3))
    save_optimizer(tmp_path, optimizer, model)
    second = build_optimizer(cfg, model)
    load_optimizer(tmp_path, second, model)
    row = second.state[model.mix.weight]["exp_avg_sq_row"]
    assert row.dtype == torch.float32
    assert torch.equal(row, optimizer.state[model.mix.weight]["exp_avg_sq_row"])


# Schedule-free (D12) ----------------------------------------------------------------------------------------------


def trained(name: str, steps: int = 5) -> tuple[Small, torch.optim.Optimizer]:
    model = Small()
    cfg = config(name)
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, build_scheduler(cfg, optimizer, 20), range(steps))
    return model, optimizer


@pytest.mark.parametrize("name", AVERAGED)
def test_evaluation_does_not_change_training(name: str) -> None:
    cfg, steps = config(name), 8
    results = []
    for evaluates in (False, True):
        model = Small()
        optimizer = build_optimizer(cfg, model)
        scheduler = build_scheduler(cfg, optimizer, steps)
        for step in range(steps):
            if evaluates:
                before = bits(model)
                with evaluation_weights(optimizer):
                    optimizer.eval()  # what the Trainer calls
                    loss_of(model)
                assert bits(model) == before
                optimizer.train()
            train(model, optimizer, scheduler, range(step, step + 1))
        results.append(bits(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_evaluation_weights_are_the_librarys_average(name: str) -> None:
    model, optimizer = trained(name)
    library = type(optimizer).__mro__[2]
    assert not issubclass(library, TrainingIterate)
    reference, other = trained(name)
    library.eval(other)
    with evaluation_weights(optimizer):
        moved = 0
        for (key, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=key)
            moved += int(not torch.equal(ours, trained(name)[0].get_parameter(key)))
    assert moved >= 3


@pytest.mark.parametrize("name", AVERAGED)
def test_export_weights_leave_the_live_ones_alone(name: str) -> None:
    model, optimizer = trained(name, steps=9)
    before = bits(model)
    exported = evaluation_state_dict(optimizer, model)
    assert bits(model) == before
    with evaluation_weights(optimizer):
        assert {key: value.numpy().tobytes() for key, value in exported.items()} == {
            key: value.numpy().tobytes() for key, value in model.state_dict().items()
        }
    assert exported["head.weight"] is exported["embed.weight"]


def test_an_error_inside_still_restores_the_training_iterate() -> None:
    model, optimizer = trained("schedule_free_adamw")
    before = bits(model)

    def fail() -> None:
        with evaluation_weights(optimizer), evaluation_weights(optimizer):
            assert bits(model) != before
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail()
    assert bits(model) == before
    with evaluation_weights(optimizer):
        assert bits(model) != before


def test_nested_use_does_not_average_twice() -> None:
    model, optimizer = trained("schedule_free_adamw")
    before = bits(model)
    with evaluation_weights(optimizer):
        averaged = bits(model)
        with evaluation_weights(optimizer):
            assert bits(model) == averaged
        assert bits(model) == averaged
    assert bits(model) == before != averaged


def test_nothing_happens_for_other_optimizers() -> None:
    model, optimizer = trained("sgd")
    before = bits(model)
    assert not is_schedule_free(optimizer)
    assert not is_schedule_free(None)
    with evaluation_weights(optimizer), evaluation_weights(None):
        assert bits(model) == before
    assert evaluation_state_dict(optimizer, model).keys() == model.state_dict().keys()


def test_bf16_averages_are_worked_out_in_fp32() -> None:
    model = Small().to(torch.bfloat16)
    cfg = config("schedule_free_sgd")
    optimizer = build_optimizer(cfg, model)
    train(model, optimizer, build_scheduler(cfg, optimizer, 4), range(4))
    assert is_schedule_free(optimizer)
    for parameter, average in averaged_parameters(optimizer):
        y, z = parameter.detach().double(), optimizer.state[parameter]["z"].double()
        expected = y + (1 - 1 / 0.9) * (z - y)
        assert average.dtype == torch.bfloat16
        # half a unit in the last place of bf16, plus fp32's own error
        assert torch.all((average.double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-7)


class KernelNames(TorchDispatchMode):
    """Writes down which of torch's kernels run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func.name()))
        return func(*args, **(kwargs or {}))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16_update", [None, "stochastic_rounding", "fp32_master"])
def test_the_default_is_the_fused_kernel(bf16_update: Any, device: str) -> None:
    model = Small().to(device)
    if bf16_update is not None:
        model.bfloat16()
    cfg = OptimConfig(learning_rate=0.1)
    assert cfg.optimizer == "adamw_torch_fused"
    optimizer = build_optimizer(cfg, model, bf16_update=bf16_update)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with KernelNames() as kernels:
        optimizer.step()
    assert any(name.startswith("aten::_fused_adamw_") for name in kernels.names)
    assert not any("addcdiv" in name for name in kernels.names), "the unfused update ran"
