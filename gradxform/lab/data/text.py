"""English-like text from a small random grammar, for language models, without files or downloads.

A model can learn something at every range. Letters form a few hundred words. Words form sentences,
in which a verb agrees in number with its noun, even if nested clauses stand between them. Each
passage is about two people, whose names return inside and outside of quotation marks.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from gradxform.lab.data.formats import Split

_NOUNS = """actor aunt baker baron bear beaver bird boat boy bride brother captain carpenter cat
child clerk clock cook cousin cow crow dancer daughter dentist doctor dog donkey dragon driver
duchess duck eagle farmer father fisher flower fox friend gardener ghost giant girl goat guard
guest hen horse hunter judge king kitten lady lamb lawyer lion maid mayor merchant miller monk
mother mouse neighbour nurse owl painter parrot pilot pirate poet prince princess queen rabbit
robber sailor scholar servant shepherd singer sister soldier spider stranger student tailor
teacher thief tiger tortoise traveller uncle weaver widow witch wizard wolf worker writer"""
_IRREGULAR = {
    "child": "children", "mouse": "mice", "thief": "thieves", "wolf": "wolves",
}  # fmt: skip
_PLACES = """barn beach bench boulder bridge castle cellar church city corner ditch field forest
fountain garden gate harbour hedge hill house island kitchen lake market meadow mill mountain
orchard palace path river school stable station tower tunnel valley village wall well"""
_TRANSITIVE = """admire adore annoy answer avoid believe blame bother call catch chase cheat copy
defend doubt envy fear feed find follow forgive greet guide hate hear help hide invite know like
love miss mock need notice obey paint please praise push recognise remember rescue scold see serve
teach tease thank touch trust visit want warn wash watch"""
_INTRANSITIVE = """argue arrive cough cry dance dream fall fly grumble hesitate hum hurry jump
kneel laugh listen pray rest return run shiver shout sigh sing sleep smile sneeze stumble swim
tremble vanish wait wake walk weep whistle wonder work worry yawn"""
_ADJECTIVES = """angry blind bold brave busy calm careful cheerful clever clumsy cold cruel
curious dusty fat fierce foolish friendly funny gentle gloomy greedy happy honest hungry jealous
kind lame lazy lonely loud lucky mild modest noble nervous old patient pale polite poor proud
quick quiet rich rude sad serious shy silent silly sleepy slow small sober strange strong tall
thin tired ugly weak wet wicked wild wise young"""
_ADVERBS = """again always badly bravely early everywhere gladly here late loudly never now often
quietly rarely secretly seldom slowly softly sometimes soon there today together twice"""
_NAMES = """Agnes Albert Alice Arthur Beatrice Bernard Clara Conrad Daisy Daniel Edith Edmund
Flora Francis George Greta Harold Hilda Ida Isaac Jacob Julia Karl Laura Leonard Martha Martin
Nora Norman Oliver Olga Paula Peter Robert Rosa Simon Sophia Thomas Ursula Victor Vera Walter
Wilma"""

# All productions of a symbol are equally likely; one that is written twice is twice as likely.
# Symbols that end in 1 are singular, those that end in 2 are plural. A and B are the two people of
# a passage. ^ marks the start of a sentence.
_RULES: dict[str, tuple[str, ...]] = {
    "passage": (
        "{meet} {sentence} {speech} {sentence} {speech}\n",
        "{meet} {speech} {speech} {sentence}\n",
        "{meet} {speech} {sentence} {sentence} {speech}\n",
    ),
    "meet": (
        "{A} and {B} {do2} {place}.", "{A} meets {B} {place}.", "^{one} meets {A} and {B} {place}.",
    ),
    "speech": (
        '"{B}," says {A}, "{clause}."',
        '"^{clause}," {A} tells {B}.',
        '{B} asks {A}: "^{question}?" "{A} {do1}," says {A}.',
        '"^{question}, {A}?" asks {B}. "^{question}, {B}?" {A} replies.',
        '"{A}, {A}," {B} calls, "{clause}!"',
    ),
    "sentence": (
        "^{clause}.", "^{clause}.", "^{clause}, and {clause}.", "^{clause}, but {clause}.",
    ),
    "clause": (
        "{one} {do1}", "{one} {do1}", "{many} {do2}", "{many} {do2}", "{A} {do1}", "{B} {do1}",
    ),
    "question": (
        "does {one} {do2}", "do {many} {do2}", "why does {one} {do2}", "where do {many} {do2}",
        "why do {many} {verb2} {anyone}", "when does {B} {do2}",
    ),
    "one": (
        "the {noun1}", "the {noun1}", "the {adjective} {noun1}", "every {noun1}",
        "the {noun1} {place}", "the {noun1} {who1}", "the {adjective} {noun1} {who1}",
    ),
    "many": (
        "the {noun2}", "the {noun2}", "the {adjective} {noun2}", "{number} {noun2}",
        "the {noun2} {place}", "the {noun2} {who2}", "{number} {adjective} {noun2} {who2}",
    ),
    "who1": ("who {do1}", "who {verb1} {anyone}", "whom {one} {verb1}", "whom {many} {verb2}"),
    "who2": ("who {do2}", "who {verb2} {anyone}", "whom {one} {verb1}", "whom {many} {verb2}"),
    "do1": (
        "{rest1}", "{rest1} {adverb}", "{rest1} {place}", "{verb1} {anyone}", "{verb1} {anyone}",
    ),
    "do2": (
        "{rest2}", "{rest2} {adverb}", "{rest2} {place}", "{verb2} {anyone}", "{verb2} {anyone}",
    ),
    "anyone": ("{one}", "{many}", "{A}", "{B}"),
    "place": ("{by} the {spot}", "{by} the {adjective} {spot}", "{by} the {spot} of {A}"),
    "by": ("near", "behind", "beside", "by", "in front of"),
    "number": ("two", "three", "four", "five", "six", "seven", "many", "some", "all", "no"),
}  # fmt: skip

_Draw = Callable[[int], int]  # n -> a random one of 0, …, n − 1
_Part = tuple[str, str]  # literal words, and the symbol after them or ""


def write(characters: int, seed: int = 0) -> str:
    """Text of a given length, the same for a seed on every machine.

    Args:
      characters: length of the text; it may end in the middle of a word.
      seed: seed of the random choices.

    >>> write(62)
    'Vera meets Martin beside the beach of Vera. Martin invites Mar'
    """
    # NumPy guarantees the raw stream of a bit generator for ever, but nothing derived from it.
    stream = np.random.PCG64(seed)
    raw: list[int] = []

    def draw(count: int) -> int:
        if not raw:
            raw.extend(stream.random_raw(1 << 12).tolist())
        return raw.pop() % count

    grammar, names = _grammar(), _NAMES.split()
    passages, length = [], 0
    while length < characters:
        first, second = draw(len(names)), draw(len(names) - 1)
        people = {"A": names[first], "B": names[second + (second >= first)]}
        words: list[str] = []
        _expand("passage", grammar, people, draw, words)
        passages.append(re.sub(r"\^(.)", lambda begin: begin[1].upper(), "".join(words)))
        length += len(passages[-1])
    return "".join(passages)[:characters]


def cut(text: str, alphabet: str, length: int) -> Split:
    """Sequences of consecutive characters, as numbers, and for each character the next.

    Args:
      text: the text; an incomplete last sequence is left out.
      alphabet: all characters of the text; a character becomes its position in the alphabet.
      length: characters per sequence.

    Returns:
      x, uint8 (n, length), and y, int32 (n, length), which is x shifted by one character.

    >>> cut("abacab", "abc", 2)
    Split(x=array([[0, 1],
           [0, 2]], dtype=uint8), y=array([[1, 0],
           [2, 0]], dtype=int32))
    """
    place = {character: number for number, character in enumerate(alphabet)}
    numbers = np.array([place[character] for character in text], np.uint8)
    end = (len(numbers) - 1) // length * length
    x, y = numbers[:end].reshape(-1, length), numbers[1 : end + 1].reshape(-1, length)
    return Split(x, y.astype(np.int32))


def _expand(
    symbol: str,
    grammar: Mapping[str, tuple[tuple[_Part, ...], ...]],
    people: Mapping[str, str],
    draw: _Draw,
    words: list[str],
) -> None:
    """Expands a symbol by random choices and appends the result to ``words``."""
    if symbol in people:
        words.append(people[symbol])
        return
    productions = grammar[symbol]
    for word, inner in productions[draw(len(productions))]:
        words.append(word)
        if inner:
            _expand(inner, grammar, people, draw, words)


def _grammar() -> dict[str, tuple[tuple[_Part, ...], ...]]:
    """The productions of every symbol, split at the symbols inside them."""
    nouns, verbs, rests = _NOUNS.split(), _TRANSITIVE.split(), _INTRANSITIVE.split()
    lexicon = {
        "noun1": nouns,
        "noun2": [_IRREGULAR.get(noun) or _with_s(noun) for noun in nouns],
        "verb1": [_with_s(verb) for verb in verbs],
        "verb2": verbs,
        "rest1": [_with_s(rest) for rest in rests],
        "rest2": rests,
        "adjective": _ADJECTIVES.split(),
        "adverb": _ADVERBS.split(),
        "spot": _PLACES.split(),
    }
    return {
        symbol: tuple(tuple(re.findall(r"([^{}]*)(?:{(\w+)}|$)", text)) for text in productions)
        for symbol, productions in {**_RULES, **lexicon}.items()
    }


def _with_s(word: str) -> str:
    """The plural of a noun, or the singular form of a verb."""
    if re.search(r"(s|sh|ch|x|z)$", word):
        return word + "es"
    return re.sub(r"(?<![aeiou])y$", "ie", word) + "s"
