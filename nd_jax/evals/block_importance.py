"""How much every block of a video transformer matters, and which blocks to remove.

    BI_k      = 1 - E[cos(z_k, z_{k+1})]                    z_k: block k's input, real tokens of one stream     (1)
    ρ(a, b)   = pearson(rank a, rank b)                     equal values share their mean rank                  (2)
    interval  = quantiles of ρ(mean of a', mean of b')      prompts drawn with replacement, both streams alike  (3)
    p         = share of permutations π with |ρ(a, π b)| >= |ρ(a, b)|                                           (4)

The last block S - 1 has no text output: the image stream has S numbers and the text stream S - 1, and rankings are of
the S - 1 blocks that can be removed. (3) tells how well the correlation of these blocks is known, (4) whether rankings
of so few blocks would agree as much by chance; the one does not replace the other.

Source: (1) is the block influence of ShortGPT (arXiv 2403.03853), in Neodragon (arXiv 2511.06055) for each stream.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.mmdit import BlockStates

# --- importance -------------------------------------------------------------------------------------------------------


def block_influence(states: BlockStates, image_mask: jax.Array, text_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Equation 1 for every sample: (image [S, B], text [S - 1, B]), float32.

    Args:
      states: of all blocks, image [S + 1, B, N, D], text [S, B, T, D].
      image_mask, text_mask: bool [B, N] and [B, T], True for real tokens. A stream without any counts as unchanged, 0.
    """
    return _influence(states.image, image_mask), _influence(states.text, text_mask)


def _influence(states: jax.Array, mask: jax.Array) -> jax.Array:
    states, mask = states.astype(jnp.float32), mask.astype(jnp.float32)[None]
    dot = lambda a, b: jnp.sum(a * b, axis=-1)
    norms = jnp.sqrt(dot(states, states))
    cosine = dot(states[:-1], states[1:]) / jnp.maximum(norms[:-1] * norms[1:], 1e-30)
    return jnp.sum((1.0 - cosine) * mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)


def observe_influence(states: BlockStates, image_mask: jax.Array, text_mask: jax.Array) -> dict[str, jax.Array]:
    """`block_influence` as rollouts are observed: {"image": [B, S], "text": [B, S - 1]}."""
    image, text = block_influence(states, image_mask, text_mask)
    return {"image": image.T, "text": text.T}


# --- rank correlation -------------------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis from 1, the smallest first; equal values share their mean rank. Float64."""
    below = (values[..., None] > values[..., None, :]).sum(-1)
    equal = (values[..., None] == values[..., None, :]).sum(-1)
    return below + (equal + 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equation 2 along the last axis, leading axes broadcast; NaN where all values of one side are equal."""
    a, b = (r - r.mean(axis=-1, keepdims=True) for r in (ranks(np.asarray(a)), ranks(np.asarray(b))))
    size = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.where(size == 0, np.nan, size)


class Correlation(NamedTuple):
    """Equations 2 to 4: ρ, the ends of its 95 % interval, and p."""

    spearman: float
    low: float
    high: float
    p_value: float


def correlation(a: np.ndarray, b: np.ndarray, resamples: int = 2000, seed: int = 0) -> Correlation:
    """Do two measures order the blocks alike?

    Args:
      a, b: [prompts, blocks], a measure of every block for every prompt; their means over prompts are compared.
      resamples: bootstrap samples and permutations.
      seed: of both.
    """
    rng, prompts = np.random.default_rng(seed), len(a)
    weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    drawn = spearman(weights @ a, weights @ b)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if drawn.size else (np.nan, np.nan)
    rho = spearman(a.mean(0), b.mean(0))
    shuffled = rng.permuted(np.tile(b.mean(0), (resamples, 1)), axis=1)
    chance = spearman(a.mean(0), shuffled)
    # The order as it is counts as one permutation, so that p is never 0.
    p = (1 + np.sum(np.abs(chance) >= abs(rho) - 1e-12)) / (1 + resamples)
    return Correlation(float(rho), float(low), float(high), float(p))


def mean_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """95 % bootstrap interval of the mean over prompts, [2, blocks], of values [prompts, blocks]."""
    prompts = len(values)
    weights = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return np.quantile(weights @ values / prompts, (0.025, 0.975), axis=0)


# --- which blocks to remove -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a choice is made by.

    Attributes:
      image, text: equation 1, [S] and [S - 1].
      error_without: removed blocks, rising -> error of the pruned network's output.
    """

    image: np.ndarray
    text: np.ndarray
    error_without: Callable[[tuple[int, ...]], float]

    @property
    def removable(self) -> int:
        """S - 1: all blocks but the last."""
        return len(self.text)


# Blocks to remove and the reason for each, in the order of their removal.
Removal = dict[int, str]


def visual(evidence: Evidence, count: int) -> Removal:
    """The blocks that change image tokens least."""
    return _least(evidence.image[: evidence.removable], count, "visual importance")


def text(evidence: Evidence, count: int) -> Removal:
    """The blocks that change text tokens least."""
    return _least(evidence.text, count, "text importance")


def rank_sum(evidence: Evidence, count: int) -> Removal:
    """The blocks of the least sum of both ranks; between equal sums, those that change image tokens less."""
    image, text = evidence.image[: evidence.removable], evidence.text
    image_rank, text_rank = ranks(image), ranks(text)
    order = np.lexsort((np.arange(len(text)), image, image_rank + text_rank))
    reason = lambda k: f"visual rank {image_rank[k]:g} and text rank {text_rank[k]:g} of {len(text)}"
    return {int(k): reason(k) for k in order[:count]}


def leave_one_out(evidence: Evidence, count: int) -> Removal:
    """One block after another: the one without which the output of what is left changes least."""
    removed: Removal = {}
    for _ in range(count):
        candidates = [k for k in range(evidence.removable) if k not in removed]
        errors = [evidence.error_without(tuple(sorted({*removed, k}))) for k in candidates]
        best = int(np.argmin(errors))
        without = f" with {', '.join(map(str, sorted(removed)))}" if removed else ""
        reason = f"left out{without}: velocity error {errors[best]:.4g}, least of {len(errors)} candidates"
        removed[candidates[best]] = reason
    return removed


STRATEGIES: dict[str, Callable[[Evidence, int], Removal]] = {
    "visual": visual,
    "text": text,
    "rank_sum": rank_sum,
    "leave_one_out": leave_one_out,
}


def choose(strategy: str, evidence: Evidence, keep: int) -> tuple[tuple[int, ...], Removal]:
    """(blocks kept, rising, and why the others go) of one of `STRATEGIES`.

    Raises:
      UserError: an unknown strategy, or a number that cannot be kept.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy {strategy!r} is unknown: use one of {', '.join(STRATEGIES)}")
    blocks = evidence.removable + 1
    check_keep(blocks, keep)
    removed = STRATEGIES[strategy](evidence, blocks - keep)
    return tuple(k for k in range(blocks) if k not in removed), removed


def check_keep(blocks: int, keep: int) -> None:
    """Raises UserError unless `keep` of so many blocks can be kept."""
    if not 1 <= keep < blocks:
        raise UserError(
            f"{keep} of {blocks} blocks to keep: use 1 to {blocks - 1}; the last block is always kept, because it has "
            "no text output and parameters of its own structure, so no other block can take its place"
        )


def _least(scores: Sequence[float], count: int, name: str) -> Removal:
    order = np.argsort(scores, kind="stable")
    return {int(k): f"{name} {scores[k]:.4g}, rank {at} of {len(order)}" for at, k in enumerate(order[:count], 1)}
