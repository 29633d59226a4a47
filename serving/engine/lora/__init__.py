"""LoRA files, the key layouts of their trainers, and the adapters in memory."""
