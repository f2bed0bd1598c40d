"""State tracking: running products in the permutation group S3, the state predicted at every position.

The donor is pretrained on sequences of up to 8 permutations and fails beyond. All rows are fine-tuned on sequences of 16, and evaluated at
every position of held-out sequences of 24. A fixed number of layers cannot do this for any length, while more applications of layers can do
it for longer ones: here recursion should pay, if it does anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recipes.evidence.anchors import ANCHORS
from recipes.evidence.exits import every_exit
from recipes.evidence.study import Figures, Row, Size, Study, on_layers, rows_of_questions, small_model
from recursify.data.question_rows import label_tokens
from recursify.data.tasks import Item, generate
from recursify.evaluation.accuracy import as_batch, evaluate_questions
from recursify.inference.options import DecodingOptions
from recursify.training import TrainSettings, fit

SHORT, LONG, ASKED = 8, 16, 24  # letters
EXTRA = 4  # tokens besides the letters: "Question:", "Answer:", the answer, the end
SHOWN = (4, 8, 10, 12, 14, 16, 20, 24)

SIZES = {
    "cpu": Size({"hidden_size": 128, "intermediate_size": 256, "layers": 4}, 1500, steps=500, items=500, batch_size=64, seeds=3),
    "gpu": Size({"hidden_size": 512, "intermediate_size": 1024, "layers": 8}, 4000, steps=3000, items=2000, batch_size=256, seeds=3),
    "test": Size({"hidden_size": 16, "intermediate_size": 32, "layers": 4}, 2, steps=2, items=4, batch_size=4, seeds=1),
}

KEEP = {"keep_donor": True, "L_layers": 2, "H_cycles": 3, "L_cycles": 1}
COMPACT = {"L_layers": 2, "H_cycles": 3, "L_cycles": 1}
OURS = "ours: keep_donor, H 3, L 1"
ADAPTER = "adapter: donor frozen, LoRA 16 in the loop"


def rows() -> list[Row]:
    main = [
        Row("donor as it is", budget="none"),
        Row("donor, fine-tuned on the same tokens", seeds=3),
        Row("donor, fine-tuned for the same FLOPs", budget="flops", seeds=3),
        Row("naive loop", shape=KEEP, rival="naive"),
        Row("bare sum (TRM)", shape=KEEP | {"injection": "sum_norm"}),
        Row("concat adapter (retrofitting-recurrence)", shape=KEEP, rival="concat"),
        Row("selective gate (LoopUS)", shape=KEEP, rival="gate"),
        Row(OURS, shape=KEEP, seeds=3),
    ]
    shapes = [
        *(Row(f"keep_donor, H {H}, L {L}", "shape", KEEP | {"H_cycles": H, "L_cycles": L}) for H, L in ((2, 1), (4, 1), (3, 0), (3, 3))),
        Row(
            "compact, the layers without recursion", "shape", COMPACT | {"H_cycles": 1, "L_cycles": 0},
            changes={"start_gain": 0.0, "enable_deep_supervision": False},
        ),
        Row("compact, H 3, L 1", "shape", COMPACT),
        Row("compact, H 3, L 1, distilled", "shape", COMPACT, changes={"distill_weight": 1.0}),
    ]  # fmt: skip
    parts: dict[str, dict[str, Any]] = {
        "no deep supervision": {"enable_deep_supervision": False},
        "one depth": {"cycle_choices": (), "cycle_weights": ()},
        "depth curriculum": {"depth_curriculum": 0.5},
        "start gain 0": {"start_gain": 0.0},
        "start gain 0.2": {"start_gain": 0.2},
        "distilled from the donor": {"distill_weight": 0.5},
        "backprop cycle": {"backprop": "cycle"},
        "backprop last": {"backprop": "last", "enable_deep_supervision": False},
        "Muon": {"optimizer": "muon", "lr": 1e-2, "gain_lr": 1e-2},
    }
    frozen = [
        Row(ADAPTER, "adapter", KEEP, lora_rank=16, changes={"lr": 3e-3}, seeds=3),
        Row("adapter: one depth", "adapter", KEEP, lora_rank=16, changes={"lr": 3e-3, "cycle_choices": (), "cycle_weights": ()}, seeds=3),
        Row("donor, LoRA 16 on all layers, same tokens", "adapter", lora_rank=16, changes={"lr": 3e-3}),
        Row("donor, LoRA 16 on the looped layers, same tokens", "adapter", lora_rank=16, lora=on_layers(1, 2), changes={"lr": 3e-3}),
        Row(
            "donor, LoRA 16 on all layers, for the same FLOPs", "adapter", lora_rank=16, changes={"lr": 3e-3}, budget="flops", seeds=3,
            against=ADAPTER,
        ),
        *(
            Row(f"adapter: {name}", "adapter", KEEP, lora_rank=rank, changes={"lr": 3e-3} | changes)
            for name, rank, changes in (
                ("LoRA 4", 4, {}), ("LoRA 64", 64, {}),
                ("start gain 0", 16, {"start_gain": 0.0}), ("start gain 0.2", 16, {"start_gain": 0.2}),
                ("learning rate 1e-3", 16, {"lr": 1e-3}), ("learning rate 1e-2", 16, {"lr": 1e-2}),
            )
        ),
        *(
            Row(f"adapter: {name}", "adapter", KEEP | shape, lora_rank=16, lora=lora, changes={"lr": 3e-3})
            for name, shape, lora in (
                ("attention alone", {}, {"lora_targets": "attention"}), ("MLP alone", {}, {"lora_targets": "mlp"}),
                ("LoRA for every cycle", {}, {"lora_per": "cycle"}),
                ("loop of the first two layers", {"prelude_layers": 0, "coda_layers": 2}, {}),
                ("loop of the last two layers", {"prelude_layers": 2, "coda_layers": 0}, {}),
                ("L 3", {"L_cycles": 3}, {}),
            )
        ),
    ]  # fmt: skip
    # ours again: the same machine and precision as the rows beside it
    anchors = [Row("anchor: ours", "anchor", KEEP), *(Row(f"anchor: {name}", "anchor", KEEP, rival=name) for name in ANCHORS)]
    halting = {"halting_weight": 0.1, "cycle_choices": (2, 4, 6), "cycle_weights": ()}
    exits = [Row("keep_donor, H 4, L 1, with a halting head", "exits", KEEP | {"H_cycles": 4}, changes=halting, exits=True)]
    return [*main, *shapes, *frozen, *(Row(name, "parts", KEEP, changes=changes) for name, changes in parts.items()), *anchors, *exits]


def study(size: Size) -> Study:
    settings: dict[str, Any] = {
        "seq_len": LONG + EXTRA, "lr": 1e-3, "warmup_steps": size.steps // 10, "weight_decay": 0.1, "lr_schedule": "wsd",
        "dataset_name": f"permutations:difficulty={LONG}",
    }  # fmt: skip

    def donor(folder: Path) -> dict[str, Any]:
        shape = size.donor
        tokenizer = make_tokenizer()
        model = small_model(shape, len(tokenizer))
        words = generate("permutations", SHORT, size.donor_steps * size.batch_size // 2, 0)
        blocks = rows_of_questions(words, tokenizer, SHORT + EXTRA)
        own = settings | {
            "seq_len": SHORT + EXTRA, "lr": 1.5e-3, "warmup_steps": size.donor_steps // 15, "max_steps": size.donor_steps,
            "batch_size": size.batch_size, "generate_every": 0, "save_every": 0,
        }  # fmt: skip
        fit(model, tokenizer, blocks, blocks[: size.batch_size], TrainSettings(checkpoint="", **own), console=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {"trained_on": f"{len(words):,} words of {SHORT} letters", "steps": size.donor_steps, **shape}

    def train(tokenizer: Any, count: int) -> tuple[Any, Any]:
        blocks = rows_of_questions(generate("permutations", LONG, count // 4, 1), tokenizer, LONG + EXTRA)
        return blocks, blocks[:16]

    def measure(model: Any, tokenizer: Any, depths: Any) -> Figures:
        return shares(model, tokenizer, generate("permutations", ASKED, size.items, 2, split="test"), depths)

    def exits(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
        """Of all letters of words as long as those in training."""
        words, others = (labelled(generate("permutations", LONG, size.items, seed, split="test"), tokenizer) for seed in (2, 3))
        return every_exit(model, *words, others[0], model.config.H_cycles)

    return Study("state_tracking", OURS, settings, rows(), donor, train, measure, exits=exits)


def labelled(items: list[Item], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the targets of their labels, and where these are read."""
    return as_batch([found for item in items if (found := label_tokens(item, tokenizer)) is not None])


def shares(model: Any, tokenizer: Any, items: list[Item], depths: Any, shown: Sequence[int] = SHOWN) -> Figures:
    """Accuracy at every position, at every depth."""
    runs = [DecodingOptions(H_cycles=H) for H in depths] or [DecodingOptions()]
    report, _ = evaluate_questions(model, tokenizer, "permutations", items, runs, "labels", batch_size=100)
    found: Figures = {}
    for row in report.rows:
        if row.difficulty in shown:
            found.setdefault("donor" if row.H_cycles is None else str(row.H_cycles), {})[str(row.difficulty)] = round(row.accuracy, 4)
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    words = ["<eos>", "Question:", "Answer:", *"abcde", *"ABCDEF"]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<eos>")
