"""The job queue, with jobs that hang, crash, leave processes behind, and write incomplete results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.job_queue import Ended, Job, Keep, Place, Queue, Source, in_process, read_result, summary, unknown

SOURCE = Source("a device", "code of today", "0123abc")
Work = Callable[[Place, Keep], Any]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("quick", tmp_path / "results")


def job(name: str, work: Work | None = None, estimate: float = 1.0, **options: Any) -> Job:
    return Job(name, work or (lambda place, keep: {"name": name}), estimate=1000.0, rehearsal=estimate, **options)


def run(jobs: list[Job], place: Place, seconds: float = 60.0, source: Source = SOURCE, **options: Any) -> list[Ended]:
    return Queue(place, source, time.time() + seconds, **{"measured": unknown, "say": lambda text: None, **options}).run(jobs)


def statuses(ended: list[Ended]) -> dict[str, str]:
    return {one.job: one.status for one in ended}


def stored(one: Job, place: Place) -> dict[str, Any]:
    found = read_result(one.file(place.results))
    assert isinstance(found, dict), found
    return found


def hang(place: Place, keep: Keep) -> None:
    keep({"so far": 1})
    print("about to hang", flush=True)
    time.sleep(600)


# One job


def test_a_result_says_what_of_what_and_how_long(place: Place) -> None:
    one = job("first: a name, with signs / and more")
    assert statuses(run([one], place)) == {one.name: "ok"}
    found = stored(one, place)
    assert (found["status"], found["device"], found["code"], found["commit"]) == ("ok", "a device", "code of today", "0123abc")
    assert found["data"] == {"name": one.name} and found["machine"]["versions"]["torch"] and 0 <= found["seconds"] < 30
    assert found["tail"] == "" and one.file(place.results).parent == place.results
    assert [file.suffix for file in sorted(place.results.iterdir())] == [".json", ".log"]


def test_a_crash_is_told_with_its_output_and_does_not_stop_the_others(place: Place) -> None:
    def crash(place: Place, keep: Keep) -> None:
        print("what it said before")
        raise RuntimeError("no such kernel")

    def killed(place: Place, keep: Keep) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    crashing, faulting, after = job("crash", crash), job("fault", killed), job("after")
    ended = run([crashing, faulting, after], place)
    assert statuses(ended) == {"crash": "failed", "fault": "failed", "after": "ok"}
    assert "no such kernel" in ended[0].why and "signal 9" in ended[1].why
    assert "what it said before" in stored(crashing, place)["tail"] and "RuntimeError: no such kernel" in stored(crashing, place)["tail"]
    assert all(one.bad for one in ended[:2]) and not ended[2].bad


def test_a_hang_is_stopped_with_all_that_it_started_and_what_it_had_is_kept(place: Place, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("benchmarks.job_queue.LEAST_LIMIT", 1.0)
    note = tmp_path / "child"

    def with_a_child(place: Place, keep: Keep) -> None:
        note.write_text(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid))
        hang(place, keep)

    hanging, after = job("hang", with_a_child, estimate=0.6), job("after")
    began = time.monotonic()
    ended = run([hanging, after], place)
    assert statuses(ended) == {"hang": "timeout", "after": "ok"} and time.monotonic() - began < 20
    found = stored(hanging, place)
    assert found["data"] == {"so far": 1} and "about to hang" in found["tail"] and found["limit"] == pytest.approx(1.2)
    assert gone(int(note.read_text()))


def gone(pid: int) -> bool:
    """Whether a process has ended; an unreaped one has."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_what_a_job_leaves_running_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "child"

    def leave() -> None:
        note.write_text(str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid))

    assert in_process(leave, tmp_path / "log", 30) == 0
    assert gone(int(note.read_text()))


def test_what_is_no_json_is_a_failure(place: Place) -> None:
    ended = run([job("strange", lambda place, keep: {"value": float("nan")}), job("object", lambda place, keep: object())], place)
    assert statuses(ended) == {"strange": "failed", "object": "failed"}


def test_a_verdict_on_what_was_found_is_said(place: Place) -> None:
    one = job("judged", verdict=lambda data, place: "a check failed")
    (ended,) = run([one], place)
    assert (ended.status, ended.why, ended.bad) == ("ok", "a check failed", True)
    assert stored(one, place)["status"] == "ok"


# Existing results


def test_what_is_there_is_skipped(place: Place) -> None:
    times: list[int] = []
    one = job("first")
    assert statuses(run([one], place)) == {"first": "ok"}
    before = one.file(place.results).stat().st_mtime_ns
    (ended,) = run([one, *[]], place)
    assert ended.status == "skipped" and not ended.bad and not times
    assert one.file(place.results).stat().st_mtime_ns == before


@pytest.mark.parametrize("other", [Source("another device", "code of today", None), Source("a device", "other code", None)])
def test_other_code_and_other_devices_are_measured_again(other: Source, place: Place) -> None:
    one = job("first")
    run([one], place)
    assert statuses(run([one], place, source=other)) == {"first": "ok"}
    assert stored(one, place)["code"] == other.code


def test_what_failed_runs_again(place: Place) -> None:
    broken = job("first", lambda place, keep: 1 / 0)
    assert statuses(run([broken], place)) == {"first": "failed"}
    assert statuses(run([job("first")], place)) == {"first": "ok"}


@pytest.mark.parametrize("damage", ["cut short", "empty", "a list", "without fields"])
def test_a_damaged_result_is_noticed_said_and_made_again(damage: str, place: Place) -> None:
    one = job("first")
    printed: list[str] = []
    run([one], place)
    file = one.file(place.results)
    text = file.read_text()
    file.write_text({"cut short": text[: len(text) // 2], "empty": "", "a list": "[1]", "without fields": '{"status": "ok"}'}[damage])
    assert isinstance(read_result(file), str)
    ended = run([one], place, say=printed.append)
    assert statuses(ended) == {"first": "ok"}
    assert any("is no result" in line and "it runs again" in line for line in printed)
    assert stored(one, place)["data"] == {"name": "first"}


def test_a_killed_writer_leaves_the_former_result(place: Place, monkeypatch: Any) -> None:
    one = job("first")
    run([one], place)
    before = one.file(place.results).read_text()

    def full(self: Path, *args: Any, **options: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="disk is full"):
            run([one], place, source=Source("another device", "code of today", None))
    assert one.file(place.results).read_text() == before


# Time


def test_jobs_run_in_order_and_what_does_not_fit_makes_room_for_shorter_ones(place: Place, tmp_path: Path) -> None:
    order = tmp_path / "order"

    def noted(name: str) -> Job:
        def work(place: Place, keep: Keep) -> int:
            with order.open("a") as file:
                file.write(f"{name} ")
            return 1

        return job(name, work, estimate={"long": 500.0}.get(name, 1.0))

    ended = run([noted(name) for name in ("b", "long", "a", "c")], place)
    assert order.read_text().split() == ["b", "a", "c"]
    assert statuses(ended) == {"b": "ok", "long": "passed over", "a": "ok", "c": "ok"}
    assert "needs about 500 s" in ended[1].why and not ended[1].bad
    assert not noted("long").file(place.results).exists()


def test_nothing_runs_over_the_time(place: Place) -> None:
    """The second is stopped at the end, whatever its limit would be, and the third, which is short, has no time left."""
    began = time.time()
    ended = run([job("first"), job("hang", hang, estimate=0.5), job("third", estimate=1.0)], place, seconds=4)
    assert statuses(ended) == {"first": "ok", "hang": "timeout", "third": "passed over"}
    assert time.time() - began < 6
    assert stored(job("hang"), place)["limit"] < 4


def test_a_measured_time_replaces_the_estimate(place: Place) -> None:
    known = job("known", estimate=1.0)
    (ended,) = run([known], place, measured=lambda job: 300.0)
    assert ended.status == "passed over" and "needs about 300 s" in ended.why
    slow = job("slow", estimate=500.0)
    assert statuses(run([slow], place, seconds=1000)) == {"slow": "ok"}
    again = Source("a device", "other code", None)  # which took about as long before
    assert statuses(run([slow], place, source=again)) == {"slow": "ok"}


def test_lanes_run_side_by_side_and_wait_for_what_a_job_needs(place: Place, tmp_path: Path) -> None:
    def made(place: Place, keep: Keep) -> None:
        time.sleep(0.5)
        (tmp_path / "made").touch()

    def needs(place: Place) -> str | None:
        return None if (tmp_path / "made").exists() else "not made"

    def wait_for(name: str) -> Work:
        def work(place: Place, keep: Keep) -> None:
            (tmp_path / job_name).touch()
            while not (tmp_path / name).exists():
                time.sleep(0.01)

        job_name = {"left": "right", "right": "left"}[name]
        return work

    jobs = [job("makes", made), job("needs", obstacle=needs, after="makes"), job("left", wait_for("right")), job("right", wait_for("left"))]
    ended = run(jobs, place, lanes=2)
    assert [(one.job, one.status) for one in ended] == [(each.name, "ok") for each in jobs]


def test_obstacles_are_said(place: Place) -> None:
    (ended,) = run([job("donor", obstacle=lambda place: "needs a donor")], place)
    assert (ended.status, ended.why, ended.bad) == ("passed over", "needs a donor", False)


def test_the_summary_has_every_job(place: Place) -> None:
    jobs = [job("good"), job("bad", lambda place, keep: 1 / 0), job("long", estimate=500.0), job("kept")]
    run(jobs[3:], place)
    text = summary(run(jobs, place))
    assert [line for line in text.splitlines() if not line.startswith(" ")] == ["ran: 1", "failed: 1", "skipped: 1", "passed over: 1"]
    assert "ZeroDivisionError" in text and "needs about 500 s" in text and all(one.name in text for one in jobs)


def test_results_are_json_for_others(place: Place) -> None:
    one = job("first")
    run([one], place)
    assert json.loads(one.file(place.results).read_text(encoding="utf-8"))["job"] == "first"
