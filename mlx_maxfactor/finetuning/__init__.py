"""Fine-tuning with mlx-lm: models, adapters, optimizers by name, memory, resumable runs.

Only this package and ``commands`` import mlx-lm (the extra ``lm``).
"""
