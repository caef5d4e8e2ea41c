"""Prompts to token ids, in a process of its own: a chat template and a tokenizer are a stranger's programs."""
