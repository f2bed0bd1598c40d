"""Tiny random donors, their tokenizer and a tiny WikiText, created in a moment.

The donors are adversarial on purpose. Weights are large, so logits differ visibly; norms are not 1 and biases not 0, so a
missing one is noticed; key/value heads are grouped; the vocabulary is padded beyond the tokenizer, as Qwen's is.
Qwen2 has 24 layers, so that the guides' indices 0, 8, 16, 23 appear; the other families have 8.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    SmolLM3Config,
)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SIZE = 320
VOCAB_SIZE = 384
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "smollm3", "olmo2", "phi3")

WORDS = {
    "a": ["old", "small", "quiet", "green", "northern", "famous", "heavy", "early"],
    "n": ["lobster", "river", "castle", "engine", "village", "painter", "ship", "forest", "song", "bridge"],
    "v": ["follows", "carries", "describes", "surrounds", "remembers", "crosses", "builds"],
    "p": ["near", "before", "under", "without", "beyond"],
}


def sentences(seed: int, count: int) -> list[str]:
    """Synthetic sentences, deterministic by seed."""
    rng = random.Random(seed)
    word = {kind: lambda kind=kind: rng.choice(WORDS[kind]) for kind in WORDS}
    pattern = "The {a} {n} {v} the {n2} {p} the {a2} {n3} ."
    return [
        pattern.format(a=word["a"](), n=word["n"](), v=word["v"](), n2=word["n"](), p=word["p"](), a2=word["a"](), n3=word["n"]())
        for _ in range(count)
    ]


@cache
def _bpe() -> str:
    bpe = Tokenizer(models.BPE())
    # beside a Qwen2 config.json, AutoTokenizer puts Qwen's own splitting in place of the file's: take it from the start
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(sentences(0, 200), trainer)
    return bpe.to_str()


# Several scripts, accents composed and combining, emoji joined from several; often enough that some of their bytes become one token.
SCRIPTS = (
    "Größe und Länge der Brücken: schön, möglich, über Nacht.",
    "好的,龙虾很好。 好的,月亮很亮。",
    "안녕하세요, 좋은 아침입니다.",
    "これは小さな船です。",
    "Привет, река и мост.",
    "नमस्ते नमस्ते",
    "e\u0301te\u0301 nai\u0308ve",
    " 🦐 🦀 🐙 🐟",
    "🇫🇷🇯🇵 👨\u200d👩\u200d👧 🏴\u200d☠\ufe0f",
)
# Single tokens of Qwen2's vocabulary, with the space before them, that the synthetic tasks use.
QWEN_WORDS = ("(", ")", "+", ",", ";", ">", "next", "and", "or", "not", "True", "False", *string.ascii_letters)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def _qwen_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    bpe = Tokenizer(models.BPE())
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    words = [f"a {word}" for word in QWEN_WORDS]
    bpe.train_from_iterator([*sentences(1, 100), *SCRIPTS * 3, *words * 5], trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def make_qwen_tokenizer(folder: Path | None = None, size: int | None = None) -> Qwen2Tokenizer:
    """A tokenizer of Qwen2's kind, trained here: its class, its splitting, NFC, bytes, the special tokens and template of ChatML; saved
    where a folder is given.

    Args:
        size: Entries before the special tokens, of which those beyond what was learnt are in no text; 151,643 in Qwen2. None adds none.
    """
    vocabulary, merges = _qwen_bpe()
    unused = {f"<unused {number}>": number for number in range(len(vocabulary), size or 0)}
    tokenizer = Qwen2Tokenizer(
        vocab={**vocabulary, **unused}, merges=merges, extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=512
    )
    tokenizer.chat_template = CHATML
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 320 entries whose only special token, id 0, ends and pads; saved where a folder is given."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=512
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(family: str = "qwen2", **overrides: Any) -> PreTrainedConfig:
    """The family's own config class with its special features enabled; ``overrides`` take precedence."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24 if family == "qwen2" else 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    make = _PECULIARITIES[family]
    layers = overrides.get("num_hidden_layers", common["num_hidden_layers"])
    config_class, peculiar = make(layers)
    return config_class(**(common | peculiar | overrides))


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def _qwen2(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": _plain_rope(1e6)}


def _qwen3(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    # 4 heads of 16 in a hidden size of 32
    return Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": _plain_rope(1e6)}


def _llama(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    return LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": rope}


def _mistral(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return MistralConfig, {"tie_word_embeddings": False, "sliding_window": 6, "rope_parameters": _plain_rope(1e6)}


def _smollm3(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    # every fourth layer has no rotary embedding, and a window instead
    return SmolLM3Config, {"tie_word_embeddings": True, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)],
                           "use_sliding_window": True, "sliding_window": 6, "rope_parameters": _plain_rope(5e6)}  # fmt: skip


def _olmo2(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return Olmo2Config, {"tie_word_embeddings": False, "rope_parameters": _plain_rope(5e5)}


def _phi3(layers: int) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    return Phi3Config, {"tie_word_embeddings": False, "original_max_position_embeddings": 512, "rope_parameters": _plain_rope(2e4)}


_PECULIARITIES: dict[str, Callable[[int], tuple[type[PreTrainedConfig], dict[str, Any]]]] = {
    "qwen2": _qwen2, "qwen3": _qwen3, "llama": _llama, "mistral": _mistral, "smollm3": _smollm3, "olmo2": _olmo2, "phi3": _phi3,
}  # fmt: skip


def tiny_model(family: str = "qwen2", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of the family in float32, in evaluation mode, deterministic by seed; the global seed is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norm weights, at 1, and biases, at 0
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_donor(family: str = "qwen2", folder: Path | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """``tiny_model``, saved with its tokenizer to ``folder`` in the layout of a hub repository."""
    model = tiny_model(family, seed, **overrides)
    if folder is not None:
        model.save_pretrained(folder)
        make_tiny_tokenizer(folder)
    return model


def wikitext_rows(seed: int, articles: int) -> list[str]:
    """Rows as the hub's raw WikiText has them: one line each with its line end, blank lines as empty rows, spaced headings."""
    rows = []
    for article in range(articles):
        lines = sentences(1000 * seed + article, 9)
        rows += ["", f" = Article {seed} {article} = \n", "", f" {' '.join(lines[:4])} \n", "", " = = History = = \n", ""]
        rows += [f" {' '.join(lines[4:7])} \n", f" {' '.join(lines[7:])} \n", ""]
    return rows


def tiny_wikitext(folder: Path, articles: tuple[int, int, int] = (24, 4, 4)) -> Path:
    """A folder laid out as the hub's ``Salesforce/wikitext``: two configurations of parquet shards and a card that lists them.

    ``articles`` counts those of train, validation and test in ``wikitext-2-raw-v1``. The other one, ``wikitext-103-raw-v1``, has
    other rows, so that a mix-up is noticed.
    """
    card = ["---", "configs:"]
    for number, config in enumerate(("wikitext-103-raw-v1", "wikitext-2-raw-v1")):
        (folder / config).mkdir(parents=True, exist_ok=True)
        card += [f"- config_name: {config}", "  data_files:"]
        for seed, (split, count) in enumerate(zip(("train", "validation", "test"), articles, strict=True)):
            table = pa.table({"text": pa.array(wikitext_rows(10 * (1 - number) + seed, count), pa.string())})
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# WikiText, tiny", ""]), encoding="utf-8")
    return folder
