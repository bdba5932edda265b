"""The table of TPU slices: every entry divides its chips and rows, and training runs what a plan plans."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import plan, topologies, train
from experiments.config_file import load_config, plain
from nd_jax.errors import UserError
from nd_jax.train.chips import CHIPS
from nd_jax.train.loop import check_batch
from nd_jax.train.sharding import make_mesh

CONFIGS = Path(__file__).parent.parent / "experiments" / "configs"
ENTRIES = [(name, topology) for name, entries in topologies.TABLE.items() for topology in entries]


def test_slices_have_the_chips_that_their_names_say():
    for name, chips in topologies.SLICES.items():
        kind, _, sides = name.partition(":")
        assert kind in CHIPS and math.prod(map(int, sides.split("x"))) == chips


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(("name", "topology"), ENTRIES)
def test_an_entry_divides_its_chips_and_rows(name, topology, slices):
    config = plain(load_config(f"{CONFIGS}/{name}", topologies.topology_overrides(name, topology, slices)))
    chips = slices * topologies.SLICES[topology]
    devices = [SimpleNamespace(id=k, slice_index=k * slices // chips) for k in range(chips)]
    sizes = config["mesh"]
    assert math.prod(sizes.values()) == chips and sizes["data"] % slices == 0
    with pytest.raises(UserError, match=f"does not fit {chips - 1} devices"):
        make_mesh(sizes, devices[1:])
    check_batch(config, SimpleNamespace(shape=sizes))
    # A row of every stage on each chip, in every part of the batch.
    rows = config["batch_size"] // (sizes["data"] * sizes["fsdp"] * config["microbatches"])
    assert rows % sum(config.get("objective", {}).get("stage_ratios", [1])) == 0


def test_more_slices_keep_their_rows_and_share_nothing_but_gradients():
    one, two = (
        dict(x.split("=") for x in topologies.topology_overrides("teacher.py:full", "v5e:4x4", n)) for n in (1, 2)
    )
    changed = {key: (int(one[key]), int(two[key])) for key in one if one[key] != two[key]}
    assert changed == {"--config.batch_size": (384, 768), "--config.mesh.data": (1, 2)}


def test_attention_is_the_kernel_where_the_plan_says_that_it_pays():
    found = {
        topology: load_config(f"{CONFIGS}/teacher.py:full", topologies.topology_overrides("teacher.py:full", topology))
        for topology in topologies.SLICES
    }
    assert {name for name, config in found.items() if config.attention == "splash"} == {"v5e:4x4"}
    assert set(found) - {"v5e:4x4"} == {name for name, config in found.items() if config.attention == "xla"}


def test_training_and_plan_take_the_same_settings(tmp_path, monkeypatch):
    """The same flags; what the command line sets itself counts more than the table."""
    trained, planned = [], []
    monkeypatch.setattr(train, "run", lambda config, workdir: trained.append(config))
    monkeypatch.setattr(plan, "topology_devices", lambda name, slices: (None, [None] * 16))
    monkeypatch.setattr(plan, "ENVIRONMENT", {})
    # A plan for a TPU takes the processors' flags away, which the tests after this one need.
    monkeypatch.setenv("XLA_FLAGS", "")

    def plan_mesh(config, *_):
        planned.append(config)
        return {"mesh": config["mesh"], "fits": False, "steps": []}

    monkeypatch.setattr(plan, "plan_mesh", plan_mesh)
    given = [f"--config={CONFIGS}/text_encoder.py:full", "--topology=v5e:4x4", "--config.microbatches=2"]
    # The teacher and its tokenizer would be looked for.
    assert train.main([*given, f"--workdir={tmp_path}"]) == 0
    assert plan.main([*given, f"--output={tmp_path / 'plan'}"]) == 0
    keys = ("batch_size", "microbatches", "mesh")
    assert [[config[key] for key in keys] for config in (*trained, *planned)] == [
        [2048, 2, {"data": 1, "fsdp": 16, "tensor": 1}]
    ] * 2


def test_a_topology_without_an_entry(tmp_path):
    given = [f"--config={CONFIGS}/text_encoder.py:tiny", f"--workdir={tmp_path}"]
    with pytest.raises(UserError, match=r"--topology v5e:4x4 has no entry for .*text_encoder.py:tiny"):
        train.main([*given, "--topology=v5e:4x4"])
    # A plan needs none, and plans the config's own mesh.
    assert topologies.topology_overrides("text_encoder.py:tiny", "v5e:4x4") == []
    with pytest.raises(SystemExit):
        train.main([*given, "--slices=2"])
