#!/usr/bin/env bash
# One scan a task.  scans.txt has one T1w path a line:
#   find bids -name '*_T1w.nii.gz' | sort > scans.txt
#   sbatch --array=1-$(wc -l < scans.txt) containers/slurm_array.sh scans.txt out
#SBATCH --job-name=cadiff
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:20:00
set -euo pipefail
scans=$1
out=$2
scan=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$scans")
# Templates are not downloaded on compute nodes: set TEMPLATEFLOW_HOME to a cache with MNIColin27.
exec cadiff-seg "$scan" -o "$out" --offline --threads "${SLURM_CPUS_PER_TASK:-2}"
