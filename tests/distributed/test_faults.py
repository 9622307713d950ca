"""A rank is killed, hangs or fails: the others end and name it, checkpoints stay intact, training resumes with the same losses."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.support.spawn import run_script

JOB = Path(__file__).parent / "faults_job.py"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """(folder, what a rank of a scenario printed, the exit code of its rank 0)."""
    folder = tmp_path_factory.mktemp("faults")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_script(JOB, [str(folder), str(port)], folder=folder, timeout=400)

    def of(scenario, rank):
        return (folder / f"{scenario}-{rank}").read_text()

    def code(scenario):
        return int(of(scenario, "code"))

    return folder, of, code


def losses(text):
    return re.findall(r"^loss .*$", text, re.M)


@pytest.mark.parametrize("scenario", ["killed_in_a_checkpoint", "killed_in_save_pretrained"])
def test_killed_in_a_save(said, scenario):
    _, of, code = said
    assert code(scenario) == 1
    assert re.search(r"RankLostError: rank 1 is lost: no sign of life for \d+ s", of(scenario, 0))


def test_killed_in_a_forward(said):
    """All of the others say which of the four it was, by an exception of moefx's own."""
    _, of, code = said
    assert code("killed_in_a_forward") == 1
    for rank in (0, 1, 3):
        assert re.search(r"RankLostError: rank 2 is lost: no sign of life for \d+ s", of("killed_in_a_forward", rank)), rank


def test_killed_in_a_step(said):
    """In the backward, which moefx does not run: the line comes after PyTorch's own error, which names no rank."""
    _, of, code = said
    assert code("killed_in_a_step") == 1
    assert len(losses(of("killed_in_a_step", 0))) == len(losses(of("killed_in_a_step", 1))) == 5
    assert re.search(
        r"moefx: rank 1 is lost: no sign of life for \d+ s \(.*\); rank 0 ends because of that", of("killed_in_a_step", 0)
    )


def test_numbers_that_are_not_finite(said):
    """The rank that has them says layer and step; the other, in the middle of a collective, ends and quotes it."""
    _, of, code = said
    bad, other = of("not_a_number", 1), of("not_a_number", 0)
    reason = "MoefxError: forward 2 on rank 1: 144 of the routing logits of model.layers.0.mlp are NaN or infinite"
    assert reason in bad and len(losses(bad)) == 1
    assert code("not_a_number") == 1
    assert f"moefx: rank 1 failed: {reason}" in other


def test_first_rank_fails(said):
    """The store goes with rank 0, but not before the three others have read there why."""
    _, of, code = said
    assert code("first_rank_fails") == 1
    for rank in (1, 2, 3):
        assert "rank 0 failed: ValueError: the tokenizer's 12 and the model's 10 tokens disagree" in of(
            "first_rank_fails", rank
        ), rank


def test_stuck(said):
    """No connection is closed, as with NCCL: the process is ended, and shows where it was."""
    _, of, code = said
    assert code("stuck") == 1
    assert re.search(r"moefx: rank 1 is lost: no sign of life for \d+ s .*ends too, in 2 s at the latest", of("stuck", 0))
    assert "all_reduce" in of("stuck", 0)


def test_goes_on_as_if_nothing_had_been(said):
    """From the checkpoint of step 2, twice: losses and random numbers are those of the run that made it, to the last digit."""
    _, of, _ = said
    for rank in (0, 1):
        wanted = losses(of("killed_in_a_step", rank))[3:]
        assert len(wanted) == 2
        assert losses(of("killed_in_a_checkpoint", rank)) == wanted
        assert losses(of("killed_in_save_pretrained", rank)) == wanted  # after the interrupted save of a checkpoint


def test_the_previous_files_are_whole(said):
    """The second save_pretrained died while it wrote the second file: what readers see is what the first wrote."""
    folder, _, _ = said
    assert list((folder / "hf").glob("*.incomplete"))
    before, after = (json.loads((folder / name).read_text()) for name in ("before.json", "after.json"))
    assert before == after and len(before) > 5
