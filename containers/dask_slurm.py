"""A Dask cluster inside SLURM for ``cadiff run --executor dask``.

Run this on a login node, in an environment with ``pip install . distributed dask-jobqueue``; it
prints the address for ``--dask-address`` and keeps the workers until it is stopped.  Dask starts
workers as jobs become free; a scan whose worker was pre-empted is run again elsewhere.
"""

import signal

from dask_jobqueue import SLURMCluster

cluster = SLURMCluster(
    cores=1,  # of Dask: one scan at a time in each worker
    job_cpu=2,  # of SLURM: threads for that scan
    memory="8GB",
    walltime="08:00:00",
    job_script_prologue=["export OMP_NUM_THREADS=2", "export TEMPLATEFLOW_HOME=$HOME/templateflow"],
    # Workers leave before SLURM kills them, and hand their work back.
    worker_extra_args=["--lifetime", "465m", "--lifetime-stagger", "5m"],
)
cluster.adapt(minimum_jobs=1, maximum_jobs=20)
print(cluster.scheduler_address, flush=True)
signal.pause()
