"""What `deepspeed` says, what of it the YAML decides, and reading a run of a tensor's numbers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError
from eft.parallel import deepspeed
from eft.parallel.plan import Degrees, batch_of
from eft.runtime.tensors import TensorFiles


def config(**keys: Any) -> TrainConfig:
    return config_from_mapping(
        {"base_model": "m", "datasets": [{"path": "d"}], "learning_rate": 1e-3, "bf16": False, **keys}
    )


def arguments(world_size: int = 2, dtype: torch.dtype = torch.float32, **keys: Any) -> dict[str, Any] | None:
    cfg = config(**keys)
    return deepspeed.deepspeed_arguments(cfg, Degrees.resolve(world_size, cfg), batch_of(cfg, world_size), dtype)


def test_a_name_a_file_and_options_say_the_same(tmp_path: Path) -> None:
    options = {"zero_optimization": {"stage": 3}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(options))
    said = [arguments(deepspeed=value) for value in ("zero3", str(path), options)]
    assert said[0] == said[1] == said[2]
    assert said[0] is not None
    assert said[0]["zero_optimization"] == {"stage": 3}


def test_one_process_needs_no_deepspeed() -> None:
    assert arguments(1, deepspeed="zero2") is None
    assert str(Degrees.resolve(1, config(deepspeed="zero2"))) == "one process"
    assert str(Degrees.resolve(4, config(deepspeed="zero2"))) == "ZeRO-2 4"


def test_weights_stay_fp32_and_gradients_travel_in_fp32() -> None:
    said = arguments(dtype=torch.bfloat16, bf16=True, deepspeed={"zero_optimization": {"stage": 2}, "bf16": "auto"})
    assert said is not None
    assert said["bf16"] == said["fp16"] == {"enabled": False}
    assert said["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"train_batch_size": 8}, {"global_batch_size": 8}),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}, {"micro_batch_size": 2}),
        ({"gradient_clipping": 0.5, "fp16": {"enabled": False}, "bf16": {"enabled": False}}, {"max_grad_norm": 0.5}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto", "eps": 1e-8}}}, {}),
        ({"scheduler": "auto", "optimizer": "auto", "steps_per_print": 10}, {}),
    ],
)
def test_what_says_the_same_is_taken(options: dict[str, Any], keys: dict[str, Any]) -> None:
    said = arguments(deepspeed=ZERO2 | options, **keys)
    assert said is not None
    assert not {"optimizer", "scheduler", "train_batch_size"} & said.keys()
    assert said["train_micro_batch_size_per_gpu"] == said["gradient_clipping"] == "auto"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"train_batch_size": 7}, "`train_batch_size: 7`.*`global_batch_size` is 2"),
        ({"train_micro_batch_size_per_gpu": 4}, "`train_micro_batch_size_per_gpu: 4`.*`micro_batch_size` is 1"),
        ({"gradient_accumulation_steps": 3}, "`gradient_accumulation_steps: 3`.*`gradient_accumulation_steps` is 1"),
        ({"gradient_clipping": 0.1}, "`gradient_clipping: 0.1`.*`max_grad_norm` is 1.0"),
        ({"bf16": {"enabled": True}}, "`bf16.enabled: True`.*`bf16` is False"),
        ({"fp16": {"enabled": True}}, "`fp16.enabled: True`.*`fp16` is False"),
        ({"optimizer": {"type": "Lamb"}}, "`optimizer.type: Lamb`.*`optimizer: adamw_torch_fused`"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, "`optimizer.params.lr: 1`.*`learning_rate` is 0.001"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler`.*`lr_scheduler: cosine`"),
    ],
)
def test_what_contradicts_the_yaml_is_refused_with_both_names(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        arguments(deepspeed=ZERO2 | options)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"deepspeed": "zero4"}, "neither a file nor one of zero1, zero2, zero3; did you mean"),
        ({"deepspeed": {}}, "must be 1, 2 or 3, got None"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "without ZeRO remove `deepspeed`"),
        ({"deepspeed": ZERO2 | {"pipeline": {}}}, "`pipeline` is not offered: pipelines are not"),
        ({"deepspeed": ZERO2 | {"gradient_cliping": 1}}, "did you mean `gradient_clipping`"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}},
            "`zero_optimization.offload_optimizer.device: nvme`",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}}, "zero_hpz_partition_size"),
        ({"deepspeed": "zero2", "fsdp_version": 2}, "both it and FSDP shard"),
        ({"deepspeed": "zero2", "tensor_parallel_size": 2}, "remove `tensor_parallel_size`"),
        ({"deepspeed": "zero2", "optimizer": "muon"}, "`optimizer: muon` needs whole"),
        ({"deepspeed": "zero2", "nonfinite_action": "skip"}, "`nonfinite_action: stop`"),
        ({"deepspeed": "zero2", "bf16": "auto", "fp16": True}, "`bf16: true` instead of `fp16`"),
        (
            {"deepspeed": "zero2", "adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True},
            "weights in 4 or 8 bits are not offered",
        ),
    ],
)
def test_what_is_not_offered_is_refused_by_name(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**keys)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": ')
    with pytest.raises(ConfigError, match=r"zero\.json.*Expecting value"):
        config(deepspeed=str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object, got a list"):
        config(deepspeed=str(path))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'eft-trainer\[deepspeed\]'"):
        deepspeed.check_deepspeed(Degrees.resolve(2, config(deepspeed="zero2")))
    deepspeed.check_deepspeed(Degrees.resolve(1, config(deepspeed="zero2")))


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_a_run_of_a_tensor_is_read_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], data: st.DataObject
) -> None:
    count = prod(shape)
    whole = torch.arange(count, dtype=torch.float32).reshape(shape)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_file({"x": whole}, path)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(TensorFiles(path).read("x", slice(start, stop)), whole.flatten()[start:stop])
