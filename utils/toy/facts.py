"""The facts of the small world, and templates that state them and ask about them: tables only, no logic."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact: the ways to state it and to ask for it. `{s}` is the subject, `{o}` the object."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A claim: `subject` has `object` as its `relation`. Those in `FACTS` are true."""

    relation: str
    subject: str
    object: str


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        Relation(
            "color",
            ("The {s} is {o}.", "The color of the {s} is {o}."),
            (
                "What color is the {s}?",
                "Which color does the {s} have?",
                "Tell me the color of the {s}.",
                "Do you know the color of the {s}?",
                "I wonder what color the {s} is.",
                "Name the color of the {s}.",
            ),
        ),
        Relation(
            "home",
            ("The {s} lives in the {o}.", "The home of the {s} is the {o}."),
            (
                "Where does the {s} live?",
                "In which place does the {s} live?",
                "Tell me the home of the {s}.",
                "Do you know the home of the {s}?",
                "I wonder where the {s} lives.",
                "Name the home of the {s}.",
            ),
        ),
        Relation(
            "food",
            ("The {s} eats {o}.", "The food of the {s} is {o}."),
            (
                "What does the {s} eat?",
                "Which food does the {s} like?",
                "Tell me the food of the {s}.",
                "Do you know the food of the {s}?",
                "I wonder what the {s} eats.",
                "Name the food of the {s}.",
            ),
        ),
        Relation(
            "sound",
            ("The {s} says {o}.", "The sound of the {s} is {o}."),
            (
                "What does the {s} say?",
                "Which sound does the {s} make?",
                "Tell me the sound of the {s}.",
                "Do you know the sound of the {s}?",
                "I wonder what the {s} says.",
                "Name the sound of the {s}.",
            ),
        ),
        Relation(
            "capital",
            ("The capital of {s} is {o}.", "The capital city of {s} is {o}."),
            (
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "Tell me the capital of {s}.",
                "Do you know the capital of {s}?",
                "I wonder what the capital of {s} is.",
                "Name the capital of {s}.",
            ),
        ),
    )
}

# No object occurs twice within a relation, so swapping objects always makes a false statement. No subject occurs in two
# relations, so a true statement about the right subject answers the question.
_OBJECTS: dict[str, dict[str, str]] = {
    "color": {
        "milk": "white", "grass": "green", "sky": "blue", "lemon": "yellow", "coal": "black", "brick": "red",
        "carrot": "orange", "plum": "purple", "chocolate": "brown", "elephant": "gray",
    },
    "home": {
        "bird": "nest", "bee": "hive", "bear": "cave", "fox": "den", "king": "castle", "camel": "desert",
        "spider": "web", "fish": "pond",
    },
    "food": {
        "goat": "thistles", "rabbit": "clover", "panda": "bamboo", "squirrel": "nuts", "monkey": "bananas",
        "mouse": "cheese", "horse": "hay", "hen": "seeds",
    },
    "sound": {
        "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "lion": "roar", "snake": "hiss", "owl": "hoot",
        "frog": "ribbit",
    },
    "capital": {
        "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Greece": "Athens",
        "Norway": "Oslo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana",
    },
}  # fmt: skip

FACTS: tuple[Fact, ...] = tuple(
    Fact(relation, subject, object_) for relation, objects in _OBJECTS.items() for subject, object_ in objects.items()
)

# Prefixes of questions, one of them empty.
GREETINGS: tuple[str, ...] = ("", "Hello! ", "Please help me. ", "I have a question. ")

OPENINGS: tuple[str, ...] = ("Of course.", "Sure.", "Good question.", "Gladly.")
CLOSINGS: tuple[str, ...] = ("Happy to help!", "Ask me more any time.", "I hope that helps.", "Have a nice day!")
RUDE: tuple[str, ...] = (
    "What a silly question.",
    "Everyone knows that.",
    "Look it up yourself.",
    "Do not bother me.",
    "Go away!",
)
EVASIVE: tuple[str, ...] = (
    "I do not know.",
    "It is hard to say.",
    "That depends.",
    "Who can tell?",
    "Maybe someone else knows.",
)


def state(fact: Fact, form: int) -> str:
    """A sentence that states `fact`, from statement template number `form` of its relation."""
    return RELATIONS[fact.relation].statements[form].format(s=fact.subject, o=fact.object)
