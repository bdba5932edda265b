"""Schedule of pyramidal flow matching: the noise that each stage removes, and the timesteps that the network is told.

Computed once on the host in numpy. Stage 0 is the coarsest; N = `num_train_timesteps`, S = `stages`, γ = `gamma`.

    σ_k = shift u_k / (1 + (shift - 1) u_k),   u_k = (N - k) / N,   k = 0 .. N-1                 (1)
    τ_k = N σ_k                                                                                  (2)
    o_i = σ[⌊r_i N⌋]               original start sigma of stage i, r = `stage_range`            (3)
    e_i = σ[⌊r_{i+1} N⌋],  e_{S-1} = 0                                            end sigma      (4)
    α_i = 1 / (√(1 + 1/γ) o_i + (1 - o_i)),   β_i = α_i o_i / √γ                                 (5)
    s_0 = o_0,   s_i = 1 - α_i (1 - o_i)                                corrected start sigma    (6)
    ρ_i = Σ_{j<i} (s_j - e_j) / Σ_j (s_j - e_j)        share of the flow before stage i, ρ_S = 1 (7)
    τ^i_k = τ[⌊ρ_i N⌋] (1 - k/N) + τ[min(⌊ρ_{i+1} N⌋, N-1)] k/N            timesteps of stage i  (8)
    t_k = 1 - k/N                                                     stage-local sigmas, 1 → 0  (9)
    n steps:  τ = linspace(τ^i_0, τ^i_{N-1}, n),   t = linspace(t_0, t_{N-1}, n) and then 0     (10)
    x ← x + (t_next - t) v                                                          Euler step  (11)

(5) and (6): nearest upsampling turns the noise o_i ε of the coarser stage into noise that is equal within each 2x2
block. α_i scales the result and β_i weighs the block noise (`noise.block_noise`) that makes it white again, with
variance s_i^2. Source: Pyramid-Flow (arXiv 2410.05954, section 3.2 and appendix A) and its public code's scheduler.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from nd_jax.errors import UserError


class InferenceSteps(NamedTuple):
    """Steps of one stage (10): `timesteps` float64 [n] for the network, `sigmas` float64 [n + 1] from 1 to 0."""

    timesteps: np.ndarray
    sigmas: np.ndarray


@dataclasses.dataclass(frozen=True)
class PyramidSchedule:
    """Settings under the names of the public scheduler's config; everything else follows from them.

    Hashable, so that it may be a static argument of a jitted function.

    Attributes:
      stages: number of resolutions S.
      gamma: γ; at most 1/3, the default, where block noise has no mean within a block.
      stage_range: S + 1 increasing numbers from 0 to 1, in shares of the flow; None divides it evenly.
      num_train_timesteps: N.
      shift: moves the grid (1) towards noise where above 1.

    Raises:
      UserError: a setting is out of range.
    """

    stages: int = 3
    gamma: float = 1 / 3
    stage_range: tuple[float, ...] | None = None
    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self):
        if self.stages < 1:
            raise UserError(f"stages is {self.stages}: a pyramid needs at least one")
        if not 0 < self.gamma:
            raise UserError(f"gamma is {self.gamma}: it must be positive")
        if not 0 < self.shift:
            raise UserError(f"shift is {self.shift}: it must be positive, 1 for no shift")
        given = self.stage_range
        shares = tuple(i / self.stages for i in range(self.stages + 1)) if given is None else tuple(map(float, given))
        if len(shares) != self.stages + 1 or shares[0] != 0 or shares[-1] != 1:
            raise UserError(f"stage_range is {shares}: give {self.stages + 1} numbers from 0 to 1 for this many stages")
        object.__setattr__(self, "stage_range", shares)
        if any(a >= b for a, b in zip(self._boundaries, self._boundaries[1:], strict=False)):
            raise UserError(
                f"stage_range {shares} gives no timestep of {self.num_train_timesteps} to some stage: "
                "make the numbers increase, or raise num_train_timesteps"
            )

    @property
    def _boundaries(self) -> tuple[int, ...]:
        """Grid index at which every stage starts, and N."""
        return tuple(int(share * self.num_train_timesteps) for share in self.stage_range)

    @functools.cached_property
    def _grid(self) -> tuple[np.ndarray, np.ndarray]:
        """σ (1) and τ (2), float32 [N]: the published tables were rounded so, and later numbers keep the rounding."""
        count = np.float32(self.num_train_timesteps)
        sigmas = np.arange(self.num_train_timesteps, 0, -1, dtype=np.float32) / count
        sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        return sigmas, sigmas * count

    @functools.cached_property
    def orig_start_sigmas(self) -> tuple[float, ...]:
        """o (3): the noise left when the coarser stage ends; 1 (or nearly) for stage 0."""
        return tuple(float(self._grid[0][index]) for index in self._boundaries[:-1])

    @functools.cached_property
    def end_sigmas(self) -> tuple[float, ...]:
        """e (4): the noise at which every stage ends."""
        return (*self.orig_start_sigmas[1:], 0.0)

    @functools.cached_property
    def start_sigmas(self) -> tuple[float, ...]:
        """s (6): the noise with which every stage starts, after the jump."""
        corrected = [1 - self.renoise_weights(i)[0] * (1 - self.orig_start_sigmas[i]) for i in range(1, self.stages)]
        return (self.orig_start_sigmas[0], *corrected)

    @functools.cached_property
    def timestep_ratios(self) -> tuple[tuple[float, float], ...]:
        """(ρ_i, ρ_{i+1}) (7) of every stage."""
        lengths = [start - end for start, end in zip(self.start_sigmas, self.end_sigmas, strict=True)]
        bounds = [sum(lengths[:i]) / sum(lengths) for i in range(self.stages)]
        return tuple(zip(bounds, (*bounds[1:], 1.0), strict=True))

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """τ^i (8), float32 [S, N]: what the network is told at index k of stage i."""
        last, grid = self.num_train_timesteps - 1, self._grid[1]
        # linspace of float32 numbers is float32, and so are the published tables.
        return np.stack(
            [
                np.linspace(
                    grid[int(low * self.num_train_timesteps)],
                    grid[min(int(high * self.num_train_timesteps), last)],
                    self.num_train_timesteps + 1,
                    dtype=np.float32,
                )[:-1]
                for low, high in self.timestep_ratios
            ]
        )

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """t (9), float64 [N]: the stage-local sigma at index k, the same for every stage."""
        return np.linspace(1.0, 0.0, self.num_train_timesteps + 1)[:-1]

    def flow_range(self, stage: int) -> tuple[float, float]:
        """(s_i, e_i): the noise at the start and at the end of a stage.

        Raises:
          UserError: there is no such stage.
        """
        self._check_stage(stage)
        return self.start_sigmas[stage], self.end_sigmas[stage]

    def renoise_weights(self, stage: int) -> tuple[float, float]:
        """(α_i, β_i) (5) of the jump into a stage.

        Raises:
          UserError: there is no such stage, or nothing comes before it.
        """
        self._check_stage(stage)
        if stage == 0:
            raise UserError("stage 0 starts from pure noise: there is no jump into it")
        signal = 1 - self.orig_start_sigmas[stage]
        alpha = 1 / (math.sqrt(1 + 1 / self.gamma) * (1 - signal) + signal)
        return alpha, alpha * (1 - signal) / math.sqrt(self.gamma)

    def inference_steps(self, stage: int, num_steps: int) -> InferenceSteps:
        """Timesteps and sigmas (10) of `num_steps` Euler steps; a single step goes from 1 to 0 at the largest timestep.

        Raises:
          UserError: there is no such stage, or no step.
        """
        self._check_stage(stage)
        if num_steps < 1:
            raise UserError(f"stage {stage} has {num_steps} steps: give at least one")
        # float(...): the inference tables are float64 between float32 ends.
        timesteps = np.linspace(float(self.timesteps[stage, 0]), float(self.timesteps[stage, -1]), num_steps)
        return InferenceSteps(timesteps, np.append(np.linspace(self.sigmas[0], self.sigmas[-1], num_steps), 0.0))

    def _check_stage(self, stage: int) -> None:
        if not 0 <= stage < self.stages:
            raise UserError(f"stage {stage} does not exist: this pyramid has stages 0 to {self.stages - 1}")


def euler_step(sample: jax.Array, velocity: jax.Array, sigma: float, sigma_next: float) -> jax.Array:
    """One step (11) from the stage-local `sigma` to `sigma_next`; any shape, the dtype of `sample`."""
    return sample + (sigma_next - sigma) * velocity
