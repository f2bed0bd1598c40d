"""Tasks whose difficulty is a dial: each a function of difficulty, count and seed, the same on every machine.

    name          question                               answer  difficulty
    permutations  c a b a                                D       letters in a word, whose product in S3 or S5 is the answer
    pointers      a > c , c > b , b > a ; a next next    b       hops of a walk along the arrows, whose end is the answer
    chains        sun = ice ; cat = sun ; cat ?          ice     hops along the names, whose end is the answer
    facts         Ann's boss is Tim. Tim lives in Rome.  Rome    relations from the first name to the answer
                  Where does the boss of Ann live?
    addition      4 7 + 8 5                              1 3 2   digits of each number
    booleans      ( not ( True or False ) )              False   nesting depth

Everything is plain ASCII, and every symbol stands between spaces: no tokenizer can join two digits, two letters or a bracket and a word.
chains and facts, whose questions are of words (those of facts are sentences), are in in_words.py.
Nothing is explained in the question; what letters and arrows mean is for training to teach.

Of each task one item in five is for test and can be in no training set, whatever the seed, see random_items.py. What decides is the item
without what does not matter: the order of the numbers that are added, or of the arrows. Of a word it is the first four letters: its labels
tell the products of all its beginnings, and so those of four letters and more are on the same side of the line as the word itself.
(Shorter ones cannot be: a training word may begin with a test word of up to three letters.)
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import string
from collections.abc import Callable, Sequence

from ...errors import UserError
from .in_words import chains, facts
from .item import Item
from .random_items import Draw, check, some, split_of

Permutation = tuple[int, ...]  # who is at place 0, 1, ...

GROUPS = {"S3": 3, "S5": 5}  # name -> places
DECIDING = 4  # letters at the beginning of a word that decide on its split
NODES = 16
DEEPEST = 12  # an expression has (5/3)^depth literals on average


def permutations(
    difficulty: int, count: int, seed: int, *, split: str = "train", group: str = "S3", unscored: int = 0, offset: int = 0
) -> list[Item]:
    """Running products in a permutation group: the state tracking task.

    A letter of the question moves what lies in n places: the first ones, from "a", exchange two places each, in the order (0 1),
    (0 2), ... (n-2 n-1); the others rotate all places to the left by 1, 2, ... n-1. That is 5 letters in S3, and 14 in S5. They are applied
    from left to right. Letters are drawn evenly; products are even over the group from a few letters on.

    An element is named by where it stands among all arrangements in order: "A" to "F" in S3. The 120 of S5 take a letter, the arrangement
    of the last four places, and a digit, who is at the first place: "A1" is in order. Every common tokenizer makes that two tokens.

    Args:
        difficulty: Letters in the word.
        group: "S3", which a model of fixed depth can track in theory, or "S5", which as far as is known it cannot.
        unscored: Letters behind the word that are read and have no label. A model that is trained with them has read words longer than
            those that it was scored on.
        offset: Up to so many letters before the word, by chance, whose product is told and goes into the labels: "b a C e d" goes on
            from C. What is known after how many steps is then not a matter of the place.

    Returns:
        Items with the product so far as the label of each letter.

    Raises:
        UserError: Bad arguments, or a word so short that no item falls to the split.
    """
    check("permutations", difficulty, count, split)
    if group not in GROUPS:
        raise UserError(f"permutations: expected the group {' or '.join(GROUPS)}, got {group!r}")
    for name, letters in (("unscored", unscored), ("offset", offset)):
        if letters < 0:
            raise UserError(f"permutations: expected 0 or more letters as {name}, got {letters}")
    places = GROUPS[group]
    moves, names = _moves(places), _names(places)

    def make(draw: Draw) -> tuple[Item, str]:
        word = [draw.one(moves) for _ in range(difficulty + unscored)]
        key = _key(group, word)
        before = [draw.one(moves) for _ in range(draw.below(offset + 1))] if offset else []
        while len(before) >= DECIDING and split_of(_key(group, before)) != split_of(key):  # its product is told, too
            before = [draw.one(moves) for _ in before]
        told, labels = [], []
        state = tuple(range(places))
        for _, move in before:
            state = tuple(state[place] for place in move)
        if before:
            told = [*(letter for letter, _ in before), names[state]]
        for _, move in word:
            state = tuple(state[place] for place in move)
            labels.append(names[state])
        words = [*told, *(letter for letter, _ in word)]
        return Item(" ".join(words), labels[-1], difficulty, labels=tuple(labels[:difficulty]), unscored=unscored), key

    return some("permutations", make, difficulty, count, seed, split, group)


def _key(group: str, word: Sequence[tuple[str, Permutation]]) -> str:
    """What decides on the split of a word."""
    return f"{group} {' '.join(letter for letter, _ in word[:DECIDING])}"


def pointers(difficulty: int, count: int, seed: int, *, split: str = "train", nodes: int = NODES) -> list[Item]:
    """Pointer chasing: where a walk of some hops ends, along arrows that the question gives in random order.

    Every node has one arrow out and one in, so counting arrows tells nothing, and no walk comes back within its hops. The node right before
    the start is the answer once in (nodes - hops) times, for where many nodes are walked the circle soon closes: ask for more nodes than
    hops by as much as a lucky guess should be rare.

    Args:
        difficulty: Hops, fewer than nodes.
        nodes: 2 to 26.

    Returns:
        Items with the node so far as the label of each hop.

    Raises:
        UserError: Bad arguments, or so few nodes that no item falls to the split.
    """
    check("pointers", difficulty, count, split)
    if not 2 <= nodes <= 26:
        raise UserError(f"pointers: expected 2 to 26 nodes, got {nodes}")
    if difficulty >= nodes:
        raise UserError(f"pointers: expected fewer hops than nodes, got {difficulty} hops with {nodes} nodes")
    letters = string.ascii_lowercase[:nodes]

    def make(draw: Draw) -> tuple[Item, str]:
        order = draw.shuffled(letters)
        walk, rest = order[: difficulty + 1], order[difficulty + 1 :]
        arrows = dict(itertools.pairwise(walk)) | dict(zip([walk[-1], *rest], draw.shuffled([walk[0], *rest]), strict=True))
        shown = " , ".join(f"{start} > {end}" for start, end in draw.shuffled(list(arrows.items())))
        question = f"{shown} ; {walk[0]}{' next' * difficulty}"
        return Item(question, walk[-1], difficulty, labels=tuple(walk[1:])), "pointers " + "".join(arrows[node] for node in letters)

    return some("pointers", make, difficulty, count, seed, split, nodes)


def addition(difficulty: int, count: int, seed: int, *, split: str = "train") -> list[Item]:
    """Sums of two numbers of as many digits, most significant first.

    As many sums carry in no column as in one, in two, ... or in all of them: the longest chain of carries is as frequent as none.
    Numbers do not begin with 0, except for those of one digit.

    Args:
        difficulty: Digits of each of the two numbers.

    Raises:
        UserError: Bad arguments.
    """
    check("addition", difficulty, count, split)

    def make(draw: Draw) -> tuple[Item, str]:
        carrying = set(draw.shuffled(range(difficulty))[: draw.below(difficulty + 1)])
        columns = []
        for column in range(difficulty):  # from the last digits
            lowest = int(column == difficulty - 1 and difficulty > 1)
            columns.append(draw.one(PAIRS[lowest, column - 1 in carrying, column in carrying]))
        one, other = ("".join(str(digit) for digit in reversed(digits)) for digits in zip(*columns, strict=True))
        question = f"{' '.join(one)} + {' '.join(other)}"
        answer = " ".join(str(int(one) + int(other)))
        return Item(question, answer, difficulty, "digits"), f"addition {'+'.join(sorted((one, other)))}"

    return some("addition", make, difficulty, count, seed, split)


def booleans(difficulty: int, count: int, seed: int, *, split: str = "train") -> list[Item]:
    """Values of expressions of True, False, and, or, not, with brackets around every operation.

    Every literal lies at the full depth, so no part of an expression tells its value sooner than the depth says. At every node the value
    is drawn before the operation, so half of all answers are True, and operations alone tell nothing about them.

    Args:
        difficulty: Nesting depth of the brackets, 1 to 12. An expression has some 25 words at depth 3, 115 at 6, and 900 at 10.

    Raises:
        UserError: Bad arguments.
    """
    check("booleans", difficulty, count, split, hardest=DEEPEST)

    def expression(draw: Draw, depth: int, value: bool) -> str:
        if depth == 0:
            return str(value)
        operation = draw.one(("not", "and", "or"))
        if operation == "not":
            return f"( not {expression(draw, depth - 1, not value)} )"
        decisive = operation == "or"  # the value that one side alone can give to the whole
        ways = [(decisive, decisive), (decisive, not decisive), (not decisive, decisive)]
        left, right = draw.one(ways) if value == decisive else (value, value)
        return f"( {expression(draw, depth - 1, left)} {operation} {expression(draw, depth - 1, right)} )"

    def make(draw: Draw) -> tuple[Item, str]:
        value = bool(draw.below(2))
        question = expression(draw, difficulty, value)
        return Item(question, str(value), difficulty), f"booleans {question}"

    return some("booleans", make, difficulty, count, seed, split)


COMMON = ("difficulty", "count", "seed", "split")
GENERATED: dict[str, Callable[..., list[Item]]] = {
    "permutations": permutations,
    "pointers": pointers,
    "addition": addition,
    "booleans": booleans,
    "chains": chains,
    "facts": facts,
}


def generate(name: str, difficulty: int, count: int, seed: int, *, split: str = "train", **options: object) -> list[Item]:
    """Items of the task of that name.

    Args:
        difficulty: At least 1, in the units of the task.
        count: At least 1. Fewer items of the same seed are the first of more. No question comes twice, unless there are fewer questions.
        seed: Any whole number.
        split: "train" or "test".
        options: What the task has besides: ``group``, ``unscored`` and ``offset`` for permutations, ``nodes`` for pointers, ``chains`` for
            chains, ``people`` for facts.

    Raises:
        UserError: An unknown task or option, and all that the task itself raises.
    """
    if name not in GENERATED:
        raise UserError(f"no generated task {name!r}; there are {', '.join(GENERATED)}")
    known = [option for option in inspect.signature(GENERATED[name]).parameters if option not in COMMON]
    if unknown := [option for option in options if option not in known]:
        every = ("difficulty", "count", "seed", *known)
        near = difflib.get_close_matches(unknown[0], every, n=1, cutoff=0.55)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"{name}: unknown option {unknown[0]!r}; {hint}it has {', '.join(every)}")
    return GENERATED[name](difficulty, count, seed, split=split, **options)


def _moves(places: int) -> list[tuple[str, Permutation]]:
    """Letters, and which place each place takes its content from."""
    still = list(range(places))
    moves = []
    for i, j in itertools.combinations(still, 2):
        exchanged = still.copy()
        exchanged[i], exchanged[j] = j, i
        moves.append(tuple(exchanged))
    moves += [tuple(still[by:] + still[:by]) for by in range(1, places)]
    return list(zip(string.ascii_lowercase, moves, strict=False))


def _names(places: int) -> dict[Permutation, str]:
    elements = list(itertools.permutations(range(places)))
    if len(elements) <= 26:
        return dict(zip(elements, string.ascii_uppercase, strict=False))
    behind = len(elements) // places  # arrangements with the same first
    return {element: f"{string.ascii_uppercase[i % behind]}{i // behind + 1}" for i, element in enumerate(elements)}


# Smallest digit, whether a carry comes in, whether one goes out -> the pairs of digits that do so.
PAIRS = {
    (lowest, comes, goes): [(a, b) for a in range(lowest, 10) for b in range(lowest, 10) if (a + b + comes > 9) == goes]
    for lowest in (0, 1)
    for comes in (False, True)
    for goes in (False, True)
}
