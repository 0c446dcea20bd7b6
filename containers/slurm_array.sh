#!/usr/bin/env bash
# One participant a task, on SLURM.  From a folder that all nodes see:
#
#   cadiff run BIDS OUT participant --dry-run OPTIONS |
#     awk -F'\t' '$2 ~ /^(todo|failed)$/ { sub(/_.*/, "", $1); print $1 }' | sort -u > todo.txt
#   sbatch --array=1-$(wc -l < todo.txt) containers/slurm_array.sh todo.txt BIDS OUT OPTIONS
#   cadiff run BIDS OUT group
#
# Afterwards the same three lines resubmit only what failed or was killed: scans that are finished or
# unsuitable are not listed.  A task ends with cadiff's exit code (sacct shows it).
#
# CADIFF_RUN is the command, "cadiff run" by default; for a container:
#   export CADIFF_RUN="apptainer run --cleanenv --bind $PWD /images/cadiff.sif"
#SBATCH --job-name=cadiff
#SBATCH --output=cadiff_%A_%a.log
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:30:00
#SBATCH --signal=B:TERM@60
set -uo pipefail
list=$1 bids=$2 out=$3
shift 3
# A list from Windows has a byte order mark and carriage returns.
participant=$(sed $'s/^\xef\xbb\xbf//; s/[[:space:]]*$//' "$list" | awk -v line="${SLURM_ARRAY_TASK_ID:-}" 'NR == line')
if [ -z "$participant" ]; then
  echo "cadiff: error: $list has no participant in line '${SLURM_ARRAY_TASK_ID:-}'. Submit with --array=1-N: it has N lines" >&2
  exit 64
fi
# Scratch is the node's own disk: what is temporary never crosses the network.
work=$(mktemp -d "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/cadiff-XXXXXX") || exit 73
trap 'rm -rf "$work"' EXIT
# Apptainer sees it wherever it lies, whatever else is bound.
bound=${APPTAINER_BIND:-${SINGULARITY_BIND:-}}
export APPTAINER_BIND="${bound:+$bound,}$work"

# shellcheck disable=SC2086  # CADIFF_RUN may be several words
${CADIFF_RUN:-cadiff run} "$bids" "$out" participant --participant-label "$participant" \
  --nprocs "${SLURM_CPUS_PER_TASK:-2}" --mem "${SLURM_MEM_PER_NODE:-8000}" --work-dir "$work" \
  --offline --skip-bids-validation "$@" &
child=$!
# Near the time limit SLURM sends SIGTERM to this script: hand it on, and wait for the clean-up.
trap 'kill -TERM "$child" 2> /dev/null' TERM
wait "$child"
code=$?
while kill -0 "$child" 2> /dev/null; do
  wait "$child"
  code=$?
done
exit "$code"
