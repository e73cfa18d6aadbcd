"""The language-model head: a score for every entry of the vocabulary."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.activation import ACTIVATIONS, Activation
from armillary.nn.cost import linear_flops
from armillary.nn.example import Example
from armillary.nn.heads.base import HeadSettings, heads
from armillary.nn.linear import Embedding, Linear
from armillary.nn.mechanism import NormSettings, Place
from armillary.nn.norms.layernorm import LayerNormSettings
from armillary.nn.tape import Buffer, NoStep, Tape, record


@heads.register
class LanguageModelHeadSettings(HeadSettings):
    """logits = h Wᵀ; W is the embedding when tied (Press & Wolf 2017, Using the Output Embedding).

    With `transform`, h first becomes norm(activation(h Aᵀ + a)), as in Devlin et al. 2019, BERT.
    """

    kind: ClassVar[str] = "language_model"
    source: ClassVar[str] = "Press & Wolf 2017, Using the Output Embedding to Improve Language Models"
    oracle: ClassVar[str] = (
        "tests/checkpoints/test_families.py: logits of transformers' LLaMA and GPT-2; "
        "tests/checkpoints/test_encoders.py: of its BERT; "
        "tests/nn/ops/test_cross_entropy.py: PyTorch's cross-entropy of full logits"
    )
    tied: bool = Field(True, description="share the weight with the embedding")
    bias: bool = Field(False, description="a bias per vocabulary entry")
    softcap: float | None = Field(None, gt=0, description="logits become c·tanh(logit/c)")
    scale: float = Field(1.0, gt=0, description="factor on the logits, before their bias and softcap")
    transform: Activation | None = Field(None, description="activation of a product before the scores; by default none")
    norm: NormSettings | None = Field(None, description="norm before the scores, after that product")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("tied", cls()),
            Example("capped", cls(tied=False, bias=True, softcap=3.0, scale=0.5)),
            Example("transformed", cls(bias=True, transform="gelu", norm=LayerNormSettings())),
        ]

    def build(self, place: Place, vocabulary: int, embedding: nn.Module) -> LanguageModelHead:
        return LanguageModelHead(self, place, vocabulary, embedding)

    def flops(self, width: int, vocabulary: int, length: int) -> float:
        capped = 3.0 * vocabulary * length if self.softcap is not None else 0.0
        scaled = float(length * width) if self.scale != 1.0 else 0.0
        if self.transform is not None:
            scaled += linear_flops(width, width, length, True) + length * width
        if self.norm is not None:
            scaled += self.norm.flops(width, length)
        return length * (2.0 * width * vocabulary + (vocabulary if self.bias else 0)) + capped + scaled


class LanguageModelHead(nn.Module):
    """h [..., D] → logits [..., V] in h's dtype."""

    def __init__(
        self, settings: LanguageModelHeadSettings, place: Place, vocabulary: int, embedding: nn.Module
    ) -> None:
        super().__init__()
        self.tied = settings.tied
        self.softcap, self.scale = settings.softcap, settings.scale
        self.transform = place.product(place.width, place.width, "transform", True) if settings.transform else None
        self.activation = ACTIVATIONS[settings.transform] if settings.transform else None
        self.norm = settings.norm.build(place.width) if settings.norm else None
        self.product: Linear = place.product(place.width, vocabulary, "head", settings.bias)
        if settings.tied:
            assert isinstance(embedding, Embedding)
            self.product.weight = embedding.weight

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        logits = self.product(self.scaled(h))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def record(self, tape: Tape, h: Buffer) -> Buffer:
        if self.transform is not None or self.norm is not None:
            raise NoStep("a head with a part of its own before the product")
        logits: Buffer = record(self.product, tape, h, factor=self.scale)
        if self.softcap is not None:
            tape.cap(logits, self.softcap)
        return logits

    def scaled(self, h: Tensor) -> Tensor:
        """What the product multiplies."""
        if self.transform is not None and self.activation is not None:
            h = self.activation(self.transform(h))
        if self.norm is not None:
            h = self.norm(h)
        return h if self.scale == 1.0 else h * self.scale
