"""OpenAI's completions and chat completions as data: what comes in, what goes out, how errors look. No HTTP here."""
