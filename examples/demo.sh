#!/usr/bin/env bash
# The whole product in one script: get a model, teach it who it is, hear it before and after.
#
#   make demo                    installs, then runs this; no GPU needed, a few minutes on 2 cores
#
# 4 processes: 2 pipeline stages, each cut into 2 by tensor parallelism.
set -euo pipefail
cd "$(dirname "$0")/.."

model=models/SmolLM2-135M-Instruct
out=build/demo

echo "== 1/4  the model"
python examples/get_smollm2.py --model_path "$model"

echo "== 2/4  fine-tuning, tensor parallel 2 x pipeline parallel 2"
OMP_NUM_THREADS=1 python -m megalora finetune --nproc 4 \
    --model_path "$model" \
    --data_path examples/data/self_cognition.json \
    --lora_config examples/lora_config.json \
    --tensor_parallel_size 2 \
    --pipeline_parallel_size 2 \
    --uneven_heads true \
    --seq_length 256 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --num_train_epochs 4 \
    --learning_rate 1e-3 \
    --lr_scheduler_type cosine \
    --warmup_steps 3 \
    --overwrite_output_dir true \
    --output_dir "$out"

reply() { # reply OUTPUT_FILE FLAGS...
    python -m megalora generate --model_path "$model" --prompts_file examples/data/demo_prompts.txt \
        --max_new_tokens 64 --output_file "$@"
}
echo "== 3/4  the replies of the base and of the tuned model"
reply "$out/base.jsonl"
reply "$out/tuned.jsonl" --resume_peft_from_checkpoint "$out"

echo "== 4/4  side by side"
python examples/compare.py base="$out/base.jsonl" tuned="$out/tuned.jsonl"

echo "== next: source .venv/bin/activate"
echo "curves and replies in the browser: megalora board $out"
echo "a chat page: megalora serve --model_path $model --adapters tuned=$out"
echo "runs to start from, with your own rows: megalora recipes"
