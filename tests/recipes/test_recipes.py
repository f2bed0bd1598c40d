"""Every recipe: read as the command line reads it, valid, and at the cost that it states."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from recursify.cli import main as cli
from recursify.cli.recipe import NOTES
from recursify.conversion.layer_selection import make_plan
from recursify.conversion.settings import ConvertSettings
from recursify.errors import UserError
from recursify.evaluation.settings import EvaluateSettings
from recursify.inference.settings import GenerateSettings
from recursify.network.configuration_recursive_llm import from_donor
from recursify.serving import ServeSettings
from recursify.training import cost
from recursify.training.settings import EmbeddingSettings, HybridSettings, TrainSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.name)
CLASSES: dict[str, Any] = {
    "convert": ConvertSettings, "train": TrainSettings, "train_trm": EmbeddingSettings, "train_trm_hybrid": HybridSettings,
    "evaluate": EvaluateSettings, "generate": GenerateSettings,
}  # fmt: skip

# As their config.json on the hub has them.
DONORS: dict[str, Any] = {
    "Qwen/Qwen2-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-1B": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=131072, tie_word_embeddings=False,
    ),
}  # fmt: skip


def sections(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read(path: Path, job: str) -> Any:
    return cli.parse(job, CLASSES[job], ["--config", str(path)])


def model_of(convert: ConvertSettings) -> tuple[Any, Any]:
    """The configuration that a conversion would make, and the donor's."""
    donor = DONORS.get(convert.qwen_model) or AutoConfig.from_pretrained(ROOT / convert.qwen_model)
    shape = {name: getattr(convert, name) for name in ("L_layers", "prelude_layers", "coda_layers", "keep_donor", "layer_selection")}
    plan = make_plan(convert.qwen_model, donor.num_hidden_layers, **shape)
    counts = {"prelude_layers": len(plan.prelude), "L_layers": len(plan.loop), "coda_layers": len(plan.coda)}
    return from_donor(donor, plan.indices, H_cycles=convert.H_cycles, L_cycles=convert.L_cycles, **counts), donor


def cost_of(path: Path) -> cost.TrainingCost:
    train: TrainSettings = read(path, "train")
    config, donor = model_of(read(path, "convert"))
    devices = sections(path)["cost"]["devices"]
    step = train.batch_size * train.grad_accum_steps * train.seq_len * devices
    steps = train.max_steps or math.ceil((train.max_tokens or 0) / step)
    return cost.estimate(config, train, steps, devices, donor if train.distill_weight else None)


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"quick", "qwen2-0.5b-compact", "qwen2-0.5b-keep-donor", "qwen3-0.6b", "llama-3.2-1b", "qwen2.5-7b-8gpu"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_is_read_and_valid(path: Path) -> None:
    for job in sections(path):
        if job not in NOTES:
            settings = read(path, job)
            if job != "convert":
                getattr(settings, "validate", lambda: None)()
    train, (config, _) = read(path, "train"), model_of(read(path, "convert"))
    train.validate_model(config)
    assert train.checkpoint == read(path, "convert").output_path
    assert max(train.cycle_choices, default=config.H_cycles) == config.H_cycles


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_cost_it_states(path: Path) -> None:
    stated, found = sections(path)["cost"], cost_of(path)
    assert found.tokens == pytest.approx(stated["tokens"], rel=0.001)
    assert found.flops == pytest.approx(stated["flops"], rel=0.01)
    assert found.memory_total / cost.GB == pytest.approx(stated["memory_gb"], abs=0.06)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_the_stated_memory(path: Path) -> None:
    """A tenth and 2 GB are left for what is not counted."""
    about = sections(path)["about"]
    if "GB" in about:
        room = float(about.split(" GB")[0].split()[-1])
        assert cost_of(path).memory_total / cost.GB + 2 < 0.9 * room * 2**30 / cost.GB


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_begins_with_its_commands(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("about:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    for job in sections(path):
        assert job in NOTES or (f"{job} " in head and f"--config recipes/{path.name}" in head)
    assert ("torchrun" in head) == (sections(path)["cost"]["devices"] > 1)


@pytest.mark.slow
def test_the_quick_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its four jobs one after another, shorter by flags; they hand on their files by the names in the recipe."""
    from pydoc_data.topics import topics

    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps({"text": topics[name][:4000]}) + "\n" for name in sorted(topics)[:24])
    Path("quick.jsonl").write_text(text, encoding="utf-8")
    recipe = ["--config", str(ROOT / "recipes" / "quick.yaml")]
    cli.main(["convert", *recipe, "--qwen_model", str(ROOT / "recursify" / "demo" / "donors" / "prose")])
    cli.main(["train", *recipe, "--max_steps", "2", "--seq_len", "32"])
    cli.main(["evaluate", *recipe, "--seq_len", "32", "--json"])
    report = capsys.readouterr().out.splitlines()[-1]
    assert [row["H_cycles"] for row in json.loads(report)["rows"]] == [0, 1, 2, 3, 4, 5]
    cli.main(["generate", *recipe, "--prompt", "The statement", "--max_new_tokens", "3"])
    assert "The statement" in capsys.readouterr().out


def test_several_values_are_a_list_of_their_type(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("serve:\n  checkpoint: m.pt\n  depths: [1, 5, 1]\n")
    settings = cli.parse("serve", ServeSettings, ["--config", str(file)])
    assert settings.depths == (1, 5, 1) and settings.wanted_depths() == (1, 5)
    file.write_text("serve:\n  checkpoint: m.pt\n  depths: [1, 2.5]\n")
    with pytest.raises(UserError, match="depths: expected a whole number, got"):
        cli.parse("serve", ServeSettings, ["--config", str(file)])
