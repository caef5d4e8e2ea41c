"""What a model's files say: tensors, shape, KV cache."""
