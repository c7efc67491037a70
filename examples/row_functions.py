"""Row functions for files that no built-in format fits: copy one, and name it in the config.

    data:
      train: qa_feedback_dev.json.gz
      format: examples.row_functions:fine_grained_rlhf

A row function gets one record (a dict of its columns) and returns an Example, or a dict in one of the built-in formats.
It raises ValueError, with a reason without content, for a row that cannot be used: such rows go to quarantine.jsonl.
Plain-text prompt and response are joined as they are, so the space or newline between them is written here.
"""

from itertools import combinations
from typing import Any

from caldpo_ray.schema import Example


def fine_grained_rlhf(record: dict[str, Any]) -> dict[str, Any]:
    """allenai/FineGrainedRLHF, qa_feedback: four answers to a question, compared two by two (k = 4).

    `preference` compares 1v2, 1v3, 1v4, 2v3, 2v4, 3v4: 1 = the first is better, 2 = the second, 0 = no preference.
    The score of an answer is its wins minus its losses; the format `ranked` sorts by it, best first.
    """
    scores = [0, 0, 0, 0]
    for (first, second), winner in zip(combinations(range(4), 2), record["preference"], strict=True):
        outcome = {0: 0, 1: 1, 2: -1}[winner]
        scores[first] += outcome
        scores[second] -= outcome
    return {
        "prompt": f"Question: {record['question']}\nAnswer:",
        "responses": [" " + record[f"prediction {i}"] for i in (1, 2, 3, 4)],
        "scores": scores,
    }


def pandalm(record: dict[str, Any]) -> Example:
    """WeOpenML/PandaLM, test set: two responses, three people each saying 1, 2 or 0 for a tie.

    The majority chooses. The column `soft_label` is the share of the votes for the chosen response, a tie counting
    half: a real probability, for objectives and calibration tests that can use one.
    """
    votes = [record[f"annotator{i}"] for i in (1, 2, 3)]
    winner = max((0, 1, 2), key=votes.count)
    if winner == 0:
        raise ValueError("no majority for either response")
    prompt = "\n".join(text for text in (record["instruction"], record["input"]) if text)
    responses = ["\n" + _as_text(record[f"response{i}"]) for i in (winner, 3 - winner)]
    soft_label = (votes.count(winner) + 0.5 * votes.count(0)) / len(votes)
    return Example(prompt, responses, columns={"soft_label": soft_label})


def _as_text(value: Any) -> Any:
    """The file was written by a program that turned the answer "True" into a boolean."""
    return str(value) if isinstance(value, bool) else value
