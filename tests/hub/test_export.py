"""Export: the folder for the hub, the plain donor, the model card with its pictures, and the upload."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from recursify import ConversionPlan, RecursiveLLM, convert
from recursify.checkpoints import checkpoint, model_card
from recursify.conversion import convert as convert_command
from recursify.errors import UserError
from recursify.hub import export, upload
from recursify.hub.export import ExportSettings, check_donor, export_donor, left_out
from recursify.network.configuration_recursive_llm import RecursiveLLMConfig, from_donor
from recursify.network.modeling_recursive_llm import FAMILIES
from recursify.training import TrainSettings, train
from tests.support import tiny
from tests.support.hub_stand_in import HubStandIn
from tests.support.tokenizers import with_template

DONOR = "Qwen/Qwen2-0.5B"
PLAN = ConversionPlan(DONOR, 8, (0, 1), (3, 4, 5), (7,), "middle")
TRAINING = {"step": 30, "epoch": 1.5, "tokens": 12345, "dataset_name": "wikitext", "lr": 3e-4, "eval_loss": 2.5, "novel": "a|b <i>"}
NOTES = {"donor": DONOR, "seq_len": 64, "training": TRAINING}
TEXT = "The old lobster follows the small river near the quiet castle . " * 40


def make_model(family: str = "qwen2", **fields: Any) -> RecursiveLLM:
    """Random, with prelude, loop and coda from layers that are not neighbours, and gains that are not 0."""
    donor = tiny.tiny_model(family, num_hidden_layers=8)
    shape = {"prelude_layers": 2, "L_layers": 3, "coda_layers": 1, "H_cycles": 2, "L_cycles": 1, "gain_init": 0.2, **fields}
    config = from_donor(donor.config, PLAN.indices, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = FAMILIES[config.model_type](config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=[0, 5], pad_token_id=0, do_sample=True, top_k=7)
    return model.eval()


def logits(model: Any, **depth: int) -> torch.Tensor:
    ids = torch.randint(384, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids, use_cache=False, **depth).logits


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def front(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.fixture(scope="module")
def model() -> RecursiveLLM:
    return make_model()


@pytest.fixture
def place(model: RecursiveLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with `model.pt` and `model`."""
    tokenizer = tiny.make_tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for form in ("model.pt", "model"):
        checkpoint.save(tmp_path / form, model, tokenizer, PLAN, NOTES)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: Any) -> ExportSettings:
    return ExportSettings(**{"out": "out", "checkpoint": "model.pt", **changes})


def run(**changes: Any) -> tuple[export.ExportReport, str]:
    """The report and the printed lines."""
    printed: list[str] = []
    report = export.run(settings(**changes), say=printed.append)
    return report, "\n".join(printed)


def evaluation(name: str, *rows: tuple[int | None, float, int], **changes: Any) -> str:
    """A file as `recursify evaluate --json` prints it."""
    found = [{"H_cycles": H, "loss": loss, "standard_error": 0.01, "layer_applications": cost, "perplexity": 1.0} for H, loss, cost in rows]
    content = {
        "checkpoint": "x",
        "dataset": "/home/me/book.txt",
        "windows": 40,
        "seq_len": 16,
        "stride": 16,
        "H_cycles": 2,
        "rows": found,
    }
    Path(name).write_text(json.dumps(content | changes))
    return name


# --- The folder for the hub --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["model.pt", "model"])
def test_either_form_is_exported_as_a_complete_folder(form: str, place: Path, model: RecursiveLLM) -> None:
    report, printed = run(checkpoint=form)
    files = listing(place / "out")
    assert {name: len(content) for name, content in files.items()} == report.files
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(
        files
    )
    assert {"chat_template.jinja", "modeling_recursive_llm.py", "configuration_recursive_llm.py", "plan.svg"} <= set(files)
    found = checkpoint.load(place / "out")
    assert torch.equal(logits(found.model), logits(model)) and found.plan == PLAN and found.notes == NOTES
    assert found.model.generation_config.top_k == 7
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"].startswith("modeling_recursive_llm.")
    assert f"✓ Wrote out: {len(files)} files" in printed and "model.safetensors" in printed


def test_sharded_export_in_another_dtype(place: Path, model: RecursiveLLM) -> None:
    report, printed = run(dtype="bfloat16", max_shard_size="20KB")
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors.index.json" in report.files and "bfloat16" in printed
    found = checkpoint.load(place / "out").model
    assert found.dtype == torch.bfloat16 and found.config.dtype == torch.bfloat16
    assert all(torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16)) for name, tensor in found.state_dict().items())
    assert found.generation_config.top_k == 7


def test_no_local_paths_are_exported(place: Path, model: RecursiveLLM) -> None:
    private = str(place / "secret" / "donor-of-mine")
    notes = {"donor": private, "training": {"step": 3, "dataset_name": str(place / "text.txt"), "mix": [f"{place}/text.txt"]}}
    checkpoint.save(place / "mine.pt", model, tiny.make_tiny_tokenizer(), replace(PLAN, donor=private), notes)
    run(checkpoint="mine.pt", evaluation=(evaluation("e.json", (1, 2.5, 9), (2, 2.4, 15)),))
    for name, content in listing(place / "out").items():
        assert str(place).encode() not in content and b"/home/me" not in content, name
    card = (place / "out" / "README.md").read_text()
    assert card.count("donor-of-mine") >= 2 and "text.txt" in card and "book.txt" in card and "base_model" not in front(place / "out")


def test_repeated_export_replaces_the_folder(place: Path, model: RecursiveLLM) -> None:
    run(max_shard_size="20KB", evaluation=(evaluation("e.json", (1, 2.5, 9), (2, 2.4, 15)),))
    (place / "out" / "diary.txt").write_text("mine")
    report, _ = run()
    assert set(listing(place / "out")) == {*report.files, "diary.txt"} and "loss_by_cycles.svg" not in report.files
    assert torch.equal(logits(checkpoint.load(place / "out").model), logits(model))


# --- The card ----------------------------------------------------------------------------------------------------------------------------


def test_the_card_of_a_trained_model(place: Path) -> None:
    ours = evaluation("ours.json", (2, 2.25, 15), (1, 2.5, 9), (0, 3.0, 6))
    donors = [
        evaluation(f"{i}.json", (None, loss, 8), checkpoint=name) for i, (name, loss) in enumerate([("/x/first", 2.0), ("tuned|it", 1.9)])
    ]
    run(license="apache-2.0", evaluation=(ours, *donors))
    card = (place / "out" / "README.md").read_text()
    assert front(place / "out") == {
        "license": "apache-2.0", "base_model": DONOR, "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["recursify", "recursive-reasoning"],
    }  # fmt: skip
    assert "| prelude | 0, 1 |" in card and "| L_level | 3, 4, 5 |" in card and "| coda | 7 |" in card and "| dropped | 2, 6 |" in card
    assert "| optimizer steps | 30 |" in card and "| tokens read | 12,345 |" in card and "| learning rate | 0.0003 |" in card
    assert "| validation loss (nats per token) | 2.5 |" in card and "| novel | a\\|b &lt;i> |" in card
    assert "book.txt, 40 windows of 16 tokens" in card
    rows = [line for line in card.splitlines() if "0.0100" in line]
    assert rows == [
        "| 0 | 3.0000 | 0.0100 | 20.09 | 6 |",
        "| 1 | 2.5000 | 0.0100 | 12.18 | 9 |",
        "| 2 (the model's own) | 2.2500 | 0.0100 | 9.49 | 15 |",
        "| donor (first) | 2.0000 | 0.0100 | 7.39 | 8 |",
        "| donor (tuned\\|it) | 1.9000 | 0.0100 | 6.69 | 8 |",
    ]
    assert (
        "](plan.svg)" in card and "](loss_by_cycles.svg)" in card and "trained" not in card.lower().split("## training")[1].split("##")[0]
    )
    for name in ("plan.svg", "loss_by_cycles.svg"):
        root = ElementTree.parse(place / "out" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert any(child.tag.endswith("style") and "--ink" in (child.text or "") for child in root)
    drawn = (place / "out" / "loss_by_cycles.svg").read_text()
    assert "2.2500 at 2" in drawn and "donor (first): 2.0000" in drawn and "/x/" not in drawn


def test_card_states_missing_information(place: Path, model: RecursiveLLM) -> None:
    checkpoint.save(place / "bare.pt", model, tiny.make_tiny_tokenizer())
    run(checkpoint="bare.pt")
    card = (place / "out" / "README.md").read_text()
    assert "No training is recorded" in card and "## Evaluation\n\nNot measured" in card and "Not specified at export" in card
    assert "## Plan" not in card and "](" not in card.split("## License")[0] and "base_model" not in front(place / "out")
    assert not list((place / "out").glob("*.svg"))
    untrained = make_model(gain_init=0.0)
    with torch.no_grad():
        for name, parameter in untrained.named_parameters():
            if "inject" in name:
                parameter.zero_()
    checkpoint.save(place / "fresh.pt", untrained, tiny.make_tiny_tokenizer(), PLAN, {"donor": DONOR})
    run(checkpoint="fresh.pt", base_model="some/donor")
    card = (place / "out" / "README.md").read_text()
    assert "**Not trained.**" in card and front(place / "out")["base_model"] == "some/donor"


def test_evaluation_during_export(place: Path) -> None:
    _, printed = run(dataset_name="text.txt", seq_len=16, max_windows=3, cycles=(0, 2), dtype="bfloat16")
    assert "✓ Measured on 3 windows of 16 tokens of text.txt" in printed
    card = (place / "out" / "README.md").read_text()
    assert "text.txt, 3 windows of 16 tokens." in card and "| 2 (the model's own) |" in card and "](loss_by_cycles.svg)" in card
    found, tokenizer = checkpoint.load(place / "out").model, AutoTokenizer.from_pretrained(place / "out", trust_remote_code=True)
    from recursify.evaluation.evaluate import evaluate
    from recursify.evaluation.settings import EvaluateSettings

    asked = EvaluateSettings(checkpoint="", dataset_name="text.txt", seq_len=16, max_windows=3, cycles=(0, 2))
    text = evaluate(found, tokenizer, asked).text
    assert text is not None
    for row in text.rows:
        assert f" | {row.loss:.4f} | " in card


def test_earlier_evaluation_in_another_dtype(place: Path) -> None:
    run(dtype="bfloat16", evaluation=(evaluation("e.json", (1, 2.5, 9)),))
    card = (place / "out" / "README.md").read_text()
    assert "before the weights were converted to bfloat16" in card and "svg)" not in card.split("## Evaluation")[1]


def test_a_model_of_the_embedding_approach(place: Path, model: RecursiveLLM) -> None:
    checkpoint.save(place / "e.pt", model, tiny.make_tiny_tokenizer(), PLAN, {**NOTES, "approach": "embedding"})
    run(checkpoint="e.pt")
    card = (place / "out" / "README.md").read_text()
    assert front(place / "out")["pipeline_tag"] == "feature-extraction" and "generate(" not in card and "(1 - cosine)" in card
    for flags in ({"donor": True}, {"dataset_name": "text.txt"}):
        with pytest.raises(UserError, match="was trained in embedding space"):
            run(checkpoint="e.pt", out="other", **flags)
    assert not (place / "other").exists()


# --- The plain donor ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_plain_donor_of_every_family(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    checkpoint.save(tmp_path / "m.pt", model, tiny.make_tiny_tokenizer(), PLAN, NOTES)
    report, printed = run(out=str(tmp_path / "plain"), checkpoint=str(tmp_path / "m.pt"), donor=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__module__.startswith("transformers.models.") and plain.config.model_type == family
    assert torch.equal(logits(plain), logits(model, H_cycles=0)) and not torch.equal(logits(plain), logits(model))
    assert plain.generation_config.top_k == 7 and plain.generation_config.eos_token_id == [0, 5]
    tied = plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert tied == bool(model.config.tie_word_embeddings)
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    ours = set(RecursiveLLMConfig.__dataclass_fields__) - {"layer_types"}
    assert not ours & set(fields) and "auto_map" not in fields and fields["num_hidden_layers"] == 6
    assert fields["architectures"] == [type(plain).__name__]
    with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert not any("recursion" in name for name in stored)
    assert stored == {name for name in tiny.tiny_model(family, num_hidden_layers=6).state_dict() if not (tied and name == "lm_head.weight")}
    lost = {name: p.numel() for name, p in model.named_parameters() if "recursion" in name}
    assert report.left_out == lost and f"{len(lost)} tensors, {sum(lost.values()):,} parameters" in printed
    assert all(name in printed for name in lost)
    assert not any(name.endswith((".py", ".svg")) or name == checkpoint.RECORD for name in report.files)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert type(plain).__name__ in card and f"{sum(lost.values()):,} parameters" in card and "trust_remote_code" not in card


def test_exported_donor_equals_the_donor_at_gain_0(donor_folder: Path, place: Path) -> None:
    model = convert(str(donor_folder), L_layers=2, keep_donor=True)
    plain, donor = export_donor(model), AutoModelForCausalLM.from_pretrained(donor_folder)
    assert type(plain) is type(donor) and torch.equal(logits(plain), logits(donor))
    assert plain.state_dict().keys() == donor.state_dict().keys()
    plain.save_pretrained(place / "plain")
    assert json.loads((place / "plain" / "config.json").read_text()) == json.loads((donor_folder / "config.json").read_text())


def test_donor_in_another_dtype_is_the_rounded_model(place: Path, model: RecursiveLLM) -> None:
    run(donor=True, dtype="bfloat16", dataset_name="text.txt", seq_len=16, max_windows=3)
    plain = AutoModelForCausalLM.from_pretrained(place / "out")
    assert plain.dtype == torch.bfloat16 and torch.equal(plain.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))
    card = (place / "out" / "README.md").read_text()
    assert "| 0 |" in card and "text.txt, 3 windows" in card and "Not measured" not in card


def test_card_of_the_plain_donor_shows_its_own_results_only(place: Path) -> None:
    measured = (evaluation("ours.json", (2, 2.25, 15), (0, 3.0, 6)), evaluation("donor.json", (None, 2.0, 8)))
    run(donor=True, evaluation=measured)
    card = (place / "out" / "README.md").read_text()
    assert "3.0000" in card and "2.0000" in card and "2.2500" not in card
    run(donor=True, out="other", evaluation=(evaluation("ours.json", (2, 2.25, 15)),))
    assert "## Evaluation\n\nNot measured." in (place / "other" / "README.md").read_text()


def test_check_donor_detects_a_difference(model: RecursiveLLM) -> None:
    plain = export_donor(make_model())
    check_donor(plain, model)
    with torch.no_grad():
        plain.model.norm.weight[3] += 0.5
    with pytest.raises(RuntimeError, match="differs from the recursive model"):
        check_donor(plain, model)
    assert left_out(model)["model.recursion.H_init"] == 32


def test_the_plain_donor_needs_no_recursify(place: Path, model: RecursiveLLM) -> None:
    run(donor=True)
    torch.save(logits(model, H_cycles=0), place / "expected")
    code = re.search(r"```python\n(.*?)```", (place / "out" / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]
    compare = """
import torch
ids = torch.randint(384, (2, 11), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    assert torch.equal(model(ids, use_cache=False).logits, torch.load("expected"))
"""
    in_another_process(place, code + compare)


def in_another_process(folder: Path, code: str, **environment: str) -> str:
    """Run code where recursify cannot be imported."""
    script = f"import sys\nsys.modules['recursify'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- What is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "out.pt"}, "out.pt: expected the name of a folder"),
        ({"out": "no/out"}, "the folder .*no does not exist; make it first"),
        ({"out": "taken"}, "taken: is a folder with other things in it"),
        ({"out": "model", "donor": True}, "model: is a folder with other things in it; --donor expects a new or empty one"),
        ({"out": "model", "checkpoint": "model"}, "model: is the checkpoint itself"),
        ({"out": "model_tokenizer"}, "model_tokenizer: is"),
        ({"checkpoint": "nowhere.pt"}, "nowhere.pt: no such checkpoint"),
        ({"checkpoint": "bare.pt"}, "no tokenizer in .*; name one with --tokenizer_path"),
        ({"license": "Apache 2"}, "--license: expected an identifier of the hub's such as apache-2.0"),
        ({"base_model": "/models/qwen"}, "--base_model: expected a hub id"),
        ({"max_shard_size": "many"}, "--max_shard_size: expected a size such as 500MB or 5GB, got 'many'"),
        ({"evaluation": ("e.json",), "dataset_name": "text.txt"}, "--evaluation: was measured before, --dataset_name measures now"),
        ({"evaluation": ("missing.json",)}, "--evaluation: missing.json: no such file"),
        ({"evaluation": ("text.txt",)}, "text.txt: is not JSON"),
        ({"evaluation": ("wrong.json",)}, "--evaluation: wrong.json is not what `recursify evaluate --json` prints"),
        ({"evaluation": ("other_model.json",)}, "--evaluation: is of another model: 99 layer applications at 1 cycles, this one has 9"),
        ({"evaluation": ("e.json", "other_text.json")}, "--evaluation: other_text.json is of .*, 41 windows .* cannot be compared"),
        ({"evaluation": ("e.json", "overlapping.json")}, "is of .* of 16 tokens, 4 apart, e.json of .* of 16 tokens; losses"),
        ({"evaluation": ("e.json", "e.json")}, "the same depth twice"),
        ({"dataset_name": "nothing.txt"}, "nothing.txt"),
        ({"dataset_name": "text.txt", "cycles": (-1,)}, "--cycles"),
        ({"dataset_name": "text.txt", "seq_len": 1}, "--seq_len"),
        ({"private": True}, "--private: says how to upload, but nothing is uploaded; name a repository with --push"),
        ({"push": "a/b/c"}, "--push: expected a name on the hub such as you/model, got 'a/b/c'"),
        ({"dtype": "float16", "checkpoint": "large.pt"}, "--dtype float16: cannot hold the values of model.embed_tokens.weight"),
    ],
)
def test_bad_input_writes_nothing(flags: dict[str, Any], message: str, place: Path, model: RecursiveLLM) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "thesis.txt").write_text("mine")
    evaluation("e.json", (1, 2.5, 9))
    evaluation("wrong.json", rows=[{"loss": 3}])
    evaluation("other_model.json", (1, 2.5, 99))
    evaluation("other_text.json", (None, 2.5, 8), windows=41)
    evaluation("overlapping.json", (None, 2.5, 8), stride=4)
    if flags.get("checkpoint") == "bare.pt":
        checkpoint.save(place / "bare.pt", model, None)
    if flags.get("checkpoint") == "large.pt":
        large = make_model()
        with torch.no_grad():
            large.model.embed_tokens.weight[0, 0] = 1e6
        checkpoint.save(place / "large.pt", large, tiny.make_tiny_tokenizer())
    before = listing(place)
    with pytest.raises(UserError, match=f"(?s){message}"):
        run(**flags)
    assert listing(place) == before


def test_failed_export_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = listing(place)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="out: could not be written: the disk is full"):
        run(license="mit")
    assert listing(place) == before


# --- The hub -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """The stand-in hub with a token of the user `someone`."""
    hub.tokens = {"hf_good": "someone"}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield hub
    hub.tokens, hub.refused = {}, set()


def test_pushed_and_loaded_back(writer: HubStandIn, place: Path, model: RecursiveLLM) -> None:
    measured = (evaluation("e.json", (1, 2.5, 9), (2, 2.4, 15)),)
    report, printed = run(push="someone/looped", max_shard_size="20KB", evaluation=measured, license="mit", commit_message="first")
    assert report.address == f"{writer.url}/someone/looped" and f"✓ Uploaded to {report.address}" in printed
    pushed = writer.repos["models", "someone/looped"]
    assert listing(pushed.folder) == listing(place / "out") and not pushed.private
    found = AutoModelForCausalLM.from_pretrained("someone/looped", trust_remote_code=True).eval()
    assert torch.equal(logits(found), logits(model)) and torch.equal(logits(found, H_cycles=3), logits(model, H_cycles=3))
    # pushed again as one file: no stale files remain, and foreign files are not uploaded
    (place / "out" / "diary.txt").write_text("mine")
    run(push="someone/looped", license="mit")
    assert set(listing(pushed.folder)) == set(listing(place / "out")) - {"diary.txt"}
    code = re.search(r"```python\n(.*?)```", (place / "out" / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]
    assert '"someone/looped"' in code and "H_cycles=4" in code
    assert in_another_process(place, code + "\nprint(type(model).__module__)").strip().splitlines()[-1].startswith("transformers_modules")


def test_the_plain_donor_pushed_in_private(writer: HubStandIn, place: Path, model: RecursiveLLM) -> None:
    run(push="someone/plain", donor=True, private=True)
    assert writer.repos["models", "someone/plain"].private
    found = AutoModelForCausalLM.from_pretrained("someone/plain", token="hf_good")
    assert found.config.model_type == "qwen2" and torch.equal(logits(found), logits(model, H_cycles=0))
    run(out="looped", push="looped")  # a name without a user is one of the user's own
    assert ("models", "someone/looped") in writer.repos
    with pytest.raises(UserError, match="--private: someone/looped is on the hub already and public; nothing was uploaded"):
        run(out="looped", push="someone/looped", private=True)


def test_unusable_hub_is_detected_before_writing(writer: HubStandIn, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(message: str) -> None:
        before = listing(place)
        with pytest.raises(UserError, match=message):
            run(push="someone/looped")
        assert listing(place) == before and ("models", "someone/looped") not in writer.repos

    monkeypatch.setenv("HF_TOKEN", "hf_stolen")
    refuses("--push someone/looped: the hub does not take the token; log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    refuses("--push someone/looped: no token for the hub; log in")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    writer.down = True
    refuses("--push someone/looped: the hub cannot be reached")
    writer.down = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("--push: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("repo", "flags", "refused", "message"),
    [
        ("another/looped", {}, set(), "the token may not write there"),
        ("someone/looped", {"license": "wtfpl-9"}, set(), '"license" must be one of'),
        ("someone/looped", {}, {"commit"}, r"the hub refused \(500: "),
    ],
)
def test_folder_stays_complete_when_the_hub_refuses(
    repo: str, flags: dict[str, Any], refused: set[str], message: str, writer: HubStandIn, place: Path
) -> None:
    writer.refused = refused
    with pytest.raises(UserError, match=rf"(?s){message}.*out is written and whole: `hf upload {repo} out` uploads it") as caught:
        run(push=repo, **flags)
    assert "\n" not in str(caught.value)
    assert checkpoint.load(place / "out").plan == PLAN


def test_folder_stays_complete_when_the_network_fails(writer: HubStandIn, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = upload.check

    def check_and_cut(repo: str) -> None:
        checked(repo)
        writer.down = True

    monkeypatch.setattr(upload, "check", check_and_cut)
    with pytest.raises(UserError, match=r"the hub cannot be reached .*out is written and whole"):
        run(push="someone/looped")


# --- The command -------------------------------------------------------------------------------------------------------------------------


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recursify.cli import main as cli

    cli.main(["export", "out", "--checkpoint", "model.pt", "--donor"])
    assert "✓ Left out the recursion" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", "out", "--checkpoint", "model.pt", "--donor"])
    assert ended.value.code == 2 and "error: out: is a folder with other things in it" in capsys.readouterr().err


def test_a_relative_donor_folder_is_no_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted as donors/qwen2, used from elsewhere: the card links nothing, takes over no licence, and names no path."""
    monkeypatch.chdir(tmp_path)
    tiny.tiny_donor("qwen2", tmp_path / "donors" / "qwen2", num_hidden_layers=4)
    convert_command.run(
        convert_command.ConvertSettings(qwen_model="donors/qwen2", output_path="model.pt", L_layers=2, seq_len=64), say=lambda _: None
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for donor in (False, True):
        export.run(ExportSettings(checkpoint="../model.pt", out=f"out_{donor}", donor=donor), say=lambda _: None)
        card = (tmp_path / "elsewhere" / f"out_{donor}" / "README.md").read_text()
        assert "base_model" not in front(Path(f"out_{donor}")) and "huggingface.co/donors" not in card and "donors/" not in card
        assert "# qwen2, " in card and "donor_folder" not in card and str(tmp_path) not in card
    assert str(tmp_path) not in Path("out_False/config.json").read_text()


def test_a_hub_donor_stays_one_where_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = {"donor": DONOR, "revision": "abc"}
    monkeypatch.chdir(tmp_path)
    assert model_card.base_model(PLAN, notes, model_card.Extras()) == DONOR
    (tmp_path / DONOR).mkdir(parents=True)
    assert model_card.base_model(PLAN, notes, model_card.Extras()) == DONOR


@pytest.mark.parametrize("donor", [False, True])
def test_the_example_uses_the_chat_template_if_there_is_one(donor: bool, model: RecursiveLLM, tmp_path: Path) -> None:
    """And it runs."""
    checkpoint.save(tmp_path / "m.pt", model, with_template(), PLAN, NOTES)
    export.run(ExportSettings(checkpoint=str(tmp_path / "m.pt"), out=str(tmp_path / "out"), donor=donor), say=lambda _: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "apply_chat_template" in card and "Once upon a time" not in card
    assert donor or "recursify generate --checkpoint out --chat --prompt" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]  # type: ignore[index]
    exec(code.replace('"out"', repr(str(tmp_path / "out"))), {})


def test_the_card_names_settings_as_the_run_used_them(tmp_path: Path) -> None:
    tiny.tiny_donor("qwen2", tmp_path / "donor", num_hidden_layers=4)
    start = str(tmp_path / "m.pt")
    convert_command.run(convert_command.ConvertSettings(qwen_model=str(tmp_path / "donor"), output_path=start, L_layers=2), lambda _: None)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(tiny.sentences(1, 40)))
    run = TrainSettings(
        checkpoint=start, dataset_name=str(tmp_path / "text.txt"), seq_len=16, batch_size=2, max_steps=20, save_every=0, start_gain=0.1,
        device="cpu", output_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    export.run(ExportSettings(checkpoint=str(train(run).best), out=str(tmp_path / "out")), say=lambda _: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| warm-?up steps \| 2 \|", card, re.IGNORECASE) and "512" not in card.split("## Training")[1]
