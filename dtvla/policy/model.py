"""The hybrid-attention VLA on transformers' PaliGemma classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from dtvla.errors import UserError
from dtvla.policy.action_bins import ActionBins
from dtvla.policy.attention import positions, visible
from dtvla.policy.layout import IGNORE, Batch
from dtvla.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import Cache


class HybridVLA(PaliGemmaForConditionalGeneration):
    """PaliGemma whose thought is causal and whose action block is bidirectional and read in one pass.

    Modules and weights are those of PaliGemma, so its checkpoints load. With ``config.slot_embedding`` the action
    slots, whose inputs are zero in the published model, receive a learned embedding of their index: zeroed slots are
    equal in the first layer and differ by position only, which small models learn slowly.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        """Build the modules with fresh weights (:meth:`initialize_action_rows` is up to the caller)."""
        super().__init__(config)
        self.slot_embedding: nn.Embedding | None = None
        if getattr(config, "slot_embedding", False):
            text: Any = config.text_config
            self.slot_embedding = nn.Embedding(config.action_slots, text.hidden_size)
            nn.init.normal_(self.slot_embedding.weight, std=text.initializer_range)

    def forward(self, batch: Batch) -> Tensor:
        """Logits where the next token is supervised.

        Returns:
            float32 (M, V) in row-major order of :func:`supervised_positions`.
        """
        hidden_BTD = self.encode(batch)
        return self.logits(hidden_BTD[:, :-1][supervised_positions(batch)])

    def encode(self, batch: Batch) -> Tensor:
        """Hidden states (B, T, D) of whole sequences after the final norm."""
        embeddings_BTD = self.embed(batch.pixels_BNCHW, batch.input_ids_BT, batch.slot_BT)
        return self.transform(embeddings_BTD, visible(batch.segment_BT), positions(batch.segment_BT))

    def embed(self, pixels_BNCHW: Tensor, input_ids_BT: Tensor, slot_BT: Tensor | None = None) -> Tensor:
        """Input embeddings of sequences that begin with their image tokens.

        Args:
            pixels_BNCHW: uint8 pictures; each observation passes the vision tower once.
            input_ids_BT: ids, images included.
            slot_BT: action slots, or None when there are none.
        """
        images_BID = self.embed_images(pixels_BNCHW)
        text_BTD = self.embed_text(input_ids_BT[:, images_BID.shape[1] :], None)
        if slot_BT is not None:
            text_BTD = self._fill_slots(text_BTD, slot_BT[:, images_BID.shape[1] :])
        return torch.cat([images_BID.to(text_BTD.dtype), text_BTD], dim=1)

    def embed_images(self, pixels_BNCHW: Tensor) -> Tensor:
        """Image tokens (B, N * tokens per camera, D): cameras in order, on the scale of the token embeddings."""
        dtype = self.model.multi_modal_projector.linear.weight.dtype
        if not dtype.is_floating_point:
            dtype = self.dtype
        pixels = pixels_BNCHW.flatten(0, 1).to(dtype) / 127.5 - 1.0
        features = self.model.get_image_features(pixels).pooler_output
        return features.reshape(len(pixels_BNCHW), -1, features.shape[-1])

    def embed_text(self, input_ids_BT: Tensor, slot_BT: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D), scaled by sqrt(D) as in Gemma; action slots zeroed or learned."""
        embeddings_BTD: Tensor = self.model.language_model.embed_tokens(input_ids_BT)
        return embeddings_BTD if slot_BT is None else self._fill_slots(embeddings_BTD, slot_BT)

    def transform(
        self, embeddings_BTD: Tensor, visible_BQK: Tensor, position_ids_BT: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Run the language model.

        Args:
            embeddings_BTD: inputs of the positions that are not cached yet.
            visible_BQK: which of the cached and new keys each new position sees.
            position_ids_BT: 1-based positions of the new tokens.
            cache: keys and values of earlier positions; extended in place.

        Returns:
            Hidden states (B, T, D) after the final norm.
        """
        output = self.model.language_model(
            inputs_embeds=embeddings_BTD,
            attention_mask=visible_BQK[:, None],
            position_ids=position_ids_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, float32 at least, for hidden states of any leading shape."""
        logits: Tensor = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def action_logits(self, hidden: Tensor, bins: ActionBins) -> Tensor:
        """Logits (..., K) of the action bins alone, in the order of the bins: no other column is computed."""
        logits = nn.functional.linear(hidden, self.lm_head.weight[bins.first_id : bins.last_id + 1])
        return (logits if logits.dtype == torch.float64 else logits.float()).flip(-1)

    @torch.no_grad()
    def initialize_action_rows(self, bins: ActionBins, generator: torch.Generator, bandwidth: float = 4.0) -> None:
        """Give the (tied) rows of the action bins random Fourier features of their value (Rahimi and Recht, 2007).

        Rows of neighbouring bins start out similar, with a Gaussian similarity of length 1 / ``bandwidth``, so a
        small model learns the order of the bins from few examples. Their scale is that of the other rows.
        """
        weight_VD = self.model.language_model.embed_tokens.weight
        text: Any = self.config.text_config
        size, std = weight_VD.shape[1], text.initializer_range
        frequency_D = torch.randn(size, generator=generator, dtype=torch.float64) * bandwidth
        phase_D = torch.rand(size, generator=generator, dtype=torch.float64) * 2 * math.pi
        value_K = bins.value(torch.arange(bins.count)).double()
        rows_KD = torch.cos(value_K[:, None] * frequency_D + phase_D) * math.sqrt(2.0) * std
        weight_VD[bins.first_id : bins.last_id + 1] = rows_KD.flip(0).to(weight_VD)

    def _fill_slots(self, embeddings_BTD: Tensor, slot_BT: Tensor) -> Tensor:
        if self.slot_embedding is None:
            return embeddings_BTD * (~slot_BT).unsqueeze(-1)
        index_BT = (slot_BT.cumsum(dim=1) - 1).clamp(min=0)
        learned_BTD = self.slot_embedding(index_BT) * math.sqrt(embeddings_BTD.shape[-1])
        return torch.where(slot_BT.unsqueeze(-1), learned_BTD.to(embeddings_BTD.dtype), embeddings_BTD)


def supervised_positions(batch: Batch) -> Tensor:
    """Where a next token is supervised: bool (B, T - 1); position t predicts the token at t + 1."""
    return batch.labels_BT[:, 1:] != IGNORE


def make_config(settings: Mapping[str, Any], vocabulary: Vocabulary) -> PaliGemmaConfig:
    """The transformers configuration of a model with fresh weights.

    Args:
        settings: the ``model`` group of the configuration: ``text``, ``vision``, ``image_size``, ``chunk``,
            ``action_dim``, ``slot_embedding``, ``initializer_range``.
        vocabulary: all ids.

    Raises:
        UserError: the image size is not a multiple of the patch size.
    """
    text, vision = settings["text"], settings["vision"]
    if settings["image_size"] % vision["patch_size"]:
        size, patch = settings["image_size"], vision["patch_size"]
        raise UserError(f"model.image_size: {size} is not a multiple of model.vision.patch_size {patch}; change one")
    ids: dict[str, Any] = vocabulary.to_config()
    special = {key: ids.pop(key) for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    text_config = GemmaConfig(
        vocab_size=vocabulary.size, initializer_range=settings["initializer_range"], **text, **special
    )
    vision_config = SiglipVisionConfig(image_size=settings["image_size"], vision_use_head=False, **vision)
    extra: dict[str, Any] = {
        "slot_embedding": bool(settings["slot_embedding"]),
        "action_slots": settings["chunk"] * settings["action_dim"],
    }
    return PaliGemmaConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        vocab_size=vocabulary.size,
        **special,
        **ids,
        **extra,
    )


def image_tokens(config: PaliGemmaConfig, cameras: int) -> int:
    """Number of image tokens of all cameras together."""
    vision: Any = config.vision_config
    return cameras * int(vision.image_size // vision.patch_size) ** 2
