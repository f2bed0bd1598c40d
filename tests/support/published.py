"""Synthetic files in the formats of published reasoning sets: each function writes a file and returns its items.

They have the irregularities of the published files: answers that contradict their equation, numbers with and without commas, blank
lines and comparison signs in worked answers, unused columns, spaces before a divider, facts out of order.
"""

from __future__ import annotations

import csv
import json
import random
from itertools import pairwise
from pathlib import Path

from recursify.data.tasks import Item

PEOPLE, PLACES, THINGS = ("Ida", "Omar", "Lena", "Piet"), ("attic", "cellar", "porch", "studio"), ("lamp", "drum", "kettle", "spoon")


def write_gsm8k(path: Path, count: int = 300) -> list[Item]:
    """A worked answer of 1 to 9 lines, with calculator marks in most of them."""
    rng, rows, items = random.Random(1), [], []
    for number in range(count):
        value = start = rng.randint(2, 90)
        written, plain = [], []
        for step in range(rng.randint(1, 9)):
            other, sign = rng.randint(2, 40), rng.choice("+-*" if abs(value) < 1000 else "+-")
            before, value = value, {"+": value + other, "-": value - other, "*": value * other}[sign]
            result = f"{value:,}" if rng.random() < 0.5 else str(value)
            end = rng.choice(["", " pins.", f" because 3 < {3.5 + step} < 12"])
            mark = rng.choice(["", f"<<{before}{sign}{other}={value}>>"])
            written.append(f"Then it is {before}{sign}{other} = ${mark}{result}{end}")
            plain.append(f"Then it is {before}{sign}{other} = ${result}{end}")
        answer, gap = f"{value:,}" if rng.random() < 0.5 else str(value), rng.choice(["\n", "\n", "\n\n"])
        question = f"Shop {number} has {start} pins. How many are there in the end?"
        rows.append({"question": question, "answer": f"{gap.join(written)}\n#### {answer}"})
        items.append(Item(question, answer, len(plain), "number", "\n".join(plain)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return items


def write_svamp(path: Path, count: int = 300) -> list[Item]:
    """One or two operations between brackets; every number is a float. The published answer of the 68th contradicts its equation."""
    rng, rows, items = random.Random(2), [], []
    for number in range(1, count + 1):
        b, c = rng.randint(2, 30), rng.randint(2, 30)
        a, operations = b * rng.randint(2, 9) + c, rng.choice("+-*/") + rng.choice(["", "+", "-"])
        first = a - c if operations[0] == "/" else a
        equation, value = f"( {first}.0 {operations[0]} {b}.0 )", {"+": a + b, "-": a - b, "*": a * b, "/": (a - c) // b}[operations[0]]
        if operations[1:]:
            equation, value = f"( {equation} {operations[1]} {c}.0 )", value + c if operations[1] == "+" else value - c
        value += number == 68
        body, question = f"{rng.choice(PEOPLE)} had {first} pears, {b} figs" + rng.choice(["", " ."]), f"How many are left on day {number}?"
        rows.append({"ID": f"chal-{number}", "Body": body, "Question": question, "Equation": equation, "Answer": float(value), "Type": "x"})
        items.append(Item(f"{body} {question}", str(value), len(operations), "number"))
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return items


def write_svamp_training(path: Path, count: int = 300) -> list[Item]:
    """Prefix equations over number0, number1 and constants, of numbers as "9" or "9.0", of which one answer is wrong and one rounded."""
    rng, items = random.Random(3), []
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Question", "Numbers", "Equation", "Answer", "group_nums", "Body", "Ques"])
        for number in range(count):
            a, b = rng.randint(2, 90), rng.choice([2, 4, 5, 8, 2.5])
            equation, value = rng.choice(
                [("- number0 number1", a - b), ("* + number0 2.0 number1", (a + 2) * b), ("/ - number0 number1 0.25", (a - b) / 0.25),
                 ("* / - number1 number0 number0 100.0", (b - a) / a * 100)]
            )  # fmt: skip
            answer = round(value, 3) + (100.0 if number == 7 else 0.0)
            spelt = [str(each) if rng.random() < 0.5 else str(float(each)) for each in (a, b)]
            body, ask = f"{rng.choice(PEOPLE)} had number0 jars , and number1 on row {number} .", "how many now ?"
            rows.writerow([f"{body} {ask}", " ".join(spelt), equation, answer, "[1, 2, 3]", body, ask])
            filled = f"{body} {ask}".replace("number0", str(a)).replace("number1", str(b))
            given = str(int(answer)) if answer == int(answer) else str(answer)
            items.append(Item(filled, given, sum(part in "+-*/" for part in equation.split()), "number"))
    return items


def write_prosqa(path: Path, count: int = 300) -> list[Item]:
    """Chains of 3 to 6 facts among others, in any order; the graph beside them."""
    rng, rows, items = random.Random(4), [], []
    kinds = [a + b + "us" for a in ("gl", "tr", "m", "d", "sn") for b in ("ip", "ond", "ar", "eb")]
    for _ in range(count):
        who, hops = rng.choice(PEOPLE), rng.randint(3, 6)
        chain, others = rng.sample(kinds, len(kinds)), [person for person in PEOPLE if person != who]
        steps = [f"{who} is a {chain[0]}.", *(f"Every {one} is a {other}." for one, other in pairwise(chain[:hops]))]
        wrong = chain[-1]
        more = [f"Every {chain[hops]} is a {wrong}.", *(f"{other} is a {chain[-2]}." for other in others)]
        facts = rng.sample([*steps, *more], len(steps) + len(more))
        question = f"{' '.join(facts)} Is {who} a {wrong} or {chain[hops - 1]}?"
        answer = f"{who} is a {chain[hops - 1]}."
        rows.append({"question": question, "answer": answer, "steps": steps, "idx_to_symbol": [who, *chain], "edges": [[0, 1]], "root": 0})
        items.append(Item(question, answer, hops, steps="\n".join(steps)))
    path.write_text(json.dumps(rows), encoding="utf-8")
    return items


def write_babi(path: Path, kind: str, divider: str = "\t", count: int = 300) -> list[Item]:
    """Stories with a question after every second sentence.

    Args:
        kind: person (1 fact), thing (2 facts, the later line first at times), count (a fact for each thing taken or put down), or path.
    """
    rng, lines, items = random.Random(kind), [], []
    while len(items) < count:
        story = _paths(rng) if kind == "path" else _moves(rng, kind)
        story_lines: list[str] = []
        for number, line in enumerate(story, start=1):
            if isinstance(line, str):
                story_lines.append(line)
                lines.append(f"{number} {line}")
            else:
                question, answer, facts = line
                lines.append(f"{number} {question}{divider}{answer}{divider}{' '.join(map(str, facts))}")
                items.append(Item(" ".join([*story_lines, question.strip()]), answer, len(facts)))
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return items


Asked = tuple[str, str, list[int]]  # a question, its answer, the lines of its facts


def _paths(rng: random.Random) -> list[str | Asked]:
    opposite = {"north": "s", "south": "n", "east": "w", "west": "e"}
    rooms, ways = rng.sample(PLACES, 3), [rng.choice(list(opposite)) for _ in range(2)]
    facts = [f"The {one} is {way} of the {other}." for (one, other), way in zip(pairwise(rooms), ways, strict=True)]
    order = rng.sample(range(2), 2)
    answer = ",".join(opposite[way] for way in ways)
    asked = f"How do you go from the {rooms[0]} to the {rooms[2]}?", answer, [order.index(0) + 1, order.index(1) + 1]
    return [*(facts[i] for i in order), asked]


def _moves(rng: random.Random, kind: str) -> list[str | Asked]:
    story: list[str | Asked] = []
    where: dict[str, tuple[str, int]] = {}
    held: dict[str, tuple[str, int]] = {}  # thing -> who, line
    handled: dict[str, list[int]] = {person: [] for person in PEOPLE}

    def move(person: str) -> None:
        place = rng.choice(PLACES)
        story.append(f"{person} went to the {place}.")
        where[person] = place, len(story)

    for person in PEOPLE:
        move(person)
    for _ in range(5):
        for _ in range(2):
            person, thing = rng.choice(PEOPLE), rng.choice(THINGS)
            if thing not in held:
                story.append(f"{person} took the {thing} there.")
                held[thing] = person, len(story)
                handled[person].append(len(story))
            elif held[thing][0] == person and kind == "count":
                story.append(f"{person} dropped the {thing}.")
                del held[thing]
                handled[person].append(len(story))
            else:
                move(person)
        if kind == "person":
            person = rng.choice(PEOPLE)
            story.append((f"Where is {person}? ", where[person][0], [where[person][1]]))
        elif kind == "thing" and held:
            thing = rng.choice(list(held))
            person, line = held[thing]
            story.append((f"Where is the {thing}?", where[person][0], [line, where[person][1]]))
        elif kind == "count" and any(handled.values()):
            person = rng.choice([person for person in PEOPLE if handled[person]])
            have = sum(who == person for who, _ in held.values())
            story.append((f"How many things is {person} carrying? ", ["none", "one", "two", "three", "four"][have], [*handled[person]]))
    return story


def write_scan(path: Path, count: int = 300, longest: int = 48) -> list[Item]:
    """Commands and their actions, from their grammar, with a maximum number of actions."""
    rng, lines, items = random.Random(longest), [], []
    while len(items) < count:
        parts = [_phrase(rng) for _ in range(rng.randint(1, 2))]
        joint = rng.choice(["and", "after"])
        command = f" {joint} ".join(words for words, _ in parts)
        actions = " ".join(did for _, did in (parts if joint == "and" else parts[::-1]))
        if len(actions.split()) <= longest:
            lines.append(f"IN: {command} OUT: {actions}\n")
            items.append(Item(command, actions, len(actions.split())))
    path.write_text("".join(lines), encoding="utf-8")
    return items


def _phrase(rng: random.Random) -> tuple[str, str]:
    verb, side, times = rng.choice(["walk", "run", "jump", "look"]), rng.choice(["left", "right"]), rng.choice(["", " twice", " thrice"])
    act, turn = f"I_{verb.upper()}", f"I_TURN_{side.upper()}"
    words, did = rng.choice(
        [(verb, [act]), (f"{verb} {side}", [turn, act]), (f"turn {side}", [turn]), (f"{verb} opposite {side}", [turn, turn, act]),
         (f"{verb} around {side}", [turn, act] * 4)]
    )  # fmt: skip
    return words + times, " ".join(did * {"": 1, " twice": 2, " thrice": 3}[times])
