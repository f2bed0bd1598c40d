"""Bugs reported in other tools, reproduced here: one small case each, with its source. CONTRIBUTING.md says how to add one.

The subpackages' own tests cover the kinds of fault more widely; this list is by report, so that it can grow.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recursify.checkpoints.donor import open_donor
from recursify.conversion.convert import convert, run
from recursify.conversion.settings import ConvertSettings
from recursify.data.documents import read_files
from recursify.errors import UserError
from recursify.hub import export
from recursify.hub.settings import ExportSettings
from recursify.inference.chat_prompt import Dialogue
from recursify.inference.generation import generate_text
from recursify.inference.options import Sampling
from recursify.network.decoding_recursive_llm import RecursiveCache, rotary_limit
from recursify.utils.streams import replace_unencodable
from tests.support import old_donors
from tests.support.runs import recursive
from tests.support.served import Running
from tests.support.tiny import make_tiny_tokenizer, tiny_donor
from tests.support.tokenizers import with_template

Report = Callable[[Any], Any]


def reported(*threads: str) -> Report:
    """Where a fault was reported, as repository#number; shown by `pytest -v`."""
    assert all("/" in thread and thread.rpartition("#")[2].isdecimal() for thread in threads)
    return pytest.mark.parametrize("source", [" ".join(threads)])


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donor")
    tiny_donor("qwen2", folder, num_hidden_layers=4)
    return folder


@reported("vllm-project/vllm#42624", "Open-Athena/MarinFold#184")
def test_a_rotary_base_that_older_readers_do_not_find(source: str, tmp_path: Path) -> None:
    """They read it at the top of config.json, and silently take 10,000 where it is missing."""
    old_donors.old_donor("qwen2", tmp_path / "donor")
    run(ConvertSettings(qwen_model=str(tmp_path / "donor"), output_path=str(tmp_path / "folder"), L_layers=2), say=lambda _: None)
    export.run(ExportSettings(checkpoint=str(tmp_path / "folder"), out=str(tmp_path / "plain"), donor=True), say=lambda _: None)
    for folder in ("folder", "plain"):
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 1000000.0


@reported("huggingface/transformers#47553", "jingyaogong/minimind#578", "ml-explore/mlx-lm#683")
def test_a_tokenizer_class_that_older_readers_do_not_have(source: str, tmp_path: Path) -> None:
    old_donors.old_donor("qwen2", tmp_path / "donor")
    model = convert(str(tmp_path / "donor"), L_layers=2, keep_donor=True)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "donor").save_pretrained(tmp_path / "model")
    export.run(ExportSettings(checkpoint=str(tmp_path / "model"), out=str(tmp_path / "out"), donor=True), say=lambda _: None)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] != "TokenizersBackend"


@reported("huggingface/transformers#33129", "vllm-project/vllm#27431", "ggml-org/llama.cpp#24875")
def test_rotary_angles_that_change_with_the_length_of_the_text(source: str, tmp_path: Path) -> None:
    """Phi3's long factors from some length on: keys that were cached before it no longer match. Drafts are refused there by name."""
    old_donors.old_donor("phi3", tmp_path / "donor")
    model, tokenizer = convert(str(tmp_path / "donor"), L_layers=2, keep_donor=True, gain=0.2), make_tiny_tokenizer()
    limit = rotary_limit(model.config)
    assert limit == 128
    prompt = list(range(3, 3 + limit - 4))
    whole = torch.tensor([prompt])
    text = generate_text(model, tokenizer, prompt, Sampling(temperature=0, max_new_tokens=12))
    with torch.no_grad():
        for token in text.token_ids:
            assert int(model(whole, use_cache=False).logits[0, -1].argmax()) == token
            whole = torch.cat([whole, torch.tensor([[token]])], dim=1)
    with pytest.raises(UserError, match="--draft_cycles: the rotary embedding of this recursive_phi3 changes"):
        generate_text(model, tokenizer, prompt, Sampling(temperature=0, max_new_tokens=12, draft_cycles=0))


@reported("pytorch/examples#816", "mosaicml/composer#3154")
def test_a_learning_rate_that_a_resumed_run_ignores(source: str, tmp_path: Path) -> None:
    from recursify.training import FitSettings, RecursiveTrainer
    from tests.support.runs import SEQ_LEN, blocks

    def trainer(lr: float, steps: int) -> RecursiveTrainer:
        settings = FitSettings(
            lr=lr, warmup_steps=0, max_steps=steps, seq_len=SEQ_LEN, save_every=1, log_every=1, generate_every=0, output_dir=str(tmp_path),
            device="cpu",
        )  # fmt: skip
        return RecursiveTrainer(recursive(), settings, blocks(8), None, make_tiny_tokenizer(), console=False)

    trainer(1e-3, 2).train()
    resumed = trainer(1e-5, 4)
    resumed.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates[-1] == pytest.approx(1e-5 / 4) and rates[0] > 1e-4


@reported("vllm-project/vllm#1968")
def test_tensors_of_inference_mode_that_are_written_outside_of_it(source: str) -> None:
    model, ids = recursive(), torch.arange(3, 11)[None]
    past = RecursiveCache(model.config)
    with torch.inference_mode():
        model(ids[:, :5], past_key_values=past)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=past).logits, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


@reported("huggingface/accelerate#767", "huggingface/transformers#48409")
def test_parameters_that_are_read_outside_of_a_call(source: str, donor: Path, tmp_path: Path) -> None:
    """Offloaded weights are only there while their module is called."""
    model = convert(str(donor), L_layers=2, keep_donor=True, gain=0.2)
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": "20KB"}, offload_folder=tmp_path / "weights"
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


@reported("huggingface/transformers#12763", "huggingface/transformers#1062")
def test_a_tokenizer_with_more_tokens_than_the_model(source: str, donor: Path, tmp_path: Path) -> None:
    """An error message at loading instead of an IndexError in the embedding."""
    larger = make_tiny_tokenizer()
    larger.add_tokens([f"<extra_{i}>" for i in range(400)])
    larger.save_pretrained(tmp_path / "tokenizer")
    settings = ConvertSettings(
        qwen_model=str(donor), L_layers=2, tokenizer_path=str(tmp_path / "tokenizer"), output_path=str(tmp_path / "m.pt")
    )
    with pytest.raises(UserError, match="(?s)tokenizer.*384"):
        run(settings, say=lambda _: None)
    assert not (tmp_path / "m.pt").exists()


@reported("huggingface/transformers#31429", "EleutherAI/lm-evaluation-harness#2129")
def test_several_named_chat_templates_without_a_default(source: str) -> None:
    tokenizer = with_template()
    tokenizer.chat_template = {"chat": tokenizer.chat_template, "tool_use": "{{ raise_exception('tools only') }}"}
    dialogue = Dialogue(tokenizer)
    assert dialogue.has_template and "Hello" in tokenizer.decode(dialogue.prompt([{"role": "user", "content": "Hello"}]))


@reported("JustVugg/colibri#976", "can1357/oh-my-pi#12741", "lm-sys/FastChat#2544")
def test_more_tokens_are_asked_for_than_there_is_room(source: str) -> None:
    """`max_tokens` is a ceiling: cut to the room, not refused."""
    server = Running(recursive(), make_tiny_tokenizer(), max_completion_tokens=10**6)
    try:
        answer = server.post(prompt="The old", max_tokens=100_000, temperature=0)
        assert answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
    finally:
        server.close()


@reported("huggingface/trl#3427", "huggingface/peft#2128")
def test_lora_without_target_modules(source: str) -> None:
    peft: Any = pytest.importorskip("peft")
    adapted = peft.get_peft_model(recursive(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert any("q_proj" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


@reported("QwenLM/Qwen3-VL#1682", "huggingface/trl#4175")
def test_an_attention_that_is_not_installed_in_config_json(source: str, tmp_path: Path) -> None:
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash attention is installed here")
    tiny_donor("qwen2", tmp_path, num_hidden_layers=4)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"attn_implementation": "flash_attention_2"}))
    assert open_donor(str(tmp_path)).load()(torch.arange(3, 9)[None]).logits.shape[1] == 6


@reported("BasedHardware/omi#13389", "python/cpython#93508")
def test_half_a_surrogate_pair_in_valid_json(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud83d"}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2, column 'text'.*half of a surrogate pair"):
        list(read_files([tmp_path / "a.jsonl"], "text"))


@reported("pola-rs/polars#26435", "kuzudb/kuzu#1917")
@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string()])
def test_text_columns_of_other_arrow_types(source: str, kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["one", "two"], pa.string()).cast(kind)}), tmp_path / "a.parquet")
    assert [row["text"] for row in read_files([tmp_path / "a.parquet"], "text")] == ["one", "two"]


@reported("NousResearch/hermes-agent#27205", "peteromallet/desloppify#41")
def test_a_check_mark_on_a_terminal_of_windows(source: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    replace_unencodable(stream)
    print("✓ Saved", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"? Saved\n"  # type: ignore[attr-defined]


@reported("prometheus/client_python#27", "bthyreau/hippodeep_pytorch#7")
def test_the_module_resource_is_of_unix_alone(source: str) -> None:
    code = (
        "import sys, torch, recursify.training.trainer as trainer; sys.modules['resource'] = None; "
        "print(trainer.peak_memory(torch.device('cpu')) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-500:]
