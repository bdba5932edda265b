"""Captions from a small grammar: prompts for a first run, for tests, and for learning, without any download.

caption := [style] size colour shape motion [place]
"""

import itertools

import numpy as np

SIZES = ("small", "large", "tiny", "huge")
COLOURS = ("red", "green", "blue", "yellow", "white", "purple", "orange", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SPEEDS = ("slowly", "quickly", "steadily")
DIRECTIONS = ("left", "right", "up", "down")
VERBS = ("moves", "drifts", "slides", "rolls")
PLACES = (
    "",
    "on a black background",
    "over a grey floor",
    "in front of a brick wall",
    "under a cloudy sky",
    "at night",
)
STYLES = ("", "a cartoon of", "a close-up of", "a watercolour of", "an old film of")

_GRAMMAR = (STYLES, SIZES, COLOURS, SHAPES, VERBS, DIRECTIONS, SPEEDS, PLACES)


def toy_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different captions in an order drawn from `seed`.

    Raises:
      ValueError: the grammar has fewer captions.
    """
    sizes = [len(words) for words in _GRAMMAR]
    total = int(np.prod(sizes))
    if count > total:
        raise ValueError(f"{count} captions asked for, the grammar has {total}")
    chosen = np.random.default_rng(seed).choice(total, size=count, replace=False)
    picks = zip(*np.unravel_index(chosen, sizes), strict=True)
    return [_caption(*(words[i] for words, i in zip(_GRAMMAR, pick, strict=True))) for pick in picks]


def _caption(style, size, colour, shape, verb, direction, speed, place) -> str:
    subject = f"{style} a {size} {colour} {shape}" if style else f"a {size} {colour} {shape}"
    return " ".join(itertools.chain(subject.split(), (verb, direction, speed), place.split()))
