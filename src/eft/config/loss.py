"""What is minimised beside the negative log-likelihood of the trainable tokens."""

from __future__ import annotations

from eft.config.section import Section, key


class LossConfig(Section):
    """Terms added to the training loss. The evaluation loss stays the plain negative log-likelihood."""

    label_smoothing_factor: float = key(
        0.0,
        "ε: the target has probability 1 − ε + ε/V instead of 1, every other entry of the vocabulary ε/V.",
        ge=0.0,
        lt=1.0,
    )
    z_loss_weight: float = key(
        0.0, "ζ: adds ζ · log² Z per token, Z being the softmax's normaliser; PaLM takes 1e-4.", ge=0.0
    )
    router_aux_loss_coef: float | None = key(
        None,
        "Weight of the load-balancing loss of experts, per document; 0: none. Default: the model's own where its "
        "config says `output_router_logits`, else none.",
        ge=0.0,
        axolotl="Axolotl has what transformers computes over a whole packed row, and only with "
        "`model_config: {output_router_logits: true}`.",
    )
    use_eaft: bool = key(
        False,
        "Entropy-adaptive fine-tuning: a token's loss counts by how unsure the model is of it, from 0 to 1.",
        axolotl="There the entropy is not divided by its largest value, so the loss is up to ln k times larger.",
    )
    eaft_alpha: float = key(1.0, "Power of that entropy.", ge=0.0, used_when="use_eaft")
    eaft_k: int = key(20, "Likeliest tokens that the entropy is taken over.", ge=2, used_when="use_eaft")
    neftune_noise_alpha: float | None = key(
        None,
        "NEFTune: uniform noise on the embeddings while training, of ± alpha / √(tokens of the document · width).",
        gt=0.0,
        axolotl="There the length is that of the whole row, so packing makes the noise weaker.",
    )
