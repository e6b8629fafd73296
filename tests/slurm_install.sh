#!/bin/bash
# Installs munge and Slurm for the tests marked `cluster` where it may; elsewhere says what is missing, and they skip.
set -eu
missing=
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "slurm_install.sh: not found:$missing. The tests on Slurm are skipped: install munge and Slurm, or run as root on Debian"
    exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends munge slurm-wlm
