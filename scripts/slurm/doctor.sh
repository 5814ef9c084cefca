#!/usr/bin/env bash
#SBATCH --job-name=megalora-doctor
#
# Checks the nodes of a Slurm cluster and the links between them, started in the same ways as run.sh:
#
#   sbatch -N 8 -n 32 scripts/slurm/doctor.sh FLAGS              a batch job
#   srun -p P -N 8 -n 32 bash scripts/slurm/doctor.sh FLAGS      one task a GPU
#   srun -p P -N 8 -n 8 bash scripts/slurm/doctor.sh FLAGS       one task a node, torchrun inside
#   bash scripts/slurm/doctor.sh FLAGS                           this machine alone, without Slurm
#
# FLAGS go to tools/doctor.py as they are. scripts/slurm/launch.sh says what the environment may set.
set -euo pipefail

script=${BASH_SOURCE[0]}
if [ ! -f "$(dirname "$script")/launch.sh" ]; then # sbatch runs a copy in its spool; Slurm knows the original
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
fi
# shellcheck source=scripts/slurm/launch.sh
. "$(dirname "$script")/launch.sh"
launch "$script" tools/doctor.py "$@"
