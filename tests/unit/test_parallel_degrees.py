"""One plan object for every degree: what fits comes out whole, what does not divide is refused by its keys."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft.config.load import config_from_mapping
from eft.config.parallel import ParallelConfig
from eft.core.errors import ConfigError, ModelError
from eft.parallel.engine import accelerator_arguments, load_time_sharding
from eft.parallel.plan import Degrees
from eft.parallel.tensor import SUMMED_STYLE, exact_plan
from tests.tiny_models import tiny_model

SIZES = st.one_of(st.none(), st.integers(1, 9))


@given(
    world=st.integers(1, 64),
    shard=SIZES,
    replicate=SIZES,
    tp=st.integers(1, 4),
    cp=st.integers(1, 4),
    fsdp=st.booleans(),
)
def test_degrees_multiply_to_the_processes_or_are_refused_by_key(
    world: int, shard: int | None, replicate: int | None, tp: int, cp: int, fsdp: bool
) -> None:
    keys = ParallelConfig(
        dp_shard_size=shard,
        dp_replicate_size=replicate,
        tensor_parallel_size=tp,
        context_parallel_size=cp,
        fsdp_version=2 if fsdp else None,
    )
    try:
        found = Degrees.resolve(world, keys)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        named = refusal.split(":")[0]
        assert named in keys.changed_keys() or named == "dp_replicate_size"
        assert "process" in refusal
        return
    assert found.dp_replicate * found.dp_shard * found.tp * found.cp == world
    assert (found.tp, found.cp) == (tp, cp)
    assert shard in (None, found.dp_shard)
    assert replicate in (None, found.dp_replicate)
    # Every batch is worked on by tp · cp neighbours, and by nobody else.
    ranks = [found.data_rank(rank) for rank in range(world)]
    assert ranks == sorted(ranks)
    assert {ranks.count(rank) for rank in ranks} == {tp * cp}
    assert found.gradient_ranks * tp == world
    assert found.sharded or found.dp_shard == 1


@pytest.mark.parametrize(
    ("world", "keys", "text"),
    [
        (4, {}, "DDP 4"),
        (4, {"fsdp_version": 2}, "FSDP2 4"),
        (4, {"fsdp_config": {"reshard_after_forward": False}}, "FSDP2 4"),
        (4, {"dp_shard_size": 2}, "HSDP 2 × 2"),
        (8, {"dp_replicate_size": 2, "fsdp_version": 2}, "HSDP 2 × 4"),
        (2, {"tensor_parallel_size": 2}, "TP 2"),
        (4, {"tensor_parallel_size": 2}, "DDP 2 × TP 2"),
        (4, {"tensor_parallel_size": 2, "fsdp_version": 2}, "FSDP2 2 × TP 2"),
        (8, {"tensor_parallel_size": 2, "dp_shard_size": 2}, "HSDP 2 × 2 × TP 2"),
        (4, {"context_parallel_size": 2}, "DDP 2 × CP 2"),
        (1, {"fsdp_version": 2}, "one process"),
    ],
)
def test_what_the_keys_mean(world: int, keys: dict[str, Any], text: str) -> None:
    assert str(Degrees.resolve(world, ParallelConfig(**keys))) == text


@pytest.mark.parametrize(
    ("world", "keys", "message"),
    [
        (4, {"tensor_parallel_size": 3}, "tensor_parallel_size: 3 does not divide 4 processes; use 2"),
        (6, {"dp_shard_size": 4}, r"dp_shard_size: 4 does not divide 6 \(6 processes\); use 3"),
        (
            8,
            {"dp_shard_size": 2, "dp_replicate_size": 2},
            "dp_replicate_size: 2 × `dp_shard_size` 2 is 4, but there are 8",
        ),
        (4, {"context_parallel_size": 2, "tensor_parallel_size": 4}, "context_parallel_size: 2 × `tensor_parallel"),
    ],
)
def test_what_does_not_divide_is_named(world: int, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Degrees.resolve(world, ParallelConfig(**keys))


BASE = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp_config": {"fsdp_offload_params": True}}, "did you mean `offload_params`"),
        ({"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "a checkpoint has one format"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "use the key `gradient_checkpointing`"),
        ({"context_parallel_size": 2, "sample_packing": False}, "needs `sample_packing: true`"),
        (
            {"context_parallel_size": 2, "attn_implementation": "sdpa", "sample_packing": True},
            "attn_implementation: eft",
        ),
        (
            {"tensor_parallel_size": 2, "adapter": "lora", "lora_target_linear": True, "peft_use_dora": True},
            "whole mat",
        ),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True, "min_num_params": 9}}, "`fsdp_config: min_num_params` is"),
        (
            {"tensor_parallel_size": 2, "context_parallel_size": 2, "sample_packing": True},
            "both split the attention heads",
        ),
        ({"ring_attn_func": "varlen_llama3"}, "context_parallel_size"),
        ({"sequence_parallel_degree": 2}, "ring attention is not offered"),
    ],
)
def test_contradictions_between_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_mapping({**BASE, **keys})


def test_a_plan_is_exact_changed_or_refused_by_its_styles() -> None:
    plan = {"layers.*.q_proj": "colwise", "layers.*.o_proj": "rowwise", "embed_tokens": "embedding_rowwise"}
    assert exact_plan(plan, "llama") == {}
    partial = {"layers.*.q_norm": "replicated_with_grad_allreduce"}
    changes = exact_plan(plan | partial, "qwen3")
    assert changes == {"layers.*.q_norm": SUMMED_STYLE}
    assert exact_plan(plan | changes, "qwen3") == {}
    with pytest.raises(ModelError, match="not offered for odd: its plan splits layers.x as `sideways`"):
        exact_plan(plan | {"layers.x": "sideways"}, "odd")
    with pytest.raises(ModelError, match="no plan for opt"):
        exact_plan({}, "opt")


def test_what_is_split_at_load_is_told_to_transformers_and_the_rest_to_accelerate() -> None:
    keys = ParallelConfig(tensor_parallel_size=2, dp_shard_size=2, fsdp_config={"offload_params": True})
    degrees = Degrees.resolve(8, keys)
    split = load_time_sharding(keys, degrees, tiny_model("llama"))
    assert split is not None
    assert (split.tp_size, split.fsdp_size, split.dp_replicate_size, split.fsdp_cpu_offload) == (2, 2, 2, True)
    assert accelerator_arguments(keys, degrees) == {}
    keys = ParallelConfig(fsdp_config={"cpu_ram_efficient_loading": True})
    split = load_time_sharding(keys, Degrees.resolve(4, keys), tiny_model("gpt_neox"))
    assert split is not None
    assert (split.tp_size, split.fsdp_size) == (1, 4)
    with pytest.raises(ConfigError, match="4 does not divide num_key_value_heads 2 of this llama; use one of 1, 2"):
        load_time_sharding(keys, Degrees(4, tp=4, in_parts=True), tiny_model("llama"))
    for keys in (ParallelConfig(fsdp_version=2), ParallelConfig()):
        assert load_time_sharding(keys, Degrees.resolve(4, keys), tiny_model("gpt_neox")) is None
