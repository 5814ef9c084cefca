#!/usr/bin/env bash
#SBATCH --job-name=megalora
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#
# Fine-tunes on a Slurm cluster. All of these start the same job, and so does yhrun in the place of srun:
#
#   sbatch -N 8 -n 32 scripts/slurm/run.sh FLAGS              a batch job; it comes back after a preemption
#   srun -p P -N 8 -n 32 bash scripts/slurm/run.sh FLAGS      one task a GPU
#   srun -p P -N 8 -n 8 bash scripts/slurm/run.sh FLAGS       one task a node, torchrun inside
#   bash scripts/slurm/run.sh FLAGS                           this machine alone, without Slurm
#
# FLAGS go to tools/finetune.py as they are. scripts/slurm/launch.sh says what the environment may set.
set -euo pipefail

script=${BASH_SOURCE[0]}
if [ ! -f "$(dirname "$script")/launch.sh" ]; then # sbatch runs a copy in its spool; Slurm knows the original
    script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')
fi
# shellcheck source=scripts/slurm/launch.sh
. "$(dirname "$script")/launch.sh"
launch "$script" tools/finetune.py "$@"
