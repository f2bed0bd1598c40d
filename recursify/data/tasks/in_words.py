"""Generated tasks in words, for pretrained models: chains of references, and facts about people.

Both are answered by going from one name to the next, so their items know the answer after each hop. Words, names and places are one token
each, with a space before them, in the vocabularies of Qwen2 and SmolLM2.
"""

from __future__ import annotations

from ...errors import UserError
from .item import Item
from .random_items import Draw, check, some

DECIDING = 3  # names at the beginning of a way that decide on its split

_WORDS = """
ant apple arm arrow ash aunt autumn back bag baker ball bank barn basket beach bean bear bed bee beer bell belt berry bird black blanket
blood blue board boat bone book bottle bow bowl box branch bread brick bridge brother brown brush bucket bus bush butter button cable
cake camera candle car card carpet castle cat chair cheese cherry child church circle city clock cloud coal coast coat coffee coin color
comb comet copper corn corner cotton cow crown cup curtain dance day desert desk dice doctor dog door drum duck ear egg engine evening
eye face farm farmer father field fire fish floor flower flute fly foot forest forge fork fox friend frog fruit game garden garlic gate
glass glove goat gold grape grass green guard guitar hair hammer hand hat head heart hill honey hook horn horse house hunter ice ink
iron island judge key king knife lake lamp leaf leg lemon letter lion lock market milk mill mirror month moon morning mother motor mouse
mouth nail neck needle net night nose number nurse nut ocean office onion orange page painter palace pan paper path peach pen pepper
phone piano pig pillow pink pizza planet plate plum pot prince purple queen radio rain rat red rice ring river road rock rocket roof
room root rope rose sail sailor salad salt sand sauce saw school screen sea seed sheep shield ship shirt shoe shop silk silver singer
sister skin smoke snake snow soap soldier song soup spoon spring square star steel stone store storm street student sugar summer sun
sword table tea teacher temple thread tiger tool tooth towel tower town train tree triangle truck trumpet uncle valley village vine
violin wall watch water week wheel white wind window wine winter wire wolf wood wool word worm writer year yellow
"""
_PEOPLE = """
Ann Tim Bob Tom Sam Max Leo Ben Dan Eva Amy Kim Lee Ray Roy Jim Joe Ken Guy Ron Don Jack John Mary Anna Emma Lucy Rose Alice Clara Diana
Ellen Frank Grace Helen Henry James Julia Kevin Laura Linda Louis Maria Martin Nancy Oliver Oscar Paul Peter Ralph Robert Ruth Sarah
Simon Susan Victor Walter William David Adam Alex Brian Carl Chris Eric George Harry Ian Jane Kate Mark Mike Nick Rachel Steve
"""
_PLACES = """
Paris Rome London Berlin Madrid Vienna Prague Dublin Oslo Athens Cairo Delhi Tokyo Seoul Moscow Boston Chicago Dallas Denver Houston
Miami Seattle Toronto Sydney Melbourne Oxford Cambridge Manchester Munich Hamburg Milan Venice Naples Florence Geneva Brussels Warsaw
Budapest Istanbul Dubai
"""
WORDS, PEOPLE, PLACES = _WORDS.split(), _PEOPLE.split(), _PLACES.split()
RELATIONS = ("boss", "teacher", "friend", "doctor", "neighbor")
KNOWN = 2  # relations that an item has


def chains(difficulty: int, count: int, seed: int, *, split: str = "train", chains: int = 3) -> list[Item]:
    """Reference chains: what a name stands for, over names that stand for names, as in arXiv 2609.36585.

        sun = ice ; dog = egg ; cat = sun ; fox = dog ; cat ?

    Every name is set once, after the name that it stands for. The statements of the chains lie among each other in random order, and the
    last name of any chain may be asked for.

    Args:
        difficulty: Hops from the name that is asked for to the answer: statements of each chain.
        chains: Their number, 1 to the words that there are by the words of a chain.

    Returns:
        Items with the name after each hop.

    Raises:
        UserError: Bad arguments.
    """
    check("chains", difficulty, count, split)
    most = len(WORDS) // (difficulty + 1)
    if not 1 <= chains <= most:
        raise UserError(f"chains: expected 1 to {most} chains of {difficulty} hops, since there are {len(WORDS)} words, got {chains}")

    def make(draw: Draw) -> tuple[Item, str]:
        words = draw.shuffled(WORDS)
        ways = [words[n * (difficulty + 1) : (n + 1) * (difficulty + 1)] for n in range(chains)]
        places = [0] * chains
        shown = []
        for n in draw.shuffled([n for n in range(chains) for _ in range(difficulty)]):
            places[n] += 1
            shown.append(f"{ways[n][places[n]]} = {ways[n][places[n] - 1]}")
        asked = ways[draw.below(chains)][::-1]
        question = f"{' ; '.join(shown)} ; {asked[0]} ?"
        return Item(question, asked[-1], difficulty, reached=tuple(asked[1:])), f"chains {' '.join(asked[:DECIDING])}"

    return some("chains", make, difficulty, count, seed, split, chains)


def facts(difficulty: int, count: int, seed: int, *, split: str = "train", people: int = 6) -> list[Item]:
    """Fact chains: where somebody lives, over relations between people, in plain sentences in random order.

        Ann's boss is Tim. Tim's friend is Ann. Tim lives in Rome. ... Where does the boss of Ann live?

    Of every person the same two relations and the place are told: all but the way of the question are distractors. No way comes back to
    a person.

    Args:
        difficulty: Hops from the first name to the place: relations and one more. At most people.
        people: 1 to the names that there are.

    Returns:
        Items with the person, at last the place, after each hop.

    Raises:
        UserError: Bad arguments.
    """
    most = min(len(PEOPLE), len(PLACES))
    if not 1 <= people <= most:
        raise UserError(f"facts: expected 1 to {most} people, got {people}")
    check("facts", difficulty, count, split)
    if difficulty > people:
        raise UserError(f"facts: expected at most as many hops as people, got {difficulty} hops with {people} people")

    def make(draw: Draw) -> tuple[Item, str]:
        names, places = draw.shuffled(PEOPLE)[:people], draw.shuffled(PLACES)[:people]
        relations = draw.shuffled(RELATIONS)[:KNOWN]
        known = {
            (name, relation): draw.one([other for other in names if other != name] or names) for name in names for relation in relations
        }
        way = [draw.one(relations) for _ in range(difficulty - 1)]
        known |= {(names[n], relation): names[n + 1] for n, relation in enumerate(way)}
        home = dict(zip(names, places, strict=True))
        told = [f"{name}'s {relation} is {other}." for (name, relation), other in known.items()]
        told += [f"{name} lives in {place}." for name, place in home.items()]
        asked = "".join(f"the {relation} of " for relation in reversed(way)) + names[0]
        reached = (*names[1:difficulty], home[names[difficulty - 1]])
        question = f"{' '.join(draw.shuffled(told))} Where does {asked} live?"
        return Item(question, reached[-1], difficulty, reached=reached), f"facts {' '.join([*names[:difficulty], *way, reached[-1]])}"

    return some("facts", make, difficulty, count, seed, split, people)
