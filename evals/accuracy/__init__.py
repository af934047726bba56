"""The cost of int4 in accuracy: perplexity, lm-eval's tasks on local data, paired scores, and the gate of CI.

`run` compares models on tasks (``torch-int4 eval``), `harness` is the model type of lm-eval, `tasks` holds its tasks on
files; `gate` needs no lm-eval.
"""
