"""Names that flags offer for what is defined beside torch, so that `--help` need not import torch.

Each is the one definition of these names; what they stand for is defined by the module named here.
"""

DTYPES = ("bfloat16", "float16", "float32", "float64")  # compute_dtype.DTYPES
BASE_FORMATS = ("dense", "fp8", "nf4", "nf4_fp8")  # parallel.formats.BaseFormat
KV_CACHES = ("dense", "fp8")  # generation.cache.Dense and Fp8
OPTIMIZERS = ("adamw", "apex")  # optimizer.AdapterOptimizer
TRACKERS = ("tensorboard", "wandb", "mlflow", "swanlab", "none")  # monitor.trackers
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "SEQ_CLS")  # tasks.TASKS
CLASSIFICATION = ("TOKEN_CLS", "SEQ_CLS")  # those of them whose head is trained in full
RECOMPUTE = ("auto", "none", "selective", "full")  # planning.fitting
# What of one layer is computed again in backward: nothing; the normed inputs of its linears; rotation and attention;
# its MLPs and the normed inputs; all of it but the result of attention; all of it.
RECOMPUTE_LEVELS = ("none", "norms", "selective", "mlp", "layer", "full")
