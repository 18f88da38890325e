"""Text in and out of a model: `generate`, `perplexity`, `fill` (masked tokens), `embed`."""
