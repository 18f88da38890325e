"""Text in and out of a model: generation, scoring, filling masks, embeddings."""
