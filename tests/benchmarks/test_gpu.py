"""The queue for a GPU: its jobs are those of the pages, they run at toy size, and their results are merged."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_jobs, gpu_merge, page, real_donor
from benchmarks.case import Bench, missed, registry
from benchmarks.job_queue import Job, Place, read_result
from benchmarks.named_checks import Skip, failed, outcome, outcomes
from benchmarks.works import apart

ROOT = Path(__file__).resolve().parents[2]
CUDA_BLOCK = re.compile(r"<!-- bench cuda (\w+)")


# The jobs


@pytest.mark.parametrize("size", ["cuda", "quick"])
def test_every_table_of_a_gpu_is_of_exactly_one_job(size: str) -> None:
    named = CUDA_BLOCK.findall(page.PAGE.read_text(encoding="utf-8"))
    cases = [job.name for job in gpu_jobs.jobs(size) if job.name in registry().cases]
    assert sorted(cases) == sorted(named) and len(set(named)) == len(named)
    assert set(named) == {one.name for one in registry().cases.values() if "cuda" in one.sizes}


@pytest.mark.parametrize("size", ["cuda", "quick"])
def test_jobs_have_names_and_files_of_their_own(size: str, tmp_path: Path) -> None:
    jobs = gpu_jobs.jobs(size)
    assert len({job.name for job in jobs}) == len({job.file(tmp_path) for job in jobs}) == len(jobs)
    assert all(job.estimate > 0 and job.rehearsal > 0 for job in jobs)


def test_whether_it_works_comes_first_and_donors_before_their_rows() -> None:
    names = [job.name for job in gpu_jobs.jobs("cuda")]
    assert names[:2] == ["works", "works_training"]
    assert names.index("training") < names.index("decoding") < names.index("evidence: state_tracking, the donor") < names.index("loss")
    for study in ("state_tracking", "prose", "scan"):
        rows = [i for i, name in enumerate(names) if name.startswith(f"evidence: {study}, ") and "seed" in name]
        assert rows and min(rows) > names.index(f"evidence: {study}, the donor")


def test_the_cheapest_rows_of_a_study_come_first() -> None:
    rows = [job for job in gpu_jobs.jobs("cuda") if job.name.startswith("evidence: prose, ") and job.name.endswith("seed 0")]
    estimates = [job.estimate for job in rows]
    assert estimates == sorted(estimates) and estimates[0] < estimates[-1]


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RECURSIFY_SCAN", raising=False)
    monkeypatch.chdir(tmp_path)
    jobs = {job.name: job for job in gpu_jobs.jobs("cuda")}
    place = Place("cuda", tmp_path)
    assert "--donor" in (jobs["published donor"].obstacle(place) or "")
    assert "config.json" in (real_donor.obstacle(Place("cuda", tmp_path, tmp_path)) or "")
    assert "RECURSIFY_SCAN" in (jobs["evidence: scan, the donor"].obstacle(place) or "")
    assert "has not been made" in (jobs["evidence: state_tracking, donor as it is, seed 0"].obstacle(place) or "")
    assert "pip install vllm" in (jobs["engines"].obstacle(place) or "")
    assert jobs["evidence: state_tracking, the donor"].obstacle(place) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "datasets" in (jobs["evidence: prose, the donor"].obstacle(place) or "")


def test_a_committed_result_says_how_long(tmp_path: Path) -> None:
    (tmp_path / "cuda.json").write_text(json.dumps({"loss": {"machine": {"seconds": 12.5}}}))
    jobs = {job.name: job for job in gpu_jobs.jobs("cuda")}
    assert gpu_jobs.committed_seconds(jobs["loss"], "cuda", tmp_path) == 12.5
    assert gpu_jobs.committed_seconds(jobs["decoding"], "cuda", tmp_path) is None
    assert gpu_jobs.committed_seconds(jobs["loss"], "quick", tmp_path) is None


def test_a_verdict_names_checks_and_bounds(tmp_path: Path) -> None:
    bound = {"what": "time", "value": 2.0, "most": 1.0, "least": None, "must": True, "holds": False}
    found = {"tables": [{"rows": [{"check": "a", "result": "failed"}, {"check": "b", "result": "ok"}]}], "checks": [bound]}
    assert missed(found) == ["time"]
    assert gpu_jobs.verdict(found, Place("cuda", tmp_path)) == "2 failed or missed: a; time"
    assert gpu_jobs.verdict(found, Place("quick", tmp_path)) == "1 failed or missed: a"
    assert gpu_jobs.verdict({"tables": [], "checks": []}, Place("cuda", tmp_path)) == ""


# Named checks


def test_one_failure_leaves_the_other_checks() -> None:
    def skipped(on: Bench) -> str:
        raise Skip("not here")

    def wrong(on: Bench) -> str:
        raise AssertionError("1 | 2\ndiffer")

    table, bound = outcomes("Some", {"wrong": wrong, "skipped": skipped, "right": lambda on: "seen"}, Bench("quick"))
    rows: list[dict[str, Any]] = table.rows  # type: ignore[union-attr]
    assert [(row["check"], row["result"], row["message"]) for row in rows] == [
        ("wrong", "failed", "AssertionError: 1 / 2 differ"), ("skipped", "skipped", "not here"), ("right", "ok", "seen"),
    ]  # fmt: skip
    assert failed(rows) == ["wrong"] and bound.value == 1 and not bound.holds  # type: ignore[union-attr]


def test_a_check_that_hangs_fails(monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.named_checks.LIMIT", 0.2)

    def hang(on: Bench) -> str:
        while True:
            torch.zeros(1)

    row = outcome("hang", hang, Bench("quick"))
    assert row["result"] == "failed" and "TimeoutError: not done after" in row["message"] and row["seconds"] < 5


def test_a_difference_is_seen() -> None:
    a = torch.tensor([1.0, -4.0])
    assert apart(a, a) == 0 and apart(a + torch.tensor([0.4, 0.0]), a) == pytest.approx(0.1)


# The program


def test_code_is_told_from_other_code(tmp_path: Path) -> None:
    (tmp_path / "recursify").mkdir()
    file = tmp_path / "recursify" / "a.py"
    file.write_text("a = 1\n")
    before = gpu.code(tmp_path)
    (tmp_path / "README.md").write_text("another page")
    assert gpu.code(tmp_path) == before
    file.write_text("a = 2\n")
    assert gpu.code(tmp_path) != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--results", str(tmp_path / "results")]) == 2
    assert "--rehearse" in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_unknown_jobs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["nonsense"])
    assert "nonsense: no such job" in capsys.readouterr().err


def test_list_of_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    assert [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()] == [job.name for job in gpu_jobs.jobs("cuda")]


@pytest.mark.slow
def test_rehearsal_of_cheap_jobs(tmp_path: Path) -> None:
    """All of them are rehearsed by `make gpu ARGS=--rehearse`, which takes minutes."""
    study = "evidence: state_tracking"
    names = ["works", "supervision", "published donor", f"{study}, the donor", f"{study}, ours: keep_donor, H 3, L 1, seed 0"]
    command = [sys.executable, "-m", "benchmarks.gpu", *names, "--rehearse", "--minutes", "5", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ran: {len(names)}\n" in done.stdout and "failed: 0\n" in done.stdout and "passed over: 0" in done.stdout
    results = {name: read_result(job.file(tmp_path / "rehearsal")) for name, job in by_name("quick").items() if name in names}
    assert all(isinstance(found, dict) and found["status"] == "ok" and found["device"] == "CPU" for found in results.values())
    works: Any = results["works"]
    checks = [row for table in works["data"]["tables"] for row in table["rows"]]
    assert len(checks) > 10 and {row["result"] for row in checks} <= {"ok", "skipped"}, checks
    row: Any = results[names[-1]]
    assert row["data"]["run"]["figures"]["3"] and row["data"]["size"] == "test"


def by_name(size: str) -> dict[str, Job]:
    return {job.name: job for job in gpu_jobs.jobs(size)}


# Merging


def result(name: str, data: Any, **changes: Any) -> dict[str, Any]:
    return {
        "job": name, "status": "ok", "size": "cuda", "device": "a GPU", "code": "0", "commit": None, "machine": {}, "seconds": 1.0,
        "limit": 2.0, "data": data, "tail": "",
    } | changes  # fmt: skip


def measured(seconds: float) -> dict[str, Any]:
    cpu = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))["loss"]
    return {
        **cpu,
        "machine": {**cpu["machine"], "gpu": "a GPU", "device": "cuda"},
        "tables": [{"title": "Rows", "rows": [{"seconds": seconds}], "note": ""}],
    }


def put(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, one in enumerate(results):
        (folder / f"{number}.json").write_text(json.dumps(one))
    return folder


def test_whole_results_are_merged_and_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(
        tmp_path / "found", result("loss", measured(1.5)), result("training", None, status="timeout"), result("decoding", {}, size="quick"),
        result("published donor", {"tables": [], "checks": []}),
    )  # fmt: skip
    (folder / "cut.json").write_text('{"job": "ceil')
    assert gpu_merge.merge(folder, tmp_path, tmp_path) == ["loss"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("training: timeout", "decoding: ok, a rehearsal", "cut.json is no result", "published donor"))
    merged = json.loads((tmp_path / "cuda.json").read_text())
    assert list(merged) == ["loss"]
    assert "| 1.50 |" in page.make("cuda", "loss", None, tmp_path) and "a GPU" in page.make("cuda", "loss", None, tmp_path)


def test_merging_keeps_other_cases_and_replaces_the_same(tmp_path: Path) -> None:
    gpu_merge.merge(put(tmp_path / "first", result("loss", measured(1.5)), result("decoding", measured(2.5))), tmp_path, tmp_path)
    gpu_merge.merge(put(tmp_path / "second", result("loss", measured(3.5)), result("ceilings", measured(4.5))), tmp_path, tmp_path)
    found = json.loads((tmp_path / "cuda.json").read_text())
    assert [(name, one["tables"][0]["rows"][0]["seconds"]) for name, one in found.items()] == [
        ("ceilings", 4.5),
        ("loss", 3.5),
        ("decoding", 2.5),
    ]


def test_rows_of_a_study_are_merged_by_row_and_seed(tmp_path: Path) -> None:
    def row(name: str, seed: int, loss: float, gpu: str = "small") -> dict[str, Any]:
        common = {"study": "prose", "size": "gpu", "settings": {}, "steps": 1, "batch_size": 1, "donor": {}, "machine": {"gpu": gpu}}
        return result(f"evidence: prose, {name}, seed {seed}", common | {"run": {"name": name, "seed": seed, "loss": loss}})

    gpu_merge.merge(
        put(tmp_path / "found", row("naive loop", 0, 1.0), row("donor as it is", 0, 2.0), row("naive loop", 1, 3.0)), tmp_path, tmp_path
    )
    gpu_merge.merge(put(tmp_path / "later", row("naive loop", 1, 4.0, "large")), tmp_path, tmp_path)
    found = json.loads((tmp_path / "prose-gpu.json").read_text())
    assert found["study"] == "prose" and "run" not in found
    assert [(run["name"], run["seed"], run["loss"]) for run in found["runs"]] == [
        ("donor as it is", 0, 2.0), ("naive loop", 0, 1.0), ("naive loop", 1, 4.0),
    ]  # fmt: skip
    assert found["machine"] == {"gpu": "small"}, "of the first run; one of another machine says its own"
    assert [run.get("machine") for run in found["runs"]] == [None, None, {"gpu": "large"}]


def test_nothing_to_merge(tmp_path: Path) -> None:
    assert gpu_merge.main([str(put(tmp_path / "found"))]) == 1
    with pytest.raises(SystemExit):
        gpu_merge.main([str(tmp_path / "nowhere")])
