#!/usr/bin/env bash
# The commands of benchmarks/RESULTS.md that need a GPU, in one call: one after another, with two GPUs or more the
# single-GPU ones on two of them at a time.
#
#   benchmarks/gpu.sh CONFIG_8B.json CONFIG_70B.json FOLDER [one|several]
#
# one, several: those of one GPU alone, or those of several alone.
# FOLDER/figures.txt gets the output of each as soon as it has ended, so that a call that is cut short leaves what it
# has; the seconds that each took stand beside its name.
set -u
[[ $# = 3 || ${4-} =~ ^(one|several)$ ]] || { sed -n 's/^# \{0,1\}//; 2,9p' "$0"; exit 2; }
model=$(realpath "$1") large=$(realpath "$2")
part=${4-both}
mkdir -p "$3"
figures=$(realpath "$3")/figures.txt
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
: >"$figures"

measure() { # NAME COMMAND...: its output and status into figures.txt
    local name=$1 start=$SECONDS output failed=
    shift
    output=$(timeout 300 "$@" 2>&1) || failed=", status $?"
    output=$(grep -viE 'warn|deprecated|could not be imported' <<<"$output")
    # In one piece: the other queue writes there too.
    printf '\n== %s (%s s%s): %s\n%s\n' "$name" $((SECONDS - start)) "$failed" "$*" "$output" >>"$figures"
}

step=(python benchmarks/train_step.py --model "$model" --seq_length 2048 --labels all --steps 8 --warmup 4)
all_linear=(--r 16 --dropout 0.1 --target_modules all-linear)
q_and_v=(--r 64 --dropout 0.05)

first_queue() {
    measure "q, v, 4 rows" "${step[@]}" --rows 4 "${q_and_v[@]}" --contenders ours liger
    measure "q, v, 1 row" "${step[@]}" --rows 1 "${q_and_v[@]}" --contenders ours peft
    measure "70B, a slice of tensor parallel 8" python benchmarks/plan_slice.py --model "$large" --tp 8
    measure "generation" python benchmarks/generate.py --model "$model" --prompts 32 --peer batched --new_tokens 128 \
        --prompt_tokens 64 192 --repeats 1 --bandwidth 3000
}

second_queue() {
    measure "all linears, 4 rows" "${step[@]}" --rows 4 "${all_linear[@]}" --contenders ours
    measure "all linears, 1 row" "${step[@]}" --rows 1 "${all_linear[@]}" --contenders ours
    measure "all linears, 8 rows" "${step[@]}" --rows 8 "${all_linear[@]}" --contenders ours
    measure "memory" python benchmarks/plan_memory.py --model "$model"
    measure "kernels" python benchmarks/lora_kernels.py
    measure "one linear" python benchmarks/lora_linear.py --device cuda --repeats 7
}

several() {
    local several=(python benchmarks/multi_gpu.py --output)
    measure "messages beside products" torchrun --nproc_per_node "$gpus" benchmarks/tp_messages.py
    measure "tensor and data parallel" "${several[@]}" "$figures.tp.json" --model "$model" --rows 4 --steps 4 \
        --only tp2 tp4 tp8 dp2 dp4
    measure "pipelines" "${several[@]}" "$figures.pp.json" --model "$model" --rows 2 --steps 3 --partition_method cost \
        --only "pp2, 1f1b" "pp2, interleaved" "pp4, 1f1b" "pp4, interleaved"
    measure "70B" "${several[@]}" "$figures.70b.json" --model "$large" --recompute full --partition_method cost \
        --steps 1 --alone false \
        --only "pp2, 1f1b" "pp2, interleaved" tp2 "tp4 pp2" tp8
}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus >= 2)) && [ "$part" != one ]; then
    several
fi
if ((gpus >= 2)) && [ "$part" != several ]; then
    CUDA_VISIBLE_DEVICES=0 first_queue &
    queue=$!
    CUDA_VISIBLE_DEVICES=1 second_queue
    wait "$queue"
elif [ "$part" != several ]; then
    first_queue
    second_queue
fi
cat "$figures"
