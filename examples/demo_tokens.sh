#!/usr/bin/env bash
# Token classification: teach a small encoder to find people, places and organisations, and measure F1 on other sentences.
#
#   make demo-tokens             installs, then runs this; no GPU needed, under 3 minutes on 2 cores
#
# 4 processes: 2 pipeline stages, each cut into 2 by tensor parallelism.
set -euo pipefail
cd "$(dirname "$0")/.."

model=models/all-MiniLM-L6-v2
out=build/demo-tokens

echo "== 1/3  the model"
python examples/get_minilm.py --model_path "$model"

echo "== 2/3  fine-tuning, tensor parallel 2 x pipeline parallel 2"
OMP_NUM_THREADS=1 python -m megalora finetune --nproc 4 \
    --model_path "$model" \
    --data_path examples/data/tagged.conll \
    --eval_data_path examples/data/tagged_held.conll \
    --lora_config examples/lora_tokens.json \
    --tensor_parallel_size 2 \
    --pipeline_parallel_size 2 \
    --seq_length 64 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --num_train_epochs 8 \
    --base_dropout false \
    --learning_rate 2e-3 \
    --lr_scheduler_type cosine \
    --warmup_steps 5 \
    --logging_steps 10 \
    --overwrite_output_dir true \
    --output_dir "$out"

echo "== 3/3  the entities of a sentence, and F1 on the held-out ones"
python -m megalora generate --model_path "$model" --resume_peft_from_checkpoint "$out" \
    --prompt "Ximena Kowalski left the University of Porto for Atlas Airways in Copenhagen."
tail -n 1 "$out/eval_metrics.jsonl"
