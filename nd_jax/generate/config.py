"""How a video is sampled: sizes, steps and guidance."""

import dataclasses

from nd_jax.errors import UserError
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.schedule import PyramidSchedule

MODES = ("hybrid", "monolithic")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a video is sampled. Hashable; `hybrid` and `monolithic` give the released settings.

    Attributes:
      video: sizes in latents.
      mode: one of `MODES`.
      first_steps: Euler steps of the first unit at every stage, coarsest first; unused in mode "hybrid".
      steps: of every other unit.
      first_guidance: g of equation 4 for the first unit; None for none; unused in mode "hybrid".
      guidance: of every other unit.
      schedule: of the pyramid.

    Raises:
      UserError: settings that do not fit together.
    """

    video: VideoSize
    mode: str = "hybrid"
    first_steps: tuple[int, ...] = (1, 1, 1)
    steps: tuple[int, ...] = (1, 1, 1)
    first_guidance: float | None = None
    guidance: float | None = None
    schedule: PyramidSchedule = dataclasses.field(default_factory=PyramidSchedule)

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.video.stages != self.schedule.stages:
            raise UserError(
                f"the video has {self.video.stages} stages and the schedule {self.schedule.stages}: make them equal"
            )
        if self.video.frames_per_unit != 1:
            raise UserError(
                f"frames_per_unit is {self.video.frames_per_unit}: only units of one latent frame are sampled"
            )
        for name in ("first_steps", "steps"):
            counts = getattr(self, name)
            if len(counts) != self.video.stages or any(type(n) is not int or n < 1 for n in counts):
                raise UserError(f"{name} is {list(counts)}: give {self.video.stages} positive numbers, one a stage")

    @property
    def first_unit(self) -> int:
        """The first unit that is sampled."""
        return int(self.mode == "hybrid")

    @property
    def needs_negative(self) -> bool:
        """Whether a unit is sampled with guidance."""
        return any(self.unit_settings(first)[1] is not None for first in {unit == 0 for unit in self.sampled_units})

    @property
    def sampled_units(self) -> range:
        return range(self.first_unit, self.video.units)

    @property
    def function_evaluations(self) -> int:
        """Evaluations of the transformer for one prompt, both branches of guidance counted."""
        settings = [self.unit_settings(unit == 0) for unit in self.sampled_units]
        return sum(sum(steps) * (1 if guidance is None else 2) for steps, guidance in settings)

    def unit_settings(self, first: bool) -> tuple[tuple[int, ...], float | None]:
        """(steps of every stage, guidance) of the first unit or of the others."""
        return (self.first_steps, self.first_guidance) if first else (self.steps, self.guidance)


def hybrid(video: VideoSize, steps: tuple[int, ...] | None = None, guidance: float | None = None) -> SamplerConfig:
    """The first latent frame is given; one step a stage without guidance by default."""
    return SamplerConfig(video, "hybrid", (1,) * video.stages, steps or (1,) * video.stages, None, guidance)


def monolithic(
    video: VideoSize,
    first_steps: tuple[int, ...] | None = None,
    steps: tuple[int, ...] | None = None,
    first_guidance: float | None = 7.0,
    guidance: float | None = 5.0,
) -> SamplerConfig:
    """Everything is sampled; 20 steps a stage for the first latent frame and 10 for the others by default."""
    first_steps, steps = first_steps or (20,) * video.stages, steps or (10,) * video.stages
    return SamplerConfig(video, "monolithic", first_steps, steps, first_guidance, guidance)
