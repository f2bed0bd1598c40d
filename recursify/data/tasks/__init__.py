"""Questions with one right answer: made to any difficulty, or read from published sets, and how an answer to them is judged.

    items = generate("permutations", difficulty=16, count=200, seed=0, split="test", group="S5")
    items = read("babi", "qa2_two-supporting-facts_test.txt")
    prompt(items[0])                      # what a model reads: "Question: ...\\nAnswer:"
    as_text(items[0])                     # the same with the answer, to train on
    is_right(items[0], " kitchen\\n")     # what a model wrote

item.py says what an item is and how it is written as text; generated.py and in_words.py make them, of what random_items.py draws;
formats.py reads GSM8K, SVAMP, ProsQA, bAbI and SCAN from files; scoring.py judges. No model, no tokenizer and no torch is needed.
"""

from .formats import FORMATS, read
from .generated import GENERATED, generate
from .item import Item, as_text, label_ends, prompt
from .scoring import is_right

__all__ = ["FORMATS", "GENERATED", "Item", "as_text", "generate", "is_right", "label_ends", "prompt", "read"]
