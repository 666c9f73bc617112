"""Samples with images: ids and labels in memory, pixels made when a batch is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eft.core.errors import DataError
from eft.core.hashing import hash_bytes
from eft.core.records import TokenSample
from eft.data.collators import Batch, PaddedCollator
from eft.data.image_rows import ImageSample, process
from eft.data.images import ImageSize, image_hash, open_image
from eft.data.sample_set import DIGEST_BYTES, DIGEST_DTYPE, SampleSet, digests_of, measure

_TEXT_INPUTS = ("input_ids", "attention_mask", "text_replacement_offsets", "offset_mapping")


class ImageSet(SampleSet):
    """Rows of one data set. `origins`: where each sample is from; `rows`: the number of each one's row."""

    def __init__(self, samples: Sequence[ImageSample], origins: Sequence[str], rows: Sequence[int], name: str) -> None:
        self.samples = list(samples)
        self.origins = list(origins)
        self.group_names = (name,)
        self.lengths = np.array([len(sample.input_ids) for sample in samples], np.int32)
        measures = [measure(sample) for sample in samples]
        self.trainable_counts = np.array([count for count, _ in measures], np.int32)
        self.weight_sums = np.array([weight for _, weight in measures], np.float64)
        self.row_ids = np.array(rows, np.int64)
        self.largest_id = max((int(sample.input_ids.max()) for sample in samples), default=0)
        ids, whole = bytearray(), bytearray()
        self.pixels = [b"".join(image_hash(ref.path) for ref in sample.images) for sample in samples]
        """The hashes of each sample's images: other pixels are another sample, whatever the text says."""
        for sample, pixels in zip(samples, self.pixels, strict=True):
            for digest, out in zip(digests_of(sample), (ids, whole), strict=True):
                out += hashlib.blake2b(digest + pixels, digest_size=DIGEST_BYTES).digest()
        self.id_digests = np.frombuffer(bytes(ids), dtype=DIGEST_DTYPE)
        self.sample_digests = np.frombuffer(bytes(whole), dtype=DIGEST_DTYPE)
        self.row_keys = self.id_digests.view(np.uint64)[::2].copy()
        self.fingerprint = hash_bytes(bytes(whole))

    def sample(self, index: int) -> TokenSample:
        self._check(index)
        return self.samples[index]

    def origin(self, index: int) -> str:
        return self.origins[index]

    def conversation(self, index: int) -> dict[str, Any] | None:
        return None


class ImageCollator:
    """One row per document, padded on the right, with the processor's pixel tensors beside the tokens.

    Batch: as `PaddedCollator`'s without `position_ids`, which these models work out from the image sizes; and the
    processor's own tensors under their names, listed in `extra_inputs`.
    """

    def __init__(self, processor: Any, size: ImageSize, pad_token_id: int, pad_to: int | None = None) -> None:
        self._processor = processor
        self._size = size
        self._padded = PaddedCollator(pad_token_id=pad_token_id, pad_to=pad_to)

    def __call__(self, bins: Sequence[Sequence[TokenSample]]) -> Batch:
        """Opens the images: in a worker, where `dataloader_num_workers` asks for some."""
        batch = self._padded(bins)
        del batch["position_ids"]
        samples = [sample for each in bins for sample in each]
        with_images = [sample for sample in samples if isinstance(sample, ImageSample)]
        assert len(with_images) == len(samples), "every sample of an image set is an ImageSample"
        length = batch["input_ids"].shape[1]
        extra: dict[str, torch.Tensor] = {}
        if with_images:
            extra = self._processed(with_images, batch, length)
        batch["extra_inputs"] = tuple(extra)
        return batch | extra

    def _processed(self, samples: list[ImageSample], batch: Batch, length: int) -> dict[str, torch.Tensor]:
        pixels = [[open_image(ref, self._size) for ref in sample.images] for sample in samples]
        options = {"padding": "max_length", "max_length": length, "padding_side": "right", "return_tensors": "pt"}
        encoded = process(self._processor, [sample.text for sample in samples], pixels, **options)
        real = batch["attention_mask"].bool()
        if not torch.equal(encoded["input_ids"][real], batch["input_ids"][real]):
            names = ", ".join(ref.path for sample in samples for ref in sample.images)
            raise DataError(f"an image has changed since the rows were prepared, and takes other tokens now: {names}")
        return {
            name: value
            for name, value in encoded.items()
            if name not in _TEXT_INPUTS and isinstance(value, torch.Tensor)
        }
