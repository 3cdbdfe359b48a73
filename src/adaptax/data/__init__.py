"""From files of conversations to batches of tokens: sources, formats, chat, tokenizer, pipeline."""
