#!/usr/bin/env bash
# One participant a task, on Grid Engine.  As slurm_array.sh, but:
#
#   qsub -t 1-$(wc -l < todo.txt) containers/sge_array.sh todo.txt BIDS OUT OPTIONS
#
# A task ends with cadiff's exit code (qacct shows it).
#$ -N cadiff
#$ -cwd
#$ -j y
#$ -pe smp 2
#$ -l h_vmem=4G,h_rt=00:30:00
#$ -notify
set -uo pipefail
list=$1 bids=$2 out=$3
shift 3
# A list from Windows has a byte order mark and carriage returns.
participant=$(sed $'s/^\xef\xbb\xbf//; s/[[:space:]]*$//' "$list" | awk -v line="${SGE_TASK_ID:-}" 'NR == line')
if [ -z "$participant" ]; then
  echo "cadiff: error: $list has no participant in line '${SGE_TASK_ID:-}'. Submit with -t 1-N: it has N lines" >&2
  exit 64
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/cadiff-XXXXXX") || exit 73
trap 'rm -rf "$work"' EXIT
# Apptainer sees it wherever it lies, whatever else is bound.
bound=${APPTAINER_BIND:-${SINGULARITY_BIND:-}}
export APPTAINER_BIND="${bound:+$bound,}$work"

# shellcheck disable=SC2086  # CADIFF_RUN may be several words
${CADIFF_RUN:-cadiff run} "$bids" "$out" participant --participant-label "$participant" \
  --nprocs "${NSLOTS:-2}" --mem "${CADIFF_MEM:-8G}" --work-dir "$work" \
  --offline --skip-bids-validation "$@" &
child=$!
# With -notify, Grid Engine sends SIGUSR2 before it kills.
trap 'kill -TERM "$child" 2> /dev/null' TERM USR2
wait "$child"
code=$?
while kill -0 "$child" 2> /dev/null; do
  wait "$child"
  code=$?
done
exit "$code"
