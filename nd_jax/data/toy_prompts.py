"""The language of the toy world: a small grammar of captions, its parser, and prompts without any download.

    caption := one of TEMPLATES, filled with: size? colour shape verb direction speed background?

Every caption names colour, shape, direction and speed with one word each that belongs to no other attribute, so
`parse_caption` reads them back from any order of words. Size and background are named in some captions only.
"""

import re

import numpy as np

from nd_jax.errors import UserError

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slow", "medium", "fast")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "grey", "brown", "navy")

# What a caption always names, in the order of a table.
ATTRIBUTES = ("colour", "shape", "direction", "speed")

DIRECTION_PHRASES = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "to the top", "upwards"),
    "down": ("down", "to the bottom", "downwards"),
}
SPEED_PHRASES = {
    "slow": ("slowly", "at a slow pace"),
    "medium": ("steadily", "at a medium pace"),
    "fast": ("quickly", "at a fast pace"),
}
VERBS = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"), ("glides", "gliding"))
TEMPLATES = (
    "{object} {moves} {direction} {speed} {background}",
    "{object} is {moving} {direction} {speed} {background}",
    "a video of {object} {moving} {direction} {speed} {background}",
    "{moving} {direction} {speed}, {object} {background}",
    "{background} there is {object} {moving} {direction} {speed}",
    "{speed} {object} {moves} {direction} {background}",
)

_WORDS = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", word) for word in SHAPES},
    **{word: ("direction", word) for word in DIRECTIONS},
    **{f"{word}wards": ("direction", word) for word in DIRECTIONS},
    **{word: ("speed", word) for word in SPEEDS},
    **{"top": ("direction", "up"), "bottom": ("direction", "down")},
    **{"slowly": ("speed", "slow"), "steadily": ("speed", "medium"), "quickly": ("speed", "fast")},
}

_EVERY_DIRECTION = tuple(phrase for phrases in DIRECTION_PHRASES.values() for phrase in phrases)
_EVERY_SPEED = tuple(phrase for phrases in SPEED_PHRASES.values() for phrase in phrases)
_GRAMMAR = (TEMPLATES, ("", *SIZES), COLOURS, SHAPES, VERBS, _EVERY_DIRECTION, _EVERY_SPEED, ("", *BACKGROUNDS))


def caption_text(
    template: str,
    size: str,
    colour: str,
    shape: str,
    verb: tuple[str, str],
    direction: str,
    speed: str,
    background: str,
) -> str:
    """One sentence of the grammar; `direction` and `speed` are phrases, `size` and `background` may be empty."""
    moves, moving = verb
    sentence = template.format(
        object=f"a {size} {colour} {shape}",
        moves=moves,
        moving=moving,
        direction=direction,
        speed=speed,
        background=background and f"on a {background} background",
    )
    return " ".join(sentence.split())


def toy_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different captions in an order drawn from `seed`.

    Raises:
      UserError: the grammar has fewer captions.
    """
    sizes = [len(words) for words in _GRAMMAR]
    total = int(np.prod(sizes))
    if count > total:
        raise UserError(f"{count} captions asked for, the grammar has {total}; ask for fewer")
    chosen = np.random.default_rng(seed).choice(total, size=count, replace=False)
    picks = zip(*np.unravel_index(chosen, sizes), strict=True)
    return [caption_text(*(words[i] for words, i in zip(_GRAMMAR, pick, strict=True))) for pick in picks]


def parse_caption(text: str) -> dict[str, str]:
    """Colour, shape, direction and speed that a caption names, e.g. {"colour": "red", ..., "speed": "slow"}.

    Raises:
      UserError: an attribute is not named, or named with two values.
    """
    found: dict[str, str] = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        if word not in _WORDS:
            continue
        attribute, value = _WORDS[word]
        if found.setdefault(attribute, value) != value:
            raise UserError(f"caption {text!r} names two {attribute}s, {found[attribute]} and {value}; name one")
    for attribute in ATTRIBUTES:
        if attribute not in found:
            raise UserError(f"caption {text!r} names no {attribute}; name one as the toy grammar does")
    return found
