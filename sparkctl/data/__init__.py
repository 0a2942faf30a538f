"""From chat files to packs of tokens: read, chat, tokens, split, stats, pack, batches."""
