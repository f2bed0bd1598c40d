"""Every command and every Python snippet of the two guides, run as printed, in an empty folder, against the stand-in hub.

The commands stand here word for word; the scripts they name are those of the checkout, run as a user runs them, in processes of their own.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.hub_stand_in import HubStandIn

ROOT = Path(__file__).resolve().parents[2]


def command(line: str, folder: Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run a printed command line: `python script.py ...` with the script of the checkout, in `folder`."""
    python, script, *flags = shlex.split(line.replace("\\\n", " "))
    assert python == "python"
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags], cwd=folder, capture_output=True, text=True, input=typed, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def workdir(full_hub: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the quick start's three steps have been run."""
    folder = tmp_path_factory.mktemp("workdir")
    converted = command(
        """python convert_qwen_to_recursive.py \\
    --qwen_model "Qwen/Qwen2-0.5B" \\
    --L_layers 4 \\
    --H_cycles 3 \\
    --output_path qwen_recursive_init.pt""",
        folder,
    )
    trained = command(
        """python train_qwen_recursive.py \\
    --checkpoint qwen_recursive_init.pt \\
    --dataset_name wikitext \\
    --batch_size 4 \\
    --num_epochs 3 \\
    --enable_deep_supervision""",
        folder,
    )
    (folder / "convert.out").write_text(converted.stdout)
    (folder / "train.out").write_text(trained.stdout)
    yield folder


def test_step_1_prints_what_it_did(workdir: Path) -> None:
    out = (workdir / "convert.out").read_text()
    assert "num_layers=24" in out and "✓ Copied 4 transformer layers from indices [0, 8, 16, 23]" in out
    assert (workdir / "qwen_recursive_init_tokenizer" / "tokenizer_config.json").is_file()


def test_step_2_prints_its_summaries_and_keeps_the_best(workdir: Path) -> None:
    out = (workdir / "train.out").read_text()
    for epoch in (1, 2, 3):
        assert f"Epoch {epoch} Summary:" in out
    for word in ("Train Loss: ", "Val Loss: ", "Perplexity: ", "✓ New best model saved: qwen_recursive_finetuned_best.pt"):
        assert word in out
    assert (workdir / "qwen_recursive_finetuned_best.pt").is_file()
    assert (workdir / "qwen_recursive_finetuned_best_tokenizer" / "tokenizer.json").is_file()


def test_step_3_writes(workdir: Path) -> None:
    done = command(
        """python inference_qwen_recursive.py \\
    --checkpoint qwen_recursive_finetuned_best.pt \\
    --prompt "Once upon a time"
""",
        workdir,
    )
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > len("Once upon a time") + 2


def test_step_3_in_full_and_interactive(workdir: Path) -> None:
    done = command(
        """python inference_qwen_recursive.py \\
    --checkpoint qwen_recursive_finetuned_best.pt \\
    --prompt "Once upon a time in a land far away" \\
    --max_new_tokens 100 \\
    --temperature 0.8""",
        workdir,
    )
    assert done.stdout.startswith("Once upon a time in a land far away")
    interactive = command(
        """python inference_qwen_recursive.py \\
    --checkpoint qwen_recursive_finetuned_best.pt""",
        workdir,
        typed="Once upon a time\nThe meaning of life is\n/quit\n",
    )
    assert interactive.stdout.count("Generating...") == 2
    assert interactive.stdout.rstrip().endswith("Goodbye!")


def test_steps_1_and_2_in_full(workdir: Path) -> None:
    command(
        """python convert_qwen_to_recursive.py \\
    --qwen_model "Qwen/Qwen2-0.5B" \\
    --L_layers 4 \\
    --H_cycles 3 \\
    --L_cycles 3 \\
    --seq_len 512 \\
    --output_path full/qwen_recursive_init.pt""".replace("full/", f"{workdir}/again_"),
        workdir,
    )
    done = command(
        f"""python train_qwen_recursive.py \\
    --checkpoint {workdir}/again_qwen_recursive_init.pt \\
    --dataset_name wikitext \\
    --dataset_config_name wikitext-2-raw-v1 \\
    --batch_size 4 \\
    --lr 1e-5 \\
    --num_epochs 3 \\
    --seq_len 128 \\
    --enable_deep_supervision \\
    --deep_supervision_weight 0.5 \\
    --generate_every 500 --output_dir {workdir}/again""",
        workdir,
    )
    assert "Epoch 3 Summary:" in done.stdout


@pytest.mark.parametrize("selection", ["uniform", "first", "last", "middle"])
def test_layer_selections(selection: str, hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recursify.cli import main as cli

    flags = shlex.split(f"--layer_selection {selection}")
    cli.convert(["--qwen_model", "Qwen/Qwen2-0.5B", "--output_path", str(tmp_path / "m.pt"), *flags])
    wanted = {"uniform": [0, 8, 16, 23], "first": [0, 1, 2, 3], "last": [20, 21, 22, 23], "middle": [10, 11, 12, 13]}[selection]
    assert f"from indices {wanted}" in capsys.readouterr().out


TRAIN = "--checkpoint qwen_recursive_init.pt"
OTHER_TRAININGS = [
    f"{TRAIN} --enable_deep_supervision --deep_supervision_weight 0.5 --deep_supervision_schedule linear_decay",
    f"{TRAIN} --dataset_name your/dataset --dataset_config_name config_name",
    f"{TRAIN} --batch_size 2 --grad_accum_steps 4",
    f"{TRAIN} --batch_size 2",
    f"{TRAIN} --seq_len 64",
    f"{TRAIN} --num_epochs 5",
    f"{TRAIN} --lr 5e-6",
    f"{TRAIN} --enable_deep_supervision",
    f"{TRAIN} --warmup_steps 500",
]


@pytest.mark.parametrize("flags", OTHER_TRAININGS)
def test_other_trainings(flags: str, workdir: Path, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that the quick start shows, for two steps."""
    from recursify.cli import main as cli
    from tests.support import tiny

    if "your/dataset" in flags:
        folder = tiny.tiny_wikitext(tmp_path / "data")
        (folder / "wikitext-2-raw-v1").rename(folder / "config_name")
        card = (folder / "README.md").read_text().replace("wikitext-2-raw-v1", "config_name")
        (folder / "README.md").write_text(card)
        hub.add_dataset("your/dataset", folder)
    monkeypatch.chdir(workdir)
    cli.train([*shlex.split(flags), "--max_steps", "2", "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "qwen_recursive_finetuned_best.pt").is_file()


OTHER_INFERENCES = ["--temperature 0.6", "--tokenizer_path qwen_recursive_init_tokenizer", "--show_recursive_steps"]


@pytest.mark.parametrize("flags", OTHER_INFERENCES)
def test_other_inferences(flags: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from recursify.cli import main as cli

    monkeypatch.chdir(workdir)
    (workdir / "model.pt").write_bytes((workdir / "qwen_recursive_finetuned_best.pt").read_bytes())
    if "tokenizer_path" not in flags:
        flags += " --tokenizer_path qwen_recursive_finetuned_best_tokenizer"
    cli.generate([*shlex.split(f"--checkpoint model.pt {flags}"), "--prompt", "The river", "--max_new_tokens", "6"])
    out = capsys.readouterr().out
    assert out.startswith("The river")
    if "show" in flags:
        assert all(f"cycle {c}" in out for c in (1, 2, 3))


def test_approach_1(full_hub: HubStandIn, tmp_path: Path) -> None:
    """As printed; and its best model says why it writes nothing."""
    done = command(
        """python train_qwen_trm.py \\
    --model_name "Qwen/Qwen2-0.5B" \\
    --dataset_name "wikitext" \\
    --batch_size 8 \\
    --seq_len 128""",
        tmp_path,
    )
    for word in ("Epoch 3 Summary:", "Train Loss: ", "Val Loss: ", "Nearest Embedding Right: ", "New best model saved: qwen_recursive_"):
        assert word in done.stdout
    with pytest.raises(AssertionError, match=r"error: qwen_recursive_finetuned_best.pt: was trained in embedding space"):
        command('python inference_qwen_recursive.py --checkpoint qwen_recursive_finetuned_best.pt --prompt "The river"', tmp_path)


def test_approach_3(full_hub: HubStandIn, tmp_path: Path) -> None:
    """Its command is that of approach 1 under the other script's name; its best model writes as that of approach 2 does."""
    done = command(
        """python train_qwen_trm_hybrid.py \\
    --model_name "Qwen/Qwen2-0.5B" \\
    --dataset_name "wikitext" \\
    --batch_size 8 \\
    --seq_len 128 \\
    --max_steps 4""",
        tmp_path,
    )
    assert "Perplexity: " in done.stdout and "New best model saved: qwen_recursive_finetuned_best.pt" in done.stdout
    written = command(
        """python inference_qwen_recursive.py \\
    --checkpoint qwen_recursive_finetuned_best.pt \\
    --prompt "Once upon a time" """,
        tmp_path,
    )
    assert written.stdout.startswith("Once upon a time") and len(written.stdout) > len("Once upon a time") + 2


def test_edit_the_checkpoints_config_before_loading(workdir: Path, tmp_path: Path) -> None:
    from recursify.checkpoints import checkpoint

    content = torch.load(workdir / "qwen_recursive_finetuned_best.pt", weights_only=True)
    config = content["config"]
    config["H_cycles"] = 5  # More reasoning steps
    torch.save(content, tmp_path / "deeper.pt")
    assert checkpoint.load(tmp_path / "deeper.pt").model.config.num_hidden_layers == 4 * 5 * 4


def test_the_five_steps_of_the_technical_guide(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 5 of "Detailed Implementation: Approach 2", from the root of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    from convert_qwen_to_recursive import copy_attention_weights, copy_mlp_weights
    from models.layers import Attention, SwiGLU
    from models.recursive_reasoning.recursive_llm import RecursiveLLM

    model_name = "Qwen/Qwen2-0.5B"
    qwen_model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)

    hidden_size = qwen_model.config.hidden_size
    num_heads = qwen_model.config.num_attention_heads
    vocab_size = qwen_model.config.vocab_size
    qwen_embeddings = qwen_model.get_input_embeddings()
    qwen_layers = qwen_model.model.layers
    qwen_lm_head = qwen_model.lm_head

    cfg = {
        "batch_size": 8,
        "seq_len": 512,
        "vocab_size": vocab_size,
        "H_cycles": 3,
        "L_cycles": 3,
        "L_layers": 4,
        "hidden_size": hidden_size,
        "expansion": 4.0,
        "num_heads": num_heads,
        "pos_encodings": "rope",
        "pretrained_model_name": model_name,
        "freeze_embeddings": False,
    }
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        recursive_model = RecursiveLLM(cfg)
    assert any("no layer norms" in str(w.message) for w in warned)
    assert torch.equal(recursive_model.inner.embed_tokens.weight, qwen_embeddings.weight)

    num_qwen_layers = len(qwen_layers)
    num_recursive_layers = cfg["L_layers"]
    layer_indices = [int(i * num_qwen_layers / num_recursive_layers) for i in range(num_recursive_layers)]
    for i, qwen_idx in enumerate(layer_indices):
        qwen_layer = qwen_layers[qwen_idx]
        recursive_layer = recursive_model.inner.L_level.layers[i]
        copy_attention_weights(qwen_layer.self_attn, recursive_layer.self_attn)
        copy_mlp_weights(qwen_layer.mlp, recursive_layer.mlp)
        assert isinstance(recursive_layer.self_attn, Attention) and isinstance(recursive_layer.mlp, SwiGLU)
        assert torch.equal(recursive_layer.self_attn.wq.bias, qwen_layer.self_attn.q_proj.bias)
        assert torch.equal(recursive_layer.mlp.w2.weight, qwen_layer.mlp.down_proj.weight)
    recursive_model.inner.lm_head.weight.data.copy_(qwen_lm_head.weight.data)

    optimizer = torch.optim.AdamW(recursive_model.parameters(), lr=1e-5)
    ids = tokenizer("The river near the castle carries the ship .", return_tensors="pt").input_ids
    loss = recursive_model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)


def test_guide_names_are_views_of_the_parameters(hub: HubStandIn) -> None:
    from recursify import RecursiveLLM, convert

    model = convert("Qwen/Qwen2-0.5B", L_layers=4, H_cycles=3, L_cycles=3, layer_selection="uniform")
    assert isinstance(model, RecursiveLLM)
    layer = model.inner.L_level.layers[0]
    assert layer.self_attn.wq.weight is model.model.layers[0].self_attn.q_proj.weight
