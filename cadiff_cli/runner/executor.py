"""Choose where jobs run, and how much of the machine they may use."""

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from cadiff_cli import machine
from cadiff_cli.runner.job import Job, Outcome

log = logging.getLogger(__name__)

SCAN_BYTES = 5 * 2**30
"""Memory that one scan may need: 4.4 GiB were measured for a large brain without bfloat16."""
POSTERIORS_BYTES = 4 * 2**30
"""Additional memory for 4-D posteriors of a 256^3 scan."""
SAMPLES_BYTES = 2**30
"""Additional memory for the sum of several samples of a large brain."""


@dataclass(frozen=True)
class Executor:
    """Limits are ``--nprocs`` threads in all, ``--omp-nthreads`` in each process, ``--mem`` bytes.

    ``kind`` is ``local``, or ``dask`` with the ``address`` of a scheduler (None: our own cluster).
    """

    kind: str = "local"
    address: str | None = None
    nprocs: int | None = None
    omp_nthreads: int | None = None
    memory_bytes: int | None = None

    def team(self, jobs: Sequence[Job]) -> tuple[int, int]:
        """Number of worker processes, and threads of each.

        As many single-threaded workers as fit: one scan's registration, which uses one thread,
        then runs beside another's inference, and no thread waits for another.
        """
        nprocs = self.nprocs or machine.cores()
        need = SCAN_BYTES
        if any(job.recipe.config.output.posteriors for job in jobs):
            need += POSTERIORS_BYTES
        if any(job.recipe.config.sample.samples > 1 for job in jobs):
            need += SAMPLES_BYTES
        fit = (self.memory_bytes or machine.free_memory_bytes()) // need
        workers = max(1, min(len(jobs), fit, nprocs // (self.omp_nthreads or 1)))
        return workers, self.omp_nthreads or max(1, nprocs // workers)

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Yield outcomes in the order of completion; closing the iterator stops the other jobs."""
        workers, threads = self.team(jobs)
        log.info("%d scans, %d processes of %d threads", len(jobs), workers, threads)
        if self.kind == "dask":
            from cadiff_cli.runner.cluster import run_dask

            yield from run_dask(jobs, self.address, workers, threads)
        else:
            from cadiff_cli.runner.local import run_local

            yield from run_local(jobs, workers, threads)
