"""Flags of other tools, and of other commands of ours, that a command does not have: what to do instead."""

from __future__ import annotations

# Command -> flag that it does not have -> what to do instead. Those of train are of all trainings.
INSTEAD: dict[str, dict[str, str]] = {
    "convert": {"checkpoint": "--model names the donor"},
    "train": {
        "H_cycles": "the depth belongs to the checkpoint; --cycle_choices 1 3 5 trains at others",
        "cycles": "the depth belongs to the checkpoint; --cycle_choices 1 3 5 trains at others",
        "warmup_ratio": "--warmup_steps N",
        "eval_strategy": "--eval_every N validates every N steps, besides the end of each epoch",
        "save_strategy": "--save_every N; 0 saves none",
        "logging_strategy": "--log_every N",
        "assistant_only_loss": "--train_on assistant, which is the default, or --train_on all",
        "completion_only_loss": "--train_on assistant, which is the default, or --train_on all",
        "dataset_text_field": "--text_column",
        "packing": "documents are always packed; --separate_documents masks them from each other",
        "fp16": "--bf16",
        "train_file": "--dataset_name takes files and folders",
        "freeze_embeddings": "it is a flag of convert",
        "keep_donor": "it is a flag of convert",
        "gain": "--start_gain",
        "tune_lm_head": "it is a flag of --approach hybrid",
        "fresh_loop": "it is a flag of --approach hybrid",
        "donor_loop": "it is a flag of --approach embedding",
    },
    "generate": {
        "cycles": "--H_cycles", "depths": "--H_cycles",
        "do_sample": "--temperature 0 is greedy decoding, above 0 it samples", "max_length": "--max_new_tokens counts the new tokens",
    },
    "chat": {"cycles": "--H_cycles", "depths": "--H_cycles"},
    "serve": {"H_cycles": "--depths; requests choose from them", "cycles": "--depths"},
    "evaluate": {"H_cycles": "--cycles 1 3 5", "depths": "--cycles 1 3 5"},
    "compare": {
        "H_cycles": "--cycles 1 3 5", "depths": "--cycles 1 3 5",
        "checkpoint": "the models are named without a flag: recursify compare A B",
        "model_name_or_path": "the models are named without a flag: recursify compare A B",
        "model": "the models are named without a flag: recursify compare A B",
    },
}  # fmt: skip
