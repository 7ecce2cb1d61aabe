import os

# Before torch is imported: a process with one thread can be forked, and runs that are compared bit by bit have the
# same number. No GPU and no account, so that every machine does the same.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
