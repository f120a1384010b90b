"""How far a model is from its reference, on a sample of a job's own prompts."""
