"""The files of answers of a batch that is over, from the answers of its lines.

Knows: which answer goes into which file, what is said of a line that has none. Does not know: how
answers came about.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import BinaryIO, Literal

from molmo_core.api_batches import File, RequestCounts
from molmo_server.batches.files import FileStore
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.jobs import Job, JobStore
from molmo_server.batches.lines import Reading, unanswered

Ending = Literal["completed", "expired", "cancelled"]


def end_batch(
    folder: BatchFolder,
    files: FileStore,
    jobs: JobStore,
    job: Job,
    ending: Ending,
    reading: Reading,
) -> None:
    """Write the files and end the batch; done again from the beginning after a crash.

    Lines that have no answer when the time is over are told of, those of a batch that was cancelled
    are left out. Raises BatchStoreError, OSError.
    """
    n_good = n_bad = 0
    with folder.part() as output, folder.part() as errors:
        seen: set[int] = set()
        for result in jobs.results(job.batch.id):
            (output if result.is_good else errors).write(result.text)
            n_good, n_bad = n_good + result.is_good, n_bad + (not result.is_good)
            seen.add(result.line)
        if ending == "expired" and job.batch.request_counts.total > len(seen):
            n_bad += _tell_of_the_rest(errors, job, seen, reading)
        with ExitStack() as undone:
            kept = [
                _keep(folder, files, job, part, what, undone) if n else None
                for part, what, n in ((output, "output", n_good), (errors, "errors", n_bad))
            ]
            counts = RequestCounts(
                total=job.batch.request_counts.total, completed=n_good, failed=n_bad
            )
            jobs.end(job, ending, counts, output=kept[0], errors=kept[1])
            undone.pop_all()


def _tell_of_the_rest(errors: BinaryIO, job: Job, seen: set[int], reading: Reading) -> int:
    n_lines = 0
    for line in reading.lines(job.input_path):
        if line.number not in seen:
            text = unanswered(
                line.custom_id,
                code="batch_expired",
                message="this request was not answered before the completion window was over; "
                "send it again in another batch",
            )
            errors.write(text)
            n_lines += 1
    return n_lines


def _keep(
    folder: BatchFolder, files: FileStore, job: Job, part: BinaryIO, what: str, undone: ExitStack
) -> File:
    file = files.new(
        part,
        filename=f"{job.batch.id}_{what}.jsonl",
        purpose="batch_output",
        ttl_s=job.output_ttl_s or None,
    )
    undone.callback(folder.keep(part, file.id).unlink, missing_ok=True)
    return file
