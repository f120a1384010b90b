"""OpenAI's Batch files: as a corpus, and as what comes out."""
