# shellcheck shell=bash
# What run.sh, gen.sh and doctor.sh share: from a Slurm allocation to one process a rank. Sourced by them.
#
# What the environment may set:
#   GPUS_PER_NODE              processes that torchrun (on one host: megalora) starts on a node (default: Slurm's count, else the GPUs seen)
#   TP, PP                     --tensor_parallel_size and --pipeline_parallel_size, where FLAGS do not give them
#   MAX_RESTARTS               how often torchrun starts the ranks again after one has died (default 3)
#   PREFLIGHT                  0: no `megalora doctor` on each node before the start
#   PYTHON                     interpreter (default: the active environment's if it has torch and transformers, else .venv's, else python3)
#   MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS, OPENBLAS_NUM_THREADS, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                              kept where they are set; NCCL_IB_HCA and all other NCCL settings are never touched
#   NNODES, NODE_RANK          several machines without Slurm: the same call on each, with MASTER_ADDR

REQUEUE=75 # exit status of a run that saved because a signal asked it to leave (megalora/cli.py)

launch() { # launch SCRIPT PROGRAM FLAGS...: does not return
    script=$1 program=$2 flags=("${@:3}")
    root=$(cd "$(dirname "$script")/../.." && pwd)
    if [ -n "${SLURM_JOB_ID:-}" ] && ! in_step; then start_step; fi
    python=${PYTHON:-$(find_python)}
    if in_step; then find_place_in_step; else find_place_without_slurm; fi
    choose_threads
    choose_network
    add_flag tensor_parallel_size "${TP:-}" TP
    add_flag pipeline_parallel_size "${PP:-}" PP
    if [ "$program" != tools/doctor.py ]; then preflight; fi
    if [ -n "${RANK:-}" ]; then
        trap '' USR1 # Slurm signals every process of a step: none may die of it before its own handler is there
        exec "$python" "$root/$program" "${flags[@]}"
    elif [ "$program" = tools/finetune.py ]; then
        run_preemptible
    else
        exec "$python" "${torchrun[@]}" "$root/$program" "${flags[@]}"
    fi
}

note() { # one line of the job, not one of each task
    if [ "${SLURM_PROCID:-0}" = 0 ] && [ "${NODE_RANK:-0}" = 0 ]; then echo "$(basename "$script"): $*" >&2; fi
}

fail() {
    echo "$(basename "$script"): error: $*" >&2
    exit 2
}

find_python() {
    local active=""
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        active=$(command -v python) || active=""
        # A conda "base" is active in many shells: one that lacks what megalora needs is not meant.
        if [ -n "$active" ] && { [ ! -x "$root/.venv/bin/python" ] || "$active" -c "import torch, transformers" 2>/dev/null; }; then
            echo "$active"
            return
        fi
        if [ ! -x "$root/.venv/bin/python" ]; then
            fail "an environment is active, but has no python: set PYTHON to an interpreter that has megalora"
        fi
        note "the active environment (${VIRTUAL_ENV:-$CONDA_PREFIX}) lacks torch or transformers: .venv is used"
    fi
    if [ -x "$root/.venv/bin/python" ]; then
        echo "$root/.venv/bin/python"
    else
        command -v python3 || fail "no python3 here: set PYTHON to an interpreter that has megalora"
    fi
}

# ---- in a batch script or in salloc's shell: this script again, as a step of the job ----

in_step() { # the numbers from 4294967290 on are Slurm's names for batch scripts and interactive shells
    [ -n "${MEGALORA_IN_STEP:-}" ] || { [ -n "${SLURM_STEP_ID:-}" ] && ((SLURM_STEP_ID < 4294967290)); }
}

start_step() { # does not return
    local srun step status=0 options=(--kill-on-bad-exit=1)
    srun=$(command -v srun || command -v yhrun) || fail "neither srun nor yhrun is here"
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
    MEGALORA_IN_STEP=1 "$srun" "${options[@]}" bash "$script" "${flags[@]}" &
    step=$!
    trap 'kill -USR1 "$step" 2>/dev/null || true' USR1 TERM # srun hands it on to every task
    wait_for "$step" || status=$?
    if ((status == REQUEUE)); then requeue; fi
    exit "$status"
}

wait_for() { # the exit status of a child, however often a trapped signal ends a wait
    local status=0 again=0
    while wait "$1" || status=$?; kill -0 "$1" 2>/dev/null; do status=0; done
    wait "$1" 2>/dev/null || again=$? # the wait before may have ended by a signal; 127: it ended with the child
    if ((again != 127)); then status=$again; fi
    return "$status"
}

requeue() {
    local job
    job=$(scontrol show job "$SLURM_JOB_ID")
    # A job that the user cancelled, or that Slurm has put back in the queue by itself, is left alone.
    if [[ $job == *JobState=RUNNING* && $job == *BatchFlag=1* && $job == *Requeue=1* ]]; then
        note "saved: job $SLURM_JOB_ID goes back into the queue, and on from there when it starts again"
        scontrol requeue "$SLURM_JOB_ID"
    else
        note "saved: the same command goes on from there"
    fi
}

# ---- who this task is ----

find_place_in_step() { # sets NNODES, NODE_RANK, MASTER_*, and RANK and its kin or the command of torchrun
    local tasks hosts counts name step=${SLURM_STEP_ID:-0}
    NNODES=${SLURM_STEP_NUM_NODES:-$SLURM_NNODES} NODE_RANK=$SLURM_NODEID
    tasks=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS}
    hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}") ||
        fail "scontrol cannot name the nodes: set MASTER_ADDR" # also its name on clusters with yhrun
    MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
    other_host=$([ "$NODE_RANK" = 0 ] && echo "${hosts##*$'\n'}" || echo "$MASTER_ADDR")
    MASTER_PORT=${MASTER_PORT:-$((15000 + (SLURM_JOB_ID * 7 + step) % 15000))}
    export NNODES NODE_RANK MASTER_ADDR MASTER_PORT
    if ((tasks > NNODES)); then
        read -ra counts <<<"$(tasks_of_nodes "${SLURM_STEP_TASKS_PER_NODE:-$SLURM_TASKS_PER_NODE}")"
        # Numbered node by node however Slurm dealt the tasks, so that neighbouring ranks (tp) share a node.
        RANK=$SLURM_LOCALID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$tasks LOCAL_WORLD_SIZE=${counts[NODE_RANK]}
        for ((node = 0; node < NODE_RANK; node++)); do RANK=$((RANK + counts[node])); done
        processes=$LOCAL_WORLD_SIZE
        note "$NNODES nodes, $tasks tasks: one task a rank"
        if [ -n "${GPUS_PER_NODE:-}" ] && [ "$GPUS_PER_NODE" != "$processes" ]; then
            note "GPUS_PER_NODE=$GPUS_PER_NODE is not used: Slurm has started $processes tasks on this node"
        fi
        if [ -n "${SLURM_GPUS_PER_TASK:-}${SLURM_GPU_BIND:-}" ] && [[ ${CUDA_VISIBLE_DEVICES:-,} != *,* ]]; then
            LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 # each task sees one GPU, its own
            note "LOCAL_RANK=0 in every task: Slurm shows each its own GPU"
        fi
        export RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
    else
        name=${SLURMD_NODENAME:-$(hostname)}
        count_processes
        if ((NNODES == 1)); then on_this_host; else torchrun_on_nodes --rdzv_id "$SLURM_JOB_ID.$step" --local_addr "$name"; fi
        note "$NNODES nodes, one task each: $starter starts $processes processes a node ($processes_from)"
    fi
    note "MASTER_ADDR=$MASTER_ADDR (first of ${hosts//$'\n'/ }), MASTER_PORT=$MASTER_PORT (from the job's id)"
}

find_place_without_slurm() {
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} other_host=${MASTER_ADDR:-}
    count_processes
    if ((NNODES == 1)); then
        on_this_host
    else
        [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES without Slurm: set MASTER_ADDR to the first machine"
        MASTER_PORT=${MASTER_PORT:-29500}
        torchrun_on_nodes --rdzv_id megalora --local_addr "$(route_to_other src)"
    fi
    note "no Slurm: $starter starts $processes processes on each of $NNODES nodes ($processes_from)"
}

on_this_host() { # sets the command: as torchrun, but for a store that listens on the loopback alone
    WORLD_SIZE=$processes starter=megalora
    torchrun=(-m megalora.cluster.local --max_restarts "${MAX_RESTARTS:-3}" --nproc "$processes")
}

torchrun_on_nodes() { # torchrun_on_nodes OPTIONS...: sets the command; its rendezvous lets nodes restart together
    WORLD_SIZE=$((NNODES * processes)) starter=torchrun
    torchrun=(-m torch.distributed.run --nnodes "$NNODES" --nproc_per_node "$processes"
        --max_restarts "${MAX_RESTARTS:-3}" --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT"
        --rdzv_conf "is_host=$((NODE_RANK == 0))" "$@")
}

tasks_of_nodes() { # "2(x3),1" -> 2 2 2 1
    local part count times
    for part in ${1//,/ }; do
        count=${part%%(*} times=1
        if [[ $part == *x* ]]; then times=${part#*x} times=${times%)}; fi
        for ((; times > 0; times--)); do printf '%s ' "$count"; done
    done
}

count_processes() {
    if [ -n "${GPUS_PER_NODE:-}" ]; then
        processes=$GPUS_PER_NODE processes_from="GPUS_PER_NODE"
    elif [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        processes=$SLURM_GPUS_ON_NODE processes_from="SLURM_GPUS_ON_NODE"
    elif [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then
        processes=${SLURM_GPUS_PER_NODE##*:} processes_from="SLURM_GPUS_PER_NODE"
    else
        processes=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
        processes_from="the GPUs seen"
        if ((processes == 0)); then processes=1 processes_from="no GPU seen; GPUS_PER_NODE may say otherwise"; fi
    fi
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "$processes_from=$processes is not a number of processes"
}

# ---- choices, each printed once with its reason ----

choose_threads() {
    local cores=${SLURM_CPUS_PER_TASK:-} threads reason="the cores of a task"
    if [ -z "$cores" ] || [ -z "${RANK:-}" ]; then
        cores=$((${SLURM_CPUS_ON_NODE:-$(nproc)} / processes)) reason="the cores of a node over its processes"
    fi
    threads=${OMP_NUM_THREADS:-$((cores > 1 ? cores : 1))}
    note "OMP_NUM_THREADS=$threads ($([ -n "${OMP_NUM_THREADS:-}" ] && echo as set || echo "$reason"))"
    export OMP_NUM_THREADS=$threads OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$threads}
}

route_to_other() { # route_to_other dev|src: interface or own address towards another node
    local address own
    address=$(getent ahostsv4 "$other_host" | awk 'NR == 1 { print $1 }') || address=""
    own=$(ip -o -4 addr show to "${address:-$other_host}" 2>/dev/null | awk 'NR == 1 { print $2 }') || own=""
    if [ -n "$own" ]; then # this is the master, and the name is its own
        if [ "$1" = dev ]; then echo "$own"; else echo "${address:-$other_host}"; fi
    else
        ip -o route get "${address:-$other_host}" 2>/dev/null | sed -n "s/.* $1 \\([^ ]*\\).*/\\1/p"
    fi
}

choose_network() {
    local interface="" reason ports name
    if [ -n "${NCCL_SOCKET_IFNAME:-}" ] && [ -n "${GLOO_SOCKET_IFNAME:-}" ]; then
        reason="as set"
    elif ((NNODES == 1)); then
        interface=lo reason="one node"
    elif [ "$(cat /sys/class/net/ib0/operstate 2>/dev/null)" = up ]; then
        interface=ib0 reason="InfiniBand, and up"
    else
        interface=$(route_to_other dev) || interface=""
        reason="no ib0 that is up; the route to $other_host"
        [ -n "$interface" ] || fail "no route to $other_host: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    fi
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    note "NCCL_SOCKET_IFNAME=$NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME ($reason)"
    if ((NNODES > 1)); then
        ports=$(grep -ls ACTIVE /sys/class/infiniband/*/ports/*/state | awk -F/ '{ printf " %s:%s", $5, $7 }' || true)
        for name in NCCL_IB_HCA NCCL_NET_GDR_LEVEL NCCL_IB_TIMEOUT NCCL_IB_DISABLE; do
            if [ -n "${!name:-}" ]; then note "$name=${!name} (as set)"; fi
        done
        if [ -z "${NCCL_IB_HCA:-}" ]; then
            note "NCCL_IB_HCA is left to NCCL (active InfiniBand ports:${ports:- none}), GPUDirect and timeouts too"
        fi
    fi
}

add_flag() { # add_flag NAME VALUE VARIABLE: where there is a value, and the flags do not give it
    if [ -z "$2" ]; then return; fi
    case " ${flags[*]//-/_} " in
    *" __$1 "* | *" __$1="*) note "$3=$2 is not used: the flags give --$1" ;;
    *)
        flags+=("--$1" "$2")
        note "--$1 $2 (from $3)"
        ;;
    esac
}

preflight() { # once a node, and silent where all is well
    local output_dir="" number found
    if [ "${PREFLIGHT:-1}" = 0 ] || [ "${SLURM_LOCALID:-0}" != 0 ]; then return; fi
    for ((number = 0; number < ${#flags[@]}; number++)); do
        case ${flags[number]//-/_} in
        __output_dir) output_dir=${flags[number + 1]:-.} ;;
        __output_dir=*) output_dir=${flags[number]#*=} ;;
        esac
    done
    # A file of flags comes first, and may name it; without one, generation writes nowhere that is known here.
    if [ -z "$output_dir" ] && [ -f "${flags[0]:-}" ]; then
        output_dir=$(sed -n 's/^output_dir:[[:space:]]*//p' "${flags[0]}" | tr -d "'\"" | sed 's/[[:space:]]*\(#.*\)\{0,1\}$//' | head -n 1)
    fi
    if found=$(env -u RANK -u WORLD_SIZE "$python" "$root/tools/doctor.py" --output_dir "${output_dir:-${TMPDIR:-/tmp}}" 2>&1); then
        note "doctor: no fault on this node"
    else
        echo "$found" >&2
        fail "megalora doctor has found a fault on $(hostname) (PREFLIGHT=0 starts all the same)"
    fi
}

# ---- torchrun, under signals ----

# torchrun hands on no SIGUSR1, gives a SIGTERM 30 s, starts ranks again that left with any status but 0, and ends
# with 1 whatever theirs was. So it is shielded from both signals, the ranks are told here, and they leave their
# word in a file instead of the exit status.
run_preemptible() { # does not return
    local status=0 child
    MEGALORA_PREEMPTED_FILE=$(mktemp -u "${TMPDIR:-/tmp}/megalora-preempted.XXXXXX")
    export MEGALORA_PREEMPTED_FILE PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
    trap 'pkill -USR1 -P "$child" || true' USR1 TERM
    (
        trap '' USR1 TERM
        exec "$python" "${torchrun[@]}" "$root/$program" "${flags[@]}"
    ) &
    child=$!
    wait_for "$child" || status=$?
    if [ -e "$MEGALORA_PREEMPTED_FILE" ]; then
        rm -f "$MEGALORA_PREEMPTED_FILE"
        status=$REQUEUE
    fi
    exit "$status"
}
