"""Curves of a training run for a report."""

from pathlib import Path

from nd_jax.report.plots import Series
from nd_jax.train.metrics import read_metrics


def metric_series(workdir: Path, key: str, label: str) -> Series:
    """A metric of a run's metrics.jsonl over steps; empty where the run never wrote it."""
    points = [(line["step"], line[key]) for line in read_metrics(workdir / "metrics.jsonl") if key in line]
    return Series(label, [x for x, _ in points], [y for _, y in points])
