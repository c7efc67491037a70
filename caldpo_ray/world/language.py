"""The language of the embedded world: short reviews with a known base distribution and a known true reward.

A prompt names a topic and a response is a review of one to three clauses:

    review of the film : the acting was really superb but the ending was not good and i enjoyed it .

The language is a finite automaton: an arc carries a word, its probability and its reward, and no state has two arcs
with the same word. So a review is one path, its log-prob and its true reward are sums along that path, and
expectations over all reviews are dynamic programming (``optimum.py``).
"""

from dataclasses import dataclass, replace

LANGUAGE_VERSION = 1  # raise it with any change below: reviews of another version are judged by other rules

ASPECTS = {
    "film": ("acting", "script", "music", "ending"),
    "book": ("prose", "plot", "cover", "title"),
    "game": ("art", "sound", "story", "pace"),
    "meal": ("soup", "bread", "service", "wine"),
}
PROMPTS = {f"review of the {topic} :": topic for topic in ASPECTS}
VERDICT_PROBABILITY = 0.25  # of "i enjoyed it" instead of "the plot was good"
STOP_PROBABILITIES = (0.35, 0.6, 1.0)  # after the first, second and third clause
LINKS = ("and", "but", "while")

# Positive word, negative word, valence (of opposite sign), probability of the pair: strong words are rare. Everything
# mirrors, so the mean reward of the base distribution is 0; the valences are such that its standard deviation is 1.1
# and the preferred response of a pair has the higher true reward in about 3 pairs of 4.
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


def arcs_from(state: State) -> list[Arc]:
    """The words that may follow, each once; their probabilities sum to 1."""
    match state.place:
        case "clause":
            the = Arc("the", 1 - VERDICT_PROBABILITY, replace(state, place="aspect"))
            return [the, Arc("i", VERDICT_PROBABILITY, replace(state, place="verb"))]
        case "aspect":
            aspects = ASPECTS[state.topic]
            return [Arc(word, 1 / len(aspects), replace(state, place="was")) for word in aspects]
        case "was":
            return [Arc("was", 1.0, replace(state, place="predicate"))]
        case "predicate":
            modifiers = [
                Arc(word, probability, replace(state, place="adjective", factor=factor))
                for word, (factor, probability) in MODIFIERS.items()
            ]
            bare = 1 - sum(arc.probability for arc in modifiers)
            adjectives = _valued(ADJECTIVES, state, "end")
            return modifiers + [replace(arc, probability=bare * arc.probability) for arc in adjectives]
        case "adjective":
            return _valued(ADJECTIVES, state, "end")
        case "verb":
            return _valued(VERBS, state, "it")
        case "it":
            return [Arc("it", 1.0, replace(state, place="end"))]
        case "end":
            stop = STOP_PROBABILITIES[state.clause - 1]
            following = State("clause", state.topic, state.clause + 1)
            links = [Arc(word, (1 - stop) / len(LINKS), following) for word in LINKS]
            return [Arc(".", stop, None), *links] if stop < 1 else [Arc(".", 1.0, None)]
    raise ValueError(f"no such place in a review: {state.place}")


def _valued(pairs: tuple[tuple[str, str, float, float], ...], state: State, next_place: str) -> list[Arc]:
    target = replace(state, place=next_place, factor=1.0)
    return [
        Arc(word, probability / 2, target, round(sign * valence * state.factor, 3))
        for positive, negative, valence, probability in pairs
        for word, sign in ((positive, 1), (negative, -1))
    ]
