"""The endpoint: one engine behind OpenAI's HTTP interface. An ASGI application; `jobs.serve` puts it on Ray Serve."""
