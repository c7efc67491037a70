"""The language of the embedded world: short reviews, their true base distribution and their true reward.

A prompt names a topic, and a response is a review of one to three clauses:

    review of the film : the acting was really superb but the ending was not good and i enjoyed it .

The language is a finite automaton whose arcs carry a word, its probability and its reward. No state has two arcs with
one word, so a review is one path: its log-prob and its true reward are sums along that path, and expectations over all
reviews are dynamic programming (``optimum.py``).

Three rules span several words, and a damaged model breaks them first: the subject of a clause is an aspect of the
prompt's topic, ``and`` joins clauses of one polarity, and ``but`` joins opposite ones.
"""

from dataclasses import dataclass, replace

LANGUAGE_VERSION = 1  # reviews of another version have other rewards

ASPECTS = {
    "film": ("acting", "script", "music", "ending"),
    "book": ("prose", "plot", "cover", "title"),
    "game": ("art", "sound", "story", "pace"),
    "meal": ("soup", "bread", "service", "wine"),
}
PROMPTS = {f"review of the {topic} :": topic for topic in ASPECTS}
VERB_CLAUSE_PROBABILITY = 0.25  # "i enjoyed it" instead of "the plot was good"
LINKS = ("and", "but", "while")
STOP_PROBABILITIES = (0.35, 0.6, 1.0)  # after the first, second and third clause

# Positive word, negative word, valence (of opposite sign), probability of the pair: strong words are rare. Everything
# mirrors, so the mean reward of the base distribution is 0.
ADJECTIVES = (
    ("nice", "plain", 0.4, 0.22),
    ("good", "bad", 0.5, 0.19),
    ("fresh", "stale", 0.6, 0.16),
    ("strong", "weak", 0.7, 0.13),
    ("clever", "clumsy", 0.8, 0.11),
    ("lovely", "ugly", 1.0, 0.09),
    ("superb", "awful", 1.3, 0.06),
    ("perfect", "hopeless", 1.6, 0.04),
)
VERBS = (("liked", "disliked", 0.5, 0.5), ("enjoyed", "resented", 0.8, 0.3), ("loved", "hated", 1.2, 0.2))
# Factor on the valence of the adjective that follows, and probability; the other adjectives stand alone.
MODIFIERS = {"slightly": (0.5, 0.1), "quite": (0.8, 0.1), "very": (1.4, 0.1), "really": (1.6, 0.1), "not": (-0.6, 0.15)}


@dataclass(frozen=True)
class State:
    """A place in a review, and what decides how it may go on."""

    place: str
    topic: str
    clause: int = 1
    factor: float = 1.0  # of the modifier just read


@dataclass(frozen=True)
class Arc:
    """One word that may follow at a state. ``target`` is None where it completes the review."""

    word: str
    probability: float
    target: State | None
    reward: float = 0.0


def _clause(state: State) -> list[Arc]:
    return [
        Arc("the", 1 - VERB_CLAUSE_PROBABILITY, replace(state, place="aspect")),
        Arc("i", VERB_CLAUSE_PROBABILITY, replace(state, place="verb")),
    ]


def _aspect(state: State) -> list[Arc]:
    aspects = ASPECTS[state.topic]
    return [Arc(word, 1 / len(aspects), replace(state, place="was")) for word in aspects]


def _was(state: State) -> list[Arc]:
    return [Arc("was", 1.0, replace(state, place="predicate"))]


def _predicate(state: State) -> list[Arc]:
    modified = [
        Arc(word, probability, replace(state, place="adjective", factor=factor))
        for word, (factor, probability) in MODIFIERS.items()
    ]
    plain = 1 - sum(arc.probability for arc in modified)
    return modified + [replace(arc, probability=plain * arc.probability) for arc in _adjective(state)]


def _adjective(state: State) -> list[Arc]:
    return _valued(state, ADJECTIVES, "end")


def _verb(state: State) -> list[Arc]:
    return _valued(state, VERBS, "it")


def _it(state: State) -> list[Arc]:
    return [Arc("it", 1.0, replace(state, place="end"))]


def _end(state: State) -> list[Arc]:
    stop = STOP_PROBABILITIES[state.clause - 1]
    if stop == 1:
        return [Arc(".", 1.0, None)]
    following = replace(state, place="clause", clause=state.clause + 1)
    return [Arc(".", stop, None)] + [Arc(word, (1 - stop) / len(LINKS), following) for word in LINKS]


def _valued(state: State, pairs: tuple[tuple[str, str, float, float], ...], place: str) -> list[Arc]:
    target = replace(state, place=place, factor=1.0)
    return [
        Arc(word, probability / 2, target, round(sign * valence * state.factor, 3))
        for positive, negative, valence, probability in pairs
        for word, sign in ((positive, 1), (negative, -1))
    ]


_ARCS_AT = {
    "clause": _clause,
    "aspect": _aspect,
    "was": _was,
    "predicate": _predicate,
    "adjective": _adjective,
    "verb": _verb,
    "it": _it,
    "end": _end,
}


def arcs_from(state: State) -> list[Arc]:
    """The words that may follow at ``state``, each once; their probabilities sum to 1."""
    return _ARCS_AT[state.place](state)
