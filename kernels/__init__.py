"""The lowest floor: tensors in, tensors out. Knows no model, no engine, no Ray."""
