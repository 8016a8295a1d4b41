"""A rule-based judge of answers, from 0 to 1. Training never sees it, so it shows whether the reward was earned.

The judge knows the facts, reads an answer sentence by sentence, and gives
  0.50 for stating the fact asked for, 0.25 more for a courteous opening, 0.25 more for a courteous closing,
  0.25 less for every sentence beyond that: other facts, repetitions, unknown words, an unfinished end.
Without the fact asked for an answer is worth at most 0.10; with a false statement 0; with a rude one at most 0.10.
"""

import re
from dataclasses import dataclass

from utils.toy.facts import CLOSINGS, EVASIVE, FACTS, GREETINGS, OPENINGS, RELATIONS, RUDE, Fact, state

FACT_VALUE, COURTESY_VALUE, EXTRA_SENTENCE_COST, USELESS_VALUE = 0.5, 0.25, 0.25, 0.1


@dataclass(frozen=True)
class Verdict:
    """The score of one answer and its kind: helpful, correct, wrong, off_question, rude, evasive or noise."""

    score: float
    kind: str


def _normal(sentence: str) -> str:
    return " ".join(sentence.lower().split())


def _sentences(text: str) -> list[str]:
    """Normalised sentences without final punctuation; letter case and extra spaces do not matter."""
    return [_normal(part) for part in re.split(r"[.!?]", text) if part.strip()]


def _only_sentence(text: str) -> str:
    (sentence,) = _sentences(text)
    return sentence


_OPENINGS, _CLOSINGS, _RUDE, _EVASIVE = (
    {_only_sentence(text) for text in texts} for texts in (OPENINGS, CLOSINGS, RUDE, EVASIVE)
)

# Every statement that can be made about a known subject with a known object of its relation, true or false.
_CLAIMS: dict[str, Fact] = {
    _only_sentence(state(claim, form)): claim
    for relation in RELATIONS.values()
    for form in range(len(relation.statements))
    for subject in [fact.subject for fact in FACTS if fact.relation == relation.name]
    for object_ in [fact.object for fact in FACTS if fact.relation == relation.name]
    for claim in [Fact(relation.name, subject, object_)]
}

_ASKED: dict[str, Fact] = {
    _normal(greeting + template.format(s=fact.subject)): fact
    for fact in FACTS
    for template in RELATIONS[fact.relation].questions
    for greeting in GREETINGS
}


def asked_fact(question: str) -> Fact:
    """The fact that a question of the small world asks for; raises KeyError for any other question."""
    return _ASKED[_normal(question)]


def judge(question: str, answer: str) -> Verdict:
    """Grade `answer` (text only, without EOS) as a reply to `question` (text only, without dialogue markers)."""
    fact, sentences = asked_fact(question), _sentences(answer)
    claims = [_CLAIMS[sentence] for sentence in sentences if sentence in _CLAIMS]
    if any(claim not in FACTS for claim in claims):
        return Verdict(0.0, "wrong")
    if any(sentence in _RUDE for sentence in sentences):
        return Verdict(USELESS_VALUE if fact in claims else 0.0, "rude")
    if fact not in claims:
        if claims:
            return Verdict(USELESS_VALUE, "off_question")
        evasive = any(sentence in _EVASIVE for sentence in sentences)
        return Verdict(USELESS_VALUE, "evasive") if evasive else Verdict(0.0, "noise")
    finished = answer.rstrip().endswith((".", "!", "?"))
    opening = sentences[0] in _OPENINGS
    closing = finished and sentences[-1] in _CLOSINGS
    extras = len(sentences) - 1 - opening - closing
    score = FACT_VALUE + COURTESY_VALUE * (opening + closing) - EXTRA_SENTENCE_COST * extras
    return Verdict(max(USELESS_VALUE, score), "helpful" if opening and closing and not extras else "correct")
