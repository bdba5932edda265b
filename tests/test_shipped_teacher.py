"""The toy teacher that ships with the repository: it is whole, small, and makes what captions say."""

import json
from pathlib import Path

from experiments import evaluate
from nd_jax.generate.model_folder import open_model
from nd_jax.weights.folder import load_component

MODEL = Path(__file__).parent.parent / "experiments" / "models" / "toy_teacher"


def test_the_folder_is_whole_and_small():
    files = list(MODEL.glob("*/*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 15e6
    for path in files:
        load_component(path.parent)
    model = open_model(MODEL)
    assert model.mode == "monolithic" and model.transformer.num_layers == 8
    card = (MODEL / "README.md").read_text()
    assert "python -m experiments.toy_teacher" in card and "Seed 0" in card


def test_clips_show_what_their_captions_say(tmp_path):
    """Twelve captions that training never saw; chance is 2 of 12 colours and 3 of 12 shapes or directions."""
    assert (
        evaluate.main(["toy-world", "--model", str(MODEL), "--output", str(tmp_path), "--clips", "12", "--batch", "12"])
        == 0
    )
    accuracy = json.loads((tmp_path / "toy_world.json").read_text())["accuracy"]
    assert accuracy["colour"]["correct"] >= 11 and accuracy["direction"]["correct"] >= 11
    assert accuracy["shape"]["correct"] >= 9
