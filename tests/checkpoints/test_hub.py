"""The stand-in hub with the real clients: they read the files of the folders, and every request is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recursify.data.loading import DataSettings, load_documents
from tests.support import tiny
from tests.support.hub_stand_in import HubStandIn, parse_range

QWEN = "Qwen/Qwen2-0.5B"


def test_clients_use_the_stand_in_hub(hub: HubStandIn) -> None:
    assert hub.url == huggingface_hub.constants.ENDPOINT
    assert Path(huggingface_hub.constants.HF_HUB_CACHE).is_relative_to(hub.home)


def test_model_and_tokenizer_by_their_hub_name(hub: HubStandIn, donor_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(QWEN)
    here = AutoModelForCausalLM.from_pretrained(donor_folder)
    assert model.config.num_hidden_layers == 24
    assert model.state_dict().keys() == here.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), here.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    text = "The old lobster's 1936 song.\n\nÉtude"
    assert tokenizer(text)["input_ids"] == tiny.make_tiny_tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_wikitext(hub: HubStandIn) -> None:
    documents = load_documents(DataSettings())
    assert (len(documents.train), len(documents.validation)) == (24, 4)


def test_only_what_was_asked_for_is_opened(hub: HubStandIn, donor_folder: Path, tmp_path: Path) -> None:
    hub.add_model("someone/sharded", donor_folder)
    hf_hub_download("someone/sharded", "config.json", cache_dir=tmp_path)
    assert hub.opened("someone/sharded") == ["config.json"]
    assert [(r.method, r.file, r.status) for r in hub.requests] == [("HEAD", "config.json", 200), ("GET", "config.json", 200)]
    hub.clear()
    # from the cache: metadata is requested, contents are not sent again
    hf_hub_download("someone/sharded", "config.json", cache_dir=tmp_path)
    assert hub.opened("someone/sharded") == []


def test_a_configuration_never_opens_the_shards_of_another(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add_dataset("fresh/wikitext", tiny.tiny_wikitext(tmp_path))
    load_documents(DataSettings(dataset_name="fresh/wikitext", dataset_config_name="wikitext-103-raw-v1"))
    opened = hub.opened("fresh/wikitext")
    assert "wikitext-103-raw-v1/train-00000-of-00001.parquet" in opened
    assert not any(file.startswith("wikitext-2-raw-v1/") for file in opened)


def test_a_whole_repository(hub: HubStandIn, donor_folder: Path, tmp_path: Path) -> None:
    folder = Path(snapshot_download(QWEN, local_dir=tmp_path / "copy"))
    for file in donor_folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert sorted(HfApi().list_repo_files(QWEN)) == sorted(file.name for file in donor_folder.iterdir())


def test_listings(hub: HubStandIn) -> None:
    api = HfApi()
    top = [entry.path for entry in api.list_repo_tree("Salesforce/wikitext", repo_type="dataset")]
    assert top == ["README.md", "wikitext-103-raw-v1", "wikitext-2-raw-v1"]
    every = [entry.path for entry in api.list_repo_tree("Salesforce/wikitext", repo_type="dataset", recursive=True)]
    assert "wikitext-2-raw-v1/test-00000-of-00001.parquet" in every
    (info,) = api.get_paths_info("Salesforce/wikitext", ["README.md", "absent.md"], repo_type="dataset")
    assert info.path == "README.md" and info.size > 0
    (branch,) = api.list_repo_refs(QWEN).branches
    assert branch.target_commit == api.model_info(QWEN).sha == api.model_info(QWEN, revision=branch.target_commit).sha


def test_absent_files_raise_the_clients_errors(hub: HubStandIn) -> None:
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(QWEN, "absent.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("no/such", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(QWEN, "config.json", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().dataset_info(QWEN)
    with pytest.raises(OSError, match="no/such"):
        AutoConfig.from_pretrained("no/such")


def test_nothing_outside_the_folders_is_served(hub: HubStandIn) -> None:
    assert get_session().get(f"{hub.url}/{QWEN}/resolve/main/..%2F..%2Fetc%2Fpasswd").status_code == 404


def test_ranges(hub: HubStandIn, donor_folder: Path) -> None:
    whole = (donor_folder / "config.json").read_bytes()
    url = f"{hub.url}/{QWEN}/resolve/main/config.json"
    for header, expected in {"bytes=5-9": whole[5:10], "bytes=5-": whole[5:], "bytes=-7": whole[-7:]}.items():
        response = get_session().get(url, headers={"Range": header, "Accept-Encoding": "identity"})
        assert (response.status_code, response.content) == (206, expected)
    assert get_session().get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_parse_range() -> None:
    assert parse_range(None, 10) == (0, 9)
    assert parse_range("bytes=2-99", 10) == (2, 9)
    assert parse_range("bytes=-99", 10) == (0, 9)
    assert parse_range("bytes=9-2", 10) is None
    assert parse_range("lines=1-2", 10) is None


def test_a_changed_repository_is_another_commit(hub: HubStandIn, tmp_path: Path) -> None:
    hub.add_model("someone/growing", tmp_path)
    (tmp_path / "a.txt").write_text("one")
    before = HfApi().model_info("someone/growing").sha
    (tmp_path / "a.txt").write_text("another")
    assert HfApi().model_info("someone/growing").sha != before
    assert Path(hf_hub_download("someone/growing", "a.txt")).read_text() == "another"


def test_a_subprocess_meets_the_same_hub(hub: HubStandIn, tmp_path: Path) -> None:
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download({QWEN!r}, 'config.json'))"
    environment = os.environ | hub.env(home=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
    assert hub.opened(QWEN) == ["config.json"]
