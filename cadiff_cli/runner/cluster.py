"""Run the jobs on Dask workers, which may be on other machines.

Workers must see the dataset and the output folder under the same paths.  Each job reads from the
disk whether its scan is finished.  If a worker dies after it wrote the last file, Dask runs the job
again, but the scan is not segmented twice.
"""

from collections.abc import Generator, Iterable
from typing import Any

from cadiff_cli import machine
from cadiff_cli.errors import CadiffError, MissingInputError, UsageError, in_a_line
from cadiff_cli.runner.execute import execute
from cadiff_cli.runner.job import Job, Outcome
from cadiff_cli.runner.journal import failure

TIMEOUT = "30s"
"""How long a scheduler may take to answer."""


def run_dask(
    jobs: Iterable[Job], address: str | None, workers: int, threads: int
) -> Generator[Outcome]:
    """Yield outcomes as they come from the scheduler at ``address``, or from our own cluster."""
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError as error:
        raise UsageError(
            "--executor dask needs Dask", "pip install distributed, or use --executor local"
        ) from error
    cluster: Any = address
    if address is None:
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            env={**machine.thread_variables(threads), machine.ITK_THREADS: "1"},
        )
    try:
        client = Client(cluster, timeout=TIMEOUT)
    except ValueError as error:
        raise UsageError(
            f"--dask-address {address} is no address ({error})", "write tcp://host:8786"
        ) from error
    except OSError as error:
        raise MissingInputError(
            f"no Dask scheduler answers at {address}", "check --dask-address"
        ) from error
    futures = {}
    try:
        futures = {client.submit(execute, job, key=_key(job)): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            if future.status == "finished":
                yield future.result()
            else:
                yield failure(job, _lost(future.exception()))
    finally:
        client.cancel(list(futures))
        client.close()
        if address is None:
            cluster.close()


def _lost(error: BaseException) -> CadiffError:
    """Why a job has no outcome: its workers died more often than Dask retries, or an error."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        remedy = "was memory short? Give Dask's workers more, or use --tile 96"
    else:
        remedy = "have the workers this version of cadiff, and do they see the same folders?"
    return CadiffError(f"lost by Dask ({in_a_line(error)})", remedy)


def _key(job: Job) -> str:
    """A key that differs from those of other runs' tasks of the same scan."""
    return f"cadiff-{job.run_id}-{job.entities}{'-again' if job.wait else ''}"
