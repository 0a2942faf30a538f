"""The embedded default: a tiny multimodal Qwen3.5, its tokenizer, its chat template and its chats."""
