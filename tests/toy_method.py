"""A method of two trained roles and a frozen one on vectors: quick to compile, exercises all that the trainer does."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.distill.base import Batch, Distillation, Mean, Role, Roles

WIDTH = 16


def toy_method(teacher_seed: int = 7) -> Distillation:
    """Student and fake learn a linear map from the frozen teacher; the student's `offset` is held."""

    def init(seed: int):
        return lambda: {
            "layer": {"kernel": jax.random.normal(jax.random.key(seed), (WIDTH, WIDTH)) * 0.1},
            "offset": jnp.full((WIDTH,), float(seed)),
        }

    def role(seed: int, trainable: tuple[str, ...]) -> Role:
        return Role(
            abstract=jax.eval_shape(init(seed)),
            logical_axes=((r"kernel$", ("embed", "mlp")),),
            source=f"random, seed {seed}",
            sha256=lambda: str(seed),
            init=init(seed),
            trainable=trainable,
        )

    def output(params, x):
        return x @ params["layer"]["kernel"]

    def loss(name: str):
        def fn(roles: Roles, batch: Batch, key: jax.Array) -> tuple[Mean, dict[str, Mean]]:
            target = output(roles["teacher"], batch["x"]) + 0.01 * jax.random.normal(key, batch["x"].shape)
            error = jnp.mean((output(roles[name], batch["x"]) - target) ** 2, axis=-1)
            mean = Mean(jnp.sum(error * batch["weight"]), jnp.sum(batch["weight"]))
            return mean, {f"{name}_error": mean}

        return fn

    def evaluate(roles: Roles, batch: Batch) -> dict[str, Mean]:
        error = jnp.mean((output(roles["student"], batch["x"]) - output(roles["teacher"], batch["x"])) ** 2, axis=-1)
        return {"score": Mean(-jnp.sum(error), jnp.float32(error.size))}

    return Distillation(
        name="toy",
        roles={"student": role(1, ("layer",)), "fake": role(2, ("layer",)), "teacher": role(teacher_seed, ())},
        losses={"student": loss("student"), "fake": loss("fake")},
        schedule=("fake", "fake", "student"),
        evaluate=evaluate,
        summarize=dict,
        deploy=lambda roles: {},
    )


class ToyBatches:
    """Batch k is a pure function of k."""

    def __init__(self, batch_size: int, poison_at: int | None = None):
        self.position, self._size, self._poison = 0, batch_size, poison_at

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.position)
        batch = {
            "x": rng.normal(size=(self._size, WIDTH)).astype(np.float32),
            "weight": rng.integers(1, 5, self._size).astype(np.float32),
            "example": np.arange(self._size) + self.position * self._size,
        }
        if self.position == self._poison:
            batch["x"][3] = np.nan
        self.position += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def toy_eval() -> Iterator[dict[str, np.ndarray]]:
    yield next(ToyBatches(16))


def toy_config(**changes: Any) -> dict[str, Any]:
    config = {
        "method": "toy",
        "unit": "examples",
        "seed": 0,
        "num_steps": 12,
        "batch_size": 16,
        "microbatches": 1,
        "ema_decay": 0.9,
        "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "decay": "cosine",
            "beta1": 0.9,
            "beta2": 0.999,
            "epsilon": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        },
        "log_every": 1,
        "eval_every": 6,
        "checkpoint": {"every": 3, "keep": 2, "best_metric": "eval/score"},
    }
    return config | changes
