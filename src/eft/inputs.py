"""What a run is made of: tokenizer, processor, data, plan and model, as the config describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from eft.builder import as_config
from eft.config.root import TrainConfig
from eft.config.usage import keys_read
from eft.data.chat_template import template_of
from eft.data.dataset_meta import DatasetMeta
from eft.data.entry import Progress
from eft.data.gates import pass_gates
from eft.data.image_prepare import prepare_images
from eft.data.plan import Plan, build_plan
from eft.data.prepare import prepare_datasets
from eft.data.stream import StreamDataset
from eft.data.stream_plan import StreamPlan
from eft.data.stream_prepare import plan_of_stream, prepare_stream
from eft.models.adapters import apply_adapter, apply_freezing
from eft.models.cost import attention_cost_ratio
from eft.models.load import load_model, model_without_weights
from eft.models.processor import load_processor
from eft.models.seeding import seeded_rng
from eft.models.tokenizer import check_no_new_rows, load_tokenizer, resize_embeddings
from eft.parallel.engine import load_time_sharding
from eft.parallel.lora import remake_adapters
from eft.parallel.plan import Degrees, batch_of
from eft.runtime.env import Environment, resolve_precision


def prepare_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The config's tokenizer with the config's chat template, as it trains and as it is exported."""
    tokenizer = load_tokenizer(config)
    is_changed = config.chat_template_kwargs or config.chat_template_date is not None
    if config.chat_template != "tokenizer_default" or is_changed:
        tokenizer.chat_template = template_of(tokenizer, config)
    return tokenizer


def prepare_processor(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | None:
    """The processor of a model that takes images, around the run's tokenizer; None without `processor_type`."""
    return None if config.processor_type is None else load_processor(config, config.processor_type, tokenizer)


def load_datasets(
    cfg: TrainConfig | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: Progress | None = None,
    world_size: int | None = None,
    stop_at_gates: bool = True,
    compare_all: bool = False,
) -> DatasetMeta:
    """Prepare the config's data (or find them prepared), check them, and count the steps they give.

    Args:
        world_size: processes of the run; default: those that the launcher has started.
        stop_at_gates: raise where the data are over a gate's limit; else only say so in `gates`.
        compare_all: compare every conversation with `apply_chat_template`.

    Raises:
        DataError: a row, file or data set is wrong; the message names it.
    """
    config = as_config(cfg)
    tokenizer = tokenizer or prepare_tokenizer(config)
    processor = prepare_processor(config, tokenizer)
    if processor is not None:
        prepared = prepare_images(config, processor, progress=progress)
    else:
        prepare = prepare_stream if config.streaming else prepare_datasets
        prepared = prepare(config, tokenizer, progress=progress)
    gates = pass_gates(config, prepared, tokenizer, stop=stop_at_gates, compare_all=compare_all)
    evals: Any = prepared.evals
    if len(evals) <= 1:
        evals = next(iter(evals.values()), None)
    plan = any_plan_of(config, prepared.train, world_size or Environment.detect().world_size)
    return DatasetMeta(
        prepared.train,
        evals,
        plan.total_steps,
        ledger=prepared.ledger,
        eval_conversations=prepared.eval_conversations,
        eval_tools=prepared.eval_tools,
        cache_note=prepared.cache_note,
        keys_read=keys_read(config),
        gates=gates,
        processor=processor,
    )


def any_plan_of(config: TrainConfig, dataset: Any, world_size: int) -> Plan | StreamPlan:
    """As `plan_of`, also over a stream."""
    if isinstance(dataset, StreamDataset):
        return plan_of_stream(config, dataset, batch_of(config, world_size).global_batch_size)
    return plan_of(config, dataset, world_size)


def plan_of(config: TrainConfig, dataset: Any, world_size: int) -> Plan:
    """The plan that a run of this config over `dataset` follows on `world_size` ranks."""
    return build_plan(
        dataset,
        capacity=config.sequence_len,
        packed=config.sample_packing,
        sequential=config.sample_packing_sequentially,
        shuffle=not config.curriculum_sampling,
        global_batch_size=batch_of(config, world_size).global_batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        strategy=config.sample_packing_strategy,
        bin_samples=config.sample_packing_bin_size,
        balance_buffer=config.balance_buffer_steps,
        cost_ratio=0.0 if config.balance_buffer_steps is None else attention_cost_ratio(config),
    )


def load_trainable_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, whole: bool = False
) -> PreTrainedModel:
    """The base model with its new tokens, its adapter or its frozen part; where it is split while it is loaded this
    process's share, unless the `whole` is asked for.

    Raises:
        ModelError: of `load_model`; or the model is split, and not by a plan that trains exactly, or lacks rows.
    """
    here = Environment.detect()
    degrees = Degrees.resolve(here.world_size, config)
    distributed = None
    if degrees.in_parts and not whole:
        distributed = load_time_sharding(config, degrees, model_without_weights(config))
    model = load_model(
        config,
        compute_dtype=resolve_precision(config, here).compute_dtype,
        seed=config.seed,
        distributed=distributed,
    )
    if distributed is not None:
        check_no_new_rows(model, tokenizer, config)
        new_tokens: list[int] = []
    else:
        new_tokens = resize_embeddings(model, tokenizer, config, seed=config.seed)
    apply_freezing(model, config)
    adapted = apply_adapter(model, config, seed=config.seed, new_token_ids=new_tokens)
    if distributed is not None:
        with seeded_rng(config.seed, model):
            remake_adapters(adapted)
    return adapted
