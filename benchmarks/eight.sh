#!/usr/bin/env bash
# What needs the four or eight GPUs of one host, in calls of under ten minutes each.
#
#   benchmarks/eight.sh FOLDER same|dense|experts|long CONFIG.json
#
# same     the same float32 losses on tp4, tp8, pp4, cp4, experts at tp 8 and others (tests/test_multi_gpu.py)
# dense    CONFIG is a 70B's: the layouts that the plan puts first for rows of 4096, in bf16 and with the base in fp8;
#          an 8B's: tp4 and tp8 beside one GPU
# experts  CONFIG is of Qwen3-30B-A3B's shape: the layouts that the plan puts first for rows of 4096
# long     one row of 1,048,576 tokens over all GPUs (cp), 80 GB each
# FOLDER/NAME.txt gets the output as soon as it is there.
set -u
[[ $# = 3 || ($# = 2 && ${2-} = same) ]] || { sed -n 's/^# \{0,1\}//; 2,12p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1") part=$2 model=$(realpath "${3:-.}")
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} NCCL_NVLS_ENABLE=0 OMP_NUM_THREADS=1
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
layers=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["num_hidden_layers"])' "$model" 2>/dev/null)
several=(python benchmarks/multi_gpu.py --model "$model" --steps 4 --seq_length 4096 --output)

measure() { # NAME COMMAND...
    local name=$1
    shift
    { echo "$*"; timeout 580 "$@" 2>&1 || echo "status $?"; } | tee "$folder/$name.txt"
}

case $part in
    same) measure same python -m pytest -q -rs tests/test_multi_gpu.py -k "more_gpus or every_layout" ;;
    dense)
        if ((layers >= 60)); then
            for format in dense fp8; do
                measure "70b-$format" "${several[@]}" "$folder/70b-$format.json" --planned 2 --step_rows 32 \
                    --recompute auto --memory 76 --partition_method cost --base_format "$format"
            done
        else
            measure 8b "${several[@]}" "$folder/8b.json" --rows 2 --only tp4 tp8 cp4 "tp4 pp2"
        fi
        ;;
    experts) measure experts "${several[@]}" "$folder/experts.json" --planned 3 --step_rows 32 --recompute auto ;;
    long)
        measure long torchrun --nproc_per_node "$gpus" benchmarks/long_rows.py --model "$model" --lengths 1048576 \
            --cp "$gpus" --memory 74 --host 60 --steps 1 --output "$folder/long.json"
        ;;
    *) echo "no part $part: same, dense, experts or long"; exit 2 ;;
esac
