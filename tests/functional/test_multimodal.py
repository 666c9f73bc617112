"""A tiny vision-language model, trained on rows with images: through `train()`, through the builder, and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from eft import run
from eft.builder import HFCausalTrainerBuilder
from eft.config.load import config_from_mapping
from eft.config.root import TrainConfig
from eft.core.errors import ConfigError, ModelError
from eft.data.image_prepare import prepare_images
from eft.data.image_rows import ImageSample, process
from eft.data.images import ImageSize, open_image
from eft.data.plan import Plan
from eft.evaluate import evaluate_model
from tests.tiny_vision import tiny_llava, tiny_processor

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (90, 90, 90)}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, pictures and rows."""
    folder = tmp_path_factory.mktemp("vision")
    processor = tiny_processor()
    tiny_llava(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = []
    for number in range(12):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", (30 + number, 24), COLOURS[name]).save(folder / f"{number}.png")
        picture = [{"type": "image", "path": f"{number}.png"}] if number % 5 else []
        content = [*picture, {"type": "text", "text": "what " * (number % 3) + "is this?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"it is {name}"}]
        rows.append({"messages": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(material: Path, output: Path, **keys: Any) -> TrainConfig:
    values = {
        "base_model": str(material / "model"),
        "processor_type": "AutoProcessor",
        "datasets": [{"path": str(material / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(material / "prepared"),
        "output_dir": str(output),
        "sequence_len": 96,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        # LLaVA takes the last layer's own output: the norm after it is never used.
        "unfrozen_parameters": ["^(?!.*post_layernorm)"],
    }
    if "adapter" in keys:
        del values["unfrozen_parameters"]
    return config_from_mapping({**values, **keys})


def logits_of(model: Any, processor: Any, sample: ImageSample) -> torch.Tensor:
    pixels = [open_image(ref, ImageSize()) for ref in sample.images]
    inputs = process(processor, [sample.text], [pixels], return_tensors="pt")
    inputs.pop("text_replacement_offsets", None)
    with torch.no_grad():
        return model.eval()(**inputs).logits[0]  # type: ignore[no-any-return]


def test_a_run_learns_from_pixels_and_plain_transformers_loads_it(material: Path, tmp_path: Path) -> None:
    config = config_of(
        material, tmp_path / "out", num_epochs=6, val_set_size=2, image_size=28, image_resize_algorithm="lanczos"
    )
    model, _, trainer = run.train(config)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert any("eval_loss" in row for row in trainer.state.log_history)
    out = tmp_path / "out"
    promises = json.loads((out / "promises.json").read_text())
    assert all(promise["status"] == "pass" for promise in promises), promises
    assert {promise["promise"] for promise in promises} >= {"E5", "E6", "E7", "E8"}
    last_eval = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1]
    assert evaluate_model(config, str(out))["eval_loss"] == pytest.approx(last_eval, rel=1e-6)
    # A reader without eft: model, processor and template.
    loaded, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    data = trainer.train_dataset
    sample = next(sample for index in range(len(data)) if (sample := data.sample(index)).images)
    assert torch.equal(logits_of(loaded, processor, sample), logits_of(model, processor, sample))
    assert processor.chat_template == tiny_processor().chat_template
    for name in ("model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).is_file(), name
    last = max((path for path in out.glob("checkpoint-*")), key=lambda path: int(path.name.split("-")[1]))
    assert (last / "processor_config.json").is_file()


def test_the_loss_is_plain_transformers_own(material: Path, tmp_path: Path) -> None:
    """Σ NLL of the answers over all rows of a step, one by one, with their pixels."""
    config = config_of(material, tmp_path / "out", max_steps=1, save_strategy="no", shuffle_merged_datasets=False)
    processor = tiny_processor()
    builder = HFCausalTrainerBuilder(config, tiny_llava(processor), processor.tokenizer, processor)
    builder.train_dataset = prepare_images(config, processor).train
    trainer = builder.build()
    trainer.train()
    assert isinstance(trainer.plan, Plan)
    plain, total, count = tiny_llava(processor).eval(), 0.0, 0
    for ids in trainer.plan.step(0).bins:
        sample = trainer.train_dataset.sample(int(ids[0]))
        labels = torch.tensor(sample.labels[1:].astype("int64"))
        logits = logits_of(plain, processor, sample)[:-1]
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_adapter_on_a_vision_language_model(material: Path, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "lora_target_modules": ["q_proj", "v_proj"], "num_epochs": 2, "verify_saves": "never"}
    _, _, trainer = run.train(config_of(material, tmp_path / "out", dataloader_num_workers=1, **keys))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "processor_config.json").is_file()


def test_a_stopped_run_goes_on_bit_for_bit(material: Path, tmp_path: Path) -> None:
    keys = {"max_steps": 5, "save_steps": 2, "save_total_limit": 0, "verify_saves": "never"}
    model, _, _ = run.train(config_of(material, tmp_path / "out", **keys))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    source = str(tmp_path / "out" / "checkpoint-2")
    resumed, _, _ = run.train(config_of(material, tmp_path / "other", resume_from_checkpoint=source, **keys))
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_packing_is_refused_by_name(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`sample_packing`: rows with images cannot be packed"):
        config_of(material, tmp_path, sample_packing=True)
    processor = tiny_processor()
    config = config_of(material, tmp_path, processor_type=None).model_copy(update={"sample_packing": True})
    with pytest.raises(ModelError, match="sample_packing: rows that go through a LlavaProcessor cannot be packed"):
        HFCausalTrainerBuilder(config, tiny_llava(processor), processor.tokenizer, processor)


def test_what_is_no_vision_language_model_or_processor_is_named(
    material: Path, tmp_path: Path, model_folder: Any
) -> None:
    with pytest.raises(ConfigError, match="processor_type: transformers has no class 'AutoProcesor'"):
        run.train(config_of(material, tmp_path / "a", processor_type="AutoProcesor"))
    text_model = model_folder("llama")
    with pytest.raises(ModelError, match=r"processor"):
        run.train(config_of(material, tmp_path / "b", base_model=str(text_model)))
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    (material / "text.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    text = [{"path": str(material / "text.jsonl"), "type": "chat_template"}]
    with pytest.raises(ModelError, match="set `processor_type: AutoProcessor`"):
        run.train(config_of(material, tmp_path / "c", processor_type=None, datasets=text))
