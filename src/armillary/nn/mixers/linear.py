"""Linear attention: softmax's exponential kernel replaced by a product of features (Katharopoulos et al. 2020).

o_t = φ(q_t) Σ φ(k_s)ᵀ v_s / φ(q_t) Σ φ(k_s) with φ = elu + 1: the sums are a state of constant size, so
a token costs the same wherever it stands. `KernelAttention` is what all mixers of this kind share.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.native.tape import Map
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.linear import LOWEST, linear_attend, running_max, whole_max
from armillary.nn.state import FixedState, State
from armillary.nn.steps.recurrent import mapped, matrix, sums
from armillary.nn.tape import Buffer, NoStep, Tape, record

# What stands in for ε where features are exponentials: far below every sum that float32 holds to
# full precision, and large enough that its inverse overflows nothing.
TINY = 1e-20


def tokens_so_far(real: Tensor, documents: Tensor | None) -> Tensor:
    """How many tokens of the same document there are up to each place; real [B, T] int64, 1 for a token."""
    total = real.cumsum(1)
    if documents is None:
        return total
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return total - torch.where(new, total - real, 0).cummax(1).values


class KernelSettings(MixerSettings):
    """What the mixers of this kind share."""

    heads: int = Field(4, gt=0, description="heads")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")

    def size(self, width: int) -> int:
        """Width of a head."""
        return head_width(width, self.heads, self.head_width)

    def products(self, width: int, length: int) -> float:
        """FLOPs of the projections."""
        inner = self.heads * self.size(width)
        return 3 * linear_flops(width, inner, length) + linear_flops(inner, width, length)

    def kernel_flops(self, place: Place, length: int, features: int, scaled: bool = False) -> float:
        """FLOPs of the normalised sums over `features` features; with a scale, of that too."""
        each, causal = self.size(place.width), place.order == "causal"
        sums = (5.0 if causal else 4.0) * features * (each + 1)  # decay, outer product, sum, product with q
        flops = sums + each + 1 + (1 if causal else 0)
        if scaled:  # largest feature, clamp, difference, exponential; the running scale as a decay
            flops += 3.0 * features + (6 if causal else 2)
        return length * self.heads * flops

    def state_bytes(self, place: Place, features: int, scaled: bool = False) -> float:
        """Of one row's sums, in float32."""
        if place.order != "causal":
            return 0.0
        return 4.0 * self.heads * (features * (self.size(place.width) + 1) + scaled)


@mixers.register
class LinearAttentionSettings(KernelSettings):
    """φ(q) Σ φ(k)ᵀ v / (φ(q) Σ φ(k) + ε), φ = elu + 1."""

    kind: ClassVar[str] = "linear"
    source: ClassVar[str] = (
        "Katharopoulos et al. 2020, Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_linear.py: the paper's equations 9 (explicit matrix) and 16 to 20 (recurrence), "
        "outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")
    eps: float = Field(1e-6, gt=0, description="added to the normaliser")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls(), compiled=True),
            Example("wide_heads", cls(heads=2, head_width=5, eps=1e-3)),
            Example("bidirectional", cls(heads=2), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("matrix", Example("one_head", cls(heads=1)), _matrix)]

    def build(self, place: Place) -> LinearAttention:
        return LinearAttention(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.size(place.width)
        flops = self.products(place.width, length) + self.kernel_flops(place, length, each)
        return Cost(flops + 8.0 * length * self.heads * each, self.state_bytes(place, each))


class KernelAttention(Mixer):
    """x [B, T, D] → [B, T, D] by features of queries and keys, [B, T, H, F].

    A subclass says what they are. If `logarithmic`, `keys` gives logarithms: they are divided by
    their running maximum, which the state then carries beside the sums. State: `matrix` [B, H, F,
    K + 1] in float32, the sums of φ(k)ᵀ [v, 1], and `scale` [B, H].
    """

    logarithmic = False

    def __init__(self, settings: KernelSettings, place: Place, features: int, eps: float) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width, self.features, self.eps = settings.size(place.width), features, eps
        inner = self.heads * self.width
        self.q = place.product(place.width, inner, "q")
        self.k = place.product(place.width, inner, "k")
        self.v = place.product(place.width, inner, "v")
        self.o = place.product(inner, place.width, "o")

    def queries(self, q: Tensor) -> Tensor:
        """[B, T, H, K] → features [B, T, H, F]; a factor per token cancels."""
        raise NotImplementedError

    def keys(self, k: Tensor) -> Tensor:
        """[B, T, H, K] → features [B, T, H, F], or their logarithms."""
        raise NotImplementedError

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self._frozen(x, ctx, None)

    def _frozen(self, x: Tensor, ctx: Context, before: Tensor | None) -> Frozen:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return Frozen(self.kernel(q, k, x, ctx, before))

    def kernel(self, q: Tensor, k: Tensor, x: Tensor, ctx: Context, before: Tensor | None) -> dict[str, Tensor | None]:
        """Features of queries and keys, and the scale of the keys'."""
        real, causal = ctx.present(x), self.order == "causal"
        keys, scale = self.keys(k), None
        if self.logarithmic:
            if real is not None:
                keys = keys.masked_fill(~real[..., None, None], -torch.inf)
            top = keys.detach().amax(-1)
            scale = running_max(top, before, ctx.documents) if causal else whole_max(top, ctx.documents)
            keys = keys.add_(-scale[..., None]).exp_()  # in place: what made them does not need them again
        elif real is not None:
            keys = keys * real[..., None, None].to(keys.dtype)
        return {"q": self.queries(q), "k": keys, "scale": scale if causal else None, "documents": ctx.documents}

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts = frozen.parts
        return linear_attend(
            parts["q"],
            parts["k"],
            values,
            causal=self.order == "causal",
            eps=self.eps,
            scale=parts["scale"],
            documents=parts["documents"],
        )[0]

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.features, self.width + 1)
        tensors = {"matrix": torch.zeros(shape, dtype=wide, device=device)}
        if self.logarithmic:
            tensors["scale"] = torch.full((batch, self.heads), LOWEST, dtype=wide, device=device)
        return FixedState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        before = state.tensors.get("scale")
        parts = self._frozen(x, ctx, before).parts
        scale = parts["scale"]
        mixed, held = linear_attend(
            parts["q"],
            parts["k"],
            values,
            eps=self.eps,
            scale=scale,
            state=state.tensors["matrix"],
            before=before,
        )
        assert held is not None
        state.put("matrix", held)
        if scale is not None:
            state.put("scale", scale[:, -1])
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def recorded(self, tape: Tape, x: Buffer, so_far: Tensor | None = None) -> tuple[Buffer, Buffer | None]:
        """[rows, H · K] → features [rows, H · F] of queries, or with `so_far`, the state's scale, of keys, and then
        fades; raises NoStep where there is none."""
        raise NoStep(f"{type(self).__name__} has no native features")

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        held, *scale = sums(tape, state, "matrix", *(["scale"] if self.logarithmic else []))
        q, k, v = (record(product, tape, x, unit=self.width) for product in (self.q, self.k, self.v))
        q, _ = self.recorded(tape, q)
        k, fades = self.recorded(tape, k, scale[0] if scale else None)
        return record(self.o, tape, matrix(tape, q, k, v, held, fades=fades, epsilon=self.eps))  # type: ignore[no-any-return]


class LinearAttention(KernelAttention):
    """Features elu(x) + 1, as many as a head is wide."""

    scaled = ()

    def __init__(self, settings: LinearAttentionSettings, place: Place) -> None:
        super().__init__(settings, place, settings.size(place.width), settings.eps)

    def queries(self, q: Tensor) -> Tensor:
        return _elu_plus_one(q)

    def keys(self, k: Tensor) -> Tensor:
        return _elu_plus_one(k)

    def recorded(self, tape: Tape, x: Buffer, so_far: Tensor | None = None) -> tuple[Buffer, Buffer | None]:
        return mapped(tape, x, Map.ELU_ONE), None


def _elu_plus_one(x: Tensor) -> Tensor:
    # In two parts: elu(x) + 1 would lose the digits of exp(x) where it is small.
    return F.relu(x) + x.clamp(max=0).exp()


def _matrix(mixer: LinearAttention, x: Tensor, ctx: Context) -> Tensor:
    """One causal head with every pair written out."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    q, k = (torch.where(z > 0, z + 1, z.exp()) for z in (q, k))
    weights = (q @ k.transpose(1, 2)).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v @ mixer.o.weight.t()  # type: ignore[no-any-return]
