"""The finished results of an output folder; a sidecar is read only if it may change the plan."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cadiff_cli.io.bids.layout import Finished, candidates, finished_result
from cadiff_cli.io.bids.names import JOURNAL
from cadiff_cli.io.checksums import Record
from cadiff_cli.runner.job import Job

RECORD = f"{JOURNAL}/results.tsv"
"""Where an output folder keeps what sidecars tell: fingerprint, checksum of input, parcellation."""
TOLD = r"[0-9a-f]{12} [0-9a-f]{64} [0-9A-Za-z]*"


class Results:
    """The complete results below ``out``.

    ``wanted`` tells the fingerprint that the result of a scan should have.  The sidecar of a
    result that has it is read once: afterwards its size and times of change tell that it is the
    same.
    """

    def __init__(self, out: Path, wanted: Callable[[str], str]) -> None:
        self._inputs = dict[str, str]()  # checksums, of results that the record knows as wanted
        self._read = dict[str, Finished]()
        record = Record(out / RECORD, TOLD)
        for candidate in candidates(out):
            entities = candidate.entities
            if entities in self._inputs or entities in self._read:
                continue
            fingerprint, begun_ns = wanted(entities), time.time_ns()
            told, checksum, finer = (record.get(candidate.path) or "  ").split(" ")
            if told == fingerprint and candidate.is_whole(finer):
                self._inputs[entities] = checksum
            elif result := candidate.result():
                self._read[entities] = result
                made = result.provenance
                if made.fingerprint == fingerprint:
                    values = (fingerprint, made.source_sha256, made.finer)
                    record.add(candidate.path, " ".join(values), begun_ns)

    @property
    def read(self) -> Iterable[Finished]:
        """Results whose sidecars were read: all that differ from what is wanted are among them."""
        return self._read.values()

    def has(self, job: Job) -> bool:
        """Whether the job's scan is finished.  Raises ``OutputError`` if it was made otherwise."""
        checksum = self._inputs.get(job.entities)
        if checksum is None:
            return job.is_finished(self._read.get(job.entities))
        return not job.has_changed(checksum) or job.is_finished(finished_result(job.place))
