"""How gangs of processes are started in the tests. Knows no model."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from bachvid.attention.groups import SequenceGroup
from bachvid.attention.parallel import join_group
from bachvid.layout.gangs import Gang

Answer = TypeVar("Answer")
Job = Callable[[SequenceGroup], Answer]

# One process imports these, the ranks are forks of it.
PRELOADED = ["bachvid.engine.worker", "bachvid.models.cogvideox", "bachvid.models.wan"]


def name_of(gang: Gang) -> str:
    return f"{gang.sequence}x{gang.cfg}"


def work(gang: Gang, rank: int, meeting: Path, answer: Connection, job: Job[object]) -> None:
    """Answer with what the job returns, or with what went wrong."""
    torch.set_num_threads(1)
    try:
        device = torch.device("cpu")
        with closing(join_group(gang, rank, device=device, init_file=meeting)) as group:
            answer.send_bytes(pickle.dumps(job(group)))  # torch would send file handles
    except BaseException:
        answer.send_bytes(pickle.dumps(traceback.format_exc()))
        raise


def run_gang(gang: Gang, folder: Path, job: Job[Answer]) -> list[Answer]:
    """Run a job, which can be pickled, in one process for each rank; return what each returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pipes, processes = [], []
    for rank in range(gang.size):
        ours, theirs = context.Pipe(duplex=False)
        meeting = folder / f"meeting-{name_of(gang)}"
        process = context.Process(target=work, args=(gang, rank, meeting, theirs, job))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = []
        for ours in pipes:
            assert ours.poll(120), "a rank does not answer"
            answers.append(pickle.loads(ours.recv_bytes()))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [answer for answer in answers if isinstance(answer, str)]
    assert not errors, "\n".join(errors)
    return answers
